"""What a loss asks of its sides, and what they answer: log-probabilities, and the way back.

A side answers for itself: a new representation implements `Classed`, and nothing else changes.
Everything a view holds is plain JAX that stays finite in every derivative: a class of probability
zero enters as a constant, so that no 0 · inf arises where the engine's rules are differentiated
again.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from kljax._engine import meshes, states
from kljax._engine.classes import Axes, Classes, Layout, Shape
from kljax._engine.meshes import Names, Spread
from kljax._engine.states import RowState
from kljax._engine.terms import log_difference, log_ratio_of_probs

# From the gradient to logits to the gradients to some of the leaves that they were made of.
Pullback = Callable[[Sequence[int], Array], list[Array]]


class Distribution:
    """What every distribution is: a frozen pytree that says what it holds.

    For annotations and ``isinstance``; `Logits`, `LogProbs`, `Probs`, `Head` and `TopK` are those
    there are.
    """


class Softmax(NamedTuple):
    """The parts of a softmax that the library computed."""

    scores: Array  # (logs - peak) / T
    state: RowState


class Side(NamedTuple):
    """One distribution: the logarithms given, and what they stand for as log-probabilities."""

    logs: Array
    log_probs: Array
    softmax: Softmax | None = None  # None where the user's word was taken
    probs: Array | None = None  # where the user's word was taken for probabilities
    exists: Array | None = None  # of labels: whether each names a class, if any is left


class Classed(Distribution, ABC):
    """A distribution over classes.

    Its methods are called in the order in which they stand: while a call is read, once it is
    traced as a whole, and for a block of examples at a time. After `project` and `few` it is one
    array over the classes, or labels.
    """

    has_classes = True  # its shape says how many there are
    # In a block, arrays over the classes are made of what it holds; `kl_terms` has no blocks.
    makes_classes = False
    has_kernel = False  # it is passed over once a block, and so is its gradient
    is_one_class = False  # all its mass is on one class

    @property
    def array(self) -> Array | None:
        """What it holds, if that is one array over the classes."""
        return None

    @abstractmethod
    def read(self, caller: str, argument: str) -> Self:
        """The same of JAX arrays, or an error that names caller and argument."""

    def shape(self, other: Shape) -> Shape:
        """Batch and classes; without classes of its own it takes the other side's."""
        return other

    def fit(self, caller: str, argument: str, layout: Layout, temperature: Any) -> Self:
        """The same, as it goes with the other side and with the call's options; or an error."""
        return self

    def partition(self, layout: Layout) -> Sequence[Names]:
        """How its array over the classes lies, or would, on a mesh of explicit axes."""
        if self.array is None or self.array.shape != layout.shape:
            return (None,) * len(layout.shape)
        return meshes.spec(self.array)

    def require_mass(self, caller: str, layout: Layout) -> None:
        """An error where it does not tell the mass of some class, and a loss needs that."""

    @abstractmethod
    def normalizes(self, temperature: Array | None) -> bool:
        """Whether the library normalises it, by a softmax that `view` tells of."""

    @abstractmethod
    def place(
        self, layout: Layout, where: Array | None, live: Array | None, spread: Spread | None
    ) -> "Classed":
        """On the axes of the whole input; an axis that it lacks has the size 1.

        What makes its classes itself, in `project`, keeps here what it needs of `where`, and puts
        numbers in place of NaN in examples that do not count.

        Args:
            layout: Where batch and classes lie.
            where: Which classes exist, as the user gave it.
            live: Which examples count.
            spread: How whole arrays lie on a mesh of explicit axes.
        """

    @abstractmethod
    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        """Where each leaf, once placed, has its batch axes."""

    def report(
        self,
        which: str,
        layout: Layout,
        classes: Classes,
        live: Array | None,
        temperature: Array | None,
    ) -> None:
        """Report values that cannot be what it says they are."""

    def project(self) -> tuple["Classed", Pullback | None]:
        """The same as one array over the classes, and the way back to what that was made of.

        Needed wherever classes are mixed otherwise than by the softmax of `view`. The way back is
        given numbers of leaves, and the gradient to the array; it returns those to the leaves.
        """
        return self, None

    def few(
        self, others: tuple["Classed", ...], classes: Classes, temperature: Array | None, live: Any
    ) -> tuple[tuple["Classed", ...], Classes] | None:
        """All sides on the few classes that it knows of, if it does not know all."""
        return None

    def logs(self, classes: Classes, dtype: jnp.dtype) -> Array | None:
        """What a softmax is taken of, in its own dtype or this; None where `view` alone tells."""
        return None

    @abstractmethod
    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        """As log-probabilities; its derivative is not taken, but told by `slope` and `along`.

        Args:
            classes: Of the block.
            temperature: It broadcasts against the block.
            like: The block's shape and sharding, and the dtype of computation.
            state: That of its rows, where it is known.
        """

    def slope(self, slope: Array) -> Array:
        """The derivative to what it holds, from that to the logarithm, class by class."""
        return slope

    def along(self, slope: Array, tangent: Array) -> Array:
        """slope · tangent, in the dtype of computation."""
        return slope * tangent.astype(slope.dtype)

    @abstractmethod
    def best(self, classes: Classes) -> Array:
        """The number of the most probable class."""


