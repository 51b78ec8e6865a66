"""What a TPU program reads and writes, from the TPU's compiler, without a TPU.

Needs the package libtpu, which `pip install 'jax[tpu]'` brings. In a process of its own, for the
compiler reads its settings once: `python -m benchmarks.tpu_bytes`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax

from benchmarks.cases import Case, structs
from benchmarks.peers import kljax_loss, plain

_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_CASE = Case("logits", "forward_kl", "bfloat16", 4096, 65_536)


def in_another_process(timeout: float = 600) -> dict[str, float] | str:
    """Bytes over the floor of three passes, by contender, or why there is no number."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed"
    command = [sys.executable, "-m", "benchmarks.tpu_bytes"]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **_SETTINGS},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"the compiler took longer than {timeout:g} s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def over_floor() -> dict[str, float]:
    """Bytes accessed by value and gradient, in units of two reads and one write."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    on_one = jax.sharding.SingleDeviceSharding(topology.devices[0])
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_one), structs(_CASE)
    )
    found = {}
    for name, loss in {"kljax": kljax_loss(_CASE), "plain formula": plain(_CASE)}.items():
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()
        found[name] = _bytes_accessed(compiled) / (3 * _CASE.logits_bytes)
    return found


def _bytes_accessed(compiled: Any) -> float:
    if " while(" in compiled.as_text():
        raise NotImplementedError("the compiler counts a loop's body once, whatever its trips")
    return compiled.cost_analysis()["bytes accessed"]


if __name__ == "__main__":
    print(json.dumps(over_floor()))
