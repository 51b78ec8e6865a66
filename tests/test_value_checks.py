"""Checks of values: loud where they were asked for."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import report

import kljax

LOGITS = jnp.array([[1.0, 2.0, -1.0], [0.3, 0.2, 4.0]])
PROBS = jax.nn.softmax(LOGITS)
LOG_PROBS = jax.nn.log_softmax(LOGITS)


def traced(f, value):
    """Call f with a number that it cannot read while tracing."""
    return jax.jit(f)(value)


REPORTED = {
    "bare probabilities": (
        lambda: kljax.forward_kl(PROBS, LOGITS),
        "forward_kl: predictions look like probabilities (all in [0, 1], rows sum to 1); "
        "wrap them in Probs, or pass their log",
    ),
    "bare target probabilities": (
        lambda: kljax.forward_kl(LOGITS, PROBS),
        "forward_kl: targets look like probabilities",
    ),
    "bare 16-bit probabilities": (
        lambda: kljax.forward_kl(jnp.full((2, 4), 0.25, jnp.bfloat16), jnp.ones((2, 4))),
        "predictions look like probabilities",
    ),
    "distillation": (
        lambda: kljax.distillation_loss(PROBS, LOGITS),
        "predictions look like probabilities",
    ),
    "negative probabilities": (
        lambda: kljax.kl(kljax.Probs([1.5, -0.5]), kljax.Probs([0.5, 0.5])),
        "kl: p hold negative probabilities",
    ),
    "unnormalised probabilities": (
        lambda: kljax.kl(kljax.Probs([0.5, 0.5]), kljax.Probs([0.5, 0.25])),
        "kl: q hold probabilities that do not sum to 1, but are 0.25 off",
    ),
    "probabilities as log-probabilities": (
        lambda: kljax.entropy(kljax.LogProbs(PROBS)),
        "entropy: p hold positive log-probabilities",
    ),
    "logits as log-probabilities": (
        lambda: kljax.entropy(kljax.LogProbs(LOGITS - 5)),
        "entropy: p hold log-probabilities that do not sum to 1",
    ),
    "NaN in hidden states": (
        lambda: kljax.entropy(kljax.Head(LOGITS.at[0, 0].set(jnp.nan), jnp.ones((3, 5)))),
        "entropy: p.hidden hold NaN",
    ),
    "NaN in a kernel": (
        lambda: kljax.kl(kljax.Head(LOGITS, jnp.full((3, 3), jnp.nan)), LOGITS),
        "kl: p.kernel hold NaN",
    ),
    "probabilities to take the best of": (
        lambda: kljax.top_k(PROBS, 2),
        "top_k: logits look like probabilities (all in [0, 1], rows sum to 1); "
        "wrap them in Probs, or pass their log",
    ),
    "NaN": (lambda: kljax.entropy(LOGITS.at[0, 0].set(jnp.nan)), "entropy: p hold NaN"),
    "negative weights": (
        lambda: kljax.forward_kl(LOGITS, LOGITS, weights=jnp.array([1.0, -1.0])),
        "forward_kl: weights must not be negative or NaN",
    ),
    "negative weights of reduce": (
        lambda: kljax.reduce(jnp.ones(2), weights=jnp.array([1, -1])),
        "reduce: weights must not be negative or NaN",
    ),
    "label out of range": (
        lambda: kljax.cross_entropy(LOGITS, jnp.array([0, 3])),
        "cross_entropy: labels must be in [0, 3)",
    ),
    "negative label": (
        lambda: kljax.distillation_loss(LOGITS, LOGITS, jnp.array([0, -1]), hard_weight=1.0),
        "labels must be in [0, 3)",
    ),
    "traced temperature": (
        lambda: traced(lambda t: kljax.forward_kl(LOGITS, LOGITS, temperature=t), 0.0),
        "forward_kl: temperature must be positive; got 0.0",
    ),
    "traced beta": (
        lambda: traced(lambda b: kljax.jensen_shannon(LOGITS, LOGITS, beta=b), 1.5),
        "jensen_shannon: beta must be in [0, 1]; got 1.5",
    ),
}


@pytest.mark.parametrize("case", REPORTED)
def test_reported(case):
    """The mistake is named, with the remedy, however the function is transformed."""
    call, message = REPORTED[case]
    assert message in report(call)
    assert message in report(jax.jit(call))


ACCEPTED = {
    "logits": lambda: kljax.forward_kl(LOGITS, -LOGITS),
    "logits that happen to be probabilities": lambda: kljax.entropy(kljax.Logits(PROBS)),
    "probabilities": lambda: kljax.forward_kl(kljax.Probs(PROBS), kljax.Probs(PROBS[::-1])),
    "log-probabilities": lambda: kljax.entropy(kljax.LogProbs(LOG_PROBS)),
    "16-bit probabilities": lambda: kljax.entropy(kljax.Probs(PROBS.astype(jnp.bfloat16))),
    "16-bit log-probabilities": lambda: kljax.entropy(
        kljax.LogProbs(jax.nn.log_softmax(jnp.linspace(-5, 5, 4096)).astype(jnp.bfloat16))
    ),
    "-inf": lambda: kljax.forward_kl(LOGITS, LOGITS.at[0, 0].set(-jnp.inf)),
    "unnormalised, with a temperature": lambda: kljax.entropy(
        kljax.Probs(2 * PROBS), temperature=2.0
    ),
    "NaN in an example of weight 0": lambda: kljax.forward_kl(
        LOGITS.at[0].set(jnp.nan), LOGITS, weights=jnp.array([0.0, 1.0])
    ),
    "NaN of a head where nothing counts": lambda: kljax.entropy(
        kljax.Head(LOGITS.at[0].set(jnp.nan), jnp.ones((3, 4)).at[:, 1].set(jnp.nan)),
        weights=jnp.array([0.0, 1.0]),
        where=jnp.arange(4) != 1,
    ),
    "NaN of a head where no example counts": lambda: kljax.entropy(
        kljax.Head(LOGITS[0] * jnp.nan, jnp.full((3, 4), jnp.nan)), weights=jnp.float32(0)
    ),
    "NaN of a class that exists for an example of weight 0": lambda: kljax.entropy(
        kljax.Head(LOGITS, jnp.ones((4, 3)).at[1].set(jnp.nan), transposed=True),
        where=jnp.array([[True] * 4, [True, False, True, True]]),
        weights=jnp.array([0.0, 1.0]),
    ),
    "masked classes": lambda: kljax.entropy(
        kljax.Probs(jnp.array([0.5, 0.5, jnp.nan])), where=jnp.array([True, True, False])
    ),
    "a label of weight 0": lambda: kljax.cross_entropy(
        LOGITS, jnp.array([-100, 1]), weights=jnp.array([False, True])
    ),
    "a fully masked row": lambda: kljax.entropy(
        kljax.Probs(PROBS), where=jnp.array([[False] * 3, [True] * 3])
    ),
    "a single class": lambda: kljax.entropy(jnp.ones((3, 1))),
    "nothing that counts": lambda: kljax.entropy(PROBS, weights=jnp.zeros(2)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case):
    """What is right, or has no effect, is not reported."""
    assert report(ACCEPTED[case]) is None


def test_reported_through_transforms():
    """Under grad, vmap and scan the checks still stand."""
    loss = lambda x: kljax.forward_kl(x, LOGITS, reduction="mean")  # noqa: E731
    assert "look like" in report(jax.value_and_grad(loss), PROBS)
    assert "look like" in report(jax.vmap(lambda x: kljax.entropy(x)), PROBS)
    step = lambda carry, x: (carry + kljax.entropy(x), None)  # noqa: E731
    assert "look like" in report(lambda x: jax.lax.scan(step, jnp.zeros(()), x), PROBS)


@pytest.mark.parametrize("case", REPORTED)
def test_checked_raises(case):
    """The function is called as it is; the mistake is a ValueError."""
    call, message = REPORTED[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        kljax.checked(call)()


def test_checked_returns_what_the_function_returns():
    """Static options, pytrees and warm functions pass through, and the checks end with the call."""
    loss = jax.jit(partial(kljax.forward_kl, reduction="mean"))
    want = loss(LOGITS, kljax.Probs(PROBS))
    assert kljax.checked(loss)(LOGITS, kljax.Probs(PROBS)) == want
    assert kljax.checked(kljax.forward_kl)(LOGITS, kljax.Probs(PROBS), reduction="mean") == want
    with pytest.raises(ValueError, match="targets hold negative probabilities"):
        kljax.checked(loss)(LOGITS, kljax.Probs(-PROBS))
    loss(LOGITS, kljax.Probs(-PROBS))


def test_checked_stands_outermost():
    with pytest.raises(ValueError, match="checked: arguments must be known values"):
        jax.jit(kljax.checked(kljax.entropy))(LOGITS)


def test_value_checks_want_checkify():
    """JAX itself says so."""
    with pytest.raises(ValueError, match="not functionalized"), kljax.value_checks():
        jax.jit(kljax.entropy)(LOGITS)


def test_without_checkify_values_pass_by_their_rule():
    """Nothing raises, nothing is clamped: the documented rules answer."""
    assert np.isnan(kljax.entropy(kljax.Probs([1.5, -0.5])))
    assert np.isnan(kljax.cross_entropy(LOGITS[0], jnp.array(7)))
