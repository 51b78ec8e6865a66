"""Heads: the divergences of logits that never exist as a whole, on either side."""

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest
from helpers import assert_close, named
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kljax

N, H_S, H_T, V = 10, 3, 5, 7  # four different sizes, so that a shape tells which product it is
WEIGHTS = np.array([1, 0.5, 2, 0, 1, 3, 0, 1, 1, 0.25], np.float32)
COTANGENT = np.linspace(-1, 2, N, dtype=np.float32)
SOFTCAP = 2.5
PARAMS = {
    "jensen_shannon": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
}
NAMES = [name for name in (*oracle_large.DIVERGENCES, "entropy") if name != "kl"]


def blocks(rows=3):
    """By default three rows at a time, of ten: no multiple of the block."""
    return kljax.Chunked(rows=rows)


def compute(name):
    """The library's divergence of that name, or the one made here."""
    if name == "squared_hellinger":
        return kljax.divergence(lambda s, t: 0.5 * (jnp.exp(s / 2) - jnp.exp(t / 2)) ** 2)
    return named(name)


def arrays(rng, batch=(N,), classes=V, dtype=np.float32):
    """Every array of a student's and a teacher's head, by name."""
    a = {}
    for side, size in (("s", H_S), ("t", H_T)):
        a |= {
            f"{side}.hidden": rng.normal(size=(*batch, size)),
            f"{side}.kernel": rng.normal(size=(size, classes)),
            f"{side}.bias": rng.normal(size=classes),
            f"{side}.scale": rng.uniform(0.5, 1.5, size=()),
        }
    return {name: x.astype(dtype) for name, x in a.items()}


def only(a, *names):
    """Those arrays that are named, or whose side is."""
    return {k: x for k, x in a.items() if k in names or k[0] in names}


def parts(a, side):
    """The arguments of one side's head."""
    return {name[2:]: x for name, x in a.items() if name.startswith(f"{side}.")}


def assert_gradients(got, f, a, dtype=np.float32):
    """Assert that every gradient is the derivative of the oracle's f, which is finite."""
    want = oracle_large.gradients(f, a)
    for name in a:
        assert np.isfinite(want[name]).all(), name
        assert got[name].dtype == a[name].dtype, name
        np.testing.assert_array_equal(got[name].shape, np.shape(a[name]))
        assert_close(got[name], want[name], dtype)


# --- value and gradient ---


