"""From what the user holds to log-probabilities, and derivatives back to what the user holds.

Everything here is plain JAX that stays finite in every derivative: a class of probability zero
enters as a constant, so that no 0 · inf arises where the engine's rules are differentiated again.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from kljax._engine import meshes, statistics
from kljax._engine.statistics import RowState
from kljax._engine.terms import log_difference, log_ratio_of_probs

Kind = Literal["logits", "log_probs", "probs", "labels", "head", "top_k"]

# (log-probabilities of each side, log pred - log target, params) -> contributions per class
Term = Callable[[tuple[Array, ...], Array, Any], Array]

# What a term is shown at a class that does not exist; its answer there is dropped.
ABSENT = math.log(0.5)

# Peaks nearer than this lose less in a difference of logits than logits lose below their peaks.
_NEAR_PEAKS = 16


class Spec(NamedTuple):
    """What to compute: everything that chooses code."""

    term: Term
    kinds: tuple[Kind, ...]
    axis: tuple[int, ...]
    # What the term's derivatives to each side's log-probabilities sum to, in units of the value;
    # None where that is not known beforehand, as for all sides by default.
    slope_sums: tuple[float | None, ...] = ()
    linear: int | None = None  # the side p of a term p · g(log q)


class Operands(NamedTuple):
    """What to compute it from; all arrays broadcast against the whole input, batch and classes."""

    inputs: tuple[Any, ...]  # arrays; heads and top-k sides until they are resolved
    where: Array | None
    temperature: Array | None
    params: Any  # the term's own, by name
    scale: Array | None  # one per example; 0 removes the example


class Softmax(NamedTuple):
    """The parts of a softmax that the library computed."""

    scores: Array  # (logs - peak) / T
    state: RowState


class Side(NamedTuple):
    """One distribution: the logarithms given, and what they stand for as log-probabilities."""

    logs: Array
    log_probs: Array
    softmax: Softmax | None = None  # None where the user's word was taken
    is_class: Array | None = None  # of labels: whether each names a class, if any is left
    probs: Array | None = None  # where the user's word was taken for probabilities


class View(NamedTuple):
    """All sides on one shape, and the logarithm of their ratio."""

    sides: tuple[Side, ...]
    log_probs: tuple[Array, ...]
    log_ratio: Array


def normalizes(kind: Kind, temperature: Any) -> bool:
    """Whether the library normalises a side, or takes it at its word."""
    if kind in ("log_probs", "probs"):
        return temperature is not None
    return kind != "labels"


def compute_dtype(inputs: Any) -> jnp.dtype:
    """float64 stays float64; all else is computed in float32."""
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(inputs))
    return jnp.dtype("float64" if wide else "float32")


def view(spec: Spec, operands: Operands, states: tuple[RowState | None, ...] | None = None) -> View:
    """Read every side as log-probabilities, ready for a term; the row states may be known."""
    shape = jnp.broadcast_shapes(*(x.shape for x in operands.inputs))
    dtype = compute_dtype(operands.inputs)
    sides = tuple(
        _side(kind, x, operands, spec.axis, shape, dtype, state)
        for kind, x, state in zip(
            spec.kinds, operands.inputs, states or [None] * len(spec.kinds), strict=True
        )
    )
    ratio = _log_ratio(sides, operands.temperature)
    log_probs = tuple(side.log_probs for side in sides)
    if operands.where is not None:
        log_probs = tuple(jnp.where(operands.where, x, ABSENT) for x in log_probs)
        ratio = jnp.where(operands.where, ratio, 0)
    full = [jnp.broadcast_to(x, shape) for x in (*log_probs, ratio)]
    return View(sides, tuple(full[:-1]), full[-1])


def without_heads(spec: Spec) -> Spec:
    """The same question where every head's logits are there."""
    kinds: list[Kind] = ["logits" if kind == "head" else kind for kind in spec.kinds]
    return spec._replace(kinds=tuple(kinds))


