"""What users stumbled over: the smallest input of each kind, and the right value."""

import io
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, report
from jax import lax

import kljax
from kljax import Logits, LogProbs, Probs, TopK, families, metrics
from kljax.compat import optax, torchmetrics

X = jnp.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])
Y = jnp.array([[1.0, 1.0, 4.0], [0.0, 2.0, 0.0]])


def test_an_empty_batch():
    loss, _ = kljax.distillation_loss(jnp.ones((0, 3)), jnp.ones((0, 3)))
    assert loss == 0


def test_cross_entropy_is_linear_in_probs():
    """-log s at a zero target too; 0 where s = 0 as well."""
    s = jnp.log(jnp.array([[0.2, 0.3, 0.5, 0.0]]))
    t = jnp.array([[0.0, 0.4, 0.6, 0.0]])
    f = lambda t: kljax.cross_entropy(LogProbs(s), Probs(t), reduction="sum")  # noqa: E731
    want = np.array([[-np.log(0.2), -np.log(0.3), -np.log(0.5), 0.0]])
    assert_close(jax.grad(f)(t), want)
    assert_close(jax.jacfwd(f)(t), want)
    assert_close(jax.hessian(f)(t), np.zeros((1, 4, 1, 4)))
    masked = jax.grad(lambda t: kljax.cross_entropy(X[:1], Probs(t), where=[True, True, False])[0])
    assert_close(masked(jnp.array([[0.0, 1.0, 7.0]])), [[1.3132617, 0.3132617, 0.0]])


def test_a_mixed_derivative_of_cross_entropy():
    """Of -Σ t log s to t, then to the logits: softmax less the unit vector."""
    t = jnp.array([0.0, 1.0, 0.0])
    to_t = jax.grad(lambda t, x: kljax.cross_entropy(x, Probs(t)))
    mixed = jax.jacfwd(to_t, 1)(t, X[0])
    assert_close(mixed, np.asarray(jax.nn.softmax(X[0]))[None] - np.eye(3))


@pytest.mark.slow
@pytest.mark.parametrize("where", [None, np.array([True, True, False])])
def test_label_smoothing(where):
    labels, eps = jnp.array([0, 1]), 0.1
    count = 3 if where is None else 2
    allowed = np.ones(3, bool) if where is None else where
    log_s = np.asarray(jax.nn.log_softmax(jnp.where(allowed, X, -jnp.inf)), np.float64)
    target = (1 - eps) * np.eye(3)[np.asarray(labels)] + eps / count * allowed
    want = -np.where(target > 0, target * np.where(allowed, log_s, 0), 0).sum(-1)
    options = {"label_smoothing": eps, "where": where}
    assert_close(kljax.cross_entropy(X, labels, **options), want)
    weights = jnp.array([3.0, 1.0])
    mean = kljax.cross_entropy(X, labels, weights=weights, reduction="mean", **options)
    assert_close(mean, np.average(want, weights=weights))
    loss, seen = kljax.distillation_loss(
        X, Y, labels, soft_weight=0.0, hard_weight=1.0, weights=weights, **options
    )
    assert_close(loss, np.average(want, weights=weights))
    assert_close(seen.hard, loss)
    gradient = jax.grad(lambda x: kljax.cross_entropy(x, labels, reduction="sum", **options))(X)
    assert_close(gradient, np.where(allowed, np.exp(log_s) - target, 0))
    to_eps = jax.jit(
        jax.grad(lambda e: kljax.cross_entropy(X, labels, label_smoothing=e, where=where)[0])
    )
    assert_close(to_eps(eps), log_s[0, 0] - log_s[0][allowed].mean())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Probs, lambda p: LogProbs(jnp.log(p))])
