"""Terms that capture values: kept out of jit's cache, and their captured arrays made arguments."""

from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kljax._engine.blocks import block_shapes
from kljax._engine.blockwise import with_logits
from kljax._engine.classes import Layout
from kljax._engine.formula import Loss
from kljax._engine.paths import Path

_JITTED = type(jax.jit(lambda: None))


def is_pure(value: Any, above: tuple[Any, ...] = ()) -> bool:
    """Whether a function captures nothing but other such functions.

    Only then may jit cache what it computes: what a function captures can change between two
    calls, or be traced by a transform that has ended.
    """
    if any(value is one for one in above):
        return isinstance(value, FunctionType | partial | tuple)
    inside = (*above, value)
    match value:
        case None | str() | BuiltinFunctionType() | ModuleType() | type():
            return True
        case FunctionType():
            bound = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            cells = (_content(cell) for cell in value.__closure__ or ())
        case partial():
            bound, cells = (*value.args, *value.keywords.values()), (value.func,)
        case tuple():
            bound, cells = (), value
        case jax.custom_jvp() | jax.custom_vjp() | _JITTED():
            bound, cells = (), (getattr(value, "__wrapped__", value),)
        case _:  # it may hold a state
            return False
    # A bound number stays what it is; a variable may be another number at the next call.
    return all(isinstance(one, int | float) or is_pure(one, inside) for one in bound) and all(
        is_pure(one, inside) for one in cells
    )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is bound later
        return cell


def hoist(loss: Loss, layout: Layout, path: Path) -> Loss:
    """Make arguments of the arrays that a term captured, so that they get their gradients.

    A block has its own shape, and its own trace of the term: all are made here, while what the
    term captures can still be read.
    """
    term = loss.formula.term
    whole = jax.eval_shape(_arguments, loss)
    traces = {}
    full = jnp.shape(whole[1])
    shapes = (shape for cut in path.cuts for shape in block_shapes(cut, full, layout.batch_axes))
    for shape in {full, *shapes}:
        cut = lambda x, shape=shape: (  # noqa: E731  (the whole as it is, for its sharding)
            x if x.shape == shape else _of_shape(shape, x)
        )
        traces[shape] = _trace(term, *jax.tree.map(cut, whole[:2]), whole[2])

    def traced(
        log_probs: tuple[Array, ...], log_ratio: Array, params: tuple[Any, tuple[Any, ...]]
    ) -> Array:
        own, captured = params
        jaxpr, out = traces[log_ratio.shape]
        leaves = jax.tree.leaves((log_probs, log_ratio, own))
        return jax.tree.unflatten(
            jax.tree.structure(out), jax.core.eval_jaxpr(jaxpr.jaxpr, captured, *leaves)
        )

    params = (loss.params, traces[full][0].consts)
    formula = loss.formula._replace(term=traced, cached=False)
    return replace(loss, formula=formula, params=params)


def _of_shape(shape: tuple[int, ...], like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Of another shape, varying over the same mesh axes."""
    kept = {"sharding": like.sharding, "manual_axis_type": like.manual_axis_type}
    return jax.ShapeDtypeStruct(shape, like.dtype, **kept)


def _arguments(loss: Loss) -> tuple[Any, ...]:
    loss = with_logits(loss).on_few_classes()
    seen = loss.view()
    return seen.log_probs, seen.log_ratio, loss.params


def _trace(term: Any, *arguments: Any) -> Any:
    fresh = lambda *arguments: term(*arguments)  # noqa: E731  (traces are cached by function)
    return jax.make_jaxpr(fresh, return_shape=True)(*arguments)
