"""What is reported of values: on demand only, and otherwise nothing of it is in a program."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import checkify
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax._engine.classes import Classes, Layout

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Part of the key of jit's cache: what was traced without the checks never serves a call with them.
_reporting = jax.make_user_context(default_value=False)

# Sums of 16-bit probabilities are this far off; a real mistake is further.
_SLACK = 0.02


@contextmanager
def value_checks() -> Generator[None, None, None]:
    """Turn the value checks on for whatever is traced inside.

    For those who call ``checkify`` themselves, with ``errors=checkify.user_checks``; `checked`
    does both. What is traced inside but not by ``checkify`` JAX refuses to run, "Cannot abstractly
    evaluate a checkify.check which was not functionalized". Outside no check is in any program.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> from jax.experimental import checkify
        >>> entropy = checkify.checkify(kljax.entropy, errors=checkify.user_checks)
        >>> with kljax.value_checks():
        ...     error, _ = entropy(jnp.ones(2) / 2)
        >>> print(error.get().split(";")[0])
        entropy: p look like probabilities (all in [0, 1], rows sum to 1)
    """
    with _reporting(True):
        yield


def are_asked_for() -> bool:
    return bool(_reporting.value)


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The same function, run with every value check: a ValueError tells the first mistake.

    For finding out what is wrong, not for training: the function is traced anew at each call.
    It stands outermost, ``checked(jit(f))`` and ``checked(grad(f))``; under another transform the
    values are not known. With Flax NNX check the loss of a batch rather than a train step, whose
    changes to modules would be lost.

    Reported are probabilities that are negative or do not sum to 1, log-probabilities that are
    positive or do not normalise, bare arrays that look like probabilities, indices and labels out
    of range, negative weights, temperatures and shares out of range, and NaN; not where a mask or
    a weight of 0 hides it.

    Args:
        function: Of arrays, pytrees of them, and static options; its result likewise.

    Raises:
        ValueError: With the mistake and the remedy.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> try:
        ...     kljax.checked(kljax.entropy)(kljax.Probs(jnp.array([0.5, 0.25])))
        ... except ValueError as error:
        ...     print(str(error).split(";")[0])
        entropy: p hold probabilities that do not sum to 1, but are 0.25 off
    """

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        leaves, tree = jax.tree.flatten((args, kwargs))
        checks.require_known("checked", leaves)
        arrays = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Array | np.ndarray)]

        def call(moved: list[Array]) -> Any:
            whole = list(leaves)
            for i, leaf in zip(arrays, moved, strict=True):
                whole[i] = leaf
            args, kwargs = jax.tree.unflatten(tree, whole)
            return function(*args, **kwargs)

        with value_checks():
            reporting = checkify.checkify(call, errors=checkify.user_checks)
            error, result = reporting([leaves[i] for i in arrays])
        checks.require_no_report(error.get())
        return result

    return run