@pytest.mark.slow(but=["jensen_shannon"])
@pytest.mark.parametrize("name", NAMES)
def test_every_divergence_with_every_option(rng, name):
    """Bias, softcap, scale, mask, traced temperature, weights, blocks; gradients to all of it."""
    a = arrays(rng) | {"temperature": np.float32(1.3)}
    if name == "entropy":
        a = only(a, "s", "temperature")
    a["s.hidden"][WEIGHTS == 0] = np.nan
    where = rng.uniform(size=(N, V)) > 0.3
    where[:, :2] = True
    sides = ("s",) if name == "entropy" else ("s", "t")
    softcaps = {"s": SOFTCAP, "t": None}
    options = {"where": where} | PARAMS.get(name, {})

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(a):
        heads = [kljax.Head(**parts(a, side), softcap=softcaps[side]) for side in sides]
        temperature, weights = a["temperature"], WEIGHTS
        each = compute(name)(
            *heads, temperature=temperature, weights=weights, implementation=blocks(), **options
        )
        return jnp.vdot(COTANGENT, each), each

    def want(a):
        heads = [parts(a, side) | {"softcap": softcaps[side]} for side in sides]
        each = oracle_large.divergence(name, *heads, temperature=a["temperature"], **options)
        return oracle.reduce(each, WEIGHTS)

    (_, each), got = step(a)
    assert each.dtype == jnp.float32
    assert_close(each, want(a))
    assert_gradients(got, lambda a: want(a) @ COTANGENT, a)
    assert (np.asarray(got["s.hidden"])[WEIGHTS == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("forward_kl", ("head", "logits")),
        ("cross_entropy", ("head", "probs")),
        ("jensen_shannon", ("head", "log_probs")),
        ("cross_entropy", ("head", "labels")),
        ("forward_kl", ("logits", "head")),
        ("reverse_kl", ("probs", "head")),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),
)
def test_a_head_beside_anything_else(rng, name, kinds):
    """The other side may be held in any way, labels included; both sides get their gradients."""
    head, other = ("s", 1) if kinds[0] == "head" else ("t", 0)
    a = only(arrays(rng), head)
    log_probs = oracle.log_probs(rng.normal(size=(N, V)))
    labels = np.where(WEIGHTS == 0, -100, np.arange(N) % V)  # a label of weight 0 is never read
    held = {"logits": log_probs + 1, "log_probs": log_probs, "probs": np.exp(log_probs)}
    if kinds[other] != "labels":
        a["other"] = held[kinds[other]].astype(np.float32)
    hold = {"logits": kljax.Logits, "log_probs": kljax.LogProbs, "probs": kljax.Probs}
    oracle_kinds = tuple("logits" if kind == "head" else kind for kind in kinds)

    @jax.jit
    @jax.value_and_grad
    def step(a):
        beside = labels if kinds[other] == "labels" else hold[kinds[other]](a["other"])
        sides = (kljax.Head(**parts(a, head)), beside)
        sides = sides if other == 1 else sides[::-1]
        options = {"weights": WEIGHTS, "reduction": "mean", "implementation": blocks()}
        return compute(name)(*sides, **options)

    def want(a):
        sides = (parts(a, head), labels if kinds[other] == "labels" else a["other"])
        sides = sides if other == 1 else sides[::-1]
        return oracle.reduce(
            oracle_large.divergence(name, *sides, kinds=oracle_kinds), WEIGHTS, "mean"
        )

    value, got = step(a)
    assert_close(value, want(a))
    assert_gradients(got, want, a)


REDUCED = {
    "none": lambda f: jnp.vdot(COTANGENT, f(reduction="none")),
    "mean": lambda f: f(reduction="mean"),
    "sum": lambda f: f(reduction="sum"),
    "batchmean": lambda f: f(reduction="batchmean"),
    "normalizer": lambda f: f(reduction="mean", normalizer=7.0),
    "half": lambda f: 0.5 * f(reduction="mean"),
}


def test_reductions_and_what_follows_them(rng):
    """Every reduction, and a loss that is scaled or summed unevenly afterwards."""
    a = arrays(rng)
    trained = ("s.hidden", "s.kernel")

    def losses(a):
        heads = (kljax.Head(**parts(a, side)) for side in ("s", "t"))
        f = partial(kljax.forward_kl, *heads, weights=WEIGHTS, implementation=blocks())
        return {name: reduced(f) for name, reduced in REDUCED.items()}

    @jax.jit
    def step(trained):
        loss = lambda x, name: losses(a | x)[name]  # noqa: E731
        return {name: jax.value_and_grad(loss)(trained, name) for name in REDUCED}

    def want(a, name):
        each = oracle_large.divergence("forward_kl", parts(a, "s"), parts(a, "t"))
        f = lambda reduction, **options: oracle.reduce(each, WEIGHTS, reduction, **options)  # noqa: E731
        if name == "none":
            return f("none") @ COTANGENT
        if name in ("half", "normalizer"):
            return f("mean") / 2 if name == "half" else f("mean", normalizer=7.0)
        return f(name)

    for name, (value, got) in step(only(a, *trained)).items():
        assert_close(value, want(a, name))
        f = lambda x, name=name: want(a | x, name)  # noqa: E731
        assert_gradients(got, f, only(a, *trained))


