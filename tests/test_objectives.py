"""`distillation_loss` against the oracle: its terms, weights, metrics and transforms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close, tol

import kljax
from kljax import LogProbs, Probs, distillation_loss

S = np.array([[0.3, -1.2, 0.8], [1.5, 0.1, -0.4], [0.0, 3.0, -2.0], [0.2, 0.2, 1.0]], np.float32)
T = np.array([[1.0, 0.2, -0.7], [1.4, 0.1, -0.4], [-1.0, 2.0, 0.5], [2.0, 0.0, 0.0]], np.float32)
P_T = np.exp(oracle.log_probs(T)).astype(np.float32)
LABELS = np.array([2, 0, 1, 1])
W = np.array([0.5, 2.0, 0.0, 1.0], np.float32)
LABEL_W = np.array([0.0, 3.0, 0.5, 0.0], np.float32)
TAU, SOFT, HARD = np.float32(2.5), np.float32(0.7), np.float32(0.4)
BOTH = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4}
METRICS = kljax.DistillationMetrics._fields


def f32(x):
    return np.asarray(x, np.float32)


def want_gradient(
    s,
    t,
    labels=None,
    *,
    divergence="forward_kl",
    temperature=None,
    scale_by_temperature=True,
    soft_weight=1.0,
    hard_weight=0.0,
    weights=None,
    label_weights=None,
    kinds=("logits", "logits"),
    axis=-1,
    where=None,
    **params,
):
    """Return the gradient of the mean loss to the predictions, from the oracle's of each term."""
    batch = np.delete(np.shape(s), axis)
    w = np.ones(batch) if weights is None else np.float64(weights)
    label_w = w if label_weights is None else np.float64(label_weights)
    square = temperature**2 if temperature is not None and scale_by_temperature else 1.0
    where = {"axis": axis, "where": where}
    total = np.zeros(np.shape(s))
    if soft_weight and w.any():
        options = {"kinds": kinds, "temperature": temperature, "weights": w, **where, **params}
        soft = oracle.gradient(divergence, s, t, **options)
        total = total + soft_weight * square * soft / w.sum()
    if labels is not None and hard_weight and label_w.any():
        options = {"kinds": (kinds[0], "labels"), "weights": label_w, **where}
        hard = oracle.gradient("cross_entropy", s, labels, **options)
        total = total + hard_weight * hard / label_w.sum()
    return total


def assert_metrics(got, want):
    """Assert that every metric is the oracle's."""
    for name in METRICS:
        assert_close(getattr(got, name), want[name])
        assert getattr(got, name).shape == ()


def check(s, t, labels=None, *, oracle_t=None, oracle_options=None, **options):
    """Assert that value, gradient to the predictions and metrics are the oracle's."""

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(s, t, labels):
        return distillation_loss(s, t, labels, **options)

    (loss, metrics), grad = step(s, t, labels)
    t = t if oracle_t is None else oracle_t
    options |= oracle_options or {}
    want, want_metrics = oracle.distillation_loss(s, t, labels, **options)
    assert loss.dtype == jnp.float32
    assert_close(loss, want)
    assert_close(grad, want_gradient(s, t, labels, **options))
    assert_metrics(metrics, want_metrics)


@jax.jit
def traced(arrays):
    """Return ((loss, metrics), gradients) with everything traced that may be."""

    def loss(arrays):
        return distillation_loss(
            arrays["predictions"],
            arrays["targets"],
            arrays["labels"],
            temperature=arrays["temperature"],
            soft_weight=arrays["soft_weight"],
            hard_weight=arrays["hard_weight"],
            weights=arrays["weights"],
            label_weights=arrays["label_weights"],
        )

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)(arrays)


ARRAYS = {
    "predictions": S,
    "targets": T,
    "labels": LABELS,
    "temperature": TAU,
    "soft_weight": SOFT,
    "hard_weight": HARD,
    "weights": W,
    "label_weights": LABEL_W,
}


def want_traced(**changes):
    """Return the oracle's loss, metrics and gradient to predictions of ARRAYS with changes."""
    options = ARRAYS | changes
    loss, metrics = oracle.distillation_loss(**options)
    options["s"], options["t"] = options.pop("predictions"), options.pop("targets")
    return loss, metrics, want_gradient(**options)


