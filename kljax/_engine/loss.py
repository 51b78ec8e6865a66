"""A loss of a block: its values, with a derivative rule made of exact coefficients.

The rule returns the value together with the coefficient of every tangent that is really there.
One such rule serves reverse mode, forward mode and, differentiated again, all higher orders.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from kljax._engine import checks
from kljax._engine.classes import Axes, Classes, Layout
from kljax._engine.side import ABSENT, Classed, View, in_axes, view
from kljax._engine.terms import nan_unless, weigh

# (log-probabilities of each side, log pred - log target, params) -> contributions per class
Term = Callable[[tuple[Array, ...], Array, Any], Array]


class Formula(NamedTuple):
    """A divergence: its name and arguments, for messages, and its terms."""

    name: str
    arguments: tuple[str, ...]
    term: Term
    normalized: Term | None = None  # serves where the library normalised every side
    # What the derivatives of `normalized` to each side's log-probabilities sum to, in units of the
    # value; None where that is not known beforehand, as for all sides by default.
    slope_sums: tuple[float | None, ...] = ()
    needs_mass: bool = False  # infinite where targets are 0
    linear: int | None = None  # the side p of a term p · g(log q)
    cached: bool = True  # not if a term captures what may be another at the next call

    def on(self, sides: tuple[Classed, ...], temperature: Array | None) -> "Formula":
        """With the term that serves these sides as its only one."""
        if self.normalized and all(side.normalizes(temperature) for side in sides):
            return self._replace(term=self.normalized, normalized=None)
        return self._replace(normalized=None, slope_sums=())


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sides", "classes", "temperature", "params", "factor"],
    meta_fields=["formula"],
)
@dataclass(frozen=True)
class Loss:
    """A formula and all that it is computed from; arrays broadcast against the whole input."""

    formula: Formula  # on its sides
    sides: tuple[Classed, ...]
    classes: Classes
    temperature: Array | None
    params: Any = ()  # the term's own
    factor: Array | None = None  # one per example; 0 removes the example

    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        """Where each leaf, in order, has its batch axes; None: it has none."""
        axes = in_axes(layout, self.sides, self.classes, self.temperature)
        axes += tuple(None for _ in jax.tree.leaves(self.params))
        return axes if self.factor is None else (*axes, layout.per_example)

    def on_few_classes(self) -> "Loss":
        """The same question on those classes that its last side knows of."""
        *others, last = self.sides
        found = last.few(tuple(others), self.classes, self.temperature, self.factor)
        if found is None:
            return self
        sides, classes = found
        formula = self.formula._replace(slope_sums=(), linear=None)
        return replace(self, formula=formula, sides=sides, classes=classes, temperature=None)

    def view(self, states: tuple[Any, ...] | None = None) -> View:
        return view(self.sides, self.classes, self.temperature, states)

    def term(self, seen: View, params: Any) -> Array:
        contributions = self.formula.term(seen.log_probs, seen.log_ratio, params)
        checks.require_contributions("divergence", contributions, seen.log_ratio.shape)
        return contributions.astype(seen.log_ratio.dtype)


def _traced_once(function: Callable[..., Array], **static: Any) -> Callable[..., Array]:
    """Traced once, not for each derivative anew; of a term that does not come again not at all."""
    jitted = jax.jit(function, inline=True, **static)

    @wraps(function)
    def call(loss: Loss, *args: Any) -> Array:
        return (jitted if loss.formula.cached else function)(loss, *args)

    return call


def values(loss: Loss) -> Array:
    """One value per example, from sides whose logits are at hand."""
    return _values(loss.on_few_classes())


@jax.custom_jvp
def _values(loss: Loss) -> Array:
    """Sum the term over the classes and scale each example."""
    total = _total(replace(loss, factor=None))
    return total if loss.factor is None else weigh(loss.factor, total)


@_traced_once
def _total(loss: Loss) -> Array:
    seen = loss.view()
    total = loss.classes.sum(loss.classes.present(loss.term(seen, loss.params)))
    for side in seen.sides:
        if side.exists is not None:  # not as NaN log-probabilities: XLA:CPU folds exp(NaN)
            total = nan_unless(side.exists, total)
    return total


@partial(_values.defjvp, symbolic_zeros=True)
def _values_jvp(primals: tuple[Loss], tangents: tuple[Any]) -> tuple[Array, Array]:
    (loss,), (dots,) = primals, tangents
    seen, classes = loss.view(), loss.classes
    values = _values(replace(loss, factor=None))
    counted = classes.only(_counted(loss, values))
    values_dot = _along_params(loss, seen, dots.params, counted, jnp.zeros_like(values))
    to_temperature = _moves(dots.temperature)
    for i, side in enumerate(seen.sides):
        (x_dot,) = jax.tree.leaves(dots.sides[i])
        softmax, there = side.softmax, counted
        if not (_moves(x_dot) or (to_temperature and softmax)):
            continue
        if _slope_sum(loss, i) == 0:  # whether the slopes are numbers does not wait for the values
            there = classes.only(_counted(loss, _log_masses(loss, seen)))
        slope = _centred(loss, seen, values, i, there)
        if softmax and loss.temperature is not None:
            slope = slope / loss.temperature
            if to_temperature:
                along = _masked_product(slope, softmax.scores) * dots.temperature
                values_dot -= classes.sum(along)
        if _moves(x_dot):
            held = loss.sides[i]
            slope = held.slope(slope)
            if loss.formula.linear == i and side.probs is not None:
                slope = there.present(_linear_slope(loss, seen, i, slope))
            values_dot += classes.sum(held.along(slope, there.present(x_dot)))

    if loss.factor is None:
        return values, values_dot
    # Known before the values: XLA would make it along with their sum, and the slopes wait for that.
    factor = lax.optimization_barrier(loss.factor)
    values_dot = factor * values_dot
    if _moves(dots.factor):
        removed = (factor == 0) & ~jnp.isfinite(values)
        values_dot += jnp.where(removed, 0, values) * dots.factor
    return weigh(factor, values), values_dot


@jax.custom_jvp
def elements(loss: Loss) -> Array:
    """The term at each class, not summed; classes that do not exist give 0."""
    return loss.classes.present(loss.term(loss.view(), loss.params))


@partial(elements.defjvp, symbolic_zeros=True)
def _elements_jvp(primals: tuple[Loss], tangents: tuple[Any]) -> tuple[Array, Array]:
    (loss,), (dots,) = primals, tangents
    seen, classes, values = loss.view(), loss.classes, elements(loss)
    values_dot = jnp.zeros_like(values)
    for i, (side, held) in enumerate(zip(seen.sides, loss.sides, strict=True)):
        (x_dot,) = jax.tree.leaves(dots.sides[i])
        x_dot = classes.present(x_dot) if _moves(x_dot) else x_dot
        slope = classes.present(_slope(loss, seen, i))
        probs, along = jnp.exp(side.log_probs), jnp.zeros_like(values)
        if _moves(x_dot):
            along += held.along(held.slope(slope), x_dot)
            if side.softmax:
                shifts = held.along(held.slope(probs), x_dot)
                along -= slope * classes.sum(shifts, keepdims=True)
        if side.softmax and loss.temperature is not None:
            if _moves(dots.temperature):
                scores = side.softmax.scores
                mean = classes.sum(_masked_product(probs, scores), keepdims=True)
                along -= (_masked_product(slope, scores) - slope * mean) * dots.temperature
            along = along / loss.temperature
        values_dot += classes.present(along)
    return values, values_dot


@partial(_traced_once, static_argnums=2)
def _slope(loss: Loss, seen: View, i: int) -> Array:
    """The term's derivative to the log-probabilities of side i."""

    def along(log_probs: Array, log_ratio: Array) -> Array:
        both = (*seen.log_probs[:i], log_probs, *seen.log_probs[i + 1 :])
        return loss.term(seen._replace(log_probs=both, log_ratio=log_ratio), loss.params)

    ones = jnp.ones_like(seen.log_ratio)
    sign = 1 if i == 0 else -1
    return jax.jvp(along, (seen.log_probs[i], seen.log_ratio), (ones, sign * ones))[1]


