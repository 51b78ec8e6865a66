"""Knowledge distillation with a handful of labels, on real images of handwritten digits.

A convolutional teacher learns from every label of the training split. A student some thirty times
smaller then learns in three ways, with only a few labels per class:

    labels only     cross-entropy on the few labelled images
    distilled       the teacher's soft targets on all training images, not one label
    both            the weighted sum of the two

All three start from the same parameters, see the same batches, and take the same number of steps
of the same optimizer; `kljax.distillation_loss` trains them all, and the teacher too. The test
images serve the report alone: the last epoch counts, whatever its accuracy.

    python examples/distill_digits.py             # about a minute on two CPU cores
    python examples/distill_digits.py --quick     # a smoke run
    python examples/distill_digits.py --dataset mnist --data-dir ~/mnist --epochs 10

The same command runs on whatever devices JAX finds, with the batch sharded over all of them.
Needs jax, flax, optax, scikit-learn (it bundles the digits), matplotlib and tqdm. Writes
results.md, results.json and three figures into the folder named by --output.
"""

import argparse
import functools
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import kljax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

CLASSES = 10
STYLES = {  # of every model: colour (of the Okabe-Ito palette), line and its width
    "teacher": ("#555555", "-.", 2),
    "labels only": ("#D55E00", ":", 2),
    "distilled": ("#56B4E9", "-", 4),
    "both": ("#000000", "--", 1),
}
STUDENTS = tuple(STYLES)[1:]
QUICK = {"seeds": 2, "epochs": 6, "temperatures": [1.0, 4.0]}
Array = np.ndarray | jax.Array


class Images(NamedTuple):
    images: np.ndarray  # [N, height, width, 1], from 0 to 1
    labels: np.ndarray  # [N]


class TrainingSet(NamedTuple):
    images: Array
    labels: Array
    label_weights: Array  # 1 where the label may be used, else 0
    teacher_logits: Array


class Objective(NamedTuple):
    temperature: float
    soft_weight: float
    hard_weight: float


def read_idx(folder: Path | None, name: str) -> np.ndarray:
    """Reads a file of the MNIST format, compressed or not."""
    if folder is None:
        raise FileNotFoundError("this dataset needs --data-dir, the folder with its four IDX files")
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            raw = path.read_bytes()
            raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    raise FileNotFoundError(f"--data-dir: neither {name} nor {name}.gz is in {folder}")


def read_images(folder: Path | None, part: str) -> Images:
    images = read_idx(folder, f"{part}-images-idx3-ubyte")[..., None].astype(np.float32) / 255
    return Images(images, read_idx(folder, f"{part}-labels-idx1-ubyte").astype(np.int32))


def load_split(args: argparse.Namespace, seed: int) -> tuple[Images, Images]:
    """Training and test images. Each seed splits digits anew; the others come with their split."""
    if args.dataset == "digits":
        digits: Any = load_digits()
        pixels = digits.images[..., None].astype(np.float32) / 16
        labels = digits.target.astype(np.int32)
        parts = train_test_split(pixels, labels, test_size=0.25, stratify=labels, random_state=seed)
        return Images(parts[0], parts[2]), Images(parts[1], parts[3])
    return read_images(args.data_dir, "train"), read_images(args.data_dir, "t10k")


