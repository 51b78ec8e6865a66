"""Every divergence at the points where formulas break, in every differentiation mode.

All points are stacked into one batch, so that each combination compiles once; a point that
poisoned its neighbours would fail theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, named

import kljax

INF = np.inf
DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
    "cross_entropy": {},
}
HOLD = {"logits": kljax.Logits, "log_probs": kljax.LogProbs, "probs": kljax.Probs}
KINDS = [
    ("logits", "logits"),
    ("log_probs", "probs"),
    ("probs", "log_probs"),
]
POINTS = {  # logits of (predictions, targets)
    "inside": ([0.3, -1.2, 0.8, 0.1], [1.1, 0.2, -0.7, 0.4]),
    "equal": ([0.5, 1.0, 2.0, 0.0], [0.5, 1.0, 2.0, 0.0]),
    "close": ([0.5, 1.0, 2.0, 0.0], [0.501, 1.0, 1.999, 0.0]),
    "zero target": ([0.5, 1.0, 2.0, 0.0], [-INF, 1.0, 0.0, 0.3]),
    "zero prediction": ([-INF, 1.0, 2.0, 0.0], [0.1, 1.0, 0.0, 0.3]),
    "both zero": ([-INF, 1.0, 2.0, 0.0], [-INF, 1.0, 0.0, 0.3]),
    "one-hot target": ([0.0, 1.0, 2.0, 0.5], [-INF, -INF, 0.0, -INF]),
    "one-hot both": ([-INF, -INF, 2.0, -INF], [-INF, -INF, 0.0, -INF]),
    "confident": ([9.0, -9.0, 0.0, 0.0], [-9.0, 9.0, 0.0, 0.0]),
}


def held(side, kind):
    logits = np.array([point[side] for point in POINTS.values()])
    log_probs = oracle.log_probs(logits)
    return {"logits": logits, "log_probs": log_probs, "probs": np.exp(log_probs)}[kind]


def expected_gradient(name, x, y, wrt, kinds, value, params):
    """The oracle's gradient; where the value is +inf, design by hand: finite to q, NaN to p."""
    if np.isfinite(value):
        gradient = oracle.gradient(name, x, y, wrt, kinds=kinds, **params)
        if (name, wrt, kinds[1]) == ("cross_entropy", 1, "probs"):  # linear, at zero targets too
            log_s = oracle.log_probs(x, kinds[0])
            gradient = np.where((y == 0) & ~np.isneginf(log_s), -log_s, gradient)
        return gradient
    sides = [oracle.log_probs(z, kind) for z, kind in zip((x, y), kinds, strict=True)]
    p_side = {"forward_kl": 1, "cross_entropy": 1, "reverse_kl": 0}.get(name)
    if p_side is None:  # jeffreys: the side that put mass where the other has none
        p_side = 0 if np.any(np.isneginf(sides[1]) & ~np.isneginf(sides[0])) else 1
    if wrt == p_side:
        return np.full_like(x, np.nan)
    p, log_q = np.exp(sides[p_side]), sides[wrt]
    slope = -p
    if name == "jeffreys":  # the other direction is finite
        reverse = "reverse_kl" if wrt == 0 else "forward_kl"
        logs = ("log_probs", "log_probs")
        slope = slope + oracle.gradient(reverse, *sides, wrt, kinds=logs)
    if kinds[wrt] == "logits":
        return slope - np.exp(log_q) * slope.sum()
    if kinds[wrt] == "log_probs":
        return slope
    q = np.exp(log_q)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((slope == 0) & (q == 0), 0, slope / q)


