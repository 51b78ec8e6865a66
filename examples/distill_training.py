r"""Distillation of handwritten digits, built whole on `kljax.training`: one step, jitted once.

A wide perceptron learns from every label; narrow students learn from it, or from themselves, with a
few labels per class. One step serves all of them. In it are

    schedules         `training.Distillation`: the temperature, or the weight of the soft targets,
                      is an optax schedule of the step
    micro-batches     `training.accumulated_value_and_grad`: the last batch of an epoch is padded
                      and few images have labels, so soft and hard term get a denominator each,
                      that of the whole batch
    a moving average  `training.ema_teacher`: evaluated beside the student in every row, and the
                      "mean teacher" learns from its own
    bfloat16          in the computation, with float32 parameters ("master weights"), or in the
                      parameters and Adam's moments too; the average stays float32

The rows differ in one of these each, and share parameters to begin with, batches, and a constant
learning rate, which leaves it to the average to calm the noise of the last steps. All seeds train
at once, side by side in one array.

What helps, over five seeds: the teacher most; without one the mean teacher, and there the average
too. What does not: the falling temperature ends where T = 1 does, ahead of T = 8 alone. And what
costs no accuracy: bfloat16, in a model this small. Micro-batches give the gradient of one batch to
rounding, which grows from step to step, in the parameters but not in the accuracy. Images carry
noise of 0.2 in training; without it the mean teacher does not help (81.6% against 83.4).

Orbax saves parameters, optimizer with average, step and the course so far. Batches and
the noise on their images are functions of seed and step, so the step is the position in their order
too. Killed and run again with the same --output, it goes on and ends in the same numbers, bit for
bit.

    python examples/distill_training.py             # about a minute on two CPU cores
    python examples/distill_training.py --quick     # a smoke run
    python examples/distill_training.py --arms "labels only" "mean teacher" --steps 3000

Needs jax, flax, optax, orbax-checkpoint, scikit-learn (it bundles the digits), matplotlib and
tqdm. Writes checkpoints/, results.md, results.json and two figures into the folder named by
--output.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from kljax import training

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

Args = argparse.Namespace
Tree = Any  # of arrays
Batch = dict[str, Any]
CLASSES = 10
NOISE = 0.2  # standard deviation, of what is added to every pixel that a student sees
FREE = ("output", "arms", "save_every")  # may differ where a run goes on
QUICK = {"seeds": 2, "steps": 44, "evaluate_every": 11, "save_every": 2}
QUICK |= {"arms": ("mean teacher", "T falls", "T falls, one batch")}


class Digits(NamedTuple):
    """Of every seed, one after the other on the first axis."""

    images: Array | np.ndarray  # [seeds, N, 8, 8], from 0 to 1
    labels: Array | np.ndarray  # [seeds, N]; -1 where it is hidden
    teacher_logits: Array | np.ndarray  # [seeds, N, classes]


class State(NamedTuple):
    """All that a training must find again, but for its course."""

    params: Tree
    optimizer: Tree
    step: Array


class Log(NamedTuple):
    loss: Array
    divergence: Array  # KL from the teacher, at T = 1


@dataclass(frozen=True)
class Arm:
    """What the trainings differ in."""

    distill: training.Distillation
    learns_from_itself: bool = False
    microbatches: int = 4
    dtype: Any = jnp.float32  # of the computation
    param_dtype: Any = jnp.float32
    width: int = 32


@dataclass
class Run:
    """This is what a checkpoint holds."""

    state: State
    course: dict[str, list[Any]] = field(default_factory=dict)


def make_arms(args: Args) -> dict[str, Arm]:
    ramp = optax.linear_schedule(0.0, args.soft_weight, args.steps // 4)
    labels_only = training.Distillation(soft_weight=0.0, hard_weight=1.0)
    mean_teacher = training.Distillation(soft_weight=ramp, hard_weight=1.0)

    def distilled(temperature: Any) -> training.Distillation:
        weights = {"soft_weight": args.soft_weight, "hard_weight": args.hard_weight}
        return training.Distillation(temperature=temperature, **weights)

    hot, cold = args.temperatures
    falling = distilled(optax.linear_schedule(hot, cold, args.steps))
    arms = {
        "teacher": Arm(labels_only, microbatches=1, width=256),
        "labels only": Arm(labels_only),
        "mean teacher": Arm(mean_teacher, learns_from_itself=True),
        f"T = {cold:g}": Arm(distilled(cold)),
        f"T = {hot:g}": Arm(distilled(hot)),
        "T falls": Arm(falling),
        "T falls, one batch": Arm(falling, microbatches=1),
        "T falls, bf16 compute": Arm(falling, dtype=jnp.bfloat16),
        "T falls, bf16 all": Arm(falling, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16),
    }
    if unknown := {*args.arms} - {*arms}:
        raise SystemExit(f"error: --arms: {unknown} not in {[*arms]}")
    return {name: arm for name, arm in arms.items() if name in ("teacher", *(args.arms or arms))}


class Perceptron(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.first, self.second = linear(64, width), linear(width, width)
        self.head = linear(width, CLASSES)

    def __call__(self, images: Array) -> Array:
        x = nnx.relu(self.first(images.reshape(*images.shape[:-2], 64)))
        return self.head(nnx.relu(self.second(x)))


def load(args: Args) -> tuple[Digits, Digits, np.ndarray]:
    """Training and test images of every seed, and which training labels students see."""
    digits: Any = load_digits()
    images, labels = digits.images.astype(np.float32) / 16, digits.target.astype(np.int32)
    parts, seen = [], []
    for seed in range(args.seeds):
        parts.append(
            train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=seed)
        )
        order = np.random.default_rng(seed).permutation(len(parts[-1][2]))
        train = parts[-1][2][order]
        few = [order[train == label][: args.labels_per_class] for label in range(CLASSES)]
        seen.append(np.isin(np.arange(len(order)), few))
    train, test, train_labels, test_labels = map(np.stack, zip(*parts, strict=True))

    def untaught(images: np.ndarray, labels: np.ndarray) -> Digits:
        return Digits(images, labels, np.zeros((*labels.shape, CLASSES), np.float32))

    return untaught(train, train_labels), untaught(test, test_labels), np.stack(seen)


def keys_of(args: Args) -> Array:
    return jax.vmap(jax.random.key)(jnp.arange(args.seeds))


@functools.partial(jax.jit, static_argnames="batch_size")
def draw(digits: Digits, keys: Array, steps: Array, *, batch_size: int) -> Batch:
    """The batches of that step: pieces of the epoch's order, the last one padded."""

    def one(digits: Digits, key: Array, step: Array) -> Batch:
        order_key, noise_key = jax.random.split(key)
        size = len(digits.labels)
        epoch, piece = jnp.divmod(step, -(-size // batch_size))
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), size)
        place = piece * batch_size + jnp.arange(batch_size)
        taken = jax.tree.map(lambda x: x[order[place % size]], digits)
        added = jax.random.normal(jax.random.fold_in(noise_key, step), taken.images.shape)
        # Of the soft and of the hard term: each has a denominator of its own.
        weights = {"soft": place < size, "hard": (place < size) & (taken.labels >= 0)}
        return {**taken._asdict(), "noisy": taken.images + NOISE * added, "weights": weights}

    return jax.vmap(one)(digits, keys, steps)


