"""What is reported of values, under checkify only: it costs nothing otherwise."""

import jax.numpy as jnp
from jax import Array
from jax.experimental.checkify import debug_check

# Sums of 16-bit probabilities are this far off; a real mistake is further.
_SLACK = 0.02


def check_distribution(
    which: str,
    kind: str,
    x: Array,
    counted: Array | None,
    axis: tuple[int, ...],
    *,
    bare: bool,
    exact: bool,
) -> None:
    """Report values that cannot be what their type says; `counted` are those with an effect."""
    counted = jnp.broadcast_to(True if counted is None else counted, x.shape)
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    debug_check(~jnp.any(jnp.isnan(x) & counted), f"{which} hold NaN")
    if kind == "logits":
        if bare:
            message = f"{which} look like probabilities (all in [0, 1], rows sum to 1); "
            debug_check(~_are_probabilities(x, counted, axis), message + "wrap them in Probs")
        return
    held, probs = ("probabilities", x) if kind == "probs" else ("log-probabilities", jnp.exp(x))
    sign = "negative" if kind == "probs" else "positive"
    bound = x >= 0 if kind == "probs" else x <= _SLACK
    remedy = "Logits are what need not be normalised"
    debug_check(jnp.all(bound | ~counted), f"{which} hold {sign} {held}; {remedy}")
    if exact:
        off = _off_from_one(probs, counted, axis)
        message = f"{which} hold {held} that do not sum to 1, but are {{off}} off; {remedy}"
        debug_check(off <= _SLACK, message, off=off)


def _are_probabilities(x: Array, counted: Array, axis: tuple[int, ...]) -> Array:
    inside = jnp.all(((x >= 0) & (x <= 1)) | ~counted)
    several = jnp.any(jnp.sum(counted, axis=axis) > 1)  # a single class may well hold a 1
    return inside & (_off_from_one(x, counted, axis) < 1e-3) & several


def _off_from_one(probs: Array, counted: Array, axis: tuple[int, ...]) -> Array:
    """How far the worst row that counts is from summing to 1."""
    total = jnp.sum(jnp.where(counted, probs, 0), axis=axis)
    return jnp.max(jnp.where(jnp.any(counted, axis=axis), jnp.abs(total - 1), 0), initial=0)


def check_labels(caller: str, labels: Array, live: Array | None, classes: int) -> None:
    valid = (labels >= 0) & (labels < classes)
    message = f"{caller}: labels must be in [0, {classes}); give other examples the weight 0"
    debug_check(jnp.all(valid if live is None else valid | ~live), message)


def check_top_k(
    which: str, indices: Array, log_probs: Array, live: Array | None, classes: int
) -> None:
    """Report a cache of something else than log-probabilities of classes."""
    counted = ~jnp.isneginf(log_probs)
    if live is not None:
        counted &= live
    log_probs = log_probs if log_probs.dtype == jnp.float64 else log_probs.astype(jnp.float32)
    inside = (indices >= 0) & (indices < classes)
    debug_check(jnp.all(inside | ~counted), f"{which}: indices must be in [0, {classes})")
    debug_check(~jnp.any(jnp.isnan(log_probs) & counted), f"{which} hold NaN")


def check_weights(caller: str, argument: str, weights: Array | None) -> None:
    if weights is not None and weights.dtype != bool:
        message = f"{caller}: {argument} must not be negative or NaN"
        debug_check(jnp.all(weights >= 0), message)


def check_temperature(caller: str, temperature: Array | None) -> None:
    if temperature is not None:
        message = f"{caller}: temperature must be positive; got {{temperature}}"
        debug_check(temperature > 0, message, temperature=temperature)