@pytest.mark.slow
def test_shapes(rng):
    """A batch of two axes, none at all, and one distribution that the batch shares."""
    a, where = arrays(rng, (2, 5)), np.arange(V) != 3
    one = only(arrays(rng, ()), "s")
    batches = {
        "two axes": (parts(a, "s"), parts(a, "t")),
        "no batch": (parts(one, "s"), {**parts(a, "t"), "hidden": a["t.hidden"][0, 0]}),
        "shared predictions": (parts(one, "s"), parts(a, "t")),
        "shared targets": (parts(a, "t"), parts(one, "s")),
    }

    @jax.jit
    def step(batches):
        def loss(sides):
            each = kljax.reverse_kl(
                *(kljax.Head(**side) for side in sides), where=where, implementation=blocks()
            )
            return jnp.sum(each), each

        return {name: jax.value_and_grad(loss, has_aux=True)(x) for name, x in batches.items()}

    for name, ((_, each), got) in step(batches).items():
        sides = batches[name]
        assert_close(each, oracle_large.divergence("reverse_kl", *sides, where=where))
        for i, side in enumerate(sides):

            def want(part, i=i, sides=sides):
                whole = [part if i == j else other for j, other in enumerate(sides)]
                return oracle_large.divergence("reverse_kl", *whole, where=where).sum()

            assert_gradients(got[i], want, side)


def test_every_implementation_agrees(rng):
    """The whole arrays at once, block by block, or as the library chooses."""
    a = arrays(rng)

    @jax.jit
    def step(a, other):
        heads = [kljax.Head(**parts(a, side), softcap=SOFTCAP) for side in ("s", "t")]
        choices = (None, "dense", "chunked", blocks(1), blocks(5), blocks(64))
        return [kljax.jeffreys(*heads, implementation=one) for one in choices], kljax.jeffreys(
            heads[0], other
        )

    sides = [parts(a, side) | {"softcap": SOFTCAP} for side in ("s", "t")]
    other = rng.normal(size=(N, V)).astype(np.float32)
    got, beside = step(a, other)
    for each in got:
        assert_close(each, oracle_large.divergence("jeffreys", *sides))
    assert_close(beside, oracle_large.divergence("jeffreys", sides[0], other))


def test_nan_stays_in_its_row(rng):
    """A bad example that counts is NaN itself, and no other of its block is."""
    a = arrays(rng)
    a["t.hidden"][4] = np.nan
    got = kljax.forward_kl(
        kljax.Head(**parts(a, "s")), kljax.Head(**parts(a, "t")), implementation=blocks()
    )
    np.testing.assert_array_equal(np.isnan(got), np.arange(N) == 4)


def test_a_bias_of_minus_infinity_removes_its_class(rng):
    """As a mask does, in value and every gradient: none is NaN."""
    a = arrays(rng)
    where = np.arange(V) < V - 2
    removed = {name: np.where(where, a[name], -np.inf) for name in ("s.bias", "t.bias")}

    @jax.jit
    @jax.value_and_grad
    def step(a):
        heads = (kljax.Head(**parts(a, side)) for side in ("s", "t"))
        return kljax.forward_kl(*heads, reduction="sum", implementation=blocks())

    def want(a):
        sides = (parts(a, "s"), parts(a, "t"))
        return oracle_large.divergence("forward_kl", *sides, where=where).sum()

    value, got = step(a | removed)
    assert_close(value, want(a))
    assert_gradients(got, want, a)


# --- accuracy ---