def average_of(state: State) -> Tree:
    return optax.tree.get(state.optimizer, "ema_params")


def make_loss(arm: Arm, graph: Any, average: Tree, step: Array) -> Callable[..., tuple[Array, Any]]:
    """Of the student's parameters, a batch or a micro-batch, and the whole batch's denominators."""

    def loss(params: Tree, batch: Batch, normalizer: Any) -> tuple[Array, Any]:
        teacher_logits = batch["teacher_logits"]
        if arm.learns_from_itself:
            teacher_logits = nnx.merge(graph, average)(batch["images"])
        return arm.distill(
            nnx.merge(graph, params)(batch["noisy"]),
            teacher_logits,  # the loss stops its gradient
            batch["labels"],
            step=step,
            weights=batch["weights"]["soft"],
            normalizer=normalizer["soft"],
            label_weights=batch["weights"]["hard"],
            label_normalizer=normalizer["hard"],
        )

    return loss


def make_optimizer(args: Args) -> optax.GradientTransformation:
    def decay(steps: Array) -> Array:  # the first steps are soon forgotten
        return jnp.minimum(args.decay, (1 + steps) / (10 + steps))

    return training.ema_teacher(optax.adam(args.learning_rate), decay)


def make_step(arm: Arm, graph: Any, args: Args) -> Callable[..., tuple[State, Log]]:
    """Of one seed: a function of state and batch that gives the next state, and what to log."""
    optimizer = make_optimizer(args)

    def step(state: State, batch: Batch) -> tuple[State, Log]:
        loss = make_loss(arm, graph, average_of(state), state.step)
        f = training.accumulated_value_and_grad(
            loss, arm.microbatches, weights=itemgetter("weights")
        )
        (value, metrics), gradients = f(state.params, batch)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        divergence = jnp.average(metrics.divergence, weights=metrics.weight_sum)
        return State(params, moments, state.step + 1), Log(value, divergence)

    return step


