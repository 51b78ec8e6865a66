"""On a mesh of explicit axes each device computes its own part of a batch, inside `shard_map`.

Over the mesh then go nothing but sums: one number, the gradients to what all share and, where
classes are spread too, numbers of a row. A kernel that lies on the devices in parts is gathered
once, and its gradient scattered once, however many blocks there are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from kljax._engine import meshes
from kljax._engine.classes import Axes
from kljax._engine.meshes import Names, Spread, as_names

Tree = Any


def on_each(
    compute: Callable[[Tree], tuple[Array, Tree]],
    spread: Spread,
    tree: Tree,
    axes: tuple[Axes, ...],
    *,
    summed: bool,
) -> tuple[Array, Tree]:
    """A loss of the whole batch: one value per example, or their sum, and more of each example.

    Args:
        compute: The same of one device's part of the tree.
        spread: How the whole input lies.
        tree: A pytree whose classes were laid so by `place`; the batch is laid here.
        axes: Where each leaf has its batch axes.
        summed: Whether the loss is one number.
    """
    leaves, treedef = jax.tree.flatten(tree)
    specs = [_spec(spread, x, batch_axes) for x, batch_axes in zip(leaves, axes, strict=True)]
    mesh, names = spread.sharding.mesh, spread.names_of_rows

    def on_one(*leaves: Array) -> tuple[Array, Tree]:
        own = [
            _gathered(x, spec, names) if batch_axes is None else x
            for x, spec, batch_axes in zip(leaves, specs, axes, strict=True)
        ]
        value, more = compute(treedef.unflatten(own))
        if summed and names:
            value = lax.psum(meshes.vary(value, names), names)
        return value, more

    batch = PartitionSpec(*spread.rows)
    laid = [
        meshes.spread(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs, strict=True)
    ]
    # Named only beside axes that the compiler manages: of all there are `vmap` may have taken one.
    explicit = meshes.explicit_axes(mesh)
    run = jax.shard_map(
        on_one,
        mesh=mesh,
        axis_names=set() if explicit == set(mesh.axis_names) else explicit,
        in_specs=tuple(specs),
        out_specs=(PartitionSpec() if summed else batch, batch),
    )
    return run(*laid)


def _spec(spread: Spread, x: Array, axes: Axes) -> PartitionSpec:
    """How a leaf enters: its batch axes as the batch lies, its axis of classes as it was laid.

    What all examples share may stay in parts over the mesh axes of the batch, to be gathered
    inside: the transpose of that scatters the gradient. Any other axis is made whole here.
    """
    kept = set(as_names(spread.classes))
    if axes is None:
        kept |= set(spread.names_of_rows)
    names: list[Names] = [n if set(as_names(n)) <= kept else None for n in meshes.spec(x)]
    for axis, row in zip(axes or (), spread.rows, strict=False):
        names[axis] = None if x.shape[axis] == 1 else row
    return PartitionSpec(*names)


def _gathered(x: Array, spec: PartitionSpec, names: tuple[str, ...]) -> Array:
    """Whole along the axes over which it lay in parts, none of which is that of the classes."""
    for axis, name in enumerate(spec):
        if set(as_names(name)) & set(names):
            x = lax.all_gather(x, name, axis=axis, tiled=True)
    return x
