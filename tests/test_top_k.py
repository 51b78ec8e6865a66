"""A teacher's best classes as targets: `TopK`."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest
from helpers import assert_close, named, report

import kljax

N, V, K = 6, 8, 3
WEIGHTS = np.array([1, 0.5, 0, 2, 1, 0.25], np.float32)
COTANGENT = np.linspace(-1, 2, N, dtype=np.float32)
PARAMS = {
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
}
BOUNDED = ["forward_kl", "reverse_kl", "jeffreys", "jensen_shannon"]  # by the full divergence
EVERY = [*BOUNDED, "skew_forward_kl", "skew_reverse_kl", "cross_entropy"]
TAILS = ["bucket", "renormalize", "renormalize_both", "truncate"]


def f32(x):
    return np.asarray(x, np.float32)


def logits(rng, *shape, scale=2.0):
    return f32(rng.normal(size=shape or (N, V)) * scale)


def best(rng, k=K, **options):
    """A teacher's logits and what the oracle keeps of them, in float32."""
    teacher = logits(rng)
    kept = oracle_large.top_k(teacher, k, **options)
    return teacher, {name: x if name == "indices" else f32(x) for name, x in kept.items()}


def padded(kept):
    """The same, but the last entry of two examples is padding, of an index that is in use."""
    kept = {name: x.copy() for name, x in kept.items()}
    dropped = kept["log_probs"][[1, 4], -1]
    kept["log_tail"][[1, 4]] = np.logaddexp(kept["log_tail"][[1, 4]], dropped)
    kept["log_probs"][[1, 4], -1] = -np.inf
    kept["indices"][[1, 4], -1] = kept["indices"][[1, 4], 0]
    return kept


# --- the four tails ---