# --- value and gradient ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "scale_by_temperature": False},
        {"weights": W, **BOTH},
        {"weights": W > 0, "label_weights": LABEL_W > 0, "hard_weight": 1, "temperature": 3},
        {"soft_weight": 0, "hard_weight": 2.0},
    ],
)
def test_loss_equals_the_oracle(options):
    """The loss is soft_weight·T²·D at T + hard_weight·CE at 1, each a weighted mean."""
    check(S, T, LABELS, **options)


def test_without_labels_it_is_the_soft_term():
    """Without labels the loss is the soft term, and the hard metric 0."""
    check(S, T, weights=W, temperature=2.0)


def test_everything_traced_equals_the_oracle():
    """Temperature, both weights and the examples' weights may all be traced."""
    for tau in (0.5, 1.0, 4.0):
        (loss, metrics), grads = traced(ARRAYS | {"temperature": f32(tau)})
        want, want_metrics, want_grad = want_traced(temperature=tau)
        assert_close(loss, want)
        assert_close(grads["predictions"], want_grad)
        assert_metrics(metrics, want_metrics)


@pytest.mark.parametrize("name", ["temperature", "soft_weight", "hard_weight"])
def test_gradient_to_the_schedules(name):
    """Temperature and the two weights of the terms get exact derivatives."""
    got = traced(ARRAYS)[1][name]
    want = oracle.derivative(lambda x: want_value(**{name: x}), float(ARRAYS[name]))
    assert_close(got, want)


def want_value(**changes):
    """Return the oracle's loss of ARRAYS with changes, of which one may be complex."""
    wide = {name: x if name == "labels" else np.float64(x) for name, x in ARRAYS.items()}
    return oracle.distillation_loss(**(wide | changes))[0]


@pytest.mark.parametrize("name", ["weights", "label_weights"])
def test_gradient_to_example_weights(name):
    """Each set of weights gets the gradient of its own term, also at a weight of 0."""
    got = traced(ARRAYS)[1][name]
    if name == "weights":
        values = oracle.divergence("forward_kl", S, T, temperature=TAU) * SOFT * TAU**2
    else:
        values = oracle.divergence("cross_entropy", S, LABELS, kinds=("logits", "labels")) * HARD
    w = np.float64(ARRAYS[name])
    assert_close(got, (values - (w * values).sum() / w.sum()) / w.sum())


def test_targets_get_no_gradient():
    """The teacher is frozen: its gradient is 0, in forward mode too, however it is given."""
    grads = traced(ARRAYS)[1]
    np.testing.assert_array_equal(grads["targets"], np.zeros_like(T))

    def loss(log_probs):
        return distillation_loss(S, LogProbs(log_probs), divergence=kljax.reverse_kl)[0]

    log_t = f32(oracle.log_probs(T))
    value, tangent = jax.jit(lambda t, dt: jax.jvp(loss, (t,), (dt,)))(log_t, np.ones_like(T))
    assert value > 0
    assert tangent == 0


# --- terms of weight 0 ---


def test_a_static_soft_weight_of_zero_drops_the_teacher():
    """With soft_weight=0 a NaN teacher has no effect on loss or gradient."""

    @jax.jit
    @jax.value_and_grad
    def step(s, teacher):
        return distillation_loss(s, teacher, LABELS, soft_weight=0, hard_weight=0.4)[0]

    options = {"soft_weight": 0.0, "hard_weight": 0.4}
    loss, grad = step(S, np.full_like(T, np.nan))
    assert_close(loss, oracle.distillation_loss(S, T, LABELS, **options)[0])
    assert_close(grad, want_gradient(S, T, LABELS, **options))


def test_a_traced_soft_weight_of_zero_drops_the_teacher():
    """A schedule that reaches 0 removes the soft term, even of a NaN teacher."""
    changes = {"soft_weight": f32(0)}
    want, _, want_grad = want_traced(**changes)
    for teacher in (T, np.full_like(T, np.nan)):
        (loss, _), grads = traced(ARRAYS | changes | {"targets": teacher})
        assert_close(loss, want)
        assert_close(grads["predictions"], want_grad)


def test_a_traced_hard_weight_of_zero_drops_the_labels():
    """A schedule that reaches 0 removes the hard term, even of labels out of range."""
    changes = {"hard_weight": f32(0)}
    want, _, want_grad = want_traced(**changes)
    for labels in (LABELS, np.full_like(LABELS, -100)):
        (loss, _), grads = traced(ARRAYS | changes | {"labels": labels})
        assert_close(loss, want)
        assert_close(grads["predictions"], want_grad)


