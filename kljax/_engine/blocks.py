"""Blocks of examples: how a batch is cut, and a loop over the pieces.

Block k takes neighbouring rows where one device holds them all. Else it takes every count-th row of
an axis: a batch that the compiler has spread over devices then gives each block rows of every
device, and nothing is gathered.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine.classes import Axes
from kljax._engine.meshes import vary, varying

# An axis keeps at least this many rows in a block, so that as many devices can share it.
_SPREAD = 8


class Blocks(NamedTuple):
    """A batch, and how many rows of each of its axes one block takes."""

    batch: tuple[int, ...]
    extents: tuple[int, ...]
    neighbours: bool = False  # else every count-th row
    # Each block is cut out once; else XLA:CPU would cut it anew for every reader, where compilers
    # for accelerators make that a part of reading.
    cut_once: bool = True

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(n // e if e else 0 for n, e in zip(self.batch, self.extents, strict=True))

    @property
    def single(self) -> bool:
        return self.batch == self.extents

    @property
    def rest(self) -> tuple[int, int] | None:
        """The axis that the blocks do not exhaust, and what is left of it."""
        left = [n % e if e else 0 for n, e in zip(self.batch, self.extents, strict=True)]
        return next(((axis, n) for axis, n in enumerate(left) if n), None)


def whole(batch: tuple[int, ...]) -> Blocks:
    return Blocks(batch, batch)


def fitting(batch: tuple[int, ...], rows: int) -> Blocks:
    """Blocks of about so many rows, spread over devices where the batch allows it."""
    extents, stuck = list(batch), []
    for axis in reversed(range(len(batch))):
        n, others = batch[axis], math.prod(extents) // max(extents[axis], 1)
        want = max(rows // max(others, 1), _SPREAD)
        if want >= n:
            continue
        divisors = [d for d in range(max(want // 2, _SPREAD), want + 1) if n % d == 0]
        if divisors:
            extents[axis] = max([d for d in divisors if d % _SPREAD == 0] or divisors)
        else:
            stuck.append(axis)
    if stuck and math.prod(extents) > 2 * rows:  # a batch of a prime size is on no mesh
        axis = max(stuck, key=lambda axis: batch[axis])
        extents[axis] = max(rows // (math.prod(extents) // extents[axis]), 1)
    return Blocks(batch, tuple(extents))


def exactly(batch: tuple[int, ...], rows: int) -> Blocks:
    """Blocks of so many rows, and one of the rest; several batch axes: at most so many."""
    extents = list(batch)
    for axis in reversed(range(len(batch))):
        others = math.prod(extents) // max(extents[axis], 1)
        want = min(max(rows // max(others, 1), 1), batch[axis])
        whole_others = math.prod(extents) == math.prod(batch)
        if batch[axis] and batch[axis] % want and not whole_others:
            want = max(d for d in range(1, want + 1) if batch[axis] % d == 0)
        extents[axis] = want
        if batch[axis] and batch[axis] % want:
            break
    return Blocks(batch, tuple(extents))


def block_shapes(blocks: Blocks, shape: tuple[int, ...], axes: Axes) -> set[tuple[int, ...]]:
    """The shapes that the blocks of an array have, and that of the rest."""
    ks = [0] if blocks.rest is None else [0, None]
    return {_slice(blocks, shape, axes, k).shape for k in ks}


def sweep(
    blocks: Blocks,
    leaves: Sequence[Array],
    axes: Sequence[Axes],
    body: Callable[[list[Array]], tuple[list[Array], list[Array]]],
    out_axes: Sequence[Axes],
) -> tuple[list[Array], list[Array]]:
    """Run body(leaves of a block) -> (sums, rows) over all blocks: add up and put together."""
    if blocks.single:
        return body(list(leaves))

    def read(k: Any) -> list[Array]:
        tied = _tied(leaves, axes, k) if blocks.cut_once and k is not None else leaves
        block = [_read(blocks, x, a, k) for x, a in zip(tied, axes, strict=True)]
        return [
            lax.optimization_barrier(x) if blocks.cut_once and a is not None else x
            for x, a in zip(block, axes, strict=True)
        ]

    shapes = jax.eval_shape(lambda: body(read(jnp.int32(0))))
    sums = [_zeros(s.shape, s.dtype, s) for s in shapes[0]]
    wholes = [_full_shape(blocks, s.shape, a) for s, a in zip(shapes[1], out_axes, strict=True)]
    rows = [
        _zeros(_slice(blocks, whole, a, None).full, _stored(s.dtype), s)
        for whole, s, a in zip(wholes, shapes[1], out_axes, strict=True)
    ]

    def step(k: Any, carry: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        more, new = body(read(k))
        sums, rows = carry
        sums = [a + b for a, b in zip(sums, more, strict=True)]
        rows = [
            _write(blocks, x, whole, y, a, k)
            for x, whole, y, a in zip(rows, wholes, new, out_axes, strict=True)
        ]
        return sums, rows

    sums, rows = lax.fori_loop(0, math.prod(blocks.counts), step, (sums, rows))
    if blocks.rest is not None:
        sums, rows = step(_REST, (sums, rows))
    rows = [x.reshape(whole) for x, whole in zip(rows, wholes, strict=True)]
    return sums, [_as_stored(x, s.dtype) for x, s in zip(rows, shapes[1], strict=True)]


# XLA:CPU of jax 0.10 rewrites a whole 16-bit array in float32 at each update of a part of it.
_UPDATES_BITS = jax.__version_info__ < (0, 11)


def _stored(dtype: Any) -> Any:
    """The dtype in which a loop carries an array that it updates."""
    return jnp.uint16 if _UPDATES_BITS and _is_narrow(dtype) else dtype


def _as_stored(x: Array, dtype: Any) -> Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _is_narrow(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize == 2


def _tied(leaves: Sequence[Array], axes: Sequence[Axes], k: Array) -> list[Array]:
    """The leaves as of this turn of the loop.

    Else XLA:CPU widens whole 16-bit arrays to float32 once, before the loop that slices them.
    """
    narrow = [i for i, x in enumerate(leaves) if axes[i] is not None and _is_narrow(x.dtype)]
    tied, out = lax.optimization_barrier(([leaves[i] for i in narrow], k))[0], list(leaves)
    for i, x in zip(narrow, tied, strict=True):
        out[i] = x
    return out


_REST = None  # in place of a block's number: the rows that no block takes


class _Slice(NamedTuple):
    """Block k of an array: a slice of the array reshaped, itself reshaped to the block's shape."""

    full: tuple[int, ...]  # to what the array is reshaped
    start: list[Array]
    size: tuple[int, ...]
    shape: tuple[int, ...]  # of the block


