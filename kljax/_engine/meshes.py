"""Arrays on meshes with explicit axes, where the operands of an operation must be spread alike.

The mesh is read off the arrays' own types, so that it need not be set.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Names = str | tuple[str, ...] | None  # the mesh axes that one axis of an array is spread over


class Spread(NamedTuple):
    """How an array of the whole input's shape lies on a mesh of explicit axes."""

    shape: tuple[int, ...]
    axis: tuple[int, ...]  # of the classes
    sharding: NamedSharding
    # Whether each device computes its own part by itself. Otherwise a select demands that its
    # operands are spread alike, and so that what is shared is broadcast first.
    per_device: bool = False

    def lay(self, x: Array) -> Array:
        """x, which has all axes of the whole, as the whole lies."""
        if not self.per_device:
            return spread(jnp.broadcast_to(x, self.shape), self.sharding)
        pairs = zip(self.sharding.spec, x.shape, self.shape, strict=True)
        spec = (name if n == whole else None for name, n, whole in pairs)
        return spread(x, NamedSharding(self.sharding.mesh, PartitionSpec(*spec)))

    @property
    def rows(self) -> tuple[Names, ...]:
        """The mesh axes of each axis of the batch."""
        return tuple(name for i, name in enumerate(self.sharding.spec) if i not in self.axis)

    @property
    def classes(self) -> Names:
        return self.sharding.spec[self.axis[0]]

    @property
    def names_of_rows(self) -> tuple[str, ...]:
        return all_names(self.rows)

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of what one device holds."""
        sizes = self.sharding.mesh.shape
        shards = (math.prod(sizes[n] for n in as_names(name)) for name in self.sharding.spec)
        return tuple(n // count for n, count in zip(self.shape, shards, strict=True))


def as_names(name: Names) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else tuple(name or ())


def all_names(of_axes: Iterable[Names]) -> tuple[str, ...]:
    return tuple(name for names in of_axes for name in as_names(names))


def explicit(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes that any array lies on."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def explicit_axes(mesh: Mesh | AbstractMesh) -> set[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def spec(x: Array) -> tuple[Names, ...]:
    """The mesh axes that each axis is spread over."""
    return tuple(jax.typeof(x).sharding.spec)


def varying(leaves: Sequence[Array]) -> tuple[str, ...]:
    """The mesh axes that any of the arrays varies over inside `shard_map`."""
    names = (jax.typeof(x).manual_axis_type.varying for x in leaves)
    return tuple(sorted(frozenset().union(*names)))


def vary(x: Array, names: Collection[str]) -> Array:
    """x, known to vary over these mesh axes too."""
    missing = tuple(name for name in names if name not in varying([x]))
    return lax.pcast(x, missing, to="varying") if missing else x


def of_first(arrays: Sequence[Array]) -> NamedSharding | None:
    """The sharding of the first array that is spread over explicit axes."""
    shardings = (jax.typeof(x).sharding for x in arrays)
    return next((s for s in shardings if any(s.spec)), None)


def without(sharding: NamedSharding, axes: Collection[int]) -> NamedSharding:
    """The same sharding, whole along some axes of the array."""
    spec = (None if i in axes else name for i, name in enumerate(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def dropping(sharding: NamedSharding, axes: Collection[int]) -> NamedSharding:
    """The sharding of an array that lacks some axes."""
    spec = (name for i, name in enumerate(sharding.spec) if i not in axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def spread(x: Array, sharding: NamedSharding | None) -> Array:
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def along(x: Array, axis: int, name: Names, mesh: Mesh | AbstractMesh) -> Array:
    """x, spread by this name along one axis, and along the others as it is."""
    names = [None if set(as_names(n)) & set(as_names(name)) else n for n in spec(x)]
    names[axis] = name
    return spread(x, NamedSharding(mesh, PartitionSpec(*names)))


def whole(x: Array) -> Array:
    """All of it on every device."""
    sharding = of_first([x])
    return x if sharding is None else spread(x, without(sharding, range(x.ndim)))


def broadcast(arrays: Sequence[Array]) -> list[Array]:
    """On one shape, and spread alike: as the first of that shape that is spread."""
    shape = jnp.broadcast_shapes(*(x.shape for x in arrays))
    sharding = of_first([x for x in arrays if x.shape == shape])
    return [spread(jnp.broadcast_to(x, shape), sharding) for x in arrays]


def take(x: Array, indices: Array) -> Array:
    """Entries of the last axis; where that is spread, only they are moved, not the whole."""
    sharding = of_first([x])
    if sharding is None or not spreads(sharding, [x.ndim - 1]):
        return jnp.take_along_axis(x, indices, axis=-1)
    whole_axis = NamedSharding(sharding.mesh, PartitionSpec(None))
    pick = lambda row, places: row.at[places].get(out_sharding=whole_axis)  # noqa: E731
    for _ in range(x.ndim - 1):
        pick = jax.vmap(pick)
    return pick(x, indices)


def spreads(sharding: NamedSharding, axes: Collection[int]) -> bool:
    return any(name is not None for i, name in enumerate(sharding.spec) if i in axes)
