"""The dense path: whole arrays at once, with a derivative rule made of exact coefficients.

The rule returns the value together with the coefficient of every tangent that is really there.
One such rule serves reverse mode, forward mode and, differentiated again, all higher orders.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from kljax._engine import checks
from kljax._engine.representation import (
    ABSENT,
    Kind,
    Operands,
    Spec,
    View,
    to_input,
    view,
)
from kljax._engine.terms import nan_unless, weigh


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def rows(spec: Spec, operands: Operands) -> Array:
    """Sum the term over the classes and scale each example: one number per example."""
    seen = view(spec, operands)
    contributions = _present(operands.where, _term(spec, seen, operands.params))
    values = jnp.sum(contributions, axis=spec.axis)
    for side in seen.sides:
        if side.is_class is not None:  # not as NaN log-probabilities: XLA:CPU folds exp(NaN)
            values = nan_unless(side.is_class, values)
    return values if operands.scale is None else weigh(operands.scale, values)


@partial(rows.defjvp, symbolic_zeros=True)
def _rows_jvp(spec: Spec, primals: tuple[Operands], tangents: tuple[Any]) -> tuple[Array, Array]:
    (operands,), (dots,) = primals, tangents
    seen = view(spec, operands)
    values = rows(spec, operands._replace(scale=None))
    present = _present_where(spec, operands, values)

    values_dot = _params_tangent(spec, seen, operands.params, dots.params, present)
    for i, (side, x_dot) in enumerate(zip(seen.sides, dots.inputs, strict=True)):
        softmax = side.softmax
        to_temperature = softmax is not None and _moves(dots.temperature)
        if not (_moves(x_dot) or to_temperature):
            continue
        slope = _slope(spec, seen, operands.params, i)
        known = spec.slope_sums[i] if spec.slope_sums else None
        there = present
        if known == 0:  # whether the slopes are numbers does not wait for the values
            there = _present_where(spec, operands, _log_masses(spec, seen))
        slope = _present(there, slope)
        if known is None:
            total = jnp.sum(slope, axis=spec.axis, keepdims=True)
            slope = _present(there, _slope_after(total, slope, spec, operands, seen, i))
        else:
            total = jnp.zeros_like(values) if known == 0 else known * values
            total = _refined(jnp.expand_dims(total, spec.axis), slope, spec.axis)
        if known != 0:
            # An infinite divergence has no derivative to the side with mass where the other has
            # none: NaN for the whole row, whose finite entries would be the gradient of nothing.
            invalid = jnp.expand_dims(jnp.isnan(values), spec.axis) | ~jnp.isfinite(total)
            total = nan_unless(~invalid, total)
        if softmax is not None:
            slope = slope - jnp.exp(side.log_probs) * total
        else:
            slope = slope + jnp.where(jnp.isnan(total), total, 0)
        slope = _present(there, slope)
        if softmax is not None and operands.temperature is not None:
            slope = slope / operands.temperature
            if to_temperature:
                along = _masked_product(slope, softmax.scores) * dots.temperature
                values_dot -= jnp.sum(along, axis=spec.axis)
        if _moves(x_dot):
            kind, x = spec.kinds[i], operands.inputs[i]
            coefficient = to_input(kind, slope, x)
            if spec.linear == i and side.probs is not None:
                coefficient = _present(
                    there, _linear_slope(spec, seen, operands.params, i, coefficient)
                )
            along = _along(kind, coefficient, _present(there, x_dot))
            values_dot += jnp.sum(along, axis=spec.axis)

    if operands.scale is None:
        return values, values_dot
    # Known before the values: XLA would make it along with their sum, and the slopes wait for that.
    scale = lax.optimization_barrier(operands.scale)
    values_dot = scale * values_dot
    if _moves(dots.scale):
        removed = (scale == 0) & ~jnp.isfinite(values)
        values_dot += jnp.where(removed, 0, values) * dots.scale
    return weigh(scale, values), values_dot


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def elements(spec: Spec, operands: Operands) -> Array:
    """The term at each class, not summed; classes that do not exist give 0."""
    return _present(operands.where, _term(spec, view(spec, operands), operands.params))


@partial(elements.defjvp, symbolic_zeros=True)
def _elements_jvp(
    spec: Spec, primals: tuple[Operands], tangents: tuple[Any]
) -> tuple[Array, Array]:
    (operands,), (dots,) = primals, tangents
    seen = view(spec, operands)
    values = elements(spec, operands)
    values_dot = jnp.zeros_like(values)
    for i, (side, x_dot) in enumerate(zip(seen.sides, dots.inputs, strict=True)):
        kind, x = spec.kinds[i], operands.inputs[i]
        x_dot = _present(operands.where, x_dot) if _moves(x_dot) else x_dot
        slope = _present(operands.where, _slope(spec, seen, operands.params, i))
        probs, along = jnp.exp(side.log_probs), jnp.zeros_like(values)
        if _moves(x_dot):
            along += _along(kind, to_input(kind, slope, x), x_dot)
            if side.softmax is not None:
                shifts = _along(kind, to_input(kind, probs, x), x_dot)
                along -= slope * jnp.sum(shifts, axis=spec.axis, keepdims=True)
        if side.softmax is not None and operands.temperature is not None:
            if _moves(dots.temperature):
                scores = side.softmax.scores
                mean = jnp.sum(_masked_product(probs, scores), axis=spec.axis, keepdims=True)
                along -= (_masked_product(slope, scores) - slope * mean) * dots.temperature
            along = along / operands.temperature
        values_dot += _present(operands.where, along)
    return values, values_dot


def _term(spec: Spec, seen: View, params: tuple[Any, ...]) -> Array:
    contributions = spec.term(seen.log_probs, seen.log_ratio, params)
    checks.require_contributions("divergence", contributions, seen.log_ratio.shape)
    return contributions.astype(seen.log_ratio.dtype)


def _slope(spec: Spec, seen: View, params: tuple[Any, ...], i: int) -> Array:
    """The term's derivative to the log-probabilities of side i."""

    def along(log_probs: Array, log_ratio: Array) -> Array:
        both = (*seen.log_probs[:i], log_probs, *seen.log_probs[i + 1 :])
        return _term(spec, seen._replace(log_probs=both, log_ratio=log_ratio), params)

    ones = jnp.ones_like(seen.log_ratio)
    sign = 1 if i == 0 else -1
    return jax.jvp(along, (seen.log_probs[i], seen.log_ratio), (ones, sign * ones))[1]


