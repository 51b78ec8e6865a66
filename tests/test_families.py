"""Parametric families: against integrals and sums of densities, and at the edges."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import oracle_families as oracle
import pytest
from helpers import assert_close, report
from jax.flatten_util import ravel_pytree

import kljax
from kljax import families

INF, NAN = np.inf, np.nan

# Of each family some pairs: apart, and close.
PAIRS = {
    "Normal": [
        ({"loc": 0.3, "scale": 0.7}, {"loc": -0.5, "scale": 1.2}),
        ({"loc": 3.0, "scale": 1e-3}, {"loc": -2.0, "scale": 50.0}),
        ({"loc": 1e-4, "scale": 1.00001}, {"loc": 0.0, "scale": 1.0}),
    ],
    "LogNormal": [
        ({"loc": 0.3, "scale": 0.7}, {"loc": -0.5, "scale": 1.2}),
        ({"loc": 1e-4, "scale": 1.0001}, {"loc": 0.0, "scale": 1.0}),
    ],
    "Laplace": [
        ({"loc": 0.3, "scale": 0.7}, {"loc": -0.5, "scale": 1.2}),
        ({"loc": 9.0, "scale": 0.1}, {"loc": -5.0, "scale": 1.2}),
        ({"loc": 1e-3, "scale": 1.0001}, {"loc": 0.0, "scale": 1.0}),
    ],
    "Gumbel": [
        ({"loc": 0.3, "scale": 0.7}, {"loc": -0.5, "scale": 1.2}),
        ({"loc": 0.3, "scale": 4.0}, {"loc": 1.5, "scale": 0.9}),
        ({"loc": 1e-3, "scale": 1.0003}, {"loc": 0.0, "scale": 1.0}),
    ],
    "Gamma": [
        ({"concentration": 2.0, "rate": 0.7}, {"concentration": 3.1, "rate": 1.2}),
        ({"concentration": 0.2, "rate": 0.7}, {"concentration": 7.0, "rate": 9.0}),
        ({"concentration": 40.0, "rate": 4.0}, {"concentration": 15.0, "rate": 3.0}),
        ({"concentration": 2.0, "rate": 1.0}, {"concentration": 2.001, "rate": 1.0003}),
        ({"concentration": 5000.0, "rate": 50.0}, {"concentration": 5010.0, "rate": 50.5}),
    ],
    "Exponential": [
        ({"rate": 0.7}, {"rate": 1.2}),
        ({"rate": 100.0}, {"rate": 0.01}),
        ({"rate": 1.0}, {"rate": 1.0001}),
    ],
    "Poisson": [
        ({"rate": 0.7}, {"rate": 2.2}),
        ({"rate": 50.0}, {"rate": 0.3}),
        ({"rate": 3.0}, {"rate": 3.0003}),
    ],
    "Bernoulli": [
        ({"probs": 0.3}, {"probs": 0.6}),
        ({"probs": 1e-6}, {"probs": 0.9}),
        ({"probs": 0.3}, {"probs": 0.30001}),
        ({"probs": 1e-9}, {"probs": 1.0001e-9}),
    ],
    "Geometric": [
        ({"probs": 0.3}, {"probs": 0.6}),
        ({"probs": 0.9}, {"probs": 0.1}),
        ({"probs": 0.3}, {"probs": 0.30001}),
    ],
    "Binomial": [
        ({"total_count": 7.0, "probs": 0.3}, {"total_count": 7.0, "probs": 0.6}),
        ({"total_count": 9.0, "probs": 0.3}, {"total_count": 9.0, "probs": 0.30001}),
    ],
    "Uniform": [
        ({"low": 0.3, "high": 0.7}, {"low": -0.5, "high": 1.2}),
        ({"low": 0.0, "high": 1.0}, {"low": -1e-4, "high": 1.0002}),
    ],
    "VonMises": [
        ({"loc": 0.3, "concentration": 0.7}, {"loc": -0.5, "concentration": 1.2}),
        ({"loc": 0.3, "concentration": 30.0}, {"loc": -2.5, "concentration": 3.0}),
        ({"loc": 0.0, "concentration": 0.5}, {"loc": 0.0, "concentration": 300.0}),
        ({"loc": 0.0, "concentration": 4000.0}, {"loc": 0.0, "concentration": 800.0}),
        ({"loc": 1e-4, "concentration": 2.0}, {"loc": 0.0, "concentration": 2.001}),
        ({"loc": 0.0, "concentration": 18.0}, {"loc": 0.0, "concentration": 22.0}),
    ],
    "Beta": [
        (
            {"concentration1": 2.0, "concentration0": 0.7},
            {"concentration1": 0.6, "concentration0": 3.0},
        ),
        (
            {"concentration1": 20.0, "concentration0": 9.0},
            {"concentration1": 20.01, "concentration0": 9.003},
        ),
    ],
    "Dirichlet": [
        ({"concentration": [0.5, 2.0, 20.0]}, {"concentration": [3.0, 0.7, 6.0]}),
        ({"concentration": [1.0, 2.0, 3.0]}, {"concentration": [1.001, 2.002, 3.003]}),
    ],
    "Categorical": [
        ({"probs": [0.5, 0.25, 0.25]}, {"probs": [0.125, 0.75, 0.125]}),
        ({"probs": [0.5, 0.5, 0.0]}, {"probs": [0.25, 0.5, 0.25]}),
    ],
    "MultivariateNormal": [
        (
            {"loc": [0.3, -0.2], "covariance_matrix": [[1.0, 0.3], [0.3, 0.9]]},
            {"loc": [-0.5, 0.4], "covariance_matrix": [[2.0, -0.4], [-0.4, 0.5]]},
        ),
    ],
}
WITHOUT_ENTROPY = {"Poisson", "Binomial"}
SLOW_GRADIENTS = {"Beta", "Dirichlet", "Gamma", "VonMises", "Gumbel"}  # for the oracle


def sides(name, dtype=np.float32):
    """All pairs of a family as two batches, and each of them as the oracle takes it."""
    pairs = [
        [{k: np.asarray(x, dtype) for k, x in side.items()} for side in pair]
        for pair in PAIRS[name]
    ]
    batches = [jax.tree.map(lambda *xs: np.stack(xs), *side) for side in zip(*pairs, strict=True)]
    exact = [[{k: np.float64(x).tolist() for k, x in s.items()} for s in pair] for pair in pairs]
    return [getattr(families, name)(**batch) for batch in batches], exact


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # to compile fast
def values_of(p, q):
    found = {f.__name__: f(p, q) for f in (kljax.kl, kljax.forward_kl, kljax.reverse_kl)}
    found["jeffreys"] = kljax.jeffreys(p, q)
    equal = jax.vjp(kljax.kl, p, p)
    found["equal"], found["at equality"] = equal[0], equal[1](jnp.ones_like(equal[0]))
    if type(p).__name__ not in WITHOUT_ENTROPY:
        found["entropy"], found["cross_entropy"] = kljax.entropy(p), kljax.cross_entropy(q, p)
    return found


@pytest.mark.slow(but=sorted(PAIRS.keys() - {"Beta", "Gamma"}))  # as Dirichlet is
@pytest.mark.parametrize("name", PAIRS)
def test_values(name):
    """And exactly 0 at equality, with a gradient of 0; but a uniform one's support moves."""
    (p, q), pairs = sides(name)
    got = values_of(p, q)
    want = np.array([oracle.kl(name, a, b) for a, b in pairs])
    back = np.array([oracle.kl(name, b, a) for a, b in pairs])
    close = partial(np.testing.assert_allclose, rtol=4e-5)
    close(got["kl"], want)
    close(got["forward_kl"], back)
    close(got["reverse_kl"], want)
    close(got["jeffreys"], want + back)
    np.testing.assert_array_equal(got["equal"], 0)
    if name != "Uniform":
        for x in jax.tree.leaves(got["at equality"]):
            np.testing.assert_array_equal(x, 0)
    if name not in WITHOUT_ENTROPY:
        assert_close(got["entropy"], [oracle.entropy(name, a) for a, _ in pairs])
        assert_close(got["cross_entropy"], [oracle.cross_entropy(name, a, b) for a, b in pairs])