@functools.partial(jax.jit, static_argnames="width")
def init(keys: Array, *, width: int) -> Tree:
    """In float32, so that all arms begin with the same numbers."""
    return jax.vmap(lambda key: nnx.state(Perceptron(width, nnx.Rngs(key)), nnx.Param))(keys)


def start(arm: Arm, keys: Array, args: Args) -> State:
    params = jax.tree.map(lambda x: x.astype(arm.param_dtype), init(keys, width=arm.width))
    moments = jax.vmap(make_optimizer(args).init)(params)
    return State(params, moments, jnp.zeros(keys.shape, jnp.int32))


@functools.partial(jax.jit, static_argnames="graph")
def predict(params: Tree, images: Array, *, graph: Any) -> Array:
    return jax.vmap(lambda params, images: nnx.merge(graph, params)(images))(params, images)


def accuracies(state: State, graph: Any, test: Digits) -> dict[str, list[float]]:
    """In percent, of every seed."""

    def accuracy(params: Tree) -> list[float]:
        right = predict(params, test.images, graph=graph).argmax(-1) == test.labels
        return (100 * np.mean(right, axis=1)).tolist()

    return {"student": accuracy(state.params), "average": accuracy(average_of(state))}


def fixed(args: Args) -> dict[str, Any]:
    """The arguments that a run must keep when it goes on, as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in FREE}))


def save(manager: ocp.CheckpointManager, step: int, run: Run, args: Args) -> None:
    notes = ocp.args.JsonSave({"arguments": fixed(args), "course": run.course})
    everything = ocp.args.Composite(notes=notes, state=ocp.args.StandardSave(run.state))
    manager.save(step, args=everything)


def restore(manager: ocp.CheckpointManager, like: Run, args: Args) -> Run:
    """The last one saved, or `like` where there is none."""
    step = manager.latest_step()
    if step is None:
        return like
    notes = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
    if notes["arguments"] != fixed(args):
        raise SystemExit(f"error: --output: {manager.directory} was begun with other arguments")
    state = ocp.args.StandardRestore(like.state)
    return Run(
        manager.restore(step, args=ocp.args.Composite(state=state))["state"], notes["course"]
    )


def fit(
    name: str, arm: Arm, digits: Digits, test: Digits, args: Args, progress: tqdm
) -> tuple[Run, Any]:
    """Trains from the last checkpoint on, if there is one."""
    keys = keys_of(args)
    graph = nnx.graphdef(Perceptron(arm.width, nnx.Rngs(0), arm.dtype))
    state = start(arm, keys, args)
    batch = draw(digits, keys, state.step, batch_size=args.batch_size)
    # Compiled ahead, it is traced once: whatever would need another trace is an error.
    step = jax.jit(jax.vmap(make_step(arm, graph, args))).lower(state, batch).compile()
    folder = args.output.resolve() / "checkpoints" / re.sub(r"\W+", "-", name)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    progress.set_description(name)
    with ocp.CheckpointManager(folder, options=options) as manager:
        run = restore(manager, Run(state), args)
        logs, first = [], int(run.state.step[0])
        progress.update(first)
        for k in range(first + 1, args.steps + 1):
            batch = draw(digits, keys, run.state.step, batch_size=args.batch_size)
            run.state, log = step(run.state, batch)
            logs.append(log)
            if k % args.evaluate_every == 0 or k == args.steps:
                means = jax.tree.map(lambda *x: np.mean(x, axis=0).tolist(), *logs)
                found = {"step": k, **means._asdict(), **accuracies(run.state, graph, test)}
                for what, value in found.items():
                    run.course.setdefault(what, []).append(value)
                logs.clear()
                if len(run.course["step"]) % args.save_every == 0 or k == args.steps:
                    save(manager, k, run, args)
            progress.update()
    return run, graph


def mean_of_means(
    loss: Callable[..., tuple[Array, Any]], microbatches: int, params: Tree, batch: Batch
) -> Tree:
    """What accumulation gives where every micro-batch divides by its own weights."""

    def one(m: int) -> Tree:
        part = jax.tree.map(lambda x: x[m::microbatches], batch)
        own = jax.tree.map(jnp.sum, part["weights"])
        return jax.grad(lambda params: loss(params, part, own)[0])(params)

    return jax.tree.map(lambda *x: sum(x) / microbatches, *map(one, range(microbatches)))


def largest_difference(a: Tree, b: Tree) -> float:
    """Of any number, relative to the largest."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (a, b))
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


