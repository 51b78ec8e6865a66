"""The state of a row of logits: its peak, and its mass relative to that peak.

Two states of parts of a row merge into the state of both: one algebra for whole rows, blocks of
classes and shards. The empty state is its identity.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine import lowering

# Peaks nearer than this lose less in a difference of logits than logits lose below their peaks.
NEAR_PEAKS = 16


class RowState(NamedTuple):
    """max x, kept finite where there is no mass at all, and the sum of exp((x - max) / T)."""

    peak: Array
    mass: Array


def empty(shape: tuple[int, ...], dtype: jnp.dtype) -> RowState:
    """The state of no classes."""
    return RowState(jnp.full(shape, jnp.finfo(dtype).min, dtype), jnp.zeros(shape, dtype))


def merge(a: RowState, b: RowState, inverse_temperature: Array | None = None) -> RowState:
    """The state of two parts of a row together."""
    peak = jnp.maximum(a.peak, b.peak)
    a_mass, b_mass = (_mass_below(peak, part, inverse_temperature) for part in (a, b))
    return RowState(peak, a_mass + b_mass)


def _mass_below(peak: Array, part: RowState, inverse_temperature: Array | None) -> Array:
    """The mass of a part, relative to the peak of the whole."""
    below = part.peak - peak
    below = below if inverse_temperature is None else below * inverse_temperature
    return part.mass * jnp.exp(below)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def row_state(
    x: Array,
    inverse_temperature: Array | None,
    axis: tuple[int, ...],
    dtype: jnp.dtype,
    names: tuple[str, ...] = (),
) -> RowState:
    """The state of whole rows, with the axes kept; the peak is a constant to derivatives.

    Args:
        names: The mapped axes over which the classes are spread.
    """
    operands = (x,)
    if inverse_temperature is not None:  # one per example makes as many rows of a shared one
        shape = jnp.broadcast_shapes(x.shape, inverse_temperature.shape)
        operands = (jnp.broadcast_to(x, shape), inverse_temperature)
    # Where memory is the limit, one pass; a CPU is faster in two passes of simple reductions.
    shape = tuple(1 if i in axis else n for i, n in enumerate(operands[0].shape))
    number: Any = jax.ShapeDtypeStruct(shape, dtype)
    state = lowering.by_platform(
        RowState(number, number),
        *operands,
        cpu=partial(_in_two_passes, axis=axis, dtype=dtype),
        default=partial(_in_one_pass, axis=axis, dtype=dtype),
    )
    if not names:
        return state
    return over_names(state, inverse_temperature, names)


def over_names(
    state: RowState, inverse_temperature: Array | None, names: tuple[str, ...]
) -> RowState:
    """The state of all shards."""
    peak = lax.pmax(state.peak, names)
    return RowState(peak, lax.psum(_mass_below(peak, state, inverse_temperature), names))


@row_state.defjvp
def _row_state_jvp(axis, dtype, names, primals, tangents):
    x, inverse = primals
    x_dot, inverse_dot = tangents
    state = row_state(x, inverse, axis, dtype, names)
    scores, scores_dot = x.astype(dtype) - state.peak, x_dot.astype(dtype)
    if inverse is not None:
        scores, scores_dot = jax.jvp(scale, (scores, inverse), (scores_dot, inverse_dot))
    mass_dot = jnp.sum(jnp.exp(scores) * scores_dot, axis=axis, keepdims=True)
    mass_dot = lax.psum(mass_dot, names) if names else mass_dot
    return state, RowState(jnp.zeros_like(state.peak), mass_dot)


@jax.custom_jvp
def scale(scores: Array, inverse_temperature: Array) -> Array:
    """scores / T, where a class without mass stays so at any temperature: no 0 · inf."""
    return scores * inverse_temperature


@scale.defjvp
def _scale_jvp(primals, tangents):
    (scores, inverse), (scores_dot, inverse_dot) = primals, tangents
    moving = jnp.where(jnp.isinf(scores), 0, scores)
    return scale(scores, inverse), scores_dot * inverse + moving * inverse_dot


def _in_two_passes(
    x: Array, inverse: Array | None = None, *, axis: tuple[int, ...], dtype: jnp.dtype
) -> RowState:
    # In the input's own dtype: to widen it before the maximum would store a wide copy.
    peak = lax.reduce(x, jnp.finfo(x.dtype).min.astype(x.dtype), lax.max, axis)
    peak = jnp.expand_dims(peak, axis).astype(dtype)
    scores = x.astype(dtype) - peak
    scores = scores if inverse is None else scores * inverse
    state = RowState(peak, jnp.sum(jnp.exp(scores), axis=axis, keepdims=True))
    # XLA:CPU would store the scores for those who subtract the same peak again, which is as well
    # while they stay in the cache. Where it takes the peak for another one, as behind a change of
    # dtype, it would store a wide copy of a narrow x instead.
    large = all(isinstance(n, int) for n in x.shape) and x.size >= _STORED
    return lax.optimization_barrier(state) if large and x.dtype == dtype else state


_STORED = 2**16  # elements


def _in_one_pass(
    x: Array, inverse: Array | None = None, *, axis: tuple[int, ...], dtype: jnp.dtype
) -> RowState:
    return in_one_pass(x.astype(dtype), [inverse], axis)[0][0]


def in_one_pass(
    x: Array,
    inverses: Sequence[Array | None],
    axis: tuple[int, ...],
    numbers: Array | None = None,
) -> tuple[list[RowState], Array | None]:
    """The states of whole rows at several temperatures, and the number of the first best class.

    Args:
        x: In the dtype of computation.
        inverses: Of the temperatures; None is 1.
        axis: Where the classes lie.
        numbers: Those of the classes, if the best is asked for.
    """
    start = empty((), x.dtype)
    mass = jnp.where(jnp.isneginf(x), 0, jnp.ones_like(x))
    # A reduction cannot capture the temperatures.
    scales = [jnp.broadcast_to(inverse, x.shape) for inverse in inverses if inverse is not None]
    masses, number = [mass] * len(inverses), [] if numbers is None else [numbers]
    layout = jax.tree.structure((0, masses, scales, number))

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        a_peak, a_masses, scales, a_number = layout.unflatten(a)
        b_peak, b_masses, b_scales, b_number = layout.unflatten(b)
        scales = [jnp.maximum(x, y) for x, y in zip(scales, b_scales, strict=True)]
        given = iter(scales)
        by = [None if inverse is None else next(given) for inverse in inverses]
        parts = zip(a_masses, b_masses, by, strict=True)
        merged = [merge(RowState(a_peak, x), RowState(b_peak, y), by) for x, y, by in parts]
        number = [_first_best(a_peak, b_peak, *n) for n in zip(a_number, b_number, strict=True)]
        out = merged[0].peak, [state.mass for state in merged], scales, number
        return tuple(jax.tree.leaves(out))

    last = [jnp.array(jnp.iinfo(n.dtype).max, n.dtype) for n in number]
    zeros = jax.tree.map(lambda _: jnp.zeros((), x.dtype), (masses, scales))
    each = jnp.maximum(x, start.peak), masses, scales, number
    each, initial = map(jax.tree.leaves, (each, (start.peak, *zeros, last)))
    out = lax.reduce(tuple(each), tuple(initial), combine, axis)
    out = [jnp.expand_dims(y, axis) for y in out]
    peak, masses, _, number = layout.unflatten(out)
    best = jnp.squeeze(number[0], axis) if number else None
    return [RowState(peak, mass) for mass in masses], best


def _first_best(a: Array, b: Array, a_number: Array, b_number: Array) -> Array:
    larger = jnp.where(a > b, a_number, b_number)
    return jnp.where(a == b, jnp.minimum(a_number, b_number), larger)
