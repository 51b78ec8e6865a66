"""The counter of bytes, on programs whose bytes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from benchmarks import hlo

N, V = 64, 512
x = jnp.ones((N, V), jnp.float32)
SIZE = 4 * N * V


def counted(f, *arguments):
    return hlo.count(jax.jit(f).lower(*arguments).compile().as_text())


def test_one_read_and_one_write():
    found = counted(lambda x: jnp.sin(x) * 2 + 1, x)
    assert found.bytes == 2 * SIZE
    assert found.largest == 0
    assert found.operations >= 3 * N * V


def test_two_passes_of_a_sum_that_is_needed_first():
    found = counted(lambda x: x / x.sum(-1, keepdims=True), x)
    assert found.bytes == pytest.approx(3 * SIZE, rel=0.02)


def test_what_is_stored_in_between():
    a = jnp.ones((N, N), jnp.float32)
    chained = counted(lambda a, b, c: (a @ b) @ c, a, 2 * a, 3 * a)
    assert chained.largest == a.nbytes
    assert chained.bytes == 6 * a.nbytes


@pytest.mark.parametrize("turns", [3, 11])
def test_a_loop_counts_its_turns(turns):
    found = counted(lambda x: lax.fori_loop(0, turns, lambda _, x: jnp.sin(x), x), x)
    assert found.loops == [turns]
    assert 2 * turns * SIZE <= found.bytes <= (2 * turns + 4) * SIZE


def test_a_loop_over_parts_reads_and_writes_each_part_once():
    def f(x):
        def step(k, out):
            part = lax.dynamic_slice(x, (8 * k, 0), (8, V))
            return lax.dynamic_update_slice(out, jnp.sin(part), (8 * k, 0))

        return lax.fori_loop(0, N // 8, step, jnp.zeros_like(x))

    found = counted(f, x)
    assert found.loops == [N // 8]
    assert 2 * SIZE <= found.bytes <= 4.1 * SIZE


def test_a_collective_counts_its_size():
    mesh = Mesh(np.array(jax.devices()[:8]), ("d",))
    split = PartitionSpec("d")

    def f(x):
        return lax.fori_loop(0, 5, lambda _, y: jnp.sin(lax.psum(y, "d")) + x, x)

    f = jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split)
    found = counted(f, x)
    assert list(found.collectives) == ["all-reduce"]
    assert found.collectives["all-reduce"] == [(SIZE / 8, 5)]


def test_what_is_not_in_memory_is_not_moved():
    text = """
ENTRY %main (p: f32[8,16]) -> f32[8,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %c = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%c)
  ROOT %n = f32[8,16]{1,0} negate(%d)
}
"""
    assert hlo.count(text).bytes == 2 * 8 * 16 * 4


def test_turns_that_are_not_known():
    with pytest.raises(ValueError, match="turns of the loop"):
        counted(lambda n, x: lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x), 3, x)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("(f32[4]{0}, s8[3]{0}, pred[])", 20),
        ("f8e4m3fn[5]{0}", 5),
        ("s4[6]{0}", 3),
    ],
)
def test_bytes_of_types(shape, size):
    assert sum(array.bytes for array in hlo.arrays(shape)) == size
