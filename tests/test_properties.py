"""The algebra of divergences, over drawn inputs.

Shapes are few and fixed, so that every property of a divergence runs the same compiled function.
Logits are drawn on a grid of 1/8 where a property is to hold exactly in float32.
"""

from functools import partial

import jax
import numpy as np
import oracle
import pytest
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import kljax
from kljax import LogProbs, Probs

SHAPE = (3, 5)
DIVERGENCES = {
    "forward_kl": kljax.forward_kl,
    "reverse_kl": kljax.reverse_kl,
    "kl": kljax.kl,
    "jeffreys": kljax.jeffreys,
    "jensen_shannon": kljax.jensen_shannon,
    "jensen_shannon_normalized": partial(kljax.jensen_shannon, beta=0.3, normalized=True),
    "skew_forward_kl": kljax.skew_forward_kl,
    "skew_reverse_kl": kljax.skew_reverse_kl,
}
ORACLES = {name: partial(oracle.divergence, name) for name in oracle.DIVERGENCES} | {
    "jensen_shannon_normalized": partial(
        oracle.divergence, "jensen_shannon", beta=0.3, normalized=True
    )
}
LEADING = ["forward_kl", "skew_reverse_kl"]  # where one of each kind is enough

few = settings(derandomize=True, max_examples=20, deadline=None, database=None)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)
some_divergences = pytest.mark.parametrize("name", LEADING)


def grid(low, high, shape=SHAPE):
    """Draw float32 multiples of 1/8: sums of a few of them are exact."""
    whole = arrays(np.int32, shape, elements=st.integers(8 * low, 8 * high))
    return whole.map(lambda x: (x / 8).astype(np.float32))


