"""From one value per example to one number: the only place with a denominator."""

import math
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks, value_checks
from kljax._engine.terms import weigh

Reduction = Literal["none", "mean", "sum", "batchmean"]
AxisName = str | tuple[str, ...]


def reduce(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""Weight one value per example and reduce them.

    .. math:: \text{mean} = \frac{\sum_n w_n \ell_n}{\sum_n w_n}, \quad
              \text{sum} = \sum_n w_n \ell_n, \quad
              \text{batchmean} = \frac{\sum_n w_n \ell_n}{N}

    Shapes: ``weights`` has exactly the shape of ``values``; N is its leading size, 1 if it has
    no axes. "none" keeps the shape, the others give a scalar.

    Zeros: a weight of 0 takes its example out of the value and the gradient to values; one that
    is NaN or infinite also out of every other derivative. A denominator of 0 gives 0.
    Gradients: to values, weights and normalizer. Through ``axis_name`` they are exact for ``grad``
    outside the map, and inside ``shard_map(check_vma=True)``. Inside ``vmap`` or
    ``check_vma=False`` JAX's transposed psum multiplies every gradient by the axis size: average
    that of a shared parameter over the axis (``lax.pmean``), divide that of what one shard alone
    holds. Or leave ``axis_name`` out there, pass ``normalizer=lax.psum(jnp.sum(weights), axis)``,
    and sum the gradients of shared parameters (``lax.psum``).

    Args:
        values: One per example; computed in float32 unless float64.
        weights: bool, int or float, one per example.
        reduction: "none", "mean", "sum" or "batchmean".
        normalizer: With "mean", divide by this instead of the sum of weights. It is already
            global: never summed over ``axis_name``. For gradient accumulation, pass the sum of
            weights of all micro-batches and add up the results.
        axis_name: Named mapped axes (``vmap``, ``shard_map``) over which numerator and
            denominator are summed before dividing.

    Raises:
        ValueError: For a shape or option that does not fit. TypeError: for a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> values = jnp.array([1.0, 3.0, jnp.nan])
        >>> print(kljax.reduce(values, weights=jnp.array([1, 1, 0]), reduction="mean"))
        2.0

    Source: the weighted mean as in every statistics text; no other convention is hidden here.
    """
    values = checks.to_array("reduce", "values", values)
    checks.require_float("reduce", "values", values)
    layout = checks.Layout(values.shape, ())
    weights, normalizer = prepare("reduce", layout, weights, reduction, normalizer, axis_name)
    return _reduce(values, weights, normalizer, reduction=reduction, axis_name=axis_name)


@partial(jax.jit, static_argnames=("reduction", "axis_name"))
def _reduce(
    values: Array,
    weights: Array | None,
    normalizer: Array | None,
    *,
    reduction: Reduction,
    axis_name: AxisName | None,
) -> Array:
    value_checks.check_weights("reduce", "weights", weights)
    values = values.astype("float64" if values.dtype == jnp.float64 else "float32")
    scale = example_scale(values.shape, values.dtype, weights, reduction, normalizer, axis_name)
    return total(values if scale is None else weigh(scale, values), reduction, axis_name)


def prepare(
    caller: str,
    layout: checks.Layout,
    weights: ArrayLike | None,
    reduction: Reduction,
    normalizer: ArrayLike | None,
    axis_name: AxisName | None,
) -> tuple[Array | None, Array | None]:
    """Check the options of a reduction; weights and normalizer as arrays."""
    checks.require_choice(caller, "reduction", reduction, get_args(Reduction))
    if weights is not None:
        weights = checks.to_array(caller, "weights", weights)
        checks.require_weights(caller, "weights", weights, layout.batch, layout.classes)
    if normalizer is not None:
        if reduction != "mean":
            expected, got = 'given with reduction="mean"', f'reduction="{reduction}"'
            checks.fail(caller, "normalizer", expected, got, "Leave it out, or take the mean.")
        normalizer = checks.require_number(caller, "normalizer", normalizer)
    if axis_name is not None and reduction == "none":
        remedy = "Nothing is summed over the axis without one."
        checks.fail(caller, "axis_name", "given with a reduction", 'reduction="none"', remedy)
    checks.require_axis_name(caller, axis_name)
    return weights, normalizer


def example_scale(
    batch: tuple[int, ...],
    dtype: jnp.dtype,
    weights: Array | None,
    reduction: Reduction,
    normalizer: Array | None,
    axis_name: AxisName | None,
) -> Array | None:
    """The factor of each example, so that the reduction is nothing but a sum of the scaled."""
    if weights is not None:
        weights = weights.astype(dtype)
    if reduction in ("none", "sum"):
        return weights
    if normalizer is not None:
        denominator = normalizer.astype(dtype)
    elif reduction == "mean":
        ours = jnp.asarray(math.prod(batch), dtype) if weights is None else jnp.sum(weights)
        denominator = _over(axis_name, ours)
    else:
        denominator = _over(axis_name, jnp.asarray(batch[0] if batch else 1, dtype))
    empty = denominator == 0
    share = jnp.where(empty, 0, 1 / jnp.where(empty, 1, denominator))
    return jnp.broadcast_to(share, batch) if weights is None else weights * share


def total(values: Array, reduction: Reduction, axis_name: AxisName | None) -> Array:
    """Add up what `example_scale` has scaled."""
    return values if reduction == "none" else _over(axis_name, jnp.sum(values))


def _over(axis_name: AxisName | None, value: Array) -> Array:
    return value if axis_name is None else lax.psum(value, axis_name)
