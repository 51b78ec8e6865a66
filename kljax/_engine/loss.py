"""The values of a loss, with a derivative rule made of exact coefficients.

The rule returns the value together with the coefficient of every tangent that is really there.
One such rule serves reverse mode, forward mode and, differentiated again, all higher orders.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from kljax._engine import linear, lowering
from kljax._engine.blocks import aligned
from kljax._engine.classes import Classes
from kljax._engine.formula import Formula, Loss
from kljax._engine.meshes import vary, varying
from kljax._engine.rows import rows, rows_dot, together
from kljax._engine.side import ABSENT, Rows, View, block_of, held
from kljax._engine.states import RowState
from kljax._engine.terms import nan_unless, term_generalized_kl, weigh


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
    if loss.formula.directions is None or loss.rows:
        return _summed(loss, loss.rows)
    # Where memory is the limit the two states tell the divergence: one pass, not two.
    return _by_platform(
        loss,
        lambda state, value: value,
        cpu=lambda loss: _summed(loss, None),
        default=_in_one_pass,
    )


def _by_platform(loss: Loss, like: Callable[[Any, Any], Any], **ways: Any) -> Any:
    """The platform's way; `like` tells its result from a row's number with axes and without."""
    if loss.classes.names:
        return lax.platform_dependent(loss, **ways)
    whole, axis = block_of(loss.sides), loss.classes.axis
    kept = tuple(1 if i in axis else n for i, n in enumerate(whole.shape))
    batch = tuple(n for i, n in enumerate(whole.shape) if i not in axis)
    number = partial(jax.ShapeDtypeStruct, dtype=whole.dtype)
    return lowering.by_platform(like(number(kept), number(batch)), loss, **ways)


def _in_one_pass(loss: Loss) -> Array:
    return together(loss).value


def _summed(loss: Loss, known: Rows | None) -> Array:
    """The term's sum over the classes."""
    seen = loss.view(known)
    return _if_classes_exist(seen, loss.classes.sum(loss.contributions(seen)))


def _if_classes_exist(seen: View, total: Array) -> Array:
    for side in seen.sides:
        if side.exists is not None:  # not as NaN log-probabilities: XLA:CPU folds exp(NaN)
            total = nan_unless(side.exists, total)
    return total


@partial(_values.defjvp, symbolic_zeros=True)
def _values_jvp(primals: tuple[Loss], tangents: tuple[Any]) -> tuple[Array, Array]:
    (loss,), (dots,) = primals, tangents
    to_temperature = _moves(dots.temperature)
    moving = [any(map(_moves, jax.tree.leaves(dot))) for dot in dots.sides]
    asked = tuple(
        i
        for i, side in enumerate(loss.sides)
        if moving[i] or (to_temperature and side.normalizes(loss.temperature))
    )
    known = _known(replace(loss, factor=None), asked)
    (loss, rows), values = _after(known, loss, asked), known.values
    seen, values_dot = loss.view(rows), jnp.zeros_like(values)
    for i, given in enumerate(loss.sides):
        if moving[i]:
            there = _there(loss, seen, known, i)
            slope = given.slope(_to_logs(loss, seen, known, there, i))
            if i == 1 and loss.formula.cross_entropy and seen.sides[i].probs is not None:
                slope = there.present(_linear_slope(loss, seen, i, slope))
            (x_dot,) = jax.tree.leaves(dots.sides[i])
            values_dot += loss.classes.sum(given.along(slope, _cleared(there, x_dot)))
    if any(map(_moves, jax.tree.leaves(dots.params))):
        loss, rows = _apart(loss, rows, values)
        values_dot += _along_params(loss, loss.view(rows), dots.params, values)
    if to_temperature:
        loss, rows = _apart(loss, rows, values)
        slope = _to_temperature(loss, loss.view(rows), known, asked)
        values_dot += loss.classes.sum(slope * dots.temperature)

    if loss.factor is None:
        return values, values_dot
    # Known before the values: XLA would make it along with their sum, and the slopes wait for that.
    factor = lax.optimization_barrier(loss.factor)
    values_dot = factor * values_dot
    if _moves(dots.factor):
        removed = (factor == 0) & ~jnp.isfinite(values)
        values_dot += jnp.where(removed, 0, values) * dots.factor
    return weigh(factor, values), values_dot


