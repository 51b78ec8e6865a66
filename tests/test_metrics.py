"""Streaming metrics: what many batches give is what all examples at once give."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kljax
from kljax.metrics import Divergence, agreement

SIZES = (5, 1, 3)


def batches(rng):
    """Uneven batches of values and weights, with NaN wherever the weight is 0."""
    for n in SIZES:
        weights = rng.integers(0, 4, size=n).astype(np.float32) / 2
        values = rng.lognormal(size=n).astype(np.float32)
        yield np.where(weights == 0, np.nan, values).astype(np.float32), weights, values > 1


def assert_summarises(state, values, weights, agree=None):
    """By NumPy in float64, over the examples of weight not 0."""
    kept = weights != 0
    v, w = np.float64(values[kept]), np.float64(weights[kept])
    got = state.compute()
    assert_close(got.mean, np.sum(w * v) / np.sum(w))
    assert_close(got.minimum, v.min())
    assert_close(got.maximum, v.max())
    assert_close(got.weight_sum, np.sum(w))
    assert_close(got.agreement, np.nan if agree is None else np.sum(w * agree[kept]) / np.sum(w))


def test_uneven_masked_merged_batches(rng):
    """One after the other, merged in any order, and all at once."""
    all_batches = list(batches(rng))
    states = [Divergence.empty().update(v, w, agreement=a) for v, w, a in all_batches]
    values, weights, agree = (np.concatenate(column) for column in zip(*all_batches, strict=True))
    one_by_one = Divergence.empty()
    for v, w, a in all_batches:
        one_by_one = one_by_one.update(v, w, agreement=a)
    at_once = Divergence.empty().update(values, weights, agreement=agree)
    merged = reduce(Divergence.merge, states)
    backwards = reduce(Divergence.merge, states[::-1], Divergence.empty())
    for state in (one_by_one, at_once, merged, backwards):
        assert_summarises(state, values, weights, agree)
        assert_close(state.quantile(0.5), one_by_one.quantile(0.5))


def test_any_divergence_and_shape(rng):
    """Values straight from a divergence, tokens masked, no weights at all, float masks."""
    s, t = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    values = np.asarray(kljax.jensen_shannon(s, t))
    for given in (mask, mask.astype(int)):
        assert_summarises(Divergence.empty().update(values, given), values, mask)
    state = Divergence.empty().update(kljax.reverse_kl(s, t))
    assert_summarises(state, np.asarray(kljax.reverse_kl(s, t)), np.ones((2, 3)))


def test_nothing():
    """No example, or none of weight: NaN, and merging it changes nothing."""
    empty = Divergence.empty()
    masked = empty.update(jnp.array([jnp.nan, jnp.inf]), jnp.zeros(2))
    without = empty.update(jnp.zeros(0))
    for state in (empty, masked, without, empty.merge(masked)):
        got = state.compute()
        assert np.isnan([got.mean, got.minimum, got.maximum, got.agreement]).all()
        assert got.weight_sum == 0
        assert np.isnan(state.quantile(0.5))
    some = empty.update(jnp.array([2.0]))
    assert some.merge(masked).compute().mean == masked.merge(some).compute().mean == 2


def test_nan_and_infinity_that_count_are_seen():
    """Never hidden, nor undone by what follows."""
    nan = Divergence.empty().update(jnp.array([1.0, jnp.nan])).update(jnp.array([1.0])).compute()
    assert np.isnan([nan.mean, nan.minimum, nan.maximum]).all()
    state = Divergence.empty().update(jnp.array([1.0, jnp.inf])).update(jnp.array([2.0]))
    assert_close(state.compute()[:3], [np.inf, 1.0, np.inf])
    np.testing.assert_allclose(
        state.quantile(jnp.array([0.0, 0.6, 1.0])), [1, 2, np.inf], rtol=0.02
    )


def test_ten_million_float32_examples():
    """The mean is right to the last digit or two; a running float32 sum is not."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(-2, 2, size=(1000, 10_000)).astype(np.float32)

    @jax.jit
    def run(values):
        return jax.lax.scan(lambda s, v: (s.update(v), None), Divergence.empty(), values)[0]

    state, want = run(values), np.mean(values, dtype=np.float64)
    assert abs(state.compute().mean / want - 1) < 2e-7
    assert state.compute().weight_sum == 10_000_000
    running = np.add.accumulate(values.ravel())[-1] / np.float32(values.size)
    assert abs(running / want - 1) > 1e-3, "the problem exists"
    whole = Divergence.empty().update(values)
    assert abs(whole.compute().mean / want - 1) < 2e-7