@pytest.mark.slow(but=["forward_kl-logits-logits", "cross_entropy-probs-log_probs"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.usefixtures("x64")
def test_every_point_in_every_mode(name, kinds):
    """Value, reverse, forward and second order agree with the oracle, and nothing leaks."""
    params = DIVERGENCES[name]
    x, y = held(0, kinds[0]), held(1, kinds[1])

    def f(x, y):
        compute = named(name)
        return compute(HOLD[kinds[0]](x), HOLD[kinds[1]](y), **params)

    values = oracle.divergence(name, x, y, kinds=kinds, **params)
    assert_close(f(x, y), values, np.float64)
    for wrt in (0, 1):
        want = np.stack(
            [
                expected_gradient(name, x[n], y[n], wrt, kinds, values[n], params)
                for n in range(len(x))
            ]
        )
        reverse, forward, along, second = _in_every_mode(f, wrt, x, y, kinds[0] == "logits")
        np.testing.assert_allclose(reverse, want, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(forward, want, rtol=1e-9, atol=1e-12)
        finite = np.isfinite(want).all(-1)
        assert finite.sum() >= 6
        assert np.isfinite(along[finite]).all()
        if second is not None:  # along (1, …, 1): its row sums, by another order of modes
            np.testing.assert_allclose(along[finite], second[finite].sum(-1), rtol=1e-9, atol=1e-9)


def _in_every_mode(f, wrt, x, y, with_hessian):
    def directional(x, y):
        gradient = jax.grad(lambda z: f(z, y) if wrt == 0 else f(x, z))
        side = (x, y)[wrt]
        return jax.jvp(gradient, (side,), (jnp.ones_like(side),))[1]

    modes = [jax.grad(f, wrt), jax.jacfwd(f, wrt), directional]
    modes += [jax.hessian(f, wrt)] if with_hessian else []
    computed = jax.jit(jax.vmap(lambda x, y: tuple(mode(x, y) for mode in modes)))(x, y)
    return [*map(np.asarray, computed), *([] if with_hessian else [None])]


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.usefixtures("x64")
def test_hessian_is_the_oracle_s(name):
    """Second derivatives to both sides and across, inside, at equality and at zero classes."""
    params = DIVERGENCES[name]
    compute = jax.jit(jax.hessian(lambda x, y: named(name)(x, y, **params), (0, 1)))
    for key in ("inside", "equal", "close", "both zero"):
        x, y = (np.array(z) for z in POINTS[key])
        got = compute(x, y)
        live = np.isfinite(x)
        for i, j in ((0, 0), (1, 1), (0, 1)):
            wrt = i if i == j else (i, j)
            want = oracle.hessian(name, x[live], y[live], wrt, **params)
            full = np.zeros((4, 4))
            full[np.ix_(live, live)] = want
            np.testing.assert_allclose(got[i][j], full, rtol=1e-7, atol=1e-9)


@pytest.mark.slow(but=["forward_kl-logits", "skew_forward_kl-probs"])
@pytest.mark.parametrize("kind", HOLD)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_nan_is_never_hidden(name, kind):
    """NaN in an unmasked place of either side gives NaN out, and a NaN gradient to both sides."""
    whole = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.0, 0.4, 0.6])
    whole = [jnp.log(x) for x in whole] if kind == "log_probs" else whole
    x, y = (jnp.stack([side, side]).at[n, 0].set(jnp.nan) for n, side in enumerate(whole))

    def f(*sides):
        values = named(name)(*map(HOLD[kind], sides), **DIVERGENCES[name])
        return values.sum(), values

    (gradients, values) = jax.jit(jax.grad(f, (0, 1), has_aux=True))(x, y)
    assert np.isnan(values).all()
    assert np.isnan(gradients).all()


@pytest.mark.slow(but=["forward_kl-logits-logits", "jensen_shannon-log_probs-probs"])
@pytest.mark.parametrize("kinds", KINDS[:2], ids="-".join)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_masked_classes_have_no_effect(name, kinds):
    """A mask is a slice, whatever stands at the masked classes, in value and all derivatives."""
    params = DIVERGENCES[name]
    slim = [held(i, kind)[[0, 3]].astype(np.float32) for i, kind in enumerate(kinds)]
    masked = [2, 2, 2]
    wide = [np.insert(x, masked, [np.nan, INF, -INF], axis=-1) for x in slim]
    where = jnp.array([True, True, False, False, False, True, True])

    def f(x, y, where=None):
        sides = HOLD[kinds[0]](x), HOLD[kinds[1]](y)
        return named(name)(*sides, where=where, reduction="sum", **params)

    @jax.jit
    def masked_derivatives(x, y):
        ones = jnp.ones_like(x), jnp.ones_like(y)
        along = jax.jvp(jax.grad(lambda x, y: f(x, y, where)), (x, y), ones)[1]
        return jax.value_and_grad(f, (0, 1))(x, y, where), along

    (value, gradients), along = masked_derivatives(*wide)
    want, want_gradients = jax.jit(jax.value_and_grad(f, (0, 1)))(*slim)
    assert_close(value, want)
    assert (along[:, 2:5] == 0).all()
    for got, slim_gradient in zip(gradients, want_gradients, strict=True):
        assert_close(got, np.insert(np.asarray(slim_gradient, np.float64), masked, 0, axis=-1))


@pytest.mark.slow(but=["forward_kl", "entropy"])
@pytest.mark.parametrize("name", [*DIVERGENCES, "entropy"])
def test_a_fully_masked_row_is_zero(name):
    """No class left: value 0 and gradient 0, beside rows that are computed as ever."""
    x = jnp.array([[1.0, jnp.nan], [1.0, 2.0]])
    where = jnp.array([[False, False], [True, True]])

    def f(x):
        sides = (x,) if name == "entropy" else (x, x[:, ::-1])
        return named(name)(*sides, where=where)

    assert f(x)[0] == 0
    assert np.isfinite(f(x)[1])
    total = lambda x: f(x).sum()  # noqa: E731
    along = lambda x: jax.jvp(jax.grad(total), (x,), (jnp.ones_like(x),))  # noqa: E731
    for derivative in jax.jit(along)(x):  # first and second order
        assert (derivative[0] == 0).all()
        assert np.isfinite(derivative[1]).all()


def test_a_row_without_any_mass_is_nan():
    """Logits that are all -inf are no distribution: NaN, not a silent 0."""
    assert np.isnan(kljax.forward_kl(jnp.full(3, -jnp.inf), jnp.zeros(3)))


def test_mass_too_small_for_the_dtype_still_counts():
    """p > 0 over q = 0 is +inf even where p underflows float32."""
    p, q = jnp.array([0.0, -200.0]), jnp.array([0.0, -jnp.inf])
    assert kljax.kl(p, q) == np.inf
    assert kljax.kl(kljax.LogProbs(p), kljax.LogProbs(q)) == np.inf
    assert np.isnan(jax.grad(lambda p: kljax.kl(p, q))(p)).all()


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_kl_terms_are_the_textbook_s(kinds):
    """Elementwise p (log p - log q), with the same zeros, in value and derivatives."""
    p, q = (held(i, kind).astype(np.float32) for i, kind in enumerate(kinds))

    def f(p, q):
        return kljax.kl_terms(HOLD[kinds[0]](p), HOLD[kinds[1]](q))

    logs = [oracle.log_probs(z, kind) for z, kind in zip((p, q), kinds, strict=True)]
    assert_close(f(p, q), oracle.kl_terms(*logs))
    finite = np.isfinite(oracle.divergence("kl", p, q, kinds=kinds))
    for i in (0, 1):
        summed = jax.grad(lambda p, q: f(p, q).sum(), i)(p[finite], q[finite])
        want = oracle.gradient("kl", p[finite], q[finite], i, kinds=kinds)
        np.testing.assert_allclose(summed, want, rtol=2e-5, atol=1e-5)
        forward = jax.vmap(jax.jacfwd(f, i))(p[finite], q[finite]).sum(1)
        np.testing.assert_allclose(forward, want, rtol=2e-5, atol=1e-5)


def test_kl_terms_at_zeros():
    """0 where p = 0, +inf where only q = 0; derivatives are those of the table."""
    p, q = jnp.array([0.0, 0.0, 0.5, 0.5]), jnp.array([0.0, 0.5, 0.0, 0.5])
    f = lambda p, q: kljax.kl_terms(kljax.Probs(p), kljax.Probs(q))  # noqa: E731
    np.testing.assert_array_equal(f(p, q), [0, 0, np.inf, 0])
    for mode in (jax.jacrev, jax.jacfwd):
        np.testing.assert_array_equal(np.diag(mode(f, 1)(p, q)), [0, 0, -np.inf, -1])
        assert (np.diag(mode(f, 0)(p, q))[:2] == 0).all()
    np.testing.assert_array_equal(f(p, q), kljax.kl_terms(kljax.Probs(p), kljax.Probs(q), axis=0))
