"""examples/distill_training.py: interrupted it goes on; micro-batches give what a batch gives."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

for needed in ("flax", "matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(needed)
ocp = pytest.importorskip("orbax.checkpoint")

EXAMPLES = Path(__file__).parents[1] / "examples"
ARMS = ("mean teacher", "T falls, bf16 all")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"):  # as for users: optax's Adam needs it
        yield importlib.import_module("distill_training")


class Interruption(Exception):
    pass


def interrupt(example, arguments, evaluations):
    """Runs, until so many evaluations were made."""
    left, accuracies = iter(range(evaluations - 1)), example.accuracies

    def interrupted(*given):
        if next(left, None) is None:
            raise Interruption
        return accuracies(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "accuracies", interrupted)
        with pytest.raises(Interruption):
            example.main(arguments)


def saved(output):
    """What every training's last checkpoint holds, by its name and step."""
    states = (output / "checkpoints").glob("*/*/state")
    return {
        (path.parts[-3], int(path.parts[-2])): ocp.StandardCheckpointer().restore(path)
        for path in states
    }


@pytest.mark.slow
def test_interrupted_it_ends_in_the_same_numbers(example, tmp_path):
    """Results, parameters, Adam's moments, averages: bit for bit; each student stopped once.

    Four evaluations a training, of which the second and the last are saved. With other arguments
    it does not go on.
    """
    whole, stopped = (
        ["--quick", "--arms", *ARMS, "--output", str(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    example.main(whole)
    interrupt(example, stopped, evaluations=4 + 3)
    assert {*saved(tmp_path / "stopped")} == {("teacher", 44), ("mean-teacher", 22)}
    interrupt(example, stopped, evaluations=2 + 3)
    assert ("T-falls-bf16-all", 22) in saved(tmp_path / "stopped")
    example.main(stopped)

    want, got = (saved(tmp_path / name) for name in ("whole", "stopped"))
    assert len(want) == 1 + len(ARMS)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for name in ("results.json", "results.md"):
        assert (tmp_path / "stopped" / name).read_text() == (tmp_path / "whole" / name).read_text()

    with pytest.raises(SystemExit, match="was begun with other arguments"):
        example.main([*whole, "--decay", "0.9"])


def drawn(example, arm):
    """An epoch's last batch, half of it padding, and the loss of a new student."""
    args = example.parse_arguments(["--quick"])
    train, _, seen = example.load(args)
    logits = np.random.default_rng(0).normal(size=train.teacher_logits.shape)
    train = example.Digits(
        train.images, np.where(seen, train.labels, -1), logits.astype(np.float32)
    )
    keys, last = example.keys_of(args), jnp.full(args.seeds, 10)
    batch = example.draw(train, keys, last, batch_size=args.batch_size)
    batch, state = jax.tree.map(lambda x: x[0], (batch, example.start(arm, keys, args)))
    graph = example.nnx.graphdef(example.Perceptron(arm.width, example.nnx.Rngs(0)))
    return example.make_loss(arm, graph, state.params, last[0]), graph, state.params, batch


def plain_loss(example, graph, params, batch, temperature):
    """Of the whole batch, in plain JAX."""
    logits = example.nnx.merge(graph, params)(batch["noisy"])
    log_t, log_s = (jax.nn.log_softmax(x / temperature) for x in (batch["teacher_logits"], logits))
    soft = temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    labels = jnp.maximum(batch["labels"], 0)[:, None]
    hard = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=-1)[:, 0]
    soft, hard = (
        jnp.sum(x, where=where) / jnp.sum(where, dtype=jnp.float32)
        for x, where in ((soft, batch["weights"]["soft"]), (hard, batch["weights"]["hard"]))
    )
    return soft + 0.1 * hard


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 4, 32])
def test_micro_batches_give_what_one_batch_gives(example, microbatches):
    """Loss and gradient, where most micro-batches have no label; a mean of means does not."""
    arm = example.make_arms(example.parse_arguments(["--quick"]))["T falls"]
    loss, graph, params, batch = drawn(example, arm)
    labelled = np.asarray(batch["weights"]["hard"]).reshape(-1, microbatches).sum(0)
    assert labelled.sum() > 0
    assert microbatches < 32 or np.any(labelled == 0)

    temperature = arm.distill.temperature(jnp.asarray(10))
    plain = jax.value_and_grad(lambda p: plain_loss(example, graph, p, batch, temperature))
    want, want_gradient = jax.jit(plain)(params)
    accumulated = example.training.accumulated_value_and_grad(
        loss, microbatches, weights=lambda batch: batch["weights"]
    )
    (got, _), gradient = jax.jit(accumulated)(params, batch)
    assert_close(got, want)
    jax.tree.map(assert_close, gradient, want_gradient)
    if microbatches == 4:
        naive = example.mean_of_means(loss, microbatches, params, batch)
        assert example.largest_difference(naive, want_gradient) > 1e-3
