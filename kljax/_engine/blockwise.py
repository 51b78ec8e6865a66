"""Any loss that is a sum over examples, block by block, with its derivatives.

In reverse mode the sum's gradient is made together with its value, while a block is at hand; of
one value per example, or to float16, it is made once the cotangents are known, block by block.
In forward mode the tangents go through the blocks. No array of the size of the logits is ever
stored but the gradient itself.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from kljax._engine import devices, linear, lowering
from kljax._engine.blocks import Blocks, aligned, rescale, sweep, times, whole, widened
from kljax._engine.classes import Axes
from kljax._engine.meshes import vary, varying
from kljax._engine.paths import Path
from kljax._engine.side import Classed

Tree = Any
Leaves = list[Array]
Rows = tuple[Array, tuple[Array, ...]]  # one value per example, and more to look at


class Run(NamedTuple):
    """A loss per example, and how its batch is cut."""

    each: Callable[[Tree], Rows]  # of a block, the logits of its sides at hand
    path: Path
    tree: Any
    axes: tuple[Axes, ...]  # of each leaf

    @property
    def batch(self) -> tuple[int, ...]:
        return self.path.batch


def values(each: Callable[[Tree], Rows], path: Path, tree: Tree, axes: tuple[Axes, ...]) -> Rows:
    """One value per example.

    Args:
        each: Of the tree, or a block of it whose sides' logits are at hand, the value of each
            example, and more to look at.
        path: How to cut it.
        tree: A pytree of sides and other arrays.
        axes: Where each leaf has its batch axes.
    """
    if path.per_device:
        return _on_each_device(values, each, path, tree, axes, summed=False)
    tree = _varying_alike(tree, path.names)
    if path.whole:
        return _watched(each(with_logits(tree)))
    return _values(*_run(each, path, tree, axes))


def total(each: Callable[[Tree], Rows], path: Path, tree: Tree, axes: tuple[Axes, ...]) -> Rows:
    """The sum over all examples."""
    if path.per_device:
        return _on_each_device(total, each, path, tree, axes, summed=True)
    tree = _varying_alike(tree, path.names)
    if path.whole:
        value, seen = _watched(each(with_logits(tree)))
        return jnp.sum(value), seen
    return _total(*_run(each, path, tree, axes))


def with_logits(tree: Tree) -> Tree:
    """The same with every side's logits at hand."""
    return jax.tree.map(lambda x: x.project()[0] if _is_side(x) else x, tree, is_leaf=_is_side)


def _on_each_device(
    compute: Callable[..., Rows],
    each: Callable[[Tree], Rows],
    path: Path,
    tree: Tree,
    axes: tuple[Axes, ...],
    *,
    summed: bool,
) -> Rows:
    assert path.per_device is not None
    own = lambda tree: compute(each, path._replace(per_device=None, on_one=True), tree, axes)  # noqa: E731
    return devices.on_each(own, path.per_device, tree, axes, summed=summed)


def _varying_alike(tree: Tree, names: tuple[str, ...]) -> Tree:
    """Inside `shard_map`, all leaves known to vary over the mesh axes that any of them does.

    Over those of the classes, by `names`, only a head's parts are: of what its shards share each
    makes a part of the gradient. So JAX adds up the parts, once.
    """
    leaves, treedef = jax.tree.flatten(tree)
    tree = treedef.unflatten(aligned(leaves, names))

    def of_head(x: Any) -> Any:
        if not (_is_side(x) and x.has_kernel):
            return x
        own = set(names) & set(varying(jax.tree.leaves(x)))
        return jax.tree.map(lambda leaf: vary(leaf, own), x)

    return jax.tree.map(of_head, tree, is_leaf=_is_side) if names else tree


def _run(
    each: Callable[[Tree], Rows], path: Path, tree: Tree, axes: tuple[Axes, ...]
) -> tuple[Run, Leaves]:
    leaves, treedef = jax.tree.flatten(tree)
    return Run(each, path, treedef, axes), leaves


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _values(run: Run, leaves: Leaves) -> Rows:
    def compute(blocks: Blocks, *leaves: Array) -> list[Array]:
        def body(block: Leaves) -> tuple[Leaves, Leaves]:
            each, seen = _evaluate(run, block)
            return [], [each, *seen]

        return sweep(blocks, leaves, run.axes, body, _per_example(run, leaves))[1]

    def like() -> list[Any]:
        each, seen = _evaluated(run, leaves)
        return [each, *seen]

    each, *seen = _where_it_runs(run, compute, leaves, like)
    return each, tuple(seen)


