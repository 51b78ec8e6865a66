"""Integer labels: a one-hot distribution whose array of classes never exists."""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.classes import Axes, Classes, Layout
from kljax._engine.meshes import Spread
from kljax._engine.side import Classed, Side, held
from kljax._engine.states import RowState
from kljax.distributions._pytree import pytree


@pytree
@dataclass(frozen=True, eq=False)
class Labels(Classed):
    """The number of each example's class."""

    labels: ArrayLike

    has_classes = False
    is_one_class = True

    def read(self, caller: str, argument: str) -> Self:
        return type(self)(checks.to_array(caller, argument, self.labels))

    def fit(self, caller: str, argument: str, layout: Layout, temperature: Any) -> Self:
        checks.require_labels(caller, held(self.labels), layout)
        return self

    def normalizes(self, temperature: Array | None) -> bool:
        return False

    def place(
        self, layout: Layout, where: Array | None, live: Array | None, spread: Spread | None
    ) -> Self:
        whole = jnp.expand_dims(held(self.labels), layout.axis)
        if spread is not None:  # there are no classes to spread over
            whole = meshes.spread(whole, meshes.without(spread.sharding, layout.axis))
        return type(self)(whole)

    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        return (layout.batch_axes,)

    def report(
        self,
        which: str,
        layout: Layout,
        classes: Classes,
        live: Array | None,
        temperature: Array | None,
    ) -> None:
        labels = jnp.squeeze(held(self.labels), layout.axis)
        value_checks.check_labels(which, labels, live, layout)

    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        labels = held(self.labels)
        if labels.dtype.itemsize < 4:
            labels = labels.astype(jnp.int32)  # the classes must not wrap around
        numbers, each = classes.numbers(like, labels.dtype), labels
        if like.sharding is not None:
            each = meshes.spread(jnp.broadcast_to(labels, like.shape), like.sharding)
        hit = numbers == each
        if classes.where is None:
            exists = jnp.squeeze((labels >= 0) & (labels < classes.count(like)), classes.axis)
        else:
            hit = hit & classes.where
            exists = classes.any(hit) | ~classes.any(classes.where)
        log_probs = jnp.where(hit, 0, -jnp.inf).astype(like.dtype)
        return Side(log_probs, log_probs, exists=exists)

    def best(self, classes: Classes) -> Array:
        return jnp.squeeze(held(self.labels), classes.axis)