def compare_gradients(arm: Arm, digits: Digits, args: Args) -> dict[str, float]:
    """Of an epoch's last batch, of the first seed, from those of the batch at once."""
    keys = keys_of(args)
    last = jnp.full(keys.shape, digits.labels.shape[1] // args.batch_size)
    drawn = draw(digits, keys, last, batch_size=args.batch_size), start(arm, keys, args)
    batch, state = jax.tree.map(lambda x: x[0], drawn)
    graph = nnx.graphdef(Perceptron(arm.width, nnx.Rngs(0)))
    loss = make_loss(arm, graph, state.params, last[0])

    def gradient(microbatches: int) -> Tree:
        f = training.accumulated_value_and_grad(loss, microbatches, weights=itemgetter("weights"))
        return jax.jit(f)(state.params, batch)[1]

    whole, count = gradient(1), arm.microbatches
    naive = jax.jit(functools.partial(mean_of_means, loss, count))(state.params, batch)
    return {
        "gradient, the whole batch's denominators": largest_difference(gradient(count), whole),
        "gradient, each micro-batch's own": largest_difference(naive, whole),
    }


def compare(
    arms: dict[str, Arm], runs: dict[str, Run], digits: Digits, args: Args
) -> dict[str, float]:
    """Micro-batches with one batch, where both were trained."""
    names = ("T falls", "T falls, one batch")
    if not {*names} <= {*runs}:
        return {}
    accumulated, whole = (runs[name].state.params for name in names)
    after = {"parameters after all steps": largest_difference(accumulated, whole)}
    return compare_gradients(arms[names[0]], digits, args) | after


def report(runs: dict[str, Run], differences: dict[str, float], labels: dict[str, int]) -> str:
    """The results as Markdown tables."""
    lines = [
        "| training              | labels | test accuracy, % | of the average, % |",
        "|-----------------------|-------:|-----------------:|------------------:|",
    ]

    def cell(course: dict[str, list[Any]], what: str) -> str:
        last = course[what][-1]
        spread = np.std(last, ddof=1) if len(last) > 1 else np.nan
        return f"{np.mean(last):.1f} ± {spread:.1f}"

    for name, run in runs.items():
        student, average = (cell(run.course, what) for what in ("student", "average"))
        lines.append(f"| {name:<21} | {labels[name]:>6,} | {student:>16} | {average:>17} |")
    if differences:
        lines += [
            "",
            "| 4 micro-batches against one batch        | largest difference |",
            "|------------------------------------------|-------------------:|",
        ]
    lines += [f"| {what:<40} | {value:>18.0e} |" for what, value in differences.items()]
    return "\n".join(lines)


def draw_course(
    axis: Any, course: dict[str, list[Any]], what: str, color: str, **style: Any
) -> None:
    """Mean and, as a band, standard deviation over the seeds."""
    steps, values = course["step"], np.asarray(course[what])
    mean, spread = values.mean(1), values.std(1, ddof=min(1, values.shape[1] - 1))
    axis.plot(steps, mean, color=color, **style)
    axis.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)


