"""How a batch is computed: one table of how many bytes of logits a block may hold."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kljax._engine import checks, meshes
from kljax._engine.blocks import Blocks, exactly, fitting, whole
from kljax._engine.classes import Layout
from kljax._engine.meshes import Names, Spread, all_names, as_names, varying
from kljax._engine.side import Classed


@dataclass(frozen=True)
class Chunked:
    """Compute so many examples at a time.

    Args:
        rows: How many, of all devices together; the last block takes what is left. Inside
            ``shard_map``, of each device.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> x = jnp.zeros((10, 5))
        >>> print(kljax.entropy(x, implementation=kljax.Chunked(rows=4)).shape)
        (10,)
    """

    rows: int


Implementation = Literal["dense", "chunked"] | Chunked

_MIB = 2**20


class _Budget(NamedTuple):
    """Bytes of float32 logits in one block, and in a batch that is not cut."""

    share: float  # of the bytes of the narrowest logits array: what a block takes beside it
    least: int
    most: int
    at_once: int
    least_rows: int = 1

    def rows(self, batch: tuple[int, ...], classes: int, itemsize: int) -> int:
        whole = itemsize * classes * math.prod(batch)
        rows = int(min(max(self.share * whole, self.least), self.most)) // (4 * classes)
        return max(rows, self.least_rows)


# On CPU a block and what is made of it stays in a core's cache, as all of a small batch does;
# unless there is a head: then the kernel and its gradient are passed over once a block, which a
# hundred rows make up for. Elsewhere the compiler fuses whole arrays into as few passes as it can,
# and only a head's logits, which must be made first, go in blocks: of thousands of tokens, to fill
# the device.
_CPU = _Budget(1 / 64, _MIB // 4, 2 * _MIB, 8 * _MIB)
_CPU_HEAD = _Budget(1 / 16, _MIB // 4, 32 * _MIB, 4 * _MIB, least_rows=128)
_ELSEWHERE_HEAD = _Budget(1, 64 * _MIB, 1024 * _MIB, 256 * _MIB)
# A TPU sets entries of a flat copy, which in a block of this size stays beside the processor, on
# the v7x with half the room too.
_TPU_TOP_K = _Budget(1, 16 * _MIB, 24 * _MIB, 24 * _MIB)
# Asked for by name, where arrays would go at once.
_CPU_CHUNKED = _CPU._replace(at_once=_MIB)
_ELSEWHERE_CHUNKED = _Budget(1, _MIB, 64 * _MIB, 4 * _MIB)


# Where nothing tells how a batch is spread over several devices, a kernel is not passed over, and
# moved between them, more often than this.
_MOST_TURNS = 16


class Path(NamedTuple):
    """How the batch is cut; which of these is known when the program is lowered."""

    cpu: Blocks
    tpu: Blocks
    gpu: Blocks  # and what we do not know
    names: tuple[str, ...] = ()  # the mapped axes over which a block's classes are spread
    devices: int = 0  # of the mesh that is set; unused where each computes a part of its own
    exact: bool = False  # as asked for, on any number of devices
    per_device: Spread | None = None  # where each device computes a part of its own, cut as above
    on_one: bool = False  # and then there

    @property
    def whole(self) -> bool:
        """Whether nothing is cut anywhere."""
        return all(cut.single for cut in self.cuts)

    @property
    def batch(self) -> tuple[int, ...]:
        return self.cpu.batch

    @property
    def cuts(self) -> tuple[Blocks, ...]:
        return self.cpu, self.tpu, self.gpu

    def on(self, platform: str, devices: int = 1) -> Blocks:
        """The blocks of a program for so many devices; each holds a part of every block."""
        cut = {"cpu": self.cpu, "tpu": self.tpu}.get(platform, self.gpu)
        if devices == 1 or self.exact or cut.single:
            return cut
        rows, most = math.prod(cut.extents), math.prod(self.batch) // _MOST_TURNS
        rows = rows * self.devices if self.devices else min(rows * devices, max(rows, most))
        return fitting(self.batch, rows)


def choose(
    caller: str,
    implementation: Implementation | None,
    layout: Layout,
    sides: tuple[Classed, ...],
    *,
    capturing: bool = False,
) -> Path:
    """How to run. A named implementation runs or raises; None leaves the choice here.

    Args:
        capturing: A term captures values, which may be of the batch's size.
    """
    known = all(map(checks.is_known_size, layout.shape))
    empty = known and math.prod(layout.shape) == 0
    spread = None if capturing or empty else _per_device(layout, sides)
    only_whole = None if spread or empty else _only_whole(layout, sides, capturing)
    checks.require_implementation(
        caller, implementation, Chunked, only_whole=only_whole, known=known
    )
    at_once = implementation == "dense" or bool(only_whole) or empty or not known
    if spread is None:
        return _cut(implementation, layout, sides, at_once, capturing)
    return _cut_of_device(implementation, layout, sides, at_once, spread)


def _cut_of_device(
    implementation: Implementation | None,
    layout: Layout,
    sides: tuple[Classed, ...],
    at_once: bool,
    spread: Spread,
) -> Path:
    """One device's part cut; or the whole batch as it is, which compilers spread as well."""
    makes_classes = any(side.makes_classes for side in sides)
    # Where nothing is spread `vmap` may have taken the axis, over which JAX maps no loop.
    is_spread = any(any(meshes.spec(x)) for x in jax.tree.leaves(sides))
    known_apart = is_spread or spread.sharding.mesh.size == 1
    if implementation is None and not (makes_classes and known_apart):
        return _as_one(layout)
    own = Layout.of(spread.part, layout.axis, as_names(spread.classes))
    if isinstance(implementation, Chunked):  # at a time on all devices together
        devices = math.prod(layout.batch) // math.prod(own.batch)
        implementation = Chunked(max(implementation.rows // devices, 1))
    path = _cut(implementation, own, sides, at_once, capturing=False)
    return _as_one(layout) if path.whole and not makes_classes else path._replace(per_device=spread)


def _cut(
    implementation: Implementation | None,
    layout: Layout,
    sides: tuple[Classed, ...],
    at_once: bool,
    capturing: bool,
) -> Path:
    batch, classes = layout.batch, math.prod(layout.classes)
    if isinstance(implementation, Chunked):
        rows = exactly(batch, implementation.rows)
        return Path(rows, rows, rows, layout.names, exact=True)
    makes_classes = any(side.makes_classes for side in sides)
    if at_once:
        return _as_one(layout)
    if implementation is None and capturing and not makes_classes:
        return _as_one(layout)
    cpu, tpu, gpu = _CPU, None, None
    if implementation == "chunked":
        cpu, tpu, gpu = _CPU_CHUNKED, _ELSEWHERE_CHUNKED, _ELSEWHERE_CHUNKED
    if any(side.has_kernel for side in sides):
        cpu, tpu, gpu = _CPU_HEAD, _ELSEWHERE_HEAD, _ELSEWHERE_HEAD
    elif makes_classes:
        tpu = _TPU_TOP_K
    arrays = [side.array for side in sides if side.array is not None]
    itemsize = min((x.dtype.itemsize for x in arrays), default=4)
    blocks = partial(_blocks, batch, classes, itemsize)
    mesh = jax.sharding.get_abstract_mesh()
    cuts = blocks(cpu), blocks(tpu), blocks(gpu)
    return Path(*cuts, layout.names, 0 if mesh.empty else mesh.size, exact=capturing)


def _as_one(layout: Layout) -> Path:
    cut = whole(layout.batch)
    return Path(cut, cut, cut, layout.names)


def _only_whole(layout: Layout, sides: tuple[Classed, ...], capturing: bool) -> str | None:
    """Why the batch cannot be cut, if it cannot."""
    if meshes.explicit(sides):
        also = "a term that captures values" if capturing else "axes that are mapped by hand"
        also = "several axes of classes" if len(layout.axis) > 1 else also
        return f"a mesh with explicit axes, and {also}"
    if not set(layout.names) <= set(varying(jax.tree.leaves(sides))):
        return "classes over other axes than those of shard_map(check_vma=True)"
    return None


def _per_device(layout: Layout, sides: tuple[Classed, ...]) -> Spread | None:
    """How the whole lies where each device can compute its own part: as one of the sides does.

    The first side that is spread along the batch decides for the batch, and the first that is
    spread along the classes, over other mesh axes, for the classes.
    """
    mesh = meshes.explicit(sides)
    if mesh is None or layout.names or AxisType.Manual in mesh.axis_types:
        return None
    found: list[Names] = [None] * len(layout.shape)
    specs, taken = [side.partition(layout) for side in sides], set[str]()
    for axes in (layout.batch_axes, layout.axis):
        options = ([spec[axis] for axis in axes] for spec in specs)
        free = (names for names in options if taken.isdisjoint(all_names(names)))
        for axis, name in zip(axes, next(filter(any, free), ()), strict=False):
            found[axis] = name
        taken = set(all_names(found))
    if len(layout.axis) > 1 and any(found[axis] for axis in layout.axis):
        return None  # they have no single number on a shard
    sharding = NamedSharding(mesh, PartitionSpec(*found))
    return Spread(layout.shape, layout.axis, sharding, per_device=True)


def _blocks(batch: tuple[int, ...], classes: int, itemsize: int, budget: _Budget | None) -> Blocks:
    if budget is None or 4 * classes * math.prod(batch) <= budget.at_once:
        return whole(batch)
    return fitting(batch, budget.rows(batch, classes, itemsize))
