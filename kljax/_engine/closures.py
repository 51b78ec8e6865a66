"""Traced values that a user's term closes over, made arguments so that they get gradients."""

import numbers
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer

from kljax._engine.representation import Term


def hoist(
    term: Term, sides: int, shape: tuple[int, ...], dtype: Any, params: tuple[Any, ...]
) -> tuple[Term, tuple[Any, ...]]:
    """The term with its captured tracers appended to its parameters."""
    if not _may_hide_tracer(term):
        return term, params
    like = jax.ShapeDtypeStruct(shape, dtype)
    converted, captured = jax.closure_convert(term, (like,) * sides, like, params)
    if not captured:
        return term, params

    def closed(log_probs: tuple[Array, ...], log_ratio: Array, params: tuple[Any, ...]) -> Array:
        return converted(log_probs, log_ratio, params[0], *params[1])

    return closed, (params, tuple(captured))


def _may_hide_tracer(value: Any) -> bool:
    match value:
        case Tracer():
            return True
        case None | str() | numbers.Number() | np.ndarray() | Array() | types.ModuleType() | type():
            return False
        case types.FunctionType():
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return any(map(_may_hide_tracer, [*cells, *(value.__defaults__ or ())]))
        case partial():
            return any(map(_may_hide_tracer, [value.func, *value.args, *value.keywords.values()]))
        case tuple() | list():
            return any(map(_may_hide_tracer, value))
        case Callable():  # compiled functions hold no closure that they did not hoist themselves
            return not isinstance(value, types.BuiltinFunctionType)
        case _:
            return True