@pytest.mark.parametrize("unread", [-100, 3, 2**31 - 1])
def test_a_label_of_weight_zero_is_never_read(unread):
    """Whatever stands there, value, gradients and metrics are those of any valid label."""
    labels = np.where(LABEL_W == 0, unread, LABELS)
    got, want = traced(ARRAYS | {"labels": labels}), traced(ARRAYS)
    for grads in (got[1], want[1]):
        del grads["labels"]
        # Only the gradient to the label weight itself cannot know what is never read.
        grads["label_weights"] = np.asarray(grads["label_weights"])[LABEL_W != 0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)
    assert_close(got[0][0], want_traced()[0])
    assert_close(got[1]["predictions"], want_traced()[2])


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_label_out_of_range_gives_nan(bad):
    """A label that counts and is out of range makes loss and hard metric NaN, not the others."""
    labels = np.where(LABEL_W == 3, bad, LABELS)
    (loss, metrics), grads = traced(ARRAYS | {"labels": labels})
    assert np.isnan(loss)
    assert np.isnan(metrics.hard)
    assert np.isfinite(metrics.soft)
    to_predictions = np.asarray(grads["predictions"])
    assert np.isnan(to_predictions[LABEL_W == 3]).all()
    assert np.isfinite(to_predictions[LABEL_W != 3]).all()


def test_a_bad_example_of_weight_zero_has_no_effect():
    """NaN in an example whose weights are both 0 is removed from loss, gradients and metrics."""
    zeros = {"label_weights": LABEL_W * f32(W > 0)}
    want, want_metrics, want_grad = want_traced(**zeros)
    for side in ("predictions", "targets"):
        bad = np.where(W[:, None] == 0, np.float32(np.nan), ARRAYS[side])
        (loss, metrics), grads = traced(ARRAYS | zeros | {side: bad})
        assert_close(loss, want)
        assert_metrics(metrics, want_metrics)
        assert_close(grads["predictions"], want_grad)
        np.testing.assert_array_equal(np.asarray(grads["predictions"])[W == 0], 0)


@pytest.mark.parametrize("side", ["predictions", "targets"])
def test_a_row_that_one_term_reads(side):
    """NaN shows in each term that counts the row, and in no other."""
    weights, label_weights = f32([0, 1, 1, 1]), f32([1, 1, 1, 1])
    bad = {side: np.where(weights[:, None] == 0, np.float32(np.nan), ARRAYS[side])}
    options = {"weights": weights, "label_weights": label_weights}
    (_, metrics), _ = traced(ARRAYS | options | bad)
    assert np.isfinite(metrics.soft)
    assert np.isnan(metrics.hard) == (side == "predictions")


def test_no_examples_or_no_labels_give_zero():
    """A term whose weights are all 0 contributes 0 and no gradient."""
    zero = np.zeros_like(W)
    for changes in ({"weights": zero}, {"label_weights": zero}):
        want, want_metrics, want_grad = want_traced(**changes)
        (loss, metrics), grads = traced(ARRAYS | changes)
        assert_close(loss, want)
        assert_metrics(metrics, want_metrics)
        assert_close(grads["predictions"], want_grad)
    changes = {"weights": zero, "label_weights": zero}
    (loss, _), grads = traced(ARRAYS | changes | {"predictions": np.full_like(S, np.nan)})
    assert loss == 0
    np.testing.assert_array_equal(grads["predictions"], np.zeros_like(S))


# --- arguments that do not fit ---


def test_missing_or_wrong_labels_raise():
    """A hard term needs integer labels of the batch shape, and says so."""
    with pytest.raises(ValueError, match=r"distillation_loss: labels must be given.*hard_weight"):
        distillation_loss(S, T, hard_weight=0.5)
    with pytest.raises(ValueError, match=r"labels .*\(4,\).*\(4, 1\)"):
        distillation_loss(S, T, LABELS[:, None], hard_weight=0.5)
    with pytest.raises(ValueError, match=r"label_weights .*\(4,\).*\(4, 1\)"):
        distillation_loss(S, T, LABELS, hard_weight=0.5, label_weights=W[:, None])
    with pytest.raises(TypeError, match="labels"):
        distillation_loss(S, T, W, hard_weight=0.5)


# --- reductions ---


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_reduction_applies_to_both_terms(reduction):
    """Both terms are reduced alike; the metrics stay weighted means."""
    options = {"weights": W, "label_weights": LABEL_W, "reduction": reduction, **BOTH}
    loss, metrics = distillation_loss(S, T, LABELS, **options)
    want, want_metrics = oracle.distillation_loss(S, T, LABELS, **options)
    assert_close(loss, want)
    assert_metrics(metrics, want_metrics)


