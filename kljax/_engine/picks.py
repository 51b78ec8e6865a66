"""A few classes of a softmax, and the mass of all others: from one pass over the logits.

To a logit outside the few, the gradient is a number of its row times its probability: that is one
more pass, and then the few are set.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from kljax._engine import linear, states
from kljax._engine.states import RowState, row_state


class Few(NamedTuple):
    """Which classes are picked, on the last axis. Nothing here has a derivative."""

    numbers: Array  # batch + (k,); one past the last for none
    taken: Array  # of the classes that are held here, whether each is picked
    names: tuple[str, ...]  # the mapped axes over which the classes are spread

    @classmethod
    def among(cls, numbers: Array, valid: Array, classes: int, names: tuple[str, ...]) -> "Few":
        """Of so many classes that are held here."""
        few = cls(numbers, jnp.zeros((*numbers.shape[:-1], classes), bool), names)
        few = few._replace(
            numbers=jnp.where(valid & (numbers < few.all_classes), numbers, few.all_classes)
        )
        places, here = few.places()
        return few._replace(taken=marked(jnp.where(here, places, classes), classes))

    @property
    def all_classes(self) -> int:
        """How many there are, on all shards together."""
        return self.taken.shape[-1] * lax.axis_size(self.names)

    def places(self) -> tuple[Array, Array]:
        """Where to look among the classes that are held here, and whether one is there."""
        size = self.taken.shape[-1]
        first = lax.axis_index(self.names).astype(self.numbers.dtype) * size if self.names else 0
        places = self.numbers - first
        return places, (places >= 0) & (places < size)

    def of(self, x: Array) -> Array:
        """Those entries of x, wherever they are held; 0 for none."""
        places, here = self.places()
        found = jnp.take_along_axis(x, jnp.where(here, places, 0), axis=-1)
        found = jnp.where(here, found, 0)
        return lax.psum(found, self.names) if self.names else found

    def put(self, x: Array, values: Array) -> Array:
        """x with those entries set, in place where x is not needed any more."""
        places, here = self.places()
        beyond = x.shape[-1] + jnp.arange(places.shape[-1], dtype=places.dtype)
        put = _put
        for _ in x.shape[:-1]:  # mapped, not scattered with numbers of the batch: it stays spread
            put = jax.vmap(put)
        return put(x, jnp.where(here, places, beyond), values.astype(x.dtype))


def marked(places: Array, classes: int) -> Array:
    """Whether each class is among the places; those past the end are dropped."""

    def one(places: Array) -> Array:
        return jnp.zeros(classes, bool).at[places].set(True, mode="drop")

    for _ in places.shape[:-1]:  # mapped, as in `put`
        one = jax.vmap(one)
    return one(places)


def _put(x: Array, places: Array, values: Array) -> Array:
    return x.at[places].set(values, mode="drop", unique_indices=True)


class Picked(NamedTuple):
    """Log-probabilities."""

    few: Array
    rest: Array  # of all other classes together


class _States(NamedTuple):
    rest: RowState
    whole: RowState


def picked(
    logits: Array, inverse_temperature: Array | None, few: Few, live: Array | None = None
) -> Picked:
    """The log-probabilities of a few classes, and of all others together.

    Args:
        logits: On the shape of ``few.taken``.
        inverse_temperature: One for all, or with the axis of the classes kept.
        few: Which classes.
        live: The rows that count; none of the others has a gradient if it is not all finite.
    """
    names, arrays = few.names, few[:2]
    return _picked(names, logits, inverse_temperature, arrays, live)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _picked(names: Any, logits: Array, inverse: Array | None, arrays: Any, live: Any) -> Picked:
    few = Few(arrays[0], arrays[1], names)
    return _from_states(logits, inverse, few, _states(logits, inverse, few))


@_picked.defjvp
def _picked_jvp(names: Any, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    logits, inverse, arrays, live = primals
    logits_dot, inverse_dot, *_ = tangents
    few = Few(arrays[0], arrays[1], names)
    out = _picked(names, logits, inverse, arrays, live)
    residuals = (logits, inverse, arrays, live, _states(logits, inverse, few))
    dot = linear.call(_along(names), residuals, logits_dot)
    if inverse is not None:
        by_temperature = lambda inverse: _plain(logits, inverse, few)  # noqa: E731
        more = jax.jvp(by_temperature, (inverse,), (inverse_dot,))[1]
        dot = jax.tree.map(jnp.add, dot, more)
    return out, dot


def _states(logits: Array, inverse: Array | None, few: Few) -> _States:
    dtype = jnp.dtype("float64" if logits.dtype == jnp.float64 else "float32")
    outside = jnp.where(few.taken, jnp.array(-jnp.inf, logits.dtype), logits)
    rest = row_state(outside, inverse, (logits.ndim - 1,), dtype, few.names)
    inside = few.of(logits).astype(dtype)
    none = (few.numbers >= few.all_classes) | jnp.isneginf(inside)
    inside = jnp.where(none, jnp.finfo(dtype).min, inside)
    peak = lax.stop_gradient(jnp.max(inside, axis=-1, keepdims=True))
    masses = jnp.where(none, 0, jnp.exp(_scaled(jnp.where(none, 0, inside - peak), inverse)))
    best = RowState(peak, jnp.sum(masses, axis=-1, keepdims=True))
    return _States(rest, states.merge(rest, best, inverse))


def _from_states(logits: Array, inverse: Array | None, few: Few, of: _States) -> Picked:
    peak, log_mass = of.whole.peak, jnp.log(of.whole.mass)
    inside = _scaled(few.of(logits).astype(peak.dtype) - peak, inverse) - log_mass
    some = of.rest.mass > 0
    log_rest = jnp.log(jnp.where(some, of.rest.mass, 1)) - log_mass
    rest = jnp.where(some, _scaled(of.rest.peak - peak, inverse) + log_rest, -jnp.inf)
    # Of a row that holds NaN outside, some is False.
    return Picked(inside, jnp.where(jnp.isnan(log_mass), jnp.nan, rest)[..., 0])


def _scaled(x: Array, inverse: Array | None) -> Array:
    return x if inverse is None else states.scale(x, inverse)


def _along(names: tuple[str, ...]) -> linear.Map:
    """The derivative: from a step of the logits to those of what is picked, and back."""

    def apply(residuals: Any, step: Array) -> Picked:
        logits, inverse, arrays, _, of = residuals
        few = Few(arrays[0], arrays[1], names)
        step = _scaled(step.astype(of.whole.mass.dtype), inverse)
        total = lambda x: jnp.sum(x, axis=-1, keepdims=True)  # noqa: E731
        along = [total(_softmax(logits, inverse, state) * step) for state in (of.whole,)]
        outside = jnp.where(few.taken, 0, _softmax(logits, inverse, of.rest) * step)
        along = jnp.concatenate([*along, total(outside)], axis=-1)
        along = lax.psum(along, names) if names else along
        return Picked(few.of(step) - along[..., :1], along[..., 1] - along[..., 0])

    def transpose(residuals: Any, ct: Picked) -> Array:
        logits, inverse, arrays, live, of = residuals
        few = Few(arrays[0], arrays[1], names)
        to_rest = ct.rest[..., None]
        total = jnp.sum(ct.few, axis=-1, keepdims=True) + to_rest
        whole = _softmax(logits, inverse, of.whole)
        outside = to_rest * _softmax(logits, inverse, of.rest) - total * whole
        inside = _scaled(few.of(logits).astype(whole.dtype) - of.whole.peak, inverse)
        inside = ct.few - total * jnp.exp(inside) / of.whole.mass
        outside, inside = _scaled(outside, inverse), _scaled(inside, inverse)
        if live is not None:  # a row without a gradient has none at any class
            there = (live != 0)[..., None] | jnp.isfinite(of.whole.mass)
            outside, inside = (jnp.where(there, x, 0) for x in (outside, inside))
        return few.put(outside.astype(logits.dtype), inside)

    def plainly(residuals: Any) -> Any:
        logits, inverse, arrays, *_ = residuals
        return lambda logits: _plain(logits, inverse, Few(arrays[0], arrays[1], names)), logits

    def plain_apply(residuals: Any, step: Array) -> Picked:
        f, logits = plainly(residuals)
        return jax.jvp(f, (logits,), (step,))[1]

    def plain_transpose(residuals: Any, ct: Picked) -> Array:
        f, logits = plainly(residuals)
        return jax.vjp(f, logits)[1](ct)[0]

    return linear.Map(apply, transpose, linear.Map(plain_apply, plain_transpose))


def _softmax(logits: Array, inverse: Array | None, state: RowState) -> Array:
    """Of the classes that the state is of; what stands above its peak is none of them."""
    scores = _scaled(jnp.minimum(logits.astype(state.peak.dtype) - state.peak, 0), inverse)
    mass = jnp.where(state.mass == 0, 1, state.mass)
    return jnp.exp(scores) / mass


def _plain(logits: Array, inverse: Array | None, few: Few) -> Picked:
    """The same in a form to differentiate."""
    of = _states(logits, inverse, few)
    return _from_states(logits, inverse, few, of)
