"""Accelerators to compile for on a machine that has none: one process for each.

TPU programs need the package libtpu, NVIDIA ones jax-cuda13-plugin and nvidia-cuda-nvcc.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """What the compiler is told of a device: a topology's name, or numbers from its data sheet."""

    platform: str
    topology: str
    needs: tuple[str, ...]  # packages
    config: str = ""

    @property
    def missing(self) -> str:
        """Why nothing can be compiled for it here; empty if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else ""


# A TPU compiler reads these when it is loaded.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_NVIDIA = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 13 }}
"""


def _tpu(topology: str) -> Target:
    return Target("tpu", topology, ("libtpu",))


def _nvidia(bandwidth: int, memory: int) -> Target:
    config = _NVIDIA.format(bandwidth=bandwidth, memory=memory)
    return Target("cuda", "1x1x1", ("jax_plugins.xla_cuda13", "nvidia"), config)


TARGETS = {
    "v5e": _tpu("v5e:2x2"),
    "v6e": _tpu("v6e:2x2"),
    "tpu7x": _tpu("tpu7x:2x2x1"),
    "v5e-16": _tpu("v5e:4x4"),
    "v5e-64": _tpu("v5e:8x8"),
    "H100": _nvidia(3_350_000_000_000, 80_000_000_000),
    "H200": _nvidia(4_800_000_000_000, 141_000_000_000),
}


def devices(name: str) -> Sequence[Any]:
    """The devices of a target, to give to shardings."""
    from jax.experimental import topologies

    target = TARGETS[name]
    options = {"target_config": target.config} if target.config else {}
    kind = dict(platform=target.platform, topology_name=target.topology)
    if target.config:
        kind = {"platform": target.platform, "topology": target.topology}
    return topologies.get_topology_desc(**kind, **options).devices


def on_one(name: str, shapes: Any) -> Any:
    """Arguments to lower with, on one device of a target."""
    here = jax.sharding.SingleDeviceSharding(devices(name)[0])
    struct = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)  # noqa: E731
    return jax.tree.map(struct, shapes)


def in_another_process(module: str, target: str, *options: str, timeout: float = 900) -> Any:
    """What `python -m module target` prints last, read as JSON; or in words why there is nothing.

    Results of one target leak into the next in the same process, and a compiler may abort it.
    """
    if missing := TARGETS[target].missing:
        return missing
    command = [sys.executable, "-m", module, "--only", target, *options]
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"the compiler took longer than {timeout:g} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])