class _Known(NamedTuple):
    """What is known of the rows before the pass over the classes that makes their derivatives."""

    rows: Rows
    values: Array
    totals: tuple[Array | None, ...]  # what the slopes to each side sum to, if it is asked for


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _known(loss: Loss, asked: tuple[int, ...]) -> _Known:
    directions = loss.formula.directions
    if directions is None or loss.rows:
        return _one_by_one(loss, asked, refined=False)
    # Slopes that sum to 0 do not wait for the values, which then come with them. A TPU fuses that
    # pass; NVIDIA's compiler would store what the two share.
    apart = partial(_one_by_one, asked=asked, refined=False)
    at_once = partial(_known_at_once, asked=asked)

    def like(state: Any, value: Any) -> _Known:
        both = Rows((RowState(state, state), RowState(state, state)), state)
        return _Known(both, value, tuple(value if i in asked else None for i in range(2)))

    return _by_platform(
        loss,
        like,
        cpu=partial(_one_by_one, asked=asked, refined=not loss.classes.names),
        tpu=at_once if any(directions[i] for i in asked) else apart,
        default=at_once,
    )


def _known_at_once(loss: Loss, asked: tuple[int, ...]) -> _Known:
    found = together(loss)
    zero = jnp.zeros_like(found.value)
    totals = (zero if x is None else x for x in found.divergences)
    return _Known(
        found.rows, found.value, tuple(x if i in asked else None for i, x in enumerate(totals))
    )


def _one_by_one(loss: Loss, asked: tuple[int, ...], refined: bool) -> _Known:
    """Each side's state, and then the sums.

    Args:
        loss: All of it.
        asked: Of which sides.
        refined: Whether to sum slopes though it is known what they should sum to. To take off
            their sum as they were rounded removes the rounding of the masses, which shows where
            both sides are close.
    """
    given = rows(loss)
    seen, directions = loss.view(given), loss.formula.directions or ()
    one_way = directions and not (refined or all(directions))
    to_sum = [i for i in asked if not (one_way or loss.is_to_labels(i))]
    slope = lambda seen, i: loss.classes.present(_slope(loss, seen, i))  # noqa: E731
    first, rest = (to_sum, []) if loss.classes.names else (to_sum[:1], to_sum[1:])
    values, *found = loss.classes.sums(loss.contributions(seen), *(slope(seen, i) for i in first))
    for i in rest:
        later, states = _apart(loss, given, values, but_on=("cpu", "tpu"))
        found.append(loss.classes.sum(slope(later.view(states), i)))
    values, totals = _if_classes_exist(seen, values), dict(zip(to_sum, found, strict=True))
    for i in asked:
        if loss.is_to_labels(i):
            totals[i] = _if_classes_exist(seen, jnp.full_like(values, -1))
        elif i not in totals:
            totals[i] = values if directions[i] else jnp.zeros_like(values)
    return _Known(given, values, tuple(totals.get(i) for i in range(len(loss.sides))))


@_known.defjvp
def _known_jvp(
    asked: tuple[int, ...], primals: tuple[Loss], tangents: tuple[Any]
) -> tuple[_Known, Any]:
    (loss,), (dots,) = primals, tangents
    known = _known(loss, asked)
    along = lambda f: jax.jvp(f, (loss,), (dots,))[1]  # noqa: E731
    totals = tuple(
        None if total is None else along(partial(_total_of_slopes, i))
        for i, total in enumerate(known.totals)
    )
    return known, _Known(rows_dot(known.rows, loss, dots), along(_values), totals)