def _slope_sum(loss: Loss, i: int) -> float | None:
    return loss.formula.slope_sums[i] if loss.formula.slope_sums else None


def _centred(loss: Loss, seen: View, values: Array, i: int, there: Classes) -> Array:
    """The derivative to the logarithms given: the slopes, less the softmax's share of their sum."""
    axis, known, side = loss.classes.axis, _slope_sum(loss, i), seen.sides[i]
    slope = there.present(_slope(loss, seen, i))
    if known is None:
        total = loss.classes.sum(slope, keepdims=True)
        slope = there.present(_slope_after(total, slope, loss, seen, i))
    else:
        total = jnp.zeros_like(values) if known == 0 else known * values
        total = _refined(jnp.expand_dims(total, axis), slope, loss.classes)
    if known != 0:
        # An infinite divergence has no derivative to the side with mass where the other has none:
        # NaN for the whole row, whose finite entries would be the gradient of nothing.
        invalid = jnp.expand_dims(jnp.isnan(values), axis) | ~jnp.isfinite(total)
        total = nan_unless(~invalid, total)
    if side.softmax:
        slope = slope - jnp.exp(side.log_probs) * total
    else:
        slope = slope + jnp.where(jnp.isnan(total), total, 0)
    return there.present(slope)


def _slope_after(total: Array, slope: Array, loss: Loss, seen: View, i: int) -> Array:
    """The slopes once more, for the pass that needs their total.

    Accelerators read the inputs again: their compiler would rather store the slopes in between.
    """

    def again(total: Array, _: Array, loss: Loss, states: tuple[Any, ...]) -> Array:
        sides, _ = lax.optimization_barrier((loss.sides, total))
        loss = replace(loss, sides=sides)
        return _slope(loss, loss.view(states), i)

    states = tuple(side.softmax and side.softmax.state for side in seen.sides)
    return lax.platform_dependent(
        total, slope, loss, states, cpu=lambda _, slope, *rest: slope, default=again
    )


