"""Where the classes lie, which exist, and every sum over them.

The classes may be spread over named mapped axes, each shard holding its part in the order of the
axes; then what is summed here is summed over the axes too.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine import states
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

    def any(self, x: Array, *, keepdims: bool = False) -> Array:
        found = jnp.any(x, axis=self.axis, keepdims=keepdims)
        return lax.pmax(found.astype(jnp.int32), self.names) > 0 if self.names else found

    def numbers(self, like: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> Array:
        """The number of each class along its axis."""
        (axis,) = self.axis
        numbers = lax.broadcasted_iota(dtype, like.shape, axis, out_sharding=like.sharding)
        if self.names:
            numbers += lax.axis_index(self.names).astype(dtype) * like.shape[axis]
        return numbers

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
        score = jnp.max(flat, axis=-1)
        number += lax.axis_index(self.names).astype(jnp.int32) * flat.shape[-1]
        held = score == lax.pmax(score, self.names)
        return lax.pmin(jnp.where(held, number, jnp.iinfo(jnp.int32).max), self.names)
