"""Compiled ahead of time for a TPU that is not there: how often the logits pass through memory.

Needs the TPU compiler alone, which `pip install 'jax[tpu]'` brings.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import kljax

N, V = 4096, 65536
FLOOR = 3 * N * V * 2  # two inputs read and one gradient written, in bfloat16


@pytest.fixture(scope="module")
def chip():
    """One v5e chip, to compile for."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_LOG_DIR": "disabled",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }.items():
            patch.setenv(name, value)
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
        yield NamedSharding(Mesh(np.array(devices[:1]), ("chip",)), PartitionSpec())


def compiled(f, chip):
    x = jax.ShapeDtypeStruct((N, V), jnp.bfloat16, sharding=chip)
    return jax.jit(f).lower(x, x).compile()


def passes(executable):
    return executable.cost_analysis()["bytes accessed"] / FLOOR


def is_widened(executable):
    """Whether an instruction stores a float32 array as large as the logits."""
    text = executable.as_text()
    return f"f32[{N},{V}]" in text[text.index("\nENTRY") :]


def plain_forward_kl(s, t):
    log_s, log_t = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (s, t))
    return jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1).mean()


@pytest.mark.slow(but=["plain"])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}], ids=["plain", "temperature"])
def test_two_reads_and_a_write_of_the_gradient(chip, options):
    """Row statistics in one pass, and value and gradient in another."""
    loss = lambda s, t: kljax.forward_kl(s, t, reduction="mean", **options)  # noqa: E731
    ours = compiled(jax.value_and_grad(loss), chip)
    assert passes(ours) <= 1.7
    assert not is_widened(ours)


@pytest.mark.slow
def test_the_plain_formula_takes_more(chip):
    """What is measured above is there to be seen."""
    assert passes(compiled(jax.value_and_grad(plain_forward_kl), chip)) > 1.7
    assert is_widened(compiled(lambda s, t: jax.nn.softmax(s.astype(jnp.float32)), chip))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "skew_forward_kl"])
def test_one_more_pass_for_a_sum_over_the_classes(chip, name):
    """Where the gradient needs the value or a sum of its own; still no wide copy."""
    loss = lambda s, t: getattr(kljax, name)(s, t, reduction="mean")  # noqa: E731
    ours = compiled(jax.value_and_grad(loss), chip)
    assert passes(ours) <= 2.4
    assert not is_widened(ours)
