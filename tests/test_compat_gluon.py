"""kljax.compat.gluon against MXNet's published formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_goldens, goldens

from kljax.compat.gluon import KLDivLoss

CASES = goldens("gluon")


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_goldens(dtype, x64):
    """Values, gradients and dtypes: both aggregations, weights, softmax, axes, the epsilon."""

    def loss(case):
        weights = None if case["weights"] is None else jnp.asarray(case["weights"], dtype)
        return lambda pred, label: KLDivLoss(**case["options"])(pred, label, weights)

    sides = [[jnp.asarray(x, dtype) for x in case["inputs"]] for case in CASES]
    assert_goldens(CASES, list(map(loss, CASES)), sides, [dtype] * len(CASES))


def test_mean_and_sum_differ_by_the_elements_of_a_sample():
    """MXNet up to 1.8 and 2.0 against 1.9."""
    pred, label = jnp.log(jnp.full((2, 3, 5), 0.2)), jnp.full((2, 3, 5), 0.25)
    mean, total = (KLDivLoss(aggregate=kind)(pred, label) for kind in ("mean", "sum"))
    assert mean.shape == (2,)
    assert_close(total, 15 * np.asarray(mean))


def test_zeros():
    """Finite where MXNet is NaN: a zero label over -inf, and an infinity of weight 0."""
    pred = jnp.array([[-jnp.inf, 0.0], [-jnp.inf, 0.0]])
    label, keep = jnp.array([[0.0, 1.0], [1.0, 0.0]]), jnp.array([[1.0], [0.0]])
    assert_close(KLDivLoss()(pred, label), [5e-13, np.inf])
    got, gradients = jax.value_and_grad(
        lambda *sides: jnp.sum(KLDivLoss()(*sides, keep)), argnums=(0, 1)
    )(pred, label)
    assert_close(got, 5e-13)
    assert_close(gradients[0], [[0.0, -0.5], [0.0, 0.0]])
    assert_close(gradients[1], [[np.log(1e-12) / 2, 0.5], [0.0, 0.0]])
    assert np.isnan(KLDivLoss()(pred.at[0, 1].set(jnp.nan), label)[0])


X = np.log(np.full((2, 3), 1 / 3, np.float32))


@pytest.mark.parametrize(
    ("options", "sides", "error", "message"),
    [
        ({}, (X, X.T), ValueError, r"label must .* \(2, 3\); got \(3, 2\)"),
        ({}, (X, X, X[:, :2]), ValueError, "sample_weight must be of a shape"),
        ({"batch_axis": 2}, (X, X), ValueError, "axis must be within the 2 axes"),
        ({"from_logits": False, "axis": 2}, (X, X), ValueError, "axis must be within the 2 axes"),
        ({}, (X, X.astype(int)), TypeError, "label must be floating point"),
        ({}, (X, [[0.5] * 3] * 2), TypeError, "label must be an array"),
        ({"weight": "heavy"}, (X, X), TypeError, "weight must be an array"),
    ],
)
def test_errors(options, sides, error, message):
    """When called, as in MXNet."""
    loss = KLDivLoss(**options)
    with pytest.raises(error, match=f"KLDivLoss: {message}"):
        loss(*sides)


def test_unknown_aggregate():
    """The one option that is not MXNet's is checked at once."""
    with pytest.raises(ValueError, match='aggregate must be one of "mean", "sum"'):
        KLDivLoss(aggregate="average")
