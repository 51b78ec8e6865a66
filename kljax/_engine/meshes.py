"""Arrays on meshes with explicit axes, where the operands of an operation must be spread alike.

The mesh is read off the arrays' own types, so that it need not be set.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit(tree: Any) -> bool:
    """Whether any array lies on a mesh with explicit axes."""
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree))
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def varying(leaves: Sequence[Array]) -> tuple[str, ...]:
    """The mesh axes that any of the arrays varies over inside `shard_map`."""
    names = (jax.typeof(x).manual_axis_type.varying for x in leaves)
    return tuple(sorted(frozenset().union(*names)))


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