@pytest.mark.slow(but=["0.001"])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_vocabulary_of_257(rng, size):
    """One class more than a power of two: a class too many shows where logits are small."""
    a = only(arrays(rng, classes=257), "s.hidden", "s.kernel", "t.hidden", "t.kernel")
    a |= {name: a[name] * np.float32(size) for name in ("s.hidden", "t.hidden")}
    trained = ("s.hidden", "t.kernel")

    @jax.jit
    def step(trained):
        def loss(x):
            heads = [kljax.Head(**parts(a | x, side)) for side in ("s", "t")]
            options = {"implementation": blocks()}
            each = kljax.forward_kl(*heads, **options), kljax.entropy(heads[0], **options)
            return each[0].sum(), each

        return jax.value_and_grad(loss, has_aux=True)(trained)

    (_, (each, entropy)), got = step(only(a, *trained))
    sides = (parts(a, "s"), parts(a, "t"))
    want = oracle_large.divergence("forward_kl", *sides)
    # Far below float32's resolution of a log-probability, and still a number with digits.
    assert want.max() < 1e-4 or size == 1.0
    np.testing.assert_allclose(each, want, rtol=1e-3)
    assert_close(entropy, oracle_large.divergence("entropy", sides[0]))

    s, t = (np.exp(oracle.log_probs(oracle_large.logits(**side))) for side in sides)
    to_hidden = (s - t) @ a["s.kernel"].T.astype(np.float64)
    np.testing.assert_allclose(got["s.hidden"], to_hidden, rtol=0, atol=1e-3 * abs(to_hidden).max())
    log_ratio = np.log(t / s)
    to_logits = t * (log_ratio - want[:, None])
    to_kernel = a["t.hidden"].T.astype(np.float64) @ to_logits
    np.testing.assert_allclose(got["t.kernel"], to_kernel, rtol=0, atol=1e-3 * abs(to_kernel).max())


@pytest.mark.slow
@pytest.mark.parametrize("kernel_dtype", [jnp.bfloat16, np.float32])
def test_16_bit_parts(rng, kernel_dtype):
    """The value of the rounded parts to float32 accuracy, and gradients in each part's dtype."""
    dtypes = {"hidden": jnp.bfloat16, "kernel": kernel_dtype, "bias": jnp.bfloat16}
    a = {name: jnp.asarray(x, dtypes.get(name[2:], np.float32)) for name, x in arrays(rng).items()}

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def step(a):
        heads = (kljax.Head(**parts(a, side), softcap=SOFTCAP) for side in ("s", "t"))
        each = kljax.forward_kl(*heads, implementation=blocks())
        return jnp.mean(each), each

    def want(a):
        sides = (parts(a, side) | {"softcap": SOFTCAP} for side in ("s", "t"))
        return oracle_large.divergence("forward_kl", *sides)

    got, each = step(a)
    assert each.dtype == jnp.float32
    assert_close(each, want(a))
    assert_gradients(got, lambda a: want(a).mean(), a, jnp.bfloat16)


def test_16_bit_kernels_are_summed_in_float32(rng):
    """512 equal contributions of blocks: a sum kept in bfloat16 would stand still at half way."""
    rows, repeats = 4, 512
    hidden, teacher = (rng.normal(size=(rows, n)) for n in (H_S, V))
    kernel = jnp.asarray(rng.normal(size=(H_S, V)), jnp.bfloat16)
    many = [jnp.asarray(np.tile(x, (repeats, 1)), jnp.bfloat16) for x in (hidden, teacher)]

    @jax.jit
    @jax.grad
    def step(kernel):
        head = kljax.Head(many[0], kernel)
        return kljax.forward_kl(head, many[1], reduction="sum", implementation=blocks(rows))

    def want(a):
        sides = {"hidden": many[0][:rows], "kernel": a["kernel"]}, many[1][:rows]
        return repeats * oracle_large.divergence("forward_kl", *sides).sum()

    got = step(kernel)
    assert got.dtype == jnp.bfloat16
    want = oracle_large.gradients(want, {"kernel": kernel})["kernel"]
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, rtol=1e-2, atol=1e-2 * abs(want).max()
    )


# --- derivatives of every mode ---


