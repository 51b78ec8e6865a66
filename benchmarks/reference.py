"""The gradient in NumPy float64, from its formula, on a few tokens and a few classes.

A divergence with slope u_c = dD/ds_c has dD/dz_i = s_i (u_i - Σ_c s_c u_c) through s = softmax(z).
A top-k teacher sees the classes outside its own as one, whose slope they share.
"""

from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import Case, Inputs

Array = np.ndarray

_COLUMNS = 8192  # of a kernel widened at a time
_ROWS = 256  # tokens at a time, for a kernel's gradient
_MOST_OPERATIONS = 3e11  # of float64, that a kernel's gradient may take


class Reference(NamedTuple):
    """Exact gradients: of the first student array on some tokens, of a kernel in some classes."""

    tokens: list[int]
    rows: Array
    classes: list[int]
    columns: Array | None  # None where there is no kernel, or it would take too long


def reference(case: Case, given: Inputs) -> Reference:
    """The gradient of the mean over tokens, at the first, a middle and the last of each axis."""
    tokens, classes = _spread(case.tokens), _spread(case.vocab)
    slope = _logits_gradient(case, given, tokens)
    if not case.has_head:
        return Reference(tokens, slope, classes, None)
    hidden, kernel = (np.asarray(x) for x in given.student)
    rows = np.zeros((len(tokens), case.hidden))
    for i in range(0, case.vocab, _COLUMNS):
        rows += slope[:, i : i + _COLUMNS] @ _wide(kernel[:, i : i + _COLUMNS]).T
    operations = 2 * case.tokens * case.vocab * (case.hidden + case.teacher_hidden)
    if operations > _MOST_OPERATIONS:
        return Reference(tokens, rows, classes, None)
    columns = np.zeros((case.hidden, len(classes)))
    for i in range(0, case.tokens, _ROWS):
        block = list(range(i, min(i + _ROWS, case.tokens)))
        columns += _wide(hidden[i : i + _ROWS]).T @ _logits_gradient(case, given, block)[:, classes]
    return Reference(tokens, rows, classes, columns)


def error(exact: Reference, rows: Array, columns: Array | None) -> float:
    """The largest difference, relative to the largest entry of the exact gradient."""
    pairs = [(exact.rows, rows)]
    if exact.columns is not None and columns is not None:
        pairs.append((exact.columns, columns))
    largest = [np.max(np.abs(got - want)) / np.max(np.abs(want)) for want, got in pairs]
    return float(np.max(largest))  # NaN if any is


def logits_gradient(divergence: str, student: Array, teacher: Array, groups: Array | None) -> Array:
    """The gradient to logits, one row per token.

    `student` holds logits. `teacher` holds log-probabilities: of each class, or with `groups`, of
    the group that groups[n, i] names for class i of token n.
    """
    log_s = student - _logsumexp(student)
    if groups is None:
        log_q = log_s
    else:
        mass = np.zeros_like(teacher)
        np.add.at(mass, (np.arange(len(groups))[:, None], groups), np.exp(log_s))
        log_q = np.log(mass)
    u = _SLOPES[divergence](log_q, teacher)
    u = u - np.sum(np.exp(log_q) * u, axis=-1, keepdims=True)
    return np.exp(log_s) * (u if groups is None else np.take_along_axis(u, groups, axis=-1))


_SLOPES = {  # dD/dq, up to a constant, which the softmax removes
    "forward_kl": lambda log_q, log_p: -np.exp(log_p - log_q),
    "reverse_kl": lambda log_q, log_p: log_q - log_p,
    "jensen_shannon": lambda log_q, log_p: (log_q - np.logaddexp(log_q, log_p) + np.log(2)) / 2,
}


def _logits_gradient(case: Case, given: Inputs, tokens: list[int]) -> Array:
    student = _logits(given.student, tokens)
    if case.has_top_k:
        indices, best, tail = (np.asarray(x)[tokens] for x in given.teacher)
        groups = np.full(student.shape, case.k)
        np.put_along_axis(groups, indices, np.arange(case.k)[None], axis=-1)
        teacher = np.concatenate([best, tail[:, None]], axis=-1).astype(np.float64)
    else:
        groups = None
        teacher = _logits(given.teacher, tokens)
        teacher = teacher - _logsumexp(teacher)
    return logits_gradient(case.divergence, student, teacher, groups) / case.tokens


def _logits(given: tuple[Any, ...], tokens: list[int]) -> Array:
    first = _wide(given[0][np.array(tokens)])
    if len(given) == 1:
        return first
    kernel = np.asarray(given[1])
    blocks = range(0, kernel.shape[1], _COLUMNS)
    return np.concatenate([first @ _wide(kernel[:, i : i + _COLUMNS]) for i in blocks], axis=-1)


def _logsumexp(x: Array) -> Array:
    top = x.max(axis=-1, keepdims=True)
    return top + np.log(np.sum(np.exp(x - top), axis=-1, keepdims=True))


def _wide(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


def _spread(size: int) -> list[int]:
    return sorted({0, size // 2, size - 1})
