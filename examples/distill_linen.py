"""`kljax.distillation_loss` in a Flax Linen training loop, on scikit-learn's digits.

A wide teacher learns from all labels; a narrow student learns from the teacher and five labels
per class, the same student from those labels alone. A few seconds on a CPU:

    python examples/distill_linen.py

`distill_digits.py` is the fuller example.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kljax

CLASSES, PER_CLASS, EPOCHS, BATCH = 10, 5, 40, 128
Arrays = dict[str, Any]


class Perceptron(nn.Module):
    width: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(self.width)(images)))


@jax.jit
def train_step(
    state: TrainState, batch: Arrays, soft_weight: float, hard_weight: float
) -> tuple[TrainState, Any]:
    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        return kljax.distillation_loss(
            state.apply_fn({"params": params}, batch["images"]),
            batch["teacher_logits"],
            batch["labels"],
            label_weights=batch["label_weights"],
            temperature=2.0,
            soft_weight=soft_weight,
            hard_weight=hard_weight,
        )

    (_, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), metrics


def train(width: int, data: Arrays, soft_weight: float, hard_weight: float) -> TrainState:
    model = Perceptron(width)
    params = model.init(jax.random.key(0), data["images"][:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(3e-3))
    rng, metrics = np.random.default_rng(0), None
    for _ in range(EPOCHS):
        shuffled = rng.permutation(len(data["images"]))
        for rows in np.split(shuffled, range(BATCH, len(shuffled), BATCH))[:-1]:
            batch = {name: array[rows] for name, array in data.items()}
            state, metrics = train_step(state, batch, soft_weight, hard_weight)
    if soft_weight and metrics:
        print("Last batch:", ", ".join(f"{k} {v:.3f}" for k, v in metrics._asdict().items()))
    return state


def predict(state: TrainState, images: np.ndarray) -> np.ndarray:
    return np.asarray(state.apply_fn({"params": state.params}, images))


def main() -> None:
    digits: Any = load_digits()
    pixels = digits.data.astype(np.float32) / 16
    images, test_images, labels, test_labels = train_test_split(
        pixels, digits.target, test_size=0.25, stratify=digits.target, random_state=0
    )
    data = {
        "images": images,
        "labels": labels,
        "label_weights": np.ones(len(labels), np.float32),
        "teacher_logits": np.zeros((len(labels), CLASSES), np.float32),
    }
    teacher = train(512, data, soft_weight=0.0, hard_weight=1.0)

    few = np.concatenate([np.flatnonzero(labels == digit)[:PER_CLASS] for digit in range(CLASSES)])
    data["label_weights"] = np.isin(np.arange(len(labels)), few).astype(np.float32)
    data["teacher_logits"] = predict(teacher, images)
    models = {
        "teacher": teacher,
        "student, labels only": train(32, data, soft_weight=0.0, hard_weight=1.0),
        "student, distilled": train(32, data, soft_weight=1.0, hard_weight=1.0),
    }
    for name, state in models.items():
        accuracy = np.mean(predict(state, test_images).argmax(-1) == test_labels)
        print(f"{name:<20}  test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
