"""Arrays on the mesh that `jax.make_mesh` makes, whose axes are explicit, set or not."""

from contextlib import nullcontext
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kljax
from benchmarks import hlo
from kljax import metrics
from kljax.compat import gluon, keras, optax, torch, torchmetrics

RNG = np.random.default_rng(3)
X, Y = (jnp.asarray(RNG.normal(size=(16, 16)), jnp.float32) for _ in range(2))
LABELS = jnp.arange(16)
KERNEL = jnp.asarray(RNG.normal(size=(16, 5)), jnp.float32)
FEW = kljax.top_k(Y, 3)

# Of the sides x and y, both spread; the others are whole.
PROGRAMS = {
    "entropy": lambda x, y: kljax.entropy(x),
    "forward_kl": kljax.forward_kl,
    "options": lambda x, y: kljax.forward_kl(
        x, Y, weights=LABELS % 2 == 0, where=LABELS != 3, temperature=2.0, reduction="mean"
    ),
    "a shared teacher": lambda x, y: kljax.reverse_kl(x, Y[0]),
    "jensen_shannon": kljax.jensen_shannon,
    "kl_terms": kljax.kl_terms,
    "labels": lambda x, y: kljax.cross_entropy(x, LABELS),
    "distillation_loss": lambda x, y: kljax.distillation_loss(x, y, LABELS, hard_weight=0.5)[0],
    "TopK": lambda x, y: kljax.forward_kl(x, FEW),
    "TopK and where": lambda x, y: kljax.forward_kl(x, FEW, where=LABELS != 3),
    "Head": lambda x, y: kljax.forward_kl(kljax.Head(x, KERNEL), kljax.Head(y, KERNEL)),
    "elbo_kl": lambda x, y: kljax.elbo_kl(
        kljax.families.Normal(x, log_variance=y), weights=LABELS % 3, free_bits=0.1
    ),
    "sampled_kl_loss": lambda x, y: kljax.sampled_kl_loss(
        x, y, log_behavior=Y, sequence_axis=1, weights=LABELS % 2, reduction="mean"
    ),
    "mixture": lambda x, y: kljax.forward_kl(kljax.mixture(x, y, 0.3), Y),
    "metrics": lambda x, y: (
        metrics.Divergence.empty()
        .update(kljax.entropy(x), agreement=metrics.agreement(x, y))
        .compute()
        .mean
    ),
    "reduce": lambda x, y: kljax.reduce(kljax.entropy(x), weights=LABELS, reduction="mean"),
    "torch": lambda x, y: torch.kl_div(x, jax.nn.softmax(Y), reduction="sum"),
    "optax": lambda x, y: optax.kl_divergence(x, jax.nn.softmax(Y)),
    "softmax_cross_entropy": lambda x, y: optax.softmax_cross_entropy(x, jax.nn.softmax(Y)),
    "torchmetrics": lambda x, y: torchmetrics.kl_divergence(jax.nn.softmax(x), jax.nn.softmax(Y)),
    "gluon": lambda x, y: gluon.KLDivLoss()(x, jax.nn.softmax(Y)),
    "keras": lambda x, y: keras.kl_divergence(jax.nn.softmax(x), jax.nn.softmax(Y)),
}
SPECS = {"batch": PartitionSpec("d"), "classes": PartitionSpec(None, "d")}


@pytest.mark.slow(
    but=[
        "forward_kl-8-set-batch",
        "distillation_loss-8-not set-classes",
        "TopK-8-set-classes",
        "torch-8-set-batch",
    ]
)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients(name, devices, is_set, spec):
    """Without the mesh set, JAX takes no gradient on several devices; eagerly it is asked there."""
    mesh = jax.make_mesh((devices,), ("d",))
    program = PROGRAMS[name]
    total = lambda x, y: jnp.sum(program(x, y))  # noqa: E731
    differentiable = name != "metrics" and (devices == 1 or is_set)
    with jax.set_mesh(mesh) if is_set else nullcontext():
        x, y = (jax.device_put(z, NamedSharding(mesh, SPECS[spec])) for z in (X, Y))
        got = [jax.jit(program)(x, y)]
        if devices > 1 and not is_set:
            got.append(program(x, y))
        gradient = jax.jit(jax.grad(total))(x, y) if differentiable else None
    want, want_gradient = on_one_device(name)
    for values in got:
        assert_close(values, want)
    if gradient is not None:
        assert gradient.sharding.is_equivalent_to(x.sharding, 2)
        assert_close(gradient, want_gradient)


@cache
def on_one_device(name):
    program = PROGRAMS[name]
    total = lambda x, y: jnp.sum(program(x, y))  # noqa: E731
    gradient = None if name == "metrics" else jax.jit(jax.grad(total))(X, Y)
    return jax.jit(program)(X, Y), gradient