def _slice(blocks: Blocks, shape: tuple[int, ...], axes: Axes, k: Array | int | None) -> _Slice:
    numbers = dict(zip(axes or (), range(len(blocks.batch)), strict=True))
    at = None if k is None else jnp.unravel_index(k, blocks.counts)
    cuts = [_cut(blocks, n, numbers.get(position), at) for position, n in enumerate(shape)]
    full, start, size = (sum(parts, ()) for parts in zip(*cuts, strict=True)) if cuts else ((),) * 3
    block = tuple(math.prod(size) for _, _, size in cuts)
    return _Slice(full, [jnp.asarray(i, jnp.int32) for i in start], size, block)


def _cut(
    blocks: Blocks, n: int, axis: int | None, at: Sequence[Any] | None
) -> tuple[tuple[int, ...], tuple[Any, ...], tuple[int, ...]]:
    """What becomes of one dimension of n: the shape it is given, where the slice starts, its size.

    Args:
        axis: Which axis of the batch this is, if it is one.
        at: The block's number along each axis of the batch; None for the rest.
    """
    if axis is None or n != blocks.batch[axis] or blocks.extents[axis] == n:
        return (n,), (0,), (n,)
    extent, count = blocks.extents[axis], blocks.counts[axis]
    if blocks.rest is not None and blocks.rest[0] == axis:
        left = blocks.rest[1]
        return (
            ((n,), (n - left,), (left,)) if at is None else ((n,), (at[axis] * extent,), (extent,))
        )
    if blocks.neighbours:
        full, start, size = (count, extent), (at and at[axis], 0), (1, extent)
    else:
        full, start, size = (extent, count), (0, at and at[axis]), (extent, 1)
    return (full, (0, 0), full) if at is None else (full, start, size)


