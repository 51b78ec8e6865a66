"""The state of two rows of logits: both peaks and masses, and the divergence between the two.

States of parts of the rows merge into the state of both, as in `states`. So the divergence takes
one pass over the classes, in which neither side's normaliser is known yet, and is still summed of
contributions of which none is negative: exactly 0 at equality, and accurate near it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from kljax._engine.classes import Classes
from kljax._engine.states import NEAR_PEAKS, RowState
from kljax._engine.terms import expm1_minus, log1p_minus

# Below this a difference between the sides comes from a series, above it from the sums.
_NEAR = 0.5
_NEAR_STEP = 0.125  # the merge has a shorter series


class PairState(NamedTuple):
    """Of the classes seen so far: p' and q' below their peaks, with d = log q' - log p'."""

    peak_p: Array
    peak_q: Array
    p: Array  # Σ p'
    q: Array  # Σ q'
    textbook: Array  # Σ -p' d
    gap: Array  # Σ p' (expm1(d) - d), of which no term is negative; textbook + q - p
    lost: Array  # how many classes have mass in p alone: D is infinite

    @property
    def rows(self) -> tuple[RowState, RowState]:
        return RowState(self.peak_p, self.p), RowState(self.peak_q, self.q)

    @property
    def log_masses(self) -> Array:
        """log Σ q' - log Σ p', not as a difference of logarithms where they are close."""
        near, y = self._excess
        return jnp.where(near, y + log1p_minus(y), jnp.log(self.q / self.p))

    @property
    def divergence(self) -> Array:
        """D(p‖q)."""
        near, y = self._excess
        close = self.gap / self.p + log1p_minus(y)
        far = self.textbook / self.p + jnp.log(self.q / self.p)
        value = jnp.where(near, jnp.maximum(close, 0), far)  # rounding alone is below 0
        infinite = jnp.where(self.q > 0, jnp.inf, jnp.nan)  # a row without mass is none
        return jnp.where(self.lost > 0, infinite, value)

    @property
    def _excess(self) -> tuple[Array, Array]:
        """Whether Σ q' / Σ p' - 1 is small, and then what it is."""
        y = (self.gap - self.textbook) / self.p
        y = jnp.where(self.lost > 0, self.q / self.p - 1, y)  # of the infinite sums nothing is left
        near = jnp.abs(y) < _NEAR
        return near, jnp.where(near, y, 0)


def pair_states(
    p: Array, q: Array, inverse_temperature: Array | None, classes: Classes, *, both: bool = False
) -> list[PairState]:
    """The state of whole rows of logits, with the axes kept.

    Args:
        p: In the dtype of computation, as q is; both of one shape.
        q: Likewise.
        inverse_temperature: It broadcasts against them.
        classes: Where the classes lie.
        both: Also the state of q and p, from the same pass.
    """
    least = jnp.finfo(p.dtype).min / 2  # so that a difference of two peaks is finite
    one, zero = jnp.ones_like(p), jnp.zeros_like(p)
    no_p, no_q = map(jnp.isneginf, (p, q))
    in_p, in_q = jnp.where(no_p, zero, one), jnp.where(no_q, zero, one)
    # Of one class alone p' and q' are 1, so that d is 0; merging tells what it is below the peaks.
    each = [jnp.maximum(p, least), jnp.maximum(q, least), in_p, in_q]
    each += [zero, zero, jnp.where(no_q, in_p, zero)]
    each += [zero, zero, jnp.where(no_p, in_q, zero)] if both else []
    count, scales = len(each), []
    if inverse_temperature is not None:  # a reduction cannot capture it
        scales = [jnp.broadcast_to(inverse_temperature, p.shape)]

    def combine(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        scales = tuple(map(jnp.maximum, a[count:], b[count:]))
        merged = (
            merge(*parts, *scales)
            for parts in zip(_pairs(a[:count]), _pairs(b[:count]), strict=True)
        )
        first, *second = merged
        return *first, *(x for pair in second for x in pair[_SHARED:]), *scales

    start = [least, least] + [0.0] * (count - 2 + len(scales))
    start = tuple(jnp.asarray(x, p.dtype) for x in start)
    out = lax.reduce((*each, *scales), start, combine, classes.axis)
    found = _pairs([jnp.expand_dims(x, classes.axis) for x in out[:count]])
    if not classes.names:
        return found
    return [_over_names(pair, inverse_temperature, classes.names) for pair in found]


_SHARED = 4  # fields of a state that are also those of its sides exchanged


def _pairs(fields: Sequence[Array]) -> list[PairState]:
    """Of the shared fields and what is each state's own."""
    (peak_p, peak_q, p, q), own = fields[:_SHARED], fields[_SHARED:]
    first = PairState(peak_p, peak_q, p, q, *own[:3])
    return [first, PairState(peak_q, peak_p, q, p, *own[3:])] if own[3:] else [first]


def merge(a: PairState, b: PairState, inverse_temperature: Array | None = None) -> PairState:
    """The state of two parts of the classes together."""
    peaks = jnp.maximum(a.peak_p, b.peak_p), jnp.maximum(a.peak_q, b.peak_q)
    below = (_below(peaks, part, inverse_temperature) for part in (a, b))
    return PairState(*peaks, *map(jnp.add, *below))


def _over_names(
    state: PairState, inverse_temperature: Array | None, names: tuple[str, ...]
) -> PairState:
    """The state of all shards: one maximum and one sum over the mesh."""
    peaks = tuple(lax.pmax(jnp.stack(state[:2]), names))
    return PairState(*peaks, *lax.psum(jnp.stack(_below(peaks, state, inverse_temperature)), names))


def _below(
    peaks: tuple[Array, Array], part: PairState, inverse_temperature: Array | None
) -> tuple[Array, ...]:
    """The sums of a part, relative to the peaks of the whole."""
    scaled = lambda x: x if inverse_temperature is None else x * inverse_temperature  # noqa: E731
    peak_p, peak_q = peaks
    below_p, below_q = part.peak_p - peak_p, part.peak_q - peak_q
    by_p, by_q = jnp.exp(scaled(below_p)), jnp.exp(scaled(below_q))
    p, q = by_p * part.p, by_q * part.q
    # Where the peaks are near each other logits of close sides differ exactly; else what stands
    # below them does.
    shift = peak_q - peak_p
    exact = (part.peak_q - part.peak_p) - shift
    step = jnp.where(jnp.abs(shift) < NEAR_PEAKS, exact, below_q - below_p)
    x = scaled(step)
    textbook = by_p * (part.textbook - step * scaled(part.p))
    excess = expm1_minus(x, _NEAR_STEP)
    near = by_p * (part.gap + (part.q * excess + x * (part.gap - part.textbook)))
    gap = jnp.where(x * x < _NEAR_STEP**2, near, textbook + (q - p))
    return p, q, textbook, gap, part.lost
