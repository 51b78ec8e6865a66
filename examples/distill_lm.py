"""A language model that reads Python's own standard library, distilled into a smaller one.

Text that every machine has: the source files of the library, split by file. A causal transformer
learns to predict the next byte. A student about a tenth of its size then learns twice, from the
same parameters, the same batches and for as many steps:

    labels only     cross-entropy with the byte that comes next
    distilled       the teacher's distribution over that byte, and a little of the label

Both models return `kljax.Head`: hidden states and the output kernel, whose logits the loss computes
block by block, never as a [tokens, vocabulary] array. That matters where the vocabulary is large:
the second figure shows by how much, and the last command makes it so.

    python examples/distill_lm.py                             # some minutes on two CPU cores
    python examples/distill_lm.py --quick                     # a smoke run
    python examples/distill_lm.py --targets top-k --divergence reverse
    python examples/distill_lm.py --vocabulary 65536 --memory-limit 512 --teacher-steps 60 --steps 60

Needs jax, flax, optax, matplotlib and tqdm. Writes results.md, results.json and two figures into
the folder named by --output.
"""

import argparse
import dataclasses
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
from tqdm import tqdm

import kljax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

ASCII = 128
NOT_READ = {"test", "tests", "idle_test", "site-packages", "encodings"}  # the last holds tables
DIVERGENCES = {
    "forward": kljax.forward_kl,
    "reverse": kljax.reverse_kl,
    "jensen-shannon": kljax.jensen_shannon,
}
STYLES = {  # of every model: colour (of the Okabe-Ito palette), line and its width
    "teacher": ("#555555", "-.", 2),
    "labels only": ("#D55E00", ":", 2),
    "distilled": ("#56B4E9", "-", 3),
}
QUICK = {
    "teacher_steps": 24,
    "steps": 24,
    "context": 64,
    "teacher_width": 32,
    "teacher_layers": 1,
    "student_width": 16,
    "windows": 16,
}
EVALUATIONS = 10  # in the course of a training
VOCABULARIES = [2**power for power in (10, 12, 14, 16, 18)]  # of the figure of memory
MEBIBYTE = 2**20
NOT_POSITIVE = {"seed", "soft_weight", "hard_weight"}  # these may be 0


class Text(NamedTuple):
    """Tokens, one after the other, of two halves of the files."""

    train: np.ndarray
    held_out: np.ndarray


