"""Optax's KL losses and its softmax cross-entropy.

They are computed in float32 (float64 if an input is) and rounded once to the dtype that Optax
returns. Shapes broadcast as in JAX, ``where`` too, and errors are of Optax's types.
"""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import kljax
from kljax._engine import checks
from kljax._engine.terms import term_generalized_kl, term_kl
from kljax.compat import _checks
from kljax.compat import _elements as elements

Axis = int | Iterable[int] | None


def kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's ``kl_divergence``, D(targets‖predictions).

    .. math:: \sum_i t_i (\log t_i - \log s_i)

    Shapes: any that broadcast; the result lacks ``axis``. Nothing is normalised. Units: nats.

    Zeros: a target of 0 contributes 0, also where the prediction is 0 (Optax: NaN); +inf where
    only the prediction is 0. What ``where`` masks has no effect. NaN gives NaN.
    Gradients: to both, in every mode; 0 to a target of 0 (Optax: NaN in reverse mode).

    Args:
        log_predictions: Log-probabilities.
        targets: Probabilities.
        axis: The axis, or axes, to sum over; None is all.
        where: bool, the elements to include; broadcasts against the whole input, so a mask
            of shape (n,) masks classes. Masks of examples need a last axis of 1.

    Raises:
        ValueError: For an axis or a mask that does not fit.
        TypeError: For a dtype, or shapes that do not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> print(optax.kl_divergence(jnp.log(jnp.array([0.25, 0.75])), jnp.array([1.0, 0.0])))
        1.3862944

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    sides = {"log_predictions": log_predictions, "targets": targets}
    return _sum("kl_divergence", _kl, sides, axis, where)


def kl_divergence_with_log_targets(
    log_predictions: ArrayLike,
    log_targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's ``kl_divergence_with_log_targets``: `kl_divergence` of log-probabilities.

    .. math:: \sum_i t_i (\log t_i - \log s_i)

    Shapes, units (nats), arguments, errors: as `kl_divergence`.

    Zeros: a log-target of -inf contributes 0, whatever the prediction (Optax: NaN).
    Gradients: to both, in every mode; 0 to a log-target of -inf (Optax: NaN).

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> s, t = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([1.0, 0.0]))
        >>> print(optax.kl_divergence_with_log_targets(s, t))
        1.3862944

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    sides = {"log_predictions": log_predictions, "log_targets": log_targets}
    return _sum("kl_divergence_with_log_targets", _kl_of_logs, sides, axis, where)


def generalized_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's ``generalized_kl_divergence``, of measures that need not be normalised.

    .. math:: \sum_i t_i (\log t_i - \log s_i) + s_i - t_i

    Shapes, units (nats), arguments, errors: as `kl_divergence`.

    Zeros: a target of 0 contributes the prediction s, also where that is 0 (Optax: NaN).
    Gradients: to both, in every mode; 0 to a target of 0 (Optax: NaN).

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> s, t = jnp.log(jnp.array([0.25, 0.75])), jnp.array([2.0, 0.0])
        >>> print(f"{optax.generalized_kl_divergence(s, t):.4f}")
        3.1589

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    sides = {"log_predictions": log_predictions, "targets": targets}
    return _sum("generalized_kl_divergence", _generalized_kl, sides, axis, where)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's ``softmax_cross_entropy`` with one-hot or soft labels.

    .. math:: -\sum_i t_i \log \mathrm{softmax}(x)_i

    Shapes, units (nats), errors: as `kl_divergence`; ``where`` may also lack ``axis``: then it
    masks whole examples. It takes the masked classes out of the softmax too.

    Zeros: a label of 0 contributes 0, also under a logit of -inf (Optax: NaN); +inf where only the
    softmax is 0; an example with no class left gives 0.
    Gradients: to both, in every mode.

    Args:
        logits: Unnormalised log-probabilities.
        labels: One per class: floats, integers or bool.
        axis: The axis, or axes, of the classes; None is all.
        where: bool, the elements to include.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> logits, labels = jnp.array([1.0, -jnp.inf, 1.0]), jnp.array([1, 0, 0])
        >>> print(f"{optax.softmax_cross_entropy(logits, labels):.4f}")
        0.6931

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    name = "softmax_cross_entropy"
    logits = _floats(name, "logits", logits)
    _checks.require_array(name, "labels", labels, scalars=True)
    dtype = elements.promoted(logits, labels)
    labels = jnp.asarray(labels)
    labels = labels if jnp.issubdtype(labels.dtype, jnp.floating) else labels.astype(dtype)
    shape = _shape(name, {"logits": logits, "labels": labels})
    own, axes = (_checks.require_axis(name, x, axis) for x in (logits.shape, shape))
    if where is not None:
        _checks.require_array(name, "where", where)
        where = jnp.asarray(where)
        where = where if where.ndim == logits.ndim else jnp.expand_dims(where, own)
        _checks.require_mask(name, where, logits.shape)
    return _softmax_cross_entropy(logits, labels, where, own, axes, dtype)


@partial(jax.jit, static_argnames=("own", "axes", "dtype"))
def _softmax_cross_entropy(
    logits: Array,
    labels: Array,
    where: Array | None,
    own: tuple[int, ...],
    axes: tuple[int, ...],
    dtype: jnp.dtype,
) -> Array:
    (x,) = elements.computed(logits)
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, 0)
    log_q, t = elements.computed(jax.nn.log_softmax(x, own, where), labels)
    if where is not None:
        t = jnp.where(jnp.broadcast_to(where, t.shape), t, 0)
    # Not `term_cross_entropy`: the gradient to a label of 0 is -log q here, not 0.
    masked = (t == 0) & jnp.isneginf(log_q)
    return -jnp.sum(t * jnp.where(masked, 0, log_q), axes).astype(dtype)


