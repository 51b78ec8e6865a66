"""KL from samples: exact expectations over small distributions, by enumeration."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, report

import kljax

INF, NAN = np.inf, np.nan
P, Q, MU = (
    np.float32([0.3, -1.2, 0.8]),
    np.float32([1.0, 0.2, -0.5]),
    np.float32([-0.4, 0.6, 0.1]),
)


def log_probs(logits):
    return jax.nn.log_softmax(jnp.asarray(logits))


def expected(loss, drawn_from, logits=P):
    """The expectation of a loss of every class, and of its gradient to p's logits."""
    shares = jax.nn.softmax(jnp.asarray(drawn_from))
    return jax.value_and_grad(lambda logits: jnp.sum(shares * loss(log_probs(logits))))(
        jnp.asarray(logits)
    )


KL, BACK = (
    oracle.divergence("reverse_kl", np.float64(P), np.float64(Q)),
    oracle.divergence("forward_kl", np.float64(P), np.float64(Q)),
)
TO_P = oracle.gradient("reverse_kl", np.float64(P), np.float64(Q), 0)
BACK_TO_P = oracle.gradient("forward_kl", np.float64(P), np.float64(Q), 0)


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [("k1", KL, 0 * TO_P), ("k2", None, TO_P), ("k3", KL, BACK_TO_P)],
)
def test_what_a_value_and_its_gradient_estimate(estimator, value, gradient):
    """The table of the docstring."""
    loss = lambda log_p: kljax.sampled_kl(log_p, log_probs(Q), estimator=estimator)  # noqa: E731
    got, slope = expected(loss, P)
    if value is not None:
        assert_close(got, value)
    else:
        assert abs(got - KL) > 0.01
    assert_close(slope, gradient)


@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_loss_has_the_right_gradient(value, off_policy):
    """∇ D(p‖q), on-policy and off, whichever value is asked for; second order too."""
    behavior = {"log_behavior": log_probs(MU)} if off_policy else {}
    drawn_from = MU if off_policy else P
    loss = partial(kljax.sampled_kl_loss, log_q=log_probs(Q), value=value, **behavior)
    got, slope = expected(loss, drawn_from)
    if value != "k2":
        assert_close(got, KL)
    assert_close(slope, TO_P)
    shares = jax.nn.softmax(jnp.asarray(drawn_from))
    hessian = jax.hessian(lambda x: jnp.sum(shares * loss(log_probs(x))))(jnp.asarray(P))
    assert_close(hessian, oracle.hessian("reverse_kl", np.float64(P), np.float64(Q))[:3, :3])


def test_ratios_are_truncated():
    log_p, log_q, log_b = (log_probs(x) for x in (P, Q, MU))
    loss = partial(kljax.sampled_kl_loss, log_q=log_q, log_behavior=log_b, max_ratio=1.2)
    ratio = np.minimum(np.exp(np.float64(log_p - log_b)), 1.2)
    delta = np.float64(log_p - log_q)
    assert (ratio == 1.2).any()
    assert (ratio < 1.2).any()
    assert_close(loss(log_p), ratio * (np.exp(-delta) - 1 + delta))
    assert_close(jax.grad(lambda x: loss(x).sum())(log_p), ratio * delta)
    traced = jax.jit(
        lambda most: kljax.sampled_kl_loss(log_p, log_q, log_behavior=log_b, max_ratio=most)
    )
    assert_close(traced(1.2), loss(log_p))


@pytest.mark.parametrize("off_policy", [False, True])
def test_of_sequences(off_policy):
    """Two tokens, the second's distribution depends on the first: every sequence enumerated."""
    rng = np.random.default_rng(1)
    tables = [(rng.normal(size=2), rng.normal(size=(2, 2))) for _ in range(3)]
    p, q, b = (tuple(map(jnp.float32, table)) for table in tables)
    sequences = np.array(list(product([0, 1], repeat=2)))

    def tokens(table):
        first, then = jax.nn.log_softmax(table[0]), jax.nn.log_softmax(table[1])
        return jnp.stack([first[sequences[:, 0]], then[sequences[:, 0], sequences[:, 1]]], -1)

    def exact(p):
        one, other = (tokens(table).sum(-1) for table in (p, q))
        return jnp.sum(jnp.exp(one) * (one - other))

    source = b if off_policy else p
    shares = jax.lax.stop_gradient(jnp.exp(tokens(source).sum(-1)))

    def sampled(p):
        behavior = {"log_behavior": tokens(b)} if off_policy else {}
        return jnp.sum(
            shares * kljax.sampled_kl_loss(tokens(p), tokens(q), sequence_axis=1, **behavior)
        )

    for got, want in zip(
        jax.tree.leaves(jax.value_and_grad(sampled)(p)),
        jax.tree.leaves(jax.value_and_grad(exact)(p)),
        strict=True,
    ):
        assert_close(got, want)


def test_masks_of_tokens_and_sequences(rng):
    """Padding is left out of a sequence's sum; a sequence of padding does not count."""
    log_p, log_q = -np.abs(rng.normal(size=(2, 3, 4))).astype(np.float32)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    log_p[mask == 0], log_q[mask == 0] = NAN, INF
    delta = [(log_p - log_q)[n][mask[n] == 1].sum() for n in range(2)]
    f = partial(kljax.sampled_kl, estimator="k1", sequence_axis=-1)
    assert_close(f(log_p, log_q, weights=mask), [*delta, 0])
    assert_close(f(log_p, log_q, weights=mask, reduction="mean"), np.mean(delta))
    gradient = jax.grad(lambda p: f(p, log_q, weights=mask, reduction="sum"))(log_p)
    np.testing.assert_array_equal(gradient, mask)
    some = np.array([0.5, 2.0, 0.0], np.float32)
    clean_p, clean_q = (np.where(mask == 1, x, 0) for x in (log_p, log_q))
    assert_close(f(clean_p, clean_q, weights=some), np.array([*delta, 0]) * some)