def _on_demand(check: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """A check that does nothing at all unless the checks were asked for."""

    @wraps(check)
    def only_if_asked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        if are_asked_for():
            check(*args, **kwargs)

    return only_if_asked


@_on_demand
def check_logits(which: str, logits: Array, classes: Classes, *, bare: bool = False) -> None:
    """Report NaN, and bare arrays that may have been meant as probabilities."""
    logits = _checked_for_nan(which, logits, classes)
    if bare:
        inside = _all((logits >= 0) & (logits <= 1), classes)
        several = jnp.any(classes.sum(_exist(classes, logits)) > 1)  # a single one may well be 1
        close = _off_from_one(logits, classes) < 1e-3
        message = f"{which} look like probabilities (all in [0, 1], rows sum to 1); "
        checkify.check(
            ~(inside & close & several), message + "wrap them in Probs, or pass their log"
        )


@_on_demand
def check_head(which: str, parts: dict[str, tuple[Any, Array]]) -> None:
    """Report NaN in what logits are made of, where that counts."""
    for part, (x, counts) in parts.items():
        if x is not None:
            checkify.check(~jnp.any(jnp.isnan(x) & counts), f"{which}.{part} hold NaN")


@_on_demand
def check_log_probs(which: str, log_probs: Array, classes: Classes, *, exact: bool) -> None:
    log_probs = _checked_for_nan(which, log_probs, classes)
    message = f"{which} hold positive log-probabilities; {_NOT_NORMALISED}"
    checkify.check(_all(log_probs <= _SLACK, classes), message)
    if exact:
        _check_sum(which, "log-probabilities", jnp.exp(log_probs), classes)


@_on_demand
def check_probs(which: str, probs: Array, classes: Classes, *, exact: bool) -> None:
    probs = _checked_for_nan(which, probs, classes)
    message = f"{which} hold negative probabilities; {_NOT_NORMALISED}"
    checkify.check(_all(probs >= 0, classes), message)
    if exact:
        _check_sum(which, "probabilities", probs, classes)


_NOT_NORMALISED = "Logits are what need not be normalised"


def _checked_for_nan(which: str, x: Array, classes: Classes) -> Array:
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    checkify.check(_all(~jnp.isnan(x), classes), f"{which} hold NaN")
    return x


def _check_sum(which: str, held: str, probs: Array, classes: Classes) -> None:
    off = _off_from_one(probs, classes)
    message = (
        f"{which} hold {held} that do not sum to 1, but are {{off:.3g}} off; {_NOT_NORMALISED}"
    )
    checkify.check(off <= _SLACK, message, off=off)


def _all(holds: Array, classes: Classes) -> Array:
    """Whether something holds at every class that counts."""
    return ~jnp.any(classes.any(_exist(classes, holds) & ~holds))


def _exist(classes: Classes, like: Array) -> Array:
    return jnp.broadcast_to(True if classes.where is None else classes.where, like.shape)


def _off_from_one(probs: Array, classes: Classes) -> Array:
    """How far the worst row that counts is from summing to 1."""
    off = jnp.abs(classes.sum(classes.present(probs)) - 1)
    return jnp.max(jnp.where(classes.any(_exist(classes, probs)), off, 0), initial=0)


@_on_demand
def check_labels(which: str, labels: Array, live: Array | None, layout: Layout) -> None:
    count = layout.classes[0] * (lax.axis_size(layout.names) if layout.names else 1)
    valid = (labels >= 0) & (labels < count)
    message = f"{which} must be in [0, {count}); give other examples the weight 0"
    checkify.check(jnp.all(valid if live is None else valid | ~live), message)


@_on_demand
def check_top_k(
    which: str,
    indices: ArrayLike,
    log_probs: ArrayLike,
    log_tail: ArrayLike | None,
    tail: str,
    live: Array | None,
    classes: int,
) -> None:
    """Report a cache of something else than log-probabilities of classes."""
    indices, log_probs = jnp.asarray(indices), jnp.asarray(log_probs)
    counted = ~jnp.isneginf(log_probs)
    if live is not None:
        counted &= live[..., None]
    log_probs = log_probs if log_probs.dtype == jnp.float64 else log_probs.astype(jnp.float32)
    inside = (indices >= 0) & (indices < classes)
    checkify.check(
        jnp.all(inside | ~counted),
        f"{which}: indices must be in [0, {classes}), the classes that the predictions have",
    )
    checkify.check(~jnp.any(jnp.isnan(log_probs) & counted), f"{which} hold NaN")
    ordered = jnp.sort(jnp.where(counted, indices, -1), axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    message = f"{which}: indices must be distinct; pad with a log-probability of -inf"
    checkify.check(~jnp.any(twice), message)
    if tail == "truncate":  # a sample's weights are no probabilities
        return
    mass = jnp.sum(jnp.where(counted, jnp.exp(log_probs), 0), axis=-1)
    known = jnp.any(counted, axis=-1)
    if log_tail is not None:
        mass = mass + jnp.exp(jnp.asarray(log_tail).astype(mass.dtype))
    off = jnp.abs(mass - 1) if log_tail is not None else jnp.maximum(mass - 1, 0)
    off = jnp.max(jnp.where(known, off, 0), initial=0)
    message = f"{which} hold log-probabilities of more or less than 1 together, {{off}} off"
    checkify.check(off <= _SLACK, message, off=off)


@_on_demand
def check_weights(caller: str, argument: str, weights: Array | None) -> None:
    if weights is not None and weights.dtype != bool:
        message = f"{caller}: {argument} must not be negative or NaN"
        checkify.check(jnp.all(weights >= 0), message)


Condition = Literal["real", "positive", "not negative", "a probability"]
_HOLDS: dict[str, Callable[[Array], Array]] = {
    "real": lambda x: ~jnp.isnan(x),
    "positive": lambda x: x > 0,
    "not negative": lambda x: x >= 0,
    "a probability": lambda x: (x >= 0) & (x <= 1),
}


@_on_demand
def check_parameter(which: str, x: Array, condition: Condition) -> None:
    checkify.check(jnp.all(_HOLDS[condition](x)), f"{which} must be {condition}")


@_on_demand
def check_same_counts(which: str, one: Array, other: Array) -> None:
    message = f"{which}: total_count must not be less than the other's; the sum has no closed form"
    checkify.check(jnp.all(one >= other), message)


@_on_demand
def check_temperature(caller: str, temperature: Array | None) -> None:
    if temperature is not None:
        message = f"{caller}: temperature must be positive; got {{temperature}}"
        checkify.check(jnp.all(temperature > 0), message, temperature=jnp.min(temperature))


@_on_demand
def check_fraction(caller: str, argument: str, value: Array) -> None:
    message = f"{caller}: {argument} must be in [0, 1]; got {{value}}"
    checkify.check((value >= 0) & (value <= 1), message, value=value)


@_on_demand
def check_same_temperature(caller: str, taken_at: ArrayLike, given: ArrayLike) -> None:
    one, other = (jnp.asarray(x).astype(jnp.float32) for x in (taken_at, given))
    message = f"{caller}: temperature must be what the top-k was taken at, {{one}}; got {{other}}"
    checkify.check(jnp.all(one == other), message, one=one, other=other)
