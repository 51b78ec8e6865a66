"""The documented examples and unit-test inputs of other libraries, in kljax's terms.

Only the numbers are theirs. Expected values are the oracle's; where the other library prints a
result, that is met to its printed digits too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import tol
from scipy.spatial.distance import jensenshannon
from scipy.special import kl_div, rel_entr

import kljax
from kljax import Logits, LogProbs, Probs

pytestmark = pytest.mark.slow

INF = float("inf")


def f32(values):
    """Return float32, as every array here is given to kljax."""
    return np.array(values, np.float32)


def probabilities(weights):
    """Return weights as probabilities along the last axis."""
    weights = np.array(weights, np.float64)
    return f32(weights / weights.sum(-1, keepdims=True))


# --- optax ---

LOG_P = f32(
    [
        [-2.9957, -3.5066, -3.9120, -1.2040, -0.6931, -2.3026],
        [-1.6094, -1.6094, -1.6094, -2.3026, -1.8971, -1.8971],
    ]
)
Q = f32([[0.2, 0.2, 0.2, 0.1, 0.15, 0.15], [0.05, 0.03, 0.02, 0.3, 0.5, 0.0]])


def test_optax_kl_divergence():
    """kl_divergence(log_predictions, targets) is forward_kl of LogProbs and Probs."""
    got = kljax.forward_kl(LogProbs(LOG_P), Probs(Q))
    want = oracle.divergence("forward_kl", LOG_P, Q, kinds=("log_probs", "probs"))
    np.testing.assert_allclose(got, want, **tol(np.float32))
    np.testing.assert_allclose(got, [0.8875577, 0.7592807], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        kljax.forward_kl(LogProbs(LOG_P[0]), Probs(Q[0])), got[0], **tol(np.float32)
    )


def test_optax_kl_divergence_with_log_targets():
    """kl_divergence_with_log_targets is forward_kl of LogProbs twice."""
    got = kljax.forward_kl(LogProbs(LOG_P), LogProbs(LOG_P[::-1]))
    want = oracle.divergence("forward_kl", LOG_P, LOG_P[::-1], kinds=("log_probs", "log_probs"))
    np.testing.assert_allclose(got, want, **tol(np.float32))
    # Stated from probabilities of more digits than these logarithms have.
    np.testing.assert_allclose(got, [0.8875625, 0.71874356], rtol=0, atol=1e-4)


def test_optax_generalized_kl_divergence():
    """The Bregman form Σ p log(p/q) - p + q of measures is kl_terms with the masses added."""
    got = (kljax.kl_terms(Probs(Q), LogProbs(LOG_P), axis=-1) - Q + np.exp(LOG_P)).sum(-1)
    log_q = oracle.log_probs(Q, "probs")
    want = (oracle.kl_terms(log_q, LOG_P) - Q + np.exp(np.float64(LOG_P))).sum(-1)
    np.testing.assert_allclose(got, want, **tol(np.float32))
    np.testing.assert_allclose(got, [0.88757247, 0.859308], rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_optax_axis_is_moveaxis(axis):
    """Any axis gives what moving it to the end gives."""
    rng = np.random.default_rng(0)
    s = f32(rng.normal(size=(4, 5, 6)))
    others = [n for i, n in enumerate(s.shape) if i != axis]
    t = f32(rng.dirichlet(np.ones(s.shape[axis]), size=others))
    got = kljax.forward_kl(s, Probs(np.moveaxis(t, -1, axis)), axis=axis)
    moved = np.moveaxis(s, axis, -1)
    np.testing.assert_allclose(got, kljax.forward_kl(moved, Probs(t)), **tol(np.float32))
    want = oracle.divergence("forward_kl", moved, t, kinds=("logits", "probs"))
    np.testing.assert_allclose(got, want, **tol(np.float32))


@pytest.mark.parametrize("size", [5, 10])
def test_optax_where_is_slicing(size):
    """A mask of classes gives what leaving them out gives."""
    rng = np.random.default_rng(size)
    log_p, q = f32(rng.normal(size=size)), f32(rng.dirichlet(np.ones(size)))
    keep = rng.integers(2, size=size).astype(bool)
    got = kljax.forward_kl(LogProbs(log_p), Probs(q), where=keep)
    sliced = kljax.forward_kl(LogProbs(log_p[keep]), Probs(q[keep]))
    np.testing.assert_allclose(got, sliced, **tol(np.float32))
    want = oracle.divergence("forward_kl", log_p, q, kinds=("log_probs", "probs"), where=keep)
    np.testing.assert_allclose(got, want, **tol(np.float32))


@pytest.mark.parametrize(
    ("logits", "labels", "printed"),
    [
        ([[1.2, -0.8, -0.5], [0.9, -1.2, 1.1]], [0, 1], [0.2761, 2.9518]),
        ([[10.0, 1.0, -2.0], [1.0, 4.0, 0.2]], [1, 0], [9.00013, 3.0696733]),
    ],
)
def test_optax_softmax_cross_entropy(logits, labels, printed):
    """Integer labels and one-hot targets give the printed cross entropy."""
    logits, labels = f32(logits), np.array(labels, np.int32)
    want = oracle.divergence("cross_entropy", logits, labels, kinds=("logits", "labels"))
    by_label = kljax.cross_entropy(logits, labels)
    by_onehot = kljax.cross_entropy(logits, Probs(np.eye(3, dtype=np.float32)[labels]))
    np.testing.assert_allclose(by_label, want, **tol(np.float32))
    np.testing.assert_allclose(by_onehot, want, **tol(np.float32))
    np.testing.assert_allclose(by_label, printed, rtol=0, atol=6e-5)


def test_optax_cross_entropy_over_two_axes():
    """Classes laid out in two axes are one distribution, its labels given as one-hot targets."""
    logits = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    onehot = np.zeros_like(logits)
    onehot[0, 0, 1, 1] = onehot[0, 1, 2, 3] = 1
    got = kljax.cross_entropy(logits, Probs(onehot), axis=(2, 3))
    want = oracle.divergence(
        "cross_entropy", logits, onehot, kinds=("logits", "probs"), axis=(2, 3)
    )
    np.testing.assert_allclose(got, want, **tol(np.float32))
    np.testing.assert_allclose(got, [[6.4587, 0.4587]], rtol=0, atol=6e-5)


SAFE_LOGITS = f32(
    [[10.0, 1.0, -2.0], [1.0, 4.0, 0.2], [-INF, 0.0, 0.0], [-INF, 0.0, 0.0], [-INF, 0.0, -INF]]
)
SAFE_LABELS = f32(
    [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.4, 0.3, 0.3], [0.0, 1.0, 0.0]]
)


def test_optax_safe_softmax_cross_entropy():
    """0·log 0 is 0 and mass on an impossible class is infinite, in the ordinary cross_entropy."""
    got = kljax.cross_entropy(SAFE_LOGITS, Probs(SAFE_LABELS))
    want = oracle.divergence("cross_entropy", SAFE_LOGITS, SAFE_LABELS, kinds=("logits", "probs"))
    np.testing.assert_allclose(got, want, **tol(np.float32))
    np.testing.assert_allclose(got, [9.00013, 3.0696733, 0.693147, INF, 0.0], rtol=0, atol=1e-5)


def test_optax_safe_gradient_holds_at_infinite_logits():
    """Its gradient is softmax - labels in every row, also where it is infinite or 0·log 0."""
    got = jax.grad(lambda x: kljax.cross_entropy(x, Probs(SAFE_LABELS), reduction="sum"))(
        SAFE_LOGITS
    )
    want = oracle.gradient("cross_entropy", SAFE_LOGITS, SAFE_LABELS, kinds=("logits", "probs"))
    np.testing.assert_allclose(got, want, **tol(np.float32))
    softmax = np.exp(oracle.log_probs(SAFE_LOGITS))
    np.testing.assert_allclose(got, softmax - SAFE_LABELS, **tol(np.float32))


# --- TensorFlow Probability ---


@pytest.mark.parametrize("kind", [Probs, Logits])
def test_tfp_categorical_kl_at_a_zero(kind):
    """A zero of p is left out, D(p‖p) is exactly 0, and the reverse direction is infinite."""
    a, b = f32([0.0, 0.5, 0.5]), f32([0.2, 0.2, 0.6])
    if kind is Logits:
        with np.errstate(divide="ignore"):
            a, b = np.log(a), np.log(b)
    a, b = kind(a), kind(b)
    assert kljax.kl(a, a) == 0.0
    want = np.log(0.5) - 0.5 * (np.log(0.2) + np.log(0.6))
    np.testing.assert_allclose(kljax.kl(a, b), want, **tol(np.float32))
    assert kljax.kl(b, a) == INF


@pytest.mark.parametrize("shared_zero", [False, True])
@pytest.mark.parametrize("wrt", [0, 1])
def test_tfp_categorical_gradient_at_a_zero(shared_zero, wrt):
    """At a logit of -inf the gradient is what a very low logit gives."""
    a = f32([-INF, np.log(0.5), np.log(0.5)])
    b = f32([-INF if shared_zero else np.log(0.2), np.log(0.2), np.log(0.6)])
    got = jax.grad(kljax.kl, argnums=wrt)(a, b)
    np.testing.assert_allclose(got, oracle.gradient("kl", a, b, wrt), **tol(np.float32))
    low = oracle.gradient("kl", np.maximum(a, -1e4), np.maximum(b, -1e4), wrt)
    np.testing.assert_allclose(got, low, **tol(np.float32))


@pytest.mark.parametrize("batch", [1, 10])
@pytest.mark.parametrize("classes", [2, 4])
def test_tfp_categorical_kl_of_random_logits(classes, batch):
    """Random logits, one value per example, and exactly 0 from itself."""
    rng = np.random.default_rng(classes * batch)
    a, b = f32(rng.normal(size=(2, batch, classes)))
    np.testing.assert_allclose(kljax.kl(a, b), oracle.divergence("kl", a, b), **tol(np.float32))
    np.testing.assert_array_equal(kljax.kl(a, a), np.zeros(batch))


@pytest.mark.parametrize(
    ("logits", "want"),
    [
        (np.log([[0.2, 0.8], [0.6, 0.4]]) - 50.0, None),
        (np.full((3, 11), [[-1e7], [-1e8], [-1e9]]), [np.log(11.0)] * 3),
        ([[-INF, np.log(0.5), np.log(0.5)], [-INF, 0.0, -INF]], [np.log(2.0), 0.0]),
    ],
    ids=["shifted", "large", "zeros"],
)
def test_tfp_categorical_entropy(logits, want):
    """Entropy does not see a shift of the logits, however large, nor impossible classes."""
    logits = f32(logits)
    want = oracle.divergence("entropy", logits) if want is None else want
    np.testing.assert_allclose(kljax.entropy(logits), want, **tol(np.float32))


def test_tfp_entropy_gradient_at_infinite_logits():
    """The entropy of a certain outcome has a zero gradient, and ordinary rows their own."""
    certain = jax.grad(kljax.entropy)(f32([0.0, -INF]))
    np.testing.assert_array_equal(certain, [0.0, 0.0])
    logits = f32([[1.0, 2.0, 3.0], [2.0, 5.0, 1.0]])
    got = jax.grad(lambda x: kljax.entropy(x, reduction="sum"))(logits)
    np.testing.assert_allclose(got, oracle.gradient("entropy", logits), **tol(np.float32))


# --- rlax ---


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_rlax_categorical_kl_divergence(wrap):
    """categorical_kl_divergence(p_logits, q_logits) is kl(p, q), also under jit and vmap."""
    p, q = f32([[1, 1, 0], [1, 2, 0]]), f32([[1, 2, 0], [1, 1, 0]])
    got = wrap(kljax.kl)(p, q)
    np.testing.assert_allclose(got, oracle.divergence("kl", p, q), **tol(np.float32))
    probs = np.array([[0.42231882, 0.42231882, 0.15536241], [0.24472848, 0.66524094, 0.09003057]])
    printed = rel_entr(probs, probs[::-1]).sum(-1)
    np.testing.assert_allclose(got, printed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 10.0])
def test_rlax_softmax_temperature(temperature):
    """A temperature is softmax(logits / T), on both sides."""
    p, q = f32([[1, 1, 0], [1, 2, 0]]), f32([[1, 2, 0], [1, 1, 0]])
    probs = {
        1.0: [[0.42231882, 0.42231882, 0.15536241], [0.24472848, 0.66524094, 0.09003057]],
        10.0: [[0.34425336, 0.34425336, 0.31149334], [0.332225, 0.3671654, 0.3006096]],
    }[temperature]
    got = kljax.kl(p, q, temperature=temperature)
    want = oracle.divergence("kl", p, q, temperature=temperature)
    np.testing.assert_allclose(got, want, **tol(np.float32))
    printed = rel_entr(probs, probs[::-1]).sum(-1)
    np.testing.assert_allclose(got, printed, rtol=0, atol=1e-6)


# --- SciPy ---

HALVES = [(p, q) for p in (0.0, 0.5, 1.0) for q in (0.0, 0.5, 1.0)]


@pytest.mark.parametrize(("p", "q"), HALVES)
def test_scipy_rel_entr(p, q):
    """kl_terms is rel_entr at every corner of the unit square."""
    got = kljax.kl_terms(Probs(f32([p])), Probs(f32([q])), axis=-1)
    np.testing.assert_allclose(got, [rel_entr(p, q)], **tol(np.float32))


@pytest.mark.parametrize(("p", "q"), HALVES)
def test_scipy_kl_div(p, q):
    """SciPy's kl_div is the same with the masses added: terms - p + q."""
    got = kljax.kl_terms(Probs(f32([p])), Probs(f32([q])), axis=-1) - p + q
    np.testing.assert_allclose(got, [kl_div(p, q)], **tol(np.float32))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("p", "q", "printed"),
    [
        (0.9456657713430001, 0.9456657713430094, -9.325873406851269e-15),
        (0.48066098564791515, 0.48066098564794774, -3.258504577274724e-14),
        (0.786048657854401, 0.7860486578542367, 1.6431300764454033e-13),
    ],
)
def test_scipy_rel_entr_of_close_probabilities(p, q, printed):
    """In float64 a term of two close probabilities is right to the rounding of a logarithm."""
    got = kljax.kl_terms(Probs(jnp.array([p])), Probs(jnp.array([q])), axis=-1)
    np.testing.assert_allclose(got, [printed], rtol=0, atol=4e-16)


