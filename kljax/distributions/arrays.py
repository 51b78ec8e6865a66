"""Arrays over the classes: logits, log-probabilities, probabilities."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks, value_checks
from kljax._engine.classes import Axes, Classes, Layout, Shape
from kljax._engine.meshes import Spread
from kljax._engine.side import Classed, Side, normalized, with_infinity
from kljax._engine.states import RowState
from kljax.distributions._pytree import pytree


class _OneArray(Classed):
    """A distribution that is one array, in its only field."""

    @property
    def array(self) -> Array:
        (array,) = vars(self).values()
        return array

    def _with(self, array: Array) -> Self:
        return cast(Any, type(self))(array)

    def read(self, caller: str, argument: str) -> Self:
        array = checks.to_array(caller, argument, *vars(self).values())
        checks.require_float(caller, argument, array)
        return self._with(array)

    def shape(self, other: Shape) -> Shape:
        return self.array.shape

    def normalizes(self, temperature: Array | None) -> bool:
        return temperature is not None

    def place(
        self, layout: Layout, where: Array | None, live: Array | None, spread: Spread | None
    ) -> Self:
        whole = layout.expand(self.array)
        return self._with(whole if spread is None else spread.lay(whole))

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
        whole = jnp.broadcast_to(self.array, layout.shape)  # a shared side counts where any does
        exact = not self.normalizes(temperature)
        self._report(which, whole, classes.only(live), exact=exact)

    @abstractmethod
    def _report(self, which: str, whole: Array, counted: Classes, *, exact: bool) -> None: ...

    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        x = self.logs(classes, like.dtype)
        logs = x.astype(like.dtype)
        if not self.normalizes(temperature):
            return Side(logs, logs)
        return normalized(x, logs, classes, temperature, state)

    def logs(self, classes: Classes, dtype: jnp.dtype) -> Array:
        return classes.present(with_infinity(self.array), -jnp.inf)

    def best(self, classes: Classes) -> Array:
        x = self.array if classes.where is None else with_infinity(self.array)
        return classes.best(x)


@pytree
@dataclass(frozen=True, eq=False)
class Logits(_OneArray):
    r"""Unnormalised log-probabilities; a bare array means the same.

    .. math:: p_i = \exp(x_i / T) / \sum_j \exp(x_j / T)

    The library normalises them, over the classes that ``where`` allows. -inf is a class of
    probability zero; its gradient is finite. A pytree: passes through every transform.

    Args:
        logits: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.Logits(jnp.zeros(4))):.4f}")
        1.3863
    """

    logits: ArrayLike

    def normalizes(self, temperature: Array | None) -> bool:
        return True

    def _report(self, which: str, whole: Array, counted: Classes, *, exact: bool) -> None:
        value_checks.check_logits(which, whole, counted)


@pytree
@dataclass(frozen=True, eq=False)
class Bare(Logits):
    """An array that did not say what it is."""

    def _report(self, which: str, whole: Array, counted: Classes, *, exact: bool) -> None:
        value_checks.check_logits(which, whole, counted, bare=True)


@pytree
@dataclass(frozen=True, eq=False)
class LogProbs(_OneArray):
    r"""Log-probabilities, taken at their word.

    .. math:: p_i = \exp(\ell_i)

    -inf is a class of probability zero. They are not normalised again, unless a temperature is
    given. That they are normalised is checked only under `checked`.
    A pytree: passes through every transform.

    Args:
        log_probs: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.LogProbs(jax.nn.log_softmax(jnp.zeros(4)))):.4f}")
        1.3863
    """

    log_probs: ArrayLike

    def _report(self, which: str, whole: Array, counted: Classes, *, exact: bool) -> None:
        value_checks.check_log_probs(which, whole, counted, exact=exact)


@pytree
@dataclass(frozen=True, eq=False)
class Probs(_OneArray):
    r"""Probabilities, taken at their word.

    0 is allowed. They are not normalised again, unless a temperature is given. That they are
    non-negative and sum to 1 is checked only under `checked`.
    A pytree: passes through every transform.

    Args:
        probs: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.Probs(jnp.array([0.5, 0.5, 0.0]))):.4f}")
        0.6931
    """

    probs: ArrayLike

    def _report(self, which: str, whole: Array, counted: Classes, *, exact: bool) -> None:
        value_checks.check_probs(which, whole, counted, exact=exact)

    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        logs = self.logs(classes, like.dtype)
        if not self.normalizes(temperature):
            return Side(logs, logs, probs=self._present(classes, like.dtype))
        return normalized(logs, logs, classes, temperature, state)

    def logs(self, classes: Classes, dtype: jnp.dtype) -> Array:
        x = self._present(classes, dtype)
        zero = x == 0
        return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, x)))

    def _present(self, classes: Classes, dtype: jnp.dtype) -> Array:
        return classes.present(with_infinity(self.array)).astype(dtype)

    def slope(self, slope: Array) -> Array:
        x = self.array.astype(slope.dtype)
        masked = (slope == 0) & ~(x > 0)
        return jnp.where(masked, 0, slope / jnp.where(masked, 1, x))

    def along(self, slope: Array, tangent: Array) -> Array:
        """The infinite slope of a zero probability leaves a tangent of 0 be.

        As two finite factors: a rule must be linear in its tangent, so it cannot ask whether it
        is 0.
        """
        infinite, big = jnp.isinf(slope), jnp.finfo(slope.dtype).max
        clipped = jnp.where(infinite, jnp.sign(slope) * big, slope)
        return clipped * tangent.astype(slope.dtype) * jnp.where(infinite, big, 1)
