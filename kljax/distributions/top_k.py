"""A teacher's best classes, and the predictions seen through them: a few classes in place of all.

Both sides become log-probabilities of the k classes and, unless the rest is left out, of one more
class that holds all others. Then every divergence is what it is on those few classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.classes import Axes, Classes, Layout, Shape
from kljax._engine.meshes import Names, Spread
from kljax._engine.picks import Few, Picked, picked
from kljax._engine.side import Classed, Side, block_of, compute_dtype, held, with_infinity
from kljax._engine.states import RowState
from kljax._engine.terms import nan_unless
from kljax.distributions._pytree import pytree
from kljax.distributions.arrays import LogProbs

Tail = Literal["bucket", "renormalize", "renormalize_both", "truncate"]


@partial(pytree, static=("tail",))
@dataclass(frozen=True, eq=False)
class TopK(Classed):
    r"""A teacher's k best classes, as targets; from `top_k`, `sample_targets` or a cache.

    With K the given classes, the rest is one more class: :math:`1 - \sum_{i \in K} p_i`.
    How the tail is treated (``tail``, a static option):

    - "bucket": predictions and targets keep one more class for all others. A true divergence on
      k + 1 classes; for KL in either direction, Jeffreys and Jensen–Shannon a lower bound of the
      full one; value and gradient are 0 at equality.
    - "renormalize": the targets are renormalised on K and 0 elsewhere. Reverse KL and Jeffreys
      would be infinite and raise.
    - "renormalize_both": both sides are renormalised on K; blind to mass elsewhere.
    - "truncate": the bare partial sum over K, which may be negative.

    Entries of log-probability -inf are padding; other indices are distinct. Classes that a loss's
    ``where`` masks do not exist: what is left of the targets is renormalised (not with "truncate"),
    and if nothing is left the example gives 0. What the rest holds of such classes is not known:
    give ``where`` to `top_k` too. A pytree.

    Args:
        indices: Integers, ``batch + (k,)``.
        log_probs: Their log-probabilities under the full vocabulary, ``batch + (k,)``; float16 is
            enough for a cache, and better than bfloat16.
        log_tail: The log of the rest's mass, of the batch shape; None is what log_probs lack from
            1, which float32 and a 16-bit cache know poorly where the teacher is confident.
        temperature: What they were taken at; static if a plain number. A loss must be given the
            same one, which then applies to the predictions: a cached top-k cannot be given another.
        tail: One of the four above.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> teacher = kljax.TopK(jnp.array([0]), jnp.log(jnp.array([0.9])), tail="truncate")
        >>> print(f"{kljax.reverse_kl(kljax.Probs([0.6, 0.4]), teacher):.3f}")
        -0.243
    """

    indices: ArrayLike
    log_probs: ArrayLike
    log_tail: ArrayLike | None = None
    temperature: ArrayLike | None = None
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        """A cache written with ``np.savez`` reads static options back as arrays without axes."""
        for name, value in (("tail", self.tail), ("temperature", self.temperature)):
            if isinstance(value, np.ndarray) and value.ndim == 0:
                object.__setattr__(self, name, value.item())

    has_classes = False
    makes_classes = True

    def read(self, caller: str, argument: str) -> Self:
        checks.require_choice(caller, f"{argument}.tail", self.tail, get_args(Tail))
        array = partial(checks.to_array, caller)
        indices = array(f"{argument}.indices", self.indices)
        log_probs = array(f"{argument}.log_probs", self.log_probs)
        log_tail = self.log_tail
        log_tail = None if log_tail is None else array(f"{argument}.log_tail", log_tail)
        checks.require_top_k(caller, argument, indices, log_probs, log_tail)
        if indices.dtype.itemsize < 4:  # the number of classes must fit
            indices = indices.astype(jnp.int32)
        return replace(self, indices=indices, log_probs=log_probs, log_tail=log_tail)

    def shape(self, other: Shape) -> Shape:
        return (*jnp.shape(self.log_probs)[:-1], *other[-1:])

    def fit(self, caller: str, argument: str, layout: Layout, temperature: Any) -> Self:
        checks.require_classes_last(caller, argument, layout)
        checks.require_same_temperature(caller, self.temperature, temperature)
        one = 1.0 if self.temperature is None else self.temperature
        value_checks.check_same_temperature(
            caller, one, 1.0 if temperature is None else temperature
        )
        return replace(self, temperature=None)

    def partition(self, layout: Layout) -> Sequence[Names]:
        *rows, _ = meshes.spec(held(self.log_probs))
        return (*(None for _ in range(len(layout.batch) - len(rows))), *rows, None)

    def require_mass(self, caller: str, layout: Layout) -> None:
        complete = jnp.shape(self.indices)[-1] == layout.all_classes  # there is no rest
        checks.require_tail(caller, self.tail, complete or self.log_tail is not None)

    def normalizes(self, temperature: Array | None) -> bool:
        return self.tail != "truncate"

    def place(
        self, layout: Layout, where: Array | None, live: Array | None, spread: Spread | None
    ) -> Self:
        rank = len(layout.batch)

        def few(x: ArrayLike) -> Array:
            x = held(x)
            x = x.reshape((1,) * (rank + 1 - x.ndim) + x.shape)
            if spread is None:
                return x
            x = jnp.broadcast_to(x, (*layout.batch, x.shape[-1]))
            return meshes.spread(x, meshes.without(spread.sharding, layout.axis))

        tail = self.log_tail
        if tail is not None:
            tail = few(held(tail)[..., None])[..., 0]
        return replace(
            self, indices=few(self.indices), log_probs=few(self.log_probs), log_tail=tail
        )

    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        return tuple(layout.per_example for _ in jax.tree.leaves(self))

    def report(
        self,
        which: str,
        layout: Layout,
        classes: Classes,
        live: Array | None,
        temperature: Array | None,
    ) -> None:
        value_checks.check_top_k(
            which, self.indices, self.log_probs, self.log_tail, self.tail, live, layout.classes[0]
        )

    def few(
        self, others: tuple[Classed, ...], classes: Classes, temperature: Array | None, live: Any
    ) -> tuple[tuple[Classed, ...], Classes]:
        log_probs = held(self.log_probs)
        where, dtype = classes.where, compute_dtype((others, self))
        wholes = [jax.tree.leaves(side)[0] for side in others[:1]]
        wholes += [] if where is None else [where]
        best = _unless_dead(log_probs, live).astype(dtype)
        held_here = wholes[0].shape[-1] if wholes else 0
        count = held_here * lax.axis_size(classes.names)
        given = held(self.indices), best, _allowed(held(self.indices), where, classes.names)
        batch = jnp.broadcast_shapes(*(x.shape[:-1] for x in (*given, *wholes)))
        indices, best, exists = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in given)
        given_mass = ~jnp.isneginf(best)
        valid, lost = given_mass & exists, jnp.any(given_mass & ~exists, axis=-1)

        sides, all_taken = [], jnp.zeros(batch, bool)
        if wholes:  # else what classes there are is not known
            few = Few.among(indices, valid & (indices >= 0), held_here, classes.names)
            few = few._replace(taken=meshes.spread(few.taken, meshes.of_first(wholes[:1])))
            if where is not None or indices.shape[-1] >= count:
                left = ~few.taken if where is None else where & ~few.taken
                all_taken = ~replace(classes, axis=(left.ndim - 1,)).any(left)
            for side in others[:1]:
                seen = _split(side, classes, temperature, few, live)
                best_seen = nan_unless(_inside(indices, count), seen.few)
                sides.append(_Seen(jnp.where(valid, best_seen, -jnp.inf), seen.rest))
        rest = _rest(self.log_tail, best, all_taken, live)
        sides.append(_Seen(jnp.where(valid, best, -jnp.inf), rest))
        on_few = tuple(map(LogProbs, _on_few_classes(sides, self.tail, lost)))
        return on_few, Classes(None, (log_probs.ndim - 1,))

    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        (only,), classes = self.few((), classes, temperature, None)
        return only.view(classes, None, like)

    def best(self, classes: Classes) -> Array:
        indices, log_probs = held(self.indices), held(self.log_probs)
        allowed = _allowed(indices, classes.where, classes.names)
        log_probs = jnp.where(allowed, with_infinity(log_probs), -jnp.inf)
        first = jnp.argmax(log_probs, axis=-1, keepdims=True)
        return jnp.take_along_axis(jnp.broadcast_to(indices, log_probs.shape), first, axis=-1)[
            ..., 0
        ]


class _Seen(NamedTuple):
    """What the k classes, and the rest, hold on one side."""

    best: Array
    rest: Array


def _split(
    side: Classed, classes: Classes, temperature: Array | None, few: Few, live: Array | None
) -> Picked:
    """The predictions at the k classes, and what they hold elsewhere."""
    logits = side.logs(classes, compute_dtype(side)) if side.normalizes(temperature) else None
    shape = few.taken.shape
    if logits is not None and not meshes.explicit(logits):
        inverse = None if temperature is None else 1 / temperature
        return picked(jnp.broadcast_to(logits, shape), inverse, few, live)
    side = jax.tree.map(lambda x: _unless_dead(x, live), side)
    log_probs = side.view(classes, temperature, block_of((side,))).log_probs
    log_probs = jnp.broadcast_to(log_probs, shape)
    rest = log_sum_exp(jnp.where(few.taken, -jnp.inf, log_probs), few.names)
    if few.names:
        return Picked(few.of(log_probs), rest)
    places, here = few.places()
    return Picked(meshes.take(log_probs, jnp.where(here, places, 0)), rest)


def _allowed(indices: Array, where: Array | None, names: tuple[str, ...]) -> Array:
    """Whether `where` lets each class be; one out of range stays, to give NaN."""
    if where is None:
        return jnp.ones(indices.shape, bool)
    batch = jnp.broadcast_shapes(indices.shape[:-1], where.shape[:-1])
    indices, where = (jnp.broadcast_to(x, (*batch, x.shape[-1])) for x in (indices, where))
    inside = _inside(indices, where.shape[-1] * lax.axis_size(names))
    if names:
        few = Few(jnp.where(inside, indices, 0), where, names)
        return ~inside | (few.of(where.astype(jnp.int32)) > 0)
    return ~inside | meshes.take(where, jnp.where(inside, indices, 0))


def _inside(indices: Array, classes: int) -> Array:
    return (indices >= 0) & (indices < classes)


def _rest(log_tail: ArrayLike | None, best: Array, all_taken: Array, live: Array | None) -> Array:
    """The teacher's mass outside the k classes; as given, or what is lacking from 1."""
    if log_tail is not None:
        given = _unless_dead(held(log_tail)[..., None], live)[..., 0].astype(best.dtype)
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


def _unless_dead(x: Array, live: Array | None) -> Array:
    """Of an example of weight 0 nothing that is not finite is read."""
    if live is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.where((live != 0)[..., None] | jnp.isfinite(x) | jnp.isneginf(x), x, 0)


def log_sum_exp(log_probs: Array, names: tuple[str, ...] = ()) -> Array:
    """log Σ exp over the last axis; -inf of nothing, with a derivative of 0."""
    peak = lax.stop_gradient(jnp.max(log_probs, axis=-1, keepdims=True, initial=-jnp.inf))
    peak = lax.pmax(peak, names) if names else peak
    peak = jnp.where(jnp.isneginf(peak), 0, peak)
    total = jnp.sum(jnp.exp(log_probs - peak), axis=-1)
    total = lax.psum(total, names) if names else total
    none = total == 0
    return jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1, total)) + peak[..., 0])


def _log1mexp(x: Array) -> Array:
    """log(1 - exp x) for x < 0, without cancellation."""
    near = x > -0.6931472
    a = jnp.log(-jnp.expm1(jnp.where(near, x, -1)))
    b = jnp.log1p(-jnp.exp(jnp.where(near, -1, x)))
    return jnp.where(near, a, b)