@pytest.mark.parametrize(
    ("p", "q", "base", "printed"),
    [
        ([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], 2.0, 1.0),
        ([1.0, 0.0], [0.5, 0.5], np.e, 0.46450140402245893),
        ([1.0, 0.0, 0.0], [1.0, 0.0, 0.0], np.e, 0.0),
        ([[1.0, 2.0]], [[0.5, 1.5]], np.e, [0.0649045]),
    ],
    ids=["disjoint", "half", "same", "unnormalised"],
)
def test_scipy_jensenshannon(p, q, base, printed):
    """SciPy's distance is the square root of jensen_shannon, its base a factor of 1 / log base."""
    p, q = probabilities(p), probabilities(q)
    divergence = kljax.jensen_shannon(Probs(p), Probs(q))
    want = oracle.divergence("jensen_shannon", p, q, kinds=("probs", "probs"))
    np.testing.assert_allclose(divergence, want, **tol(np.float32))
    squared = np.square(printed)
    np.testing.assert_allclose(divergence / np.log(base), squared, rtol=1e-5, atol=1e-6)
    # The same weights as logits, which the library normalises itself.
    with np.errstate(divide="ignore"):
        by_logits = kljax.jensen_shannon(np.log(3 * p), np.log(5 * q))
    np.testing.assert_allclose(by_logits / np.log(base), squared, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_scipy_jensenshannon_of_tables(axis):
    """Counts along either axis: their logarithms are logits."""
    a = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    b = a + 12
    got = np.sqrt(kljax.jensen_shannon(np.log(a), np.log(b), axis=axis))
    printed = {
        0: [0.1954288, 0.1447697, 0.1138377, 0.0927636],
        1: [0.1402339, 0.0399106, 0.0201815],
    }[axis]
    np.testing.assert_allclose(got, printed, rtol=1e-4, atol=0)
    np.testing.assert_allclose(got, jensenshannon(a, b, axis=axis), rtol=1e-4, atol=0)


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_normalized_jensen_shannon_is_four_times_scipy(beta):
    """Normalised at ½ it is four times the squared distance; at β it divides by β(1-β)."""
    p, q = f32([0.1, 0.2, 0.7]), f32([0.3, 0.3, 0.4])
    options = {"beta": beta, "normalized": True}
    got = kljax.jensen_shannon(Probs(p), Probs(q), **options)
    want = oracle.divergence("jensen_shannon", p, q, kinds=("probs", "probs"), **options)
    np.testing.assert_allclose(got, want, **tol(np.float32))
    if beta == 0.5:
        np.testing.assert_allclose(got, 4 * jensenshannon(p, q) ** 2, rtol=1e-4, atol=0)