@pytest.mark.parametrize("name", sorted(WITHOUT_ENTROPY))
def test_no_closed_form_of_an_entropy(name):
    (p, q), _ = sides(name)
    message = f"one of known entropy; got {name}. Sum or sample it"
    with pytest.raises(TypeError, match=f"^entropy: the distribution must be {message}"):
        kljax.entropy(p)
    with pytest.raises(TypeError, match=f"^cross_entropy: the distribution must be {message}"):
        kljax.cross_entropy(q, p)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PAIRS)
def test_values_in_float64(name):
    (p, q), pairs = sides(name, np.float64)
    got = kljax.kl(p, q)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [oracle.kl(name, *pair) for pair in pairs], rtol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_GRADIENTS else [])
        for name in PAIRS
    ],
)
def test_gradients(name):
    """In both modes."""
    (p, q), pairs = sides(name)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def in_both_modes(p, q):
        flat, unravel = ravel_pytree((p, q))
        total = lambda x: kljax.kl(*unravel(x), reduction="sum")  # noqa: E731
        return jax.grad(total)(flat), jax.jacfwd(total)(flat), unravel(jax.grad(total)(flat))

    reverse, forward, got = in_both_modes(p, q)
    np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-6 * abs(reverse).max())
    for n, pair in enumerate(pairs):
        if any(0 in np.ravel(side.get("probs", 1)) for side in pair):
            continue  # the oracle has no derivative there
        want = oracle.kl_gradient(name, *pair)
        size = max(abs(x).max() for side in want for x in side.values())
        for side, exact in zip(got, want, strict=True):
            for parameter, gradient in exact.items():
                found = getattr(side, parameter)[n]
                np.testing.assert_allclose(found, gradient, rtol=2e-4, atol=2e-6 * size)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", sorted({*PAIRS} - {"Binomial", "MultivariateNormal"}))