def in_axes(
    layout: Layout, sides: tuple[Classed, ...], classes: Classes, temperature: Array | None
) -> tuple[Axes, ...]:
    """Of all leaves of placed sides and of what they share, in order."""
    axes = [a for side in sides for a in side.in_axes(layout)]
    axes += [] if classes.where is None else [layout.batch_axes]
    if temperature is not None:
        axes += [layout.batch_axes if temperature.ndim else None]
    return tuple(axes)


class View(NamedTuple):
    """All sides on one shape, and the logarithm of their ratio."""

    sides: tuple[Side, ...]
    log_probs: tuple[Array, ...]
    log_ratio: Array


class Rows(NamedTuple):
    """The states of the rows, where they are known; None is a side that is not normalised."""

    states: tuple[RowState | None, ...]
    log_masses: Array | None = None  # of two: log a - log b, if it is known better than from these


# What a term is shown at a class that does not exist; its answer there is dropped.
ABSENT = math.log(0.5)


def held(field: Any) -> Array:
    """A field of a distribution that was read: a JAX array, which a type checker cannot know."""
    return field


def compute_dtype(tree: Any) -> jnp.dtype:
    """float64 stays float64; all else is computed in float32."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(tree))
    return jnp.dtype("float64" if wide else "float32")


def wide(side: Classed) -> Classed:
    """One array over the classes in the dtype of computation; any other side as it is."""
    if side.array is None:
        return side
    return jax.tree.map(lambda x: x.astype(compute_dtype(x)), side)


def with_infinity(x: Array) -> Array:
    """In a dtype that has an infinity, as some 8-bit floats have not."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


@partial(jax.jit, inline=True)  # so that it is traced once, not for each derivative anew
def view(
    sides: tuple[Classed, ...],
    classes: Classes,
    temperature: Array | None,
    rows: Rows | None = None,
) -> View:
    """Read every side as log-probabilities, ready for a term; the rows' states may be known."""
    like = block_of(sides)
    seen = tuple(
        side.view(classes, temperature, like, state)
        for side, state in zip(sides, rows.states if rows else [None] * len(sides), strict=True)
    )
    log_probs = [classes.present(side.log_probs, ABSENT) for side in seen]
    ratio = classes.present(_log_ratio(seen, temperature, rows.log_masses if rows else None))
    *full, ratio = (jnp.broadcast_to(x, like.shape) for x in (*log_probs, ratio))
    return View(seen, tuple(full), ratio)


def block_of(sides: tuple[Classed, ...]) -> jax.ShapeDtypeStruct:
    """The shape that all sides have together, its sharding, and the dtype of computation."""
    leaves = jax.tree.leaves(sides)
    shape = jnp.broadcast_shapes(*(x.shape for x in leaves))
    sharding = meshes.of_first([x for x in leaves if x.shape == shape])
    return jax.ShapeDtypeStruct(shape, compute_dtype(leaves), sharding=sharding)


def normalized(
    x: Array, logs: Array, classes: Classes, temperature: Array | None, state: RowState | None
) -> Side:
    """The softmax of logs, which are x in a wider dtype."""
    inverse = None if temperature is None else 1 / temperature
    peak, mass = state or classes.state(x, inverse, logs.dtype)
    # The peak goes before the division: logits of 1e30 divided by T first would overflow.
    scores = logs - peak
    if inverse is not None:
        scores = states.scale(scores, inverse)
    if classes.where is not None:
        mass = jnp.where(classes.any(classes.where, keepdims=True), mass, 1)
    return Side(logs, scores - jnp.log(mass), Softmax(scores, RowState(peak, mass)))


def _log_ratio(
    sides: tuple[Side, ...], temperature: Array | None, log_masses: Array | None
) -> Array:
    """log pred - log target, not as a difference of two rounded log-probabilities."""
    if len(sides) == 1:
        return jnp.zeros_like(sides[0].log_probs)
    a, b = sides
    if a.softmax is None or b.softmax is None:
        ratio = log_difference(a.log_probs, b.log_probs)
        if a.probs is None or b.probs is None:
            return ratio
        return log_ratio_of_probs(*jnp.broadcast_arrays(a.probs, b.probs, ratio))
    # Where the peaks are near each other the logits differ exactly; else what stands below does.
    (a_peak, a_mass), (b_peak, b_mass) = a.softmax.state, b.softmax.state
    shift = a_peak - b_peak
    near = jnp.abs(shift) < states.NEAR_PEAKS
    a_below = a.logs - jnp.where(near, 0, a_peak)
    b_below = b.logs - jnp.where(near, 0, b_peak)
    both_zero = jnp.isneginf(jnp.maximum(a.logs, b.logs))
    a_below, b_below = (jnp.where(both_zero, 0, below) for below in (a_below, b_below))
    difference = (a_below - b_below) - jnp.where(near, shift, 0)
    if temperature is not None:
        difference = states.scale(difference, 1 / temperature)
    if log_masses is None:
        log_masses = log_ratio_of_masses(a_mass, b_mass)
    return jnp.where(both_zero, 0, difference - log_masses)


def log_ratio_of_masses(a: Array, b: Array) -> Array:
    """log a - log b; to exchange the two changes the sign and nothing else."""
    is_less = a < b
    sign, less = jnp.where(is_less, jnp.asarray(-1, a.dtype), 1), jnp.where(is_less, a, b)
    return sign * jnp.log1p(sign * (a - b) / less)