def plain(name, s, t):
    """The textbook formula of whole log-probabilities, for JAX to differentiate."""
    kl = lambda p, q: jnp.sum(jnp.exp(p) * (p - q), -1)  # noqa: E731
    if name == "forward_kl":
        return kl(t, s)
    m = jnp.logaddexp(s, t) - jnp.log(2.0)
    return (kl(t, m) + kl(s, m)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
@pytest.mark.usefixtures("x64")
def test_forward_mode_and_second_order(rng, name):
    """jvp, and jvp of grad, in float64 are those of the dense composition."""
    a = arrays(rng, dtype=np.float64) | {"temperature": np.float64(1.3)}
    along = {key: rng.normal(size=x.shape) for key, x in a.items()}

    def loss(a):
        heads = (kljax.Head(**parts(a, side), softcap=SOFTCAP) for side in ("s", "t"))
        options = {"temperature": a["temperature"], "weights": WEIGHTS, "reduction": "sum"}
        return compute(name)(*heads, **options, implementation=blocks())

    def dense(a):
        sides = []
        for side in ("s", "t"):
            x = parts(a, side)
            z = x["scale"] * (x["hidden"] @ x["kernel"] + x["bias"][None])
            sides.append(jax.nn.log_softmax(SOFTCAP * jnp.tanh(z / SOFTCAP) / a["temperature"]))
        return jnp.vdot(WEIGHTS.astype(np.float64), plain(name, *sides))

    @partial(jax.jit, static_argnums=0)
    def orders(f, a, along):
        return jax.jvp(f, (a,), (along,)), jax.jvp(jax.grad(f), (a,), (along,))

    got, want = orders(loss, a, along), orders(dense, a, along)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-11)


# --- what is not asked for ---


def products(f, *args):
    """How many matrix products f traces to, by the shape of their result."""
    return _products(jax.make_jaxpr(f)(*args).jaxpr)


def _products(jaxpr):
    found = Counter(
        eqn.outvars[0].aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"
    )
    for eqn in jaxpr.eqns:
        inner = list(map(_products, _jaxprs(eqn.params)))
        if eqn.primitive.name == "cond":  # one of the branches runs
            shapes = set().union(*inner)
            inner = [Counter({shape: max(x[shape] for x in inner) for shape in shapes})]
        found += sum(inner, Counter())
    return found


def _jaxprs(params):
    """The functions that an operation calls."""
    for x in params.values():
        for one in x if isinstance(x, list | tuple) else (x,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def test_the_products_are_counted():
    """The count sees inside loops, branches and derivative rules."""
    x, y = jnp.ones((8, 3)), jnp.ones((3, 11))

    def f(x):
        once = jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, y))
        looped = jax.lax.scan(lambda c, _: (c + once(x), None), jnp.zeros((8, 11)), length=4)[0]
        return jax.lax.cond(
            x[0, 0] > 0, lambda: looped + x @ y, lambda: looped @ jnp.ones((11, 11))
        )

    assert products(f, x) == {(8, 11): 2}


def test_only_what_is_asked_for_is_multiplied():
    """A value is one product per head; a frozen part's gradient is never made."""
    n, h, v = 8, 3, 11
    student, teacher = (jnp.ones((n, h)), jnp.ones((h, v))), (jnp.ones((n, 5)), jnp.ones((5, v)))
    to_hidden, to_kernel = [(n, h), (h, n)], [(h, v), (v, h)]
    of_teacher = [(n, 5), (5, n), (5, v), (v, 5)]

    def loss(student, teacher=teacher):
        heads = kljax.Head(*student), kljax.Head(*teacher)
        return kljax.forward_kl(*heads, reduction="mean", implementation=blocks(n))

    def alone(student):
        return kljax.entropy(kljax.Head(*student), reduction="mean", implementation=blocks(n))

    logits = lambda found: found[(n, v)] + found[(v, n)]  # noqa: E731
    assert logits(products(alone, student)) == sum(products(alone, student).values()) == 1
    assert logits(products(loss, student)) == sum(products(loss, student).values()) == 2

    def asked(f, *args):
        found = products(f, *args)
        return [any(found[shape] for shape in one) for one in (to_hidden, to_kernel, of_teacher)]

    hidden, kernel = student
    assert asked(jax.grad(lambda x: loss((x, kernel))), hidden) == [True, False, False]
    assert asked(jax.grad(lambda x: loss((hidden, x))), kernel) == [False, True, False]
    assert asked(jax.grad(loss), student) == [True, True, False]
    assert asked(jax.grad(loss, 1), student, teacher) == [False, False, True]