@pytest.mark.parametrize(
    "few", [kljax.top_k, lambda x, n: kljax.sample_targets(jax.random.key(0), x, n)]
)
def test_few_classes_of_an_example(few):
    mesh = jax.make_mesh((8,), ("d",))
    want = few(X, 3)
    got = jax.jit(few, static_argnums=1)(jax.device_put(X, NamedSharding(mesh, SPECS["batch"])), 3)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)
    with pytest.raises(ValueError, match="logits must be an array with all classes of an example"):
        few(jax.device_put(X, NamedSharding(mesh, SPECS["classes"])), 3)


def test_no_logits_are_gathered():
    """A top-k teacher beside sharded classes: what is moved is of the size of k, not of V."""
    mesh = jax.make_mesh((8,), ("d",))
    x = jax.device_put(X, NamedSharding(mesh, SPECS["classes"]))
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x: kljax.forward_kl(x, FEW)).lower(x).compile().as_text()
    moved = [line for line in text.splitlines() if "all-gather" in line or "all-to-all" in line]
    assert not [line for line in moved if "16,16]" in line]


# How hidden states and kernels of the student lie, then those of a teacher whose kernel is
# transposed, (classes, features).
HEADS = {
    "examples": (("d",), (), ("d",), ()),
    "kernels in parts": (("d",), ("d",), ("d",), (None, "d")),
    "classes, and kernels in parts": (("d",), ("d", "m"), ("d",), ("m", "d")),
    "tokens": (("d", "m"), ("m",), ("d",), ()),
    "examples over both": ((("d", "m"),), (None, "m"), ("d",), ()),
    "features": ((None, None, "d"), ("m",), ("d",), ("m",)),
    "classes over what has examples": (("d",), (None, "d"), ("d",), ("d",)),
    "nothing": ((), (), (), ()),
}
TOKENS = jnp.arange(32).reshape(8, 4)


def student_and_teacher():
    shapes = (8, 4, 4), (4, 16), (8, 4, 8), (16, 8)
    return [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in shapes]


def of_heads(how, implementation, h, k, g, w):
    student, teacher = kljax.Head(h, k, softcap=5.0), kljax.Head(g, w, transposed=True)
    options = {"implementation": implementation, "weights": TOKENS % 3}
    match how:
        case "per example":
            return jnp.sum(jnp.sin(kljax.forward_kl(student, teacher, temperature=2.0, **options)))
        case "distillation":
            return kljax.distillation_loss(
                student, teacher, TOKENS % 16, hard_weight=0.3, where=LABELS != 3, **options
            )[0]
        case "a shared side":
            shared = kljax.LogProbs(jax.nn.log_softmax(Y[0]))
            return kljax.jensen_shannon(student, shared, reduction="mean", **options)
        case "few classes":
            few = kljax.top_k(teacher, 3)
            return kljax.forward_kl(student, few, reduction="batchmean", **options)


@pytest.mark.slow(
    but=[
        "classes, and kernels in parts-distillation",
        "kernels in parts-per example",
        "tokens-a shared side",
    ]
)
@pytest.mark.parametrize("how", ["per example", "distillation", "a shared side", "few classes"])
@pytest.mark.parametrize("lie", HEADS)
def test_heads(lie, how):
    """However they lie, values and gradients are those of one device, and lie as they do."""
    mesh = jax.make_mesh((2, 4), ("d", "m"))
    given, cut = student_and_teacher(), how in ("per example", "a shared side")
    implementation = kljax.Chunked(rows=5) if cut else None
    loss = jax.jit(
        jax.value_and_grad(lambda *args: of_heads(how, implementation, *args), (0, 1, 2))
    )
    want = loss(*given)
    with jax.set_mesh(mesh):
        spread = [
            jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            for x, spec in zip(given, HEADS[lie], strict=True)
        ]
        got = loss(*spread)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    for slope, x in zip(got[1], spread, strict=False):
        assert slope.sharding.is_equivalent_to(x.sharding, x.ndim)


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
def test_no_logits_of_heads_are_held(is_set):
    """In blocks, a device holds a small part of them; kernels in parts are gathered once."""
    mesh = jax.make_mesh((8,), ("d",))
    shapes = (16384, 16), (16, 8000), (16384, 16), (16, 8000)
    on = NamedSharding(mesh, PartitionSpec("d"))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on) for shape in shapes]

    def loss(h, k, g, w):
        return kljax.forward_kl(kljax.Head(h, k), kljax.Head(g, w), reduction="mean")

    with jax.set_mesh(mesh) if is_set else nullcontext():
        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile()
    logits_of_a_device = 4 * 16384 * 8000 / 8
    assert program.memory_analysis().temp_size_in_bytes < logits_of_a_device
    counts = hlo.count(program.as_text())
    assert max(counts.loops) > 1
    assert {name: len(of) for name, of in counts.collectives.items()} == {
        "all-gather": 2,
        "all-reduce": 1,
        "reduce-scatter": 1,
    }
    assert all(times == 1 for of in counts.collectives.values() for _, times in of)