@partial(_values.defjvp, symbolic_zeros=True)
def _values_jvp(run: Run, primals: tuple[Leaves], tangents: tuple[list[Any]]) -> tuple[Rows, Rows]:
    (leaves,), (dots,) = primals, tangents
    moving = _moving(dots)
    each, seen = _values(run, leaves)
    like = _unless_named(run, leaves, each)
    each_dot = linear.call(_along_values(run, moving), leaves, [dots[i] for i in moving], like)
    return (each, seen), (each_dot, tuple(map(jnp.zeros_like, seen)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _total(run: Run, leaves: Leaves) -> Rows:
    def compute(blocks: Blocks, *leaves: Array) -> list[Array]:
        def body(block: Leaves) -> tuple[Leaves, Leaves]:
            each, seen = _evaluate(run, block)
            return [jnp.sum(each)], list(seen)

        sums, rows = sweep(blocks, leaves, run.axes, body, _per_example(run, leaves)[1:])
        return [*sums, *rows]

    def like() -> list[Any]:
        each, seen = _evaluated(run, leaves)
        return [jax.ShapeDtypeStruct((), each.dtype), *seen]

    value, *seen = _where_it_runs(run, compute, leaves, like)
    return value, tuple(seen)


@partial(_total.defjvp, symbolic_zeros=True)
def _total_jvp(run: Run, primals: tuple[Leaves], tangents: tuple[list[Any]]) -> tuple[Rows, Rows]:
    (leaves,), (dots,) = primals, tangents
    moving = _moving(dots)
    steps = [dots[i] for i in moving]
    if any(x.dtype == jnp.float16 for x in steps):
        # Its gradient must know the cotangent, a loss scale, before it is rounded to so few bits.
        value, seen = _total(run, leaves)
        like = _unless_named(run, leaves, jax.ShapeDtypeStruct(run.batch, value.dtype))
        value_dot = jnp.sum(linear.call(_along_values(run, moving), leaves, steps, like))
        return (value, seen), (value_dot, tuple(map(jnp.zeros_like, seen)))
    value, seen, gradient = _total_with_gradient(run, moving, leaves)
    like = _unless_named(run, leaves, value)
    value_dot = linear.call(_along_total(run, moving), (leaves, gradient), steps, like)
    return (value, seen), (value_dot, tuple(map(jnp.zeros_like, seen)))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _total_with_gradient(
    run: Run, moving: tuple[int, ...], leaves: Leaves
) -> tuple[Array, tuple[Array, ...], Leaves]:
    def compute(blocks: Blocks, *leaves: Array) -> tuple[Array, Leaves, Leaves]:
        return _pull(run, blocks, moving, leaves, None)

    def like() -> tuple[Any, Any, Any]:
        each, seen = _evaluated(run, leaves)
        value = jax.ShapeDtypeStruct((), each.dtype)
        return value, list(seen), [_struct(leaves[i]) for i in moving]

    value, seen, gradient = _where_it_runs(run, compute, leaves, like)
    return value, tuple(seen), gradient


@partial(_total_with_gradient.defjvp, symbolic_zeros=True)
def _total_with_gradient_jvp(run, moving, primals, tangents):
    (leaves,), (dots,) = primals, tangents
    out = _total_with_gradient(run, moving, leaves)
    again = _moving(dots)
    total = lambda moved: _total(run, _replace(leaves, again, moved))[0]  # noqa: E731
    value_dot = jax.jvp(total, ([leaves[i] for i in again],), ([dots[i] for i in again],))[1]
    # The gradient's own derivative is taken where it is used, in `linear.Map.plain`.
    return out, (value_dot, *jax.tree.map(jnp.zeros_like, out[1:]))


def _along_total(run: Run, moving: tuple[int, ...]) -> linear.Map:
    """The derivative of the total: from steps of the moving leaves, and back."""

    def apply(residuals: tuple[Leaves, Leaves], steps: Leaves) -> Array:
        push = lambda blocks, *args: _push(run, blocks, moving, args, sum_up=True)  # noqa: E731
        return _where_it_runs(run, push, [*residuals[0], *steps])

    def transpose(residuals: tuple[Leaves, Leaves], ct: Array) -> Leaves:
        leaves, gradient = residuals
        rows = [_is_row(run, leaves, i) for i in moving]

        def compute(blocks: Blocks, ct: Array, *gradient: Array) -> Leaves:
            return [
                rescale(blocks, run.axes[i], g, ct) if row else times(ct, g)
                for i, g, row in zip(moving, gradient, rows, strict=True)
            ]

        return _where_it_runs(run, compute, [ct, *gradient], lambda: list(gradient))

    def plain_apply(residuals: tuple[Leaves, Leaves], steps: Leaves) -> Array:
        return _push(run, whole(run.batch), moving, [*residuals[0], *steps], sum_up=True)

    def plain_transpose(residuals: tuple[Leaves, Leaves], ct: Array) -> Leaves:
        return _pull(run, whole(run.batch), moving, residuals[0], jnp.broadcast_to(ct, run.batch))[
            2
        ]

    return linear.Map(apply, transpose, linear.Map(plain_apply, plain_transpose))


def _along_values(run: Run, moving: tuple[int, ...]) -> linear.Map:
    """The derivative of the values: from steps of the moving leaves, and back."""

    def apply(leaves: Leaves, steps: Leaves) -> Array:
        push = lambda blocks, *args: _push(run, blocks, moving, args)  # noqa: E731
        return _where_it_runs(run, push, [*leaves, *steps])

    def transpose(leaves: Leaves, cts: Array) -> Leaves:
        pull = lambda blocks, cts, *leaves: _pull(run, blocks, moving, leaves, cts)[2]  # noqa: E731
        like = lambda: [_struct(leaves[i]) for i in moving]  # noqa: E731
        return _where_it_runs(run, pull, [cts, *leaves], like)

    plain = linear.Map(
        lambda leaves, steps: _push(run, whole(run.batch), moving, [*leaves, *steps]),
        lambda leaves, cts: _pull(run, whole(run.batch), moving, leaves, cts)[2],
    )
    return linear.Map(apply, transpose, plain)


def _pull(
    run: Run, blocks: Blocks, moving: tuple[int, ...], leaves: Any, cts: Array | None
) -> tuple[Array, Leaves, Leaves]:
    """The total, what there is to look at, and the gradient along cts, or along ones."""
    example = tuple(range(len(run.batch)))
    row = [_is_row(run, leaves, i) for i in moving]
    given, axes = ([], []) if cts is None else ([cts], [example])

    def body(block: Leaves) -> tuple[Leaves, Leaves]:
        ct, block = (None, block) if cts is None else (block[0], block[1:])
        each, seen, gradient = _gradient(run, moving, block, ct)
        shared = [widened(g) for g, is_row in zip(gradient, row, strict=True) if not is_row]
        rows = [
            g.astype(block[i].dtype)
            for i, g, is_row in zip(moving, gradient, row, strict=True)
            if is_row
        ]
        return [jnp.sum(each), *shared], [*seen, *rows]

    seen_axes = _per_example(run, leaves)[1:]
    out_axes = [*seen_axes, *(run.axes[i] for i, is_row in zip(moving, row, strict=True) if is_row)]
    sums, rows = sweep(blocks, [*given, *leaves], [*axes, *run.axes], body, out_axes)
    (value, *shared), seen, rows = sums, rows[: len(seen_axes)], iter(rows[len(seen_axes) :])
    shared = iter(shared)
    gradient = [
        next(rows) if is_row else next(shared).astype(leaves[i].dtype)
        for i, is_row in zip(moving, row, strict=True)
    ]
    return value, seen, gradient


def _push(
    run: Run, blocks: Blocks, moving: tuple[int, ...], args: Any, *, sum_up: bool = False
) -> Array:
    """The values' tangent along steps of the moving leaves."""
    count = len(run.axes)

    def body(block: Leaves) -> tuple[Leaves, Leaves]:
        leaves, steps = block[:count], block[count:]
        each = lambda moved: _evaluate(run, _replace(leaves, moving, moved))[0]  # noqa: E731
        dot = jax.jvp(each, ([leaves[i] for i in moving],), (steps,))[1]
        return ([jnp.sum(dot)], []) if sum_up else ([], [dot])

    axes = [*run.axes, *(run.axes[i] for i in moving)]
    out_axes = [] if sum_up else [tuple(range(len(run.batch)))]
    sums, rows = sweep(blocks, args, axes, body, out_axes)
    return (sums if sum_up else rows)[0]


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _gradient(
    run: Run, moving: tuple[int, ...], block: Leaves, cts: Array | None
) -> tuple[Array, tuple[Array, ...], Leaves]:
    """Of one block: values, what there is to look at, and the gradient to the moving leaves.

    From logits that were made here it goes by hand, for the sums over blocks to be of float32.
    """
    tree, moving, pullbacks = _with_pullbacks(jax.tree.unflatten(run.tree, block), moving)
    leaves, treedef = jax.tree.flatten(tree)

    def each(moved: Leaves) -> Rows:
        return run.each(jax.tree.unflatten(treedef, _replace(leaves, moving, moved)))

    value, pull, seen = jax.vjp(each, [leaves[i] for i in moving], has_aux=True)
    (gradient,) = pull(jnp.ones_like(value) if cts is None else cts.astype(value.dtype))
    gradient = [x for back, ct in zip(pullbacks, gradient, strict=True) for x in back(ct)]
    return value, jax.tree.map(lax.stop_gradient, seen), gradient


def _with_pullbacks(
    tree: Tree, moving: tuple[int, ...]
) -> tuple[Tree, tuple[int, ...], list[Callable[[Array], Leaves]]]:
    """`with_logits`; its moving leaves, and from each of them the way back to the tree's own."""
    items, treedef = jax.tree.flatten(tree, is_leaf=_is_side)
    before, after, now_moving, pullbacks = 0, 0, [], []
    for place, item in enumerate(items):
        count, pull = len(jax.tree.leaves(item)), None
        own = [i - before for i in moving if before <= i < before + count]
        if _is_side(item):
            items[place], pull = item.project()
        if own and pull:
            now_moving.append(after)
            pullbacks.append(partial(pull, own))
        else:
            now_moving += [after + i for i in own]
            pullbacks += [lambda ct: [ct]] * len(own)
        before += count
        after += len(jax.tree.leaves(items[place]))
    return jax.tree.unflatten(treedef, items), tuple(now_moving), pullbacks


def _is_side(x: Any) -> bool:
    return isinstance(x, Classed)


@partial(jax.jit, static_argnums=0, inline=True)
def _evaluate(run: Run, leaves: Any) -> Rows:
    return _watched(run.each(with_logits(jax.tree.unflatten(run.tree, leaves))))


def _watched(rows: Rows) -> Rows:
    """What is there to look at has no gradient."""
    return rows[0], jax.tree.map(lax.stop_gradient, rows[1])


def _where_it_runs(
    run: Run, compute: Callable[..., Tree], args: Any, like: Callable[[], Tree] | None = None
) -> Tree:
    """Choose the blocks when the program is lowered: then platform and devices are known.

    Args:
        like: Tells the shapes and dtypes of the result, where they are known without a trace.
    """
    path = run.path
    if path.whole:
        return compute(path.cpu, *args)

    def on(platform: str, devices: int) -> Callable[..., Tree]:
        cut = path.on(platform, devices)
        cut = cut._replace(neighbours=devices == 1, cut_once=platform == "cpu")
        return partial(compute, cut)

    if path.on_one or path.names or varying(args):  # what is mapped by hand is on one device
        platforms = {name: on(name, 1) for name in ("cpu", "tpu")}
        return lax.platform_dependent(*args, default=on("cuda", 1), **platforms)
    if like is not None:
        return lowering.choose(on, like(), *args)
    # As one block all shapes are the same, and there is no loop to trace.
    return lowering.choose(on, jax.eval_shape(partial(compute, whole(run.batch)), *args), *args)


def _evaluated(run: Run, leaves: Any) -> Any:
    """The shapes of the values, and of what there is to look at."""
    return jax.eval_shape(partial(_evaluate, run), list(leaves))


def _struct(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _per_example(run: Run, leaves: Any) -> list[Axes]:
    """Where the batch axes are in the values, and in each array there is to look at."""
    _, seen = _evaluated(run, leaves)
    return [tuple(range(len(run.batch)))] * (1 + len(seen))


def _unless_named(run: Run, leaves: Leaves, like: Any) -> Any:
    """What the derivative is like, where no named axes need be in scope to trace it."""
    return None if run.path.on_one or run.path.names or varying(leaves) else like


def _is_row(run: Run, leaves: Any, i: int) -> bool:
    """Whether a leaf holds something of each example, rather than something all share."""
    axes, shape = run.axes[i], leaves[i].shape
    return axes is not None and tuple(shape[axis] for axis in axes) == run.batch


def _replace(leaves: Any, places: tuple[int, ...], new: Leaves) -> Leaves:
    out = list(leaves)
    for i, leaf in zip(places, new, strict=True):
        out[i] = leaf
    return out


def _moving(dots: list[Any]) -> tuple[int, ...]:
    """The leaves whose tangents are really there: nothing is computed for the others."""
    return tuple(
        i
        for i, dot in enumerate(dots)
        if not isinstance(dot, SymbolicZero) and dot.dtype != jax.dtypes.float0
    )