@pytest.mark.usefixtures("optimized")
def test_no_logits_in_memory():
    """Value and gradients to both heads need far less than one array of logits."""
    n, h, v = 512, 16, 8192
    hidden, kernel = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((n, h), (h, v)))

    def loss(student, teacher):
        heads = kljax.Head(*student), kljax.Head(*teacher)
        return kljax.forward_kl(*heads, reduction="mean", implementation=kljax.Chunked(rows=16))

    def halved(student, teacher):
        return 0.5 * loss(student, teacher)

    for f in (jax.value_and_grad(loss, (0, 1)), jax.value_and_grad(halved)):
        compiled = jax.jit(f).lower((hidden, kernel), (hidden, kernel)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * (4 * n * v)


# --- transforms ---


@pytest.mark.slow
def test_vmap_scan_checkpoint_and_jit_agree(rng):
    """Value and gradient are the batch's, however the rows are visited."""
    a = only(arrays(rng), "s", "t.hidden", "t.kernel")
    teacher = parts(a, "t")
    a = only(a, "s")

    def batch(a, hidden=teacher["hidden"], reduction="sum", rows=3):
        heads = kljax.Head(**parts(a, "s")), kljax.Head(hidden, teacher["kernel"])
        return kljax.forward_kl(*heads, reduction=reduction, implementation=blocks(rows))

    def by_vmap(a):
        axes = ({name: 0 if name == "s.hidden" else None for name in a}, 0)
        halves = (
            a | {"s.hidden": a["s.hidden"].reshape(2, 5, H_S)},
            teacher["hidden"].reshape(2, 5, -1),
        )
        return jax.vmap(batch, axes)(*halves).sum()

    def by_scan(a):
        def one(total, x):
            return total + batch(a | {"s.hidden": x[0]}, x[1], "none"), None

        return jax.lax.scan(one, jnp.zeros(()), (a["s.hidden"], teacher["hidden"]))[0]

    def want(a):
        return oracle_large.divergence("forward_kl", parts(a, "s"), teacher).sum()

    for visit in (by_vmap, by_scan, jax.checkpoint(batch), batch):
        value, got = jax.jit(jax.value_and_grad(visit))(a)
        assert_close(value, want(a))
        assert_gradients(got, want, a)


def test_shard_map(rng):
    """Examples over 8 devices, kernels on all: grad outside and inside are the unsharded ones."""
    a = only(arrays(rng, (32,)), "s.hidden", "s.kernel", "t.hidden", "t.kernel")
    weights = rng.uniform(0.1, 3.0, size=32).astype(np.float32)
    weights[4:8] = 0  # the second device has no example that counts
    mesh = jax.make_mesh((8,), ("shards",), axis_types=(AxisType.Auto,))
    specs = {name: P("shards") if name.endswith("hidden") else P() for name in a}
    over_shards = partial(jax.shard_map, mesh=mesh, in_specs=(specs, P("shards")), check_vma=True)

    def local(a, weights):
        heads = (kljax.Head(**parts(a, side)) for side in ("s", "t"))
        options = {"reduction": "mean", "axis_name": "shards", "implementation": blocks()}
        return kljax.jeffreys(*heads, weights=weights, **options)

    def want(a):
        each = oracle_large.divergence("jeffreys", parts(a, "s"), parts(a, "t"))
        return oracle.reduce(each, weights, "mean")

    outside = jax.jit(jax.value_and_grad(over_shards(local, out_specs=P())))
    inside = jax.jit(over_shards(jax.value_and_grad(local), out_specs=(P(), specs)))
    for step in (outside, inside):
        value, got = step(a, weights)
        assert_close(value, want(a))
        assert_gradients(got, want, a)


# --- distillation ---


def test_distillation_loss(rng):
    """Two heads and labels: loss, metrics and gradients are those of the logits."""
    a = arrays(rng)
    labels, label_weights = np.arange(N) % V, np.float32(np.arange(N) % 3 == 0)
    options = {
        "temperature": 2.0,
        "soft_weight": 0.7,
        "hard_weight": 0.4,
        "weights": WEIGHTS,
        "label_weights": label_weights,
        "where": np.arange(V) != V - 1,
    }

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(a):
        heads = (kljax.Head(**parts(a, side), softcap=SOFTCAP) for side in ("s", "t"))
        return kljax.distillation_loss(*heads, labels, **options, implementation=blocks())

    def want(a):
        sides = (oracle_large.logits(**parts(a, side), softcap=SOFTCAP) for side in ("s", "t"))
        return oracle.distillation_loss(*sides, labels, **options)

    labels[labels == V - 1] = 0  # a label names a class that exists
    (loss, metrics), got = step(a)
    assert_close(loss, want(a)[0])
    for name in kljax.DistillationMetrics._fields:
        assert_close(getattr(metrics, name), want(a)[1][name])
    assert_gradients(only(got, "s"), lambda x: want(a | x)[0], only(a, "s"))
    for name in only(a, "t"):
        assert (np.asarray(got[name]) == 0).all()


# --- a pytree, and what does not fit ---


def test_a_head_is_a_pytree(rng):
    """Through jit, grad and tree.map; parts that are not given are no leaves; softcap is static."""
    head = kljax.Head(jnp.ones((2, 3)), jnp.ones((3, 4)), softcap=5.0)
    assert len(jax.tree.leaves(head)) == 2
    doubled = jax.tree.map(lambda x: 2 * x, head)
    assert isinstance(doubled, kljax.Head)
    assert doubled.softcap == 5.0
    assert doubled.bias is None
    gradient = jax.jit(jax.grad(lambda head: kljax.entropy(head, reduction="sum")))(head)
    assert isinstance(gradient, kljax.Head)
    assert gradient.kernel.shape == (3, 4)
    others = [
        kljax.Head(head.hidden, head.kernel),
        kljax.Head(head.hidden, head.kernel, softcap=4.0),
    ]
    trees = {jax.tree.structure(x) for x in (head, *others, kljax.Logits(head.hidden))}
    assert len(trees) == 4, "a trace of one head must never serve another"
    x = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)
    for softcap in (5.0, 0.5):  # one after the other, so that a wrong cache shows
        got = kljax.entropy(kljax.Head(x, head.kernel + x.T[:, :1], softcap=softcap))
        z = oracle_large.logits(x, head.kernel + x.T[:, :1], softcap=softcap)
        assert_close(got, oracle.divergence("entropy", z))


