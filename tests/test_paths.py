"""Every way to compute every divergence: the same properties, against the oracle."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import PATHS, around, problem

import kljax

DIVERGENCES = {
    "forward_kl": {},
    "reverse_kl": {},
    "jeffreys": {},
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
}


@cache
def expected(name):
    """The weighted mean and its gradients."""
    given = problem()
    options = {"where": given.where, "temperature": given.temperature, **DIVERGENCES[name]}
    x, y = np.float64(given.x), np.float64(given.y)
    with np.errstate(invalid="ignore"):
        values = oracle.divergence(name, x, y, **options)
        gradients = [
            oracle.gradient(name, x, y, wrt, weights=given.weights, **options) for wrt in (0, 1)
        ]
    total = given.weights.sum()
    return oracle.reduce(values, given.weights, "mean"), [g / total for g in gradients]


def computed(name, path, x, y):
    """By a path: the mean, its gradients, its tangent along steps, and these."""
    given = problem()

    def loss(x, y, weights, classes=None, **options):
        where = jnp.asarray(given.where)
        return getattr(kljax, name)(
            x,
            y,
            where=where if classes is None else where[classes],
            temperature=given.temperature,
            weights=weights,
            reduction="mean",
            **DIVERGENCES[name],
            **options,
        )

    run = PATHS[path](loss)
    mean = lambda x, y: run(x, y, jnp.asarray(given.weights))  # noqa: E731
    along = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    steps = along, -0.5 * along
    value, gradients = jax.value_and_grad(mean, (0, 1))(x, y)
    return value, gradients, jax.jvp(mean, (x, y), steps)[1], steps


@pytest.mark.slow(but=[f"{path}-forward_kl" for path in PATHS])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
def test_value_and_derivatives(path, name):
    """The value, the gradient to both sides, and in forward mode the same; nothing from NaN."""
    given = problem()
    compute = partial(computed, name, path)
    with around(path):
        value, gradients, tangent, steps = jax.jit(compute)(
            jnp.asarray(given.x), jnp.asarray(given.y)
        )
    want, slopes = expected(name)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, slope in zip(gradients, slopes, strict=True):
        np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-6 * abs(slope).max())
    along = sum(np.sum(slope * np.float64(step)) for slope, step in zip(slopes, steps, strict=True))
    np.testing.assert_allclose(tangent, along, rtol=1e-4, atol=1e-6)
    # equal rows have no gradient, masked classes and rows of weight 0 exactly none
    for got in gradients:
        got = np.asarray(got)
        np.testing.assert_allclose(got[1], 0, atol=1e-8)
        np.testing.assert_array_equal(got[6], 0)
        np.testing.assert_array_equal(got[:, ~given.where], 0)
