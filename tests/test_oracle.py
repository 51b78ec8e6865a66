"""The oracle against SciPy and against finite differences, so that it deserves its name."""

import math

import mpmath
import numpy as np
import oracle
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr, softmax

S = np.array([[0.3, -1.2, 0.8, 2.0], [1.5, 0.1, -0.4, 0.0], [0.0, 0.0, 3.0, -2.0]])
T = np.array([[1.0, 0.2, -0.7, 0.4], [1.5, 0.1, -0.4, 0.0], [-1.0, 2.0, 0.5, 0.3]])
P_S, P_T = softmax(S, axis=-1), softmax(T, axis=-1)
NAMES = sorted(oracle.DIVERGENCES)
CLOSE = {"rtol": 1e-13, "atol": 1e-15}


def test_values_equal_scipy():
    """The divergences are SciPy's sums of rel_entr."""
    forward, reverse = rel_entr(P_T, P_S).sum(-1), rel_entr(P_S, P_T).sum(-1)
    np.testing.assert_allclose(oracle.divergence("forward_kl", S, T), forward, **CLOSE)
    np.testing.assert_allclose(oracle.divergence("reverse_kl", S, T), reverse, **CLOSE)
    np.testing.assert_allclose(oracle.divergence("kl", S, T), reverse, **CLOSE)
    np.testing.assert_allclose(oracle.divergence("jeffreys", S, T), forward + reverse, **CLOSE)
    np.testing.assert_allclose(
        oracle.divergence("jensen_shannon", S, T), jensenshannon(P_S, P_T, axis=-1) ** 2, **CLOSE
    )
    np.testing.assert_allclose(
        oracle.divergence("skew_forward_kl", S, T, alpha=0.3),
        rel_entr(P_T, 0.3 * P_T + 0.7 * P_S).sum(-1),
        **CLOSE,
    )
    np.testing.assert_allclose(
        oracle.divergence("skew_reverse_kl", S, T, alpha=0.3),
        rel_entr(P_S, 0.3 * P_S + 0.7 * P_T).sum(-1),
        **CLOSE,
    )


def test_zeros_equal_scipy():
    """A zero of p contributes 0, a zero of q under mass of p makes +inf, as in rel_entr."""
    p, q = np.array([0.0, 0.4, 0.6, 0.0]), np.array([0.5, 0.5, 0.0, 0.0])
    with np.errstate(divide="ignore"):
        terms = oracle.kl_terms(np.log(p), np.log(q))
    np.testing.assert_allclose(terms, rel_entr(p, q), **CLOSE)
    assert np.isnan(oracle.kl_terms(-np.inf, np.nan))


@pytest.mark.parametrize("end", [0, 1])
def test_normalized_jensen_shannon_reaches_its_limits(end):
    """At β = 0 it is forward KL, at β = 1 reverse KL, and the formula goes there."""
    near = oracle.divergence("jensen_shannon", S, T, beta=abs(end - 1e-4), normalized=True)
    at = oracle.divergence("jensen_shannon", S, T, beta=end, normalized=True)
    np.testing.assert_allclose(
        at, oracle.divergence("reverse_kl" if end else "forward_kl", S, T), **CLOSE
    )
    np.testing.assert_allclose(near, at, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("kind", ["logits", "log_probs", "probs"])
def test_log_probs_of_every_kind_agree(kind):
    """A distribution is the same however it is held, and log-softmax is SciPy's."""
    held = {"logits": S + 3.0, "log_probs": np.log(P_S), "probs": P_S}[kind]
    np.testing.assert_allclose(oracle.log_probs(held, kind), np.log(P_S), **CLOSE)
    np.testing.assert_allclose(
        oracle.log_probs(held, kind, temperature=2.0), np.log(softmax(S / 2, axis=-1)), **CLOSE
    )


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_where_is_slicing(temperature):
    """Masked logits equal the logits of the classes that are left, whatever is masked."""
    keep = np.array([True, False, True, True])
    spoiled = np.where(keep, S, np.nan)
    masked = oracle.divergence("forward_kl", spoiled, T, where=keep, temperature=temperature)
    sliced = oracle.divergence("forward_kl", S[:, keep], T[:, keep], temperature=temperature)
    np.testing.assert_allclose(masked, sliced, **CLOSE)
    gradient = oracle.gradient("forward_kl", spoiled, T, where=keep, temperature=temperature)
    np.testing.assert_allclose(gradient[:, 1], 0.0)
    assert oracle.divergence("forward_kl", S, T, where=np.zeros(4, bool)).tolist() == [0.0] * 3


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (-1, -2)])
def test_axis_is_transposition(axis):
    """The class axes may stand anywhere, and be several."""
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 2))
    axes = tuple(a % 3 for a in ((axis,) if isinstance(axis, int) else axis))
    rest = [a for a in range(3) if a not in axes]
    s_rows = s.transpose(*rest, *sorted(axes)).reshape([s.shape[a] for a in rest] + [-1])
    t_rows = t.transpose(*rest, *sorted(axes)).reshape(s_rows.shape)
    want = oracle.divergence("reverse_kl", s_rows, t_rows)
    np.testing.assert_allclose(oracle.divergence("reverse_kl", s, t, axis=axis), want, **CLOSE)
    gradient = oracle.gradient("reverse_kl", s, t, axis=axis)
    want = oracle.gradient("reverse_kl", s_rows, t_rows)
    got = gradient.transpose(*rest, *sorted(axes)).reshape(s_rows.shape)
    np.testing.assert_allclose(got, want, **CLOSE)