HIDDEN, KERNEL = np.ones((4, 3), np.float32), np.ones((3, 5), np.float32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: (kljax.Head(HIDDEN, KERNEL.T), HIDDEN), r"forward_kl: .*kernel.*\b3\b.*got.*5"),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL, bias=HIDDEN[0]), np.ones((4, 5), np.float32)),
            r"forward_kl: .*bias.*\(5,\).*got.*\(3,\)",
        ),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL, scale=KERNEL[0]), np.ones((4, 5), np.float32)),
            r"forward_kl: .*scale.*scalar.*\(5,\)",
        ),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL, softcap=0.0), np.ones((4, 5), np.float32)),
            r"forward_kl: .*softcap.*positive.*0\.0",
        ),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL), np.ones((4, 6), np.float32)),
            r"forward_kl: .*classes.*got.*Slice",
        ),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL), kljax.Head(HIDDEN, KERNEL[:, :4])),
            r"forward_kl: .*classes.*got.*Slice",
        ),
        (
            lambda: (kljax.Head(HIDDEN, KERNEL), kljax.Head(HIDDEN[:1], KERNEL)),
            r"forward_kl: .*shape \(4, 5\).*\(1, 5\)|forward_kl: .*\(4, 3\).*\(1, 3\)",
        ),
    ],
    ids=["kernel", "bias", "scale", "softcap", "classes", "classes of heads", "batch"],
)
def test_parts_that_do_not_fit(build, message):
    """The function, the part, what it should be, what it is."""
    with pytest.raises(ValueError, match=message):
        kljax.forward_kl(*build())


