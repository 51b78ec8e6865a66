"""Blocks of examples cover a batch once, whatever its shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kljax
from kljax._engine import lowering
from kljax._engine.blocks import Blocks, exactly, fitting, rescale, sweep, whole

CUTS = [
    whole((5, 3)),
    Blocks((12,), (4,)),  # every third row
    Blocks((13,), (4,)),  # neighbours, and one of the rest
    Blocks((6, 10), (3, 2)),
    Blocks((6, 11), (3, 2)),  # one axis cut evenly, the other with a rest
    Blocks((7, 4), (7, 2)),
]


@pytest.mark.slow(but=["float32-(13,)-(4,)", "bfloat16-(6, 11)-(3, 2)"])
@pytest.mark.parametrize("blocks", CUTS, ids=lambda b: f"{b.batch}-{b.extents}")
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_sweep_sees_each_row_once(blocks, dtype):
    """Rows come back in their places, sums count each once; what is shared is passed as it is."""
    n = len(blocks.batch)
    x = jnp.arange(math.prod(blocks.batch) * 2).reshape(2, *blocks.batch).astype(dtype)
    axes = tuple(range(1, n + 1))
    ones, shared = jnp.ones((1,) * n), jnp.float32(3)

    def body(block):
        x, ones, shared = block
        y = x.astype(jnp.float32) * shared + ones
        return [jnp.sum(y)], [y.astype(dtype), jnp.sum(y, 0)]

    leaves, leaf_axes = [x, ones[None], shared], [axes, axes, None]
    out_axes = [axes, tuple(range(n))]
    want = body(leaves)
    got = jax.jit(lambda *leaves: sweep(blocks, leaves, leaf_axes, body, out_axes))(*leaves)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    for factor in (1.0, 0.5):
        scaled = jax.jit(lambda x, c: rescale(blocks, axes, x, c))(x, jnp.float32(factor))
        np.testing.assert_array_equal(scaled, x * jnp.asarray(factor, dtype))


def test_mapped_factors_scale_each_its_own():
    """Also where only the factor is mapped, or only the array."""
    x, factors = jnp.arange(12.0).reshape(12, 1), jnp.array([1.0, 2.0])
    scale = lambda x, c: rescale(CUTS[1], (0,), x, c)  # noqa: E731
    want = np.stack([x, 2 * x])
    np.testing.assert_array_equal(jax.vmap(scale, (None, 0))(x, factors), want)
    both = jnp.stack([x, x])
    np.testing.assert_array_equal(jax.vmap(scale)(both, factors), want)
    np.testing.assert_array_equal(jax.vmap(scale, (0, None))(both, factors[1]), 2 * both)


@pytest.mark.parametrize(
    "batch", [(1024,), (1000,), (1021,), (8, 2048), (16, 1021), (37, 1021), (3, 5), (64, 64, 64)]
)
@pytest.mark.parametrize("rows", [1, 16, 256])
def test_blocks_fit(batch, rows):
    """Nothing is left out, at most one axis has a rest, and a block is about as large as asked."""
    for blocks in (fitting(batch, rows), exactly(batch, rows)):
        uneven = [n % e for n, e in zip(batch, blocks.extents, strict=True) if n % e]
        assert len(uneven) <= 1
        assert (blocks.rest is None) == (not uneven)
        assert all(0 < e <= n for n, e in zip(batch, blocks.extents, strict=True))
    assert math.prod(exactly(batch, rows).extents) <= rows
    # An axis keeps 8 rows or so, for as many devices; a block of them is the least there is.
    assert math.prod(fitting(batch, rows).extents) <= max(2 * rows, 16 ** len(batch))


def test_a_batch_of_a_power_of_two_is_cut_for_devices():
    """Each block of 1024 rows takes rows of every eighth of the batch."""
    assert fitting((1024,), 16).extents == (16,)
    assert fitting((8, 2048), 16).extents == (8, 8)


def test_narrow_gradients_add_up_over_many_blocks():
    """A shared bfloat16 side: its gradient is a long sum, which bfloat16 itself would lose."""
    x, y = jnp.zeros(5, jnp.bfloat16), jnp.tile(jnp.array([0.0, 0, 0, 0, 3]), (2000, 1))

    def slope(implementation):
        loss = lambda x: kljax.forward_kl(x, y, reduction="sum", implementation=implementation)  # noqa: E731
        return np.asarray(jax.grad(loss)(x), np.float32)

    np.testing.assert_allclose(slope(kljax.Chunked(rows=1)), slope("dense"), rtol=0.02)


def test_a_loss_scale_beyond_16_bits():
    """float16 gradients of a loss scaled by more than float16 holds."""
    x = jnp.array([[0.0, 1e-3], [1e-3, 0.0]], jnp.float16)
    y = x[:, ::-1]

    def slope(implementation):
        def loss(x):
            return 2.0**17 * kljax.forward_kl(x, y, reduction="mean", implementation=implementation)

        return np.asarray(jax.grad(loss)(x), np.float32)

    assert np.isfinite(slope("dense")).all()
    np.testing.assert_allclose(slope(kljax.Chunked(rows=1)), slope("dense"), rtol=0.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_narrow_indices_of_a_top_k(dtype):
    """The number of classes need not fit the indices' own dtype."""
    x = jnp.arange(256.0) / 100
    teacher = kljax.TopK(jnp.array([3, 100], dtype), jnp.log(jnp.array([0.5, 0.25])))
    wide = kljax.TopK(jnp.array([3, 100]), teacher.log_probs)
    np.testing.assert_array_equal(kljax.forward_kl(x, teacher), kljax.forward_kl(x, wide))


@pytest.mark.parametrize("count", [1, 8])
def test_the_number_of_devices_is_known_when_a_program_is_lowered(count):
    """If this fails, `kljax/_engine/lowering.py` reads what JAX has moved."""
    seen = []

    def on(platform, devices):
        seen.append((platform, devices))
        return lambda x: 2 * x

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("d",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.arange(8.0), spread)
    f = jax.jit(lambda x: lowering.choose(on, x, x))
    np.testing.assert_array_equal(f(x), 2 * np.arange(8))
    assert set(seen) == {("cpu", count)}
    np.testing.assert_array_equal(jax.vmap(f)(x[:, None]), 2 * np.arange(8)[:, None])


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("cut", [fitting((64, 3), 24), exactly((10,), 4)])
def test_whichever_rows_a_block_takes(cut, neighbours):
    """All rows once, in their places."""
    cut = cut._replace(neighbours=neighbours, cut_once=False)
    x = jnp.arange(2.0 * np.prod(cut.batch)).reshape(*cut.batch, 2)
    axes = tuple(range(len(cut.batch)))
    body = lambda block: ([block[0].sum()], [jnp.sin(block[0]).sum(-1)])  # noqa: E731
    (total,), (rows,) = jax.jit(lambda x: sweep(cut, [x], [axes], body, [axes]))(x)
    np.testing.assert_allclose(total, x.sum())
    np.testing.assert_array_equal(rows, jnp.sin(x).sum(-1))
