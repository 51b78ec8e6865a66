"""A mixture of two distributions over classes, as one distribution."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax import _reading
from kljax._engine import checks, value_checks
from kljax._engine.side import view
from kljax._engine.terms import log_mixture
from kljax._reading import ClassAxisName, Given, Inputs
from kljax.distributions import LogProbs


def mixture(
    a: Given,
    b: Given,
    weight: ArrayLike,
    *,
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    class_axis_name: ClassAxisName | None = None,
) -> LogProbs:
    r"""One distribution from two: unimix, and teachers between two models.

    .. math:: m_i = w a_i + (1 - w) b_i

    Shapes: as for `forward_kl`; the result has the whole input's. Units: log-probabilities, nats.

    Zeros: a class is without mass where both sides are, or the only one of weight; -inf then.
    Gradients: to both sides and weight. Stop a teacher with ``jax.lax.stop_gradient``.

    Args:
        a: Logits or a bare array, `LogProbs`, or `Probs`.
        b: Likewise; the uniform distribution is ``jnp.zeros(classes)``, logits for all examples.
        weight: w, the share of ``a``, in [0, 1]; may be traced.
        axis: As for `forward_kl`.
        where: As for `forward_kl`; the classes that it masks have no mass.
        class_axis_name: As for `forward_kl`.

    Raises:
        ValueError: For a shape or option that does not fit, and for a side that is no array of all
            classes.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> certain = jnp.array([0.0, -jnp.inf, -jnp.inf, -jnp.inf])
        >>> mixed = kljax.mixture(certain, jnp.zeros(4), 0.99)
        >>> print(f"{kljax.forward_kl(mixed, certain):.4f}")
        0.0075

    Source: Hafner et al., Mastering Diverse Domains through World Models (DreamerV3, 2023),
    section "Robust predictions" (unimix).
    """
    inputs = _reading.read(
        _NAME, {"a": a, "b": b}, axis=axis, where=where, class_axis_name=class_axis_name
    )
    for argument, side in zip(inputs.arguments, inputs.sides, strict=True):
        checks.require_all_classes(_NAME, argument, side)
    weight = checks.require_fraction(_NAME, "weight", weight)
    value_checks.check_fraction(_NAME, "weight", weight)
    return LogProbs(_mixture(inputs, weight))


_NAME = "mixture"


@jax.jit
def _mixture(inputs: Inputs, weight: Array) -> Array:
    sides, classes, _ = inputs.place((None, None))
    seen = view(sides, classes, None)
    log_a, log_b = seen.log_probs
    mixed, *_ = log_mixture(log_a, log_b, weight, -seen.log_ratio)
    return classes.present(jnp.broadcast_to(mixed, inputs.layout.shape), -jnp.inf)
