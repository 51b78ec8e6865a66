"""The oracle for what is never held whole: logits behind a head, a teacher's best classes.

As in `oracle`: NumPy float64, textbook formulas, row by row, and complex steps for derivatives.
"""

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import oracle

Array = np.ndarray
Arrays = dict[str, Any]

_STEP = 1e-50


def _number(x: Any) -> Array:
    x = np.asarray(x)
    return x if np.iscomplexobj(x) else x.astype(np.float64)


# --- derivatives of any oracle function of named arrays ---


def gradients(f: Callable[[Arrays], Any], arrays: Arrays) -> Arrays:
    """Return the derivative of the number f(arrays) by each entry of each array."""
    out = {}
    for name, x in arrays.items():
        slope = np.empty(np.shape(x))
        for i in np.ndindex(slope.shape):
            moved = _number(x).astype(complex)
            moved[i] += 1j * _STEP
            slope[i] = np.imag(f({**arrays, name: moved})) / _STEP
        out[name] = slope
    return out


def tangent(f: Callable[[Arrays], Any], arrays: Arrays, directions: Arrays) -> Any:
    """Return the derivative of f(arrays), of any shape, along directions of all arrays."""
    moved = {
        name: _number(x) + 1j * _STEP * _number(directions[name]) for name, x in arrays.items()
    }
    return np.imag(f(moved)) / _STEP


# --- divergences, also of heads ---


def squared_hellinger(log_s: Any, log_t: Any, axis: oracle.Axis = -1) -> Array:
    """½ Σ (√s - √t)²: a divergence that the library does not have, for `kljax.divergence`."""
    return 0.5 * ((np.sqrt(np.exp(log_s)) - np.sqrt(np.exp(log_t))) ** 2).sum(axis)


DIVERGENCES = oracle.DIVERGENCES | {"squared_hellinger": squared_hellinger}


def logits(
    hidden: Any, kernel: Any, bias: Any = None, softcap: float | None = None, scale: Any = None
) -> Array:
    """z = scale·(hidden @ kernel + bias), then softcap·tanh(z / softcap)."""
    with np.errstate(invalid="ignore"):
        z = _number(hidden) @ _number(kernel)
    z = z if bias is None else z + _number(bias)
    z = z if scale is None else z * _number(scale)
    return z if softcap is None else softcap * np.tanh(z / softcap)


def divergence(
    name: str,
    predictions: Any,
    targets: Any = None,
    *,
    kinds: tuple[str, str] = ("logits", "logits"),
    where: Any = None,
    temperature: Any = None,
    **params: Any,
) -> Array:
    """As `oracle.divergence` along the last axis, where a side may be a head: a dict of its parts.

    A head's kind is "logits".
    """
    sides = [logits(**x) if isinstance(x, dict) else x for x in (predictions, targets)]
    options = {"where": where, "temperature": temperature}
    if name == "squared_hellinger":
        log_s, log_t = (
            oracle.log_probs(x, k, **options) for x, k in zip(sides, kinds, strict=True)
        )
        return squared_hellinger(log_s, log_t)
    return oracle.divergence(name, *sides, kinds=kinds, **options, **params)


# --- a teacher's best classes ---


def _logsumexp(x: Array) -> Any:
    """log Σ exp(x) of a vector; -inf of none."""
    x = x[x.real > -np.inf] if not np.isnan(x).any() else x
    if x.size == 0:
        return -np.inf
    top = x.real.max()
    return top + np.log(np.exp(x - top).sum())


def _log1mexp(x: Any) -> Any:
    """log(1 - exp(x)) for x ≤ 0, and -inf for x > 0: no mass is left."""
    return np.log(-np.expm1(x)) if np.real(x) < 0 else -np.inf


def top_k(logits: Any, k: int, temperature: Any = None) -> Arrays:
    """Return the indices and log-probabilities of the k best classes, and the log of the rest."""
    logits = _number(logits)
    log_probs = oracle.log_probs(logits, temperature=temperature)
    order = np.argsort(-logits.real, axis=-1, kind="stable")
    best, rest = order[..., :k], order[..., k:]
    tail = np.take_along_axis(log_probs, rest, -1)
    log_tail = np.empty(tail.shape[:-1], tail.dtype)
    for row in np.ndindex(log_tail.shape):
        log_tail[row] = _logsumexp(tail[row])
    return {
        "indices": best,
        "log_probs": np.take_along_axis(log_probs, best, -1),
        "log_tail": log_tail,
    }


