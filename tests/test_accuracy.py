"""float32 is as accurate as float32 can be: close distributions, huge logits, 16-bit inputs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, named, tol

import kljax
from kljax._engine.terms import term_jensen_shannon, term_skew_kl

pytestmark = pytest.mark.usefixtures("optimized")

NON_NEGATIVE = [
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "jensen_shannon",
    "skew_forward_kl",
    "skew_reverse_kl",
]


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-4, 1e-5])
def test_close_distributions(rng, step, scale):
    """Relative error below 1e-3 at 32 000 classes, where the textbook sum is all noise."""
    x = (rng.normal(size=32_000) * scale).astype(np.float32)
    y = (x + rng.normal(size=32_000) * step).astype(np.float32)
    want, q_minus_p = _forward_kl_in_long_double(x, y)
    value, gradient = jax.value_and_grad(kljax.forward_kl)(x, y)
    assert abs(float(value) / want - 1) < 1e-3
    assert np.linalg.norm(gradient - q_minus_p) < 1e-5 * np.linalg.norm(q_minus_p)


def _forward_kl_in_long_double(x, y):
    """D and its gradient q - p; a series stands in where even long doubles cancel."""
    log_q, log_p = (_log_softmax(z.astype(np.longdouble)) for z in (x, y))
    d, p = log_q - log_p, np.exp(log_p)
    series = sum(d**n / float(np.prod(np.arange(1.0, n + 1))) for n in range(2, 12))
    excess = np.where(abs(d) < 0.1, series, np.expm1(d) - d)
    return float(np.sum(p * excess)), (p * np.expm1(d)).astype(np.float64)


def _log_softmax(z):
    z = z - z.max()
    return z - np.log(np.exp(z).sum())


def test_the_reference_itself_is_exact(rng):
    """The long-double reference agrees with 40 digits of mpmath."""
    x = rng.normal(size=2000).astype(np.float32)
    y = (x + rng.normal(size=2000) * 1e-4).astype(np.float32)
    want = oracle.forward_kl_exact(x, y)
    assert abs(_forward_kl_in_long_double(x, y)[0] / want - 1) < 1e-9


@pytest.mark.parametrize("weight", [1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_each_jensen_shannon_term(dtype, weight):
    """A few roundings at any ratio of the two sides: the series meet the formula seamlessly."""
    close, far = 10.0 ** np.arange(-9, -1), np.concatenate([np.arange(0.05, 3, 0.05), [8.0, 30.0]])
    ratio = np.concatenate([-far, -close, close, far]).astype(dtype)
    weight, log_a = dtype(weight), np.full_like(ratio, -4.0)

    def term(log_b):
        return term_jensen_shannon(log_a, log_b, weight, ratio)

    got = jax.jit(lambda x: jax.jvp(term, (x,), (jnp.ones_like(x),)))(log_a + ratio)
    want = [oracle.jensen_shannon_term_exact(-4.0, r, weight) for r in ratio]
    for values, exact in zip(got, np.transpose(want), strict=True):
        np.testing.assert_allclose(values, exact, rtol=16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("weight", [0.0, 1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("x64")
def test_each_skew_term(dtype, weight):
    """Value and both slopes at any ratio of the two sides, also beyond what exp can hold."""
    close, far = 10.0 ** np.arange(-9, -1), np.concatenate([np.arange(0.05, 3, 0.05), [8.0, 30.0]])
    ratio = np.concatenate([-far, -close, close, far, [-200.0, 80.0]]).astype(dtype)
    weight, log_b = dtype(weight), (ratio - 4.0).astype(dtype)
    log_a = np.full_like(ratio, -4.0)

    def term(log_a, log_b):
        return term_skew_kl(log_a, log_b, weight, ratio)

    ones, zeros = np.ones_like(ratio), np.zeros_like(ratio)
    value, to_b = jax.jvp(term, (log_a, log_b), (zeros, ones))
    to_a = jax.jvp(term, (log_a, log_b), (ones, zeros))[1]
    want = np.transpose([oracle.skew_term_exact(-4.0, r, weight) for r in ratio])
    for got, exact in zip((value, to_b, to_a), want, strict=True):
        np.testing.assert_allclose(got, exact, rtol=32 * np.finfo(dtype).eps, atol=1e-35)


@pytest.mark.parametrize("name", NON_NEGATIVE)
def test_never_negative_and_zero_at_equality(rng, name):
    """No rounding below 0; exactly 0 in value and gradient where both sides are equal."""
    x = (rng.normal(size=(64, 1000)) * 3).astype(np.float32)
    y = x + (rng.normal(size=x.shape) * np.logspace(-8, 0, 64)[:, None]).astype(np.float32)
    f = named(name)
    assert (f(x, y) >= 0).all()
    value, gradient = jax.value_and_grad(lambda y: f(x, y, reduction="sum"))(x)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.slow(but=["10000.0-None", "10000.0-3.0", "1000000000000.0-0.1", "1e+30-None"])
@pytest.mark.parametrize("temperature", [None, 3.0, 0.1])
@pytest.mark.parametrize("size", [1e4, 1e12, 1e30])
def test_huge_logits(size, temperature):
    """Nothing overflows, also x / T under jit: the maximum goes before the division."""
    x = np.array([[0.0, 1.0, -1.0, 0.5], [1.0, 1.0, 1.0, -1.0]]) * size
    y = np.array([[0.1, 1.0, 0.3, 0.5], [0.0, 0.0, 0.0, -1.0]]) * size
    x, y = x.astype(np.float32), y.astype(np.float32)

    @jax.jit
    def f(x, y):
        return kljax.forward_kl(x, y, temperature=temperature)

    assert_close(f(x, y), oracle.divergence("forward_kl", x, y, temperature=temperature))
    assert_close(f(x, x), [0, 0])
    gradients = jax.grad(lambda x, y: f(x, y).sum(), (0, 1))(x, y)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.slow(but=["forward_kl-bfloat16", "jensen_shannon-float16"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", [*NON_NEGATIVE, "cross_entropy"])
def test_16_bit_inputs_are_computed_in_float32(rng, name, dtype):
    """The value of the rounded inputs to float32 accuracy, and gradients in their own dtype."""
    x, y = (jnp.asarray(rng.normal(size=(3, 37)), dtype) for _ in range(2))
    f = named(name)
    wide = [np.asarray(z, np.float64) for z in (x, y)]
    value = f(x, y)
    assert value.dtype == jnp.float32
    assert_close(value, oracle.divergence(name, *wide))
    gradients = jax.jit(jax.grad(lambda x, y: f(x, y, reduction="sum"), (0, 1)))(x, y)
    for wrt, gradient in enumerate(gradients):
        assert gradient.dtype == dtype
        want = oracle.gradient(name, *wide, wrt)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.asarray(gradient, np.float64), want, rtol=eps, atol=1e-6)


def test_16_bit_inputs_are_not_copied_to_float32():
    """No instruction of the compiled value and gradient is a wide copy of a whole input."""
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)

    def wide_copies(f):
        text = jax.jit(f).lower(x, x).compile().as_text()
        return re.findall(r"ROOT \S+ = f32\[64,4096\]\S* convert\(", text)

    losses = [
        lambda x, y: kljax.forward_kl(x, y, reduction="mean"),
        lambda x, y: kljax.reverse_kl(x, y, reduction="mean", temperature=2.0),
    ]
    for loss in losses:
        assert not wide_copies(jax.value_and_grad(loss))
    plain = lambda x, y: jax.nn.logsumexp(x.astype(jnp.float32), -1)  # noqa: E731
    assert wide_copies(plain), "the pattern must find a copy where there is one"


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64(rng):
    """One float64 side makes the computation float64, whatever the other; gradients keep theirs."""
    x, y = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)).astype(np.float32)
    value, gradients = jax.value_and_grad(
        lambda x, y: kljax.forward_kl(x, y, reduction="sum"), (0, 1)
    )(x, y)
    np.testing.assert_allclose(
        value, oracle.divergence("forward_kl", x, y).sum(), **tol(np.float64)
    )
    assert [value.dtype, *(g.dtype for g in gradients)] == [np.float64, np.float64, np.float32]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_derivatives_to_temperature_and_mixture(rng):
    """Exact derivatives to T, beta and alpha, inside and at the ends where they exist."""
    x, y = rng.normal(size=5), rng.normal(size=5)

    def check(f, reference, at):
        modes = lambda v: (jax.value_and_grad(f)(v), jax.jvp(f, (v,), (1.0,))[1])  # noqa: E731
        (value, slope), forward = jax.jit(modes)(at)
        assert_close(value, reference(at), np.float64)
        assert_close(slope, oracle.derivative(reference, at), np.float64)
        assert_close(forward, slope, np.float64)

    for name in (*NON_NEGATIVE, "cross_entropy", "entropy"):
        sides = (x,) if name == "entropy" else (x, y)
        check(
            lambda t, name=name, sides=sides: named(name)(*sides, temperature=t),
            lambda t, name=name, sides=sides: oracle.divergence(name, *sides, temperature=t),
            1.7,
        )
    mixtures = [
        ("jensen_shannon", "beta", {}),
        ("jensen_shannon", "beta", {"normalized": True}),
        ("skew_forward_kl", "alpha", {}),
        ("skew_reverse_kl", "alpha", {}),
    ]
    for name, argument, options in mixtures:
        check(
            lambda v, n=name, a=argument, o=options: named(n)(x, y, **{a: v}, **o),
            lambda v, n=name, a=argument, o=options: oracle.divergence(n, x, y, **{a: v}, **o),
            0.3,
        )


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("logits", "logits"), ("probs", "log_probs")], ids="-".join)
@pytest.mark.usefixtures("x64")
def test_scaled_jensen_shannon_is_continuous_to_its_ends(rng, kinds):
    """Forward KL at beta = 0, reverse KL at 1, with the derivative that the inside tends to."""
    x, y = (oracle.log_probs(rng.normal(size=5)) for _ in range(2))
    x, y = (np.exp(z) if kind == "probs" else z for z, kind in zip((x, y), kinds, strict=True))
    hold = {"logits": kljax.Logits, "probs": kljax.Probs, "log_probs": kljax.LogProbs}
    x, y = (hold[kind](z) for z, kind in zip((x, y), kinds, strict=True))

    def f(beta):
        return kljax.jensen_shannon(x, y, beta=beta, normalized=True)

    for end, inside, limit in ((0.0, 1e-6, kljax.forward_kl), (1.0, 1 - 1e-6, kljax.reverse_kl)):
        assert_close(f(end), limit(x, y), np.float64)
        assert_close(jax.jit(f)(end), limit(x, y), np.float64)
        np.testing.assert_allclose(jax.grad(f)(end), jax.grad(f)(inside), rtol=1e-4)
        gradient = jax.grad(
            lambda x, end=end: kljax.jensen_shannon(x, y, beta=end, normalized=True)
        )
        want = jax.grad(limit)(x, y)
        for got, leaf in zip(jax.tree.leaves(gradient(x)), jax.tree.leaves(want), strict=True):
            assert_close(got, leaf, np.float64)


def test_unscaled_jensen_shannon_vanishes_at_its_ends():
    """J is 0 at beta = 0 and 1 even where one direction is infinite."""
    s, t = kljax.Probs([1.0, 0.0]), kljax.Probs([0.0, 1.0])
    for beta in (0.0, 1.0):
        assert kljax.jensen_shannon(s, t, beta=beta) == 0
        assert kljax.jensen_shannon(s, t, beta=jnp.float32(beta)) == 0