def test_second_derivatives(name):
    """Against differences of the gradient, and where both sides are equal."""
    p, q = (jax.tree.map(lambda x: x[0], side) for side in sides(name, np.float64)[0])
    _, unravel = ravel_pytree((p, q))
    gradient = jax.grad(lambda x: kljax.kl(*unravel(x)))
    gradients, hessian = jax.jit(jax.vmap(gradient)), jax.jit(jax.jacfwd(gradient))
    for a, b in ((p, q), (p, p)):
        flat, _ = ravel_pytree((a, b))
        step = 1e-5
        steps = step * np.eye(flat.size)
        want = (gradients(flat[None] + steps) - gradients(flat[None] - steps)) / (2 * step)
        if name != "Uniform" or b is not a:  # there p leaves q at once
            np.testing.assert_allclose(hessian(flat), want, rtol=1e-5, atol=1e-6)


def test_far_and_near_the_textbook_formula_fails():
    """Float32 Gaussians 1e-4 and log-scales 1e-5 apart: the textbook formula gives 0."""
    p, q = families.Normal(1e-4, log_variance=2e-5), families.Normal(0.0, log_variance=0.0)
    np.testing.assert_allclose(kljax.kl(p, q), 5.1e-9, rtol=1e-3)
    np.testing.assert_allclose(kljax.kl(p, families.Normal(0.0, 1.0)), 5.1e-9, rtol=2e-2)


EDGES = [
    ("Poisson", {"rate": 0.0}, {"rate": 2.0}, 2.0),
    ("Poisson", {"rate": 2.0}, {"rate": 0.0}, INF),
    ("Poisson", {"rate": 0.0}, {"rate": 0.0}, 0.0),
    ("Bernoulli", {"probs": 0.0}, {"probs": 0.5}, np.log(2)),
    ("Bernoulli", {"probs": 1.0}, {"probs": 0.5}, np.log(2)),
    ("Bernoulli", {"probs": 0.0}, {"probs": 0.0}, 0.0),
    ("Bernoulli", {"probs": 1.0}, {"probs": 1.0}, 0.0),
    ("Bernoulli", {"probs": 0.5}, {"probs": 0.0}, INF),
    ("Bernoulli", {"probs": 0.5}, {"probs": 1.0}, INF),
    ("Bernoulli", {"probs": 1.0}, {"probs": 0.0}, INF),
    ("Bernoulli", {"logits": -INF}, {"logits": 0.0}, np.log(2)),
    ("Bernoulli", {"logits": INF}, {"logits": 0.0}, np.log(2)),
    ("Bernoulli", {"logits": INF}, {"logits": INF}, 0.0),
    ("Bernoulli", {"logits": -INF}, {"logits": -INF}, 0.0),
    ("Bernoulli", {"logits": 0.0}, {"logits": -INF}, INF),
    ("Bernoulli", {"logits": 300.0}, {"logits": -300.0}, 300.0),
    ("Geometric", {"probs": 1.0}, {"probs": 0.5}, np.log(2)),
    ("Binomial", {"total_count": 5, "probs": 0.5}, {"total_count": 4, "probs": 0.5}, INF),
    ("Binomial", {"total_count": 4, "probs": 0.5}, {"total_count": 5, "probs": 0.5}, NAN),
    ("Binomial", {"total_count": 5, "probs": 0.0}, {"total_count": 4, "probs": 0.5}, 4 * np.log(2)),
    ("Uniform", {"low": 0.0, "high": 2.0}, {"low": 0.0, "high": 1.0}, INF),
    ("Categorical", {"probs": [1.0, 0.0]}, {"probs": [1.0, 1.0]}, np.log(2)),
    ("Categorical", {"probs": [1.0, 1.0]}, {"probs": [1.0, 0.0]}, INF),
    ("VonMises", {"loc": 1.0, "concentration": 0.0}, {"loc": 0.0, "concentration": 0.0}, 0.0),
    ("VonMises", {"loc": 1.0, "concentration": 0.0}, {"loc": 0.0, "concentration": 1e-3}, 2.5e-7),
]


