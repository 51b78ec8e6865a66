"""Parametric families: read → closed form → reduce, instead of sums over classes."""

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks, value_checks
from kljax._engine.classes import Layout, Shape
from kljax._engine.formula import Formula
from kljax._engine.side import Distribution, compute_dtype
from kljax.reduction import AxisName, Reduction, Weighting


class Parameter(NamedTuple):
    """What a family's parameter is."""

    holds: value_checks.Condition
    neutral: float  # a value at which everything is finite
    event_axes: int = 0  # trailing axes that are not of the batch; 2 are a matrix's


class Family(Distribution, ABC):
    """A parametric family, as a pytree of its parameters, whose batch shapes broadcast.

    The closed forms see parameters that were read: arrays of one dtype and rank.
    """

    parameters: ClassVar[dict[str, Parameter]]
    one_of: ClassVar[tuple[str, ...]] = ()  # parameters of which exactly one is given

    @abstractmethod
    def kl(self, other: Self) -> Array:
        """D(self‖other) of each element of the batch."""

    def entropy(self) -> Array | None:
        """Of each element of the batch; None where there is no closed form."""
        return None

    @property
    def given(self) -> dict[str, Any]:
        """The parameters that it was made of."""
        return {name: x for name, x in vars(self).items() if x is not None}

    @property
    def batch(self) -> Shape:
        shapes = (
            x.shape[: x.ndim - self.parameters[name].event_axes] for name, x in self.given.items()
        )
        return jnp.broadcast_shapes(*shapes)

    @property
    def events(self) -> dict[str, int]:
        """The size of an event, by each parameter that tells it."""
        return {n: x.shape[-1] for n, x in self.given.items() if self.parameters[n].event_axes}

    def read(self, caller: str, argument: str) -> Self:
        """The same of JAX arrays, or an error that names caller and argument."""
        checks.require_one_of(caller, argument, tuple(self.given), self.one_of)
        arrays = {}
        for name, value in self.given.items():
            which = f"{argument}.{name}"
            arrays[name] = checks.to_array(caller, which, value)
            checks.require_event(caller, which, arrays[name], self.parameters[name].event_axes)
        found = replace(cast(Any, self), **arrays)
        checks.require_same_events(caller, argument, found.events)
        checks.require_broadcasting(caller, argument, lambda: found.batch, shapes(found))
        return found

    def placed(self, rank: int, live: Array | None, dtype: jnp.dtype) -> Self:
        """In the dtype of computation, with so many batch axes.

        What an example of weight 0 holds gives way to harmless numbers.
        """

        def harmless(name: str, x: Array) -> Array:
            _, neutral, event_axes = self.parameters[name]
            x = jnp.expand_dims(x.astype(dtype), range(rank + event_axes - x.ndim))
            if live is None:
                return x
            there = jnp.expand_dims(live, tuple(range(-event_axes, 0)))
            like = jnp.eye(x.shape[-1], dtype=dtype) if event_axes == 2 else neutral
            return jnp.where(there, x, like)

        moved = {name: harmless(name, x) for name, x in self.given.items()}
        return replace(cast(Any, self), **moved)

    def report(self, which: str) -> None:
        """Report parameters that are none."""
        for name, x in self.given.items():
            value_checks.check_parameter(f"{which}.{name}", x, self.parameters[name].holds)


def shapes(family: Family) -> dict[str, Shape]:
    return {name: x.shape for name, x in family.given.items()}


def are_asked_for(given: tuple[Any, ...]) -> bool:
    return any(isinstance(side, Family) for side in given)


def evaluate(
    formula: Formula,
    given: tuple[Any, ...],
    *,
    axis: Any = (),
    temperature: None = None,
    where: None = None,
    class_axis_name: None = None,
    implementation: str | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    """One value per element of the batch, or summed over `axis`, or one number."""
    caller = formula.name
    of_classes = {"temperature": temperature, "where": where, "class_axis_name": class_axis_name}
    checks.require_no_classes(caller, of_classes)
    if implementation is not None:
        checks.require_choice(caller, "implementation", implementation, ["dense"], optional=True)
    named = dict(zip(formula.arguments, given, strict=True))
    checks.require_same_family(caller, named, Family)
    alone = len(given) == 1
    checks.require_closed_form(
        caller, given[0], alone or formula.cross_entropy or formula.directions
    )
    read = {argument: side.read(caller, argument) for argument, side in named.items()}
    batch = require_batch(caller, read)
    layout = Layout.of(batch, checks.require_axes(caller, batch, axis))
    weighting = Weighting.read(
        caller,
        layout,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
    )
    return _run(formula, layout, tuple(read.values()), weighting)


def require_batch(caller: str, sides: dict[str, Family]) -> Shape:
    """That of all sides together."""
    batches = {argument: side.batch for argument, side in sides.items()}
    *_, last = sides
    events = {f"{a}.{n}": size for a, side in sides.items() for n, size in side.events.items()}
    checks.require_same_events(caller, last, events)
    return checks.require_broadcasting(
        caller, last, lambda: jnp.broadcast_shapes(*batches.values()), batches
    )


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    formula: Formula, layout: Layout, sides: tuple[Family, ...], weighting: Weighting
) -> Array:
    weights, dtype = weighting.weights, compute_dtype(jax.tree.leaves(sides))
    value_checks.check_weights(formula.name, "weights", weights)
    live = None if weights is None else jnp.expand_dims(weights.astype(bool), layout.axis)
    sides = tuple(side.placed(len(layout.shape), live, dtype) for side in sides)
    for argument, side in zip(formula.arguments, sides, strict=True):
        side.report(f"{formula.name}: {argument}")
    values = jnp.broadcast_to(_values(formula, sides), layout.shape).sum(layout.axis)
    return weighting.reduced(values)


def _values(formula: Formula, sides: tuple[Family, ...]) -> Array:
    if len(sides) == 1:
        return _entropy(formula, sides[0])
    first, second = sides
    if formula.cross_entropy:
        return _entropy(formula, second) + second.kl(first)
    from_first, from_second = formula.directions or (False, False)
    values = [first.kl(second)] if from_first else []
    return sum(values, second.kl(first)) if from_second else values[0]


def _entropy(formula: Formula, side: Family) -> Array:
    return checks.require_entropy(formula.name, side, side.entropy())
