"""Two processes compute together what one computes alone; if one dies the other does not wait."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kljax

SECONDS = 120
PROGRAM = """
import json, os, sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import kljax

port, me, dies, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "dies", sys.argv[4]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"localhost:{port}", num_processes=2, process_id=me, initialization_timeout=60,
    heartbeat_timeout_seconds=10,
)
# Both axes go over both processes.
devices = np.array(jax.devices()).reshape(2, 2)
devices = np.array([[devices[0, 0], devices[1, 0]], [devices[1, 1], devices[0, 1]]])
mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
given = np.load(os.path.join(folder, "given.npz"))


def spread(x, spec):
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


split, rows = P("data", "model"), P("data")
arrays = [
    spread(given["student"], split), spread(given["teacher"], split),
    spread(given["labels"], rows), spread(given["weights"], rows),
]


def loss(student, teacher, labels, weights):
    return kljax.distillation_loss(
        student, teacher, labels, temperature=2.0, hard_weight=0.5, weights=weights,
        axis_name="data", class_axis_name="model",
    )


loss = jax.shard_map(loss, mesh=mesh, in_specs=(split, split, rows, rows), out_specs=P())
step = jax.jit(jax.value_and_grad(loss, has_aux=True))
jax.block_until_ready(step(*arrays))
if dies:
    print("ready", flush=True)
    if me == 1:
        os._exit(3)
    for _ in range(100_000):
        jax.block_until_ready(step(*arrays))
(value, metrics), gradient = step(*arrays)
gradient = multihost_utils.process_allgather(gradient, tiled=True)
if me == 0:
    np.savez(os.path.join(folder, "found.npz"), value=value, gradient=gradient, **metrics._asdict())
"""


def start(folder, how):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(me), how, str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for me in range(2)
    ]


def ends(processes):
    """Their outputs, within a bounded time."""
    try:
        return [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def given(rng, tmp_path):
    arrays = {
        "student": rng.normal(size=(6, 10)).astype(np.float32),
        "teacher": rng.normal(size=(6, 10)).astype(np.float32),
        "labels": np.array([0, 9, 4, 5, 3, 7]),
        "weights": np.array([1, 0, 2, 1, 0, 3], np.float32),
    }
    np.savez(tmp_path / "given.npz", **arrays)
    return arrays


@pytest.mark.slow
def test_two_processes_agree_with_one(given, tmp_path):
    """Batch and classes spread over both: loss, every metric, and the gradient."""
    processes = start(tmp_path, "works")
    outputs = ends(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = np.load(tmp_path / "found.npz")

    def loss(student):
        options = {"temperature": 2.0, "hard_weight": 0.5, "weights": jnp.asarray(given["weights"])}
        labels = jnp.asarray(given["labels"], jnp.int32)
        return kljax.distillation_loss(student, jnp.asarray(given["teacher"]), labels, **options)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(given["student"])
    )
    for name, want in {"value": value, "gradient": gradient, **metrics._asdict()}.items():
        np.testing.assert_allclose(found[name], want, rtol=2e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("given")
def test_a_process_that_dies_ends_the_other(tmp_path):
    """With an error, within a bounded time: never a wrong number, never a wait for ever."""
    processes = start(tmp_path, "dies")
    outputs = ends(processes)
    assert processes[1].returncode == 3
    assert processes[0].returncode not in (0, None)
    assert "ready" in outputs[0]
    assert any(word in outputs[0].lower() for word in ("gloo", "connection", "heartbeat", "peer"))
    assert not (tmp_path / "found.npz").exists()
