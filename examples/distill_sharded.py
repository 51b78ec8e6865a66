r"""A language model distilled on a mesh of devices, in steps that survive being killed.

The text and the comparison are those of `distill_lm.py`; what is new is where everything lies. The
mesh has two axes, data and model, and every device computes the transformer for rows of its own:

    --shard fsdp          parameters and Adam's moments lie in parts over data, split over their
                          features, and are gathered once, before they are used
    --shard vocabulary    the output kernel lies in parts over model, split over the vocabulary, and
                          stays so: each device takes its part of the classes of its group's rows

Both call `kljax.distillation_loss` with a `kljax.Head` of student and teacher inside `shard_map`:
logits are computed block by block, and no array [tokens, vocabulary] exists. Their gradients are
those of one device.

Grain reads the text in a shuffled order that a seed fixes. Orbax saves parameters, optimizer, the
course so far and the position in that order, all in one checkpoint. Killed and run again with the
same --output, it goes on from there and ends in the same numbers, bit for bit; on another mesh it
goes on too, equal up to rounding.

    python examples/distill_sharded.py --devices 8      # a CPU as eight devices: some three minutes
    python examples/distill_sharded.py                  # the devices of one process: GPUs, TPUs
    python examples/distill_sharded.py --devices 8 --mesh 2 4 --shard vocabulary
    python examples/distill_sharded.py --quick          # a smoke run

Needs jax, flax, optax, grain, orbax-checkpoint, matplotlib and tqdm. Writes checkpoints/,
results.md, results.json and a figure into the folder named by --output.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from distill_lm import (  # pyrefly: ignore[missing-import]  (it lies beside this script)
    ASCII,
    Text,
    Trained,
    load_text,
    plot,
    report,
)
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import kljax

Args = argparse.Namespace
Tree = Any  # of arrays, or of what describes them
HEADS = 4
EVALUATIONS = 10  # in the course of a training
LARGE = 1024  # elements from which FSDP spreads a parameter
ROWS = P(("data", "model"))
LOSS_ROWS = {"fsdp": ROWS, "vocabulary": P("data")}
LOSS_AXES: dict[str, Any] = {
    "fsdp": {"axis_name": ("data", "model")},
    "vocabulary": {"axis_name": "data", "class_axis_name": "model"},
}
FREE = ("output", "devices", "mesh", "shard", "save_every")  # may differ where a run goes on
QUICK = {"steps": (12, 24), "context": 32, "windows": 16, "teacher": (32, 1), "student": (16, 1)}
QUICK |= {"save_every": 4}


def init(key: Array, size: Sequence[int], args: Args) -> Tree:
    """The parameters of a transformer. Features come last."""
    width, layers = size
    shapes = {
        "embedding": (args.vocabulary, width),
        "position": (args.context, width),
        "convolution": (4 * width, width),
        "attention": (layers, width, 3 * width),
        "mix": (layers, width, width),
        "up": (layers, width, 4 * width),
        "down": (layers, 4 * width, width),
        "output": (args.vocabulary, width),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(k, shape) / math.sqrt(shape[-2] if name != "output" else width)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def normalized(x: Array) -> Array:
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def transformer(params: Tree, tokens: Array) -> Array:
    """Causal; a short convolution shows every token the three before it."""
    batch, length = tokens.shape
    x = params["embedding"][tokens]
    past = [jnp.pad(x, ((0, 0), (n, 0), (0, 0)))[:, :length] for n in range(4)]
    x = x + jnp.concatenate(past, axis=-1) @ params["convolution"] + params["position"][None]

    def block(x: Array, layer: Tree) -> tuple[Array, None]:
        inner = normalized(x) @ layer["attention"]
        q, k, v = jnp.split(inner.reshape(batch, length, HEADS, -1), 3, axis=-1)
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ layer["mix"]
        return x + jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"], None

    layers = {name: params[name] for name in ("attention", "mix", "up", "down")}
    return normalized(lax.scan(block, x, layers)[0])


def spread(tree: Tree, args: Args, mesh: Mesh) -> Tree:
    """Where parameters lie on the mesh, and Adam's moments, of the same names and shapes."""

    def spec(path: Any, x: Any) -> P:
        if args.shard == "vocabulary":
            return P("model") if "output" in jax.tree_util.keystr(path) else P()
        divisible = x.ndim > 0 and x.shape[-1] % mesh.shape["data"] == 0
        return P(*[None] * (x.ndim - 1), "data") if divisible and x.size >= LARGE else P()

    return jax.tree.map_with_path(spec, tree)


def whole(x: Array, spec: P) -> Array:
    """FSDP's gather. Its transpose adds up the gradients, and leaves each device its part."""
    return lax.all_gather(x, "data", axis=x.ndim - 1, tiled=True) if "data" in spec else x


