"""The divergences under JAX's transforms, with every option of shape."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, named
from jax.test_util import check_grads

import kljax

NAMES = ["forward_kl", "jeffreys", "jensen_shannon", "skew_reverse_kl", "cross_entropy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "entropy"])
@pytest.mark.usefixtures("x64")
def test_derivative_rules_against_finite_differences(rng, name):
    """Both modes, second order, on arrays small enough for the check to see an error."""
    sides = [rng.normal(size=(2, 3)) for _ in range(1 if name == "entropy" else 2)]
    weights = rng.uniform(size=2)

    def f(*operands):
        *sides, temperature, weights = operands
        compute = named(name)
        return compute(*sides, temperature=temperature, weights=weights, reduction="mean")

    order = 2 if name == "forward_kl" else 1  # the oracle's Hessians serve the others
    f = jax.jit(f)
    check_grads(f, (*sides, 1.3, weights), order, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_kl_terms_against_finite_differences(rng):
    """The elementwise rule too, with its temperature."""
    p, q = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    f = jax.jit(lambda p, q, t: kljax.kl_terms(p, q, temperature=t))
    check_grads(f, (p, q, 1.3), order=2, modes=("fwd", "rev"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (-1, 0), (0, 1, 2)])
def test_axis(rng, axis):
    """The classes may occupy any axis or axes."""
    x, y = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(2))
    sequence = (axis,) if isinstance(axis, int) else axis
    last = lambda z: np.moveaxis(z, sorted(a % 3 for a in sequence), range(-len(sequence), 0))  # noqa: E731
    batch = tuple(n for i, n in enumerate(x.shape) if i not in {a % 3 for a in sequence})
    flat = [last(z).reshape(*batch, -1) for z in (x, y)]
    got = kljax.forward_kl(x, y, axis=axis)
    assert got.shape == batch
    assert_close(got, oracle.divergence("forward_kl", *flat))
    np.testing.assert_array_equal(kljax.forward_kl(x, y, axis=list(sequence)), got)
    assert_close(kljax.entropy(x, axis=axis), oracle.divergence("entropy", flat[0]))
    where = rng.uniform(size=x.shape) > 0.3
    flat_where = last(where).reshape(*batch, -1)
    want = oracle.divergence("forward_kl", *flat, where=flat_where)
    assert_close(kljax.forward_kl(x, y, axis=axis, where=where), want)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-1, 0])
def test_a_shared_distribution(rng, axis):
    """One side may lack the batch; its gradient is the sum over the batch."""
    x = rng.normal(size=(4, 3) if axis == -1 else (3, 4)).astype(np.float32)
    y = rng.normal(size=3).astype(np.float32)
    whole = np.broadcast_to(y, (4, 3)) if axis == -1 else np.broadcast_to(y[:, None], (3, 4))
    for sides, full in (((x, y), (x, whole)), ((y, x), (whole, x))):
        assert_close(kljax.forward_kl(*sides, axis=axis), kljax.forward_kl(*full, axis=axis))
    f = lambda y: kljax.forward_kl(x, y, axis=axis, reduction="sum")  # noqa: E731
    got, want = jax.grad(f)(y), jax.grad(f)(whole)
    assert_close(got, want.sum(0 if axis == -1 else 1))
    where = np.array([True, False, True])
    masked = kljax.forward_kl(x, y, axis=axis, where=where)
    assert_close(masked, kljax.forward_kl(x, whole, axis=axis, where=where))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "cross_entropy"])
def test_temperature_is_a_division_of_log_probabilities(rng, name):
    """Every representation, given a temperature, becomes softmax(log-probabilities / T)."""
    x, y = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    f = named(name)
    want = f(x / 2, y / 2)
    p = [jax.nn.softmax(z) for z in (x, y)]
    assert_close(f(x, y, temperature=2.0), want)
    assert_close(f(kljax.Probs(p[0]), kljax.LogProbs(jnp.log(p[1])), temperature=2.0), want)
    assert_close(jax.jit(f)(x, y, temperature=jnp.float32(2)), want)
    assert_close(f(x, y, temperature=2), want)


@pytest.mark.slow(but=["forward_kl-probs-log_probs", "cross_entropy-logits-logits"])
@pytest.mark.parametrize("kinds", [("logits", "logits"), ("probs", "log_probs")], ids="-".join)
@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy"])
def test_vmap_scan_checkpoint_and_jit_agree(rng, name, kinds):
    """Value and gradient are the batch's, however the rows are visited."""
    hold = {"logits": kljax.Logits, "probs": kljax.Probs, "log_probs": kljax.LogProbs}
    x, y = (jnp.asarray(oracle.log_probs(rng.normal(size=(3, 4))), jnp.float32) for _ in range(2))
    x = jnp.exp(x) if kinds[0] == "probs" else x
    x, y = hold[kinds[0]](x), hold[kinds[1]](y)
    f = named(name)

    def batch(x):
        return f(x, y, reduction="sum")

    def by_vmap(x):
        return jax.vmap(f)(x, y).sum()

    def by_scan(x):
        total, _ = jax.lax.scan(lambda c, xy: (c + f(*xy), None), jnp.zeros(()), (x, y))
        return total

    want, (want_gradient,) = batch(x), jax.tree.leaves(jax.grad(batch)(x))
    for visit in (by_vmap, by_scan, jax.checkpoint(batch), jax.jit(batch)):
        value, gradient = jax.jit(jax.value_and_grad(visit))(x)
        assert_close(value, want)
        assert_close(jax.tree.leaves(gradient)[0], want_gradient)
    linear = jax.linearize(batch, x)[1](jax.tree.map(jnp.ones_like, x))
    assert_close(linear, want_gradient.sum())


