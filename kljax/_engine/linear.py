"""A linear map that brings its own transpose, and derivatives in what it depends on.

`jax.linear_transpose` of a loop over blocks would store every block's intermediates, or add up
whole arrays block by block. A map that says how to transpose itself needs neither. JAX's own
`linear_call` cannot be differentiated in its residuals, which second derivatives need.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import ad, batching, mlir

from kljax._engine import primitives

Tree = Any


class Map(NamedTuple):
    """The map y = A(residuals) x, as functions of (residuals, x) and (residuals, y)."""

    apply: Callable[[Tree, Tree], Tree]
    transpose: Callable[[Tree, Tree], Tree]
    plain: "Map | None" = None  # the same map in a form to differentiate in the residuals

    @property
    def transposed(self) -> "Map":
        return Map(self.transpose, self.apply, self.plain and self.plain.transposed)


def call(linear: Map, residuals: Tree, x: Tree, like: Tree | None = None) -> Tree:
    """Apply the map to x; reverse mode will use its transpose.

    Args:
        linear: The map.
        residuals: What it depends on.
        x: What it is applied to.
        like: Arrays of the shapes of the result. With them the map is not traced unless it is
            lowered, as in reverse mode it never is; without them it is traced here, where named
            axes are in scope.
    """
    leaves, tree = jax.tree.flatten((residuals, x))
    jaxpr = None
    if like is None:
        apply = lambda *args: linear.apply(*args)  # noqa: E731  (traces are cached by function)
        jaxpr, like = jax.make_jaxpr(apply, return_shape=True)(residuals, x)
        avals = jaxpr.out_avals
    else:
        avals = [jax.typeof(leaf) for leaf in jax.tree.leaves(like)]
    outs = _primitive().bind(
        *leaves,
        linear=linear,
        tree=tree,
        out_tree=jax.tree.structure(like),
        avals=tuple(avals),
        jaxpr=jaxpr,
        linear_leaves=len(jax.tree.leaves(x)),
    )
    return jax.tree.unflatten(jax.tree.structure(like), outs)


@cache
def _primitive() -> Any:
    primitive = primitives.of_many_results("kljax_linear")
    primitive.def_impl(_impl)
    primitive.def_abstract_eval(lambda *_, avals, **__: list(avals))
    mlir.register_lowering(primitive, mlir.lower_fun(_impl, multiple_results=True))
    ad.primitive_jvps[primitive] = _jvp
    ad.primitive_transposes[primitive] = _transpose
    batching.primitive_batchers[primitive] = _batch
    return primitive


def _impl(*leaves: Array, linear: Map, tree: Any, jaxpr: Any, **_: Any) -> list[Array]:
    if jaxpr is None:
        return jax.tree.leaves(linear.apply(*jax.tree.unflatten(tree, leaves)))
    return jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *leaves)


def _jvp(
    primals, tangents, *, linear: Map, tree: Any, linear_leaves: int, avals: Any, jaxpr: Any, **kept
):
    split = len(primals) - linear_leaves
    residuals, x = jax.tree.unflatten(tree, primals)
    like = None if jaxpr else jax.tree.unflatten(kept["out_tree"], map(_struct, avals))
    out = jax.tree.leaves(call(linear, residuals, x, like))
    parts = []
    if not all(type(dot) is ad.Zero for dot in tangents[split:]):
        x_dot = map(ad.instantiate_zeros, tangents[split:])
        x_dot = jax.tree.unflatten(jax.tree.structure(x), list(x_dot))
        parts.append(jax.tree.leaves(call(linear, residuals, x_dot, like)))
    moving = [i for i, dot in enumerate(tangents[:split]) if type(dot) is not ad.Zero]
    if moving:

        def along(moved: list[Array]) -> list[Array]:
            leaves = list(primals)
            for i, leaf in zip(moving, moved, strict=True):
                leaves[i] = leaf
            plain = linear.plain or linear
            return jax.tree.leaves(plain.apply(*jax.tree.unflatten(tree, leaves)))

        steps = [tangents[i] for i in moving]
        parts.append(jax.jvp(along, ([primals[i] for i in moving],), (steps,))[1])
    return out, [sum(dots) for dots in zip(*parts, strict=True)]


def _transpose(
    cts, *leaves: Any, linear: Map, tree: Any, out_tree: Any, linear_leaves: int, jaxpr: Any, **_
):
    split = len(leaves) - linear_leaves
    known = [None if ad.is_undefined_primal(leaf) else leaf for leaf in leaves]
    residual_tree, x_tree = tree.children()
    residuals = jax.tree.unflatten(residual_tree, known[:split])
    y = [ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cts]
    wanted = [ad.is_undefined_primal(leaf) for leaf in leaves[split:]]
    avals = [
        leaf.aval if want else jax.typeof(leaf)
        for leaf, want in zip(leaves[split:], wanted, strict=True)
    ]
    like = None if jaxpr else jax.tree.unflatten(x_tree, map(_struct, avals))
    x = call(linear.transposed, residuals, jax.tree.unflatten(out_tree, y), like)
    cts = zip(jax.tree.leaves(x), wanted, strict=True)
    return [None] * split + [ct if want else None for ct, want in cts]


def _struct(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _batch(leaves, dims, *, linear: Map, tree: Any, linear_leaves: int, **_: Any):
    size = next(x.shape[dim] for x, dim in zip(leaves, dims, strict=True) if dim is not None)
    split = len(leaves) - linear_leaves
    # What is mapped on one side of the map is mapped on the other, so that it can be transposed.
    x = [
        jnp.broadcast_to(leaf, (size, *leaf.shape)) if dim is None else jnp.moveaxis(leaf, dim, 0)
        for leaf, dim in zip(leaves[split:], dims[split:], strict=True)
    ]
    residual_tree, x_tree = tree.children()
    residuals = jax.tree.unflatten(residual_tree, leaves[:split])
    out = call(_mapped(linear, dims[:split], residual_tree), residuals, x_tree.unflatten(x))
    outs = jax.tree.leaves(out)
    return outs, [0] * len(outs)


def _mapped(linear: Map, dims: tuple[int | None, ...], tree: Any) -> Map:
    """The map over one more, leading axis of x and y."""

    def over(function: Callable[[Tree, Tree], Tree]) -> Callable[[Tree, Tree], Tree]:
        def mapped(residuals: Tree, x: Tree) -> Tree:
            flat = lambda leaves, x: function(tree.unflatten(leaves), x)  # noqa: E731
            return jax.vmap(flat, in_axes=(list(dims), 0))(tree.flatten_up_to(residuals), x)

        return mapped

    plain = linear.plain and _mapped(linear.plain, dims, tree)
    return Map(over(linear.apply), over(linear.transpose), plain)