def load_text(seed: int, bytes_per_token: int) -> Text:
    """The library's ASCII sources; one file of ten is held out. Two bytes make one of 2¹⁴ ids."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(root.rglob("*.py")) if not NOT_READ & {*path.parts}]
    sources = [source for path in files if (source := path.read_bytes()).isascii()]
    order = np.random.default_rng(seed).permutation(len(sources))

    def join(chosen: np.ndarray) -> np.ndarray:
        data = np.frombuffer(b"".join(sources[i] for i in chosen), np.uint8).astype(np.int32)
        data = data[: len(data) // bytes_per_token * bytes_per_token]
        return data.reshape(-1, bytes_per_token) @ ASCII ** np.arange(bytes_per_token)[::-1]

    cut = len(sources) // 10
    return Text(join(order[cut:]), join(order[:cut]))


def windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    """One token more than the context: inputs are all but the last, labels all but the first."""
    return tokens[starts[:, None] + np.arange(context + 1)]


class Block(nnx.Module):
    """Attention, then a perceptron; each reads the normalised stream and adds to it."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class LanguageModel(nnx.Module):
    """A causal transformer; a short convolution lets every token see the three before it."""

    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, rngs: nnx.Rngs
    ) -> None:
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.convolution = nnx.Conv(width, width, (4,), padding="CAUSAL", rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.output = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> kljax.Head:
        """What follows each token: a head, not its logits."""
        x = self.embedding(tokens)
        x = x + self.convolution(x) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return kljax.Head(self.norm(x), self.output.kernel[...])


def used_ids(args: argparse.Namespace) -> jax.Array:
    """Which rows of the vocabulary are tokens; the rest is padding."""
    return jnp.arange(args.vocabulary) < ASCII**args.bytes_per_token


def label_loss(
    model: kljax.Head, labels: jax.Array, args: argparse.Namespace, **options: Any
) -> jax.Array:
    return kljax.cross_entropy(model, labels, where=used_ids(args), **options)


def few_classes(teacher: kljax.Head, key: jax.Array, args: argparse.Namespace) -> kljax.TopK:
    """The teacher's best classes, or a sample; the logits of one window at a time."""

    def of_window(window: tuple[jax.Array, jax.Array]) -> kljax.TopK:
        hidden, key = window
        logits = jnp.where(used_ids(args), hidden @ teacher.kernel, -jnp.inf)
        if args.targets == "top-k":
            return kljax.top_k(logits, args.k, temperature=args.temperature)
        return kljax.sample_targets(key, logits, args.k, temperature=args.temperature)

    keys = jax.random.split(key, len(teacher.hidden))
    few = jax.lax.map(of_window, (teacher.hidden, keys))
    return dataclasses.replace(few, temperature=args.temperature)  # one, not one per window


def distillation_loss(
    student: kljax.Head,
    teacher: kljax.Head,
    labels: jax.Array,
    key: jax.Array,
    args: argparse.Namespace,
    fused: bool = True,
) -> jax.Array:
    """The loss that trains the student; not fused, it is given logits instead of heads."""
    targets = teacher if args.targets == "full" else few_classes(teacher, key, args)
    sides: list[Any] = [student, targets]
    if not fused:
        sides = [s.hidden @ s.kernel if isinstance(s, kljax.Head) else s for s in sides]
    loss, _ = kljax.distillation_loss(
        *sides,
        labels,
        divergence=DIVERGENCES[args.divergence],
        temperature=args.temperature,
        soft_weight=args.soft_weight,
        hard_weight=args.hard_weight,
        where=used_ids(args),
    )
    return loss


def loss_memory(args: argparse.Namespace, vocabulary: int, fused: bool) -> float:
    """MiB that the compiled loss and its gradient need beside inputs and outputs; nothing runs."""
    args = argparse.Namespace(**{**vars(args), "vocabulary": vocabulary})
    shape = jax.ShapeDtypeStruct
    batch = (args.batch_size, args.context)
    student, teacher = (
        kljax.Head(shape((*batch, width), jnp.float32), shape((width, vocabulary), jnp.float32))
        for width in (args.student_width, args.teacher_width)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss = jax.value_and_grad(
        lambda student, *rest: distillation_loss(student, *rest, args=args, fused=fused)
    )
    compiled = jax.jit(loss).lower(student, teacher, shape(batch, jnp.int32), key).compile()
    return compiled.memory_analysis().temp_size_in_bytes / MEBIBYTE


class Trained(NamedTuple):
    model: LanguageModel
    steps: list[int]
    course: list[float]  # bits per byte of the held-out text, after these steps
    bits: np.ndarray  # bits per byte at the end, by held-out window


def fit(
    name: str,
    model: LanguageModel,
    teacher: LanguageModel | None,
    steps: int,
    text: Text,
    args: argparse.Namespace,
) -> Trained:
    """Trains on random windows of the text, the same ones whatever the model."""
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, steps // 20, steps)
    muon = optax.contrib.muon(schedule, adam_learning_rate=lambda step: schedule(step) / 10)
    muon = optax.chain(optax.clip_by_global_norm(1.0), muon)
    optimizer = nnx.Optimizer(model, muon, wrt=nnx.Param)

    @nnx.jit
    def train_step(
        model: LanguageModel,
        optimizer: nnx.Optimizer,
        teacher: LanguageModel | None,
        tokens: jax.Array,
        key: jax.Array,
    ) -> jax.Array:
        inputs, labels = tokens[:, :-1], tokens[:, 1:]

        def loss_of(model: LanguageModel) -> jax.Array:
            if teacher is None:
                return label_loss(model(inputs), labels, args, reduction="mean")
            return distillation_loss(model(inputs), teacher(inputs), labels, key, args)

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    @nnx.jit
    def bits_per_byte(model: LanguageModel, tokens: jax.Array) -> jax.Array:
        nats = label_loss(model(tokens[:, :-1]), tokens[:, 1:], args).mean(axis=1)
        return nats / (np.log(2) * args.bytes_per_token)

    last = len(text.held_out) - args.context - 1
    held_out = windows(text.held_out, np.linspace(0, last, args.windows, dtype=int), args.context)
    rng, key = np.random.default_rng(args.seed), jax.random.key(args.seed)
    seen, course, bits = [], [], np.zeros(0)
    with tqdm(total=steps, desc=f"{name:<12}", unit="step") as progress:
        for step in range(1, steps + 1):
            starts = rng.integers(len(text.train) - args.context, size=args.batch_size)
            tokens = windows(text.train, starts, args.context)
            train_step(model, optimizer, teacher, tokens, jax.random.fold_in(key, step))
            if step % (-(-steps // EVALUATIONS)) == 0 or step == steps:
                bits = np.asarray(bits_per_byte(model, held_out))
                seen.append(step)
                course.append(float(bits.mean()))
                progress.set_postfix_str(f"held out {course[-1]:.3f} bits per byte")
            progress.update()
    return Trained(model, seen, course, bits)


def train_all(text: Text, args: argparse.Namespace) -> dict[str, Trained]:
    def new_model(width: int, layers: int) -> LanguageModel:
        rngs = nnx.Rngs(args.seed)
        return LanguageModel(args.vocabulary, args.context, width, layers, rngs)

    teacher = new_model(args.teacher_width, args.teacher_layers)
    trained = {"teacher": fit("teacher", teacher, None, args.teacher_steps, text, args)}
    for name, source in (("labels only", None), ("distilled", teacher)):
        student = new_model(args.student_width, args.student_layers)
        trained[name] = fit(name, student, source, args.steps, text, args)
    return trained


def report(trained: dict[str, Trained], args: argparse.Namespace) -> str:
    """The results as Markdown; the uncertainty is that of the choice of held-out windows."""
    lines = [
        "| model                | parameters | steps | bits per byte, held out |",
        "|----------------------|-----------:|------:|------------------------:|",
    ]
    for name, (model, seen, _, bits) in trained.items():
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        title = name if name == "teacher" else f"student, {name}"
        score = f"{bits.mean():.3f} ± {standard_error(bits):.3f}"
        lines.append(f"| {title:<20} | {parameters:>10,} | {seen[-1]:>5,} | {score:>23} |")
    gain = trained["labels only"].bits - trained["distilled"].bits
    return "\n".join(lines) + (
        f"\n\nThe distilled student needs {gain.mean():.3f} ± {standard_error(gain):.3f} bits per "
        f"byte less, window by window (standard errors over {args.windows} windows)."
    )


def standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def plot_curves(trained: dict[str, Trained], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, run in trained.items():
        color, line, width = STYLES[name]
        axis.plot(run.steps, run.course, line, color=color, linewidth=width, label=name)
    axis.set(xlabel="step", ylabel="bits per byte", title="Held-out text")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def plot_memory(
    memory: dict[int, tuple[float, float]], args: argparse.Namespace, path: Path
) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, style, values in zip(
        ("logits given: dense", "heads given: fused"),
        ("labels only", "distilled"),
        zip(*memory.values(), strict=True),
        strict=True,
    ):
        color, line, width = STYLES[style]
        axis.plot(list(memory), values, line, marker="o", color=color, linewidth=width, label=name)
    if args.memory_limit:
        axis.axhline(args.memory_limit, color="#000000", linewidth=1, label="limit")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(
        xlabel="vocabulary",
        ylabel="temporary memory, MiB",
        title=f"Loss and gradient of {args.batch_size * args.context:,} tokens",
    )
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def check_memory(args: argparse.Namespace) -> None:
    """States what the loss needs; past the limit, the dense one is refused, the fused one fatal."""
    limit = args.memory_limit
    print(
        f"Loss and gradient, {args.batch_size * args.context:,} tokens x {args.vocabulary:,} "
        "classes; temporary memory as compiled:"
    )
    for name, fused in (("dense", False), ("fused", True)):
        needed = loss_memory(args, args.vocabulary, fused)
        verdict = "" if not limit else "passes" if needed <= limit else "REFUSED"
        print(
            f"  {name} {needed:8.1f} MiB" + (f", limit {limit:g} MiB: {verdict}" if limit else "")
        )
        if fused and verdict == "REFUSED":
            raise SystemExit("error: --memory-limit: the fused loss does not fit either")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", choices=("full", "top-k", "sampled"), default="full", help="of the teacher")
    add("--divergence", choices=tuple(DIVERGENCES), default="forward", help="from the teacher")
    add("--k", type=int, default=16, help="classes of top-k, draws of sampled (16)")
    add("--temperature", type=float, default=1.0, help="of the soft targets (1)")
    add("--soft-weight", type=float, default=0.9, help="weight of the soft targets (0.9)")
    add("--hard-weight", type=float, default=0.1, help="weight of the labels (0.1)")
    add("--vocabulary", type=int, default=ASCII, help="rows of the output head (128); from 16384 "
        "on, tokens are pairs of bytes; rows that are no token are masked")  # fmt: skip
    add("--memory-limit", type=float, help="MiB that loss and gradient may take beside inputs")
    add("--teacher-steps", type=int, default=800, help="of the teacher's training (800)")
    add("--steps", type=int, default=500, help="of both students' training (500)")
    add("--batch-size", type=int, default=8, help="windows in a batch (8)")
    add("--context", type=int, default=128, help="tokens in a window (128)")
    add("--windows", type=int, default=128, help="held-out windows (128)")
    add("--teacher-width", type=int, default=128, help="a multiple of 4 (128)")
    add("--teacher-layers", type=int, default=3)
    add("--student-width", type=int, default=48, help="a multiple of 4 (48)")
    add("--student-layers", type=int, default=1)
    add("--learning-rate", type=float, default=0.03, help="of Muon; a tenth for Adam (0.03)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("results/distill_lm"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: tiny models, few steps")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int | float) and name not in NOT_POSITIVE and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if args.targets == "sampled" and args.divergence != "forward":
        parser.error(
            f"--targets sampled is unbiased for --divergence forward alone, not {args.divergence}; "
            "take --targets top-k or full"
        )
    if args.vocabulary < ASCII:
        parser.error(f"--vocabulary must be at least {ASCII}, the ASCII characters")
    args.bytes_per_token = 2 if args.vocabulary >= ASCII**2 else 1
    return args


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    text = load_text(args.seed, args.bytes_per_token)
    print(f"Text: {len(text.train):,} tokens to train on, {len(text.held_out):,} held out.")
    check_memory(args)
    trained = train_all(text, args)
    table = report(trained, args)
    print(f"\n{table}\n")
    memory = {
        size: (loss_memory(args, size, fused=False), loss_memory(args, size, fused=True))
        for size in VOCABULARIES[: 2 if args.quick else None]
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    results = {
        "arguments": vars(args),
        "environment": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "bits per byte": {name: dict(zip(run.steps, run.course)) for name, run in trained.items()},
        "MiB, dense and fused, by vocabulary": memory,
    }
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    plot_curves(trained, args.output / "curves.png")
    plot_memory(memory, args, args.output / "memory.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
