"""`kljax.distillation_loss` as a distillation strategy of Tunix, in Tunix's own trainer.

A teacher learns to predict the next byte of lines of Python's own standard library. Three students
learn from it, from the same parameters and batches: by Tunix's `LogitStrategy`, by `KljaxStrategy`
from logits, and by the same from a `kljax.Head`, hidden states and the output kernel, so that the
trainer holds no logits, neither the student's nor the teacher's. A minute on two CPU cores:

    pip install google-tunix
    python examples/tunix_distillation.py

The two losses are the same number, with the same gradient, where every position counts and every
logit is finite: alpha · T² · D(teacher, student; T) + (1 - alpha) · H(labels, student), the mean
over all positions of the batch. Where they differ, as of google-tunix 0.1.7:

- Tunix has no mask. Padding trains the student in the soft term like any other position, and is
  counted by both means: its training loss is not comparable. Here a label of -1 does not count.
- A class masked by a logit of -inf makes Tunix's loss NaN, as 0 · inf. Here it contributes 0.
- Tunix takes one-hot labels, an array as large as the logits. Here labels are integers.
- Tunix's metric "distill/soft_loss" is times T²; "distill/soft" here is its "distill/kl_div".

What loss and gradient take beside inputs and outputs, compiled for a CPU at 4,096 positions and
32,768 classes: 3,586 MiB with Tunix's strategy, 1,090 with this one, 292 with heads.
"""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from tunix.distillation import (  # pyrefly: ignore[missing-import]  (not among the dependencies)
    DistillationTrainer,
    TrainingConfig,
    TrainingInput,
)
from tunix.distillation.strategies import (  # pyrefly: ignore[missing-import]
    BaseStrategy,
    LogitStrategy,
)
from tunix.sft.peft_trainer import PeftTrainer  # pyrefly: ignore[missing-import]

import kljax

VOCABULARY, LENGTH, BATCH = 128, 64, 32  # ASCII; bytes in a line, lines in a batch
TEACHER_STEPS, STUDENT_STEPS = 300, 100
TEMPERATURE, ALPHA = 2.0, 0.9


