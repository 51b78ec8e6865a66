"""Keras' `keras.losses.kl_divergence`, which is `keras.metrics.kl_divergence` too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax.compat import _checks
from kljax.compat import _elements as elements

_EPSILON = 1e-7  # keras.config.epsilon()


def kl_divergence(y_true: ArrayLike | Sequence[Any], y_pred: ArrayLike | Sequence[Any]) -> Array:
    r"""Keras' ``kl_divergence``, D(true‖pred) of probabilities clipped to [1e-7, 1].

    .. math:: \sum_i \hat t_i (\log \hat t_i - \log \hat s_i), \qquad
              \hat p = \min(\max(p, 10^{-7}), 1)

    Clipping is part of Keras' numbers: no value is infinite, confident disagreement costs at most
    about 16 per example, and what is clipped gets no gradient. Nothing is normalised.

    Shapes: any that broadcast; the result lacks the last axis. Its dtype is that of ``y_pred``,
    to which ``y_true`` is converted. 16-bit inputs are computed in float32 and rounded once;
    integers become JAX's default float. Units: nats.

    Zeros: become 1e-7, on both sides. NaN gives NaN.
    Gradients: to both sides, as Keras on JAX: 0 below 1e-7 and above 1, half of it at 1 itself.

    Args:
        y_true: Probabilities: an array, a list or a number.
        y_pred: Probabilities, likewise.

    Raises:
        ValueError: If there is no axis, or for complex numbers.
        TypeError: For shapes that do not broadcast.

    Example:
        >>> from kljax.compat import keras
        >>> print(keras.kl_divergence([[0.5, 0.5]], [[0.0, 1.0]]).round(4))
        [7.3659]

    Source: Keras 3.15, keras/src/losses/losses.py.
    """
    name = "kl_divergence"
    y_pred = checks.to_array(name, "y_pred", y_pred)
    y_true = checks.to_array(name, "y_true", y_true).astype(y_pred.dtype)
    _checks.require_real(name, "y_pred", y_pred)
    _checks.require_broadcastable(name, {"y_true": y_true.shape, "y_pred": y_pred.shape}, TypeError)
    _checks.require_axis(name, jnp.broadcast_shapes(y_true.shape, y_pred.shape), -1)
    return _kl_divergence(y_true, y_pred)


@jax.jit
def _kl_divergence(y_true: Array, y_pred: Array) -> Array:
    y_true, y_pred = (jnp.clip(_as_float(side), _EPSILON, 1) for side in (y_true, y_pred))
    t, s = elements.computed(y_true, y_pred)
    return jnp.sum(elements.kl_of_probs(t, jnp.log(s)), axis=-1).astype(y_pred.dtype)


def _as_float(side: Array) -> Array:
    return side if jnp.issubdtype(side.dtype, jnp.floating) else side.astype(jnp.result_type(float))
