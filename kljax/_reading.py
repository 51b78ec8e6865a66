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
from kljax._engine.meshes import Spread
from kljax._engine.paths import Path
from kljax._engine.side import Classed, Distribution, compute_dtype
from kljax.distributions.arrays import Bare

Given = ArrayLike | Distribution
ClassAxisName = str | Iterable[str]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sides", "where", "temperature"],
    meta_fields=["caller", "arguments", "layout", "per_device"],
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
    per_device: Spread | None = None  # where each device of a mesh computes its own part

    def on(self, path: Path) -> "Inputs":
        """As they are placed for this path."""
        if path.per_device is None:
            return self
        layout = self.layout._replace(names=path.names)
        return replace(self, layout=layout, per_device=path.per_device)

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
        spread = self.per_device or self._as_whole()
        live = [None if weights is None else weights.astype(bool) for weights in counted]
        sides = tuple(
            side.place(layout, where, own, spread)
            for side, own in zip(self.sides, live, strict=True)
        )
        if where is not None:
            where = layout.expand(where)
            where = where if spread is None else spread.lay(where)
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

    def _as_whole(self) -> Spread | None:
        """How the first whole array lies, if it does on a mesh of explicit axes."""
        shape, axis = self.layout.shape, self.layout.axis
        arrays = [side.array for side in self.sides if side.array is not None]
        sharding = meshes.of_first([x for x in arrays if x.shape == shape])
        return None if sharding is None else Spread(shape, axis, sharding)


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
