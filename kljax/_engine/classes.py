"""Where the classes lie, which exist, and every sum over them.

The classes may be spread over named mapped axes, each shard holding its part in the order of the
axes; then what is summed here is summed over the axes too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine import meshes, states
from kljax._engine.states import RowState

Shape = tuple[int, ...]
Axes = tuple[int, ...] | None  # where an array has its batch axes; None: it has none


class Layout(NamedTuple):
    """Where batch and classes lie in the whole input."""

    shape: Shape
    axis: tuple[int, ...]
    names: tuple[str, ...]  # the mapped axes over which the classes are spread
    batch_axes: tuple[int, ...]
    batch: Shape
    classes: Shape

    @classmethod
    def of(cls, shape: Shape, axis: tuple[int, ...], names: tuple[str, ...] = ()) -> "Layout":
        batch_axes = tuple([i for i in range(len(shape)) if i not in axis])
        batch, classes = (tuple([shape[i] for i in axes]) for axes in (batch_axes, axis))
        return cls(shape, axis, names, batch_axes, batch, classes)

    @property
    def per_example(self) -> Axes:
        """Of an array that has the batch axes, and them first."""
        return tuple(range(len(self.batch)))

    @property
    def all_classes(self) -> int:
        """How many there are, on all shards together."""
        return math.prod(self.classes) * lax.axis_size(self.names)

    def expand(self, x: Array) -> Array:
        """Give a shared distribution, or a mask of classes, the batch axes it lacks."""
        return x if x.ndim == len(self.shape) else jnp.expand_dims(x, self.batch_axes)


@partial(jax.tree_util.register_dataclass, data_fields=["where"], meta_fields=["axis", "names"])
@dataclass(frozen=True)
class Classes:
    """The classes of a block: all that is known of them is asked here."""

    where: Array | None  # which exist; it broadcasts against the block
    axis: tuple[int, ...]
    names: tuple[str, ...] = ()

    def present(self, x: Array, fill: float = 0) -> Array:
        """x where a class exists. Selected, never multiplied: NaN elsewhere has no effect."""
        return x if self.where is None else jnp.where(self.where, x, fill)

    def only(self, examples: Array | None) -> "Classes":
        """The classes of some examples; of the others none exists."""
        if examples is None:
            return self
        there = jnp.expand_dims(examples, self.axis)
        return replace(self, where=there if self.where is None else self.where & there)

    def sum(self, x: Array, *, keepdims: bool = False) -> Array:
        total = jnp.sum(x, axis=self.axis, keepdims=keepdims)
        return lax.psum(total, self.names) if self.names else total

    def sums(self, *xs: Array) -> list[Array]:
        """Of several arrays at once, from one pass over what they are made of."""
        if len(xs) == 1:
            return [self.sum(xs[0])]

        def apart(*xs: Array) -> list[Array]:
            return [jnp.sum(x, axis=self.axis) for x in xs]

        def in_pairs(*xs: Array) -> list[Array]:
            # As complex numbers: what two sums share NVIDIA's compiler would store.
            found: list[Array] = []
            for a, b in zip(xs[::2], xs[1::2], strict=False):
                total = jnp.sum(lax.complex(a, b), axis=self.axis)
                found += lax.real(total), lax.imag(total)
            return found + [jnp.sum(x, axis=self.axis) for x in xs[len(found) :]]

        found = lax.platform_dependent(*xs, cpu=apart, tpu=apart, default=in_pairs)
        return list(lax.psum(jnp.stack(found), self.names)) if self.names else found

    def any(self, x: Array, *, keepdims: bool = False) -> Array:
        found = jnp.any(x, axis=self.axis, keepdims=keepdims)
        return lax.pmax(found.astype(jnp.int32), self.names) > 0 if self.names else found

    def count(self, like: jax.ShapeDtypeStruct) -> int:
        """How many classes there are, whether `where` lets them be or not."""
        return math.prod(like.shape[axis] for axis in self.axis) * lax.axis_size(self.names)

    def numbers(self, like: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> Array:
        """The number of each class, across shards too; of several axes the last runs fastest."""
        along = partial(lax.broadcasted_iota, dtype, like.shape, out_sharding=like.sharding)
        *others, last = self.axis
        numbers, count = along(last), like.shape[last]
        for axis in reversed(others):
            numbers, count = numbers + along(axis) * count, count * like.shape[axis]
        if self.names:
            numbers += lax.axis_index(self.names).astype(dtype) * count
        return numbers

    def at(self, x: Array, numbers: Array) -> Array:
        """x at classes of the whole, by their numbers; classes lie on the last axis."""
        if not self.names:
            return jnp.take_along_axis(x, numbers, axis=-1)
        own = numbers - lax.axis_index(self.names) * x.shape[-1]
        is_here = (own >= 0) & (own < x.shape[-1])
        found = jnp.take_along_axis(x, jnp.where(is_here, own, 0), axis=-1)
        return lax.psum(jnp.where(is_here, found, 0), self.names)

    def states_and_best(
        self, x: Array, inverse_temperatures: Sequence[Array | None], dtype: jnp.dtype
    ) -> tuple[tuple[RowState, ...], Array]:
        """The states of each row at several temperatures, and the number of its best class.

        In one pass where memory is the limit. It has no derivative.
        """

        def one_by_one(x: Array, *inverses: Array | None) -> tuple[tuple[RowState, ...], Array]:
            found = (states.row_state(x, by, self.axis, dtype) for by in inverses)
            return tuple(found), self.best(x)

        def together(x: Array, *inverses: Array | None) -> tuple[tuple[RowState, ...], Array]:
            like = jax.ShapeDtypeStruct(x.shape, dtype, sharding=meshes.of_first([x]))
            numbers = self.numbers(like, jnp.dtype("int32"))
            found, best = states.in_one_pass(x.astype(dtype), inverses, self.axis, numbers)
            assert best is not None
            return tuple(found), self.best_of_all(jnp.squeeze(found[0].peak, self.axis), best)

        found, best = lax.platform_dependent(
            x, *inverse_temperatures, cpu=one_by_one, default=together
        )
        if self.names:
            by = zip(found, inverse_temperatures, strict=True)
            found = tuple(states.over_names(state, inverse, self.names) for state, inverse in by)
        return found, best

    def state(self, x: Array, inverse_temperature: Array | None, dtype: jnp.dtype) -> RowState:
        """Peak and mass of each row."""
        return states.row_state(x, inverse_temperature, self.axis, dtype, self.names)

    def best(self, scores: Array) -> Array:
        """The number of the class with the highest score, the first of several."""
        scores = self.present(scores, -jnp.inf)
        last = jnp.moveaxis(scores, self.axis, range(-len(self.axis), 0))
        batch = last.shape[: -len(self.axis)]
        flat = last.reshape(*batch, math.prod(last.shape[len(batch) :]))
        number = jnp.argmax(flat, axis=-1).astype(jnp.int32)
        if not self.names:
            return number
        number += lax.axis_index(self.names).astype(jnp.int32) * flat.shape[-1]
        return self.best_of_all(jnp.max(flat, axis=-1), number)

    def best_of_all(self, score: Array, number: Array) -> Array:
        """Of the best class of each shard; the first of several."""
        if not self.names:
            return number
        held = ~(score < lax.pmax(score, self.names))  # NaN is held by all
        return lax.pmin(jnp.where(held, number, jnp.iinfo(jnp.int32).max), self.names)
