"""Classes spread over a mapped axis: what eight devices compute together is what one computes."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import named
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kljax

N, V = 6, 16
WHERE = np.arange(V) % 5 > 0
LABELS = np.array([0, 3, 15, 8, 9, 4])
WEIGHTS = np.array([1.0, 0.0, 2.0, 1.0, 0.0, 3.0], np.float32)
KINDS = {
    "logits": lambda x: x,
    "log-probabilities": lambda x: kljax.LogProbs(jax.nn.log_softmax(x)),
    "probabilities": lambda x: kljax.Probs(jax.nn.softmax(x)),
}
BLOCKS = {"implementation": kljax.Chunked(rows=4)}
CASES = {
    "forward": ("forward_kl", "logits", {}),
    "reverse, two axes": ("reverse_kl", "logits", {"temperature": 2.0}),
    "jeffreys": ("jeffreys", "logits", {"where": WHERE}),
    "jensen-shannon": ("jensen_shannon", "logits", {"weights": WEIGHTS, "reduction": "mean"}),
    "skew, two axes": (
        "skew_reverse_kl",
        "logits",
        {"temperature": np.arange(1, N + 1.0), "reduction": "batchmean"},
    ),
    "cross-entropy": ("cross_entropy", "logits", {"temperature": 3.0}),
    "log-probabilities": ("forward_kl", "log-probabilities", {}),
    "probabilities": ("cross_entropy", "probabilities", {}),
    "forward in blocks": ("forward_kl", "logits", {"temperature": 2.0, "where": WHERE, **BLOCKS}),
    "skew in blocks": ("skew_forward_kl", "probabilities", {"reduction": "sum", **BLOCKS}),
}


def meshes(two):
    shape, names = ((4, 2), ("model", "expert")) if two else ((8,), ("model",))
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def on_a_mesh(loss, mesh, spread):
    """The loss with the last axis of some of its arguments, the first ones, spread over a mesh."""
    names = mesh.axis_names
    class_axis_name = names if len(names) > 1 else names[0]
    by_last = lambda x: P(*(None,) * (jnp.ndim(x) - 1), names)  # noqa: E731

    def sharded(*arrays):
        specs = [by_last(x) if i < spread else P() for i, x in enumerate(arrays)]
        body = partial(loss, class_axis_name=class_axis_name)
        body = jax.shard_map(body, mesh=mesh, in_specs=tuple(specs), out_specs=P())
        return body(*arrays)

    return sharded


def alike(got, want):
    """Up to what another order of the sums makes of the largest entries."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        largest = np.max(np.abs(b), initial=1, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * largest)


@pytest.mark.slow(but=["forward", "log-probabilities"])
@pytest.mark.parametrize("case", CASES)
def test_every_derivative(rng, case):
    """Value, gradient, tangent and Hessian-vector product, to both sides and the temperature."""
    name, kind, options = CASES[case]
    options = dict(options)
    x, y = (jnp.asarray(rng.normal(size=(N, V)), jnp.float32) for _ in range(2))
    where, temperature = options.pop("where", None), options.pop("temperature", None)
    where = jnp.ones(V, bool) if where is None else jnp.asarray(where)
    moved = [x, y] + ([] if temperature is None else [jnp.asarray(temperature, jnp.float32)])
    whole = KINDS[kind]  # made of all classes, and only then spread

    def loss(x, y, where, *temperature, class_axis_name=None):
        given = dict(zip(["temperature"], temperature, strict=False), **options)
        wrap = {"logits": kljax.Logits, "probabilities": kljax.Probs}.get(kind, kljax.LogProbs)
        given |= {"where": where} if "where" in CASES[case][2] else {}
        return named(name)(wrap(x), wrap(y), class_axis_name=class_axis_name, **given)

    def derivatives(loss):
        def total(x, y, *temperature):
            x, y = (jax.tree.leaves(whole(z))[0] for z in (x, y))
            return jnp.sum(jnp.sin(loss(x, y, where, *temperature)))

        gradient = jax.grad(total, tuple(range(len(moved))))
        steps = [jnp.cos(3.0 * x) for x in moved]
        return (*jax.jvp(total, moved, steps), *jax.jvp(gradient, moved, steps))

    sharded = on_a_mesh(loss, meshes("two axes" in case), 3)
    alike(jax.jit(partial(derivatives, sharded))(), jax.jit(partial(derivatives, loss))())


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_near_equality(rng, name):
    """Relative error 1e-6 at D = 2e-6, as on one device."""
    x = np.float32(3 * rng.normal(size=(3, 4096)))
    y = x + np.float32(2e-3 * rng.normal(size=x.shape))
    value = on_a_mesh(getattr(kljax, name), meshes(two=False), 2)(x, y)
    p, q = (y, x) if name == "forward_kl" else (x, y)
    log_p, log_q = (np.float64(z) for z in (p, q))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    want = np.sum(np.exp(log_p) * (np.expm1(log_q - log_p) - (log_q - log_p)), -1)
    assert 1e-6 < want.min() < want.max() < 3e-6
    np.testing.assert_allclose(value, want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["integers", "soft"])