@pytest.mark.parametrize(("name", "p", "q", "want"), EDGES)
def test_at_the_edges(name, p, q, want):
    """The value, and no NaN in a gradient where it is finite."""
    made = [{k: jnp.asarray(x, jnp.float32) for k, x in side.items()} for side in (p, q)]
    p, q = (getattr(families, name)(**side) for side in made)
    value, gradients = jax.value_and_grad(kljax.kl, (0, 1))(p, q)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    if np.isfinite(want):
        assert not any(np.isnan(x).any() for x in jax.tree.leaves(gradients))


def test_gradients_at_the_edges():
    """What p does not do has no gradient to p; that to q is one-sided."""
    bernoulli = lambda p, q: kljax.kl(families.Bernoulli(p), families.Bernoulli(q))  # noqa: E731
    assert_close(jax.grad(bernoulli, 1)(0.0, 0.5), 2.0)
    assert_close(jax.grad(bernoulli, 1)(1.0, 0.5), -2.0)
    assert jax.grad(bernoulli, 1)(0.5, 0.0) == -INF
    poisson = lambda p, q: kljax.kl(families.Poisson(p), families.Poisson(q))  # noqa: E731
    assert jax.grad(poisson, (0, 1))(0.0, 2.0) == (0, 1)
    assert jax.grad(poisson, 1)(2.0, 0.0) == -INF
    uniform = lambda h: kljax.kl(families.Uniform(0.0, h), families.Uniform(0.0, 1.0))  # noqa: E731
    assert_close(jax.grad(uniform)(0.5), -2.0)
    assert np.isnan(jax.grad(uniform)(2.0))


def test_shapes_weights_and_reductions(rng):
    loc, scale = rng.normal(size=(2, 5, 1, 4)).astype(np.float32)
    scale = np.exp(scale)
    p, q = families.Normal(loc, scale), families.Normal(np.zeros(4, np.float32), 1.0)
    each = kljax.kl(p, q)
    assert each.shape == (5, 1, 4)
    want = np.array(
        [
            oracle.kl("Normal", {"loc": m, "scale": s}, {"loc": 0.0, "scale": 1.0})
            for m, s in zip(np.float64(loc).flat, np.float64(scale).flat, strict=True)
        ]
    ).reshape(5, 1, 4)
    assert_close(each, want)
    assert_close(kljax.kl(p, q, axis=-1), want.sum(-1))
    assert_close(kljax.kl(p, q, axis=(1, 2)), want.sum((1, 2)))
    weights = np.array([[1.0], [0.0], [2.0], [1.0], [0.5]], np.float32)
    got = kljax.kl(p, q, axis=-1, weights=weights, reduction="mean")
    assert_close(got, (want.sum(-1) * weights).sum() / weights.sum())
    assert_close(kljax.kl(p, q, reduction="batchmean"), want.sum() / 5)
    wide = kljax.kl(p, families.Normal(np.zeros((3, 5, 1, 4), np.float32), 1.0))
    assert wide.shape == (3, 5, 1, 4)
    mapped = jax.vmap(partial(kljax.kl, axis=-1), in_axes=(0, None))(p, families.Normal(0.0, 1.0))
    assert_close(mapped, want.sum(-1))


