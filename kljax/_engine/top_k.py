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

from kljax._engine import meshes
from kljax._engine.representation import Operands, Spec, compute_dtype, log_probs_of
from kljax._engine.terms import nan_unless

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


def coarsen(spec: Spec, operands: Operands) -> tuple[Spec, Operands]:
    """The same question on the few classes of the top-k side, if there is one."""
    if "top_k" not in spec.kinds:
        return spec, operands
    *others, given = operands.inputs
    assert spec.kinds[-1] == "top_k"
    classes, where = given.log_probs.ndim - 1, operands.where
    wholes = [] if where is None else [where]
    if others:
        seen_by = operands._replace(inputs=(_unless_dead(others[0], operands.scale),))
        wholes.insert(0, log_probs_of(spec.kinds[0], seen_by, spec.axis))
    best = _unless_dead(given.log_probs, operands.scale).astype(compute_dtype(operands.inputs))
    few = given.indices, best, allowed(given.indices, where)
    batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in (*few, *wholes)))
    indices, best, exists = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in few)
    given_mass = ~jnp.isneginf(best)
    valid, lost = given_mass & exists, jnp.any(given_mass & ~exists, axis=-1)

    sides, all_taken = [], jnp.zeros(batch, bool)
    if wholes:  # else what classes there are is not known
        taken, all_taken = _taken(indices, valid, where, wholes[0])
        sides = [_split(x, indices, valid, taken) for x in wholes[: len(others)]]
    rest = _rest(given.log_tail, best, all_taken, operands.scale)
    sides.append(_Seen(jnp.where(valid, best, -jnp.inf), rest))
    inputs = _on_few_classes(sides, given.tail, lost)
    kinds = ("log_probs",) * len(inputs)
    few_spec = spec._replace(kinds=kinds, axis=(classes,), slope_sums=(), linear=None)
    return few_spec, operands._replace(inputs=tuple(inputs), where=None, temperature=None)


def _taken(indices: Array, valid: Array, where: Array | None, whole: Array) -> tuple[Array, Array]:
    """Which classes are K, and whether none is left for the rest."""
    classes = whole.shape[-1]
    places = jnp.where(valid & _inside(indices, classes), indices, classes)  # one past: dropped
    taken = meshes.spread(marked(places, classes), meshes.of_first([whole]))
    left = ~taken if where is None else where & ~taken
    return taken, ~jnp.any(left, axis=-1)


def _split(log_probs: Array, indices: Array, valid: Array, taken: Array) -> _Seen:
    """The predictions at the k classes, and what they hold elsewhere."""
    log_probs = jnp.broadcast_to(log_probs, taken.shape)
    inside = _inside(indices, taken.shape[-1])
    best = meshes.take(log_probs, jnp.where(valid & inside, indices, 0))
    best = nan_unless(inside, best)
    rest = log_sum_exp(jnp.where(taken, -jnp.inf, log_probs))
    return _Seen(jnp.where(valid, best, -jnp.inf), rest)


def allowed(indices: Array, where: Array | None) -> Array:
    """Whether `where` lets each class be; one out of range stays, to give NaN."""
    if where is None:
        return jnp.ones(indices.shape, bool)
    batch = jnp.broadcast_shapes(indices.shape[:-1], where.shape[:-1])
    indices, where = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (indices, where))
    inside = _inside(indices, where.shape[-1])
    return ~inside | meshes.take(where, jnp.where(inside, indices, 0))


def _inside(indices: Array, classes: int) -> Array:
    return (indices >= 0) & (indices < classes)


def marked(indices: Array, classes: int) -> Array:
    """Whether each class is among the indices; those past the end are dropped.

    Mapped over the batch, not scattered with indices of it: so a spread batch stays spread.
    """

    def one(indices: Array) -> Array:
        return jnp.zeros(classes, bool).at[indices].set(True, mode="drop")

    for _ in indices.shape[:-1]:
        one = jax.vmap(one)
    return one(indices)


def _rest(log_tail: Array | None, best: Array, all_taken: Array, scale: Array | None) -> Array:
    """The teacher's mass outside the k classes; as given, or what is lacking from 1."""
    if log_tail is not None:
        given = _unless_dead(log_tail[..., None], scale)[..., 0].astype(best.dtype)
        return jnp.where(all_taken, -jnp.inf, jnp.broadcast_to(given, best.shape[:-1]))
    mass = log_sum_exp(best)
    lacking = (mass < 0) & ~all_taken
    return jnp.where(lacking, _log1mexp(jnp.where(lacking, mass, -1)), -jnp.inf)


def _on_few_classes(sides: list[_Seen], tail: Tail, lost: Array) -> list[Array]:
    """Every side on K and, in a bucket, the rest.

    Where `lost` says that K has classes that do not exist, what is left of the teacher is all
    there is, as it is with whole arrays.
    """
    *others, teacher = sides
    if tail == "truncate":
        return [side.best for side in sides]
    if tail == "renormalize_both":
        few = [_renormalized(side.best) for side in sides]
    else:
        if tail == "renormalize":
            teacher = _Seen(_renormalized(teacher.best), jnp.full_like(teacher.rest, -jnp.inf))
        few = [jnp.concatenate([x.best, x.rest[..., None]], axis=-1) for x in (*others, teacher)]
        lost = lost[..., None]  # of the others not even derivatives may see the sum
        few[-1] = jnp.where(lost, _renormalized(jnp.where(lost, few[-1], 0)), few[-1])
    # A teacher of which nothing is left is an example without classes.
    none = jnp.all(jnp.isneginf(few[-1]), axis=-1, keepdims=True)
    return [jnp.where(none, -jnp.inf, side) for side in few]


def _renormalized(log_probs: Array) -> Array:
    """These classes alone; where none is left, nothing."""
    mass = log_sum_exp(log_probs)
    return log_probs - jnp.where(jnp.isneginf(mass), 0, mass)[..., None]


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