def test_a_long_stream_of_weights():
    """Steps below the last digit of the sum are kept too."""
    state = Divergence.empty().update(jnp.array([1e8]))

    def step(state, _):
        return state.update(jnp.array([0.1]), jnp.array([0.5])), None

    state = jax.lax.scan(step, state, None, length=10_000)[0]
    want = (1e8 + 10_000 * np.float64(np.float32(0.1)) / 2) / 5001
    assert abs(state.compute().mean / want - 1) < 2e-7


def test_quantiles(rng):
    """Within 2 % of the weighted inverse of the distribution function; exact at the ends."""
    values = rng.lognormal(0, 3, size=4000).astype(np.float32)
    values[:40] = 0.0
    weights = rng.integers(0, 3, size=4000)
    q = np.array([0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 1.0])
    got = Divergence.empty().update(values, weights).quantile(q.astype(np.float32))
    repeated = np.repeat(values, weights)
    want = np.quantile(repeated, q, method="inverted_cdf")
    np.testing.assert_allclose(got, want, rtol=0.02)
    assert_close(got[jnp.array([0, -1])], want[[0, -1]])


@pytest.mark.parametrize(
    "side",
    [
        kljax.Head(np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)),
        kljax.TopK(np.zeros((2, 1), int), np.zeros((2, 1), np.float32)),
        kljax.families.Categorical(logits=np.ones((2, 4), np.float32)),
    ],
    ids=["head", "top-k", "family"],
)
def test_agreement_is_of_arrays(side):
    x, got = np.ones((2, 4), np.float32), type(side).__name__
    message = f"agreement: targets must be logits, LogProbs or Probs; got {got}. distillation_loss"
    with pytest.raises(ValueError, match=message):
        agreement(x, side)


def test_agreement(rng):
    """Logits, log-probabilities, probabilities; a shared side; a mask of classes; ties."""
    s, t = rng.normal(size=(2, 6, 4)).astype(np.float32)
    want = s.argmax(-1) == t.argmax(-1)
    probs = np.exp(t) / np.exp(t).sum(-1, keepdims=True)
    for side in (t, kljax.Logits(t), kljax.Probs(probs), kljax.LogProbs(np.log(probs))):
        assert (np.asarray(agreement(s, side)) == want).all()
    assert (np.asarray(agreement(s.T, t.T, axis=0)) == want).all()
    assert (np.asarray(agreement(s, t[0])) == (s.argmax(-1) == t[0].argmax())).all()
    allowed = np.array([True, False, True, True])
    want = s[:, allowed].argmax(-1) == t[:, allowed].argmax(-1)
    assert (np.asarray(agreement(s, t, where=allowed)) == want).all()
    assert agreement(jnp.zeros(3), jnp.array([1.0, 1.0, 0.0]))


def test_across_devices(rng):
    """`axis_name` makes every device's state that of all, under vmap and shard_map."""
    values = rng.lognormal(size=(8, 5)).astype(np.float32)
    weights = rng.integers(0, 2, size=(8, 5)).astype(bool)
    values[~weights] = np.nan

    def update(values, weights):
        agree = values > 1
        return Divergence.empty().update(values, weights, agreement=agree, axis_name="data")

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(update, mesh=mesh, in_specs=spread, out_specs=whole)
    mapped = jax.tree.map(lambda x: x[3], jax.vmap(update, axis_name="data")(values, weights))
    for state in (jax.jit(sharded)(values, weights), mapped):
        assert_summarises(state, values.ravel(), weights.ravel(), values.ravel() > 1)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_arrays(kind, rng):
    """Arrays spread over a mesh need nothing said."""
    values, weights = rng.lognormal(size=(16, 3)).astype(np.float32), rng.random((16, 3)) > 0.5
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    spread = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        given = [jax.device_put(x, spread) for x in (values, weights, values > 1)]
        state = jax.jit(lambda v, w, a: Divergence.empty().update(v, w, agreement=a))(*given)
    assert_summarises(state, values, weights, values > 1)