@pytest.mark.slow(but=["bucket--0"])
@pytest.mark.parametrize(
    ("tail", "told", "names"),
    [
        ("bucket", True, EVERY),
        ("bucket", False, ["forward_kl", "jensen_shannon", "skew_reverse_kl"]),
        ("renormalize", True, ["forward_kl", "jensen_shannon", "skew_reverse_kl"]),
        ("renormalize_both", False, ["forward_kl", "reverse_kl", "jensen_shannon"]),
        ("truncate", True, ["forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_tail(rng, tail, told, names):
    """Values and gradients, the mass of the rest told or not, with padding, T and weights.

    Only a bucket reads what it is told.
    """
    _, kept = best(rng, temperature=2.0)
    kept = padded(kept)
    log_tail = kept["log_tail"] if told else None
    a = {"predictions": logits(rng), "log_probs": kept["log_probs"]}
    if tail == "bucket" and told:  # two leaves, and only together are they a distribution
        a.pop("log_probs")
    options = {"tail": tail, "temperature": 2.0}

    @jax.jit
    def step(a):
        def loss(a, name):
            x, log_probs = a["predictions"], a.get("log_probs", kept["log_probs"])
            targets = kljax.TopK(kept["indices"], log_probs, log_tail, **options)
            params = {"temperature": 2.0, "weights": WEIGHTS} | PARAMS.get(name, {})
            each = named(name)(x, targets, **params)
            return jnp.vdot(COTANGENT, each), each

        return {name: jax.grad(loss, has_aux=True)(a, name) for name in names}

    for name, (got, each) in step(a).items():

        def want(a, name=name):
            x, log_probs = a["predictions"], a.get("log_probs", kept["log_probs"])
            sides = x, kept["indices"], log_probs, log_tail
            each = oracle_large.top_k_divergence(name, *sides, **options, **PARAMS.get(name, {}))
            return oracle.reduce(each, WEIGHTS)

        assert each.dtype == jnp.float32
        assert_close(each, want(a))
        slopes = oracle_large.gradients(lambda a, want=want: want(a) @ COTANGENT, a)
        for side in a:
            assert_close(got[side], slopes[side])


def test_a_truncated_sum_may_be_negative():
    """s = (.6, .4), t = (.9, .1), k = 1: the bare sum is negative where the divergence is not."""
    predictions, targets = np.log([0.6, 0.4]), np.log([0.9, 0.1])
    truncated = kljax.TopK(np.array([0]), f32(targets[:1]), tail="truncate")
    bucket = kljax.TopK(np.array([0]), f32(targets[:1]), f32(targets[1]))
    assert_close(kljax.reverse_kl(f32(predictions), truncated), 0.6 * np.log(0.6 / 0.9))
    np.testing.assert_allclose(kljax.reverse_kl(f32(predictions), truncated), -0.243, atol=5e-4)
    np.testing.assert_allclose(kljax.reverse_kl(f32(predictions), f32(targets)), 0.311, atol=5e-4)
    # Of two classes the bucket holds one: nothing is lost.
    np.testing.assert_allclose(kljax.reverse_kl(f32(predictions), bucket), 0.311, atol=5e-4)


@pytest.mark.slow
def test_the_bucket_is_a_lower_bound(rng):
    """0 ≤ D with fewer classes ≤ D with more ≤ D of all classes, which k = V is."""
    x, y = logits(rng, 40, 12), logits(rng, 40, 12)
    ks = (1, 2, 5, 11, 12)

    @jax.jit
    def step(x, y):
        f = lambda name, k: named(name)(x, kljax.top_k(y, k))  # noqa: E731
        return {name: [f(name, k) for k in ks] for name in BOUNDED}

    for name, bounds in step(x, y).items():
        bounds = np.asarray(bounds)
        full = oracle.divergence(name, x, y)
        assert (bounds > -1e-6).all()
        assert (bounds[0] < full - 1e-3).any()
        np.testing.assert_array_less(bounds[:-1], bounds[1:] + 1e-5)
        np.testing.assert_array_less(bounds[-2], full + 1e-5)
        assert_close(bounds[-1], full)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_the_bucket_is_zero_at_equality(rng, temperature):
    """Of the same logits value and gradients are 0; of others with the same parts the value is."""
    y = logits(rng)
    others = y.copy()
    order = np.argsort(-y, axis=-1)
    rest = order[:, K:]
    np.put_along_axis(others, rest, np.take_along_axis(y, rest[:, ::-1], -1), -1)
    moved = y.copy()
    np.put_along_axis(moved, order[:, :1], y.max(-1, keepdims=True) + 0.1, -1)

    @jax.jit
    def step(x, y):
        def loss(x, y, name):
            targets = kljax.top_k(y, K, temperature=temperature)
            each = named(name)(x, targets, temperature=temperature)
            return jnp.sum(each), each

        return {name: jax.grad(loss, (0, 1), has_aux=True)(x, y, name) for name in BOUNDED}

    for gradients, each in step(y, y).values():
        for zero in (each, *gradients):
            np.testing.assert_allclose(zero, np.zeros_like(zero), rtol=0, atol=5e-7)
    for _, each in step(others, y).values():
        np.testing.assert_allclose(each, np.zeros(N), rtol=0, atol=5e-7)
    for _, each in step(moved, y).values():
        assert (each > 1e-5).all()


# --- the mass of the rest ---


def test_confident_sides(rng):
    """A rest of 1e-9 or less on either side keeps its digits: none is taken from 1 - Σ."""
    x, y = (
        z + 26 * np.eye(V, dtype=np.float32)[[0, 1, 2, 0, 1, 2]] for z in (logits(rng), logits(rng))
    )
    targets = kljax.top_k(y, 1)
    want = oracle_large.top_k(y, 1)
    assert want["log_tail"].max() < -15
    np.testing.assert_allclose(targets.log_tail, want["log_tail"], rtol=1e-5)
    np.testing.assert_allclose(targets.log_probs, want["log_probs"], atol=1e-6)
    for name in BOUNDED:
        got = named(name)(x, targets)
        assert_close(got, oracle_large.top_k_divergence(name, x, **want))


@pytest.mark.slow
def test_all_classes_leave_no_rest(rng):
    """k = V is the full divergence, also without log_tail, though a float32 sum is not quite 1."""
    x, y = logits(rng, 64, V), logits(rng, 64, V)
    kept = kljax.top_k(y, V)
    np.testing.assert_array_equal(kept.log_tail, np.full(64, -np.inf))
    untold = kljax.TopK(kept.indices, kept.log_probs)

    @jax.jit
    def step(x, name, targets):
        return jax.value_and_grad(lambda x: name(x, targets).sum())(x)

    step = jax.jit(step.__wrapped__, static_argnums=1)
    for name in ("forward_kl", "reverse_kl"):
        for targets in (kept, untold):
            assert_close(named(name)(x, targets), oracle.divergence(name, x, y))
            value, gradient = step(x, named(name), targets)
            assert_close(value, oracle.divergence(name, x, y).sum())
            assert_close(gradient, oracle.gradient(name, x, y))


def test_a_sum_that_rounding_left_above_one(rng):
    """Without log_tail such targets have no rest, and every derivative is finite."""
    x = logits(rng, 2, V)
    log_probs = np.array([[0.7, 0.3], [0.5, 0.5]]) * (1 + 5e-7)
    a = {"predictions": x, "log_probs": f32(np.log(log_probs))}
    indices = np.array([[2, 5], [0, 7]])
    assert (np.exp(a["log_probs"].astype(np.float64)).sum(-1) > 1).all()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(a):
        each = kljax.forward_kl(a["predictions"], kljax.TopK(indices, a["log_probs"]))
        return jnp.sum(each), each

    def want(a):
        return oracle_large.top_k_divergence(
            "forward_kl", a["predictions"], indices, a["log_probs"]
        )

    (_, each), got = step(a)
    assert_close(each, want(a))
    slopes = oracle_large.gradients(lambda a: want(a).sum(), a)
    assert_close(got["predictions"], slopes["predictions"])
    assert np.isfinite(got["log_probs"]).all()


def test_a_cache_of_16_bits(rng):
    """bfloat16 log-probabilities, as caches keep them, are widened; so are 8-bit indices."""
    _, kept = best(rng)
    x = logits(rng)
    narrow = {name: jnp.asarray(kept[name], jnp.bfloat16) for name in ("log_probs", "log_tail")}
    targets = kljax.TopK(kept["indices"].astype(np.uint8), *narrow.values())
    value, gradient = jax.value_and_grad(lambda x: kljax.cross_entropy(x, targets).sum())(x)
    sides = {"indices": kept["indices"], **{name: f32(z) for name, z in narrow.items()}}
    assert value.dtype == jnp.float32
    assert_close(value, oracle_large.top_k_divergence("cross_entropy", x, **sides).sum())
    want = oracle_large.gradients(
        lambda a: oracle_large.top_k_divergence("cross_entropy", a["x"], **sides).sum(), {"x": x}
    )
    assert_close(gradient, want["x"])


# --- options ---


@pytest.mark.slow
def test_predictions_of_every_kind(rng):
    """Heads, in blocks, log-probabilities and probabilities beside the best classes."""
    _, kept = best(rng)
    parts = {"hidden": f32(rng.normal(size=(N, 4))), "kernel": f32(rng.normal(size=(4, V)))}
    log_probs = oracle.log_probs(logits(rng))
    a = {**parts, "log_probs": f32(log_probs), "probs": f32(np.exp(log_probs))}
    build = {
        "head": lambda a: kljax.Head(a["hidden"], a["kernel"], softcap=3.0),
        "log_probs": lambda a: kljax.LogProbs(a["log_probs"]),
        "probs": lambda a: kljax.Probs(a["probs"]),
    }
    targets = kljax.TopK(**kept)

    @jax.jit
    def step(a):
        def loss(a, kind):
            blocks = kljax.Chunked(rows=4)
            each = kljax.jeffreys(build[kind](a), targets, weights=WEIGHTS, implementation=blocks)
            return jnp.vdot(COTANGENT, each), each

        return {kind: jax.grad(loss, has_aux=True)(a, kind) for kind in build}

    for kind, (got, each) in step(a).items():

        def want(a, kind=kind):
            side = {"hidden": a["hidden"], "kernel": a["kernel"], "softcap": 3.0}
            side, held = (side, "logits") if kind == "head" else (a[kind], kind)
            each = oracle_large.top_k_divergence("jeffreys", side, **kept, kind=held)
            return oracle.reduce(each, WEIGHTS)

        assert_close(each, want(a))
        read = {name: a[name] for name in (parts if kind == "head" else [kind])}
        slopes = oracle_large.gradients(lambda x, want=want: want(a | x) @ COTANGENT, read)
        for name in read:
            assert_close(got[name], slopes[name])


def test_blocks_shapes_and_masks(rng):
    """Blocks of any size, a batch of two axes or shared, classes that do not exist."""
    teacher, kept = best(rng)
    x, targets = logits(rng), kljax.TopK(**kept)
    where = np.ones((N, V), bool)
    np.put_along_axis(where, np.argsort(-teacher, axis=-1)[:, -2:], values=False, axis=-1)
    fold = lambda z: jnp.asarray(z).reshape(2, 3, *z.shape[1:])  # noqa: E731

    @jax.jit
    def step(x, targets):
        f = kljax.reverse_kl
        one = jax.tree.map(lambda z: z[0], targets)
        choices = (None, "dense", "chunked", kljax.Chunked(rows=4))
        return {
            "blocks": [f(x, targets, implementation=choice) for choice in choices],
            "two axes": f(fold(x), jax.tree.map(fold, targets)),
            "shared targets": f(x, one),
            "shared predictions": f(x[0], targets),
            "where": f(x, targets, where=where),
        }

    got = step(x, targets)
    want = partial(oracle_large.top_k_divergence, "reverse_kl")
    one = {name: z[0] for name, z in kept.items()}
    for each in (*got["blocks"], got["two axes"].reshape(N)):
        assert_close(each, want(x, **kept))
    assert_close(got["shared targets"], want(x, **one))
    assert_close(got["shared predictions"], want(x[0], **kept))
    assert_close(got["where"], want(x, **kept, where=where))


def test_a_bad_example_of_weight_zero_has_no_effect(rng):
    """NaN in predictions, log-probabilities or rest of such an example reaches nothing."""
    _, kept = best(rng)
    a = {"x": logits(rng), "log_probs": kept["log_probs"], "log_tail": kept["log_tail"]}
    bad = {name: z.copy() for name, z in a.items()}
    for z in bad.values():
        z[WEIGHTS == 0] = np.nan

    @jax.jit
    @jax.value_and_grad
    def step(a):
        targets = kljax.TopK(kept["indices"], a["log_probs"], a["log_tail"])
        return kljax.forward_kl(a["x"], targets, weights=WEIGHTS, reduction="mean")

    def want(a):
        each = oracle_large.top_k_divergence("forward_kl", a["x"], **kept)
        return oracle.reduce(each, WEIGHTS, "mean")

    value, got = step(bad)
    assert_close(value, want(a))
    assert_close(got["x"], oracle_large.gradients(want, {"x": a["x"]})["x"])
    for gradient in got.values():
        assert (np.asarray(gradient)[WEIGHTS == 0] == 0).all()
        assert np.isfinite(gradient).all()


def test_temperature_is_that_of_the_targets(rng):
    """It applies to the predictions alone, and its derivative is theirs."""
    _, kept = best(rng, temperature=2.0)
    x, targets = logits(rng), kljax.TopK(**kept, temperature=2.0)

    def loss(t):
        return kljax.forward_kl(x, targets, temperature=t, reduction="sum")

    def want(t):
        return oracle_large.top_k_divergence("forward_kl", x, **kept, temperature=t).sum()

    value, slope = jax.jit(jax.value_and_grad(loss))(2.0)
    assert_close(value, want(2.0))
    assert_close(slope, oracle.derivative(want, 2.0))
    # The temperature that the targets carry may be traced as well.
    passed = jax.jit(lambda targets: kljax.forward_kl(x, targets, temperature=2.0).sum())
    assert_close(passed(targets), want(2.0))


# --- memory ---


@pytest.mark.usefixtures("optimized")
def test_temporary_memory_beside_logits():
    """A top-k teacher costs no more than a whole one: below 0.15 of the predictions."""
    x = jax.ShapeDtypeStruct((1024, 8192), np.float32)
    indices, log_probs = (jax.ShapeDtypeStruct((1024, 16), d) for d in (np.int32, np.float32))

    def loss(x, indices, log_probs):
        return kljax.forward_kl(x, kljax.TopK(indices, log_probs), reduction="mean")

    compiled = jax.jit(jax.grad(loss)).lower(x, indices, log_probs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * 4 * 1024 * 8192


# --- transforms ---


def test_a_pytree_under_transforms(rng):
    """Through jit, vmap, scan, grad and tree.map, with its static tail."""
    _, kept = best(rng)
    x, targets = logits(rng), kljax.TopK(**kept, tail="truncate")
    want = oracle_large.top_k_divergence("forward_kl", x, **kept, tail="truncate")
    step = lambda total, one: (total + kljax.forward_kl(*one), None)  # noqa: E731
    assert_close(jax.jit(kljax.forward_kl)(x, targets), want)
    assert_close(jax.vmap(kljax.forward_kl)(x, targets), want)
    assert_close(jax.lax.scan(step, jnp.zeros(()), (x, targets))[0], want.sum())
    assert_close(jax.checkpoint(kljax.forward_kl)(x, targets), want)
    moved = jax.tree.map(lambda z: z[1:], targets)
    assert isinstance(moved, kljax.TopK)
    assert moved.tail == "truncate"
    assert_close(kljax.forward_kl(x[1:], moved), want[1:])
    tails = {jax.tree.structure(kljax.TopK(**kept, tail=tail)) for tail in TAILS}
    assert len(tails) == 4, "a trace of one tail must never serve another"
    gradient = jax.grad(
        lambda targets: kljax.forward_kl(x, targets, reduction="sum"), allow_int=True
    )(targets)
    assert isinstance(gradient, kljax.TopK)
    assert gradient.indices.dtype == jax.dtypes.float0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_forward_mode_and_second_order(rng):
    """jvp is the oracle's tangent; the Hessian that of the plain formula."""
    kept = oracle_large.top_k(rng.normal(size=(N, V)), K)
    a = {"x": rng.normal(size=(N, V)), "log_probs": kept["log_probs"]}
    along = {name: rng.normal(size=z.shape) for name, z in a.items()}

    def loss(a, name="jensen_shannon"):
        return named(name)(a["x"], kljax.TopK(kept["indices"], a["log_probs"]))

    def want(a):
        sides = a["x"], kept["indices"], a["log_probs"]
        return oracle_large.top_k_divergence("jensen_shannon", *sides)

    def plain(x):
        """Forward KL of the first example, but for a constant."""
        log_s = jax.nn.log_softmax(x)
        on_best = np.isin(np.arange(V), kept["indices"][0])
        rest = jax.nn.logsumexp(jnp.where(on_best, -jnp.inf, log_s))
        return -(jnp.exp(kept["log_probs"][0]) @ log_s[kept["indices"][0]]) - (
            np.exp(kept["log_tail"][0]) * rest
        )

    one = {name: z[:1] for name, z in a.items()}

    def first(x):
        targets = kljax.TopK(kept["indices"][0], one["log_probs"][0])
        return kljax.forward_kl(x, targets)

    assert_close(
        jax.jit(lambda a, d: jax.jvp(loss, (a,), (d,))[1])(a, along),
        oracle_large.tangent(want, a, along),
        np.float64,
    )
    got, second = (jax.jit(jax.hessian(f))(a["x"][0]) for f in (first, plain))
    np.testing.assert_allclose(got, second, rtol=1e-10, atol=1e-11)


# --- distillation ---


@pytest.mark.slow
def test_distillation_loss(rng):
    """Cached targets and labels: loss and gradient; the metrics that the cache can tell."""
    labels, options = np.arange(N) % V, {"soft_weight": 0.7, "hard_weight": 0.4, "weights": WEIGHTS}
    x = logits(rng)
    for temperature in (None, 2.0):
        _, kept = best(rng, temperature=temperature)

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def step(x, temperature=temperature, kept=kept):
            targets = kljax.TopK(**kept, temperature=temperature)
            return kljax.distillation_loss(x, targets, labels, temperature=temperature, **options)

        def terms(x, temperature=temperature, kept=kept):
            soft = oracle_large.top_k_divergence("forward_kl", x, **kept, temperature=temperature)
            hard = oracle.divergence("cross_entropy", x, labels, kinds=("logits", "labels"))
            return [oracle.reduce(each, WEIGHTS, "mean") for each in (soft, hard)]

        def want(a, temperature=temperature, terms=terms):
            soft, hard = terms(a["x"])
            return 0.7 * (temperature or 1.0) ** 2 * soft + 0.4 * hard

        (loss, metrics), got = step(x)
        assert_close(loss, want({"x": x}))
        assert_close(got, oracle_large.gradients(want, {"x": x})["x"])
        assert_close([metrics.soft, metrics.hard], terms(x))
        same = x.argmax(-1) == kept["indices"][:, 0]
        assert_close(metrics.agreement, oracle.reduce(same, WEIGHTS, "mean"))
        few = np.concatenate([kept["log_probs"], kept["log_tail"][:, None]], -1)
        entropy = oracle.reduce(oracle.entropy(few), WEIGHTS, "mean")
        at_one = [metrics.divergence, metrics.teacher_entropy]
        # A cache of another temperature cannot tell what it is at 1.
        assert_close(at_one, [terms(x)[0], entropy] if temperature is None else [np.nan] * 2)


# --- what does not fit ---

X = np.linspace(0, 1, N * V, dtype=np.float32).reshape(N, V)
INDICES = np.tile(np.arange(K), (N, 1))
LOG_PROBS = np.full((N, K), -1.5, np.float32)


def targets_of(indices=INDICES, log_probs=LOG_PROBS, *more, **options):
    return kljax.TopK(indices, log_probs, *more, **options)


ERRORS = {
    "reverse": (
        lambda: kljax.reverse_kl(X, targets_of(tail="renormalize")),
        r"reverse_kl: .*renormalize.*bucket",
    ),
    "jeffreys": (
        lambda: kljax.jeffreys(X, targets_of(tail="renormalize")),
        r"jeffreys: .*renormalize.*bucket",
    ),
    "tail": (
        lambda: kljax.forward_kl(X, targets_of(tail="drop")),
        r'tail must be one of "bucket", "renormalize", "renormalize_both", "truncate".*drop',
    ),
    "log_probs": (
        lambda: kljax.forward_kl(X, targets_of(INDICES, LOG_PROBS[:, :2])),
        r"forward_kl: .*log_probs.*\(6, 3\).*got \(6, 2\)",
    ),
    "log_tail": (
        lambda: kljax.forward_kl(X, targets_of(INDICES, LOG_PROBS, LOG_PROBS)),
        r"forward_kl: .*log_tail.*\(6,\).*got \(6, 3\)",
    ),
    "batch": (
        lambda: kljax.forward_kl(X[:5], targets_of()),
        r"forward_kl: targets.*\(5,.*got \(6,",
    ),
    "broadcast": (
        lambda: kljax.forward_kl(X, targets_of(INDICES[:1], LOG_PROBS[:1])),
        r"forward_kl: targets.*\(6,.*got \(1,",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_message(case):
    """Function, argument, what it should be, what it is."""
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_predictions_are_never_best_classes():
    """Nothing is known of a prediction's other classes."""
    with pytest.raises((TypeError, ValueError), match="forward_kl: predictions.*TopK"):
        kljax.forward_kl(targets_of(), X)
    with pytest.raises((TypeError, ValueError), match="entropy: p.*TopK"):
        kljax.entropy(targets_of())
    with pytest.raises(TypeError, match="indices.*integers.*float32"):
        kljax.forward_kl(X, targets_of(LOG_PROBS))


@pytest.mark.parametrize(("own", "given"), [(2.0, 3.0), (2.0, None), (None, 3.0)])
def test_another_temperature_raises(own, given):
    """Both are named, and what to do: a cache cannot be retempered."""
    with pytest.raises(ValueError, match="forward_kl: .*temperature") as raised:
        kljax.forward_kl(X, targets_of(temperature=own), temperature=given)
    for part in (own or 1.0, given, "top_k"):  # none is a temperature of 1
        assert str(part) in str(raised.value)


@pytest.mark.slow
def test_values_are_checked():
    """Indices out of range, another traced temperature; what is right is not reported."""
    f = kljax.forward_kl
    kept = kljax.top_k(X, K)
    assert report(jax.jit(f), X, kept) is None
    for wrong in (V, -1):
        indices = kept.indices.at[1, 1].set(wrong)
        targets = targets_of(indices, kept.log_probs, kept.log_tail)
        assert "indices" in report(jax.jit(f), X, targets)
        got = f(X, targets)
        np.testing.assert_array_equal(np.isnan(got), np.arange(N) == 1)  # never another class
    tempered = kljax.top_k(X, K, temperature=2.0)
    at = lambda t: f(X, tempered, temperature=t)  # noqa: E731
    assert report(jax.jit(at), 2.0) is None
    message = report(jax.jit(at), 3.0)
    assert "temperature" in message
    assert "3.0" in message
    assert "2.0" in message


# --- masked classes and examples without any ---


@pytest.mark.slow(but=["bucket"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both"])
def test_masked_classes_do_not_exist_for_either_side(rng, tail):
    """With all classes kept the loss under a mask is that of the teacher's logits."""
    x, y = logits(rng), jnp.asarray(logits(rng))
    where = rng.uniform(size=(N, V)) > 0.4
    every = dataclasses.replace(kljax.top_k(y, V), tail=tail)

    def step(targets):
        f = lambda x: kljax.forward_kl(x, targets, where=where)  # noqa: E731
        return f(x), jax.grad(lambda x: f(x).sum())(x)

    for got, want in zip(step(every), step(y), strict=True):
        assert_close(got, np.asarray(want, np.float64))


def test_a_masked_best_class_leaves_the_rest(rng):
    """The same whether the cache knows the mass of the rest, or it is what K lacks from 1."""
    x = jnp.array([3.0, 2.0, 1.0, 0.0, -1.0])
    where, kept = jnp.arange(5) > 0, kljax.top_k(x, 2)
    told, untold = (
        kljax.forward_kl(jnp.zeros(5), dataclasses.replace(kept, log_tail=tail), where=where)
        for tail in (kept.log_tail, None)
    )
    p = np.exp(np.float64(x))[1:] / np.exp(np.float64(x))[1:].sum()
    two = np.array([p[0], p[1:].sum()])
    assert_close(told, two @ np.log(two / [0.25, 0.75]))
    assert_close(untold, np.float64(told))


@pytest.mark.slow
def test_nothing_left_of_the_teacher_is_zero(rng):
    """Though the predictions have classes left."""
    x, where = jnp.asarray(logits(rng)), np.arange(V) > 0
    kept = kljax.TopK(np.zeros((N, 1), int), np.zeros((N, 1), np.float32), tail="renormalize")
    f = lambda x: kljax.forward_kl(x, kept, where=where)  # noqa: E731
    assert (f(x) == 0).all()
    assert (jax.grad(lambda x: f(x).sum())(x) == 0).all()
    _, metrics = kljax.distillation_loss(x, kljax.top_k(x, 2), where=np.zeros((N, V), bool))
    assert metrics.soft == metrics.teacher_entropy == 0


@pytest.mark.slow
def test_one_top_k_for_all_beside_a_mask_of_each(rng):
    """A shared teacher, with its metrics, under a mask that differs from example to example."""
    x, y = jnp.asarray(logits(rng)), jnp.asarray(logits(rng, V))
    where = rng.uniform(size=(N, V)) > 0.3
    one = kljax.top_k(y, 3)
    each = jax.tree.map(lambda z: jnp.broadcast_to(z, (N, *z.shape)), one)
    got, want = (kljax.distillation_loss(x, teacher, where=where) for teacher in (one, each))
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want))


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "renormalize_both", "truncate"])
def test_an_example_without_classes_is_zero(rng, tail):
    """Every class masked: value and gradient 0, beside examples that are computed as ever."""
    x, teacher = logits(rng), kljax.top_k(jnp.asarray(logits(rng)), 3)
    teacher = dataclasses.replace(teacher, tail=tail)
    where = np.ones(x.shape, bool)
    where[1] = False

    def loss(x):
        each = kljax.forward_kl(x, teacher, where=where)
        return each.sum(), each

    (gradient, each) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert each[1] == 0
    assert (gradient[1] == 0).all()
    assert np.isfinite(each).all()
    assert np.isfinite(gradient).all()


def test_the_mask_leaves_only_the_best():
    """Nothing is left for the rest, whatever the cache says of it."""
    x = jnp.array([[3.0, 2.0, 1.0, 0.0, -1.0]])
    where = jnp.array([True, True, False, False, False])
    teacher = kljax.top_k(jnp.where(where, x, -jnp.inf), 2)
    assert_close(kljax.forward_kl(x, teacher, where=where), [0.0])
    assert np.isfinite(kljax.forward_kl(x, kljax.top_k(x, 2), where=where)).all()


def test_an_index_out_of_range_beside_a_mask_is_nan():
    """It does not wrap around to a masked class, to vanish with it."""
    log_probs = jnp.log(jnp.array([0.5, 0.3]))
    where = jnp.array([True, True, True, False])
    for index in (-1, 4):
        targets = kljax.TopK(jnp.array([0, index]), log_probs)
        assert np.isnan(kljax.forward_kl(jnp.zeros(4), targets, where=where))


def test_metrics_of_distillation_from_the_best():
    """Agreement is that of classes that exist; what is of T = 1 is NaN at another temperature."""
    x, where = jnp.array([[3.0, 2.0, 1.0, 0.0]]), jnp.array([False, True, True, True])
    _, metrics = kljax.distillation_loss(x, kljax.top_k(x, 2), where=where)
    assert metrics.agreement == 1
    _, warm = kljax.distillation_loss(x, kljax.top_k(x, 2, temperature=2.0), temperature=2.0)
    assert np.isnan(warm.divergence)
    assert np.isnan(warm.teacher_entropy)
    assert np.isfinite(warm.soft)
    _, plain = kljax.distillation_loss(x, kljax.top_k(x, 4))
    assert_close(plain.teacher_entropy, kljax.entropy(x)[0])


def test_a_divergence_of_one_s_own_of_a_tempered_top_k(rng):
    """Its metric at T = 1 is NaN, as with the library's own."""
    x, kept = jnp.asarray(logits(rng)), kljax.top_k(jnp.asarray(logits(rng)), 3, temperature=2.0)

    @kljax.divergence
    def both(s, t):
        return (kljax.term_kl(s, t) + kljax.term_kl(t, s)) / 2

    loss, metrics = kljax.distillation_loss(x, kept, divergence=both, temperature=2.0)
    assert_close(loss, np.float64(4 * both(x, kept, temperature=2.0, reduction="mean")))
    assert np.isnan(metrics.divergence)


def test_agreement_of_8_bit_logits():
    """They have no -inf: a masked class is not the best for it."""
    x = jnp.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]], jnp.float8_e4m3fn)
    where = jnp.array([False, True, True])
    _, metrics = kljax.distillation_loss(x, x[::-1], where=where)
    assert metrics.agreement == 0


def test_a_temperature_that_is_a_number_is_not_mapped(rng):
    """Under vmap and lax.map the arrays of a top-k are cut, its temperature is not."""
    x = jnp.asarray(logits(rng))
    teacher = kljax.top_k(x[:, ::-1], 3, temperature=2.0)
    want = kljax.forward_kl(x, teacher, temperature=2.0)
    one = lambda x, teacher: kljax.forward_kl(x, teacher, temperature=2.0)  # noqa: E731
    assert_close(jax.vmap(one)(x, teacher), want)
    assert_close(jax.lax.map(lambda pair: one(*pair), (x, teacher)), want)
