"""kljax.compat.optax and .keras against the numbers of Optax, and of Keras on JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_goldens, goldens

from kljax.compat import keras, optax

OPTAX, KERAS = goldens("optax"), goldens("keras")
PLAIN = [case for case in OPTAX if "special" not in case]
SPECIAL = [case for case in OPTAX if "special" in case]
FUNCTIONS = (
    optax.kl_divergence,
    optax.kl_divergence_with_log_targets,
    optax.generalized_kl_divergence,
    optax.softmax_cross_entropy,
)


def sides_of(case):
    return [jnp.asarray(x, d) for x, d in zip(case["inputs"], case["dtypes"], strict=True)]


def narrowest(dtypes):
    return min(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def finite(case):
    """The golden case with 0 for every NaN of Optax's gradients, and the value of SPECIAL."""
    known = [
        np.nan_to_num(one, nan=0.0, posinf=np.inf, neginf=-np.inf) for one in case["gradients"]
    ]
    return {**case, "gradients": known}


def test_optax_goldens(x64):
    """Over axes, masks and shapes; gradients are 0 where Optax's are NaN."""
    options = [
        {k: tuple(v) if k == "axis" and isinstance(v, list) else v for k, v in c["options"].items()}
        for c in PLAIN
    ]
    options = [{k: np.array(v) if k == "where" else v for k, v in one.items()} for one in options]
    functions = [
        partial(getattr(optax, c["name"]), **o) for c, o in zip(PLAIN, options, strict=True)
    ]
    assert not any(np.isnan(np.sum(case["value"])) for case in PLAIN)
    sides = list(map(sides_of, PLAIN))
    assert_goldens(
        list(map(finite, PLAIN)), functions, sides, [narrowest(c["dtypes"]) for c in PLAIN]
    )


@pytest.mark.parametrize("case", SPECIAL, ids=[case["name"] for case in SPECIAL])
def test_optax_zeros(case):
    """Optax's numbers at zeros and infinities, and finite ones where it gives NaN."""
    first, second = (np.array(x, np.float32) for x in case["inputs"])
    function = getattr(optax, case["name"])
    value, pull = jax.vjp(function, first, second)
    want = np.array(case["value"])
    assert np.isnan(want).any(), "there is a difference"
    if case["name"] == "softmax_cross_entropy":
        want = np.where(np.isnan(want), np.log(2), want)
    else:  # a zero target contributes 0, or the prediction
        rest = np.exp(first[:, 0]) if case["name"] == "generalized_kl_divergence" else 0
        want = np.where(np.isnan(want), rest, want)
    assert_close(value, want)
    to_first, to_second = pull(jnp.asarray(0.5 + np.arange(len(value)) % 4 / 4, jnp.float32))
    assert_close(to_first, finite(case)["gradients"][0])
    known = finite(case)["gradients"][1]
    if case["name"] == "softmax_cross_entropy":
        masked = (second == 0) & np.isneginf(first)
        known = np.where(masked, 0, known)
    assert_close(to_second, known)


def test_optax_forward_mode_and_hessian():
    """Finite too where Optax's forward mode is NaN: -inf under a zero label."""
    logits, labels = jnp.array([1.0, -jnp.inf, 1.0]), jnp.array([1.0, 0.0, 0.0])
    want = np.array([-0.5, 0.0, 0.5])
    assert_close(jax.jacfwd(optax.softmax_cross_entropy)(logits, labels), want)
    hessian = jax.hessian(optax.softmax_cross_entropy)(logits, labels)
    assert_close(hessian, [[0.25, 0, -0.25], [0, 0, 0], [-0.25, 0, 0.25]])
    log_q = jnp.log(labels)
    assert_close(jax.jacfwd(optax.kl_divergence, 1)(log_q, labels), [1, 0, 0])
    assert_close(jax.jacfwd(optax.kl_divergence)(log_q, labels), [-1, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_optax_masked_nan(function):
    """What `where` hides has no effect on value or gradient."""
    clean = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[0.5, 0.25, 0.25]])
    dirty = [side.at[0, 1].set(jnp.nan) for side in clean]
    where = jnp.array([[True, False, True]])

    def loss(first, second):
        return function(first, second, where=where)[0]

    got, want = (jax.value_and_grad(loss, (0, 1))(*sides) for sides in (dirty, clean))
    jax.tree.map(assert_close, got, want)
    assert all(gradient[0, 1] == 0 for gradient in got[1])