def test_second_derivatives_of_heads():
    mesh, (h, k, g, w) = jax.make_mesh((8,), ("d",)), student_and_teacher()

    def product(h, k, g):
        loss = lambda h, k: kljax.reverse_kl(  # noqa: E731
            kljax.Head(h, k),
            kljax.Head(g, w, transposed=True),
            reduction="sum",
            implementation=kljax.Chunked(rows=12),
        )
        return jax.jvp(jax.grad(loss, (0, 1)), (h, k), (jnp.cos(h), jnp.sin(k)))[1]

    want = jax.jit(product)(h, k, g)
    with jax.set_mesh(mesh):
        spread = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))) for x in (h, g)]
        got = jax.jit(product)(spread[0], k, spread[1])
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_axes_that_the_compiler_manages():
    """Beside explicit ones."""
    kinds = AxisType.Explicit, AxisType.Auto
    mesh, given = jax.make_mesh((2, 4), ("d", "m"), axis_types=kinds), student_and_teacher()
    loss = jax.value_and_grad(lambda *args: of_heads("distillation", None, *args))
    want = jax.jit(loss)(*given)
    with jax.set_mesh(mesh):
        on = NamedSharding(mesh, PartitionSpec("d"))
        got = jax.jit(loss)(*(jax.device_put(x, on) for x in given))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_what_is_not_cut():
    mesh = jax.make_mesh((8,), ("d",))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("d")))
    factor = Y[0, 0]
    capturing = kljax.divergence(lambda s, t: factor * kljax.term_kl(t, s))
    with pytest.raises(
        ValueError, match="serve chunked; got a mesh with explicit axes, and a term"
    ):
        capturing(x, Y, implementation="chunked")


HIDDEN, CLASSES = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((8, 8), (8, 16)))
TEACHER = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)
# Of hidden states, a kernel and a teacher's logits, how each lies, and the loss.
UNEVEN = {
    "a mask that lies as the teacher": (
        (("d",), ("m",), ("d", "m")),
        lambda h, k, t: kljax.forward_kl(kljax.Head(h, k), t, where=t > -2, reduction="sum"),
    ),
    "a mask spread otherwise than the kernel": (
        (("d",), (None, "m"), (None, "d")),
        lambda h, k, t: kljax.forward_kl(kljax.Head(h, k), t, where=t[0] > -1, reduction="sum"),
    ),
    "weights over another axis": (
        (("d",), (), ("m",)),
        lambda h, k, t: kljax.reverse_kl(
            kljax.Head(h, k), TEACHER, weights=t[:, 0] > 0, reduction="sum"
        ),
    ),
    "shared logits": (
        (("d",), ("d",), ()),
        lambda h, k, t: kljax.forward_kl(kljax.Head(h, k), t[0], reduction="mean"),
    ),
    "the kernel of the batch's shape": (
        (("d",), (None, "m"), ("d",)),
        lambda h, k, t: kljax.forward_kl(t, kljax.top_k(kljax.Head(h, k), 3), reduction="mean"),
    ),
    "a teacher of few classes alone": (
        ((), (), ("d",)),
        lambda h, k, t: kljax.reverse_kl(TEACHER * h[0, 0], kljax.top_k(t, 3), reduction="mean"),
    ),
    "each example mapped": (
        (("d", "m"), (), ("d",)),
        lambda h, k, t: jax.vmap(lambda h, t: kljax.kl(kljax.Head(h, k), t))(h, t).sum(),
    ),
    "examples mapped": (
        (("d",), (), ("d",)),
        lambda h, k, t: jax.vmap(
            lambda h, t: kljax.kl(kljax.Head(h[None], k), t[None], reduction="mean")
        )(h, t).sum(),
    ),
}


@pytest.mark.slow(but=["shared logits", "examples mapped", "the kernel of the batch's shape"])
@pytest.mark.parametrize("name", UNEVEN)
def test_heads_beside_what_lies_otherwise(name):
    mesh = jax.make_mesh((2, 4), ("d", "m"))
    specs, program = UNEVEN[name]
    loss, given = jax.jit(jax.value_and_grad(program, (0, 1, 2))), (HIDDEN, CLASSES, TEACHER)
    want = loss(*given)
    with jax.set_mesh(mesh):
        pairs = zip(given, specs, strict=True)
        got = loss(*(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s))) for x, s in pairs))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_no_examples():
    mesh = jax.make_mesh((8,), ("d",))
    on = NamedSharding(mesh, PartitionSpec("d"))
    hidden, teacher = (jax.device_put(jnp.ones((0, n)), on) for n in (8, 16))
    loss = lambda h, k, t: kljax.forward_kl(kljax.Head(h, k), t, reduction="mean")  # noqa: E731
    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, CLASSES, teacher)
    assert value == 0
    assert not np.any(slopes[1])