def test_normalizer_divides_both_terms():
    """With one set of weights the normalizer is the denominator of both terms, not of metrics."""
    options = {"weights": W, "normalizer": 7.0, **BOTH}
    loss, metrics = distillation_loss(S, T, LABELS, **options)
    want, want_metrics = oracle.distillation_loss(S, T, LABELS, **options)
    assert_close(loss, want)
    assert_metrics(metrics, want_metrics)


def test_normalizer_leaves_label_weights_their_own_denominator():
    """Where label_weights are given, the hard term is divided by their sum."""
    got, _ = distillation_loss(
        S, T, LABELS, weights=W, label_weights=LABEL_W, normalizer=7.0, **BOTH
    )
    soft = oracle.distillation_loss(S, T, weights=W, normalizer=7.0, **{**BOTH, "hard_weight": 0})
    hard = oracle.distillation_loss(S, T, LABELS, weights=LABEL_W, **{**BOTH, "soft_weight": 0})
    assert_close(got, soft[0] + hard[0])


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_axis_name_under_vmap_equals_the_whole_batch(reduction):
    """Every numerator and denominator, of loss and metrics, is summed over the axis."""
    names = ("predictions", "targets", "labels", "weights", "label_weights")
    shards = [ARRAYS[name].reshape(2, 2, *ARRAYS[name].shape[1:]) for name in names]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(s):
        def local(s, t, labels, w, label_w):
            return distillation_loss(
                s, t, labels, weights=w, label_weights=label_w,
                reduction=reduction, axis_name="shards", **BOTH,
            )  # fmt: skip

        losses, metrics = jax.vmap(local, axis_name="shards")(s, *shards[1:])
        return losses[0], (losses, metrics)

    (_, (losses, metrics)), grad = step(shards[0])
    options = {"weights": W, "label_weights": LABEL_W, **BOTH}
    want, want_metrics = oracle.distillation_loss(S, T, LABELS, reduction=reduction, **options)
    assert_close(losses, [want, want])
    for name in METRICS:
        assert_close(getattr(metrics, name), np.full(2, want_metrics[name]))
    if reduction == "mean":
        assert_close(grad.reshape(4, 3), want_gradient(S, T, LABELS, **options))


# --- what predictions and targets may be ---


def test_where_masks_classes_of_both_terms():
    """Masked classes take part in neither term nor in any metric, even NaN."""
    where = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 1, 0]], bool)
    options = {"weights": W, "where": where, **BOTH}
    # An argmax that saw the masked classes would choose them here, and not there.
    s, t = np.where(where, S, f32(np.nan)), np.where(where, T, f32(-50))
    check(s, t, LABELS, **options)


def test_classes_on_another_axis():
    """With axis=0 the loss, its gradient and its metrics are those of the transposed arrays."""
    check(S.T.copy(), T.T.copy(), LABELS, axis=0, weights=W, **BOTH)


@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_teachers_given_as_probabilities(kind):
    """A teacher's probabilities or log-probabilities are retempered like logits."""
    held = Probs(P_T) if kind == "probs" else LogProbs(np.log(P_T))
    raw = P_T if kind == "probs" else np.log(P_T)
    kinds = {"kinds": ("logits", kind)}
    check(S, held, LABELS, oracle_t=raw, oracle_options=kinds, **BOTH)


def test_one_teacher_for_the_whole_batch():
    """A teacher without batch axes is shared by all examples."""
    options = {"weights": W, **BOTH}
    check(S, T[0], LABELS, oracle_t=np.tile(T[0], (4, 1)), **options)


def test_one_example_without_batch():
    """A single example needs no batch axis."""
    check(S[0], T[0], LABELS[0], **BOTH)


# --- the divergence ---


@pytest.mark.parametrize(
    ("divergence", "name", "params"),
    [
        (kljax.reverse_kl, "reverse_kl", {}),
        (partial(kljax.jensen_shannon, beta=0.3), "jensen_shannon", {"beta": 0.3}),
    ],
)
def test_any_divergence_serves(divergence, name, params):
    """The soft term and its metrics are of the divergence given."""
    params = params | {"divergence": name}
    check(S, T, LABELS, divergence=divergence, oracle_options=params, **BOTH)