def _total_of_slopes(i: int, loss: Loss) -> Array:
    """What they sum to but for rounding, to differentiate."""
    if loss.formula.directions and loss.formula.directions[i]:
        return _values(replace(loss, formula=_ONE_WAY[i], params=()))
    slope = _slope(loss, loss.view(rows(loss)), i)
    if loss.sums_to_a_number(i):
        slope = jnp.zeros_like(slope)
    return loss.classes.sum(loss.classes.present(slope))


_ONE_WAY = (
    Formula(
        "kl",
        ("p", "q"),
        lambda log, ratio, _: term_generalized_kl(log[0], log[1], -ratio),
        directions=(True, False),
    ),
    Formula(
        "kl",
        ("q", "p"),
        lambda log, ratio, _: term_generalized_kl(log[1], log[0], ratio),
        directions=(False, True),
    ),
)


def _after(known: _Known, loss: Loss, asked: tuple[int, ...]) -> tuple[Loss, Rows]:
    """The loss, and the rows' states, as the pass of the derivatives sees them."""
    if loss.rows is None and all(map(loss.is_to_labels, asked)):
        return loss, known.rows
    waits = not all(map(loss.sums_to_a_number, asked))
    return _apart(loss, known.rows, known, but_on=("cpu",) if waits else ("cpu", "tpu"))


def _apart(
    loss: Loss, rows: Rows, done: Any, but_on: tuple[str, ...] = ("cpu",)
) -> tuple[Loss, Rows]:
    """The same for a pass of its own, when others are done.

    What it shares with those, rows' states or what is made of probabilities that were given,
    compilers for accelerators would store in float32.
    """
    ours = lambda side: side.array is None or side.normalizes(loss.temperature)  # noqa: E731
    given = [None if ours(side) else side for side in loss.sides]
    names = varying(jax.tree.leaves(done))
    seen = jax.tree.map(lambda x: vary(x, names), (rows, given))

    def wait(seen: tuple[Any, Any], done: Any) -> tuple[Any, Any]:
        # Apart, for in jax 0.10 what goes through a barrier together varies over the same axes.
        rows, given = (lax.optimization_barrier((part, done))[0] for part in seen)
        return rows, given

    at_once = dict.fromkeys(but_on, lambda seen, _: seen)
    rows, given = lax.platform_dependent(seen, done, default=wait, **at_once)
    pairs = zip(loss.sides, given, strict=True)
    sides = tuple(side if later is None else later for side, later in pairs)
    return replace(loss, sides=sides), rows


def _to_temperature(loss: Loss, seen: View, known: _Known, asked: tuple[int, ...]) -> Array:
    """The derivative to T, class by class: through every softmax."""
    total = jnp.zeros_like(seen.log_ratio)
    for i in asked:
        if softmax := seen.sides[i].softmax:
            slope = _to_logs(loss, seen, known, _there(loss, seen, known, i), i)
            total -= _masked_product(slope, softmax.scores)
    return total


def _there(loss: Loss, seen: View, known: _Known, i: int) -> Classes:
    """The classes whose slopes to side i count."""
    waits = not loss.sums_to_a_number(i)  # nor do such slopes, to tell whether they are numbers
    return loss.classes.only(_counted(loss, known.values if waits else _log_masses(loss, seen)))


def _to_logs(loss: Loss, seen: View, known: _Known, there: Classes, i: int) -> Array:
    """The derivative to the logarithms given, where they count."""
    slope = there.present(_centred(loss, seen, known, i))
    if seen.sides[i].softmax and loss.temperature is not None:
        return slope / loss.temperature
    return slope