class KljaxStrategy(BaseStrategy):
    """Distillation from what the forward functions return: logits, or a `kljax.Head`.

    `labels_fn` returns integers of the batch shape; what is negative does not count.
    """

    def __init__(
        self,
        student_forward_fn: Callable[..., Any],
        teacher_forward_fn: Callable[..., Any],
        labels_fn: Callable[..., Array],
        temperature: float = 2.0,
        alpha: float = 0.5,
        **options: Any,
    ) -> None:
        """Takes what `LogitStrategy` takes, and options of `kljax.distillation_loss`."""
        super().__init__(student_forward_fn, teacher_forward_fn, labels_fn)
        weights = {"soft_weight": alpha, "hard_weight": 1 - alpha}
        self.options: dict[str, Any] = {"temperature": temperature, **weights, **options}

    def compute_loss(
        self, student_output: Any, teacher_output: Any, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        loss, metrics = kljax.distillation_loss(
            student_output, teacher_output, labels, weights=labels >= 0, **self.options
        )
        return loss, {f"distill/{name}": value for name, value in metrics._asdict().items()}

    def compute_eval_loss(
        self, student_output: Any, labels: Array
    ) -> tuple[Array, dict[str, Array]]:
        loss = kljax.cross_entropy(student_output, labels, weights=labels >= 0, reduction="mean")
        return loss, {}


class Model(nnx.Module):
    """What follows a byte, from it and the seven before it."""

    def __init__(self, width: int, vocabulary: int = VOCABULARY) -> None:
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.convolution = nnx.Conv(width, width, (8,), padding="CAUSAL", rngs=rngs)
        self.output = nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """Hidden states."""
        return nnx.gelu(self.convolution(self.embedding(tokens)))


def logits(model: Model, input_tokens: Array, input_mask: Array) -> Array:
    return model.output(model(input_tokens))


def head(model: Model, input_tokens: Array, input_mask: Array) -> kljax.Head:
    return kljax.Head(model(input_tokens), model.output.kernel[...])


def next_tokens(input_tokens: Array, input_mask: Array) -> Array:
    """The labels: -1 at padding and at the last position, which nothing follows."""
    labels = jnp.where(input_mask, input_tokens, -1)[:, 1:]
    return jnp.pad(labels, ((0, 0), (0, 1)), constant_values=-1)


def one_hot_next_tokens(input_tokens: Array, input_mask: Array) -> Array:
    """As Tunix takes them; of all zeros at padding, which is the most that can be said to it."""
    return jax.nn.one_hot(next_tokens(input_tokens, input_mask), VOCABULARY)


STRATEGIES: dict[str, Callable[[], BaseStrategy]] = {
    "Tunix, logits": lambda: LogitStrategy(logits, logits, one_hot_next_tokens, TEMPERATURE, ALPHA),
    "kljax, logits": lambda: KljaxStrategy(logits, logits, next_tokens, TEMPERATURE, ALPHA),
    "kljax, heads": lambda: KljaxStrategy(head, head, next_tokens, TEMPERATURE, ALPHA),
}


def batches(steps: int, seed: int) -> list[TrainingInput]:
    """Random lines of the library's modules, padded with 0."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    sources = [source for path in files if (source := path.read_bytes()).isascii()]
    lines = [line[:LENGTH] for line in b"\n".join(sources).split(b"\n") if line.strip()]
    chosen = np.random.default_rng(seed).choice(len(lines), size=(steps, BATCH))
    text = b"".join(lines[i].ljust(LENGTH, b"\0") for i in chosen.ravel())
    tokens = np.frombuffer(text, np.uint8).astype(np.int32).reshape(steps, BATCH, LENGTH)
    return [TrainingInput(input_tokens=each, input_mask=each != 0) for each in tokens]


def train_teacher(steps: int) -> Model:
    """On labels alone, in the trainer that Tunix's other trainers are made of."""

    def loss(model: Model, input_tokens: Array, input_mask: Array) -> Array:
        labels = next_tokens(input_tokens, input_mask)
        model_head = head(model, input_tokens, input_mask)
        return kljax.cross_entropy(model_head, labels, weights=labels >= 0, reduction="mean")

    teacher = Model(128)
    config = TrainingConfig(eval_every_n_steps=steps)
    trainer: Any = PeftTrainer(teacher, optax.adam(3e-3), config)
    trainer.with_gen_model_input_fn(
        lambda x: {"input_tokens": x.input_tokens, "input_mask": x.input_mask}
    )
    trainer.with_loss_fn(loss).train(batches(steps, seed=0))
    return teacher


def distill(strategy: BaseStrategy, teacher: Model, steps: int) -> tuple[Model, np.ndarray]:
    """A student, and its loss at every step."""
    student, config = Model(32), TrainingConfig(eval_every_n_steps=steps)
    trainer: Any = DistillationTrainer(student, teacher, strategy, optax.adam(3e-3), config)
    trainer.train(batches(steps, seed=1))
    return student, trainer.metrics_logger.get_metric_history("", "loss", "train")


def evaluate(student: Model, teacher: Model) -> kljax.DistillationMetrics:
    """On fresh lines, without their padding."""
    batch = batches(20, seed=2)
    tokens, mask = (
        jnp.concatenate([getattr(each, name) for each in batch])
        for name in ("input_tokens", "input_mask")
    )
    given, target = (head(model, tokens, mask) for model in (student, teacher))
    labels = next_tokens(tokens, mask)
    return kljax.distillation_loss(given, target, labels, weights=labels >= 0)[1]


def main() -> None:
    teacher = train_teacher(TEACHER_STEPS)
    print(f"{'nats per byte':<24}{'training loss':>16}{'KL to teacher':>16}{'cross-entropy':>16}")

    def show(name: str, model: Model, losses: str = "") -> None:
        seen = evaluate(model, teacher)
        print(f"{name:<24}{losses:>16}{seen.divergence:>16.3f}{seen.hard:>16.3f}", flush=True)

    show("teacher", teacher)
    show("student, untrained", Model(32))
    for name, strategy in STRATEGIES.items():
        student, losses = distill(strategy(), teacher, STUDENT_STEPS)
        show(f"student, {name}", student, f"{losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