def test_soft_labels_of_a_distillation(kind):
    """Mixup: the hard term is the cross-entropy with them, in the same pass."""
    soft = jnp.array([[0.7, 0.0, 0.3], [0.1, 0.9, 0.0]])
    loss = lambda x, p: kljax.distillation_loss(  # noqa: E731
        x, Y, kind(p), temperature=2.0, hard_weight=0.5, weights=jnp.array([1.0, 2.0])
    )[0]

    def want(x, p):
        mean = {"weights": jnp.array([1.0, 2.0]), "reduction": "mean"}
        soft = 4 * kljax.forward_kl(x, Y, temperature=2.0, **mean)
        return soft + 0.5 * kljax.cross_entropy(x, kind(p), **mean)

    assert_close(loss(X, soft), want(X, soft))
    for wrt in (0, 1):
        assert_close(jax.grad(loss, wrt)(X, soft), jax.grad(want, wrt)(X, soft))


def test_micro_batches_with_label_weights_add_up():
    """Each term has a global denominator of its own."""
    labels, label_weights = jnp.array([0, 1]), jnp.array([1.0, 3.0])
    options = {"hard_weight": 1.0, "temperature": 2.0}
    whole, _ = kljax.distillation_loss(X, Y, labels, label_weights=label_weights, **options)
    parts = [
        kljax.distillation_loss(
            *(z[n : n + 1] for z in (X, Y, labels)),
            label_weights=label_weights[n : n + 1],
            normalizer=2.0,
            label_normalizer=4.0,
            **options,
        )[0]
        for n in range(2)
    ]
    assert_close(sum(parts), whole)


@pytest.mark.parametrize("divergence", [kljax.reverse_kl, kljax.jeffreys, kljax.kl])
def test_a_rest_that_is_not_known_is_refused(divergence):
    student = LogProbs(jnp.log(jnp.array([[0.8, 0.1, 0.1]])))
    few = TopK(jnp.array([[0, 1]]), jnp.log(jnp.array([[0.9, 0.0999]])).astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="log_tail must be given .* got None.*store log_tail"):
        divergence(student, few)
    assert np.isfinite(kljax.forward_kl(student, few)).all()


def test_other_ways_to_be_infinite_at_zero_targets():
    few = TopK(jnp.array([[0, 1]] * 2), jnp.log(jnp.array([[0.9, 0.05]] * 2)))
    for f in (
        lambda: kljax.skew_reverse_kl(X, few, alpha=0.0),
        lambda: kljax.jensen_shannon(X, few, beta=1.0, normalized=True),
        lambda: kljax.divergence(lambda s, t: kljax.term_kl(s, t), needs_mass=True)(X, few),
        lambda: kljax.distillation_loss(X, few, divergence=kljax.reverse_kl),
    ):
        with pytest.raises(ValueError, match="store log_tail"):
            f()
    assert np.isfinite(kljax.skew_reverse_kl(X, few)).all()


@pytest.mark.parametrize(
    ("few", "message"),
    [
        (TopK(jnp.array([[0, 0]]), jnp.log(jnp.array([[0.3, 0.3]]))), "indices must be distinct"),
        (TopK(jnp.array([[0, 1]]), jnp.array([[0.5, 0.3]])), "more or less than 1 together"),
        (
            TopK(jnp.array([[0, 1]]), jnp.log(jnp.array([[0.5, 0.3]])), jnp.log(jnp.array([0.5]))),
            "more or less than 1 together",
        ),
    ],
)
def test_a_top_k_that_is_none_is_reported(few, message):
    assert message in report(lambda: kljax.forward_kl(jnp.zeros((1, 5)), few))


def test_a_top_k_read_back_from_numpy():
    few = kljax.top_k(Y, 2, temperature=2.0)
    file = io.BytesIO()
    np.savez(file, **{name: getattr(few, name) for name in few.__dataclass_fields__})
    file.seek(0)
    again = TopK(**np.load(file))
    assert again.tail == "bucket"
    assert_close(
        kljax.forward_kl(X, again, temperature=2.0), kljax.forward_kl(X, few, temperature=2.0)
    )


@pytest.mark.usefixtures("x64")
def test_close_probabilities():
    p, q = np.array([0.48066098564791515]), np.array([0.48066098564794774])
    got = kljax.kl_terms(Probs(p), Probs(q))
    np.testing.assert_allclose(got, -3.258504577274724e-14, rtol=1e-13)
    np.testing.assert_allclose(kljax.kl(Probs(p), Probs(q)), -3.258504577274724e-14, rtol=1e-13)