def safe_softmax_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    r"""Optax's ``safe_softmax_cross_entropy``: `softmax_cross_entropy` over the last axis.

    .. math:: -\sum_i t_i \log \mathrm{softmax}(x)_i

    Shapes, units (nats), errors: as `softmax_cross_entropy`.

    Zeros: as there, a label of 0 under a logit of -inf contributes 0.
    Gradients: to both, in every mode, also beside a logit of -inf (Optax: NaN in forward mode).

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> logits, labels = jnp.array([1.0, -jnp.inf, 1.0]), jnp.array([1, 0, 0])
        >>> print(f"{optax.safe_softmax_cross_entropy(logits, labels):.4f}")
        0.6931

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    return softmax_cross_entropy(logits, labels)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's ``softmax_cross_entropy_with_integer_labels``.

    .. math:: -\log \mathrm{softmax}(x)_y

    Shapes: labels lack ``axis`` and otherwise broadcast against the logits. Units: nats.

    Zeros: +inf where the label's softmax is 0. A label out of range, or of a masked class, gives
    NaN (Optax: out of range NaN, but a negative label counts from the end).
    Gradients: to the logits, in every mode.

    Args:
        logits: Unnormalised log-probabilities.
        labels: Integers in [0, classes).
        axis: The axis of the classes.
        where: bool, the elements to include; it broadcasts against the logits.

    Raises:
        ValueError: For an axis or a mask that does not fit.
        TypeError: For a dtype, or shapes that do not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> logits, labels = jnp.zeros((2, 4)), jnp.array([3, 0])
        >>> print(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        [1.3862944 1.3862944]

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    name = "softmax_cross_entropy_with_integer_labels"
    logits = _floats(name, "logits", logits)
    _checks.require_array(name, "labels", labels, scalars=True)
    labels = checks.to_array(name, "labels", labels)
    _checks.require_integer(name, "labels", labels)
    (axis,) = _checks.require_axis(name, logits.shape, axis)
    classes = logits.shape[axis]
    if where is not None:
        where = jnp.asarray(where)
        _checks.require_mask(name, where, logits.shape)
        where = jnp.moveaxis(jnp.broadcast_to(where, logits.shape), axis, -1)
    x = jnp.moveaxis(logits, axis, -1)
    _checks.require_broadcastable(name, {"logits": x.shape[:-1], "labels": labels.shape}, TypeError)
    batch = jnp.broadcast_shapes(x.shape[:-1], labels.shape)
    x = jnp.broadcast_to(x, (*batch, classes))
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
    labels = jnp.broadcast_to(labels, batch)
    return kljax.cross_entropy(x, labels, where=where).astype(logits.dtype)


def convex_kl_divergence(
    log_predictions: ArrayLike,
    targets: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Optax's deprecated name of `generalized_kl_divergence`.

    .. math:: \sum_i t_i (\log t_i - \log s_i) + s_i - t_i

    Shapes, units (nats), zeros, gradients, arguments, errors: as `generalized_kl_divergence`.

    Zeros: as there.
    Gradients: as there.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat import optax
        >>> s, t = jnp.log(jnp.array([0.25, 0.75])), jnp.array([2.0, 0.0])
        >>> print(f"{optax.convex_kl_divergence(s, t):.4f}")
        3.1589

    Source: Optax 0.2.8, optax/losses/_classification.py.
    """
    return generalized_kl_divergence(log_predictions, targets, axis, where)


def _kl(log_q: Array, p: Array) -> Array:
    return elements.kl_of_probs(p, log_q)


def _kl_of_logs(log_q: Array, log_p: Array) -> Array:
    return term_kl(log_p, log_q)


def _generalized_kl(log_q: Array, p: Array) -> Array:
    return term_generalized_kl(elements.log(p), log_q)


def _sum(
    name: str,
    term: Callable[[Array, Array], Array],
    sides: dict[str, ArrayLike],
    axis: Axis,
    where: ArrayLike | None,
) -> Array:
    """Sum a term of two arguments of floats."""
    arrays = {argument: _floats(name, argument, side) for argument, side in sides.items()}
    shape = _shape(name, arrays)
    axes = _checks.require_axis(name, shape, axis)
    if where is not None:
        _checks.require_array(name, "where", where, scalars=True)
        where = jnp.asarray(where)
        _checks.require_mask(name, where, shape)
    return _sum_of_floats(*arrays.values(), where, term, axes, elements.promoted(*sides.values()))


@partial(jax.jit, static_argnames=("term", "axes", "dtype"))
def _sum_of_floats(
    log_q: Array,
    p: Array,
    where: Array | None,
    term: Callable[[Array, Array], Array],
    axes: tuple[int, ...],
    dtype: jnp.dtype,
) -> Array:
    log_q, p = elements.computed(log_q, p)
    if where is not None:  # selected before the term, whose derivative may be infinite
        where = jnp.broadcast_to(where, log_q.shape)
        log_q, p = (jnp.where(where, side, 0) for side in (log_q, p))
    values = term(log_q, p)
    if where is not None:
        values = jnp.where(where, values, 0)
    return jnp.sum(values, axes).astype(dtype)


def _floats(name: str, argument: str, value: ArrayLike) -> Array:
    _checks.require_array(name, argument, value, scalars=True)
    value = jnp.asarray(value)
    checks.require_float(name, argument, value)
    return value


def _shape(name: str, arrays: dict[str, Array]) -> tuple[int, ...]:
    shapes = {argument: array.shape for argument, array in arrays.items()}
    _checks.require_broadcastable(name, shapes, TypeError)
    return jnp.broadcast_shapes(*shapes.values())