def _refined(total: Array, slope: Array, classes: Classes) -> Array:
    """The sum of the slopes as they were rounded, where one more pass over them costs little.

    To take it off removes the rounding of the masses, which shows where both sides are close; on
    accelerators it stays, as it does in the plain formula. As the sum is known but for rounding,
    the difference is a constant to derivatives.
    """
    if classes.names:  # one more sum over a mesh does not cost little
        return total
    rounding = lax.platform_dependent(
        *lax.stop_gradient((total, slope)),
        cpu=lambda total, slope: classes.sum(slope, keepdims=True) - total,
        default=lambda total, slope: jnp.zeros_like(total),
    )
    return total + rounding


def _linear_slope(loss: Loss, seen: View, i: int, slope: Array) -> Array:
    """The derivative of p · g(log q) to p itself: where p = 0 too it is g, but for q = 0."""
    certain = (*seen.log_probs[:i], jnp.zeros_like(seen.log_ratio), *seen.log_probs[i + 1 :])
    g = loss.term(seen._replace(log_probs=certain), loss.params)
    at_zero = jnp.where(jnp.isneginf(seen.log_probs[1 - i]), 0, g)
    return jnp.where(seen.sides[i].probs == 0, at_zero, slope)


def _along_params(loss: Loss, seen: View, dots: Any, there: Classes, none: Array) -> Array:
    """The derivative along the term's own parameters, for those that move."""
    leaves, tree = jax.tree.flatten(loss.params)
    moving = [i for i, dot in enumerate(tree.flatten_up_to(dots)) if _moves(dot)]
    if not moving:
        return none

    # Masked before the term: 0 · NaN in its transpose would be NaN.
    hidden = tuple(there.present(x, ABSENT) for x in seen.log_probs)
    seen = View(seen.sides, hidden, there.present(seen.log_ratio))

    def along(*moved: Array) -> Array:
        whole = list(leaves)
        for i, leaf in zip(moving, moved, strict=True):
            whole[i] = leaf
        return there.present(loss.term(seen, jax.tree.unflatten(tree, whole)))

    steps = [tree.flatten_up_to(dots)[i] for i in moving]
    return there.sum(jax.jvp(along, [leaves[i] for i in moving], steps)[1])


def _counted(loss: Loss, rows: Array) -> Array | None:
    """The examples that weight 0 does not remove.

    A finite value of weight 0 needs no removal, and its derivative is the mixed one to the weight.
    """
    return None if loss.factor is None else (loss.factor != 0) | jnp.isfinite(rows)


def _log_masses(loss: Loss, seen: View) -> Array:
    """One number per example, finite where every softmax is one."""
    masses = (side.softmax.state.mass for side in seen.sides if side.softmax)
    return jnp.squeeze(sum(map(jnp.log, masses)), loss.classes.axis)


def _masked_product(slope: Array, scores: Array) -> Array:
    """slope · score, with 0 · inf = 0 at a class of probability zero."""
    masked = slope == 0
    return slope * jnp.where(masked, 0, scores)


def _moves(tangent: Any) -> bool:
    """Whether a tangent is really there: nothing is computed for a frozen input."""
    if tangent is None or isinstance(tangent, SymbolicZero):
        return False
    return tangent.dtype != jax.dtypes.float0
