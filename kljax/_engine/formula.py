"""A divergence as a formula, and a loss: the formula with all that it is computed from."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import Array

from kljax._engine import checks
from kljax._engine.classes import Axes, Classes, Layout
from kljax._engine.side import Classed, Rows, View, in_axes, view

# (log-probabilities of each side, log pred - log target, params) -> contributions per class
Term = Callable[[tuple[Array, ...], Array, Any], Array]


class Formula(NamedTuple):
    """A divergence: its name and arguments, for messages, and its terms."""

    name: str
    arguments: tuple[str, ...]
    term: Term
    normalized: Term | None = None  # serves where the library normalised every side
    # Where `normalized` sums to D(0‖1) of the sides, to D(1‖0), or to both: which.
    directions: tuple[bool, bool] | None = None
    needs_mass: bool = False  # infinite where targets are 0
    cross_entropy: bool = False  # whether the term is -p log q of the second side under the first
    cached: bool = True  # not if a term captures what may be another at the next call

    def on(self, sides: tuple[Classed, ...], temperature: Array | None) -> "Formula":
        """With the term that serves these sides as its only one."""
        if self.normalized and all(side.normalizes(temperature) for side in sides):
            return self._replace(term=self.normalized, normalized=None)
        return self._replace(normalized=None, directions=None)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sides", "classes", "temperature", "params", "factor", "rows"],
    meta_fields=["formula"],
)
@dataclass(frozen=True)
class Loss:
    """A formula and all that it is computed from; arrays broadcast against the whole input."""

    formula: Formula  # on its sides
    sides: tuple[Classed, ...]
    classes: Classes
    temperature: Array | None
    params: Any = ()  # the term's own
    factor: Array | None = None  # one per example; 0 removes the example
    rows: Rows | None = None  # of a block, where they are known beforehand

    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        """Where each leaf, in order, has its batch axes; None: it has none."""
        axes = in_axes(layout, self.sides, self.classes, self.temperature)
        axes += tuple(None for _ in jax.tree.leaves(self.params))
        return axes if self.factor is None else (*axes, layout.per_example)

    def on_few_classes(self) -> "Loss":
        """The same question on those classes that its last side knows of."""
        *others, last = self.sides
        found = last.few(tuple(others), self.classes, self.temperature, self.factor)
        if found is None:
            return self
        sides, classes = found
        formula = self.formula._replace(directions=None, cross_entropy=False)
        return replace(
            self, formula=formula, sides=sides, classes=classes, temperature=None, rows=None
        )

    def view(self, rows: Rows | None = None) -> View:
        return view(self.sides, self.classes, self.temperature, rows)

    def term(self, seen: View, params: Any) -> Array:
        contributions = self.formula.term(seen.log_probs, seen.log_ratio, params)
        checks.require_contributions("divergence", contributions, seen.log_ratio.shape)
        return contributions.astype(seen.log_ratio.dtype)

    def contributions(self, seen: View) -> Array:
        """The term at each class; 0 at those that do not exist."""
        return self.classes.present(self.term(seen, self.params))

    def sums_to_a_number(self, i: int) -> bool:
        """Whether the term's slopes to the log-probabilities of side i do, whatever the values.

        Those of D(p‖q) sum to 0 over q, for they are q - p, and to D itself over p. Those of a
        label's cross-entropy sum to -1.
        """
        if self.formula.directions:
            return not self.formula.directions[i]
        return self.is_to_labels(i)

    def is_to_labels(self, i: int) -> bool:
        return i == 0 and self.formula.cross_entropy and self.sides[1].is_one_class
