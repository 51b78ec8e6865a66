"""The state of a row: whole, in parts, and as accelerators compute it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from conftest import chosen
from helpers import assert_close
from jax import lax

import kljax
from kljax._engine import lowering
from kljax._engine.classes import Classes
from kljax._engine.states import RowState, empty, merge, row_state

INF, NAN = np.inf, np.nan
ROWS = np.array(
    [
        [0.3, -1.2, 0.8, 0.1, 2.0, -3.0],
        [-INF, -INF, -INF, 0.5, 1.0, -INF],
        [1e30, -1e30, 1e30, 0.0, 1.0, 2.0],
        [-INF] * 6,
        [0.0, NAN, 0.0, 1.0, 2.0, 3.0],
        [0.0, 1.0, INF, 1.0, 2.0, 3.0],
    ],
    np.float32,
)


@pytest.fixture(params=["tpu", "cuda"])
def on_accelerator(monkeypatch, request):
    """Take every platform's choice as for a TPU or GPU, and run it here."""
    jax.clear_caches()
    monkeypatch.setattr(lax, "platform_dependent", partial(chosen, request.param))
    monkeypatch.setattr(lowering, "_platforms", lambda ctx: (request.param,))
    yield
    jax.clear_caches()


def log_sum_exp(state, temperature):
    with np.errstate(divide="ignore"):
        return state.peak[:, 0] / temperature + np.log(state.mass[:, 0])


def expected(rows, temperature):
    z = np.asarray(rows, np.float64) / temperature
    peak = z.max(-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        peak = np.where(np.isneginf(peak), 0, peak)
        return (peak + np.log(np.exp(z - peak).sum(-1, keepdims=True)))[:, 0]


def check_states(temperature):
    inverse = None if temperature == 1 else jnp.float32(1 / temperature)
    compute = jax.jit(lambda x: row_state(x, inverse, (1,), jnp.dtype("float32")))
    whole, halves = compute(ROWS), [compute(ROWS[:, :2]), compute(ROWS[:, 2:])]
    together = merge(*halves, 1 / temperature)
    nothing = empty((6, 1), jnp.dtype("float32"))
    for state in (whole, together, merge(nothing, whole), merge(whole, nothing)):
        assert isinstance(state, RowState)
        assert np.isfinite(state.peak[:4]).all()
        assert_close(log_sum_exp(state, temperature), expected(ROWS, temperature))
    # the gradient is the softmax, with the peak a constant
    gradient = jax.grad(lambda x: jnp.log(compute(x).mass).sum())(ROWS[:3])
    want = np.exp(oracle.log_probs(np.float64(ROWS[:3]) / temperature))
    assert_close(gradient, want / temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_states_merge(temperature):
    """Parts give the state of the whole; nothing is the identity; no mass, NaN, inf stay so."""
    check_states(temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.usefixtures("on_accelerator")
def test_states_in_one_pass(temperature):
    """The same from the single reduction that serves accelerators."""
    check_states(temperature)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["forward_kl", "reverse_kl", "jeffreys", "jensen_shannon", "skew_forward_kl"]
)
@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.usefixtures("on_accelerator")
def test_the_accelerators_choices_give_the_same(rng, name, temperature):
    """Values and both gradients as the oracle's, where no sum is taken to refine another."""
    x, y = (np.float32(rng.normal(size=(4, 24))) * 3 for _ in range(2))
    x[0, :9] = y[0, 5:16] = -INF if name in ("jensen_shannon", "skew_forward_kl") else -30
    x[3, 0] = NAN
    weights = np.array([1.0, 2.0, 0.5, 0.0], np.float32)
    options = {"temperature": temperature, "where": np.arange(24) != 7}

    def f(x, y):
        values = getattr(kljax, name)(x, y, weights=weights, **options)
        return values.sum(), values

    gradients, values = jax.jit(jax.grad(f, (0, 1), has_aux=True))(x, y)
    want = oracle.divergence(name, np.float64(x[:3]), np.float64(y[:3]), **options)
    assert_close(values, [*want * weights[:3], 0])
    for wrt, got in enumerate(gradients):
        each = [oracle.gradient(name, *np.float64((x[n], y[n])), wrt, **options) for n in range(3)]
        assert_close(got, np.array([*each, 0 * x[2]]) * weights[:, None])
    second = jax.jit(jax.hessian(partial(getattr(kljax, name), **options)))(x[1], y[1])
    assert_close(second, oracle.hessian(name, *np.float64((x[1], y[1])), **options))


@pytest.mark.slow(but=("cuda-jensen_shannon",))
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "skew_reverse_kl"])
@pytest.mark.usefixtures("on_accelerator")
def test_numbers_learned_on_accelerators(rng, name):
    """A temperature and a parameter have passes of their own there, and move with both sides."""
    x, y = (np.float32(rng.normal(size=(4, 24))) * 3 for _ in range(2))
    parameter = {"jensen_shannon": "beta", "skew_reverse_kl": "alpha"}.get(name)
    options = {"temperature": 1.5} | ({parameter: 0.3} if parameter else {})

    def f(x, y, options):
        return getattr(kljax, name)(x, y, **options).sum()

    _, _, found = jax.jit(jax.grad(f, (0, 1, 2)))(x, y, options)
    alone = jax.jit(jax.grad(f, 2))(x, y, options)

    def at(option, value):
        return oracle.divergence(name, *np.float64((x, y)), **options | {option: value}).sum()

    for option, value in options.items():
        want = oracle.derivative(partial(at, option), value)
        assert_close(found[option], want)
        assert_close(alone[option], want)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_one_pass(on_accelerator, x64, dtype, count):
    """However they are made, what is not a number in one sum is nothing to the others."""
    rng = np.random.default_rng(count)
    arrays = rng.normal(size=(count, 4, 301)).astype(dtype)
    for row, odd in enumerate([NAN, INF, -INF]):
        arrays[(row + 1) % count, row, 7] = odd
    found = jax.jit(Classes(None, (1,)).sums)(*arrays)
    assert [x.dtype for x in found] == [dtype] * count
    want = arrays.astype(np.float64).sum(-1)
    rounding = 300 * np.finfo(dtype).eps
    np.testing.assert_allclose(found, want, rtol=rounding, atol=rounding)