def _difference_quotient(f, x):
    """Return the gradient of f by central differences, good to about 1e-9."""
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        h = np.zeros_like(x)
        h[i] = 1e-5
        out[i] = (f(x + h) - f(x - h)).sum() / 2e-5
    return out


@pytest.mark.parametrize("wrt", [0, 1])
@pytest.mark.parametrize("kinds", [("logits", "probs"), ("log_probs", "logits")])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_difference_quotient(name, kinds, wrt):
    """The complex step finds the derivative, for both sides and every kind."""
    held = {"logits": (S, T), "log_probs": (np.log(P_S), np.log(P_T)), "probs": (P_S, P_T)}
    sides = [held[kind][i] for i, kind in enumerate(kinds)]

    def value(x):
        moved = [*sides]
        moved[wrt] = x
        return oracle.divergence(name, *moved, kinds=kinds, temperature=1.7)

    got = oracle.gradient(name, *sides, wrt, kinds=kinds, temperature=1.7)
    np.testing.assert_allclose(got, _difference_quotient(value, sides[wrt]), rtol=1e-7, atol=1e-8)


def test_gradient_at_an_impossible_class_is_the_limit():
    """With q = 0 under p > 0 the gradient to q's logits is softmax(q) - p, to p's logits NaN."""
    s = np.where(np.arange(4) == 2, -np.inf, S)
    np.testing.assert_allclose(
        oracle.gradient("forward_kl", s, T), softmax(s, axis=-1) - P_T, **CLOSE
    )
    assert np.isnan(oracle.gradient("forward_kl", s, T, 1)).all()
    np.testing.assert_allclose(oracle.gradient("reverse_kl", s, T)[:, 2], 0.0)


def test_gradient_to_a_shared_side_is_the_sum():
    """One distribution shared by the batch gets the sum of what its copies would get."""
    copies = np.broadcast_to(S[0], T.shape)
    np.testing.assert_allclose(
        oracle.gradient("jensen_shannon", S[0], T),
        oracle.gradient("jensen_shannon", copies, T).sum(0),
        **CLOSE,
    )


@pytest.mark.parametrize("name", NAMES)
def test_hessian_is_the_difference_quotient(name):
    """The Hessian is the derivative of the gradient and is symmetric; blocks are transposes."""
    got = oracle.hessian(name, S[0], T[0])
    np.testing.assert_allclose(got, got.T, rtol=1e-9, atol=1e-11)
    h = 1e-5 * np.eye(4)
    want = [
        oracle.gradient(name, S[0] + h[j], T[0]) - oracle.gradient(name, S[0] - h[j], T[0])
        for j in range(4)
    ]
    np.testing.assert_allclose(got, np.stack(want, -1) / 2e-5, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        oracle.hessian(name, S[0], T[0], (0, 1)),
        oracle.hessian(name, S[0], T[0], (1, 0)).T,
        rtol=1e-9,
        atol=1e-11,
    )


