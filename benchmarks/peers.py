"""The contenders in JAX: kljax, and what people write or import instead.

A contender makes from a case a loss `(student, teacher) -> scalar`, or None where it has none.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import kljax
from benchmarks.cases import Case

Loss = Callable[[tuple[Any, ...], tuple[Any, ...]], Any]
Pair = tuple[Array, Array]  # log-probabilities of student and teacher


class Contender(NamedTuple):
    """What is measured, by name."""

    name: str
    loss: Callable[[Case], Loss | None]
    torch: bool = False


def contenders() -> list[Contender]:
    """Those in JAX that can run here."""
    found = [
        Contender("kljax", kljax_loss),
        Contender("kljax dense", kljax_dense),
        Contender("plain formula", plain),
        Contender("jax.checkpoint", checkpointed),
    ]
    if importlib.util.find_spec("optax") is not None:
        found.append(Contender("optax", optax_loss))
    return found


# --- kljax ---


def kljax_loss(case: Case) -> Loss:
    """What a user writes, the implementation left to the library."""
    divergence = getattr(kljax, case.divergence)

    def loss(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Array:
        predictions = kljax.Head(*student) if case.has_head else kljax.Logits(*student)
        if case.has_top_k:
            targets = kljax.TopK(*teacher)
        else:
            targets = kljax.Head(*teacher) if case.has_head else kljax.Logits(*teacher)
        return divergence(predictions, targets, reduction="mean")

    return loss


def kljax_dense(case: Case) -> Loss:
    """Whole logits arrays, those of a head made first."""
    divergence = getattr(kljax, case.divergence)

    def loss(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Array:
        targets = kljax.TopK(*teacher) if case.has_top_k else _logits(teacher)
        return divergence(_logits(student), targets, reduction="mean", implementation="dense")

    return loss


# --- the formula as people write it ---


def plain(case: Case) -> Loss:
    """The textbook formula in float32, as MaxText and Tunix compute it."""
    formula = _PLAIN[case.divergence]

    def loss(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Array:
        log_q, log_p = _log_probs(case, student, teacher, jnp.float32)
        return jnp.mean(jnp.sum(formula(log_q, log_p), axis=-1))

    return loss


def checkpointed(case: Case) -> Loss:
    """The same, recomputed in the backward pass instead of stored."""
    return jax.checkpoint(plain(case))


def _kl(log_p: Array, log_q: Array) -> Array:
    return jnp.exp(log_p) * (log_p - log_q)


def _js(log_q: Array, log_p: Array) -> Array:
    log_m = jnp.log((jnp.exp(log_p) + jnp.exp(log_q)) / 2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


_PLAIN = {
    "forward_kl": lambda log_q, log_p: _kl(log_p, log_q),
    "reverse_kl": lambda log_q, log_p: _kl(log_q, log_p),
    "jensen_shannon": _js,
}


def _logits(given: tuple[Any, ...]) -> Array:
    """Logits as they are, or made by the head."""
    return given[0] if len(given) == 1 else given[0] @ given[1]


def _log_probs(case: Case, student: tuple[Any, ...], teacher: tuple[Any, ...], dtype: Any) -> Pair:
    """Log-probabilities of both sides; with a top-k teacher over its classes and the rest."""
    log_q = jax.nn.log_softmax(_logits(student).astype(dtype))
    if not case.has_top_k:
        return log_q, jax.nn.log_softmax(_logits(teacher).astype(dtype))
    indices, best, tail = teacher
    picked = jnp.take_along_axis(log_q, indices, axis=-1)
    rest = jnp.log1p(-jnp.sum(jnp.exp(picked), axis=-1, keepdims=True))
    log_p = jnp.concatenate([best, tail[:, None]], axis=-1).astype(dtype)
    return jnp.concatenate([picked, rest], axis=-1), log_p


# --- optax ---


def optax_loss(case: Case) -> Loss:
    """`optax.kl_divergence(log_predictions, targets)`, in the dtype of its inputs."""
    optax = importlib.import_module("optax")
    # But the rest of a top-k teacher's mass is lost in 16 bits.
    dtype = jnp.float32 if case.has_top_k else jnp.dtype(case.dtype)

    def loss(student: tuple[Any, ...], teacher: tuple[Any, ...]) -> Array:
        log_q, log_p = _log_probs(case, student, teacher, dtype)
        if case.divergence == "forward_kl":
            each = optax.kl_divergence(log_q, jnp.exp(log_p))
        elif case.divergence == "reverse_kl":
            each = optax.kl_divergence(log_p, jnp.exp(log_q))
        else:
            p, q = jnp.exp(log_p), jnp.exp(log_q)
            log_m = jnp.log((p + q) / 2)
            each = (optax.kl_divergence(log_m, p) + optax.kl_divergence(log_m, q)) / 2
        return jnp.mean(each)

    return loss