def on_mesh(loss: Callable[..., Array], out: P, args: Args, mesh: Mesh) -> Callable[..., Array]:
    """`loss(heads, labels)` as a function of parameters, one tree for each head, and tokens."""

    def head(params: Tree, tokens: Array) -> kljax.Head:
        hidden = transformer(params, tokens)
        if args.shard == "vocabulary":  # a group's devices share its rows, not its classes
            hidden = lax.all_gather(hidden, "model", tiled=True)
        return kljax.Head(hidden, params["output"], transposed=True)

    def of(params: Sequence[Tree], tokens: Array) -> Array:
        specs = spread(params, args, mesh)

        def here(params: Sequence[Tree], inputs: Array, labels: Array) -> Array:
            models = jax.tree.map(whole, params, specs)
            return loss([head(model, inputs) for model in models], labels)

        rows = LOSS_ROWS[args.shard]
        mapped = jax.shard_map(here, mesh=mesh, in_specs=(specs, ROWS, rows), out_specs=out)
        return mapped(params, tokens[:, :-1], tokens[:, 1:])

    return of


def training_loss(args: Args, mesh: Mesh) -> Callable[..., Array]:
    """Of [student] or [student, teacher], and tokens."""
    axes = LOSS_AXES[args.shard]

    def loss(heads: Sequence[kljax.Head], labels: Array) -> Array:
        student, *teachers = heads
        if not teachers:
            return kljax.cross_entropy(student, labels, reduction="mean", **axes)
        value, _ = kljax.distillation_loss(
            student,
            teachers[0],
            labels,
            temperature=args.temperature,
            soft_weight=args.soft_weight,
            hard_weight=args.hard_weight,
            **axes,
        )
        return value

    return on_mesh(loss, P(), args, mesh)


def bits_per_byte(args: Args, mesh: Mesh) -> Callable[..., Array]:
    """Of [model] and tokens: one number for each window."""
    class_axis_name = LOSS_AXES[args.shard].get("class_axis_name")

    def loss(heads: Sequence[kljax.Head], labels: Array) -> Array:
        return kljax.cross_entropy(heads[0], labels, class_axis_name=class_axis_name).mean(axis=1)

    nats = on_mesh(loss, LOSS_ROWS[args.shard], args, mesh)
    return jax.jit(lambda *given: nats(*given) / (math.log(2) * args.bytes_per_token))


@dataclass
class Run:
    """All that a training must find again: this is what a checkpoint holds."""

    state: Tree  # parameters and Adam's moments
    batches: grain.DatasetIterator
    course: dict[int, float]  # bits per byte of the held-out text, by step


class Windows(grain.sources.RandomAccessDataSource):
    """Every stretch of the text that a batch may hold."""

    def __init__(self, text: np.ndarray, length: int) -> None:
        self.text, self.length = text, length

    def __len__(self) -> int:
        return len(self.text) - self.length + 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.text[index : index + self.length]


def shuffled(windows: Windows, args: Args) -> grain.DatasetIterator:
    """Batches without end. Their state is a position in an order that the seed fixes."""
    order = grain.MapDataset.source(windows).shuffle(args.seed).repeat().batch(args.batch_size)
    return iter(order.to_iter_dataset(grain.ReadOptions(num_threads=1)))


def fixed(args: Args) -> dict[str, Any]:
    """The arguments that a run must keep when it goes on, as JSON has them."""
    return json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in FREE}))


def save(manager: ocp.CheckpointManager, step: int, run: Run, args: Args) -> None:
    course = {str(step): bits for step, bits in run.course.items()}
    everything = ocp.args.Composite(
        notes=ocp.args.JsonSave({"arguments": fixed(args), "course": course}),
        state=ocp.args.StandardSave(run.state),
        batches=grain.checkpoint.CheckpointSave(run.batches),
    )
    manager.save(step, args=everything)


def restore(manager: ocp.CheckpointManager, step: int, like: Run, args: Args) -> Run:
    """As it was saved, with the state placed as that of `like`, on whatever mesh."""
    notes = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))["notes"]
    if notes["arguments"] != fixed(args):
        raise SystemExit(f"error: --output: {manager.directory} was begun with other arguments")
    everything = ocp.args.Composite(
        state=ocp.args.StandardRestore(like.state),
        batches=grain.checkpoint.CheckpointRestore(like.batches),
    )
    found = manager.restore(step, args=everything)
    course = {int(step): bits for step, bits in notes["course"].items()}
    return Run(found["state"], found["batches"], course)


