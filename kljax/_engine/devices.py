"""Each device of a mesh of explicit axes computes its own part of a batch, as inside `shard_map`.

Of the whole batch there is then nothing but sums over devices: one number, and the gradients to
what all share. A kernel that lies on the devices in parts is gathered once, and its gradient
scattered once, however many blocks there are.
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
    """Of a tree, one value per example or their sum, and more of each example.

    Args:
        compute: The same, of what one device holds.
        spread: How the batch lies.
        tree: A pytree whose classes lie as they should.
        axes: Where each leaf has its batch axes.
        summed: Whether it is one number.
    """
    leaves, treedef = jax.tree.flatten(tree)
    specs = [_spec(spread, x, of) for x, of in zip(leaves, axes, strict=True)]
    mesh, rows = spread.sharding.mesh, spread.rows
    names = tuple(name for of in rows for name in as_names(of))

    def on_one(*leaves: Array) -> tuple[Array, Tree]:
        own = [
            x if of else _gathered(x, spec, names)
            for x, spec, of in zip(leaves, specs, axes, strict=True)
        ]
        value, more = compute(treedef.unflatten(own))
        if summed and names:
            value = lax.psum(meshes.vary(value, names), names)
        return value, more

    batch = PartitionSpec(*rows)
    laid = [
        meshes.spread(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs, strict=True)
    ]
    # Beside axes that the compiler manages the explicit ones are named; all there are need not be,
    # of which `vmap` may have taken one.
    some = meshes.explicit_axes(mesh)
    run = jax.shard_map(
        on_one,
        mesh=mesh,
        axis_names=set() if some == set(mesh.axis_names) else some,
        in_specs=tuple(specs),
        out_specs=(PartitionSpec() if summed else batch, batch),
    )
    return run(*laid)


def _spec(spread: Spread, x: Array, axes: Axes) -> PartitionSpec:
    """How a leaf is handed to the devices: batch axes as the batch lies, others as they do.

    Only an example's own features are whole on its device.
    """
    kept = set(as_names(spread.classes))
    if axes is None:
        kept |= {name for of in spread.rows for name in as_names(of)}
    names: list[Names] = [n if set(as_names(n)) <= kept else None for n in meshes.spec(x)]
    for axis, row in zip(axes or (), spread.rows, strict=False):
        names[axis] = None if x.shape[axis] == 1 else row
    return PartitionSpec(*names)


def _gathered(x: Array, spec: PartitionSpec, names: tuple[str, ...]) -> Array:
    for axis, name in enumerate(spec):
        if set(as_names(name)) & set(names):
            x = lax.all_gather(x, name, axis=axis, tiled=True)
    return x
