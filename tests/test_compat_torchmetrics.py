"""kljax.compat.torchmetrics against torchmetrics' own numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_goldens, goldens

from kljax.compat import torchmetrics

CASES = goldens("torchmetrics")
FUNCTIONS = [case for case in CASES if "inputs" in case]
PLAIN = [case for case in FUNCTIONS if "zeros" not in case]
STREAMS = [case for case in CASES if "batches" in case]
LOG_2_ROUNDED = float(np.log(np.float32(2))) - np.log(2)


def exact(case):
    """The case without the float32 log 2 of torchmetrics, which every row's value holds once."""
    off = case["name"] == "jensen_shannon_divergence" and case["options"]["log_prob"]
    if not off or case["dtypes"][0] != "float64":
        return case
    p, q = (np.exp(x).sum(-1) for x in case["inputs"])
    rows = LOG_2_ROUNDED * 0.5 * (p + q)
    reduction = case["options"]["reduction"]
    more = {"mean": rows.mean(), "sum": rows.sum()}.get(reduction, rows)
    # The gradient of what is taken off, for sides that are not exactly normalised.
    scale = {"mean": 0.5 / 3, "sum": 0.5}.get(reduction, (0.5 + np.arange(3) % 4 / 4)[:, None])
    gradients = [
        np.array(g) - LOG_2_ROUNDED * 0.5 * scale * np.exp(x)
        for g, x in zip(case["gradients"], case["inputs"], strict=True)
    ]
    return {**case, "value": np.array(case["value"]) - more, "gradients": gradients}


@pytest.mark.slow
def test_goldens(x64):
    """Values, gradients and dtypes of both functions."""
    assert_goldens(
        list(map(exact, PLAIN)),
        [partial(getattr(torchmetrics, c["name"]), **c["options"]) for c in PLAIN],
        [[jnp.asarray(x, c["dtypes"][0]) for x in c["inputs"]] for c in PLAIN],
        [c["dtypes"][0] for c in PLAIN],
    )


def test_zeros():
    """torchmetrics' values, infinities and NaN; its gradients where they are not NaN."""
    for case in FUNCTIONS:
        if "zeros" not in case:
            continue
        p, q = (np.array(x, np.float32) for x in case["inputs"])
        function = partial(getattr(torchmetrics, case["name"]), reduction="none")
        value, pull = jax.vjp(function, p, q)
        assert_close(value, case["value"])
        for got in pull(jnp.ones_like(value)):
            assert np.isfinite(got[0]).all(), "a zero in a row leaves its gradient finite"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KLDivergence", "JensenShannonDivergence"])
def test_streams(name, x64):
    """Uneven batches, weighted by their rows; the value of each call; merging; resetting."""
    for case in (case for case in STREAMS if case["name"] == name):
        dtype = case["input dtype"]
        first, second = (getattr(torchmetrics, name)(**case["options"]) for _ in range(2))
        for batch, want in zip(case["batches"], case["forward"], strict=True):
            p, q = (jnp.asarray(x, dtype) for x in batch)
            assert_close(first(p, q), want, dtype)
            second.update(q, p)
        assert first.compute().dtype == case["dtype"]
        assert_close(first.compute(), case["value"], dtype)
        first.merge_state(second)
        assert_close(first.compute(), case["merged"], dtype)
        first.reset()
        first.update(*(jnp.asarray(x, dtype) for x in case["batches"][0]))
        assert_close(first.compute(), case["forward"][0], dtype)


def test_before_any_update():
    """A warning, and then NaN, 0 or an error."""
    for reduction, want in (("mean", np.nan), ("sum", 0.0)):
        with pytest.warns(UserWarning, match="was called before the ``update``"):
            assert_close(torchmetrics.KLDivergence(reduction=reduction).compute(), want)
    metric = torchmetrics.KLDivergence(reduction=None)
    with (
        pytest.warns(UserWarning, match="was called before"),
        pytest.raises(ValueError, match="before any update"),
    ):
        metric.compute()


def test_empty_and_integers():
    """No rows: a mean of NaN. Counts serve as probabilities."""
    nothing = jnp.zeros((0, 4))
    assert np.isnan(torchmetrics.kl_divergence(nothing, nothing))
    assert torchmetrics.kl_divergence(nothing, nothing, reduction=None).shape == (0,)
    counts = jnp.array([[1, 3]]), jnp.array([[2, 2]])
    got = torchmetrics.kl_divergence(*counts)
    assert got.dtype == jnp.float32
    assert_close(got, 0.25 * np.log(0.5) + 0.75 * np.log(1.5))


def test_masked_logs():
    """-inf is a probability of 0, where torchmetrics gives NaN."""
    p, q = jnp.log(jnp.array([[1.0, 0.0]])), jnp.log(jnp.array([[0.5, 0.5]]))
    assert_close(torchmetrics.kl_divergence(p, q, log_prob=True), np.log(2))
    want = 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.25 * np.log(2)
    assert_close(torchmetrics.jensen_shannon_divergence(p, q, log_prob=True), want)


P = np.full((2, 3), 1 / 3, np.float32)


@pytest.mark.parametrize("name", ["kl_divergence", "jensen_shannon_divergence"])
@pytest.mark.parametrize(
    ("sides", "options", "error", "message"),
    [
        ((P, P[:1]), {}, ValueError, r"q must have shape \(2, 3\), like the other; got \(1, 3\)"),
        ((P[0], P[0]), {}, ValueError, r"p must have shape \(rows, classes\); got \(3,\)"),
        ((P[None], P[None]), {}, ValueError, r"p must have shape \(rows, classes\)"),
        ((P, P), {"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        (([[0.5]], P), {}, TypeError, "p must be an array of JAX or NumPy; got list"),
    ],
)
def test_errors(name, sides, options, error, message):
    """Shapes and options that do not fit."""
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(torchmetrics, name)(*sides, **options)


def test_errors_of_the_metrics():
    """When made, and when merged."""
    with pytest.raises(TypeError, match="log_prob must be bool; got 1"):
        torchmetrics.KLDivergence(1)
    with pytest.raises(ValueError, match="reduction must be one of"):
        torchmetrics.JensenShannonDivergence(reduction="banana")
    metric = torchmetrics.KLDivergence()
    for other in (3, torchmetrics.JensenShannonDivergence()):
        with pytest.raises(ValueError, match="incoming_state must be a KLDivergence; got a"):
            metric.merge_state(other)
    with pytest.raises(ValueError, match="incoming_state must be one with reduction='mean'"):
        metric.merge_state(torchmetrics.KLDivergence(reduction="none"))
    with pytest.raises(ValueError, match=r"must have shape \(rows, classes\)"):
        metric.update(P[0], P[0])
