"""examples/distill_sharded.py: its layouts give what one device gives; killed, it goes on."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

for needed in ("flax", "grain", "matplotlib", "tqdm"):
    pytest.importorskip(needed)
ocp = pytest.importorskip("orbax.checkpoint")

EXAMPLES = Path(__file__).parents[1] / "examples"
SECONDS = 120
STEPS = ["--steps", "8", "60"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("distill_sharded")


def models(example, args):
    """Shapes of the parameters of student and teacher."""
    key = jax.random.key(0)
    sizes = args.student, args.teacher
    return [jax.eval_shape(partial(example.init, size=size, args=args), key) for size in sizes]


def one_device(example, args, student, teacher, tokens):
    """The loss in plain JAX, from logits."""

    def logs(params, temperature):
        logits = example.transformer(params, tokens[:, :-1]) @ params["output"].T
        return jax.nn.log_softmax(logits / temperature)

    log_s, log_t = (logs(params, args.temperature) for params in (student, teacher))
    soft = args.temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    hard = -jnp.take_along_axis(logs(student, 1.0), tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(args.soft_weight * soft + args.hard_weight * hard)


@pytest.mark.slow(but=["vocabulary-mesh0"])
@pytest.mark.parametrize("mesh", [(4, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("shard", ["fsdp", "vocabulary"])
def test_layouts_agree_with_one_device(example, rng, shard, mesh):
    """Loss and gradients; these lie where the parameters lie."""
    args = example.parse_arguments(["--quick", "--shard", shard, "--temperature", "2"])
    mesh = jax.make_mesh(mesh, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    student, teacher = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / x.shape[-1] ** 0.5, x.dtype),
        models(example, args),
    )
    tokens = jnp.asarray(rng.integers(args.vocabulary, size=(16, args.context + 1)), jnp.int32)
    loss = example.training_loss(args, mesh)
    plain = jax.value_and_grad(lambda s: one_device(example, args, s, teacher, tokens))
    want = jax.jit(plain)(student)
    got = jax.jit(jax.value_and_grad(lambda s: loss([s, teacher], tokens)))(student)
    jax.tree.map(assert_close, got, want)
    specs = example.spread(student, args, mesh)
    expected = {"fsdp": (P(None, "data"), P(None, None, "data")), "vocabulary": (P("model"), P())}
    assert (specs["output"], specs["up"]) == expected[shard]
    for name, gradient in got[1].items():
        spec = jax.sharding.NamedSharding(mesh, specs[name])
        assert gradient.sharding.is_equivalent_to(spec, gradient.ndim), name


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["fsdp", "vocabulary"])
def test_logits_are_never_whole(example, shard):
    """By the compiled loss and gradient: all they need is less than the logits of one side."""
    options = ["--shard", shard, "--bytes-per-token", "2", "--batch-size", "2048"]
    args = example.parse_arguments(options)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    tokens = jax.ShapeDtypeStruct((args.batch_size, args.context + 1), jnp.int32)
    loss = example.training_loss(args, mesh)
    gradient = jax.jit(jax.value_and_grad(lambda s, t, tokens: loss([s, t], tokens)))
    needed = gradient.lower(*models(example, args), tokens).compile().memory_analysis()
    logits = args.batch_size * args.context * args.vocabulary * 4 / mesh.size
    assert 0 < needed.temp_size_in_bytes < logits / 2


def start(output, *options):
    """The script; it compiles what an earlier one did not."""
    command = [sys.executable, "-W", "error", EXAMPLES / "distill_sharded.py", "--quick"]
    command += [*STEPS, "--output", output, *options]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(output.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log_of(output).open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def log_of(output):
    return output.parent / f"{output.name}.log"


def finish(output, *options):
    process = start(output, *options)
    try:
        code = process.wait(timeout=SECONDS)
    finally:
        process.kill()
    assert code == 0, log_of(output).read_text()
    return (output / "results.json").read_text()


def kill_distilling(output, *options):
    """Starts, and kills once the student that is distilled has a checkpoint."""
    process, end = start(output, *options), time.monotonic() + SECONDS
    try:
        while not checkpoints(output):
            assert process.poll() is None, log_of(output).read_text()
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "results.json").exists()


def checkpoints(output):
    """Of the distilled student, by step."""
    found = (output / "checkpoints" / "distilled").glob("*")
    return {int(path.name): path / "state" for path in found if path.name.isdigit()}


def last(output):
    step = max(checkpoints(output))
    return step, ocp.StandardCheckpointer().restore(checkpoints(output)[step])


@pytest.mark.slow
def test_killed_it_ends_in_the_same_numbers(example, tmp_path):
    """Results, parameters, Adam's moments: bit for bit. On another mesh up to rounding.

    With other arguments it does not go on.
    """
    whole, killed, moved = (tmp_path / name for name in ("whole", "killed", "moved"))
    want = finish(whole, "--devices", "4")
    kill_distilling(killed, "--devices", "4")
    step = max(checkpoints(killed))
    shutil.copytree(killed, moved)

    assert finish(killed, "--devices", "4") == want
    (got_step, got_state), (want_step, want_state) = last(killed), last(whole)
    assert 0 < step < got_step == want_step
    jax.tree.map(np.testing.assert_array_equal, got_state, want_state)
    assert {*want_state["params"]} >= {"embedding", "output"}

    got = json.loads(finish(moved, "--devices", "1", "--shard", "vocabulary"))
    for name, course in json.loads(want)["bits per byte"].items():
        assert len(course) > 5
        assert got["bits per byte"][name] == pytest.approx(course, rel=1e-4)

    other = ["--quick", *STEPS, "--output", str(whole), "--temperature", "2"]
    with pytest.raises(SystemExit, match="was begun with other arguments"):
        example.main(other)
