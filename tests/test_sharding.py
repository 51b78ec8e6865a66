"""Meshes of both kinds of axes: sharded inputs give what whole ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kljax

LABELS = np.arange(16) % 4
WEIGHTS = np.arange(16, dtype=np.float32) % 3
WHERE = np.array([True, True, True, False])

CASES = {
    "both sharded": lambda x, y, whole: kljax.forward_kl(x, y, reduction="mean"),
    "a replicated teacher": lambda x, y, whole: kljax.reverse_kl(x, whole, reduction="mean"),
    "a shared teacher": lambda x, y, whole: kljax.jensen_shannon(x, whole[0], reduction="mean"),
    "mask, weights, temperature": lambda x, y, whole: kljax.forward_kl(
        x, y, where=WHERE, weights=WEIGHTS, temperature=2.0, reduction="mean"
    ),
    "labels": lambda x, y, whole: kljax.cross_entropy(x, LABELS, reduction="sum"),
    "distillation": lambda x, y, whole: kljax.distillation_loss(
        x, whole, LABELS, hard_weight=0.5, temperature=2.0, weights=WEIGHTS
    )[0],
    "vmap": lambda x, y, whole: jax.vmap(kljax.forward_kl)(x, y).sum(),
    "a term that captures": lambda x, y, whole: kljax.divergence(
        lambda s, t: whole[0, 0] * kljax.term_kl(t, s)
    )(x, y, reduction="mean"),
}


@pytest.mark.slow(
    but=["both sharded-Explicit", "mask, weights, temperature-Auto", "distillation-Explicit"]
)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_on_a_mesh(rng, case, axis_type):
    """The batch over 8 devices, on axes that the compiler or that the user manages."""
    whole_x, whole_y = (jnp.asarray(rng.normal(size=(16, 4)), jnp.float32) for _ in range(2))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    loss = jax.jit(jax.value_and_grad(CASES[case]))
    want, want_gradient = loss(whole_x, whole_y, whole_y)
    with jax.set_mesh(mesh):
        x, y = (jax.device_put(z, sharding) for z in (whole_x, whole_y))
        got, gradient = loss(x, y, whole_y)
    assert_close(got, want)
    assert_close(gradient, want_gradient)
    assert gradient.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.slow(but=["Explicit"])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda t: t.name)
def test_few_classes_on_a_mesh(rng, axis_type):
    """A teacher's best classes and samples, of logits and of a head, are those of one device."""
    hidden, kernel = (jnp.asarray(rng.normal(size=z), jnp.float32) for z in ((16, 3), (3, 8)))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))

    def few(hidden):
        for teacher in (kljax.Head(hidden, kernel), jnp.einsum("bh,hv->bv", hidden, kernel)):
            yield kljax.top_k(teacher, 2)
            yield kljax.sample_targets(jax.random.key(0), teacher, 5)

    of_all = jax.jit(lambda hidden: [(t.indices, t.log_probs) for t in few(hidden)])
    want = of_all(hidden)
    with jax.set_mesh(mesh):
        got = of_all(jax.device_put(hidden, NamedSharding(mesh, PartitionSpec("batch"))))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("shared", [kljax.LogProbs, kljax.Probs], ids=lambda kind: kind.__name__)
def test_a_shared_side_in_blocks_of_a_shard(rng, shared):
    """Taken at its word, and the same for all examples, which vary over the mesh."""
    hidden, kernel = (jnp.asarray(rng.normal(size=z), jnp.float32) for z in ((16, 3), (3, 4)))
    given = jax.nn.softmax(jnp.arange(4.0))
    given = jnp.log(given) if shared is kljax.LogProbs else given
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def loss(hidden, kernel, given, **options):
        rows = kljax.Chunked(rows=1)
        side = kljax.Head(hidden, kernel)
        return kljax.reverse_kl(
            side, shared(given), reduction="mean", implementation=rows, **options
        )

    spread = jax.shard_map(
        lambda *args: loss(*args, axis_name="batch"),
        mesh=mesh,
        in_specs=(PartitionSpec("batch"), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    want = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, given)
    got = jax.jit(jax.value_and_grad(spread, (0, 1, 2)))(hidden, kernel, given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)


def test_shared_logits_beside_those_of_a_shard(rng):
    x, y = (jnp.asarray(rng.normal(size=z), jnp.float32) for z in ((16, 4), (4,)))
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda *args: kljax.forward_kl(*args, reduction="mean", axis_name="batch"),
        mesh=mesh,
        in_specs=(PartitionSpec("batch"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    want = jax.grad(lambda *args: kljax.forward_kl(*args, reduction="mean"), (0, 1))(x, y)
    got = jax.jit(jax.grad(spread, (0, 1)))(x, y)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