A, B = np.zeros((2, 3), np.float32), np.full((2, 3), 0.5, np.float32)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("sides", "options", "error", "message"),
    [
        ((A.astype(int), B), {}, TypeError, "(log_predictions|logits) must be floating"),
        (([0.0, 1.0], B[0]), {}, TypeError, "(log_predictions|logits) must be an array"),
        ((A, B.T), {}, TypeError, r"(log_)?(targets|labels) must .* \(2, 3\); got \(3, 2\)"),
        ((A, B), {"axis": 2}, ValueError, "axis must be within the 2 axes"),
        ((A[0, 0], B[0, 0]), {}, ValueError, "axis must be within the 0 axes"),
        ((A, B), {"where": A}, ValueError, "where must be bool; got float32"),
        ((A, B), {"where": [[True] * 3] * 2}, TypeError, "where must be an array"),
        ((A, B), {"where": A[:, :2] > 0}, ValueError, "where must be of a shape"),
    ],
)
def test_optax_errors(function, sides, options, error, message):
    """The types of Optax's errors, at the same moments."""
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(*sides, **options)


def test_optax_dtypes_of_targets():
    """Targets are floats; labels of the cross-entropy may be integers or bool."""
    for function, name in zip(FUNCTIONS[:3], ("targets", "log_targets", "targets"), strict=True):
        with pytest.raises(TypeError, match=f": {name} must be floating"):
            function(A, B.astype(int))
    labels = np.eye(3)[[0, 2]]
    want = optax.softmax_cross_entropy(A, labels.astype(np.float32))
    for dtype in (int, bool):
        got = optax.softmax_cross_entropy(A, labels.astype(dtype))
        assert got.dtype == jnp.float32
        assert_close(got, want)
    assert optax.softmax_cross_entropy(jnp.asarray(A, jnp.bfloat16), labels > 0).dtype == "bfloat16"
    assert optax.kl_divergence(jnp.asarray(A, jnp.bfloat16), 0.5).dtype == "bfloat16"


def test_keras_goldens(x64):
    """Values, gradients and dtypes, clipping included."""
    dtypes = [narrowest(case["dtypes"]) for case in KERAS]
    functions = [keras.kl_divergence] * len(KERAS)
    assert_goldens(KERAS, functions, list(map(sides_of, KERAS)), dtypes)


def test_keras_converts():
    """Lists, and integers, which y_true becomes too where y_pred is of them."""
    assert_close(keras.kl_divergence([[0.5, 0.5]], [[0.0, 1.0]]), [7.365901], np.float32)
    assert_close(keras.kl_divergence([[1, 0]], [[0, 1]]), [16.118093], np.float32)
    assert_close(keras.kl_divergence([[0.5, 0.5]], [[0, 1]]), [-1.6118096e-06], np.float32)


@pytest.mark.parametrize(
    ("y_true", "y_pred", "error", "message"),
    [
        (A, A.T, TypeError, "y_pred must be of a shape"),
        (0.5, 0.5, ValueError, "axis must be within the 0 axes"),
        (A, None, TypeError, "y_pred must be an array"),
        (A, A.astype(complex), ValueError, "y_pred must be real"),
    ],
)
def test_keras_errors(y_true, y_pred, error, message):
    """Errors of Keras on JAX, but that what is no array is a TypeError here."""
    with pytest.raises(error, match=message):
        keras.kl_divergence(y_true, y_pred)
