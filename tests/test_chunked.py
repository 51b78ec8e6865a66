"""Block by block: what the whole arrays at once give, in less memory, on one device or many."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest
from helpers import assert_close, named
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kljax

N, V = 13, 5  # no number of rows but 1 and 13 divides the batch
WEIGHTS = np.array([1, 0.5, 2, 0, 1, 3, 0, 1, 1, 0.25, 2, 0, 1], np.float32)
COTANGENT = np.linspace(-1, 2, N, dtype=np.float32)
HOLD = {"logits": kljax.Logits, "probs": kljax.Probs, "log_probs": kljax.LogProbs}
SHARE = {
    "jensen_shannon": ("beta", 0.3),
    "skew_forward_kl": ("alpha", 0.2),
    "skew_reverse_kl": ("alpha", 0.2),
}
NAMES = [name for name in (*oracle_large.DIVERGENCES, "entropy") if name != "kl"]


def blocks(rows=4):
    return kljax.Chunked(rows=rows)


def compute(name):
    """The library's divergence of that name, or the one made here."""
    if name == "squared_hellinger":
        return kljax.divergence(lambda s, t: 0.5 * (jnp.exp(s / 2) - jnp.exp(t / 2)) ** 2)
    return named(name)


def side(rng, kind="logits", shape=(N, V), axis=-1):
    """One distribution per example, held in that way."""
    x = oracle.log_probs(rng.normal(size=shape) * 2, axis=axis)
    return {"logits": x + 1, "log_probs": x, "probs": np.exp(x)}[kind].astype(np.float32)


# --- value and gradient ---


@pytest.mark.slow(but=["forward_kl"])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence(rng, name):
    """Mask, traced temperature and share, weights over NaN, an uneven cotangent: as the oracle."""
    a = {"s": side(rng), "t": side(rng), "temperature": np.float32(1.3)}
    if name == "entropy":
        a.pop("t")
    if name in SHARE:
        a[SHARE[name][0]] = np.float32(SHARE[name][1])
    a["s"][WEIGHTS == 0] = np.nan
    where = rng.uniform(size=(N, V)) > 0.3
    where[:, :2] = True

    def split(a):
        sides = [a[key] for key in ("s", "t") if key in a]
        return sides, {"where": where} | {key: x for key, x in a.items() if key not in ("s", "t")}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(a):
        sides, options = split(a)
        each = compute(name)(*sides, **options, weights=WEIGHTS, implementation=blocks())
        return jnp.vdot(COTANGENT, each), each

    def want(a):
        sides, options = split(a)
        return oracle.reduce(oracle_large.divergence(name, *sides, **options), WEIGHTS)

    (_, each), got = step(a)
    slopes = oracle_large.gradients(lambda a: want(a) @ COTANGENT, a)
    assert_close(each, want(a))
    for key in a:
        assert np.isfinite(slopes[key]).all()
        assert_close(got[key], slopes[key])


LAYOUTS = {
    "classes first": {"shape": (V, N), "axis": 0},
    "classes in the middle": {"shape": (3, V, 2), "axis": 1, "rows": 4},
    "two class axes": {"shape": (3, 13, 2), "axis": (0, 2)},
    "two batch axes": {"shape": (3, 7, V), "where": (V,)},
    "a mask of its own for each": {"shape": (N, V), "where": (N, V)},
    "one row at a time": {"shape": (N, V), "rows": 1},
    "more rows than there are": {"shape": (N, V), "rows": 1000},
    "no batch": {"shape": (V,)},
    "no examples": {"shape": (0, V)},
    "probabilities": {"shape": (N, V), "kinds": ("probs", "log_probs")},
    "log-probabilities": {"shape": (V, N), "axis": 0, "kinds": ("log_probs", "probs")},
    "of a temperature": {"shape": (N, V), "kinds": ("log_probs", "probs"), "temperature": 2.0},
    "shared predictions": {"shape": (N, V), "shared": 0},
    "shared targets": {"shape": (N, V), "shared": 1, "kinds": ("log_probs", "logits")},
}


