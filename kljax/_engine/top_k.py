"""A teacher's best classes, and the predictions seen through them: a few classes in place of all.

Both sides become log-probabilities of the k classes and, unless the rest is left out, of one more
class that holds all others. Then every divergence is what it is on those few classes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine.representation import Operands, Spec, compute_dtype, log_probs_of

Tail = Literal["bucket", "renormalize", "renormalize_both", "truncate"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "log_probs", "log_tail"],
    meta_fields=["tail"],
)
@dataclass(frozen=True)
class TopKInput:
    """The k best classes; -inf is padding."""

    indices: Array  # [..., k]
    log_probs: Array  # [..., k]
    log_tail: Array | None  # [...]
    tail: Tail


class _Seen(NamedTuple):
    """What the k classes, and the rest, hold on one side."""

    best: Array
    rest: Array
    all_taken: Array | bool = False  # no class is left for the rest


def coarsen(spec: Spec, operands: Operands) -> tuple[Spec, Operands]:
    """The same question on the few classes of the top-k side, if there is one."""
    if "top_k" not in spec.kinds:
        return spec, operands
    *others, given = operands.inputs
    assert spec.kinds[-1] == "top_k"
    classes = given.log_probs.ndim - 1
    dtype = compute_dtype(operands.inputs)
    best = _unless_dead(given.log_probs, operands.scale).astype(dtype)
    valid = ~jnp.isneginf(best)
    sides = []
    if others:
        others = [_unless_dead(x, operands.scale) for x in others]
        seen_by = operands._replace(inputs=tuple(others))
        log_probs = log_probs_of(spec.kinds[0], seen_by, spec.axis)
        batch = jnp.broadcast_shapes(log_probs.shape[:-1], best.shape[:-1])
        log_probs = jnp.broadcast_to(log_probs, (*batch, log_probs.shape[-1]))
        indices, best = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (given.indices, best))
        valid = jnp.broadcast_to(valid, best.shape) & allowed(indices, operands.where)
        sides.append(_split(log_probs, indices, valid, operands.where))
    else:
        valid &= allowed(given.indices, operands.where)
    best = jnp.where(valid, best, -jnp.inf)
    all_taken = sides[0].all_taken if sides else False
    sides.append(_Seen(best, _rest(given.log_tail, best, all_taken)))
    inputs = tuple(_on_few_classes(sides, given.tail))
    kinds = ("log_probs",) * len(inputs)
    few = spec._replace(kinds=kinds, axis=(classes,), slope_sums=())
    return few, operands._replace(inputs=inputs, where=None, temperature=None)


def _split(log_probs: Array, indices: Array, valid: Array, where: Array | None) -> _Seen:
    """The predictions at the k classes, and what they hold elsewhere."""
    classes = log_probs.shape[-1]
    inside = (indices >= 0) & (indices < classes)
    places = jnp.where(valid & inside, indices, classes)  # one past the end: dropped
    best = jnp.take_along_axis(log_probs, jnp.where(valid & inside, indices, 0), axis=-1)
    best = jnp.where(inside, best, jnp.nan)
    best = jnp.where(valid, best, -jnp.inf)
    taken = marked(places, classes)
    left = ~taken if where is None else where & ~taken
    outside = log_sum_exp(jnp.where(taken, -jnp.inf, log_probs))
    return _Seen(best, outside, ~jnp.any(left, axis=-1))


def allowed(indices: Array, where: Array | None) -> Array:
    """Whether `where` lets each class be; one out of range stays, to give NaN."""
    if where is None:
        return jnp.ones(indices.shape, bool)
    classes = where.shape[-1]
    inside = (indices >= 0) & (indices < classes)
    where = jnp.broadcast_to(where, (*indices.shape[:-1], classes))
    return ~inside | jnp.take_along_axis(where, jnp.where(inside, indices, 0), axis=-1)


def marked(indices: Array, classes: int) -> Array:
    """Whether each class is among the indices; those past the end are dropped.

    Mapped over the batch, not scattered with indices of it: so a spread batch stays spread.
    """

    def one(indices: Array) -> Array:
        return jnp.zeros(classes, bool).at[indices].set(True, mode="drop")

    for _ in indices.shape[:-1]:
        one = jax.vmap(one)
    return one(indices)


def _rest(log_tail: Array | None, best: Array, all_taken: Array | bool) -> Array:
    """The teacher's mass outside the k classes; as given, or what is lacking from 1."""
    none_left = jnp.asarray(all_taken)
    if log_tail is not None:
        return jnp.where(none_left, -jnp.inf, log_tail.astype(best.dtype))
    mass = log_sum_exp(best)
    lacking = (mass < 0) & ~none_left
    return jnp.where(lacking, _log1mexp(jnp.where(lacking, mass, -1)), -jnp.inf)


def _on_few_classes(sides: list[_Seen], tail: Tail) -> list[Array]:
    if tail == "renormalize":
        best = _renormalized(sides[-1].best)
        sides = [*sides[:-1], _Seen(best, jnp.full_like(best[..., 0], -jnp.inf))]
    if tail == "renormalize_both":
        return [_renormalized(side.best) for side in sides]
    if tail == "truncate":
        return [side.best for side in sides]
    return [jnp.concatenate([side.best, side.rest[..., None]], axis=-1) for side in sides]


def _renormalized(best: Array) -> Array:
    """The k classes alone; where none is left, nothing."""
    mass = log_sum_exp(best)
    return best - jnp.where(jnp.isneginf(mass), 0, mass)[..., None]


def _unless_dead(x: Array, scale: Array | None) -> Array:
    """Of an example of weight 0 nothing that is not finite is read."""
    if scale is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where((scale != 0)[..., None] | jnp.isfinite(x) | jnp.isneginf(x), x, 0)


def log_sum_exp(log_probs: Array) -> Array:
    """log Σ exp over the last axis; -inf of nothing, with a derivative of 0."""
    peak = lax.stop_gradient(jnp.max(log_probs, axis=-1, keepdims=True, initial=-jnp.inf))
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    total = jnp.sum(jnp.exp(log_probs - peak), axis=-1)
    none = total == 0
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, total)) + peak[..., 0])


def _log1mexp(x: Array) -> Array:
    """log(1 - exp x) for x < 0, without cancellation."""
    near = x > -0.6931472
    a = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    b = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, a, b)
