"""A choice among ways to compute the same, made when the program is lowered.

Then the platform is known, and on how many devices the program runs. What is not chosen is never
traced.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax import Array, lax
from jax.interpreters import batching, mlir

from kljax._engine import meshes, primitives

Tree = Any
Choose = Callable[[str, int], Callable[..., Tree]]  # (platform, number of devices)

_KNOWN = ("cpu", "tpu", "cuda")  # of any other platform we know as much as of the last


def choose(choose: Choose, like: Tree, *args: Array) -> Tree:
    """Compute what is chosen; no named axis need be in scope for it.

    Args:
        choose: Of a platform and a number of devices, the function.
        like: Of the shapes and dtypes of the result.
        *args: What the function is applied to.
    """
    leaves, tree = jax.tree.flatten(like)
    avals = tuple(jax.typeof(leaf) for leaf in leaves)
    return tree.unflatten(_primitive().bind(*args, choose=choose, avals=avals))


def by_platform(like: Tree, *args: Tree, default: Callable[..., Tree], **ways: Any) -> Tree:
    """The platform's way: `lax.platform_dependent`, which traces them all, only where it must be.

    That is where arrays are mapped by hand or on explicit meshes. It has no derivative.
    """
    leaves, tree = jax.tree.flatten(args)
    if meshes.varying(leaves) or meshes.explicit(leaves):
        return lax.platform_dependent(*args, default=default, **ways)

    def on(platform: str, devices: int) -> Callable[..., Tree]:
        return lambda *leaves: ways.get(platform, default)(*jax.tree.unflatten(tree, leaves))

    return choose(on, like, *leaves)


@cache
def _primitive() -> Any:
    primitive = primitives.of_many_results("kljax_choice")
    primitive.def_impl(lambda *args, choose, avals: _on_any(_KNOWN, choose, 1)(*args))
    primitive.def_abstract_eval(lambda *_, choose, avals: list(avals))
    mlir.register_lowering(primitive, _lower)
    batching.primitive_batchers[primitive] = _batch
    return primitive


def _on_any(platforms: Any, choose: Choose, devices: int) -> Callable[..., list[Array]]:
    def compute(*args: Array) -> list[Array]:
        if len(platforms) == 1:
            return jax.tree.leaves(choose(platforms[0], devices)(*args))
        *first, last = platforms
        branches = {platform: choose(platform, devices) for platform in first}
        return jax.tree.leaves(
            lax.platform_dependent(*args, default=choose(last, devices), **branches)
        )

    return compute


def _lower(ctx: Any, *args: Any, choose: Choose, avals: Any) -> Any:
    devices = getattr(ctx.module_context.axis_context, "num_devices", None) or 1
    rule = mlir.lower_fun(_on_any(_platforms(ctx), choose, devices), multiple_results=True)
    return rule(ctx, *args)


def _platforms(ctx: Any) -> tuple[str, ...]:
    return tuple(ctx.platforms or ctx.module_context.platforms)


def _batch(args: Any, dims: Any, *, choose: Choose, avals: Any) -> Any:
    def mapped(platform: str, devices: int) -> Callable[..., list[Array]]:
        compute = choose(platform, devices)
        return jax.vmap(lambda *args: jax.tree.leaves(compute(*args)), in_axes=tuple(dims))

    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    wider = tuple(aval.update(shape=(size, *aval.shape)) for aval in avals)
    return _primitive().bind(*args, choose=mapped, avals=wider), [0] * len(avals)