def fit(
    name: str, size: Sequence[int], teachers: list[Tree], text: Text, args: Args, mesh: Mesh
) -> tuple[Trained, Tree]:
    """Trains from the last checkpoint on, if there is one; the same batches whatever the model."""
    steps = args.steps[0 if name == "teacher" else 1]
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, steps // 20, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))
    loss, evaluate = training_loss(args, mesh), bits_per_byte(args, mesh)

    def start() -> Tree:  # the same for both students
        params = init(jax.random.key(args.seed), size, args)
        return {"params": params, "optimizer": optimizer.init(params)}

    @jax.jit
    def train_step(state: Tree, teachers: list[Tree], tokens: Array) -> Tree:
        params = state["params"]
        gradients = jax.grad(lambda params: loss([params, *teachers], tokens))(params)
        updates, moments = optimizer.update(gradients, state["optimizer"], params)
        return {"params": optax.apply_updates(params, updates), "optimizer": moments}

    def on_devices(tokens: np.ndarray) -> Array:
        return jax.device_put(tokens, NamedSharding(mesh, ROWS))

    windows = Windows(text.train, args.context + 1)  # inputs: all but the last; labels: the first
    starts = np.linspace(0, len(text.held_out) - windows.length, args.windows, dtype=int)
    held_out = on_devices(text.held_out[starts[:, None] + np.arange(windows.length)])
    shapes = jax.eval_shape(start)
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), spread(shapes, args, mesh))
    run = Run(jax.jit(start, out_shardings=places)(), shuffled(windows, args), {})
    folder = args.output.resolve() / "checkpoints" / name.replace(" ", "-")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if first := manager.latest_step() or 0:
            run = restore(manager, first, run, args)
        progress = tqdm(total=steps, initial=first, desc=f"{name:<11}", unit="step")
        for step in range(first + 1, steps + 1):
            tokens = on_devices(next(run.batches))
            run.state = jax.block_until_ready(train_step(run.state, teachers, tokens))
            if step % -(-steps // EVALUATIONS) == 0 or step == steps:
                run.course[step] = float(np.mean(evaluate([run.state["params"]], held_out)))
                progress.set_postfix_str(f"{run.course[step]:.3f} bits per byte held out")
            if step % args.save_every == 0 or step == steps:
                save(manager, step, run, args)
            progress.update()
        progress.close()
    params = run.state["params"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Trained(parameters, run.course, np.asarray(evaluate([params], held_out))), params


def parse_arguments(argv: Sequence[str] | None = None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    size: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("WIDTH", "LAYERS")}
    add("--devices", type=int, help="as so many devices use the CPU, whatever else there is")
    add("--mesh", type=int, nargs=2, metavar=("DATA", "MODEL"), help="(half of the devices, 2)")
    add("--shard", choices=tuple(LOSS_ROWS), default="fsdp", help="(fsdp)")
    add("--temperature", type=float, default=1.0, help="of the soft targets (1)")
    add("--soft-weight", type=float, default=0.9, help="weight of the soft targets (0.9)")
    add("--hard-weight", type=float, default=0.1, help="weight of the labels (0.1)")
    add("--steps", type=int, nargs=2, default=(800, 500), metavar=("TEACHER", "STUDENT"))
    add("--teacher", **size, default=(128, 2), help=f"width, a multiple of {HEADS}, and layers")
    add("--student", **size, default=(48, 1), help="likewise")
    add("--bytes-per-token", type=int, choices=(1, 2), default=1, help="2: 16384 classes (1: 128)")
    add("--context", type=int, default=128, help="tokens in a window (128)")
    add("--batch-size", type=int, default=16, help="windows in a batch (16)")
    add("--windows", type=int, default=128, help="held-out windows (128)")
    add("--learning-rate", type=float, default=0.005, help="of Adam (0.005)")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=50, metavar="STEPS", help="from checkpoint to next (50)")
    add("--output", type=Path, default=Path("results/distill_sharded"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: tiny models, few steps")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.vocabulary = ASCII**args.bytes_per_token
    return args


def part_here(params: Tree) -> float:
    """The part of the parameters that one device holds."""
    leaves = jax.tree.leaves(params)
    here = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    return here / sum(leaf.size for leaf in leaves)


def make_mesh(args: Args) -> Mesh:
    """Two on model where the devices allow it, the rest on data; or as told."""
    count = jax.device_count()
    data, model = args.mesh or ((count // 2, 2) if count % 2 == 0 else (count, 1))
    if not 0 < data * model <= count:
        raise SystemExit(f"error: --mesh {data} {model}: of {count} devices")
    if args.batch_size % (data * model) or args.windows % (data * model):
        raise SystemExit(f"error: --batch-size and --windows must be multiples of {data * model}")
    if args.shard == "vocabulary" and args.vocabulary % model:
        raise SystemExit(f"error: --mesh: {args.vocabulary} classes on {model} devices")
    devices = jax.devices()[: data * model]
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=types, devices=devices)


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    mesh = make_mesh(args)
    text = load_text(args.seed, args.bytes_per_token)
    trained = {}
    trained["teacher"], teacher = fit("teacher", args.teacher, [], text, args, mesh)
    share = part_here(teacher)
    print(f"Each device holds {share:.1%} of the teacher's parameters.")
    for name, teachers in (("labels only", []), ("distilled", [teacher])):
        trained[name], _ = fit(name, args.student, teachers, text, args, mesh)
    table = report(trained)
    print(f"\n{table}\n")
    courses = {name: run.course for name, run in trained.items()}
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    layout = {"mesh": dict(mesh.shape), "shard": args.shard, "teacher on each device": share}
    results = {"arguments": fixed(args), **layout, "bits per byte": courses}
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sizes = " x ".join(f"{size} {name}" for name, size in mesh.shape.items())
    title = f"Text held out from training; mesh of {sizes}, {args.shard}"
    plot(courses, args.output / "curves.png", xlabel="step", ylabel="bits per byte", title=title)
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