def choose_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Weight 1 for `per_class` random examples of each class, 0 for all the others."""
    rng, weights = np.random.default_rng(seed), np.zeros(len(labels), np.float32)
    for examples in (np.flatnonzero(labels == label) for label in range(CLASSES)):
        if per_class > len(examples):
            raise ValueError(f"--labels-per-class: a class has only {len(examples)} examples")
        weights[rng.choice(examples, per_class, replace=False)] = 1
    return weights


class Teacher(nnx.Module):
    """A small convolutional network."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs) -> None:
        height, width, channels = image_shape
        self.conv1 = nnx.Conv(channels, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(height // 4 * (width // 4) * 32, 512, rngs=rngs)
        self.head = nnx.Linear(512, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Student(nnx.Module):
    """A perceptron with one narrow hidden layer."""

    def __init__(self, image_shape: Sequence[int], rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(int(np.prod(image_shape)), 32, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.hidden(images.reshape(len(images), -1))))


@dataclass(frozen=True)
class Plan:
    """What all trainings share."""

    epochs: int
    steps: int  # in an epoch
    batch_size: int
    labelled: int  # how many of a batch are drawn from the labelled images
    optimizer: optax.GradientTransformation
    replicated: NamedSharding
    by_batch: NamedSharding


class Trained(NamedTuple):
    """The course of one training, by epoch, and the final model's logits."""

    loss: np.ndarray
    divergence: np.ndarray  # KL from the teacher on the training images, at temperature 1
    accuracy: np.ndarray  # on the test images
    train_logits: np.ndarray
    test_logits: np.ndarray
    parameters: int


Runs = list[dict[str, Trained]]  # by seed, and by name of the model


def make_plan(args: argparse.Namespace, size: int) -> Plan:
    devices = jax.devices()
    batch_size = max(1, round(min(args.batch_size, size) / len(devices))) * len(devices)
    labelled = batch_size // 4
    steps = size // (batch_size - labelled)
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps)
    mesh = Mesh(np.asarray(devices), ("batch",))
    replicated, by_batch = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in ((), ("batch",)))
    optimizer = optax.adam(schedule)
    return Plan(args.epochs, steps, batch_size, labelled, optimizer, replicated, by_batch)


def draw_batches(key: jax.Array, label_weights: Array, plan: Plan) -> jax.Array:
    """Indices [steps, batch]: each batch holds some labelled images and a piece of the epoch."""
    shuffle_key, label_key = jax.random.split(key)
    size, shape = len(label_weights), (plan.steps, plan.batch_size - plan.labelled)
    shuffled = jax.random.permutation(shuffle_key, size)[: np.prod(shape)].reshape(shape)
    labelled = jax.random.choice(
        label_key, size, (plan.steps, plan.labelled), p=label_weights / label_weights.sum()
    )
    return jnp.concatenate([labelled, shuffled], axis=1)


@functools.partial(jax.jit, static_argnames=("graph", "plan"), donate_argnames="state")
def train_epoch(
    state: Any, data: TrainingSet, objective: Objective, key: jax.Array, *, graph: Any, plan: Plan
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Scans over the steps of an epoch; returns its mean loss and mean KL from the teacher too.

    The objective's numbers are traced: one compilation serves every student and temperature.
    """

    def step(state: Any, indices: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        model, optimizer = nnx.merge(graph, state)
        batch = jax.tree.map(lambda array: array[indices], data)
        batch = jax.lax.with_sharding_constraint(batch, plan.by_batch)

        def loss_fn(model: nnx.Module) -> tuple[jax.Array, Any]:
            return kljax.distillation_loss(
                model(batch.images),
                batch.teacher_logits,
                batch.labels,
                label_weights=batch.label_weights,
                **objective._asdict(),
            )

        (loss, metrics), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), (loss, metrics.divergence)

    state, history = jax.lax.scan(step, state, draw_batches(key, data.label_weights, plan))
    return state, jax.tree.map(jnp.mean, history)


@functools.partial(jax.jit, static_argnames="graph")
def predict(state: Any, images: jax.Array, *, graph: Any) -> jax.Array:
    model, _ = nnx.merge(graph, state)
    return jax.lax.map(lambda image: model(image[None])[0], images, batch_size=1024)


def fit(
    model: nnx.Module,
    data: TrainingSet,
    test: Images,
    objective: Objective,
    plan: Plan,
    seed: int,
    progress: tqdm,
) -> Trained:
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    graph, state = nnx.split((model, nnx.Optimizer(model, plan.optimizer, wrt=nnx.Param)))
    state, data, test_images = jax.device_put((state, data, test.images), plan.replicated)
    course, test_logits = [], np.empty(0)
    for epoch in range(plan.epochs):
        key = jax.random.fold_in(jax.random.key(seed), epoch)
        state, means = train_epoch(state, data, objective, key, graph=graph, plan=plan)
        test_logits = np.asarray(predict(state, test_images, graph=graph))
        course.append((*map(float, means), np.mean(test_logits.argmax(-1) == test.labels)))
        progress.update()
    train_logits = np.asarray(predict(state, data.images, graph=graph))
    loss, divergence, accuracy = np.array(course).T
    return Trained(loss, divergence, accuracy, train_logits, test_logits, parameters)


def run_seed(seed: int, args: argparse.Namespace, plan: Plan, progress: tqdm) -> dict[str, Trained]:
    """Trains the teacher, the three students, and a distilled student for each temperature."""
    train, test = load_split(args, seed)
    shape, size = train.images.shape[1:], len(train.labels)
    from_labels = Objective(1.0, soft_weight=0.0, hard_weight=1.0)
    objectives = {
        "labels only": from_labels,
        "distilled": Objective(args.temperature, 1.0, 0.0),
        "both": Objective(args.temperature, args.soft_weight, args.hard_weight),
        **{f"T={t:g}": Objective(t, 1.0, 0.0) for t in args.temperatures},
    }

    progress.set_description(f"seed {seed}, teacher")
    data = TrainingSet(*train, np.ones(size, np.float32), np.zeros((size, CLASSES), np.float32))
    teacher = fit(Teacher(shape, nnx.Rngs(seed)), data, test, from_labels, plan, seed, progress)
    label_weights = choose_labels(train.labels, args.labels_per_class, seed)
    visible = np.where(label_weights > 0, train.labels, -1)  # -1: hidden, of weight 0, never read
    data = TrainingSet(train.images, visible, label_weights, teacher.train_logits)
    trained = {"teacher": teacher}
    for name, objective in objectives.items():
        progress.set_description(f"seed {seed}, {name}")
        student = Student(shape, nnx.Rngs(seed))
        trained[name] = fit(student, data, test, objective, plan, seed, progress)
    return trained


def mean_and_spread(runs: Runs, name: str, field: str) -> np.ndarray:
    """Mean and standard deviation over the seeds, by epoch, of one field of one training."""
    values = np.stack([getattr(run[name], field) for run in runs])
    spread = values.std(0, ddof=1) if len(runs) > 1 else np.full_like(values[0], np.nan)
    return np.stack([values.mean(0), spread])


def report(runs: Runs, args: argparse.Namespace, train_size: int) -> str:
    """The results as a Markdown table."""
    few = CLASSES * args.labels_per_class
    lines = [
        "| model                | parameters | labels seen | test accuracy, % |",
        "|----------------------|-----------:|------------:|-----------------:|",
    ]
    for name, labels in zip(STYLES, (train_size, few, 0, few), strict=True):
        mean, spread = 100 * mean_and_spread(runs, name, "accuracy")[:, -1]
        title = name if name == "teacher" else f"student, {name}"
        lines.append(
            f"| {title:<20} | {runs[0][name].parameters:>10,} | {labels:>11,} "
            f"| {f'{mean:.1f} ± {spread:.1f}':>16} |"
        )
    return "\n".join(lines)


def plot_curves(runs: Runs, path: Path) -> None:
    panels = {
        "loss": ("Training loss, each arm's own", "loss", 1, STUDENTS),
        "divergence": ("KL from the teacher, T = 1", "nats", 1, STUDENTS),
        "accuracy": ("Test accuracy", "%", 100, STYLES),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    for axis, (field, (title, label, scale, names)) in zip(axes, panels.items(), strict=True):
        for name in names:
            mean, spread = scale * mean_and_spread(runs, name, field)
            color, line, width = STYLES[name]
            epochs = np.arange(1, len(mean) + 1)
            axis.plot(epochs, mean, line, color=color, label=name, linewidth=width)
            axis.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
        axis.set(title=title, xlabel="epoch", ylabel=label)
        axis.set_yscale("linear" if field == "accuracy" else "log")
        axis.grid(alpha=0.3)
    axes[-1].set_ylim(None, 100)
    axes[-1].legend(loc="lower right")
    figure.suptitle(f"Mean and standard deviation over {len(runs)} seeds")
    figure.savefig(path, dpi=120)


def plot_temperature(runs: Runs, temperatures: Sequence[float], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name in ("teacher", "labels only"):
        mean, spread = 100 * mean_and_spread(runs, name, "accuracy")[:, -1]
        color, line, width = STYLES[name]
        axis.axhline(mean, color=color, linestyle=line, linewidth=width, label=name)
        axis.axhspan(mean - spread, mean + spread, color=color, alpha=0.2, lw=0)
    swept = [100 * mean_and_spread(runs, f"T={t:g}", "accuracy")[:, -1] for t in temperatures]
    mean, spread = np.transpose(swept)
    color = STYLES["distilled"][0]
    axis.errorbar(temperatures, mean, spread, color=color, fmt="-o", capsize=4, label="distilled")
    axis.set_xscale("log", base=2)
    axis.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    title = f"Mean and standard deviation over {len(runs)} seeds"
    axis.set(title=title, xlabel="temperature T", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_soft_targets(runs: Runs, test: Images, temperature: float, path: Path) -> None:
    """What teacher and student say of the first seed's least certain test images."""
    run = runs[0]
    chosen = np.argsort(kljax.entropy(run["teacher"].test_logits))[::-1][:4]
    figure, axes = plt.subplots(
        2, 4, figsize=(10, 4.4), layout="constrained", width_ratios=(1, 2, 1, 2)
    )
    for index, (image, bars) in zip(chosen, axes.reshape(-1, 2), strict=True):
        image.imshow(test.images[index, ..., 0], cmap="gray_r")
        image.set(title=f"labelled {test.labels[index]}", xticks=[], yticks=[])
        for shift, name in ((-0.2, "teacher"), (0.2, "distilled")):
            soft = jax.nn.softmax(run[name].test_logits[index] / temperature)
            classes = np.arange(CLASSES) + shift
            bars.bar(classes, soft, 0.4, color=STYLES[name][0], label=name)
        bars.set(xticks=range(CLASSES), xlabel="class", ylabel=f"probability, T = {temperature:g}")
    figure.suptitle("Test images of which the teacher is least certain")
    figure.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--temperature", type=float, default=4.0, help="of the soft targets (default: 4)")
    add("--soft-weight", type=float, default=1.0, help="weight of the soft targets in 'both' (1)")
    add("--hard-weight", type=float, default=1.0, help="weight of the labels in 'both' (1)")
    add("--labels-per-class", type=int, default=5, help="labels the students see (5)")
    add("--epochs", type=int, default=60, help="of every training (60)")
    add("--batch-size", type=int, default=128, help="rounded to a multiple of the devices (128)")
    add("--learning-rate", type=float, default=1e-2, help="of Adam, decayed by a cosine (0.01)")
    add("--seeds", type=int, default=5, help="how many seeds, from 0 (5)")
    add("--temperatures", type=float, nargs="+", default=[1, 2, 4, 8, 16], help="to sweep over")
    add("--dataset", choices=("digits", "mnist", "fashion-mnist"), default="digits")
    add("--data-dir", type=Path, help="local folder of the IDX files of MNIST or Fashion-MNIST")
    add("--output", type=Path, default=Path("results/distill_digits"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: 2 seeds, 6 epochs, 2 temperatures")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name in ("temperature", "labels_per_class", "epochs", "learning_rate", "seeds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if args.batch_size < 4 or min(args.temperatures) <= 0:
        parser.error("--batch-size must be at least 4, and all --temperatures positive")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    try:
        train, test = load_split(args, seed=0)
        choose_labels(train.labels, args.labels_per_class, seed=0)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    plan = make_plan(args, len(train.labels))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(f"Devices: {devices}. Batches of {plan.batch_size}, {plan.steps} steps an epoch.")

    trainings = args.seeds * args.epochs * (1 + len(STUDENTS) + len(args.temperatures))
    with tqdm(total=trainings, unit="epoch") as progress:
        runs = [run_seed(seed, args, plan, progress) for seed in range(args.seeds)]

    table = report(runs, args, len(train.labels))
    seconds = round(time.perf_counter() - started, 1)
    print(f"\n{table}\n")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    results = {
        "arguments": vars(args),
        "environment": {"jax": jax.__version__, "devices": devices, "seconds": seconds},
        "accuracy": {name: [run[name].accuracy.tolist() for run in runs] for name in runs[0]},
        "loss": {name: [run[name].loss.tolist() for run in runs] for name in runs[0]},
    }
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    plot_curves(runs, args.output / "curves.png")
    plot_temperature(runs, args.temperatures, args.output / "temperature.png")
    plot_soft_targets(runs, test, args.temperature, args.output / "soft_targets.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
