"""What a call is given: read while tracing, and placed on the axes of the whole input."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.classes import Classes, Layout
from kljax._engine.side import Classed, Distribution, compute_dtype
from kljax.distributions.arrays import Bare

Given = ArrayLike | Distribution
ClassAxisName = str | Iterable[str]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sides", "where", "temperature"],
    meta_fields=["caller", "arguments", "layout"],
)
@dataclass(frozen=True)
class Inputs:
    """The sides of a call, and the options that change them."""

    caller: str  # for messages, as are the names of the arguments
    arguments: tuple[str, ...]
    layout: Layout
    sides: tuple[Classed, ...]
    where: Array | None
    temperature: Array | None

    def also(self, argument: str, given: Given) -> "Inputs":
        """With one more side, which has to go with the others."""
        side = _read_side(self.caller, argument, given)
        side = side.fit(self.caller, argument, self.layout, None)
        sides, arguments = (*self.sides, side), (*self.arguments, argument)
        return replace(self, sides=sides, arguments=arguments)

    def place(
        self, counted: tuple[Array | None, ...]
    ) -> tuple[tuple[Classed, ...], Classes, Array | None]:
        """Sides, classes and temperature on the axes of the whole input, their values reported.

        Args:
            counted: Of each side, the weights under which it is read: nothing is at weight 0.
        """
        layout, where, temperature = self.layout, self.where, self.temperature
        arrays = [side.array for side in self.sides if side.array is not None]
        # On a mesh of explicit axes a select demands that its operands are spread alike.
        spread = meshes.of_first([x for x in arrays if x.shape == layout.shape])
        live = [None if weights is None else weights.astype(bool) for weights in counted]
        sides = tuple(
            side.place(layout, where, own, spread)
            for side, own in zip(self.sides, live, strict=True)
        )
        if where is not None:
            where = layout.expand(where)
            if spread is not None:
                where = meshes.spread(jnp.broadcast_to(where, layout.shape), spread)
        classes = Classes(where, layout.axis, layout.names)
        if temperature is not None:
            temperature = temperature.astype(compute_dtype(sides))
            if temperature.ndim:
                temperature = jnp.expand_dims(temperature, layout.axis)
        # checkify's checks cannot be mapped over an explicit axis.
        if value_checks.are_asked_for() and not meshes.explicit(sides):
            value_checks.check_temperature(self.caller, temperature)
            for argument, side, own in zip(self.arguments, sides, live, strict=True):
                side.report(f"{self.caller}: {argument}", layout, classes, own, temperature)
        return sides, classes, temperature


def read(
    caller: str,
    given: dict[str, Given],
    *,
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    class_axis_name: ClassAxisName | None = None,
) -> Inputs:
    """Check all that is known while tracing. A bare array holds logits."""
    sides = {argument: _read_side(caller, argument, value) for argument, value in given.items()}
    first, *_ = sides
    checks.require_classes(caller, first, sides[first])
    own = sides[first].shape(())
    shapes = {argument: side.shape(own) for argument, side in sides.items()}
    layout = checks.require_layout(caller, shapes, axis, class_axis_name)
    fitted = (side.fit(caller, argument, layout, temperature) for argument, side in sides.items())
    fitted = tuple(fitted)
    if where is not None:
        where = checks.to_array(caller, "where", where)
        checks.require_where(caller, where, layout)
    if temperature is not None:
        temperature = checks.require_temperature(caller, temperature, layout.batch)
    return Inputs(caller, tuple(given), layout, fitted, where, temperature)


def _read_side(caller: str, argument: str, value: Any) -> Classed:
    are_classes = isinstance(value, Classed) or not isinstance(value, Distribution)
    checks.require_classed(caller, argument, value, are_classes)
    side = value if isinstance(value, Classed) else Bare(value)
    return side.read(caller, argument)