def _read(blocks: Blocks, x: Array, axes: Axes, k: Array | int | None) -> Array:
    if axes is None:
        return x
    cut = _slice(blocks, x.shape, axes, k)
    return lax.dynamic_slice(x.reshape(cut.full), cut.start, cut.size).reshape(cut.shape)


def _write(
    blocks: Blocks,
    x: Array,
    shape: tuple[int, ...],
    block: Array,
    axes: Axes,
    k: Array | int | None,
) -> Array:
    """Put a block into x, which is held as `_slice` cuts it: to reshape it here would copy it."""
    cut = _slice(blocks, shape, axes, k)
    return lax.dynamic_update_slice(x, _as_stored(block, x.dtype).reshape(cut.size), cut.start)


def _full_shape(blocks: Blocks, shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    full = list(shape)
    for i, axis in enumerate(axes or ()):
        full[axis] = blocks.batch[i]
    return tuple(full)


def _zeros(shape: tuple[int, ...], dtype: Any, like: jax.ShapeDtypeStruct) -> Array:
    """Zeros that, inside `shard_map`, vary over the mesh axes that like varies over."""
    kind, fresh = like.manual_axis_type, jnp.zeros(shape, dtype)
    return vary(fresh, tuple(sorted(kind.varying)) if kind else ())


def aligned(leaves: Sequence[Array], but: tuple[str, ...] = ()) -> list[Array]:
    """The leaves, all varying over the same mesh axes inside `shard_map`.

    What is shared there gets its gradient summed over the mesh by JAX, not by the rules here; but
    over the axes that the classes are spread over, a block sums it.
    """
    names = tuple(name for name in varying(leaves) if name not in but)
    return [vary(x, names) for x in leaves]


def widened(x: Array) -> Array:
    """In float32 at least: what is to be added up over blocks."""
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def times(factor: Array, x: Array) -> Array:
    """factor · x in x's own dtype, where a factor out of a 16-bit range does no harm."""
    wide = widened(x)
    return (factor.astype(wide.dtype) * wide).astype(x.dtype)


def rescale(blocks: Blocks, axes: Axes, x: Array, factor: Array) -> Array:
    """factor · x, rewritten in place block by block, and left as it is where factor is 1."""
    if blocks.single or _stored(x.dtype) != x.dtype:
        return times(factor, x)
    return _rescale(blocks, axes, x, factor)


def _rescale(blocks: Blocks, axes: Axes, x: Array, factor: Array) -> Array:
    @jax.custom_batching.custom_vmap
    def in_place(x: Array, factor: Array) -> Array:
        whole = x.shape

        def step(k: Any, x: Array) -> Array:
            cut = _slice(blocks, whole, axes, k)
            block = lax.dynamic_slice(x, cut.start, cut.size)
            return lax.dynamic_update_slice(x, times(factor, block), cut.start)

        turns = jnp.where(factor == 1, 0, math.prod(blocks.counts))
        x = lax.fori_loop(0, turns, step, x.reshape(_slice(blocks, whole, axes, None).full))
        if blocks.rest is not None:
            x = step(_REST, x)
        return x.reshape(whole)

    @in_place.def_vmap
    def _(size: int, mapped: list[bool], x: Array, factor: Array) -> tuple[Array, bool]:
        # A loop whose length differs from one to the next would copy everything at each step.
        x = x if mapped[0] else x[None]
        return times(factor.reshape(-1, *(1,) * (x.ndim - 1)), x), True

    return in_place(x, factor)