def test_derivative_by_a_scalar_is_the_difference_quotient():
    """Temperature, α and β have derivatives too."""
    for name, key, at in (
        ("forward_kl", "temperature", 2.0),
        ("skew_forward_kl", "alpha", 0.3),
        ("jensen_shannon", "beta", 0.7),
    ):

        def value(x, name=name, key=key):
            return oracle.divergence(name, S, T, **{key: x})

        want = (value(at + 1e-5) - value(at - 1e-5)) / 2e-5
        np.testing.assert_allclose(oracle.derivative(value, at), want, rtol=1e-7, atol=1e-9)


def test_derivative_by_temperature_passes_over_missing_classes():
    """Masked and impossible classes take no part in it."""
    keep = np.array([True, False, True, True])
    s, t = np.where(keep, S, -np.inf), np.where(keep, T, -np.inf)
    sliced = S[:, keep], T[:, keep]
    want = oracle.derivative(lambda x: oracle.divergence("reverse_kl", *sliced, temperature=x), 2.0)
    for sides, where in (((S, T), keep), ((s, t), None)):

        def value(x, sides=sides, where=where):
            return oracle.divergence("reverse_kl", *sides, temperature=x, where=where)

        np.testing.assert_allclose(oracle.derivative(value, 2.0), want, **CLOSE)


def test_reduce_follows_its_definition():
    """A weight of 0 removes even a NaN, 0/0 is 0, batchmean knows only the leading axis."""
    values, weights = np.array([[1.0, np.nan], [3.0, 5.0]]), np.array([[1, 0], [2, 1]])
    assert oracle.reduce(values, weights).tolist() == [[1.0, 0.0], [6.0, 5.0]]
    assert oracle.reduce(values, weights, "sum") == 12.0
    assert oracle.reduce(values, weights, "mean") == 3.0
    assert oracle.reduce(values, weights, "mean", normalizer=24) == 0.5
    assert oracle.reduce(values, weights, "mean", normalizer=0) == 0.0
    assert oracle.reduce(values, weights, "batchmean") == 6.0
    assert oracle.reduce(values, weights * 0, "mean") == 0.0
    assert oracle.reduce(7.0, reduction="batchmean") == 7.0
    assert np.isnan(oracle.reduce(values, reduction="sum"))


def test_distillation_loss_is_the_weighted_sum():
    """T² times the soft term plus the hard term, each with its own weights."""
    weights, label_weights = np.array([1, 1, 2]), np.array([1, 0, 0])
    loss, metrics = oracle.distillation_loss(
        S,
        T,
        np.array([3, 99, 0]),
        temperature=2.0,
        soft_weight=0.7,
        hard_weight=0.3,
        weights=weights,
        label_weights=label_weights,
    )
    soft = rel_entr(softmax(T / 2, axis=-1), softmax(S / 2, axis=-1)).sum(-1) @ weights / 4
    np.testing.assert_allclose(loss, 0.7 * 4 * soft - 0.3 * math.log(P_S[0, 3]), **CLOSE)
    np.testing.assert_allclose(metrics["soft"], soft, **CLOSE)
    np.testing.assert_allclose(metrics["hard"], -math.log(P_S[0, 3]), **CLOSE)
    assert metrics["agreement"] == 0.25
    assert metrics["weight_sum"] == 4.0


def test_exact_forward_kl_survives_cancellation():
    """Where float64 loses every digit the exact form keeps nine, known from the expansion."""
    y = np.linspace(-3, 3, 400)
    d = 1e-9 * np.sin(np.arange(400.0))
    x = y + d
    # D = Var_p(d)/2 to second order; the third is a billion times smaller.
    d, p = x - y, softmax(y)
    with mpmath.workdps(30):
        want = float(mpmath.mpf(p @ (d - p @ d) ** 2) / 2)
    np.testing.assert_allclose(oracle.forward_kl_exact(x, y), want, rtol=1e-8)
    np.testing.assert_allclose(
        oracle.forward_kl_exact(S[0], T[0]), oracle.divergence("forward_kl", S[0], T[0]), **CLOSE
    )
