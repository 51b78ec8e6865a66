r"""A language model of Python's own standard library, distilled into a smaller one.

Text that every machine has: the source files of the library, of which one in ten is held out. A
causal transformer learns to predict the next byte. A student of a twelfth of its parameters then
learns twice, from the same parameters, the same batches and for as many steps:

    labels only     cross-entropy with the byte that comes next
    distilled       the teacher's distribution over that byte, and a little of the label

The models return a `kljax.Head`, hidden states and the output kernel: its logits are computed block
by block, and no array [tokens, vocabulary] exists. The second figure shows what that saves for
growing vocabularies, and the last command trains with one.

    python examples/distill_lm.py             # some four minutes on two CPU cores
    python examples/distill_lm.py --quick     # a smoke run
    python examples/distill_lm.py --targets top-k --divergence reverse
    python examples/distill_lm.py --vocabulary 65536 --memory-limit 256 \
        --teacher 64 2 --student 32 1 --steps 60 40 --windows 16

Needs jax, flax, optax, matplotlib and tqdm. Writes results.md, results.json and two figures into
the folder named by --output.
"""

import argparse
import functools
import json
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from jax import Array
from tqdm import tqdm

import kljax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

Args = argparse.Namespace
ASCII = 128
HEADS = 4
EVALUATIONS = 10  # in the course of a training
TOKENS, VOCABULARIES = 8192, [2**power for power in (10, 12, 14, 16, 18)]  # compiled, not run
NOT_READ = {"test", "tests", "idle_test", "site-packages", "encodings"}  # the last are tables
DIVERGENCES: dict[str, Any] = {
    "forward": kljax.forward_kl,
    "reverse": kljax.reverse_kl,
    "jensen-shannon": kljax.jensen_shannon,
}
STYLES = (("#555555", "-.", 2), ("#D55E00", ":", 2), ("#56B4E9", "-", 3))  # Okabe-Ito's palette
QUICK = {"steps": (24, 24), "context": 64, "windows": 16, "teacher": (32, 1), "student": (16, 1)}


class Text(NamedTuple):
    """Tokens: ASCII characters, or pairs of them as one id."""

    train: np.ndarray
    held_out: np.ndarray


