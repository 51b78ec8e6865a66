"""Terms that capture values: kept out of jit's cache, and their captured arrays made arguments."""

from functools import partial
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any

import jax
from jax import Array

from kljax._engine.representation import Operands, Spec, view


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
        case _:  # jit and custom_jvp leave the function behind; anything else may hold a state
            bound, cells = (), (getattr(value, "__wrapped__", value),)
    # A bound number stays what it is; a variable may be another number at the next call.
    return all(isinstance(one, int | float) or is_pure(one, inside) for one in bound) and all(
        is_pure(one, inside) for one in cells
    )


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is bound later
        return cell


def hoist(spec: Spec, operands: Operands) -> tuple[Spec, Operands]:
    """Make arguments of the arrays that a term captured, so that they get their gradients."""
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun  # here, for it loads Pallas

    seen = view(spec, operands)
    arguments = (seen.log_probs, seen.log_ratio, operands.params)
    fresh = lambda *arguments: spec.term(*arguments)  # noqa: E731  (traces are cached by function)
    closed, out = jax.make_jaxpr(fresh, return_shape=True)(*arguments)
    tree = jax.tree.structure(out)

    def term(
        log_probs: tuple[Array, ...], log_ratio: Array, params: tuple[Any, tuple[Any, ...]]
    ) -> Array:
        own, captured = params
        function = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, captured))
        return jax.tree.unflatten(tree, function(*jax.tree.leaves((log_probs, log_ratio, own))))

    return spec._replace(term=term), operands._replace(params=(operands.params, closed.consts))