def test_a_weight_of_0_removes_what_it_must():
    """Where k3 overflows, and where the reference is NaN: value and gradients are 0."""
    policy, reference = jnp.array([-1.0, -1e10, -1.0]), jnp.array([-1.0, 0.0, NAN])
    weights = jnp.array([1, 0, 0])
    for f in (kljax.sampled_kl, kljax.sampled_kl_loss):
        for reduction in ("none", "mean"):
            total = lambda p, q, f=f, r=reduction: f(p, q, weights=weights, reduction=r).sum()  # noqa: E731
            value, gradients = jax.value_and_grad(total, (0, 1))(policy, reference)
            assert value == 0
            np.testing.assert_array_equal(gradients, np.zeros((2, 3)))


def test_exact_near_0_and_far():
    delta = np.float32([0, 1e-6, -1e-4, 0.3, 30, -30, 80])
    log_q = np.float32(-100 * np.ones(7))
    log_p = log_q + delta
    exact = np.float64(log_p) - log_q
    want = np.expm1(-exact) + exact
    small = np.abs(exact) < 1e-2
    want[small] = (exact**2 / 2 - exact**3 / 6)[small]
    for got in (kljax.sampled_kl(log_p, log_q), kljax.sampled_kl_loss(log_p, log_q)):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    off = kljax.sampled_kl_loss(log_p - 100, log_q, log_behavior=log_q)
    assert np.isfinite(off).all()


def test_where_a_probability_is_0():
    """Off-policy samples that p never takes: no NaN, and no gradient."""
    log_p = jnp.array([-INF, -0.5])
    for value, want in {"k1": 0.0, "k2": 0.0, "k3": np.exp(-1.0)}.items():
        f = lambda p, value=value: kljax.sampled_kl_loss(  # noqa: E731
            p, jnp.array([-2.0, -0.5]), log_behavior=jnp.array([-1.0, -0.5]), value=value
        )
        assert_close(f(log_p), [want, 0])
        np.testing.assert_array_equal(jax.grad(lambda p, f=f: f(p).sum())(log_p), [0, 0])
    assert kljax.sampled_kl(jnp.array([-0.5]), jnp.array([-INF])) == INF


def test_reductions_types_and_transforms(rng):
    log_p, log_q = -np.abs(rng.normal(size=(2, 4, 3))).astype(np.float32)
    each = np.float64(log_p) - log_q
    k3 = np.exp(-each) - 1 + each
    weights = rng.uniform(size=(4, 3)).astype(np.float32)
    f = kljax.sampled_kl
    assert_close(
        f(log_p, log_q, weights=weights, reduction="mean"), (k3 * weights).sum() / weights.sum()
    )
    assert_close(f(log_p, log_q, reduction="batchmean"), k3.sum() / 4)
    assert_close(f(log_p, log_q, reduction="mean", normalizer=5.0), k3.sum() / 5)
    mapped = jax.vmap(partial(f, reduction="mean", axis_name="n"), axis_name="n")(log_p, log_q)
    assert_close(mapped, np.full(4, k3.mean()))
    narrow = f(jnp.bfloat16(log_p), jnp.bfloat16(log_q))
    assert narrow.dtype == jnp.float32
    gradient = jax.grad(lambda p: kljax.sampled_kl_loss(p, log_q).sum())(jnp.bfloat16(log_p))
    assert gradient.dtype == jnp.bfloat16
    forward = jax.jvp(lambda p: kljax.sampled_kl_loss(p, log_q), (log_p,), (np.ones_like(log_p),))
    assert_close(forward[1], each)
    # nothing flows to the reference
    np.testing.assert_array_equal(
        jax.grad(lambda q: kljax.sampled_kl_loss(log_p, q).sum())(log_q), np.zeros((4, 3))
    )


ERRORS = [
    (lambda f: f([0.0], [0.0, 1.0]), r"log_q must have shape \(1,\), like log_p; got \(2,\)"),
    (lambda f: f([1], [1]), "log_p must be floating point"),
    (lambda f: f([0.0], [0.0], sequence_axis=1), "sequence_axis must be within the 1 axes"),
    (lambda f: f([0.0], [0.0], weights=[1.0, 2.0]), r"weights must have shape \(1,\)"),
    (lambda f: f([0.0], [0.0], reduction="max"), "reduction must be one of"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
@pytest.mark.parametrize("f", [kljax.sampled_kl, kljax.sampled_kl_loss])
def test_errors(f, call, message):
    with pytest.raises((TypeError, ValueError), match=f"{f.__name__}: {message}"):
        call(f)


def test_errors_of_one_alone():
    with pytest.raises(ValueError, match='estimator must be one of "k1", "k2", "k3"; got "k4"'):
        kljax.sampled_kl([0.0], [0.0], estimator="k4")
    with pytest.raises(ValueError, match='value must be one of "k1", "k2", "k3"'):
        kljax.sampled_kl_loss([0.0], [0.0], value="k4")
    with pytest.raises(ValueError, match="max_ratio must be given with log_behavior"):
        kljax.sampled_kl_loss([0.0], [0.0], max_ratio=2.0)
    with pytest.raises(ValueError, match="max_ratio must be positive; got -1"):
        kljax.sampled_kl_loss([0.0], [0.0], log_behavior=[0.0], max_ratio=-1.0)


def test_negative_weights_are_reported():
    f = lambda w: kljax.sampled_kl(jnp.zeros(2), jnp.zeros(2), weights=w)  # noqa: E731
    assert "weights must not be negative" in report(f, jnp.array([1.0, -1.0]))