@pytest.mark.slow(but=["classes in the middle", "two batch axes", "probabilities"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout(rng, case):
    """Axes, kinds and shared sides; value and gradients to both are the oracle's."""
    layout = LAYOUTS[case]
    shape, axis, kinds = (
        layout["shape"],
        layout.get("axis", -1),
        layout.get("kinds", ("logits",) * 2),
    )
    sides = [side(rng, kind, shape, axis) for kind in kinds]
    if "shared" in layout:
        sides[layout["shared"]] = sides[layout["shared"]][0]
    where = None
    if "where" in layout:
        where = rng.uniform(size=layout["where"]) > 0.4
        where[..., :2] = True
    options = {"axis": axis, "where": where, "temperature": layout.get("temperature")}

    @jax.jit
    def step(*sides):
        def loss(*sides):
            held = (HOLD[kind](x) for kind, x in zip(kinds, sides, strict=True))
            each = kljax.jeffreys(*held, **options, implementation=blocks(layout.get("rows", 4)))
            return jnp.vdot(jnp.cos(jnp.arange(each.size)), each.ravel()), each

        return jax.grad(loss, (0, 1), has_aux=True)(*sides)

    got, each = step(*sides)
    assert_close(each, oracle.divergence("jeffreys", *sides, kinds=kinds, **options))
    weights = np.cos(np.arange(each.size)).reshape(each.shape)
    for wrt in range(2):
        slope = oracle.gradient("jeffreys", *sides, wrt, kinds=kinds, weights=weights, **options)
        assert_close(got[wrt], slope)


def test_labels(rng):
    """Labels of any block, one of weight 0 out of range; soft labels with zeros beside them."""
    x, labels = side(rng), np.arange(N) % V
    labels[WEIGHTS == 0] = -100
    soft = kljax.Probs(jax.nn.one_hot(np.arange(N) % V, V))
    options = {"weights": WEIGHTS, "reduction": "mean", "temperature": 2.0}

    @jax.jit
    def step(x):
        def loss(x, targets):
            return kljax.cross_entropy(x, targets, **options, implementation=blocks())

        return [jax.value_and_grad(loss)(x, targets) for targets in (labels, soft)]

    kinds = ("logits", "labels")
    each = oracle.divergence("cross_entropy", x, labels, kinds=kinds, temperature=2.0)
    slope = oracle.gradient(
        "cross_entropy", x, labels, kinds=kinds, temperature=2.0, weights=WEIGHTS
    )
    for value, gradient in step(x):
        assert_close(value, oracle.reduce(each, WEIGHTS, "mean"))
        assert_close(gradient, slope / WEIGHTS.sum())


@pytest.mark.slow
def test_reductions_and_what_follows_them(rng):
    """Every reduction, and a loss that is scaled or averaged afterwards."""
    x, y = side(rng), side(rng)
    losses = {
        "mean": lambda f: f(reduction="mean"),
        "sum": lambda f: f(reduction="sum"),
        "batchmean": lambda f: f(reduction="batchmean"),
        "half": lambda f: 0.5 * f(reduction="mean"),
        "none": lambda f: jnp.mean(f(reduction="none")),
        "normalizer": lambda f: f(reduction="mean", normalizer=7.0),
    }

    @jax.jit
    def step(x, y):
        def loss(x, y, w, name):
            f = partial(kljax.reverse_kl, x, y, weights=w, implementation=blocks())
            return losses[name](f)

        of = lambda name: jax.value_and_grad(loss, (0, 1, 2))(x, y, WEIGHTS, name)  # noqa: E731
        return {name: of(name) for name in losses}

    each = oracle.divergence("reverse_kl", x, y)
    slopes = [oracle.gradient("reverse_kl", x, y, wrt, weights=WEIGHTS) for wrt in range(2)]
    total = WEIGHTS.sum(dtype=np.float64)
    factors = {"sum": 1, "half": 0.5 / total, "normalizer": 1 / 7, "mean": 1 / total}
    for name, (value, (to_x, to_y, to_w)) in step(x, y).items():
        factor = factors.get(name, 1 / N)
        assert_close(value, factor * (WEIGHTS @ each))
        assert_close(to_x, factor * slopes[0])
        assert_close(to_y, factor * slopes[1])
        mean = WEIGHTS @ each / total if name in ("mean", "half") else 0
        assert_close(to_w, factor * (each - mean))


def test_bad_values_stay_in_their_rows(rng):
    """NaN and infinite divergences of one row reach no other of its block, nor the gradient."""
    x, y = side(rng), side(rng)
    y[2], x[6, 1], x[7, 3], y[7, 3] = np.nan, -np.inf, -np.inf, -np.inf

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def step(x):
        each = kljax.forward_kl(x, y, implementation=blocks())
        return jnp.sum(each), each

    gradient, each = step(x)
    assert_close(each, oracle.divergence("forward_kl", x, y))
    assert_close(gradient, oracle.gradient("forward_kl", x, y))
    np.testing.assert_array_equal(np.isnan(each), np.arange(N) == 2)
    np.testing.assert_array_equal(np.isinf(each), np.arange(N) == 6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_inputs(rng, dtype):
    """Their value to float32 accuracy, gradients in their own dtype; dtypes may differ."""
    x, y = jnp.asarray(side(rng), dtype), side(rng)

    @jax.jit
    def step(x, y):
        f = partial(kljax.forward_kl, reduction="mean", implementation=blocks())
        return jax.value_and_grad(f, (0, 1))(x, y)

    value, gradients = step(x, y)
    sides = np.asarray(x, np.float64), y
    assert value.dtype == jnp.float32
    assert_close(value, oracle.divergence("forward_kl", *sides).mean())
    for wrt, own in enumerate((dtype, np.float32)):
        assert gradients[wrt].dtype == own
        slope = oracle.gradient("forward_kl", *sides, wrt) / N
        assert_close(gradients[wrt], slope, own)


def test_a_loss_scale_keeps_small_gradients(rng):
    """float16 ends at 6e-8: the scale must reach a gradient before it is rounded."""
    x, y = (jnp.asarray(side(rng), jnp.float16) for _ in range(2))
    scale, weights = 2.0**20, np.full(N, 1e-8, np.float32)

    @jax.jit
    @jax.grad
    def scaled(x):
        options = {"weights": weights, "reduction": "sum", "implementation": blocks()}
        return scale * kljax.forward_kl(x, y, **options)

    sides = [np.asarray(z, np.float64) for z in (x, y)]
    want = scale * 1e-8 * oracle.gradient("forward_kl", *sides)
    assert_close(scaled(x), want, np.float16)
    assert (np.asarray(want / scale, np.float16) == 0).all(), "without a scale all are zeros"


# --- every mode ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.usefixtures("x64")
def test_forward_mode_and_second_order(rng, name):
    """jvp is the oracle's tangent; jvp of grad that of the whole arrays at once."""
    a = {"s": rng.normal(size=(7, V)), "t": rng.normal(size=(7, V)), "temperature": np.float64(1.3)}
    if name in SHARE:
        a["beta"] = np.float64(0.3)
    along = {key: rng.normal(size=x.shape) for key, x in a.items()}
    weights = WEIGHTS[:7].astype(np.float64)

    def each(a, compute=None, **options):
        compute = compute or partial(named(name), weights=weights, **options)
        return compute(a["s"], a["t"], **{key: a[key] for key in a if key not in ("s", "t")})

    @partial(jax.jit, static_argnums=2)
    def orders(a, along, implementation):
        f = partial(each, implementation=implementation)
        total = lambda a: jnp.vdot(jnp.cos(jnp.arange(7.0)), f(a))  # noqa: E731
        return jax.jvp(f, (a,), (along,)), jax.jvp(jax.grad(total), (a,), (along,))

    (value, tangent), second = orders(a, along, blocks(3))
    want = lambda a: oracle.reduce(each(a, partial(oracle.divergence, name)), weights)  # noqa: E731
    assert_close(value, want(a), np.float64)
    assert_close(tangent, oracle_large.tangent(want, a, along), np.float64)
    dense = orders(a, along, "dense")[1]
    for x, y in zip(jax.tree.leaves(second), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


def test_a_term_with_params_and_captured_values(rng):
    """Traced values that a term takes or captures get their gradients, summed over the blocks."""
    x, y = side(rng), side(rng)
    a = {"power": np.float32(0.7), "classes": np.linspace(1, 2, V, dtype=np.float32)}

    @jax.jit
    @jax.value_and_grad
    def step(a):
        def term(s, t, *, power):
            return a["classes"][None] * jnp.exp(power * s) * (s - t)

        f = kljax.divergence(term)
        return jnp.vdot(COTANGENT, f(x, y, power=a["power"], implementation=blocks()))

    def want(a):
        s, t = oracle.log_probs(x), oracle.log_probs(y)
        return (a["classes"] * np.exp(a["power"] * s) * (s - t)).sum(-1) @ COTANGENT

    value, got = step(a)
    slopes = oracle_large.gradients(want, a)
    assert_close(value, want(a))
    for name in a:
        assert_close(got[name], slopes[name])


def test_a_term_that_captures_one_value_per_example(rng):
    """Without a named implementation any batch goes at once, also within distillation_loss."""
    x = jnp.zeros((256, 4096))
    y = x.at[:, 0].set(1.0)
    each = jnp.linspace(0, 1, 256)[:, None]
    mine = kljax.divergence(lambda s, t: each * kljax.term_kl(t, s))
    want = jnp.mean(each[:, 0] * kljax.forward_kl(x, y))
    assert_close(mine(x, y, reduction="mean"), want)
    assert_close(kljax.distillation_loss(x, y, divergence=mine)[0], want)


@pytest.mark.slow
def test_transforms(rng):
    """vmap, scan, checkpoint and grad of them are the batch's, whichever rows a block holds."""
    x, y = side(rng), side(rng)
    f = partial(kljax.jensen_shannon, reduction="sum", implementation=blocks())

    def by_vmap(x):
        pad = lambda z: jnp.concatenate([z, jnp.zeros((2, V))]).reshape(3, 5, V)  # noqa: E731
        return jax.vmap(f)(pad(x), pad(y)).sum()

    def by_rows(x):
        return jax.vmap(f)(x, y).sum()

    def by_scan(x):
        def one(total, xy):
            return total + f(*xy), None

        return jax.lax.scan(one, jnp.zeros(()), (x[:12].reshape(2, 6, V), y[:12].reshape(2, 6, V)))[
            0
        ]

    slope = oracle.gradient("jensen_shannon", x, y)
    last = np.arange(N)[:, None] < 12
    visits = {by_vmap: slope, by_rows: slope, by_scan: slope * last}
    visits[jax.checkpoint(partial(f, targets=y))] = slope
    for visit, want in visits.items():
        assert_close(jax.jit(jax.grad(visit))(x), want)


def test_distillation_loss(rng):
    """All its terms and metrics go block by block."""
    x, y, labels = side(rng), side(rng), np.arange(N) % V
    options = {"temperature": 2.0, "soft_weight": 0.7, "hard_weight": 0.4, "weights": WEIGHTS}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(x):
        return kljax.distillation_loss(x, y, labels, **options, implementation=blocks())

    def want(a):
        return oracle.distillation_loss(a["x"], y, labels, **options)

    (loss, metrics), got = step(x)
    assert_close(loss, want({"x": x})[0])
    for name in kljax.DistillationMetrics._fields:
        assert_close(getattr(metrics, name), want({"x": x})[1][name])
    assert_close(got, oracle_large.gradients(lambda a: want(a)[0], {"x": x})["x"])


# --- the library's own choice, at a size where it matters ---


def test_the_default_at_a_large_vocabulary(rng):
    """40 rows of 5000 classes, close and far: value and gradient, in float32 and bfloat16."""
    x = rng.normal(size=(40, 5000))
    y = x + rng.normal(size=x.shape) * np.logspace(-4, 0, 40)[:, None]
    for dtype in (np.float32, jnp.bfloat16):
        sides = [jnp.asarray(z, dtype) for z in (x, y)]
        step = jax.jit(
            jax.grad(lambda x, y: (lambda d: (d.sum(), d))(kljax.forward_kl(x, y)), has_aux=True)
        )
        gradient, each = step(*sides)
        s, t = (oracle.log_probs(np.asarray(z, np.float64)) for z in sides)
        excess = np.expm1(s - t) - (s - t)  # what a sum of p (log p - log q) loses when both agree
        np.testing.assert_allclose(each, (np.exp(t) * excess).sum(-1), rtol=1e-3, atol=1e-9)
        want = np.exp(s) - np.exp(t)
        error = np.linalg.norm(np.asarray(gradient, np.float64) - want)
        assert error < max(1e-6, float(jnp.finfo(dtype).eps)) * np.linalg.norm(want)


SHAPE = (1024, 8192)
STEPS = {
    "value and gradient": lambda f: jax.value_and_grad(partial(f, reduction="mean")),
    "scaled": lambda f: jax.value_and_grad(lambda x, y: 0.5 * f(x, y, reduction="mean")),
    "none, then mean": lambda f: jax.value_and_grad(lambda x, y: jnp.mean(f(x, y))),
    "tangent": lambda f: lambda x, y: jax.jvp(partial(f, reduction="mean"), (x, y), (y, x)),
}


def temporary_bytes(f, *args):
    """What a compiled function needs beyond its inputs and outputs."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("step", STEPS)
def test_temporary_memory(step, dtype):
    """Below 0.15 of one input, for two inputs and a gradient, with no option set.

    On jax 0.10 a 16-bit gradient is carried as bits, and one more array turns them into numbers.
    """
    x = jax.ShapeDtypeStruct(SHAPE, dtype)
    bits = jax.__version_info__ < (0, 11) and dtype == jnp.bfloat16 and step != "tangent"
    limit = (1.15 if bits else 0.15) * math.prod(SHAPE) * np.dtype(dtype).itemsize
    assert temporary_bytes(STEPS[step](kljax.forward_kl), x, x) < limit


@pytest.mark.usefixtures("optimized")
def test_temporary_memory_of_a_value():
    """Of whole arrays the terms are stored, and not the scores of each side besides."""
    x = jax.ShapeDtypeStruct((1024, 4096), np.float32)
    f = partial(kljax.forward_kl, reduction="mean")
    for implementation, limit in (("dense", 1.05), (blocks(8), 0.05)):
        needed = temporary_bytes(partial(f, implementation=implementation), x, x)
        assert needed < limit * 4 * math.prod(x.shape)


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("implementation", ["chunked", "rows"])
def test_temporary_memory_of_a_named_implementation(implementation):
    """It runs as it is told; so do the whole arrays at once, which take more."""
    chosen = blocks(8) if implementation == "rows" else implementation
    x = jax.ShapeDtypeStruct(SHAPE, np.float32)
    f = partial(kljax.jensen_shannon, temperature=2.0)
    needed = {
        choice: temporary_bytes(
            STEPS["value and gradient"](partial(f, implementation=choice)), x, x
        )
        for choice in (chosen, "dense")
    }
    assert needed[chosen] < 0.15 * 4 * math.prod(SHAPE) < needed["dense"]


# --- many devices ---


def eight_devices(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_a_sharded_batch(rng, axis_type):
    """A batch over 8 devices gives the unsharded value, and a gradient that is spread alike."""
    x, y = side(rng, shape=(32, V)), side(rng, shape=(32, V))
    mesh = eight_devices(axis_type)
    sharding = NamedSharding(mesh, P("batch"))
    weights = np.float32(np.arange(32) % 3)

    @jax.jit
    def step(x, y):
        # The user's own axes are served by whole arrays; blocks of 8 rows have one of each device.
        chosen = blocks(8) if axis_type == AxisType.Auto else None
        options = {"weights": weights, "reduction": "mean", "temperature": 2.0}
        return jax.value_and_grad(partial(kljax.forward_kl, **options, implementation=chosen))(x, y)

    with jax.set_mesh(mesh):
        value, gradient = step(*(jax.device_put(z, sharding) for z in (x, y)))
    each = oracle.divergence("forward_kl", x, y, temperature=2.0)
    assert_close(value, oracle.reduce(each, weights, "mean"))
    slope = oracle.gradient("forward_kl", x, y, weights=weights, temperature=2.0)
    assert_close(gradient, slope / weights.sum())
    assert gradient.sharding.is_equivalent_to(sharding, 2)


def test_shard_map(rng):
    """Blocks of every shard's own rows, inside and outside of grad, with a shared side."""
    x, y = side(rng, shape=(32, V)), side(rng, shape=(V,))
    weights = np.float32(np.arange(32) % 3)
    split = P("batch")

    def local(x, y, w):
        options = {"reduction": "mean", "axis_name": "batch", "implementation": blocks(3)}
        return kljax.jeffreys(x, y, weights=w, **options)

    both = jax.value_and_grad(local, (0, 1))
    over = partial(
        jax.shard_map, mesh=eight_devices(), in_specs=(split, P(), split), check_vma=True
    )
    inside = over(both, out_specs=(P(), (split, P())))
    outside = jax.value_and_grad(over(local, out_specs=P()), (0, 1))
    each = oracle.divergence("jeffreys", x, y)
    for step in (inside, outside):
        value, gradients = jax.jit(step)(x, y, weights)
        assert_close(value, oracle.reduce(each, weights, "mean"))
        for wrt in range(2):
            slope = oracle.gradient("jeffreys", x, y, wrt, weights=weights)
            assert_close(gradients[wrt], slope / weights.sum())


MOVES = re.compile(r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(")


def moved(text):
    """The largest array, in elements, of every kind of exchange between devices."""
    largest = {}
    for shapes, kind in MOVES.findall(text):
        for dimensions in re.findall(r"\[([\d,]*)\]", shapes):
            size = math.prod(map(int, filter(None, dimensions.split(","))))
            largest[kind] = max(size, largest.get(kind, 0))
    return largest


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=lambda d: np.dtype(d).name)
def test_a_sharded_batch_is_never_gathered(dtype):
    """Compiled for 8 devices: no logits travel, and the gradient stays where its rows are."""
    shape, mesh = (1024, 32768), eight_devices()
    sharding = NamedSharding(mesh, P("batch"))
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    step = jax.value_and_grad(partial(kljax.forward_kl, reduction="mean"))
    compiled = jax.jit(step).lower(x, x).compile()
    largest = moved(compiled.as_text())
    assert "all-reduce" in largest, "the mean is summed over the devices"
    assert all(size <= shape[0] for size in largest.values()), largest
    assert compiled.output_shardings[1].is_equivalent_to(sharding, 2)


def test_the_count_sees_a_gathered_batch():
    """As it is where rows are taken one after the other."""
    x = jax.ShapeDtypeStruct(
        (64, 512), np.float32, sharding=NamedSharding(eight_devices(), P("batch"))
    )
    by_rows = jax.jit(lambda x: jax.lax.map(lambda row: jax.nn.logsumexp(row), x))
    assert max(moved(by_rows.lower(x).compile().as_text()).values()) >= 64 * 512 / 8


# --- the option ---


def test_a_small_batch_goes_at_once_unless_it_is_named():
    """Blocks cost time there, so that they are taken only where they are asked for."""
    x = jax.ShapeDtypeStruct((256, 4096), np.float32)
    size = {
        name: temporary_bytes(
            jax.grad(partial(kljax.forward_kl, reduction="mean", implementation=name)), x, x
        )
        for name in (None, "dense", "chunked")
    }
    assert size[None] == size["dense"] > 4 * size["chunked"]


def test_the_option():
    """Chunked is a value, equal and hashable; what is not an implementation says so."""
    assert kljax.Chunked(rows=4) == kljax.Chunked(rows=4) != kljax.Chunked(rows=5)
    assert len({kljax.Chunked(rows=4), kljax.Chunked(rows=4)}) == 1
    x = jnp.zeros((2, 3))
    for rows in (0, -1, 2.5, "8"):
        with pytest.raises((TypeError, ValueError), match=rf"rows.*{rows}"):
            kljax.forward_kl(x, x, implementation=kljax.Chunked(rows=rows))
    with pytest.raises(ValueError, match=r'must be one of None, "dense", "chunked".*fast'):
        kljax.forward_kl(x, x, implementation="fast")