def load_text(seed: int, bytes_per_token: int) -> Text:
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not NOT_READ & {*path.parts}]
    sources = [source for path in files if (source := path.read_bytes()).isascii()]
    shuffled = np.random.default_rng(seed).permutation(len(sources))

    def tokens(chosen: np.ndarray) -> np.ndarray:
        text = np.frombuffer(b"".join(sources[i] for i in chosen), np.uint8).astype(np.int32)
        whole = text[: len(text) // bytes_per_token * bytes_per_token].reshape(-1, bytes_per_token)
        return whole @ ASCII ** np.arange(bytes_per_token, dtype=np.int32)

    cut = len(sources) // 10
    return Text(tokens(shuffled[cut:]), tokens(shuffled[:cut]))


class Block(nnx.Module):
    """Attention, then a perceptron; each reads the normalised stream and adds to it."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    """A causal transformer; a short convolution shows every token the three before it."""

    def __init__(self, size: Sequence[int], args: Args) -> None:
        width, layers = size
        rngs = nnx.Rngs(args.seed)
        self.embedding = nnx.Embed(args.vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(args.context, width, rngs=rngs)
        self.convolution = nnx.Conv(width, width, (4,), padding="CAUSAL", rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, args.vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> kljax.Head:
        """What follows each token: a head, not its logits."""
        x = self.embedding(tokens)
        x = x + self.convolution(x) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return kljax.Head(self.norm(x), self.output.kernel[...])


def used_ids(args: Args) -> Array:
    """The rows of the vocabulary that are tokens; the others are padding."""
    return jnp.arange(args.vocabulary) < ASCII**args.bytes_per_token


def logits_of(head: kljax.Head) -> Array:
    return jnp.matmul(head.hidden, head.kernel)


def few_classes(teacher: kljax.Head, key: Array, args: Args) -> kljax.TopK:
    """The teacher's best classes, or a sample."""
    options: Any = {"where": used_ids(args), "temperature": args.temperature}
    if args.targets == "top-k":
        return kljax.top_k(teacher, args.k, **options)
    return kljax.sample_targets(key, teacher, args.k, **options)


def distill(
    student: kljax.Head, teacher: kljax.Head, labels: Array, key: Array, *, args: Args, fused: bool
) -> Array:
    """The loss that trains the student. Not fused, it is given logits instead of heads."""
    targets = teacher if args.targets == "full" else few_classes(teacher, key, args)
    loss, _ = kljax.distillation_loss(
        student if fused else logits_of(student),
        targets if fused or args.targets != "full" else logits_of(teacher),
        labels,
        divergence=DIVERGENCES[args.divergence],
        temperature=args.temperature,
        soft_weight=args.soft_weight,
        hard_weight=args.hard_weight,
        where=used_ids(args),
    )
    return loss


def loss_memory(args: Args, **sizes: int) -> dict[str, float]:
    """MiB that the compiled loss and its gradient take beside inputs and outputs; nothing runs."""
    args = Args(**{**vars(args), **sizes})
    batch = (args.batch_size, args.context)

    def inputs() -> tuple[kljax.Head, kljax.Head, Array, Array]:
        student, teacher = (
            kljax.Head(jnp.zeros((*batch, width)), jnp.zeros((width, args.vocabulary)))
            for width in (args.student[0], args.teacher[0])
        )
        return student, teacher, jnp.zeros(batch, int), jax.random.key(0)

    def temporary(fused: bool) -> float:
        loss = jax.value_and_grad(functools.partial(distill, args=args, fused=fused))
        memory: Any = jax.jit(loss).lower(*jax.eval_shape(inputs)).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    return {"dense": temporary(fused=False), "fused": temporary(fused=True)}


class Trained(NamedTuple):
    parameters: int
    course: dict[int, float]  # bits per byte of the held-out text, by step
    bits: np.ndarray  # at the end, by held-out window


def fit(
    name: str, model: Model, teacher: Model | None, steps: int, text: Text, args: Args
) -> Trained:
    """Trains on random windows of the text, the same ones whatever the model."""
    used = used_ids(args)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, steps // 20, steps)
    muon = optax.contrib.muon(schedule, adam_learning_rate=lambda step: schedule(step) / 10)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), muon)
    optimizer = nnx.Optimizer(model, clipped, wrt=nnx.Param)

    @nnx.jit
    def train_step(
        model: Model, optimizer: nnx.Optimizer, teacher: Model | None, tokens: Array, key: Array
    ) -> Array:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]

        def loss(model: Model) -> Array:
            if teacher is not None:
                return distill(model(inputs), teacher(inputs), labels, key, args=args, fused=True)
            return kljax.cross_entropy(model(inputs), labels, where=used, reduction="mean")

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    @nnx.jit
    def bits_per_byte(model: Model, tokens: Array) -> Array:
        nats = kljax.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], where=used)
        return nats.mean(axis=1) / (np.log(2) * args.bytes_per_token)

    window = np.arange(args.context + 1)  # inputs are all but the last, labels all but the first
    starts = np.linspace(0, len(text.held_out) - len(window), args.windows, dtype=int)
    held_out = text.held_out[starts[:, None] + window]
    rng, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    course, bits = {}, np.zeros(0)
    with tqdm(total=steps, desc=f"{name:<11}", unit="step") as progress:
        for step in range(1, steps + 1):
            starts = rng.integers(len(text.train) - args.context, size=(args.batch_size, 1))
            batch_key = jax.random.fold_in(key, step)
            tokens = jnp.asarray(text.train[starts + window])
            train_step(model, optimizer, teacher, tokens, batch_key).block_until_ready()
            if step % -(-steps // EVALUATIONS) == 0 or step == steps:
                bits = np.asarray(bits_per_byte(model, jnp.asarray(held_out)))
                course[step] = float(bits.mean())
                progress.set_postfix_str(f"{course[step]:.3f} bits per byte held out")
            progress.update()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return Trained(parameters, course, bits)


def report(trained: dict[str, Trained]) -> str:
    """The results as Markdown; ± is the standard error of the choice of held-out windows."""

    def score(bits: np.ndarray) -> str:
        return f"{bits.mean():.3f} ± {bits.std(ddof=1) / len(bits) ** 0.5:.3f}"

    lines = [
        "| model                | parameters | steps | bits per byte, held out |",
        "|----------------------|-----------:|------:|------------------------:|",
    ]
    for name, run in trained.items():
        title = name if name == "teacher" else f"student, {name}"
        numbers = f"{run.parameters:>10,} | {max(run.course):>5,} | {score(run.bits):>23}"
        lines.append(f"| {title:<20} | {numbers} |")
    gain = score(trained["labels only"].bits - trained["distilled"].bits)
    return "\n".join([*lines, "", f"Labels only less distilled, window by window: {gain}"])


def plot(curves: dict[str, dict[int, float]], path: Path, **labels: str) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (name, points), (color, line, width) in zip(curves.items(), STYLES, strict=False):
        axis.plot(
            *zip(*points.items(), strict=True), line, marker=".", c=color, lw=width, label=name
        )
    if labels.pop("scale", None):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set(**labels)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def check_memory(args: Args) -> None:
    """States what the compiled losses take; past the limit dense is refused, fused is an error."""
    tokens, limit = args.batch_size * args.context, args.memory_limit
    print(f"Temporary memory of loss and gradient, {tokens:,} tokens x {args.vocabulary:,} rows:")
    needed = loss_memory(args)
    for name, mebibytes in needed.items():
        verdict = "REFUSED" if mebibytes > limit else "passes"
        limited = f": {verdict} ({limit:g} MiB allowed)" if limit < np.inf else ""
        print(f"  {name} {mebibytes:8.1f} MiB{limited}")
    if needed["fused"] > limit:
        raise SystemExit("error: --memory-limit: what trains is the fused loss; raise the limit")


def parse_arguments(argv: Sequence[str] | None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    size: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("WIDTH", "LAYERS")}
    add("--targets", choices=("full", "top-k", "sampled"), default="full", help="of the teacher")
    add("--divergence", choices=tuple(DIVERGENCES), default="forward", help="from the teacher")
    add("--k", type=int, default=16, help="classes of top-k, draws of sampled (16)")
    add("--temperature", type=float, default=1.0, help="of the soft targets (1)")
    add("--soft-weight", type=float, default=0.9, help="weight of the soft targets (0.9)")
    add("--hard-weight", type=float, default=0.1, help="weight of the labels (0.1)")
    add("--steps", type=int, nargs=2, default=(800, 500), metavar=("TEACHER", "STUDENT"))
    add("--teacher", **size, default=(128, 3), help=f"width, a multiple of {HEADS}, and layers")
    add("--student", **size, default=(48, 1), help="likewise")
    add("--vocabulary", type=int, default=ASCII, help="rows of the head (128); from 16384 on, "
        "tokens are pairs of bytes; rows that are no token are masked")  # fmt: skip
    add("--memory-limit", type=float, default=float("inf"), help="MiB for loss and gradient")
    add("--context", type=int, default=128, help="tokens in a window (128)")
    add("--batch-size", type=int, default=8, help="windows in a batch (8)")
    add("--windows", type=int, default=128, help="held-out windows (128)")
    add("--learning-rate", type=float, default=0.03, help="of Muon; a tenth for Adam (0.03)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("results/distill_lm"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: tiny models, few steps")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.bytes_per_token = 2 if args.vocabulary >= ASCII**2 else 1
    for option in ("k", "temperature", "steps", "context", "batch_size", "teacher", "student"):
        if np.min(getattr(args, option)) <= 0:
            parser.error(f"--{option.replace('_', '-')} must be positive")
    if args.teacher[0] % HEADS or args.student[0] % HEADS or args.windows < 2:
        parser.error(f"widths must be multiples of {HEADS}, and --windows at least 2")
    if args.vocabulary < ASCII:
        parser.error(f"--vocabulary must be at least {ASCII}, the number of ASCII characters")
    if args.targets == "sampled" and args.divergence != "forward":
        parser.error("--targets sampled: a sample is unbiased for --divergence forward alone")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    text = load_text(args.seed, args.bytes_per_token)
    print(f"Text: {len(text.train):,} tokens to train on, {len(text.held_out):,} held out.")
    check_memory(args)
    teacher = Model(args.teacher, args)
    trained = {"teacher": fit("teacher", teacher, None, args.steps[0], text, args)}
    for name, source in (("labels only", None), ("distilled", teacher)):
        trained[name] = fit(name, Model(args.student, args), source, args.steps[1], text, args)
    table = report(trained)
    print(f"\n{table}\n")

    batch = {"batch_size": -(-TOKENS // args.context)}
    vocabularies = VOCABULARIES[:: 4 if args.quick else 1]
    memory = {size: loss_memory(args, vocabulary=size, **batch) for size in vocabularies}
    courses = {name: run.course for name, run in trained.items()}
    named = {"dense": "dense: logits held whole", "fused": "fused: heads, block by block"}
    memories = {label: {size: memory[size][key] for size in memory} for key, label in named.items()}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    results = {"arguments": vars(args), "bits per byte": courses, "MiB": memories}
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    title = "Text held out from training"
    plot(courses, args.output / "curves.png", xlabel="step", ylabel="bits per byte", title=title)
    title = f"Loss and gradient of {TOKENS:,} tokens"
    path, label = args.output / "memory.png", "temporary memory, MiB"
    plot(memories, path, xlabel="rows of the vocabulary", ylabel=label, title=title, scale="log")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