def test_distillation_with_labels_and_metrics(rng, labels):
    """Labels number the whole vocabulary, and so does the class where student and teacher agree."""
    x, y, z = (jnp.asarray(rng.normal(size=(N, V)), jnp.float32) for _ in range(3))
    soft = jax.nn.softmax(z)

    def loss(x, y, soft, hard, class_axis_name=None):
        return kljax.distillation_loss(
            x,
            y,
            hard if labels == "integers" else kljax.Probs(soft),
            temperature=2.0,
            hard_weight=0.5,
            label_smoothing=0.1 if labels == "integers" else 0.0,
            weights=WEIGHTS,
            class_axis_name=class_axis_name,
            implementation=kljax.Chunked(rows=4),
        )

    def both(loss):
        run = jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)
        return jax.jit(run)(x, y, soft, jnp.asarray(LABELS))

    y = y.at[0].set(x[0])
    alike(both(on_a_mesh(loss, meshes(two=True), 3)), both(loss))


def test_labels_with_smoothing_of_the_classes_that_exist(rng):
    """The uniform distribution is that over all shards; a label that does not exist gives NaN."""
    x = jnp.asarray(rng.normal(size=(N, V)), jnp.float32)

    def loss(x, where, labels, class_axis_name=None):
        return kljax.cross_entropy(
            x, labels, label_smoothing=0.2, where=where, class_axis_name=class_axis_name
        )

    arguments = x, jnp.asarray(WHERE), jnp.asarray([1, 0, V, -1, 7, 8], jnp.int8)
    want = loss(*arguments)
    assert np.isnan(want).tolist() == [False, True, True, True, False, False]
    alike(jax.jit(on_a_mesh(loss, meshes(two=False), 2))(*arguments), want)


def test_examples_and_classes_on_axes_of_their_own(rng):
    """The batch over one axis of the mesh, the classes over the other."""
    x, y = (jnp.asarray(rng.normal(size=(8, V)), jnp.float32) for _ in range(2))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def loss(x, y, weights, **names):
        return kljax.forward_kl(x, y, weights=weights, reduction="mean", **names)

    sharded = jax.shard_map(
        partial(loss, axis_name="data", class_axis_name="model"),
        mesh=mesh,
        in_specs=(P("data", "model"), P("data", "model"), P("data")),
        out_specs=P(),
    )
    arguments = x, y, jnp.arange(8.0) % 3
    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*arguments) for f in (sharded, loss)
    )
    alike(got, want)


