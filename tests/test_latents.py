"""KL of latent variables, mixtures, consistency; and dense and multi-label prediction."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, report

import kljax
from kljax import families

NAN = np.nan


@pytest.fixture
def normal(rng):
    """A posterior of 6 examples and 3 latents, and the divergence of each from the prior."""
    mean, log_variance = (np.float32(rng.normal(size=(6, 3))) for _ in range(2))
    each = 0.5 * (np.float64(mean) ** 2 + np.exp(np.float64(log_variance)) - 1 - log_variance)
    return families.Normal(mean, log_variance=log_variance), each


WEIGHTS = np.float32([1, 0, 2, 1, 0.5, 1])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_free_bits_in_three_groupings(normal, weights):
    posterior, each = normal
    w = np.ones(6) if weights is None else weights
    mean = lambda x: np.tensordot(w, x, 1) / w.sum()  # noqa: E731
    f = partial(kljax.elbo_kl, posterior, weights=weights)
    assert_close(f(), mean(each.sum(-1)))
    assert_close(f(beta=4.0), 4 * mean(each.sum(-1)))
    for bits in (0.2, 0.7, 2.0):
        floor = partial(np.maximum, bits)
        assert_close(f(free_bits=bits), mean(floor(each.sum(-1))))
        assert_close(f(free_bits=bits, free_bits_per="dim"), floor(mean(each)).sum())
        assert_close(f(free_bits=bits, free_bits_per="batch"), floor(mean(each.sum(-1))))


def test_elbo_kl_of_each_example(normal):
    posterior, each = normal
    got = kljax.elbo_kl(posterior, reduction="none", free_bits=1.5, beta=2.0, weights=WEIGHTS)
    assert_close(got, 2 * WEIGHTS * np.maximum(each.sum(-1), 1.5))
    assert_close(kljax.elbo_kl(posterior, reduction="sum"), each.sum())
    assert_close(kljax.elbo_kl(posterior, axis=(), reduction="mean"), each.mean())
    assert_close(kljax.elbo_kl(posterior, normalizer=2.0), each.sum() / 2)
    prior = families.Normal(np.float32([1, 0, 0]), np.float32([1, 2, 1]))
    want = kljax.kl(posterior, prior, axis=-1, reduction="mean")
    assert_close(kljax.elbo_kl(posterior, prior), want)


def test_gradients_stop_below_the_floor(normal):
    posterior, each = normal

    def loss(posterior, bits, beta):
        return kljax.elbo_kl(posterior, free_bits=bits, beta=beta)

    gradients, to_bits, to_beta = jax.grad(loss, (0, 1, 2))(posterior, 1.5, 2.0)
    above = each.sum(-1) > 1.5
    assert above.any()
    assert not above.all()
    assert_close(gradients.loc, 2 * np.float64(posterior.loc) * above[:, None] / 6)
    assert_close(to_bits, 2 * (~above).mean())
    assert_close(to_beta, np.maximum(each.sum(-1), 1.5).mean())


def test_nan_is_neither_hidden_by_a_floor_nor_let_out_of_what_does_not_count(normal):
    posterior, each = normal
    broken = families.Normal(
        posterior.loc.copy(),
        log_variance=np.where(np.arange(6)[:, None] == 1, NAN, 0.0).astype("f4"),
    )
    assert np.isnan(kljax.elbo_kl(broken, free_bits=5.0))
    value, gradients = jax.value_and_grad(
        lambda p: kljax.elbo_kl(p, weights=WEIGHTS, free_bits=0.1)
    )(broken)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("per", ["example", "dim", "batch"])
def test_of_no_examples(normal, per):
    """An empty batch, or no weight at all, costs nothing: no floor either."""
    f = partial(kljax.elbo_kl, free_bits=0.5, free_bits_per=per)
    assert f(families.Normal(jnp.zeros((0, 3)), 1.0)) == 0
    assert f(normal[0], weights=np.zeros(6)) == 0
    assert (
        f(families.Normal(jnp.zeros((6, 0)), 1.0)) == {"example": 0.5, "dim": 0, "batch": 0.5}[per]
    )


def test_over_named_axes(normal):
    """Pooled over devices as over the batch."""
    posterior, each = normal
    split = jax.tree.map(lambda x: x.reshape(2, 3, 3), posterior)
    for per, want in (
        ("example", np.maximum(each.sum(-1), 1).mean()),
        ("dim", np.maximum(each.mean(0), 1).sum()),
        ("batch", max(each.sum(-1).mean(), 1)),
    ):
        f = partial(kljax.elbo_kl, free_bits=1.0, free_bits_per=per, axis_name="n")
        assert_close(jax.vmap(f, axis_name="n")(split), [want, want])


def test_categorical_latents(rng):
    posterior, prior = (np.float32(rng.normal(size=(5, 4, 7))) for _ in range(2))
    each = oracle.divergence("reverse_kl", np.float64(posterior), np.float64(prior))
    assert_close(kljax.elbo_kl(posterior, prior, axis=-2), each.sum(-1).mean())
    assert_close(kljax.elbo_kl(posterior, prior, axis=()), each.mean())
    first = lambda x: jnp.moveaxis(x, -1, 0)  # noqa: E731
    got = kljax.elbo_kl(first(posterior), first(prior), axis=2, class_axis=0)
    assert_close(got, each.sum(-1).mean())
    weights = np.float32([1, 0, 2, 1, 1])
    got = kljax.elbo_kl(posterior, prior, axis=1, weights=weights, free_bits=3.0)
    assert_close(got, (np.maximum(each.sum(-1), 3) * weights).sum() / 5)


def test_the_standard_normal_of_several_dimensions(rng):
    loc = np.float32(rng.normal(size=(5, 3)))
    posterior = families.MultivariateNormal(loc, np.eye(3, dtype="f4"))
    assert_close(kljax.elbo_kl(posterior, axis=()), 0.5 * np.float64(loc**2).sum(-1).mean())


def test_balanced_kl(rng):
    posterior, prior = (jnp.asarray(rng.normal(size=(5, 4, 7)), jnp.float32) for _ in range(2))
    f = partial(kljax.balanced_kl, axis=-2, prior_weight=0.8, posterior_weight=0.3)
    kl = partial(kljax.elbo_kl, axis=-2)
    assert_close(f(posterior, prior, free_bits=0.0), 1.1 * kl(posterior, prior))
    to_both = jax.grad(kl, (0, 1))(posterior, prior)
    got = jax.grad(partial(f, free_bits=0.0), (0, 1))(posterior, prior)
    assert_close(got[0], 0.3 * np.float64(to_both[0]))
    assert_close(got[1], 0.8 * np.float64(to_both[1]))
    same = jax.grad(f, (0, 1))(posterior, posterior + 0.01 * prior)  # below the one free nat
    np.testing.assert_array_equal(same, np.zeros((2, 5, 4, 7)))
    assert_close(f(posterior, posterior), 1.1)


def test_consistency(rng):
    a, b = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    want = 0.5 * oracle.divergence("jeffreys", np.float64(a), np.float64(b))
    assert_close(kljax.consistency_loss(a, b), want.mean())
    assert_close(kljax.consistency_loss(a, b, reduction="none", temperature=1.0), want)
    for wrt in (0, 1):
        got = jax.grad(kljax.consistency_loss, wrt)(a, b)
        rows = zip(np.float64(a), np.float64(b), strict=True)
        each = [oracle.gradient("jeffreys", x, y, wrt) for x, y in rows]
        assert_close(got, np.array(each) / 10)
    normal = families.Normal(jnp.zeros(3), 1.0), families.Normal(jnp.ones(3), 1.0)
    assert_close(kljax.consistency_loss(*normal, axis=-1), 1.5)
    with pytest.raises(TypeError, match=r"consistency_loss\(\) has no option 'temprature'"):
        kljax.consistency_loss(a, b, temprature=2.0)
    with pytest.raises(ValueError, match="consistency_loss: b must have 7 classes"):
        kljax.consistency_loss(a, b[:, :6])


# ---- mixtures ----


def test_a_mixture_is_one_distribution(rng):
    a, b = (np.float32(rng.normal(size=(4, 5))) for _ in range(2))
    p, q = (np.exp(oracle.log_probs(np.float64(x))) for x in (a, b))
    mixed = kljax.mixture(a, b, 0.3)
    assert isinstance(mixed, kljax.LogProbs)
    assert_close(np.exp(np.float64(mixed.log_probs)), 0.3 * p + 0.7 * q)
    assert_close(np.exp(np.float64(kljax.mixture(a, b, 1.0).log_probs)), p)
    uniform = kljax.mixture(kljax.Probs(np.float32(p)), jnp.zeros(5), 0.99)
    assert_close(np.exp(np.float64(uniform.log_probs)), 0.99 * p + 0.002)
    where = np.arange(5) != 2
    masked = kljax.mixture(a, b, 0.3, where=where).log_probs
    assert (masked[:, 2] == -np.inf).all()
    assert_close(np.exp(np.float64(masked)).sum(-1), np.ones(4))


def test_gradients_of_a_mixture(rng):
    """Against the mixture of softmaxes by hand, to both sides and the weight."""
    a, b = (jnp.asarray(rng.normal(size=(4, 5)), jnp.float32) for _ in range(2))
    t = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)

    def ours(a, b, w):
        return kljax.cross_entropy(kljax.mixture(a, b, w), kljax.Logits(t), reduction="mean")

    def by_hand(a, b, w):
        mixed = w * jax.nn.softmax(a) + (1 - w) * jax.nn.softmax(b)
        return -jnp.mean(jnp.sum(jax.nn.softmax(t) * jnp.log(mixed), -1))

    assert_close(ours(a, b, 0.3), by_hand(a, b, 0.3))
    for one, other in zip(
        jax.grad(ours, (0, 1, 2))(a, b, 0.3), jax.grad(by_hand, (0, 1, 2))(a, b, 0.3), strict=True
    ):
        assert_close(one, other)


def test_a_mixture_with_certainty():
    certain = jnp.array([0.0, -jnp.inf, -jnp.inf])
    slope = jax.grad(lambda x: kljax.mixture(x, jnp.zeros(3), 0.9).log_probs[1])(certain)
    assert np.isfinite(slope).all()
    half = kljax.mixture(certain, jnp.array([0.0, 0.0, -jnp.inf]), 0.5)
    assert_close(np.exp(np.float64(half.log_probs)), [0.75, 0.25, 0])


ERRORS = [
    (lambda n: kljax.elbo_kl(families.Laplace(0.0, 1.0), axis=()), "prior must be given with a"),
    (lambda n: kljax.elbo_kl(jnp.zeros((2, 3))), "prior must be given with a posterior of Array"),
    (
        lambda n: kljax.elbo_kl(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4, 3))),
        "axis must be other axes than class_axis, 2; got 2. For batch",
    ),
    (
        lambda n: kljax.elbo_kl(n, free_bits_per="dim", reduction="sum"),
        'free_bits_per must be given with reduction="mean"; got "dim" with reduction="sum"',
    ),
    (lambda n: kljax.elbo_kl(n, free_bits_per="bit"), "free_bits_per must be one of"),
    (lambda n: kljax.elbo_kl(n, axis=2), "axis must be within the 2 axes"),
    (lambda n: kljax.elbo_kl(n, weights=np.ones((6, 3))), r"weights must have shape \(6,\)"),
    (lambda n: kljax.elbo_kl(n, beta=np.ones(3)), "beta must be a scalar"),
    (lambda n: kljax.elbo_kl(n, jnp.zeros((6, 3))), "distribution over classes|posterior must be"),
    (
        lambda n: kljax.mixture(
            kljax.Head(jnp.zeros((1, 2)), jnp.zeros((2, 3))), jnp.zeros(3), 0.5
        ),
        "mixture: a must be an array of all classes; got Head",
    ),
    (lambda n: kljax.mixture(jnp.zeros(3), jnp.zeros(3), 1.5), r"weight must be in \[0, 1\]"),
    (lambda n: kljax.mixture(n, n, 0.5), "a must be a distribution over classes; got Normal"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(normal, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(normal[0])


def test_reports(normal):
    posterior, _ = normal
    f = lambda w: kljax.elbo_kl(posterior, weights=w)  # noqa: E731
    assert "weights must not be negative" in report(f, jnp.array([1.0, -1, 1, 1, 1, 1]))
    g = jax.jit(lambda w: kljax.mixture(jnp.zeros(3), jnp.ones(3), w).log_probs)
    assert "weight must be in [0, 1]" in report(g, jnp.float32(2.0))


# ---- many labels, and a class for every pixel ----


def test_many_labels(rng):
    """A student of a multi-label teacher: a divergence for each label, summed; some not known."""
    student, teacher = (np.float32(rng.normal(size=(4, 6))) for _ in range(2))
    p, q = (1 / (1 + np.exp(-np.float64(x))) for x in (teacher, student))
    each = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    s, t = (families.Bernoulli(logits=x) for x in (student, teacher))
    assert_close(kljax.forward_kl(s, t, axis=-1), each.sum(-1))
    known = rng.uniform(size=(4, 6)) > 0.3
    got = kljax.forward_kl(s, t, weights=known, reduction="mean")
    assert_close(got, each[known].mean())
    labels = families.Bernoulli(np.float32(rng.uniform(size=(4, 6)) > 0.5))
    want = -np.where(np.asarray(labels.probs) > 0, np.log(q), np.log1p(-q))
    assert_close(kljax.cross_entropy(s, labels), want)


def test_a_class_for_every_pixel(rng):
    """Classes on axis 1, and an ignored label: weight 0, whatever the label says."""
    student, teacher = (np.float32(rng.normal(size=(2, 5, 3, 4))) for _ in range(2))
    labels = rng.integers(5, size=(2, 3, 4))
    labels[0, 0] = 255
    counted = labels != 255
    each = oracle.divergence("forward_kl", np.float64(student), np.float64(teacher), axis=1)
    log_s = oracle.log_probs(np.moveaxis(np.float64(student), 1, -1))
    hard = -np.take_along_axis(log_s, np.where(counted, labels, 0)[..., None], -1)[..., 0]
    loss, metrics = kljax.distillation_loss(
        student, teacher, labels, axis=1, weights=counted, soft_weight=0.5, hard_weight=0.5
    )
    assert_close(metrics.hard, hard[counted].mean())
    assert_close(loss, 0.5 * each[counted].mean() + 0.5 * hard[counted].mean())