logits = grid(-12, 12)
weights = arrays(np.float32, SHAPE[:1], elements=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
masks = arrays(np.bool_, SHAPE[1:], elements=st.booleans())
permutations = st.permutations(range(SHAPE[1])).map(np.array)


@partial(jax.jit, static_argnums=0)
def values(name, s, t):
    return DIVERGENCES[name](s, t)


@partial(jax.jit, static_argnums=0)
def weighted(name, s, t, where, weights):
    """Return the weighted sum over allowed classes, and its gradients to both sides."""

    def loss(s, t):
        return DIVERGENCES[name](s, t, where=where, weights=weights, reduction="sum")

    return jax.value_and_grad(loss, (0, 1))(s, t)


@partial(jax.jit, static_argnums=0)
def warmed(name, s, t, temperature):
    return DIVERGENCES[name](s, t, temperature=temperature)


# --- divergences are divergences ---


@every_divergence
@given(s=logits, t=logits)
@few
def test_a_divergence_is_not_negative_and_equals_the_oracle(name, s, t):
    """D ≥ 0, to the last bit, and has the oracle's value."""
    got = np.asarray(values(name, s, t))
    assert (got >= 0).all()
    assert_close(got, ORACLES[name](s, t))


@pytest.mark.slow
@every_divergence
@given(s=logits)
@few
def test_a_divergence_from_itself_is_exactly_zero(name, s):
    """D(p, p) = 0, not merely nearly, and so is its gradient to both sides."""
    np.testing.assert_array_equal(values(name, s, s), np.zeros(3))
    every = (np.ones(5, bool), np.ones(3, np.float32))
    for grad in weighted(name, s, s, *every)[1]:
        assert_close(grad, np.zeros(SHAPE))


@every_divergence
@given(s=logits, t=logits, shifts=grid(-64, 64, (2, 3, 1)))
@few
def test_logits_may_be_shifted(name, s, t, shifts):
    """A constant added to all logits of a row changes nothing."""
    assert_close(values(name, s + shifts[0], t + shifts[1]), values(name, s, t))


@every_divergence
@given(s=logits, t=logits, order=permutations)
@few
def test_classes_may_be_permuted(name, s, t, order):
    """The order of the classes changes nothing."""
    assert_close(values(name, s[:, order], t[:, order]), values(name, s, t))


@pytest.mark.parametrize("name", ["jeffreys", "jensen_shannon"])
@given(s=logits, t=logits)
@few
def test_symmetric_divergences_are_symmetric(name, s, t):
    """Jeffreys and Jensen-Shannon do not tell predictions from targets."""
    assert_close(values(name, s, t), values(name, t, s))


# --- one divergence from another ---


@given(s=logits, t=logits)
@few
def test_forward_reverse_and_kl_are_one_function(s, t):
    """Forward KL is reverse KL with the sides exchanged, and kl follows the formula's order."""
    forward = values("forward_kl", s, t)
    assert_close(values("reverse_kl", t, s), forward)
    assert_close(values("kl", t, s), forward)


@given(s=logits, t=logits)
@few
def test_jeffreys_is_forward_plus_reverse(s, t):
    """J = D(t‖s) + D(s‖t)."""
    parts = np.asarray(values("forward_kl", s, t)) + np.asarray(values("reverse_kl", s, t))
    assert_close(values("jeffreys", s, t), parts)


@pytest.mark.slow
@given(s=logits, t=logits)
@few
def test_cross_entropy_is_entropy_plus_forward_kl(s, t):
    """H(t, s) = H(t) + D(t‖s), and between equals the divergence vanishes."""
    entropy = jax.jit(kljax.entropy)
    cross = jax.jit(lambda s, t: kljax.cross_entropy(s, kljax.Logits(t)))
    total = np.asarray(entropy(t)) + np.asarray(values("forward_kl", s, t))
    assert_close(cross(s, t), total)
    assert_close(cross(t, t), entropy(t))


@given(s=logits, t=logits, beta=st.integers(0, 64).map(lambda n: np.float32(n / 64)))
@few
def test_jensen_shannon_has_bounds(s, t, beta):
    """0 ≤ J ≤ the entropy of (β, 1 - β), which is log 2 at ½ and 0 at the ends."""
    jensen_shannon = jax.jit(kljax.jensen_shannon)
    b = np.clip(np.float64(beta), 1e-30, 1)
    bound = -b * np.log(b) - (1 - b) * np.log(np.clip(1 - b, 1e-30, 1))
    got = np.asarray(jensen_shannon(s, t, beta=beta))
    assert (got >= 0).all()
    assert (got <= bound * (1 + 2e-6)).all()
    assert_close(jensen_shannon(t, s, beta=1 - beta), got)


@given(s=logits, t=logits)
@few
def test_normalized_jensen_shannon_reaches_its_limits(s, t):
    """It is forward KL at β = 0, reverse KL at 1, 4 times the unnormalised at ½, and continuous."""

    forward, reverse = values("forward_kl", s, t), values("reverse_kl", s, t)
    assert_close(_normalized(s, t, np.float32(0)), forward)
    assert_close(_normalized(s, t, np.float32(1)), reverse)
    assert_close(_normalized(s, t, np.float32(0.5)), 4 * np.asarray(values("jensen_shannon", s, t)))
    # β below any that moves the value by a rounding: the distance to the limit is of order β e^24.
    assert_close(_normalized(s, t, np.float32(1e-18)), forward)


@given(s=logits, t=logits)
@few
def test_skew_divergences_reach_their_limits_and_bounds(s, t):
    """Skew KL is KL at α = 0, 0 at α = 1, and never above -log α between."""
    for name in ("forward_kl", "reverse_kl"):
        skewed = _SKEWED[name]
        assert_close(skewed(s, t, np.float32(0)), values(name, s, t))
        np.testing.assert_array_equal(skewed(s, t, np.float32(1)), np.zeros(3))
        assert (np.asarray(skewed(s, t, np.float32(0.25))) <= np.log(4) * (1 + 2e-6)).all()


@jax.jit
def _normalized(s, t, beta):
    return kljax.jensen_shannon(s, t, beta=beta, normalized=True)


_SKEWED = {
    "forward_kl": jax.jit(lambda s, t, alpha: kljax.skew_forward_kl(s, t, alpha=alpha)),
    "reverse_kl": jax.jit(lambda s, t, alpha: kljax.skew_reverse_kl(s, t, alpha=alpha)),
}


# --- masks, weights, batches ---


@every_divergence
@given(s=logits, t=logits, where=masks)
@few
def test_a_mask_equals_slicing(name, s, t, where):
    """Masked classes might as well not be there, for the value and the gradients to both sides."""
    ones = np.ones(3, np.float32)
    bad_s, bad_t = np.where(where, s, np.float32(np.nan)), np.where(where, t, np.float32(np.inf))
    got, gradients = weighted(name, bad_s, bad_t, where, ones)
    if not where.any():
        want, slices = 0.0, [np.zeros((3, 0))] * 2
    else:
        short = (s[:, where], t[:, where])
        want = ORACLES[name](*short).sum()
        slices = [oracle_gradient(name, *short, wrt) for wrt in (0, 1)]
    assert_close(got, want)
    for grad, kept in zip(gradients, slices, strict=True):
        whole = np.zeros(SHAPE)
        whole[:, where] = kept
        assert_close(grad, whole)


def oracle_gradient(name, s, t, wrt):
    """Return the oracle's gradient, knowing the parameters of every entry of DIVERGENCES."""
    params = {"beta": 0.3, "normalized": True} if name == "jensen_shannon_normalized" else {}
    return oracle.gradient(name.removesuffix("_normalized"), s, t, wrt, **params)


@some_divergences
@given(s=logits, t=logits, w=weights)
@few
def test_weight_zero_equals_removal(name, s, t, w):
    """An example of weight 0 might as well not be there, whatever it holds."""
    keep = w != 0
    bad_s = np.where(keep[:, None], s, np.float32(np.nan))
    bad_t = np.where(keep[:, None], t, np.float32(-np.inf))
    got, gradients = weighted(name, bad_s, bad_t, np.ones(5, bool), w)
    assert_close(got, (w[keep] * ORACLES[name](s[keep], t[keep])).sum())
    for wrt in (0, 1):
        want = np.zeros(SHAPE)
        if keep.any():
            want[keep] = w[keep, None] * oracle_gradient(name, s[keep], t[keep], wrt)
        assert_close(gradients[wrt], want)


@every_divergence
@given(s=logits, t=logits)
@few
def test_a_batch_equals_a_loop_over_its_rows(name, s, t):
    """Every example is computed as if alone, so the others may be anything."""
    other = np.full((2, 5), np.nan, np.float32)
    whole = values(name, s, t)
    for i in range(3):
        alone = values(name, np.stack([s[i], *other]), np.stack([t[i], *other]))
        assert_close(np.asarray(alone)[0], np.asarray(whole)[i])
        assert np.isnan(np.asarray(alone)[1:]).all()


# --- temperature and representation ---


@some_divergences
@given(s=logits, t=logits, temperature=st.sampled_from([0.25, 0.7, 1.0, 3.0, 64.0]))
@few
def test_a_temperature_divides_the_logits(name, s, t, temperature):
    """At T the divergence is that of logits / T."""
    temperature = np.float32(temperature)
    got = warmed(name, s, t, temperature)
    assert_close(got, ORACLES[name](s / np.float64(temperature), t / np.float64(temperature)))
    assert (np.asarray(got) >= 0).all()


@some_divergences
@given(s=grid(-6, 6), t=grid(-6, 6), temperature=st.sampled_from([0.5, 1.0, 3.0]))
@few
def test_a_temperature_serves_every_representation(name, s, t, temperature):
    """Log-probabilities and probabilities at T are the logits they came from at T."""
    temperature = np.float32(temperature)
    log_s, log_t = (oracle.log_probs(x).astype(np.float32) for x in (s, t))
    want = ORACLES[name](s, t, temperature=np.float64(temperature))
    assert_close(warmed(name, LogProbs(log_s), Probs(np.exp(log_t)), temperature), want)


@some_divergences
@given(s=grid(-6, 6), t=grid(-6, 6))
@few
def test_representations_agree(name, s, t):
    """Logits, log-probabilities and probabilities of one distribution give one divergence."""
    want = ORACLES[name](s, t)
    log_s, log_t = (oracle.log_probs(x).astype(np.float32) for x in (s, t))
    assert_close(values(name, LogProbs(log_s), Probs(np.exp(log_t))), want)


# --- the ends of float32 ---

extremes = arrays(
    np.float32,
    SHAPE,
    elements=st.sampled_from([0.0, 1.0, -3.0, 100.0, -1e4, 1e12, -1e12, 1e30, -1e30, -np.inf]),
)


@every_divergence
@given(s=extremes, t=extremes)
@few
def test_extreme_logits_give_the_right_value(name, s, t):
    """Up to ±1e30 and -inf, the value is the oracle's: NaN only where there is no distribution."""
    want = ORACLES[name](s, t)
    assert_close(values(name, s, t), want)
    empty = np.isneginf(s).all(-1) | np.isneginf(t).all(-1)
    np.testing.assert_array_equal(np.isnan(want), empty)


@every_divergence
@given(s=extremes, t=extremes)
@few
def test_extreme_logits_give_no_nan_gradient(name, s, t):
    """Where the value is finite, so are the gradients to both sides."""
    every = (np.ones(5, bool), np.ones(3, np.float32))
    finite = np.isfinite(ORACLES[name](s, t))
    for grad in weighted(name, s, t, *every)[1]:
        assert np.isfinite(np.asarray(grad)[finite]).all()