def test_under_vmap(rng):
    """A mapped axis of any kind will do; classes that are nobody's have no part in it."""
    x, y = (jnp.asarray(rng.normal(size=(N, V)), jnp.float32) for _ in range(2))
    parts = lambda z: z.reshape(N, 4, V // 4)  # noqa: E731
    each = jax.vmap(partial(kljax.forward_kl, class_axis_name="v"), in_axes=1, axis_name="v")
    for got in each(parts(x), parts(y)):
        alike(got, kljax.forward_kl(x, y))

    def total(x, y):
        return jnp.sum(each(parts(x), parts(y))[0])

    def derivatives(total):
        gradient = jax.grad(total)
        return gradient(x, y), jax.jvp(lambda x: gradient(x, y), (x,), (y,))[1]

    alike(derivatives(total), derivatives(lambda x, y: jnp.sum(kljax.forward_kl(x, y))))
    blocks = partial(kljax.forward_kl, implementation=kljax.Chunked(rows=2), class_axis_name="v")
    with pytest.raises(
        ValueError, match=r"able to serve Chunked\(rows=2\); got classes over other"
    ):
        jax.vmap(blocks, in_axes=1, axis_name="v")(parts(x), parts(y))


def test_extremes_on_other_shards_than_the_mass(rng):
    """Huge logits, classes of probability zero, a shard of them alone, and equality."""
    x, y = (np.asarray(rng.normal(size=(N, V)), np.float32) for _ in range(2))
    x[0, 3], x[1, 0:4], y[1, 0:2], y[2, 8:] = 1e12, -np.inf, -np.inf, -np.inf
    y[3], x[4] = x[3], 1e4 * x[4]

    def loss(x, y, class_axis_name=None):
        return kljax.forward_kl(x, y, class_axis_name=class_axis_name)

    want = loss(x, y)
    got = jax.jit(on_a_mesh(loss, meshes(two=False), 2))(x, y)
    np.testing.assert_allclose(got, want, rtol=2e-5)
    assert np.isinf(got[1])
    assert got[3] == 0


def test_a_term_that_captures_in_blocks(rng):
    """Its trace for a block varies over the same axes as the block does."""
    x, y = (jnp.asarray(rng.normal(size=(N, V)), jnp.float32) for _ in range(2))

    def loss(x, y, class_axis_name=None):
        scale = jnp.float32(3.0)
        mine = kljax.divergence(lambda s, t: scale * kljax.term_kl(t, s))
        options = {"implementation": kljax.Chunked(rows=4), "class_axis_name": class_axis_name}
        return jnp.sum(mine(x, y, **options))

    run = [jax.jit(jax.value_and_grad(f)) for f in (on_a_mesh(loss, meshes(two=False), 2), loss)]
    alike(*(f(x, y) for f in run))


HIDDEN = 5
HEADS = {
    "head": {},
    "transposed, softcap, scale, bias": {"transposed": True, "softcap": 3.0},
    "top-k teacher": {},
    "top-k, renormalized": {"tail": "renormalize"},
}


@pytest.mark.slow(but=["head", "top-k teacher"])
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
@pytest.mark.parametrize("case", HEADS)
def test_a_kernel_spread_over_its_vocabulary(rng, case, blocks):
    """Gradients to hidden states, kernel, bias and scale, each summed once over the shards."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    kernel, bias, hidden, scale = normal(HIDDEN, V), normal(V), normal(N, HIDDEN), jnp.float32(0.7)
    teacher = normal(N, V)
    options = {"temperature": 2.0, "reduction": "mean", "weights": WEIGHTS}
    options |= {"implementation": kljax.Chunked(rows=4)} if blocks else {}
    full = case.startswith("transposed")

    def loss(kernel, bias, teacher, hidden, scale, class_axis_name=None):
        given = (bias, 3.0, scale) if full else ()
        student = kljax.Head(hidden, kernel.T if full else kernel, *given, transposed=full)
        if case.startswith("top-k"):
            teacher = kljax.top_k(teacher, 4, temperature=2.0, class_axis_name=class_axis_name)
            teacher = replace(teacher, **HEADS[case])
        return kljax.forward_kl(student, teacher, class_axis_name=class_axis_name, **options)

    arguments = kernel, bias, teacher, hidden, scale
    steps = tuple(jnp.cos(3 * x) for x in arguments)

    def derivatives(loss):
        gradient = jax.grad(loss, argnums=(0, 1, 3, 4))
        return loss(*arguments), gradient(*arguments), jax.jvp(gradient, arguments, steps)[1]

    sharded = on_a_mesh(loss, meshes(two=False), 3)
    alike(jax.jit(partial(derivatives, sharded))(), jax.jit(partial(derivatives, loss))())


@pytest.mark.slow(but=["bucket"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize_both", "truncate"])
def test_top_k_numbers_the_whole_vocabulary(rng, tail):
    """The same classes, masses and losses as on one device; equality is exactly 0."""
    x, y = (jnp.asarray(rng.normal(size=(N, V)), jnp.float32) for _ in range(2))

    def few(y, where, class_axis_name=None):
        best = kljax.top_k(y, 5, where=where, class_axis_name=class_axis_name)
        return best.indices, best.log_probs, best.log_tail

    def loss(x, y, where, class_axis_name=None):
        best = kljax.top_k(y, 5, where=where, class_axis_name=class_axis_name)
        best, options = replace(best, tail=tail), {"class_axis_name": class_axis_name}
        return kljax.forward_kl(x, best, where=where, **options)

    where, mesh = jnp.asarray(WHERE), meshes(two=True)
    out = (P(), P(), P())
    sharded = jax.shard_map(
        partial(few, class_axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(P(None, mesh.axis_names), P(mesh.axis_names)),
        out_specs=out,
    )
    got, want = jax.jit(sharded)(y, where), few(y, where)
    np.testing.assert_array_equal(got[0], want[0])
    alike(got[1:], want[1:])
    spread = jax.jit(on_a_mesh(loss, mesh, 3))
    alike(spread(x, y, where), loss(x, y, where))
    if tail != "truncate":
        np.testing.assert_array_equal(spread(y, y, where), 0)


def test_distillation_from_heads_with_metrics(rng):
    """Both kernels spread, labels of the whole vocabulary: loss and every metric."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731

    def loss(kernel, other, hidden, labels, class_axis_name=None):
        return kljax.distillation_loss(
            kljax.Head(hidden, kernel),
            kljax.Head(hidden[:, :3], other),
            labels,
            temperature=2.0,
            hard_weight=0.5,
            class_axis_name=class_axis_name,
        )

    arguments = normal(HIDDEN, V), normal(3, V), normal(N, HIDDEN)
    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 2), has_aux=True))  # noqa: E731
    sharded = on_a_mesh(loss, meshes(two=True), 2)
    labels = jnp.asarray(LABELS)
    alike(run(sharded)(*arguments, labels), run(loss)(*arguments, labels))


