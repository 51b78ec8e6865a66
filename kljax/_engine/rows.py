"""The states of all rows of a loss, and what they tell before its next pass over the classes."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kljax._engine.formula import Loss
from kljax._engine.pairs import pair_states
from kljax._engine.side import Rows, block_of, log_ratio_of_masses
from kljax._engine.states import RowState, scale


@jax.custom_jvp
def rows(loss: Loss) -> Rows:
    """As given, or each side's own; of as many rows as there are."""
    if loss.rows:
        return loss.rows
    like = block_of(loss.sides).shape
    shape = tuple(1 if i in loss.classes.axis else n for i, n in enumerate(like))
    whole = partial(jnp.broadcast_to, shape=shape)
    softmaxes = [side.softmax for side in loss.view().sides]
    states = [None if of is None else jax.tree.map(whole, of.state) for of in softmaxes]
    match states:
        case [RowState() as a, RowState() as b]:
            return Rows((a, b), log_ratio_of_masses(a.mass, b.mass))
    return Rows(tuple(states))


@rows.defjvp
def _rows_jvp(primals: tuple[Loss], tangents: tuple[Any]) -> tuple[Rows, Any]:
    (loss,), (dots,) = primals, tangents
    found = rows(loss)
    return found, rows_dot(found, loss, dots)


def rows_dot(found: Rows, loss: Loss, dots: Any) -> Any:
    """The tangent of the rows' states; the peaks are constants to derivatives."""

    def masses(loss: Loss) -> list[Array]:
        pairs = zip(_logits(loss), found.states, strict=True)
        scores = [x - state.peak for x, state in pairs if state]
        if loss.temperature is not None:
            scores = [scale(x, 1 / loss.temperature) for x in scores]
        return [loss.classes.sum(jnp.exp(x), keepdims=True) for x in scores]

    moved = jax.jvp(masses, (loss,), (dots,))[1]
    each, dot = [state for state in found.states if state], iter(moved)
    states = tuple(
        None if state is None else RowState(jnp.zeros_like(state.peak), next(dot))
        for state in found.states
    )
    if found.log_masses is None:
        return Rows(states)
    a, b = (x / state.mass for x, state in zip(moved, each, strict=True))
    return Rows(states, a - b)


class Together(NamedTuple):
    """Of two softmaxes, from one pass: the states, and the divergences that are asked for."""

    rows: Rows
    divergences: tuple[Array | None, Array | None]  # D(0‖1), D(1‖0)
    value: Array  # their sum


def together(loss: Loss) -> Together:
    """From one pass over both sides."""
    classes, (from_0, from_1) = loss.classes, loss.formula.directions or (True, True)
    inverse = None if loss.temperature is None else 1 / loss.temperature
    a, b = _logits(loss)
    p, q = (a, b) if from_0 else (b, a)
    pairs = pair_states(p, q, inverse, classes, both=from_0 and from_1)
    found = [jnp.squeeze(pair.divergence, classes.axis) for pair in pairs]
    if not all(a.shape[axis] for axis in classes.axis):
        found = [jnp.zeros_like(x) for x in found]
    if classes.where is not None:
        some = jnp.broadcast_to(classes.any(classes.where), found[0].shape)
        found = [jnp.where(some, x, 0) for x in found]
    states, log_masses = pairs[0].rows, -pairs[0].log_masses
    if not from_0:
        return Together(Rows(states[::-1], -log_masses), (None, found[0]), found[0])
    if not from_1:
        return Together(Rows(states, log_masses), (found[0], None), found[0])
    return Together(Rows(states, log_masses), (found[0], found[1]), found[0] + found[1])


def _logits(loss: Loss) -> tuple[Array, ...]:
    """All sides before their softmax, on one shape."""
    like = block_of(loss.sides)
    known = RowState(jnp.zeros((), like.dtype), jnp.ones((), like.dtype))
    seen = (x.view(loss.classes, loss.temperature, like, known) for x in loss.sides)
    return tuple(jnp.broadcast_to(side.logs, like.shape) for side in seen)