def test_what_weight_0_removes(rng):
    """NaN in an element that does not count has no effect, in value and gradient."""
    loc = jnp.array([0.5, NAN, 2.0])
    tril = jnp.stack([jnp.eye(2), jnp.full((2, 2), NAN), jnp.eye(2)])

    def loss(loc, tril):
        one = kljax.kl(families.Normal(loc, 1.0), families.Normal(0.0, 1.0), weights=[1, 0, 1])
        p = families.MultivariateNormal(jnp.zeros(2), scale_tril=tril)
        q = families.MultivariateNormal(jnp.ones(2), scale_tril=jnp.eye(2))
        return jnp.sum(one) + kljax.kl(p, q, weights=[1, 0, 1], reduction="sum")

    value, (to_loc, to_tril) = jax.value_and_grad(loss, (0, 1))(loc, tril)
    assert_close(value, 0.5**2 / 2 + 2 + 2.0)
    np.testing.assert_array_equal(to_loc, [0.5, 0, 2])
    assert not np.isnan(to_tril).any()


@pytest.mark.parametrize("given", ["scale_tril", "covariance_matrix", "precision_matrix"])
def test_multivariate_normal_from_any_of_its_matrices(rng, given):
    a, b = (np.tril(rng.normal(size=(3, 3)), -1) + np.diag([0.5, 1.0, 1.5]) for _ in range(2))
    loc = rng.normal(size=(2, 3))
    forms = {
        "scale_tril": lambda x: x + np.triu(np.full((3, 3), 7.0), 1),  # not read
        "covariance_matrix": lambda x: x @ x.T,
        "precision_matrix": lambda x: np.linalg.inv(x @ x.T),
    }
    p, q = (
        families.MultivariateNormal(jnp.float32(m), **{given: jnp.float32(forms[given](x))})
        for m, x in zip(loc, (a, b), strict=True)
    )
    exact = [exactly(m, x) for m, x in zip(loc, (a, b), strict=True)]
    want = oracle.kl("MultivariateNormal", *exact)
    np.testing.assert_allclose(kljax.kl(p, q), want, rtol=2e-4)
    np.testing.assert_allclose(
        kljax.entropy(p), oracle.entropy("MultivariateNormal", exact[0]), rtol=1e-4
    )
    assert kljax.kl(p, p) == 0


def exactly(loc, tril):
    loc, tril = np.float64(loc), np.float64(tril)
    return {"loc": loc.tolist(), "covariance_matrix": (tril @ tril.T).tolist()}


def test_multivariate_normal_close():
    """A factor a little off: D is 1e-9, and known."""
    given = [([0.0, 0.0], [[1.0, 0.0], [0.30001, 0.8]]), ([1e-5, 0.0], [[1.0, 0.0], [0.3, 0.8]])]
    given = [tuple(map(np.float32, side)) for side in given]
    p, q = (families.MultivariateNormal(loc, scale_tril=tril) for loc, tril in given)
    want = oracle.kl("MultivariateNormal", *(exactly(*side) for side in given))
    np.testing.assert_allclose(kljax.kl(p, q), want, rtol=1e-4)


def test_logits_of_bernoulli_families(rng):
    """Logits say the same as probabilities, also where these round to 0 and 1."""
    a, b = np.float32([1.5, -40.0, 60.0, 3.0]), np.float32([-0.5, -38.0, 59.0, 3.0001])
    got = kljax.kl(families.Bernoulli(logits=a), families.Bernoulli(logits=b))
    with mpmath.workdps(60):
        exact = [[1 / (1 + mpmath.exp(-mpmath.mpf(float(x)))) for x in side] for side in (a, b)]
        term = lambda p, q: p * mpmath.log(p / q)  # noqa: E731
        want = [float(term(p, q) + term(1 - p, 1 - q)) for p, q in zip(*exact, strict=True)]
        rise = [float(q - p) for p, q in zip(*exact, strict=True)]
    p, q = (np.array(side, np.float32) for side in exact)
    np.testing.assert_allclose(got, want, rtol=1e-4)

    def loss(b):
        return kljax.kl(families.Bernoulli(logits=a), families.Bernoulli(logits=b)).sum()

    np.testing.assert_allclose(jax.grad(loss)(b), rise, rtol=1e-4)
    mixed = kljax.kl(families.Bernoulli(logits=a[:1]), families.Bernoulli(q[:1]))
    np.testing.assert_allclose(mixed, want[:1], rtol=1e-5)
    for family in ("Geometric", "Binomial"):
        count = {"total_count": 3} if family == "Binomial" else {}
        make = getattr(families, family)
        from_logits = kljax.kl(make(**count, logits=a[:1]), make(**count, logits=b[:1]))
        from_probs = kljax.kl(make(**count, probs=p[:1]), make(**count, probs=q[:1]))
        assert_close(from_logits, from_probs)