def test_a_metric_inside_a_differentiated_function():
    def step(v):
        return v.sum(), metrics.Divergence.empty().update(v, v > 0)

    state = jax.grad(step, has_aux=True)(jnp.array([1.0, 2.0]))[1]
    assert state.compute().mean == 1.5


def test_a_metric_of_the_host_outlives_grad():
    metric = torchmetrics.KLDivergence()
    p = jnp.array([[0.36, 0.48, 0.16]])
    jax.grad(lambda p: metric(p, jnp.ones((1, 3)) / 3))(p)
    assert_close(metric.compute(), 0.0852996)


@pytest.mark.slow
def test_no_nan_on_the_way_to_a_finite_result():
    """`jax_debug_nans` is quiet, compiled and operation by operation."""
    zeros = Probs(jnp.array([[0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]))
    infinite = jnp.array([[-jnp.inf, 1.0, 2.0], [0.0, -jnp.inf, 1.0]])
    calls = [
        lambda: kljax.cross_entropy(X[:1], jnp.array([0])),
        lambda: kljax.forward_kl(X, zeros),
        lambda: kljax.kl(zeros, zeros),
        lambda: kljax.forward_kl(infinite, infinite),
        lambda: kljax.forward_kl(X, Y, where=jnp.array([True, True, False])),
        lambda: kljax.jensen_shannon(infinite, X),
        lambda: kljax.distillation_loss(X, Y, jnp.array([0, 1]), hard_weight=0.5)[0],
        lambda: jax.grad(lambda x: kljax.forward_kl(x, zeros).sum())(X),
        lambda: jax.grad(lambda x: kljax.reverse_kl(x, Y).sum())(infinite),
        lambda: jax.grad(lambda x: kljax.cross_entropy(x, jnp.array([0, 1])).sum())(X),
        lambda: jax.grad(lambda x: kljax.mixture(x, X[0], 0.9).log_probs[0, 1])(infinite),
        *(
            partial(jax.grad(lambda *xs, of=of: kljax.kl(of(xs[0]), of(xs[1]))), p, q)
            for of, points in {
                families.Bernoulli: [(0.0, 0.0), (0.0, 0.5), (1.0, 1.0)],
                families.Poisson: [(0.0, 0.0), (0.0, 2.0)],
                lambda x: families.Bernoulli(logits=x): [(-jnp.inf, -jnp.inf), (jnp.inf, 0.0)],
                lambda x: families.VonMises(1.0, x): [(0.0, 0.0)],
                lambda x: families.Gamma(x, 1.0): [(20.0, 1.0)],
            }.items()
            for p, q in points
        ),
    ]
    with jax.debug_nans(True):
        for call in calls:
            assert np.isfinite(call()).all()
        with jax.disable_jit():
            for call in calls:
                assert np.isfinite(call()).all()


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_jensen_shannon_is_symmetric_to_the_last_bit(rng, temperature):
    a, b = (np.float32(rng.normal(size=(500, 40)) * 3) for _ in range(2))
    f = jax.jit(lambda a, b: kljax.jensen_shannon(a, b, temperature=temperature))
    np.testing.assert_array_equal(f(a, b), f(b, a))


def squared(log_s, log_t, *, scale=1.0):
    return scale * (jnp.exp(log_s) - jnp.exp(log_t)) ** 2


made = kljax.divergence(squared)


@kljax.divergence
def decorated(log_s, log_t):
    return jnp.exp(log_s) - jnp.exp(log_t)


def test_pickled_divergences():
    again = pickle.loads(pickle.dumps(made))
    assert_close(again(X, Y, scale=2.0), made(X, Y, scale=2.0))
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert pickle.loads(pickle.dumps(kljax.forward_kl)) is kljax.forward_kl


def test_a_divergence_s_parameters_are_keywords():
    assert_close(made(X, Y, scale=3.0), 3 * np.asarray(made(X, Y)))
    assert_close(jax.jit(jax.grad(lambda g: made(X, Y, scale=g).sum()))(2.0), made(X, Y).sum())
    loss, _ = kljax.distillation_loss(X, Y, divergence=partial(made, scale=3.0))
    assert_close(loss, 3 * made(X, Y).mean())


def test_any_divergence_in_a_distillation():
    """`kl` as written; `cross_entropy`, where a bare teacher is logits."""
    loss, _ = kljax.distillation_loss(X, Y, divergence=kljax.kl, temperature=2.0)
    assert_close(loss, 4 * kljax.kl(X, Y, temperature=2.0, reduction="mean"))
    loss, _ = kljax.distillation_loss(X, Y, divergence=kljax.cross_entropy)
    assert_close(loss, kljax.cross_entropy(X, Logits(Y), reduction="mean"))


def test_optax_with_integer_labels():
    import optax as real

    labels = jnp.array([2, 0])
    for f, args in (
        ("softmax_cross_entropy_with_integer_labels", (X, labels)),
        ("safe_softmax_cross_entropy", (X, jax.nn.softmax(Y))),
        ("generalized_kl_divergence", (jax.nn.log_softmax(X), jax.nn.softmax(Y))),
    ):
        assert_close(getattr(optax, f)(*args), getattr(real.losses, f)(*args))
    mask = jnp.array([[True, False, True]] * 2)
    got = optax.softmax_cross_entropy_with_integer_labels(X.T, labels, axis=0, where=mask.T)
    want = real.losses.softmax_cross_entropy_with_integer_labels(X.T, labels, axis=0, where=mask.T)
    assert_close(got, want)
    assert_close(
        optax.convex_kl_divergence(jax.nn.log_softmax(X), jax.nn.softmax(Y)),
        optax.generalized_kl_divergence(jax.nn.log_softmax(X), jax.nn.softmax(Y)),
    )


def test_nnx_metrics():
    """A pure dict of arrays goes out and in; equal metrics are one to jit; grad around it."""
    nnx = pytest.importorskip("flax.nnx")
    from kljax.metrics.nnx import Divergence

    metric = Divergence(kljax.reverse_kl, temperature=2.0)
    metric.update(predictions=X, targets=Y)
    pure = nnx.to_pure_dict(nnx.state(metric))
    pure = jax.tree.map(np.asarray, pure)
    again = Divergence(kljax.reverse_kl, temperature=2.0)
    state = nnx.state(again)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(again, state)
    assert_close(again.compute().mean, metric.compute().mean)

    traces = []

    @nnx.jit
    def step(metric, x):
        traces.append(None)
        metric.update(predictions=x, targets=Y)

    for _ in range(3):
        step(Divergence(kljax.reverse_kl, temperature=2.0), X)
    assert len(traces) == 1

    model = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def loss(model, metric):
        metric.update(predictions=model(X), targets=Y)
        return kljax.forward_kl(model(X), Y, reduction="mean")

    nnx.grad(loss)(model, metric)
    assert metric.compute().weight_sum == 4
    assert lax.stop_gradient(metric.compute().mean) > 0


@pytest.mark.slow(but=["implementation1-options0"])
@pytest.mark.parametrize("options", [{}, {"where": np.arange(7) != 2}, {"temperature": 2.0}])
@pytest.mark.parametrize("implementation", [None, kljax.Chunked(rows=2)])
def test_an_embedding_table_as_a_head(rng, options, implementation):
    """Transposed, it gives what the transposed one gives, and a gradient of its own shape."""
    hidden, table = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((5, 4), (7, 4)))
    bias, teacher = jnp.arange(7.0), jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)

    def loss(hidden, table, bias, transposed):
        kernel = table if transposed else table.T
        student = kljax.Head(hidden, kernel, bias, softcap=5.0, transposed=transposed)
        return kljax.forward_kl(
            student, teacher, reduction="mean", implementation=implementation, **options
        )

    got, want = (
        jax.value_and_grad(loss, (0, 1, 2))(hidden, table, bias, transposed)
        for transposed in (True, False)
    )
    assert got[1][1].shape == table.shape
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="kernel must have shape .*Say transposed=True"):
        kljax.entropy(kljax.Head(hidden, table))