def top_k_divergence(
    name: str,
    predictions: Any,
    indices: Any,
    log_probs: Any,
    log_tail: Any = None,
    *,
    tail: str = "bucket",
    kind: str = "logits",
    where: Any = None,
    temperature: Any = None,
    **params: Any,
) -> Array:
    """Return the per-example divergence from the targets' k best classes.

    K are the classes whose log-probability is not -inf. "bucket": K and one class for all others.
    "renormalize": targets renormalised on K, 0 elsewhere. "renormalize_both": both on K.
    "truncate": the terms of K, added up. The temperature is the predictions'.
    """
    if isinstance(predictions, dict):
        predictions = logits(**predictions)
    log_s = oracle.log_probs(predictions, kind, where=where, temperature=temperature)
    indices, log_probs = np.asarray(indices), _number(log_probs)
    batch = max(log_s.shape[:-1], indices.shape[:-1], key=len)
    wide = lambda x, n: np.broadcast_to(x, (*batch, *x.shape[x.ndim - n :]))  # noqa: E731
    log_s, indices, log_probs = (wide(x, 1) for x in (log_s, indices, log_probs))
    log_tail = None if log_tail is None else wide(_number(log_tail), 0)
    values = []
    for row in np.ndindex(batch):
        rest = None if log_tail is None else log_tail[row]
        pair = _on_the_best(log_s[row], indices[row], log_probs[row], rest, tail)
        values.append(DIVERGENCES[name](*pair, -1, **params))
    return np.array(values).reshape(batch)


def _on_the_best(
    log_s: Array, indices: Array, log_t: Array, log_tail: Any, tail: str
) -> tuple[Array, Array]:
    """Both sides of one example, as log-probabilities of the classes that take part."""
    kept = log_t.real != -np.inf
    best, log_t = indices[kept], log_t[kept]
    if tail == "bucket":
        outside = ~np.isin(np.arange(log_s.size), best)
        if log_tail is None:
            log_tail = _log1mexp(_logsumexp(log_t))
        return np.append(log_s[best], _logsumexp(log_s[outside])), np.append(log_t, log_tail)
    if tail == "truncate":
        return log_s[best], log_t
    log_t = log_t - _logsumexp(log_t)
    if tail == "renormalize_both":
        return log_s[best] - _logsumexp(log_s[best]), log_t
    if tail == "renormalize":
        everywhere = np.full(log_s.shape, -np.inf, log_t.dtype)
        everywhere[best] = log_t
        return log_s, everywhere
    raise ValueError(f"unknown tail {tail!r}")


# --- a teacher's sampled classes ---


def importance_weights(
    logits: Any, counts: Any, *, proposal_power: float = 1.0, temperature: float | None = None
) -> Array:
    """count·p / (n·q) of every class, for n draws from q = softmax(power · logits / T)."""
    log_p = oracle.log_probs(logits, temperature=temperature)
    log_q = proposal(logits, proposal_power=proposal_power, temperature=temperature)
    counts = np.asarray(counts, np.float64)
    ratio = np.exp(np.where(log_q == -np.inf, 0.0, log_p - log_q))
    return counts / counts.sum(-1, keepdims=True) * ratio


def proposal(
    logits: Any, *, proposal_power: float = 1.0, temperature: float | None = None
) -> Array:
    """The log-probabilities of a draw."""
    return oracle.log_probs(_number(logits) * proposal_power, temperature=temperature)


def draws(log_probs: Any, n: int) -> Iterator[tuple[Array, float]]:
    """Every outcome of n draws with replacement: how often each class came, how likely that is."""
    probs, seen = np.exp(log_probs), {}
    for ids in product(range(probs.size), repeat=n):
        counts = tuple(np.bincount(ids, minlength=probs.size).tolist())
        seen[counts] = seen.get(counts, 0.0) + math.prod(probs[list(ids)])
    for counts, probability in seen.items():
        yield np.array(counts), probability