@pytest.mark.parametrize("how", ["closure", "partial"])
def test_a_divergence_may_hold_a_traced_value(how):
    """A term that closes over a traced value, and a partial that holds one, give it gradients."""

    def make(alpha):
        if how == "partial":
            return partial(kljax.skew_forward_kl, alpha=alpha)

        @kljax.divergence
        def skew(log_s, log_t):
            return kljax.term_kl(log_t, kljax.log_mixture(log_t, log_s, alpha)[0])

        return skew

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def step(s, alpha):
        return distillation_loss(s, T, LABELS, divergence=make(alpha), **BOTH)[0]

    def want(alpha):
        options = {"divergence": "skew_forward_kl", "alpha": alpha, **BOTH}
        return oracle.distillation_loss(S, T, LABELS, **options)[0]

    for alpha in (0.2, 0.6):
        loss, (to_s, to_alpha) = step(S, f32(alpha))
        assert_close(loss, want(alpha))
        assert_close(to_alpha, oracle.derivative(want, alpha))
        options = {"divergence": "skew_forward_kl", "alpha": alpha, **BOTH}
        assert_close(to_s, want_gradient(S, T, LABELS, **options))


# --- metrics ---


def test_a_teacher_is_not_smoothed():
    smoothed = partial(kljax.cross_entropy, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing must be left out with a distribution"):
        kljax.distillation_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), divergence=smoothed)


def test_metrics_have_no_gradient():
    """No metric moves anything: all their gradients are 0."""

    def metrics(arrays):
        floats = ("predictions", "temperature", "soft_weight", "weights", "label_weights")
        options = {**ARRAYS, **dict(zip(floats, arrays, strict=True))}
        got = distillation_loss(**options)[1]
        return sum(getattr(got, name) for name in METRICS)

    grads = jax.jit(jax.grad(metrics))((S, TAU, SOFT, W, LABEL_W))
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros(np.shape(grad)))


def test_metrics_do_not_change_with_the_weights_of_the_terms():
    """Soft and hard metrics stand before T² and the weights of the terms; T moves only soft."""
    first = traced(ARRAYS)[0][1]
    changes = {"soft_weight": f32(3), "hard_weight": f32(5)}
    assert_metrics(traced(ARRAYS | changes)[0][1], want_traced()[1])
    warm = traced(ARRAYS | {"temperature": f32(9)})[0][1]
    assert warm.soft < first.soft
    for name in METRICS[1:]:
        assert_close(getattr(warm, name), getattr(first, name))


# --- transforms ---


def test_scan_over_a_temperature_schedule():
    """In a scan, every step has the loss of its own temperature, and grad sees them all."""
    taus = f32([1.0, 2.0, 4.0])

    @jax.jit
    @jax.value_and_grad
    def total(s):
        def step(carry, tau):
            loss, _ = distillation_loss(s, T, LABELS, hard_weight=0.5, temperature=tau)
            return carry + loss, None

        return jax.lax.scan(step, 0.0, taus)[0]

    loss, grad = total(S)
    each = [{"hard_weight": 0.5, "temperature": float(tau)} for tau in taus]
    assert_close(loss, sum(oracle.distillation_loss(S, T, LABELS, **one)[0] for one in each))
    assert_close(grad, sum(want_gradient(S, T, LABELS, **one) for one in each))


def test_vmap_equals_a_loop():
    """Mapped over temperatures and batches, value and gradient are those of each one."""
    s, taus = np.stack([S, S[::-1]]), f32([1.0, 3.0])

    @jax.jit
    @jax.vmap
    def step(s, tau):
        def loss(s):
            return distillation_loss(s, T, LABELS, temperature=tau, weights=W, hard_weight=0.5)

        return jax.value_and_grad(loss, has_aux=True)(s)

    (losses, metrics), grads = step(s, taus)
    for i in range(2):
        options = {"temperature": taus[i], "weights": W, "hard_weight": 0.5}
        want, want_metrics = oracle.distillation_loss(s[i], T, LABELS, **options)
        assert_close(np.asarray(losses)[i], want)
        assert_close(np.asarray(metrics.soft)[i], want_metrics["soft"])
        assert_close(np.asarray(grads)[i], want_gradient(s[i], T, LABELS, **options))