def plot_accuracy(runs: dict[str, Run], path: Path) -> None:
    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(1 + 2.5 * columns, 1 + 2.4 * rows),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axis, (name, run) in zip(axes.flat, runs.items(), strict=False):
        for what, color in (("student", "#E69F00"), ("average", "#0072B2")):
            draw_course(axis, run.course, what, color, label=what)
        axis.set_title(name, fontsize="medium")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(runs) :]:
        axis.remove()
    finals = [run.course["average"] for run in runs.values()]
    axes[0, 0].set_ylim(max(0, np.min([final[-1] for final in finals]) - 15), 100)
    axes[0, 0].legend(loc="lower right")
    figure.supxlabel("step")
    figure.supylabel("test accuracy, %")
    figure.suptitle("The students and their moving averages, over the seeds")
    figure.savefig(path, dpi=120)


def plot_schedule(runs: dict[str, Run], arms: dict[str, Arm], path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for (name, run), color in zip(runs.items(), ("#000000", "#56B4E9", "#D55E00"), strict=False):
        temperature, steps = arms[name].distill.temperature, jnp.asarray(run.course["step"])
        values = temperature(steps) if callable(temperature) else np.full(len(steps), temperature)
        left.plot(steps, values, color=color, label=name)
        draw_course(middle, run.course, "loss", color)
        draw_course(right, run.course, "divergence", color)
    left.set(title="Temperature T", xlabel="step")
    middle.set(title="Training loss, with its T²", xlabel="step", ylabel="nats", yscale="log")
    right.set(
        title="KL from the teacher, T = 1",
        xlabel="step",
        ylabel="nats",
        yscale="log",
    )
    left.legend()
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None = None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--temperatures", type=float, nargs=2, default=(8.0, 1.0), metavar=("FIRST", "LAST"))
    add("--soft-weight", type=float, default=1.0, help="weight of the soft targets (1)")
    add("--hard-weight", type=float, default=0.1, help="weight of the labels beside them (0.1)")
    add("--labels-per-class", type=int, default=5, help="labels the students see (5)")
    add("--steps", type=int, default=880, help="of every training (880)")
    add("--batch-size", type=int, default=128, help="a multiple of the 4 micro-batches (128)")
    add("--learning-rate", type=float, default=0.01, help="of Adam (0.01)")
    add("--decay", type=float, default=0.99, help="of the moving average (0.99)")
    add("--seeds", type=int, default=5, help="how many seeds, from 0 (5)")
    add("--evaluate-every", type=int, default=22, metavar="STEPS", help="(22)")
    add("--save-every", type=int, default=10, metavar="EVALUATIONS", help="(10)")
    add("--arms", nargs="+", default=(), metavar="ARM", help="by the names in the table (all)")
    add("--output", type=Path, default=Path("results/distill_training"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: 2 seeds, 44 steps")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    train, test, seen = jax.device_put(load(args))
    arms = make_arms(args)
    runs = {}
    with tqdm(total=args.steps * len(arms), unit="step") as progress:
        for name, arm in arms.items():
            runs[name], graph = fit(name, arm, train, test, args, progress)
            if name == "teacher":
                logits = predict(average_of(runs[name].state), train.images, graph=graph)
                train = Digits(train.images, jnp.where(seen, train.labels, -1), logits)

    differences = compare(arms, runs, train, args)
    few = CLASSES * args.labels_per_class
    table = report(runs, differences, {**dict.fromkeys(runs, few), "teacher": seen.shape[1]})
    print(f"\n{table}\n")
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    results = {
        "arguments": fixed(args),
        "differences": differences,
        "courses": {name: run.course for name, run in runs.items()},
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    teacher = runs.pop("teacher")
    plot_accuracy(runs or {"teacher": teacher}, args.output / "accuracy.png")
    swept = {name: run for name, run in runs.items() if re.fullmatch("T = .*|T falls", name)}
    if swept:
        plot_schedule(swept, arms, args.output / "schedule.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