def test_narrow_inputs_and_integers():
    got = kljax.kl(families.Normal(jnp.bfloat16(1.0), jnp.bfloat16(1.0)), families.Normal(0, 1))
    assert got.dtype == jnp.float32
    assert got == 0.5
    gradient = jax.grad(lambda x: kljax.kl(families.Normal(x, 1), families.Normal(0, 1)))(
        jnp.bfloat16(1.0)
    )
    assert gradient.dtype == jnp.bfloat16


NORMAL = families.Normal(jnp.zeros((2, 3)), 1.0)
ERRORS = [
    (lambda: kljax.kl(NORMAL, families.Laplace(0.0, 1.0)), "q must be Normal, like p; got Laplace"),
    (lambda: kljax.kl(jnp.zeros(3), NORMAL), "p must be Normal, like q; got Array"),
    (lambda: kljax.kl(NORMAL, jnp.zeros(3)), "q must be Normal, like p; got Array"),
    (lambda: kljax.jensen_shannon(NORMAL, NORMAL), "a distribution over classes; got Normal"),
    (lambda: kljax.kl_terms(NORMAL, NORMAL), "a distribution over classes; got Normal"),
    (lambda: kljax.distillation_loss(NORMAL, NORMAL), "a distribution over classes; got Normal"),
    (lambda: kljax.kl(NORMAL, NORMAL, temperature=2.0), "temperature must be left out"),
    (lambda: kljax.kl(NORMAL, NORMAL, where=jnp.ones(3, bool)), "where must be left out"),
    (lambda: kljax.kl(NORMAL, NORMAL, implementation="chunked"), 'one of None, "dense"'),
    (lambda: kljax.kl(NORMAL, NORMAL, axis=2), "axis must be within the 2 axes of shape"),
    (lambda: kljax.kl(NORMAL, NORMAL, weights=jnp.ones(2)), r"weights must have shape \(2, 3\)"),
    (
        lambda: kljax.kl(NORMAL, families.Normal(jnp.zeros(4), 1.0)),
        r"q must be of shapes that broadcast; got p \(2, 3\), q \(4,\)",
    ),
    (
        lambda: kljax.kl(families.Normal(jnp.zeros(4), jnp.ones(3)), NORMAL),
        r"p must be of shapes that broadcast; got loc \(4,\), scale \(3,\)",
    ),
    (lambda: kljax.kl(families.Normal(0.0), NORMAL), "one of scale, log_variance; got none"),
    (
        lambda: kljax.entropy(families.Bernoulli(0.5, logits=0.0)),
        "made of one of probs, logits; got probs and logits",
    ),
    (
        lambda: kljax.entropy(families.MultivariateNormal(jnp.zeros(2), jnp.ones((2, 3)))),
        r"p.scale_tril must be square matrices; got shape \(2, 3\)",
    ),
    (
        lambda: kljax.entropy(families.MultivariateNormal(jnp.zeros(1), jnp.eye(3))),
        "p must be of events of one size; got loc 1, scale_tril 3",
    ),
    (
        lambda: kljax.kl(families.Dirichlet(jnp.ones(3)), families.Dirichlet(jnp.ones(1))),
        "q must be of events of one size; got p.concentration 3, q.concentration 1",
    ),
    (lambda: kljax.entropy(families.Dirichlet(1.0)), "an array of at least 1 axes"),
    (lambda: kljax.entropy(families.Exponential("x")), "p.rate must be an array"),
    (
        lambda: kljax.cross_entropy(NORMAL, NORMAL, label_smoothing=0.1),
        "label_smoothing must be left out",
    ),
    (
        lambda: kljax.cross_entropy(NORMAL, jnp.zeros(3, int)),
        "labels must be Normal, like predictions; got Labels",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (families.Normal(0.0, -1.0), "entropy: p.scale must be positive"),
        (families.Bernoulli(1.5), "entropy: p.probs must be a probability"),
        (families.VonMises(0.0, -1.0), "entropy: p.concentration must be not negative"),
        (families.Normal(NAN, 1.0), "entropy: p.loc must be real"),
    ],
)
def test_value_checks(family, message):
    family = jax.tree.map(jnp.asarray, family)
    assert report(kljax.entropy, family).startswith(message)


def test_value_check_of_counts():
    p, q = (jax.tree.map(jnp.asarray, families.Binomial(n, 0.5)) for n in (4, 5))
    assert "total_count must not be less than the other's" in report(kljax.kl, p, q)
