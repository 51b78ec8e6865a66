"""From one value per example to one number: the only place with a denominator."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks, value_checks
from kljax._engine.classes import Layout, Shape
from kljax._engine.terms import weigh

Reduction = Literal["none", "mean", "sum", "batchmean"]
AxisName = str | Sequence[str]


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
    is NaN or infinite also out of every other derivative. A denominator of 0 gives 0. What the
    values are made of is not seen here: where its own derivative is NaN or infinite, 0 times that
    is NaN, so select harmless inputs first, ``jnp.where(mask, x, 0)``, as `sampled_kl` does.
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
        ValueError: For a shape or option that does not fit.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> values = jnp.array([1.0, 3.0, jnp.nan])
        >>> print(kljax.reduce(values, weights=jnp.array([1, 1, 0]), reduction="mean"))
        2.0

    Source: the weighted mean as in every statistics text; no other convention is hidden here.
    """
    values = checks.to_array("reduce", "values", values)
    checks.require_float("reduce", "values", values)
    layout = Layout.of(values.shape, ())
    weighting = Weighting.read(
        "reduce",
        layout,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
    )
    return _reduce(values, weighting)


@jax.jit
def _reduce(values: Array, weighting: "Weighting") -> Array:
    value_checks.check_weights("reduce", "weights", weighting.weights)
    values = values.astype("float64" if values.dtype == jnp.float64 else "float32")
    return weighting.reduced(values)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "normalizer"],
    meta_fields=["reduction", "axis_name"],
)
@dataclass(frozen=True)
class Weighting:
    """How one value per example becomes one number: as a factor of each, and a sum."""

    weights: Array | None
    normalizer: Array | None
    reduction: Reduction
    axis_name: tuple[str, ...]

    @classmethod
    def read(
        cls,
        caller: str,
        layout: Layout,
        *,
        weights: ArrayLike | None,
        reduction: Reduction,
        normalizer: ArrayLike | None,
        axis_name: AxisName | None,
        prefix: str = "",
    ) -> "Weighting":
        """From the options of a call, or an error; `prefix` is that of their names."""
        checks.require_choice(caller, "reduction", reduction, get_args(Reduction))
        if weights is not None:
            argument = f"{prefix}weights"
            weights = checks.to_array(caller, argument, weights)
            checks.require_weights(caller, argument, weights, layout.batch, layout.classes)
        if normalizer is not None:
            argument = f"{prefix}normalizer"
            if reduction != "mean":
                expected, got = 'given with reduction="mean"', f'reduction="{reduction}"'
                checks.fail(caller, argument, expected, got, "Leave it out, or take the mean.")
            normalizer = checks.require_number(caller, argument, normalizer)
        if axis_name is not None and reduction == "none":
            remedy = "Nothing is summed over the axis without one."
            checks.fail(caller, "axis_name", "given with a reduction", 'reduction="none"', remedy)
        names = checks.require_axis_names(caller, "axis_name", axis_name)
        checks.require_disjoint(caller, names, layout.names)
        return cls(weights, normalizer, reduction, names)

    def factor(self, batch: Shape, dtype: jnp.dtype) -> Array | None:
        """That of each example, so that the reduction is nothing but a sum of the scaled."""
        weights = None if self.weights is None else self.weights.astype(dtype)
        if self.reduction in ("none", "sum"):
            return weights
        if self.normalizer is not None:
            denominator = self.normalizer.astype(dtype)
        elif self.reduction == "mean":
            ours = jnp.asarray(math.prod(batch), dtype) if weights is None else jnp.sum(weights)
            denominator = self.over_axes(ours)
        else:
            denominator = self.over_axes(jnp.asarray(batch[0] if batch else 1, dtype))
        empty = denominator == 0
        share = jnp.where(empty, 0, 1 / jnp.where(empty, 1, denominator))
        return jnp.broadcast_to(share, batch) if weights is None else weights * share

    def reduced(self, values: Array) -> Array:
        """The whole of it, of values that are at hand."""
        factor = self.factor(values.shape, values.dtype)
        if factor is not None:
            values = weigh(factor, values)
        return self.over_axes(values if self.reduction == "none" else jnp.sum(values))

    def over_axes(self, value: Array) -> Array:
        """The sum over the named axes, if the examples are spread over any."""
        return lax.psum(value, self.axis_name) if self.axis_name else value
