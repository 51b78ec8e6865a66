"""The state of two rows: merged from parts, at every distance of the two, at infinities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kljax._engine.classes import Classes
from kljax._engine.pairs import merge, pair_states

INF = np.inf
LAST = Classes(None, (1,))


def exact(p, q, temperature=1.0):
    """In float64, from contributions of which none is negative."""
    p, q = (np.float64(x) / temperature for x in (p, q))
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (p, q))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    d = log_q - log_p
    series = sum(d**n / np.prod(np.arange(1.0, n + 1)) for n in range(2, 9))
    return np.sum(np.exp(log_p) * np.where(abs(d) < 1e-2, series, np.expm1(d) - d), -1)


@jax.jit
def in_tiles(p, q, inverse):
    """Of 128 classes at a time, put together as a tree, as compilers for accelerators do."""
    p, q = (x.reshape(4, 64, 128) for x in (p, q))
    states = pair_states(p, q, inverse, Classes(None, (2,)), both=True)
    while states[0].gap.shape[1] > 1:
        even, odd = (jax.tree.map(lambda x, n=n: x[:, n::2], states) for n in (0, 1))
        states = [merge(*both, inverse) for both in zip(even, odd, strict=True)]
    return [state.divergence[:, 0, 0] for state in states], states[0].log_masses[:, 0, 0]


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("step", [0.0, 1e-5, 1e-3, 0.1, 1.0, 10.0])
def test_every_distance(rng, step, temperature):
    """Relative error 1e-5 from D = 1e-11 to 20, in both directions; exactly 0 at equality."""
    p = np.float32(3 * rng.normal(size=(4, 64 * 128)))
    q = p + np.float32(step * rng.normal(size=p.shape))
    found, log_masses = in_tiles(p, q, jnp.float32(1 / temperature))
    for got, want in zip(found, (exact(p, q, temperature), exact(q, p, temperature)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5)
    peaks = q.max(-1) - p.max(-1)
    total = lambda x: np.log(np.sum(np.exp(np.float64(x) / temperature), -1))  # noqa: E731
    want = total(q) - total(p) - peaks / temperature
    np.testing.assert_allclose(log_masses, want, atol=1e-6 * max(step, 1e-3))


def test_infinities_and_shifts():
    """A class that one side lacks, that both lack; no class at all; sides a million apart."""
    p = np.array(
        [
            [0, -INF, 1, 2],
            [0, 1, 2, -INF],
            [-INF, 0, 1, 2],
            [-INF] * 4,
            [-INF, 0, 1, 2],
            [0, 1, 2, 3],
        ],
        np.float32,
    )
    q = np.array(
        [[0, -INF, 1, 3], [0, 1, -INF, 2], [0, 1, 1, 2], [0, 1, 1, 2], [-INF] * 4, [3, 2, 1, 0]],
        np.float32,
    )
    q[5] += np.float32(2**20)
    forward, backward = (
        state.divergence[:, 0] for state in pair_states(p, q, None, LAST, both=True)
    )
    near = lambda p, q: exact(np.float64([p]), np.float64([q]))[0]  # noqa: E731
    want = [near([0, 1, 2], [0, 1, 3]), INF, near([0, 1, 2], [1, 1, 2]), np.nan, np.nan]
    want[2] -= np.log1p(-np.exp(0) / np.sum(np.exp([0, 1, 1, 2])))
    np.testing.assert_allclose(forward, [*want, near(p[5], q[5])], rtol=1e-6)
    np.testing.assert_array_equal(np.isposinf(backward), [False, True, True, False, False, False])


def test_logits_far_from_each_other_keep_what_stands_below_their_peaks():
    """1e12 on one side leaves the other's differences alone."""
    p, q = np.full((1, 5), 1e12, np.float32), np.array([[0.0, 1, 1, 1, 1]], np.float32)
    for state, pair in zip(pair_states(p, q, None, LAST, both=True), ((p, q), (q, p)), strict=True):
        np.testing.assert_allclose(state.divergence[:, 0], exact(*pair), rtol=1e-6)