def _linear_slope(spec: Spec, seen: View, params: tuple[Any, ...], i: int, slope: Array) -> Array:
    """The derivative of p · g(log q) to p itself: where p = 0 too it is g, but for q = 0."""
    certain = (*seen.log_probs[:i], jnp.zeros_like(seen.log_ratio), *seen.log_probs[i + 1 :])
    g = _term(spec, seen._replace(log_probs=certain), params)
    at_zero = jnp.where(jnp.isneginf(seen.log_probs[1 - i]), 0, g)
    return jnp.where(seen.sides[i].probs == 0, at_zero, slope)


def _slope_after(
    total: Array, slope: Array, spec: Spec, operands: Operands, seen: View, i: int
) -> Array:
    """The slopes once more, for the pass that needs their total.

    Accelerators read the inputs again: their compiler would rather store the slopes in between.
    """

    def again(total: Array, _: Array, operands: Operands, states: tuple[Any, ...]) -> Array:
        inputs, _ = lax.optimization_barrier((operands.inputs, total))
        seen = view(spec, operands._replace(inputs=inputs), states)
        return _slope(spec, seen, operands.params, i)

    states = tuple(side.softmax and side.softmax.state for side in seen.sides)
    return lax.platform_dependent(
        total, slope, operands, states, cpu=lambda _, slope, *rest: slope, default=again
    )


