"""kljax.compat.torch against PyTorch's own numbers, warnings and errors."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_goldens, goldens

from kljax.compat.torch import KLDivLoss, kl_div

CASES = goldens("torch")
TENSORS = [case for case in CASES if case["name"] not in ("special points", "legacy")]
POINTS = [case for case in CASES if case["name"] == "special points"]
LEGACY = [case for case in CASES if case["name"] == "legacy"]


def quietly(*sides, **options):
    """Without the warning of "mean"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kl_div(*sides, **options)


def sides_of(case):
    return [jnp.asarray(x, d) for x, d in zip(case["inputs"], case["dtypes"], strict=True)]


def narrowest(dtypes):
    return min(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def test_goldens(x64):
    """Values, gradients and dtypes, in every dtype, reduction and shape."""
    assert_goldens(
        TENSORS,
        [partial(quietly, **case["options"]) for case in TENSORS],
        [sides_of(case) for case in TENSORS],
        [narrowest(case["dtypes"]) for case in TENSORS],
    )


@pytest.mark.parametrize("case", POINTS, ids=["probs", "log_target"])
def test_special_points(case):
    """Every pair of zeros, infinities and NaN: PyTorch's, except where the docstring says."""
    x, t = (np.array(side, np.float32) for side in case["inputs"])
    value, to_x, to_t = (np.array(one) for one in (case["value"], *case["gradients"]))
    p_is_zero = np.isneginf(t) if case["options"]["log_target"] else t == 0
    masked = p_is_zero & ~np.isnan(x)
    if not case["options"]["log_target"]:
        masked &= x < np.inf
    assert np.isnan(value[masked & ~np.isfinite(x)]).all(), "there is a difference"
    want = np.where(masked, 0, value), to_x, np.where(masked, 0, to_t)
    weights = np.asarray(jnp.asarray(0.5 + np.arange(len(x)) % 4 / 4, np.float32))

    def loss(x, t):
        return kl_div(x, t, **case["options"])

    got, pull = jax.vjp(loss, x, t)
    assert_close(got, want[0])
    to_x_got, to_t_got = (np.array(one) for one in pull(jnp.asarray(weights)))
    known = masked | ~p_is_zero
    assert_close(to_x_got, want[1])
    assert_close(to_t_got[known], want[2][known])
    forward = jax.jvp(lambda x: loss(x, t), (x,), (jnp.asarray(weights),))[1]
    assert_close(forward, want[1])
    forward = jax.jvp(lambda t: loss(x, t), (t,), (jnp.asarray(weights),))[1]
    assert_close(forward[known], want[2][known])


def test_documented_differences():
    """Finite where PyTorch is NaN, by the mathematics: 0 log 0 = 0."""
    inf, one_hot = jnp.inf, jnp.array([1.0, 0.0])
    assert kl_div(jnp.log(one_hot), one_hot, reduction="sum") == 0
    assert kl_div(jnp.log(one_hot), jnp.log(one_hot), reduction="sum", log_target=True) == 0
    assert kl_div(jnp.array([-inf]), jnp.array([-300.0]), reduction="sum", log_target=True) == inf
    gradient = jax.grad(lambda t: kl_div(jnp.log(jnp.array([0.5, 0.5])), t, reduction="sum"))
    assert_close(gradient(one_hot), [1 - np.log(0.5), 0.0])
    hessian = jax.hessian(lambda t: kl_div(jnp.log(one_hot), t, reduction="sum"))(one_hot)
    assert_close(hessian, [[1.0, 0.0], [0.0, 0.0]])


def test_legacy_arguments(x64):
    """size_average and reduce: the numbers, the warnings, and the error that they swallow."""
    for case in LEGACY:
        x, t = (jnp.asarray(side) for side in case["inputs"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if case["error"]:
                with pytest.raises(ValueError, match="reduction must be one of"):
                    kl_div(x, t, *case["arguments"])
            else:
                assert_close(kl_div(x, t, *case["arguments"]), case["value"], np.float64)
        assert [one.category for one in caught] == [UserWarning] * len(case["warnings"])
        for got, want in zip(caught, case["warnings"], strict=True):
            assert str(got.message)[:80] == want[:80]
            assert got.filename == __file__


def test_the_module():
    """KLDivLoss binds the options; what is wrong shows when it is called."""
    x, t = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])), jnp.array([[0.5, 0.5], [1.0, 0.0]])
    for options in (
        {"reduction": "none"},
        {"reduction": "batchmean"},
        {"reduction": "sum", "log_target": True},
    ):
        assert_close(KLDivLoss(**options)(x, t), kl_div(x, t, **options))
    with pytest.warns(UserWarning, match="batchmean"):
        assert_close(KLDivLoss()(x, t), quietly(x, t))
    with pytest.warns(UserWarning, match="use reduction='sum' instead"):
        loss = KLDivLoss(False, None, "batchmean")
    assert loss.reduction == "sum"
    assert repr(loss) == "KLDivLoss()"
    with pytest.raises(ValueError, match="reduction must be one of"):
        KLDivLoss(reduction="banana")(x, t)
    with pytest.raises(TypeError, match="log_target must be bool"):
        KLDivLoss(reduction="sum", log_target=None)(x, t)


FLOATS = np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("input", "target", "options", "error", "message"),
    [
        (FLOATS, FLOATS, {"reduction": "MEAN"}, ValueError, 'reduction must .*; got "MEAN"'),
        (FLOATS, FLOATS, {"reduction": None}, ValueError, "reduction must .*; got None"),
        (FLOATS, FLOATS.T, {}, ValueError, r"target must .* \(2, 3\); got \(3, 2\)"),
        (FLOATS, FLOATS[:, :2], {}, ValueError, r"target must .* \(2, 3\); got \(2, 2\)"),
        (FLOATS.astype(int), FLOATS, {}, TypeError, "input must .*; got int32"),
        (FLOATS, FLOATS > 0, {}, TypeError, "target must .*; got bool"),
        (FLOATS, FLOATS.astype(complex), {}, TypeError, "target must .*; got complex64"),
        (jnp.zeros(2, jnp.float8_e4m3fn), FLOATS, {}, TypeError, "input must .*; got float8"),
        ([0.0], FLOATS, {}, TypeError, "input must be an array .*; got list"),
        (FLOATS, 0.5, {}, TypeError, "target must be an array .*; got float"),
        (FLOATS, None, {}, TypeError, "target must be an array .*; got NoneType"),
        (FLOATS, FLOATS, {"log_target": 1}, TypeError, "log_target must be bool; got 1"),
    ],
)
def test_errors(input, target, options, error, message):
    """ValueError for options and shapes, TypeError for what is no tensor of floats."""
    with pytest.raises(error, match=message):
        kl_div(input, target, **{"reduction": "sum", **options})


def test_transforms():
    """jit and vmap change nothing; the warning comes while tracing."""
    x, t = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]])), jnp.array([[0.5, 0.5], [1.0, 0.0]])
    want = kl_div(x, t, reduction="batchmean")
    assert_close(jax.jit(lambda x, t: kl_div(x, t, reduction="batchmean"))(x, t), want)
    by_row = jax.vmap(lambda x, t: kl_div(x, t, reduction="sum"))(x, t)
    assert_close(jnp.mean(by_row), want)
    with pytest.warns(UserWarning, match="divides the total loss"):
        jax.jit(kl_div)(x, t)
