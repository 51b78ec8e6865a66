"""One case: a divergence of a student from a teacher, its arrays, and the least it can cost."""

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import kljax

Kind = Literal["logits", "head", "top-k", "top-k head"]
KINDS: tuple[Kind, ...] = ("logits", "head", "top-k", "top-k head")
DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon")


@dataclass(frozen=True)
class Case:
    """Value, and gradient to the student, of the mean over tokens of one divergence.

    | kind       | student        | teacher                              |
    | logits     | logits         | logits                               |
    | head       | hidden, kernel | hidden, kernel                       |
    | top-k      | logits         | indices, log-probabilities, log tail |
    | top-k head | hidden, kernel | indices, log-probabilities, log tail |
    """

    kind: Kind
    divergence: str
    dtype: str
    tokens: int
    vocab: int
    hidden: int = 0
    teacher_hidden: int = 0
    k: int = 0
    model: str = ""

    @property
    def name(self) -> str:
        shape = f"{self.tokens}x{self.vocab}"
        return " ".join([self.kind, self.divergence, self.dtype, shape, self.model]).strip()

    @property
    def has_head(self) -> bool:
        return self.kind in ("head", "top-k head")

    @property
    def has_top_k(self) -> bool:
        return self.kind in ("top-k", "top-k head")

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * jnp.dtype(self.dtype).itemsize


class Inputs(NamedTuple):
    """The arrays of a case; gradients are to all of the student's."""

    student: tuple[Any, ...]
    teacher: tuple[Any, ...]


def structs(case: Case) -> Inputs:
    """Shapes and dtypes alone, to compile for."""
    rows, dtype = case.tokens, jnp.dtype(case.dtype)
    logits = (jax.ShapeDtypeStruct((rows, case.vocab), dtype),)

    def head(hidden: int) -> tuple[Any, ...]:
        return (
            jax.ShapeDtypeStruct((rows, hidden), dtype),
            jax.ShapeDtypeStruct((hidden, case.vocab), dtype),
        )

    top_k = (
        jax.ShapeDtypeStruct((rows, case.k), jnp.int32),
        jax.ShapeDtypeStruct((rows, case.k), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    student = head(case.hidden) if case.has_head else logits
    teacher = head(case.teacher_hidden) if case.has_head else logits
    return Inputs(student, top_k if case.has_top_k else teacher)


def inputs(case: Case) -> Inputs:
    """Logits of standard deviation 2; where both sides hold logits, the student's are near."""
    return _inputs(replace(case, divergence=""))


@functools.lru_cache(maxsize=1)  # the divergences of one shape follow each other
def _inputs(case: Case) -> Inputs:
    teacher_key, student_key = jax.random.split(jax.random.key(0))
    if case.kind == "head":
        student = _head(student_key, case, case.hidden)
        teacher = _head(teacher_key, case, case.teacher_hidden)
        return jax.block_until_ready(Inputs(student, teacher))
    logits = _logits(teacher_key, case)
    if case.has_head:
        student = _head(student_key, case, case.hidden)
    else:
        student = (_near(student_key, logits),)
    teacher = (logits,)
    if case.has_top_k:
        best = kljax.top_k(logits, case.k)
        teacher = (best.indices, best.log_probs, best.log_tail)
    return jax.block_until_ready(Inputs(student, teacher))


@jax.jit(static_argnames="case")
def _logits(key: Array, case: Case) -> Array:
    return 2 * jax.random.normal(key, (case.tokens, case.vocab), case.dtype)


@jax.jit
def _near(key: Array, logits: Any) -> Array:
    return logits + jax.random.normal(key, logits.shape, logits.dtype) / 2


@jax.jit(static_argnames=("case", "size"))
def _head(key: Array, case: Case, size: int) -> tuple[Array, Array]:
    hidden_key, kernel_key = jax.random.split(key)
    hidden = jax.random.normal(hidden_key, (case.tokens, size), case.dtype)
    kernel = jax.random.normal(kernel_key, (size, case.vocab), case.dtype)
    return hidden, kernel * (2 / size**0.5)


class Rates(NamedTuple):
    """What the device was seen to reach in this run."""

    bandwidth: float  # bytes read and written per second
    operations: dict[str, float]  # of a matrix product, per second, by dtype


class Floor(NamedTuple):
    """Seconds below which no implementation can be, at the measured rates."""

    value: float
    value_and_grad: float


def floor(case: Case, rates: Rates) -> Floor:
    """Inputs read and gradients written once, or the matrix products where they take longer."""
    given = structs(case)
    read = _bytes(given.student) + _bytes(given.teacher)
    written = _bytes(given.student)
    student = 2 * case.tokens * case.vocab * case.hidden if case.has_head else 0
    teacher = 2 * case.tokens * case.vocab * case.teacher_hidden if case.kind == "head" else 0
    rate = rates.operations[case.dtype] if case.has_head else 1.0
    return Floor(
        max(read / rates.bandwidth, (student + teacher) / rate),
        max((read + written) / rates.bandwidth, (3 * student + teacher) / rate),
    )


def _bytes(arrays: tuple[Any, ...]) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
