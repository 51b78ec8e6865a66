"""The oracle of heads and best classes against plain formulas under JAX's own derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest
from jax.nn import log_softmax, logsumexp
from scipy.special import softmax

pytestmark = pytest.mark.usefixtures("x64")
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def plain(name, s, t):
    """The textbook sums over the last axis of log-probabilities, finite or -inf in t alone."""
    kl = lambda p, q: jnp.sum(jnp.where(jnp.isneginf(p), 0, jnp.exp(p) * (p - q)), -1)  # noqa: E731
    match name:
        case "forward_kl":
            return kl(t, s)
        case "reverse_kl":
            return kl(s, t)
        case "jensen_shannon":
            m = jnp.logaddexp(s, t) - jnp.log(2)
            return (kl(t, m) + kl(s, m)) / 2
        case "squared_hellinger":
            return 1 - jnp.sum(jnp.exp((s + t) / 2), -1)


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_heads(rng, name):
    """Value, gradient to every part, and a tangent."""
    arrays = {
        "hidden": rng.normal(size=(4, 3)),
        "kernel": rng.normal(size=(3, 5)),
        "bias": rng.normal(size=5),
        "scale": 0.7,
        "other": rng.normal(size=(4, 5)),
        "temperature": 1.3,
    }

    def want(a):
        z = 2.0 * jnp.tanh(a["scale"] * (a["hidden"] @ a["kernel"] + a["bias"][None]) / 2.0)
        sides = (log_softmax(x / a["temperature"]) for x in (z, a["other"]))
        return plain(name, *sides).sum()

    def got(a):
        head = {part: a[part] for part in ("hidden", "kernel", "bias", "scale")} | {"softcap": 2.0}
        t = a["temperature"]
        return oracle_large.divergence(name, head, a["other"], temperature=t).sum()

    np.testing.assert_allclose(got(arrays), want(arrays), **CLOSE)
    slopes, ad = oracle_large.gradients(got, arrays), jax.grad(want)(arrays)
    for part in arrays:
        np.testing.assert_allclose(slopes[part], ad[part], **CLOSE)
    directions = {part: rng.normal(size=np.shape(x)) for part, x in arrays.items()}
    np.testing.assert_allclose(
        oracle_large.tangent(got, arrays, directions),
        jax.jvp(want, (arrays,), (jax.tree.map(jnp.asarray, directions),))[1],
        **CLOSE,
    )


def on_the_best(tail, s, idx, lp, log_tail):
    """Both sides as log-probabilities, of one example without padding."""
    rest = np.setdiff1d(np.arange(s.size), idx)
    match tail:
        case "bucket":
            log_tail = jnp.log(1 - jnp.exp(lp).sum()) if log_tail is None else log_tail
            return jnp.append(s[idx], logsumexp(s[rest])), jnp.append(lp, log_tail)
        case "truncate":
            return s[idx], lp
        case "renormalize_both":
            return log_softmax(s[idx]), log_softmax(lp)
        case "renormalize":
            return s, jnp.full(s.size, -jnp.inf).at[idx].set(log_softmax(lp))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both", "truncate"])
def test_best_classes(rng, tail):
    """The four tails, with and without the rest's mass, in value and gradients to both sides."""
    names = ["forward_kl", "jensen_shannon", "reverse_kl"][: 2 if tail == "renormalize" else 3]
    idx = np.array([4, 0, 2])
    full = oracle.log_probs(rng.normal(size=6))
    arrays = {"s": rng.normal(size=6), "lp": full[idx]}
    for name in names:
        for rest in [None, *([np.log(0.3)] if tail == "bucket" else [])]:

            def want(a, name=name, rest=rest):
                return plain(name, *on_the_best(tail, log_softmax(a["s"]), idx, a["lp"], rest))

            def got(a, name=name, rest=rest):
                return oracle_large.top_k_divergence(name, a["s"], idx, a["lp"], rest, tail=tail)

            np.testing.assert_allclose(got(arrays), want(arrays), **CLOSE)
            slopes, ad = oracle_large.gradients(got, arrays), jax.grad(want)(arrays)
            for side in arrays:
                np.testing.assert_allclose(slopes[side], ad[side], **CLOSE)


def test_padding_belongs_to_the_rest(rng):
    """An entry of -inf is as if it were not there, also where its index is another's."""
    s = rng.normal(size=(2, 5))
    lp = np.append(np.log([[0.5, 0.3], [0.6, 0.1]]), [[-np.inf]] * 2, axis=1)
    idx = np.array([[1, 3, 1], [0, 2, 4]])
    for tail in ("bucket", "renormalize", "renormalize_both", "truncate"):
        got, want = (
            oracle_large.top_k_divergence("forward_kl", s, idx[:, :k], lp[:, :k], tail=tail)
            for k in (3, 2)
        )
        np.testing.assert_allclose(got, want, **CLOSE)


def test_top_k_is_a_partition(rng):
    """The best classes and the rest have mass 1, the rest's to full relative accuracy."""
    x = rng.normal(size=(3, 6)) * 3
    got = oracle_large.top_k(x, 2, temperature=1.5)
    p = softmax(x / 1.5, axis=-1)
    np.testing.assert_allclose(np.exp(got["log_probs"]), np.sort(p)[:, :-3:-1], **CLOSE)
    np.testing.assert_allclose(np.exp(got["log_tail"]), np.sort(p)[:, :-2].sum(-1), **CLOSE)
    assert (oracle_large.top_k(x, 6)["log_tail"] == -np.inf).all()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_importance_weights_are_unbiased(rng, power):
    """Over every outcome of the draws the weights average to the distribution itself."""
    x, options = rng.normal(size=4), {"proposal_power": power, "temperature": 2.0}
    outcomes = list(oracle_large.draws(oracle_large.proposal(x, **options), 3))
    np.testing.assert_allclose(sum(chance for _, chance in outcomes), 1.0, **CLOSE)
    mean = sum(c * oracle_large.importance_weights(x, counts, **options) for counts, c in outcomes)
    np.testing.assert_allclose(mean, softmax(x / 2), **CLOSE)
