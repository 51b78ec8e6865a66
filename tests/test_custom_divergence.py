"""Divergences made from a term of the user's own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close

import kljax


@kljax.divergence
def total_variation(log_s, log_t):
    """Half the absolute difference."""
    return 0.5 * jnp.abs(jnp.exp(log_s) - jnp.exp(log_t))


def test_a_term_becomes_a_divergence_with_every_option(rng):
    """Value, gradient, mask, temperature, weights and reduction, as for the built-in ones."""
    x, y = (rng.normal(size=(4, 3)).astype(np.float32) for _ in range(2))
    where, weights = np.array([True, True, False]), np.array([0.0, 1.0, 2.0, 3.0], np.float32)
    got = total_variation(
        x, y, where=where, temperature=2.0, weights=weights, reduction="mean", axis=-1
    )
    p, q = (np.exp(oracle.log_probs(z, temperature=2.0, where=where)) for z in (x, y))
    assert_close(got, oracle.reduce(0.5 * abs(p - q).sum(-1), weights, "mean"))
    assert total_variation.__name__ == "total_variation"
    assert total_variation.__doc__ == "Half the absolute difference."


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_the_exported_pieces_make_the_built_in_ones(rng, name):
    """From term_kl, term_generalized_kl and log_mixture; at zeros and in second order too."""
    x = rng.normal(size=(3, 4)).astype(np.float32)
    y = rng.normal(size=(3, 4)).astype(np.float32)
    x[1, 0] = y[1, 0] = y[2, 3] = -np.inf

    def jensen_shannon(kl, log_s, log_t):
        log_m, _, _ = kljax.log_mixture(log_t, log_s, 0.5)
        return 0.5 * (kl(log_t, log_m) + kl(log_s, log_m))

    terms = {"forward_kl": lambda kl, s, t: kl(t, s), "jensen_shannon": jensen_shannon}
    want = getattr(kljax, name)
    expected = _in_every_order(want, x, y)
    for kl in (kljax.term_kl, kljax.term_generalized_kl):
        got = _in_every_order(kljax.divergence(partial(terms[name], kl)), x, y)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b)


def _in_every_order(f, x, y):
    def compute(x, y):
        gradients = jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(x, y)
        return f(x, y), *gradients, jax.hessian(f)(x[1], y[1])

    return jax.jit(compute)(x, y)


def test_log_ratio_reaches_the_normalized_term(rng):
    """The second term is accurate where the first one rounds, and serves normalised sides only."""
    mine = kljax.divergence(
        lambda s, t: kljax.term_kl(t, s),
        normalized=lambda s, t, ratio: kljax.term_generalized_kl(t, s, ratio),
    )
    x = rng.normal(size=1000).astype(np.float32)
    y = x + np.float32(1e-3) * rng.normal(size=1000).astype(np.float32)
    assert mine(x, y) == kljax.forward_kl(x, y) > 0
    sides = kljax.LogProbs([-1.0, -2.0]), kljax.LogProbs([-3.0, -0.5])
    assert mine(*sides) == kljax.forward_kl(*sides)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_closed_over_values_get_gradients(rng, trace):
    """Scalars and per-class arrays, traced outside, in reverse and forward mode and under vmap."""
    x, y = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    scale, classes = jnp.float32(2.0), jnp.arange(1.0, 5.0)

    def loss(scale, classes):
        term = lambda s, t: scale * classes[None] * kljax.term_kl(t, s)  # noqa: E731
        return kljax.divergence(term)(x, y, reduction="sum")

    parts = kljax.kl_terms(y, x).sum(0)
    want = (parts * classes).sum(), scale * parts
    assert_close(trace(jax.grad(loss, 0))(scale, classes), want[0])
    assert_close(trace(jax.grad(loss, 1))(scale, classes), want[1])
    assert_close(trace(jax.jacfwd(loss, 1))(scale, classes), want[1])
    many = jax.vmap(loss, in_axes=(0, None))(jnp.array([1.0, 2.0]), classes)
    assert_close(many, [loss(1.0, classes), loss(2.0, classes)])
    cross = trace(jax.jacfwd(jax.grad(loss, 0), 1))(scale, classes)
    assert_close(cross, parts)


TRACES = []


def power_term(log_s, log_t, *, power):
    TRACES.append(power)
    return jnp.exp(power * log_s) * (log_s - log_t)


def test_params_get_gradients_without_a_new_compilation(rng):
    """Its parameters are traced: one compilation serves every value."""
    mine = kljax.divergence(power_term)
    x, y = (rng.normal(size=4).astype(np.float32) for _ in range(2))
    mine(x, y, power=1.0)
    compiled = len(TRACES)
    assert_close(mine(x, y, power=1.0), kljax.reverse_kl(x, y))
    mine(x, y, power=2.0)
    assert len(TRACES) == compiled
    f = lambda power: mine(x, y, power=power)  # noqa: E731
    log_s, log_t = (oracle.log_probs(z) for z in (x, y))
    want = np.sum(log_s * np.exp(2 * log_s) * (log_s - log_t))
    assert_close(jax.grad(f)(2.0), want)
    assert_close(jax.jvp(f, (2.0,), (1.0,))[1], want)


def test_masked_classes_never_reach_the_term():
    """A term that cannot bear -inf is safe from masked classes, also in its gradient."""
    mine = kljax.divergence(lambda s, t: jnp.exp(t) * (t - s))  # -inf - -inf is NaN here
    x, where = jnp.array([0.0, 1.0, -jnp.inf]), jnp.array([True, True, False])
    value, gradient = jax.value_and_grad(lambda x: mine(x, x + 1, where=where))(x)
    assert_close(value, 0.0)
    assert_close(gradient, [0.0, 0.0, 0.0])
    assert np.isnan(mine(x, x + 1))


def test_terms_at_zeros():
    """The exported pieces keep the zero rules on their own."""
    log_p = jnp.log(jnp.array([0.0, 0.0, 0.5, 0.5]))
    log_q = jnp.log(jnp.array([0.0, 0.5, 0.0, 0.5]))
    np.testing.assert_array_equal(kljax.term_kl(log_p, log_q), [0, 0, np.inf, 0])
    np.testing.assert_array_equal(kljax.term_generalized_kl(log_p, log_q), [0, 0.5, np.inf, 0])
    entropy = [0, 0, np.inf, np.float32(np.log(2) / 2)]
    np.testing.assert_array_equal(kljax.term_cross_entropy(log_p, log_q), entropy)
    np.testing.assert_array_equal(kljax.term_entropy(log_p)[:2], [0, 0])
    for term in (kljax.term_kl, kljax.term_generalized_kl, kljax.term_cross_entropy):
        total = jax.jit(jax.grad(lambda p, q, f=term: f(p, q).sum(), (0, 1)))
        slopes = total(log_p[:2], log_q[:2])
        assert np.isfinite(slopes).all()
        assert np.isnan(term(jnp.float32(-jnp.inf), jnp.float32(jnp.nan)))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_log_mixture(weight):
    """m = w a + (1 - w) b with both log-ratios, at zeros of either side and both ends of w."""
    a, b = np.array([0.0, 0.0, 0.5, 0.5, 1e-30]), np.array([0.0, 0.5, 0.0, 0.5, 0.3])
    with np.errstate(divide="ignore", invalid="ignore"):
        log_a, log_b = np.log(a, dtype=np.float32), np.log(b, dtype=np.float32)
        log_m = np.log(weight * a + (1 - weight) * b)
        ratios = [np.where(np.isneginf(log_m) & (z == 0), 0, log_m - np.log(z)) for z in (a, b)]
    got = kljax.log_mixture(log_a, log_b, weight)
    assert_close(got[0], log_m)
    assert_close(got[1], ratios[0])
    assert_close(got[2], ratios[1])
    same = kljax.log_mixture(log_b, log_b, weight)
    np.testing.assert_array_equal(same[0], log_b)
    np.testing.assert_array_equal(same[1:], np.zeros((2, 5)))


@pytest.mark.parametrize("shape", [(6, 1), (6, 5)], ids=["per example", "per class"])
def test_log_mixture_of_many_weights(rng, shape):
    """And its gradient to them, (a - b) / m; near equality too."""
    log_a = rng.normal(size=(6, 5)).astype(np.float32)
    log_b = log_a + np.float32(rng.normal(size=(6, 5)) * [[1e-3], [0.1], [0.4], [1], [5], [30]])
    weight = rng.uniform(size=shape).astype(np.float32)
    a, b, w = (
        np.float64(x) for x in (np.exp(log_a, dtype=float), np.exp(log_b, dtype=float), weight)
    )
    m = w * a + (1 - w) * b
    got = jax.jit(kljax.log_mixture)(log_a, log_b, weight)
    assert_close(got[0], np.log(m))
    assert_close(got[1], np.log1p((1 - w) * np.expm1(np.float64(log_b) - log_a)))
    slope = jax.grad(lambda w: kljax.log_mixture(log_a, log_b, w)[0].sum())(weight)
    assert_close(slope, ((a - b) / m).sum(tuple(i for i in (1,) if shape[i] == 1), keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "remat"]
)
def test_captured_integers_masks_and_steps(rng, transform):
    """Traced values without a derivative may be captured too, under any transform."""
    x, y = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))

    def loss(x, step, mask):
        def term(s, t):
            return jnp.where(mask[None] & (step > 0), 2.0, 1.0) * kljax.term_kl(t, s)

        return kljax.divergence(term)(x, y, reduction="sum")

    mask = jnp.array([True, False, True, True])
    want = (kljax.kl_terms(y, x) * jnp.where(mask, 2.0, 1.0)[None]).sum()
    assert_close(transform(loss)(x, 1, mask), want)
    gradient = transform(jax.grad(loss))(x, 1, mask)
    each = jax.vmap(jax.grad(loss), (None, 0, None))(x, jnp.array([1, 0]), mask)
    assert_close(each[0], gradient)
    assert_close(each[1], jax.grad(loss)(x, 0, mask))


def test_a_term_with_a_state_is_read_at_each_call(rng):
    """A method, or a variable bound anew, is never served from a cache; gradients reach it."""
    x, y = (rng.normal(size=4).astype(np.float32) for _ in range(2))

    class Scaled:
        scale = 1.0

        def term(self, log_s, log_t):
            return self.scale * kljax.term_kl(log_t, log_s)

    module = Scaled()
    mine = kljax.divergence(module.term)
    want = kljax.forward_kl(x, y)
    assert_close(mine(x, y), want)
    module.scale = 3.0
    assert_close(mine(x, y), 3 * want)

    def loss(scale):
        module.scale = scale
        return mine(x, y)

    for _ in range(2):
        assert_close(jax.grad(loss)(2.0), want)


def test_a_callable_with_a_state_is_never_cached(rng):
    """Not even where it says what function it wraps."""
    x, y = (rng.normal(size=4).astype(np.float32) for _ in range(2))

    class Scaled:
        __wrapped__ = staticmethod(kljax.term_kl)
        scale = 1.0

        def __call__(self, log_s, log_t):
            return self.scale * kljax.term_kl(log_t, log_s)

    term = Scaled()
    mine = kljax.divergence(term)
    first = mine(x, y)
    term.scale = 3.0
    assert_close(mine(x, y), 3 * first)


@pytest.mark.slow
def test_a_divergence_with_traced_options_leaves_no_tracer(rng):
    """A partial over a traced beta, and a term over a traced scale, leak nothing."""
    x, y = (jnp.asarray(rng.normal(size=(2, 4)), jnp.float32) for _ in range(2))

    def loss(beta):
        skewed = partial(kljax.jensen_shannon, beta=beta)
        return kljax.distillation_loss(x, y, divergence=skewed)[0]

    with jax.checking_leaks():
        jax.make_jaxpr(jax.grad(loss))(0.3)
    got = jax.grad(loss)(0.3)
    want = jax.grad(lambda b: kljax.jensen_shannon(x, y, beta=b, reduction="mean"))(0.3)
    assert_close(got, want)


def test_a_term_that_captures_compiles_nothing_anew(rng, caplog):
    """Outside jit its operations run one by one, whatever it captures the next time."""
    x, y = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))

    def loss(x, scale):
        return kljax.divergence(lambda s, t: scale * kljax.term_kl(t, s))(x, y, reduction="mean")

    for run in (loss, jax.grad(loss)):
        run(x, jnp.float32(2.0))
        with jax.log_compiles():
            run(x, jnp.float32(3.0))
    assert "Compiling" not in caplog.text


def test_terms_of_another_dtype(rng):
    """A 16-bit answer is widened; an integer one is an error."""
    x, y = (rng.normal(size=4).astype(np.float32) for _ in range(2))
    narrow = kljax.divergence(lambda s, t: (jnp.exp(t) * (t - s)).astype(jnp.bfloat16))
    value, gradient = jax.value_and_grad(narrow)(x, y)
    assert value.dtype == gradient.dtype == jnp.float32
    with pytest.raises(TypeError, match="term must be a function that returns floats; got bool"):
        kljax.divergence(lambda s, t: s > t)(x, y)