def test_hessian_vector_product():
    """Forward over reverse mode gives the Hessian of both terms times a vector."""
    vector = f32([0.3, -1.0, 0.5])

    def loss(s):
        return distillation_loss(s, T[0], LABELS[0], **BOTH)[0]

    got = jax.jit(lambda s, v: jax.jvp(jax.grad(loss), (s,), (v,))[1])(S[0], vector)
    soft = oracle.hessian("forward_kl", S[0], T[0], temperature=2.0)
    hard = oracle.hessian("cross_entropy", S[0], LABELS[0], kinds=("logits", "labels"))
    assert_close(got, (0.7 * 4 * soft + 0.4 * hard) @ vector)


# --- dtypes ---


def test_narrow_dtypes_give_float32_with_narrow_gradients():
    """bfloat16 logits and weights are computed in float32; the gradient is bfloat16."""
    s, t, w = (jnp.asarray(x, jnp.bfloat16) for x in (S, T, W))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(s):
        return distillation_loss(s, t, LABELS, weights=w, label_weights=w, **BOTH)

    (loss, metrics), grad = step(s)
    s, t, w = (np.asarray(x, np.float64) for x in (s, t, w))
    want, want_metrics = oracle.distillation_loss(s, t, LABELS, weights=w, **BOTH)
    assert loss.dtype == jnp.float32
    assert_close(loss, want)
    assert_metrics(metrics, want_metrics)
    assert all(metric.dtype == jnp.float32 for metric in metrics)
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(grad, np.float64),
        want_gradient(s, t, LABELS, weights=w, **BOTH),
        **tol(jnp.bfloat16),
    )


def test_the_sum_of_narrow_weights_does_not_overflow():
    """The denominators of both terms are summed in float32 whatever the weights' dtype."""
    heavy = np.full(4, 60000, np.float16)
    got, metrics = distillation_loss(S, T, LABELS, weights=heavy, label_weights=heavy, **BOTH)
    want, want_metrics = oracle.distillation_loss(S, T, LABELS, **BOTH)
    assert_close(got, want)
    assert_metrics(metrics, want_metrics | {"weight_sum": 240000.0})


@pytest.mark.parametrize("weights", [np.array([1, 0, 2, 1]), np.array([True, False, True, True])])
def test_integer_and_bool_weights(weights):
    """Counts and masks are weights, for both terms and the metrics, also with traced schedules."""
    options = {"weights": weights, "label_weights": weights[::-1]}
    scalars = (TAU, SOFT, HARD)

    @jax.jit
    def step(tau, soft, hard):
        return distillation_loss(
            S, T, LABELS, temperature=tau, soft_weight=soft, hard_weight=hard, **options
        )

    loss, metrics = step(*scalars)
    names = ("temperature", "soft_weight", "hard_weight")
    options |= dict(zip(names, map(float, scalars), strict=True))
    want, want_metrics = oracle.distillation_loss(S, T, LABELS, **options)
    assert_close(loss, want)
    assert_metrics(metrics, want_metrics)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_under_x64(x64, dtype):
    """float64 stays float64, and float32 stays float32 where float64 is allowed."""
    s, t = S.astype(dtype) / 3, T.astype(dtype) / 3
    loss, metrics = distillation_loss(s, t, LABELS, **BOTH)
    want, want_metrics = oracle.distillation_loss(s, t, LABELS, **BOTH)
    assert loss.dtype == dtype
    assert_close(loss, want, dtype)
    assert_close(metrics.soft, want_metrics["soft"], dtype)
    assert metrics.soft.dtype == dtype


def test_the_library_compiles_it_as_a_whole(caplog):
    """Also outside the caller's jit: with every divergence of the library, and only once."""
    x = jnp.linspace(0, 1, 21).reshape(3, 7)
    for divergence in (kljax.forward_kl, kljax.reverse_kl, kljax.jensen_shannon):
        call = partial(distillation_loss, x, x[::-1], divergence=divergence)
        compiled = []
        for _ in range(2):
            caplog.clear()
            with jax.log_compiles():
                call()
            compiled.append([r.getMessage() for r in caplog.records if "Compiling" in r.message])
        assert any("_distill" in message for message in compiled[0])
        assert not compiled[1]


def test_a_shared_teacher_and_a_temperature_per_example(rng):
    x, teacher = (jnp.asarray(rng.normal(size=z), jnp.float32) for z in ((3, 5), (5,)))
    options = {"temperature": jnp.array([1.0, 2.0, 3.0]), "labels": jnp.arange(3)}

    def loss(teacher):
        return kljax.distillation_loss(x, teacher, hard_weight=0.5, **options)

    got, want = loss(teacher), loss(jnp.broadcast_to(teacher, x.shape))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)