def test_across_processes(rng):
    """Gathered states are arrays of NumPy with a leading axis; merging them is all there is."""
    parts = list(batches(rng))
    states = [Divergence.empty().update(v, w) for v, w, _ in parts]
    gathered = jax.tree.map(lambda *x: np.stack(x), *states)
    one = [jax.tree.map(lambda x, i=i: x[i], gathered) for i in range(len(states))]
    values, weights = (np.concatenate([part[i] for part in parts]) for i in range(2))
    assert_summarises(reduce(Divergence.merge, one), values, weights)


def test_float64(x64):
    """A state of float64 takes values as they are."""
    state = Divergence.empty(jnp.float64).update(jnp.array([1e-12, 1.0]))
    assert_close(state.compute().mean, 0.5 + 5e-13, np.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones(3), np.ones((3, 1))), ValueError, r"weights must have shape \(3,\)"),
        ((np.ones(3), np.ones(2)), ValueError, r"weights must have shape \(3,\)"),
        ((np.arange(3),), TypeError, "values must be floating point"),
        ((None,), TypeError, "values must be an array"),
        ((np.ones(3), np.ones(3, complex)), TypeError, "weights must be bool, int or float"),
    ],
)
def test_errors(arguments, error, message):
    """Nothing broadcasts: a mask of another shape would count wrongly."""
    with pytest.raises(error, match=f"Divergence: {message}"):
        Divergence.empty().update(*arguments)


# --- Flax NNX ---


@pytest.mark.slow
def test_nnx_in_a_multi_metric(rng):
    """Beside Flax's own metrics, jitted, masked by one mask or by name; reset."""
    nnx = pytest.importorskip("flax.nnx")
    from kljax.metrics.nnx import Divergence as Metric

    metrics = nnx.MultiMetric(
        forward=Metric(),
        reverse=Metric(kljax.reverse_kl, temperature=2.0, where=np.array([True, True, False])),
        loss=nnx.metrics.Average("loss"),
    )
    seen = []

    @nnx.jit
    def step(metrics, s, t, mask):
        metrics.update(predictions=s, targets=t, loss=jnp.ones(len(s)), mask=mask)

    for n in SIZES[::2]:
        s, t = rng.normal(size=(2, n, 3)).astype(np.float32)
        mask = np.arange(n) % 2 == 0
        s[~mask] = np.nan
        step(metrics, s, t, mask)
        seen.append((s, t, mask))
    s, t, mask = (np.concatenate(column) for column in zip(*seen, strict=True))
    values = np.asarray(kljax.forward_kl(s, t))
    assert_summarises(metrics.forward.state, values, mask, s.argmax(-1) == t.argmax(-1))
    values = np.asarray(kljax.reverse_kl(s[:, :2], t[:, :2], temperature=2.0))
    agree = s[:, :2].argmax(-1) == t[:, :2].argmax(-1)
    assert_summarises(metrics.reverse.state, values, mask, agree)
    with jax.numpy_dtype_promotion("standard"):  # Flax's own metric divides by an integer
        got = metrics.compute()
    assert got["loss"] == 1
    assert float(got["forward"].weight_sum) == mask.sum()
    metrics.update(predictions=s, targets=t, loss=jnp.ones(len(s)), mask={"forward": ~mask & False})
    assert metrics.forward.compute().mean == got["forward"].mean
    metrics.reset()
    assert np.isnan(metrics.forward.compute().mean)


def test_nnx_values_weights_and_errors():
    """Values that are there already, weights beside a mask, labels, and what does not fit."""
    pytest.importorskip("flax.nnx")
    from kljax.metrics.nnx import Divergence as Metric

    metric = Metric()
    values = jnp.array([1.0, 3.0, jnp.nan])
    metric.update(values=values, weights=jnp.array([1, 3, 1]), mask=jnp.array([1, 1, 0]), other=0)
    assert metric.compute().mean == 2.5
    metric = Metric(kljax.cross_entropy)
    metric.update(predictions=jnp.zeros((2, 4)), targets=jnp.array([0, 3]))
    assert_close(metric.compute().mean, np.log(4))
    with pytest.raises(TypeError, match="values must be given, or predictions and targets"):
        metric.update(predictions=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"weights must have shape \(3,\)"):
        metric.update(values=values, mask=jnp.ones((3, 1)))
    with pytest.raises(TypeError, match="divergence must be a divergence"):
        Metric("forward_kl")