def log_probs_of(kind: Kind, operands: Operands, axis: tuple[int, ...]) -> Array:
    """The log-probabilities of a single side."""
    (x,) = operands.inputs
    return _side(kind, x, operands, axis, x.shape, compute_dtype(x)).log_probs


def with_infinity(x: Array) -> Array:
    """In a dtype that has an infinity, as some 8-bit floats have not."""
    return x.astype(jnp.float32) if x.dtype.itemsize == 1 else x


def to_input(kind: Kind, slope: Array, x: Array) -> Array:
    """The derivative to the input itself, from the derivative to its logarithm."""
    if kind != "probs":
        return slope
    x = x.astype(slope.dtype)
    masked = (slope == 0) & ~(x > 0)
    return jnp.where(masked, 0, slope / jnp.where(masked, 1, x))


def _side(
    kind: Kind,
    x: Array,
    operands: Operands,
    axis: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    state: RowState | None = None,
) -> Side:
    if kind == "labels":
        whole = [other for other in operands.inputs if other.shape == shape]
        return _one_hot(x, operands.where, axis, shape, dtype, meshes.of_first(whole))
    x = with_infinity(x)
    least = 0 if kind == "probs" else -jnp.inf
    if operands.where is not None:
        x = jnp.where(operands.where, x, least)
    logs = _log(x.astype(dtype)) if kind == "probs" else x.astype(dtype)
    if not normalizes(kind, operands.temperature):
        return Side(logs, logs, probs=x.astype(dtype) if kind == "probs" else None)
    return _normalize(logs if kind == "probs" else x, logs, operands, axis, state)


def _log(probs: Array) -> Array:
    zero = probs == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, probs)))


def _normalize(
    x: Array, logs: Array, operands: Operands, axis: tuple[int, ...], state: RowState | None
) -> Side:
    """Softmax of logs, which are x in a wider dtype."""
    inverse = None if operands.temperature is None else 1 / operands.temperature
    peak, mass = state or statistics.row_state(x, inverse, axis, logs.dtype)
    # The peak goes before the division: logits of 1e30 divided by T first would overflow.
    scores = logs - peak
    if inverse is not None:
        scores = statistics.scale(scores, inverse)
    if operands.where is not None:
        mass = jnp.where(jnp.any(operands.where, axis=axis, keepdims=True), mass, 1)
    return Side(logs, scores - jnp.log(mass), Softmax(scores, RowState(peak, mass)))


def _log_ratio(sides: tuple[Side, ...], temperature: Array | None) -> Array:
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
    near = jnp.abs(shift) < _NEAR_PEAKS
    a_below = a.logs - jnp.where(near, 0, a_peak)
    b_below = b.logs - jnp.where(near, 0, b_peak)
    both_zero = jnp.isneginf(a.logs) & jnp.isneginf(b.logs)
    a_below, b_below = (jnp.where(both_zero, 0, below) for below in (a_below, b_below))
    difference = (a_below - b_below) - jnp.where(near, shift, 0)
    if temperature is not None:
        difference = statistics.scale(difference, 1 / temperature)
    # From the smaller mass, so that to exchange the sides changes the sign and nothing else.
    less = jnp.minimum(a_mass, b_mass)
    masses = jnp.log1p((a_mass - less) / less) - jnp.log1p((b_mass - less) / less)
    return jnp.where(both_zero, 0, difference - masses)


def _one_hot(
    labels: Array,
    where: Array | None,
    axis: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding | None,
) -> Side:
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)  # the classes must not wrap around
    classes = lax.broadcasted_iota(labels.dtype, shape, axis[0], out_sharding=sharding)
    if sharding is not None:
        labels = meshes.spread(jnp.broadcast_to(labels, shape), sharding)
    hit = classes == labels
    if where is None:
        is_class = jnp.any(hit, axis=axis)
    else:
        hit = hit & where
        is_class = jnp.any(hit, axis=axis) | ~jnp.any(where, axis=axis)
    log_probs = jnp.where(hit, 0, -jnp.inf).astype(dtype)
    return Side(log_probs, log_probs, is_class=is_class)