def _refined(total: Array, slope: Array, axis: tuple[int, ...]) -> Array:
    """The sum of the slopes as they were rounded, where one more pass over them costs little.

    To take it off removes the rounding of the masses, which shows where both sides are close; on
    accelerators it stays, as it does in the plain formula. As the sum is known but for rounding,
    the difference is a constant to derivatives.
    """
    rounding = lax.platform_dependent(
        *lax.stop_gradient((total, slope)),
        cpu=lambda total, slope: jnp.sum(slope, axis=axis, keepdims=True) - total,
        default=lambda total, slope: jnp.zeros_like(total),
    )
    return total + rounding


def _params_tangent(
    spec: Spec, seen: View, params: tuple[Any, ...], dots: tuple[Any, ...], present: Array | None
) -> Array:
    """The derivative along the term's own parameters, for those that move."""
    leaves, tree = jax.tree.flatten(params)
    moving = [i for i, dot in enumerate(tree.flatten_up_to(dots)) if _moves(dot)]
    if not moving:
        return jnp.zeros_like(jnp.sum(seen.log_ratio, axis=spec.axis))

    if present is not None:  # before the term: 0 · NaN in its transpose would be NaN
        hidden = tuple(jnp.where(present, x, ABSENT) for x in seen.log_probs)
        seen = View(seen.sides, hidden, jnp.where(present, seen.log_ratio, 0))

    def along(*moved: Array) -> Array:
        whole = list(leaves)
        for i, leaf in zip(moving, moved, strict=True):
            whole[i] = leaf
        return _present(present, _term(spec, seen, jax.tree.unflatten(tree, whole)))

    steps = [tree.flatten_up_to(dots)[i] for i in moving]
    tangent = jax.jvp(along, [leaves[i] for i in moving], steps)[1]
    return jnp.sum(tangent, axis=spec.axis)


def _present_where(spec: Spec, operands: Operands, rows: Array) -> Array | None:
    """The classes that exist, except in examples that weight 0 removes.

    A finite value of weight 0 needs no removal, and its derivative is the mixed one to the weight.
    """
    if operands.scale is None:
        return operands.where
    kept = jnp.expand_dims((operands.scale != 0) | jnp.isfinite(rows), spec.axis)
    return kept if operands.where is None else operands.where & kept


def _log_masses(spec: Spec, seen: View) -> Array:
    """One number per example, finite where every softmax is one."""
    masses = (side.softmax.state.mass for side in seen.sides if side.softmax is not None)
    return jnp.squeeze(sum(map(jnp.log, masses)), spec.axis)


def _present(where: Array | None, values: Array) -> Array:
    """Select, never multiply: NaN where nothing exists has no effect."""
    return values if where is None else jnp.where(where, values, 0)


def _along(kind: Kind, coefficient: Array, x_dot: Array) -> Array:
    """coefficient · x_dot, where the infinite one of a zero probability leaves a tangent of 0 be.

    As two finite factors: a rule must be linear in its tangent, so it cannot ask whether it is 0.
    """
    x_dot = x_dot.astype(coefficient.dtype)
    if kind != "probs":
        return coefficient * x_dot
    infinite, big = jnp.isinf(coefficient), jnp.finfo(coefficient.dtype).max
    clipped = jnp.where(infinite, jnp.sign(coefficient) * big, coefficient)
    return clipped * x_dot * jnp.where(infinite, big, 1)


def _masked_product(slope: Array, scores: Array) -> Array:
    """slope · score, with 0 · inf = 0 at a class of probability zero."""
    masked = slope == 0
    return slope * jnp.where(masked, 0, scores)


def _moves(tangent: Any) -> bool:
    """Whether a tangent is really there: nothing is computed for a frozen input."""
    if tangent is None or isinstance(tangent, SymbolicZero):
        return False
    return tangent.dtype != jax.dtypes.float0