def test_no_copy_of_an_embedding_table():
    hidden, table = jnp.ones((64, 32)), jnp.ones((4096, 32))
    loss = lambda h, e: kljax.forward_kl(  # noqa: E731
        kljax.Head(h, e, transposed=True),
        jnp.ones((64, 4096)),
        reduction="mean",
        implementation=kljax.Chunked(rows=8),
    )
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, table).compile().as_text()
    assert "= f32[32,4096]" not in text


def test_distributions_have_a_base():
    few = kljax.top_k(Y, 2)
    for side in (Logits(X), Probs(X), LogProbs(X), few, kljax.Head(X, jnp.eye(3))):
        assert isinstance(side, kljax.Distribution)


@pytest.mark.slow(but=["forward_kl-implementation1", "Head-None", "top_k-None"])
@pytest.mark.parametrize("implementation", [None, kljax.Chunked(rows=2)])
@pytest.mark.parametrize(
    "name", ["forward_kl", "jensen_shannon", "entropy", "Head", "top_k", "loss"]
)
def test_a_temperature_per_example(rng, name, implementation):
    """Value and every gradient are those of the examples one by one, with T² of its own."""
    x, y = (jnp.asarray(rng.normal(size=(5, 7)), jnp.float32) for _ in range(2))
    temperature = jnp.array([0.5, 1.0, 2.0, 3.0, 4.0])
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 3.0])

    def f(x, y, temperature, weights, implementation=None):
        options = {
            "temperature": temperature,
            "weights": weights,
            "reduction": "sum",
            "implementation": implementation,
        }
        if name == "loss":
            return kljax.distillation_loss(x, y, **options)[0]
        if name == "entropy":
            return kljax.entropy(x, **options)
        if name == "top_k":
            return kljax.forward_kl(x, kljax.top_k(y, 3, temperature=temperature), **options)
        if name == "Head":
            return kljax.reverse_kl(kljax.Head(x, jnp.eye(7)), y, **options)
        return getattr(kljax, name)(x, y, **options)

    wrt = (0, 1, 2) if name not in ("entropy", "loss") else (0, 2)
    got = jax.jit(jax.value_and_grad(lambda *a: f(*a, weights, implementation), wrt))(
        x, y, temperature
    )
    one = jax.jit(jax.value_and_grad(f, wrt))
    one_by_one = [one(x[n], y[n], temperature[n], weights[n]) for n in range(5)]
    assert_close(got[0], sum(value for value, _ in one_by_one))
    for i, gradient in enumerate(got[1]):
        assert_close(gradient, np.stack([gradients[i] for _, gradients in one_by_one]))