def _centred(loss: Loss, seen: View, known: _Known, i: int) -> Array:
    """The derivative to the logarithms given: the slopes, less the softmax's share of their sum."""
    side, slope = seen.sides[i], _slope(loss, seen, i)
    total = jnp.expand_dims(held(known.totals[i]), loss.classes.axis)
    if not loss.sums_to_a_number(i):
        # An infinite divergence has no derivative to the side with mass where the other has none:
        # NaN for the whole row, whose finite entries would be the gradient of nothing.
        invalid = jnp.expand_dims(jnp.isnan(known.values), loss.classes.axis)
        total = nan_unless(~(invalid | ~jnp.isfinite(total)), total)
    if side.softmax:
        return slope - jnp.exp(side.log_probs) * total
    return slope + jnp.where(jnp.isnan(total), total, 0)


@jax.custom_jvp
def elements(loss: Loss) -> Array:
    """The term at each class, not summed; classes that do not exist give 0."""
    return loss.contributions(loss.view())


@partial(elements.defjvp, symbolic_zeros=True)
def _elements_jvp(primals: tuple[Loss], tangents: tuple[Any]) -> tuple[Array, Array]:
    (loss,), (dots,) = primals, tangents
    seen, classes, values = loss.view(), loss.classes, elements(loss)
    values_dot = jnp.zeros_like(values)
    for i, (side, given) in enumerate(zip(seen.sides, loss.sides, strict=True)):
        (x_dot,) = jax.tree.leaves(dots.sides[i])
        x_dot = classes.present(x_dot) if _moves(x_dot) else x_dot
        slope = classes.present(_slope(loss, seen, i))
        probs, along = jnp.exp(side.log_probs), jnp.zeros_like(values)
        if _moves(x_dot):
            along += given.along(given.slope(slope), x_dot)
            if side.softmax:
                shifts = given.along(given.slope(probs), x_dot)
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


def _linear_slope(loss: Loss, seen: View, i: int, slope: Array) -> Array:
    """The derivative of p · g(log q) to p itself: where p = 0 too it is g, but for q = 0."""
    certain = (*seen.log_probs[:i], jnp.zeros_like(seen.log_ratio), *seen.log_probs[i + 1 :])
    g = loss.term(seen._replace(log_probs=certain), loss.params)
    at_zero = jnp.where(jnp.isneginf(seen.log_probs[1 - i]), 0, g)
    return jnp.where(seen.sides[i].probs == 0, at_zero, slope)


def _along_params(loss: Loss, seen: View, dots: Any, values: Array) -> Array:
    """The derivative along the term's own parameters, for those that move."""
    leaves, tree = jax.tree.flatten(loss.params)
    moving = [i for i, dot in enumerate(tree.flatten_up_to(dots)) if _moves(dot)]
    there = loss.classes.only(_counted(loss, values))

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
    """One number per example, finite where every softmax is one and every label names a class."""
    masses = (side.softmax.state.mass for side in seen.sides if side.softmax)
    return _if_classes_exist(seen, jnp.squeeze(sum(map(jnp.log, masses)), loss.classes.axis))


def _masked_product(slope: Array, scores: Array) -> Array:
    """slope · score, with 0 · inf = 0 at a class of probability zero, and 0 where nothing counts.

    By the scores, for a slope may be 0 here and move.
    """
    return slope * jnp.where(jnp.isfinite(scores), scores, 0)


def _cleared(there: Classes, tangent: Array) -> Array:
    """The tangent where something is there, whatever it is elsewhere.

    In reverse mode it stays what it is, for the slope is 0 there; one more select of that size
    costs a TPU another pass.
    """
    if there.where is None:
        return tangent
    shape = jnp.broadcast_shapes(there.where.shape, tangent.shape)
    where, tangent = aligned([there.where, jnp.broadcast_to(tangent, shape)])
    like = None if varying([tangent]) else tangent
    return linear.call(_CLEAR, where, tangent, like)


_CLEAR = linear.Map(lambda where, x: jnp.where(where, x, 0), lambda where, ct: ct)


def _moves(tangent: Any) -> bool:
    """Whether a tangent is really there: nothing is computed for a frozen input."""
    if tangent is None or isinstance(tangent, SymbolicZero):
        return False
    return tangent.dtype != jax.dtypes.float0