def test_arguments_that_do_not_fit_a_head():
    """Classes lie along the last axis; hidden states and kernels are floating point."""
    head = kljax.Head(HIDDEN, KERNEL)
    assert kljax.entropy(head, axis=1).shape == (4,)
    with pytest.raises(ValueError, match="entropy: axis"):
        kljax.entropy(head, axis=0)
    with pytest.raises(TypeError, match="entropy: .*kernel.*floating point.*int32"):
        kljax.entropy(kljax.Head(HIDDEN, KERNEL.astype(np.int32)))
    with pytest.raises(TypeError, match="entropy: .*hidden.*floating point.*int32"):
        kljax.entropy(kljax.Head(HIDDEN.astype(np.int32), KERNEL))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_is_read_at_a_masked_class(rng, bad, softcap):
    """Whatever kernel and bias hold there: value and gradients are those of a 0."""
    a = only(arrays(rng), "s")
    where = np.arange(V) != V - 1
    spoilt = a | {
        "s.kernel": a["s.kernel"].copy(),
        "s.bias": np.where(where, a["s.bias"], bad).astype(np.float32),
    }
    spoilt["s.kernel"][:, -1] = bad
    clean = spoilt | {
        "s.kernel": np.where(where, spoilt["s.kernel"], 0).astype(np.float32),
        "s.bias": np.where(where, spoilt["s.bias"], 0).astype(np.float32),
    }
    target = rng.normal(size=(N, V)).astype(np.float32)

    def step(a, where):
        def loss(a):
            head = kljax.Head(**(parts(a, "s") | {"softcap": softcap}))
            return kljax.forward_kl(head, target, where=where, reduction="mean")

        return jax.value_and_grad(loss)(a)

    for mask in (where, np.broadcast_to(where, target.shape)):
        got, want = (jax.jit(step)(x, mask) for x in (spoilt, clean))
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(one, np.asarray(other, np.float64))


def test_a_bad_example_that_no_term_reads(rng):
    """NaN in hidden states of weight 0 stays there, whatever weights labels would have."""
    head, target = arrays(rng), rng.normal(size=(N, V)).astype(np.float32)
    head["s.hidden"][WEIGHTS == 0] = np.nan

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def step(kernel):
        student = kljax.Head(head["s.hidden"], kernel)
        return kljax.distillation_loss(
            student, target, weights=WEIGHTS, label_weights=np.ones(N, np.float32)
        )

    assert np.isfinite(step(head["s.kernel"])[0]).all()


@pytest.mark.parametrize("implementation", ["dense", blocks()], ids=["dense", "blocks"])
def test_the_scale_has_no_derivative_at_a_removed_class(rng, implementation):
    """A bias of -inf removes a class at any scale, also under a target that has mass there."""
    a = arrays(rng)
    bias = np.where(np.arange(V) == 0, -np.inf, a["s.bias"]).astype(np.float32)
    target = rng.normal(size=(N, V)).astype(np.float32)

    def loss(scale, bias=bias, target=target):
        head = kljax.Head(a["s.hidden"], a["s.kernel"][:, -len(bias) :], bias, scale=scale)
        return kljax.cross_entropy(
            head, kljax.Logits(target), reduction="sum", implementation=implementation
        )

    assert np.isinf(loss(0.5))
    assert np.isfinite(jax.jit(jax.grad(loss))(0.5))


def test_a_bad_example_that_only_its_label_counts(rng):
    """NaN in its hidden states shows in the hard term, and not in the soft one."""
    a, target = arrays(rng), rng.normal(size=(N, V)).astype(np.float32)
    a["s.hidden"][0] = np.nan
    student = kljax.Head(a["s.hidden"], a["s.kernel"])
    weights = np.where(np.arange(N) == 0, 0, 1).astype(np.float32)
    _, metrics = kljax.distillation_loss(
        student, target, np.zeros(N, int), weights=weights, label_weights=np.ones(N, np.float32)
    )
    assert np.isnan(metrics.hard)
    assert np.isfinite(metrics.soft)
