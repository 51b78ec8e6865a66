"""What other systems ask of their arguments: the only place in `compat` that raises on input."""

import numbers
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from kljax._engine.checks import fail, message_of, require_axes, require_type
from kljax._engine.classes import Shape


def require_array(caller: str, argument: str, value: Any, *, scalars: bool = False) -> None:
    """An array, as jax.numpy's own functions ask for: no list, and a number only if allowed."""
    kinds = (Array, np.ndarray, np.generic) + ((bool, numbers.Number) if scalars else ())
    if not isinstance(value, kinds):
        got = type(value).__name__
        message = message_of(caller, argument, "an array of JAX or NumPy", got, "Use jnp.asarray.")
        raise TypeError(message)


def require_wide_float(caller: str, argument: str, x: Array) -> None:
    """Floating point of at least 16 bits."""
    remedy = "Convert with .astype(jnp.float32)."
    expected = "floating point of at least 16 bits"
    if not (jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1):
        raise TypeError(message_of(caller, argument, expected, str(x.dtype), remedy))


def require_integer(caller: str, argument: str, x: Array) -> None:
    require_type(x, int, caller, argument, "integers", "Convert with .astype(int).")


def require_bool(caller: str, argument: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        got = f"{value!r} of type {type(value).__name__}"
        raise TypeError(message_of(caller, argument, "bool", got, "Pass True or False."))


def require_broadcastable(
    caller: str, shapes: dict[str, Shape], error: type[Exception] = ValueError
) -> None:
    """For the systems that broadcast; each has its own kind of error."""
    try:
        jnp.broadcast_shapes(*shapes.values())
    except ValueError:
        *others, last = shapes
        against = " and ".join(f"{shapes[other]}" for other in others)
        expected, got = f"of a shape that broadcasts with {against}", f"{shapes[last]}"
        raise error(message_of(caller, last, expected, got, "Reshape one of them.")) from None


def require_axis(caller: str, shape: Shape, axis: int | Iterable[int] | None) -> tuple[int, ...]:
    """Axes to sum over; None is all of them."""
    return tuple(range(len(shape))) if axis is None else require_axes(caller, shape, axis)


def require_mask(caller: str, where: Array, shape: Shape) -> None:
    """A mask that may broadcast to the shape, unlike `require_where`'s."""
    if where.dtype != bool:
        fail(caller, "where", "bool", str(where.dtype), "Write `where > 0`.")
    try:
        fits = jnp.broadcast_shapes(where.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        expected = f"of a shape that broadcasts to {shape}"
        fail(caller, "where", expected, f"{where.shape}", "Give it the axes of the whole input.")


def require_real(caller: str, argument: str, x: Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        fail(caller, argument, "real", str(x.dtype), "Take its real part or its absolute value.")


def require_same_matrices(caller: str, shapes: dict[str, Shape]) -> None:
    """Two axes, rows and classes, the same on every side."""
    first, *_ = shapes.values()
    for argument, shape in shapes.items():
        if shape != first:
            fail(caller, argument, f"shape {first}, like the other", f"{shape}", "None broadcasts.")
        if len(shape) != 2:
            remedy = "Flatten the batch axes into one."
            fail(caller, argument, "shape (rows, classes)", f"{shape}", remedy)


def require_samples(caller: str, samples: list[Array]) -> None:
    if not samples:
        remedy = "Call update first; only sums and means of nothing exist."
        fail(caller, "reduction", '"mean" or "sum" before any update', '"none"', remedy)


def require_same_metric(caller: str, value: Any, kind: type, option: str, own: Any) -> None:
    """Another metric whose state means the same."""
    if not isinstance(value, kind):
        got = f"a {type(value).__name__}"
        fail(caller, "incoming_state", f"a {kind.__name__}", got, "Merge metrics of one class.")
    if getattr(value, option) != own:
        expected, got = f"one with {option}={own!r}", f"{option}={getattr(value, option)!r}"
        fail(caller, "incoming_state", expected, got, "Make both with the same options.")