def test_a_temperature_per_example_of_a_shared_teacher(rng):
    """The one distribution becomes as many, and its gradient is their sum."""
    x, y = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((3, 7), (7,)))
    temperature = jnp.array([0.5, 1.0, 4.0])
    f = lambda x, y, t: kljax.forward_kl(x, y, temperature=t).sum()  # noqa: E731
    got = jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, y, temperature)
    want = jax.value_and_grad(lambda x, y, t: f(x, jnp.tile(y, (3, 1)), t), (0, 1, 2))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want(x, y, temperature)), strict=True):
        assert_close(a, b)


def test_metrics_at_a_top_k_s_own_temperatures():
    """NaN where an example's temperature is not 1, so in the mean; not at weight 0."""
    temperature = jnp.array([1.0, 2.0])
    few = kljax.top_k(Y, 2, temperature=temperature)
    seen = kljax.distillation_loss(X, few, temperature=temperature, weights=jnp.array([1.0, 0.0]))
    assert np.isfinite(seen[1].divergence)
    seen = kljax.distillation_loss(X, few, temperature=temperature)
    assert np.isnan(seen[1].divergence)


def test_a_temperature_of_another_shape():
    with pytest.raises(
        ValueError, match=r"temperature must be a scalar, or of the batch shape \(2,\)"
    ):
        kljax.forward_kl(X, Y, temperature=jnp.ones(3))
