"""The options of every loss over classes, for type checkers and for `help`."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypedDict, TypeVar, cast

from jax.typing import ArrayLike

from kljax import _pipeline
from kljax._engine.paths import Implementation
from kljax._reading import ClassAxisName
from kljax.reduction import AxisName, Reduction

F = TypeVar("F", bound=Callable[..., Any])


class SharedOptions(TypedDict, total=False):
    """What every loss over classes takes, whatever else it has of its own."""

    axis: int | Iterable[int]
    where: ArrayLike | None
    normalizer: ArrayLike | None
    axis_name: AxisName | None
    class_axis_name: ClassAxisName | None
    implementation: Implementation | None


class UnweightedOptions(SharedOptions, total=False):
    """All but weights and reduction."""

    temperature: ArrayLike | None


class OtherOptions(UnweightedOptions, total=False):
    """All but the reduction."""

    weights: ArrayLike | None


class Options(OtherOptions, total=False):
    """What every divergence takes besides its distributions; see `forward_kl`."""

    reduction: Reduction


def plainly(function: F, *, without: tuple[str, ...] = ()) -> F:
    """Let `help` show every option by its name and default; the types are for type checkers.

    Args:
        without: Options of a divergence that this function does not take.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p.replace(annotation=p.empty) for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(named) < len(parameters):
        own = {p.name for p in named}.union(without)
        named += [option for name, option in _pipeline.OPTIONS.items() if name not in own]
    cast(Any, function).__signature__ = inspect.Signature(named)
    return function