def test_what_is_not_served_says_so():
    """Never a silent gather, or a softmax of each shard by itself."""
    x = jnp.zeros((N, V))
    for call, message in {
        lambda: kljax.forward_kl(x, x, axis=(0, 1), class_axis_name="v"): (
            "axis must be a single axis with class_axis_name; got 2 class axes."
        ),
        lambda: kljax.forward_kl(
            x, x, reduction="mean", axis_name="v", class_axis_name=("v", "w")
        ): "class_axis_name must be other axes than axis_name; got 'v' in both.",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("kind", ["logits", "head"])
def test_samples_of_the_whole_vocabulary(rng, kind):
    """All shards draw the same classes, as often as they should, with the weights of one device."""
    power, temperature, n, draws = 0.5, 2.0, 3, 2000
    hidden, kernel = rng.normal(size=(1, V)), np.diag(rng.normal(size=V))
    p = np.exp((hidden @ kernel)[0] / temperature) * WHERE
    p /= p.sum()
    q = p**power / np.sum(p**power)
    hidden, kernel = jnp.asarray(hidden, jnp.float32), jnp.asarray(kernel, jnp.float32)

    def drawn(kernel, where, hidden, class_axis_name):
        hidden = jnp.tile(hidden, (draws, 1))
        given = kljax.Head(hidden, kernel) if kind == "head" else hidden @ kernel
        targets = kljax.sample_targets(
            jax.random.key(0),
            given,
            n,
            proposal_power=power,
            where=where,
            temperature=temperature,
            class_axis_name=class_axis_name,
        )
        return targets.indices, targets.log_probs

    mesh = meshes(two=True)
    sharded = jax.shard_map(
        partial(drawn, class_axis_name=mesh.axis_names),
        mesh=mesh,
        in_specs=(P(None, mesh.axis_names), P(mesh.axis_names), P()),
        out_specs=(P(), P()),
    )
    indices, log_weights = jax.jit(sharded)(kernel, jnp.asarray(WHERE), hidden)
    counts = n * np.exp(log_weights) * q[indices] / p[indices]
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-4)
    np.testing.assert_array_equal(np.rint(counts).sum(-1), n)

    share = np.bincount(indices.ravel(), counts.ravel(), V) / (n * draws)
    assert (abs(share - q) <= 5 * np.sqrt(q * (1 - q) / (n * draws))).all()
    assert (share[~WHERE] == 0).all()


def test_the_gradient_of_samples(rng):
    """To the teacher's logits, through p alone: that of log-probabilities at the same classes."""
    y = jnp.asarray(rng.normal(size=(N, V)), jnp.float32)

    def total(y, class_axis_name):
        drawn = kljax.sample_targets(jax.random.key(1), y, 4, class_axis_name=class_axis_name)
        there = ~jnp.isneginf(drawn.log_probs)
        return jnp.sum(jnp.where(there, drawn.log_probs, 0)), (drawn.indices, there)

    mesh = meshes(two=False)
    by_class, whole = P(None, "model"), (P(), (P(), P()))
    sharded = jax.shard_map(
        partial(total, class_axis_name="model"), mesh=mesh, in_specs=by_class, out_specs=whole
    )
    gradient, (indices, there) = jax.jit(jax.grad(sharded, has_aux=True))(y)

    def expected(y):
        at = jnp.take_along_axis(jax.nn.log_softmax(y), indices, axis=-1)
        return jnp.sum(jnp.where(there, at, 0))

    alike(gradient, jax.grad(expected)(y))


@pytest.mark.usefixtures("x64")
def test_few_classes_in_float64(rng):
    """Where a bare `arange` would be 64 bits wide; a row of NaN keeps indices that there are."""
    y = jnp.asarray(rng.normal(size=(N, V))).at[1].set(jnp.nan)

    def few(y):
        best = kljax.top_k(y, 3, class_axis_name="model")
        drawn = kljax.sample_targets(jax.random.key(0), y, 3, class_axis_name="model")
        return best.indices, drawn.indices, best.log_probs, drawn.log_probs

    spread = jax.shard_map(few, mesh=meshes(two=False), in_specs=P(None, "model"), out_specs=P())
    best, drawn, *log_probs = jax.jit(spread)(y)
    np.testing.assert_array_equal(best[0], np.argsort(-y[0])[:3])
    assert ((best >= 0) & (best < V)).all()
    assert ((drawn >= 0) & (drawn < V)).all()
    assert all(x.dtype == np.float64 for x in log_probs)