def test_vmap_over_one_side_and_over_options(rng):
    """in_axes of None, a vmapped temperature, mask and weight."""
    x, y = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    t, w = np.array([1.0, 2.0, 3.0], np.float32), np.array([0.0, 1.0, 2.0], np.float32)
    where = np.array([[True] * 4, [True, True, True, False], [False, True, True, True]])
    f = lambda x, y, t, m, w: kljax.forward_kl(x, y, temperature=t, where=m, weights=w)  # noqa: E731
    got = jax.vmap(f, in_axes=(0, None, 0, 0, 0))(x, y[0], t, where, w)
    want = [f(x[i], y[0], t[i], where[i], w[i]) for i in range(3)]
    assert_close(got, np.array(want))
    slopes = jax.vmap(jax.grad(f), in_axes=(0, None, 0, 0, 0))(x, y[0], t, where, w)
    assert_close(slopes[1], jax.grad(f)(x[1], y[0], t[1], where[1], w[1]))


@pytest.mark.parametrize("trace", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_distributions_are_pytrees(trace):
    """They pass through jit, grad and tree.map; grad returns the same type."""
    side = kljax.Probs(jnp.array([0.5, 0.5]))
    gradient = trace(jax.grad(lambda s: kljax.forward_kl(s, kljax.Probs([1.0, 0.0]))))(side)
    assert isinstance(gradient, kljax.Probs)
    np.testing.assert_allclose(gradient.probs, [-2.0, 0.0])
    doubled = jax.tree.map(lambda z: 2 * z, kljax.Logits(jnp.ones(3)))
    assert isinstance(doubled, kljax.Logits)
    trees = {jax.tree.structure(hold(1.0)) for hold in (kljax.Logits, kljax.LogProbs, kljax.Probs)}
    assert len(trees) == 3, "a trace of one type must never serve another"


@pytest.mark.slow
def test_labels(rng):
    """Integer labels are one-hot targets: value, gradient, mask, axis, temperature, any int."""
    x = rng.normal(size=(3, 5)).astype(np.float32)
    labels = np.array([4, 0, 2])
    one_hot = kljax.Probs(jax.nn.one_hot(labels, 5))
    for options in ({}, {"temperature": 2.0}, {"where": np.array([1, 1, 1, 0, 1], bool)}):
        f = lambda x, t, o=options: kljax.cross_entropy(x, t, reduction="sum", **o)  # noqa: E731
        assert_close(f(x, labels.astype(np.int8)), f(x, one_hot))
        assert_close(jax.grad(f)(x, labels), jax.grad(f)(x, one_hot))
    assert_close(kljax.cross_entropy(x.T, labels, axis=0), kljax.cross_entropy(x, labels))
    probs = kljax.Probs(jax.nn.softmax(x))
    assert_close(kljax.cross_entropy(probs, labels), kljax.cross_entropy(x, labels))
    assert_close(jax.vmap(kljax.cross_entropy)(x, labels), kljax.cross_entropy(x, labels))


def test_labels_that_name_no_class(rng):
    """NaN, never a number: out of range, or masked; and nothing at weight 0."""
    x = rng.normal(size=(4, 3)).astype(np.float32)
    labels, where = jnp.array([3, -1, 1, 0]), jnp.array([True, False, True])
    np.testing.assert_array_equal(
        np.isnan(kljax.cross_entropy(x, labels, where=where)), [True, True, True, False]
    )
    f = lambda x, labels: kljax.cross_entropy(  # noqa: E731
        x, labels, weights=jnp.array([0, 0, 1, 1]), reduction="mean"
    )
    value, gradient = jax.value_and_grad(f)(x, labels)
    want, want_gradient = jax.value_and_grad(f)(x, jnp.array([0, 0, 1, 0]))
    assert value == want
    np.testing.assert_array_equal(gradient, want_gradient)


def test_empty_arrays():
    """No examples, or no classes: nothing to sum."""
    assert kljax.forward_kl(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)
    assert kljax.forward_kl(jnp.zeros((0, 3)), jnp.zeros((0, 3)), reduction="mean") == 0
    np.testing.assert_array_equal(kljax.forward_kl(jnp.zeros((2, 0)), jnp.zeros((2, 0))), [0, 0])


def test_a_frozen_side_costs_nothing():
    """Only the gradient that is asked for is computed."""
    x = jnp.ones((8, 16))

    def operations(wrt):
        loss = lambda s, t: kljax.reverse_kl(s, t, reduction="mean")  # noqa: E731
        return count(jax.make_jaxpr(jax.grad(loss, wrt))(x, x).jaxpr)

    def count(jaxpr):
        inner = [v for eqn in jaxpr.eqns for v in eqn.params.values() if hasattr(v, "jaxpr")]
        return len(jaxpr.eqns) + sum(count(v.jaxpr) for v in inner)

    assert max(operations(0), operations(1)) < operations((0, 1))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_labels_of_few_bits_name_one_class(rng, dtype):
    """The class index does not wrap around in the labels' own dtype."""
    x, labels = rng.normal(size=(2, 300)).astype(np.float32), np.array([3, 100], dtype)
    assert_close(kljax.cross_entropy(x, labels), kljax.cross_entropy(x, labels.astype(np.int32)))


@pytest.mark.slow
def test_mixed_derivatives_through_a_zero_weight(rng):
    """At weight 0 the derivative to weight and logits is the gradient itself, in either order."""
    x, y = (jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(2))
    weights = jnp.array([0.0, 1.0, 0.0])
    x = x.at[2].set(jnp.nan)

    def loss(x, w):
        return kljax.forward_kl(x, y, weights=w, reduction="sum")

    one = jax.jacfwd(jax.grad(loss, 0), 1)(x, weights)
    other = jax.jacfwd(jax.grad(loss, 1), 0)(x, weights)
    want = jax.grad(lambda x: kljax.forward_kl(x, y[0]))(x[0])
    assert_close(one[0, :, 0], want)
    assert_close(other[0, 0], want)
    assert np.isfinite(one).all()
    assert (one[2] == 0).all()

    # As in learning to reweight examples: through a step of gradient descent.
    step = jax.grad(lambda w: (x[0] - 0.1 * jax.grad(loss)(x, w)[0]) @ jnp.arange(4.0))(weights)
    assert_close(step[0], -0.1 * want @ jnp.arange(4.0))


def test_tangents_at_masked_classes_have_no_effect(rng):
    """A NaN tangent at a masked class reaches nothing in forward mode."""
    x, y = (jnp.asarray(rng.normal(size=(2, 4)), jnp.float32) for _ in range(2))
    where, tangent = jnp.array([True, True, False, True]), jnp.ones((2, 4)).at[:, 2].set(jnp.nan)
    for f in (kljax.forward_kl, kljax.kl_terms):
        g = lambda x, f=f: f(x, y, where=where)  # noqa: E731
        got = jax.jvp(g, (x,), (tangent,))[1]
        assert_close(got, jax.jvp(g, (x,), (jnp.ones((2, 4)),))[1])


@pytest.mark.slow
@pytest.mark.parametrize("end", [0, 1])
def test_integer_shares(rng, end):
    """beta and alpha may be the integers 0 and 1, also under grad."""
    x, y = (jnp.asarray(rng.normal(size=4), jnp.float32) for _ in range(2))
    for f, name in ((kljax.jensen_shannon, "beta"), (kljax.skew_forward_kl, "alpha")):
        loss = lambda x, share, f=f, name=name: f(x, y, **{name: share})  # noqa: E731
        assert_close(jax.grad(loss)(x, end), jax.grad(loss)(x, float(end)))
    scaled = lambda x, b: kljax.jensen_shannon(x, y, beta=b, normalized=True)  # noqa: E731
    assert_close(jax.grad(scaled)(x, end), jax.grad(scaled)(x, float(end)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_higher_orders_at_equality(rng, shift):
    """Where slopes and differences are 0, but move: what the textbook formula gives there."""
    t = jnp.asarray(rng.normal(size=5))
    s, w = t + shift, jnp.asarray(rng.normal(size=5))

    def textbook(s, t, temperature):
        log_s, log_t = (jax.nn.log_softmax(x / temperature) for x in (s, t))
        return jnp.exp(log_t) * (log_t - log_s)

    def terms(s, t, temperature):
        return kljax.kl_terms(t, s, temperature=temperature)

    def third(f):
        total = lambda s: jnp.sum(w * f(s, t, 1.3))  # noqa: E731
        return jax.jacfwd(jax.jacfwd(jax.jacrev(total)))(s)

    def mixed(f):
        to_temperature = jax.grad(lambda s, temperature: jnp.sum(f(s, t, temperature)), 1)
        return jax.jacfwd(jax.jacrev(to_temperature))(s, 1.3)

    whole = lambda s, t, temperature: kljax.forward_kl(s, t, temperature=temperature)  # noqa: E731
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(jax.jit(lambda: third(terms))(), third(textbook))
    close(jax.jit(lambda: mixed(whole))(), mixed(textbook))
    assert np.abs(mixed(textbook)).max() > 1e-2
