"""What a loss costs beside its arithmetic: a call from Python, a train step's, and tracing."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

import kljax
from benchmarks import shapes
from benchmarks.runner import Call

CALLS = 200  # of one sample: a single one is shorter than the clock's noise
PARAMETERS = 200  # arrays of the train step's model


def plain(student: Array, teacher: Array) -> Array:
    """The formula, as a user writes it."""
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1))


def ours(student: Array, teacher: Array) -> Array:
    return kljax.forward_kl(student, teacher, reduction="mean")


LOSSES = {"kljax": ours, "plain formula": plain}


def calls() -> dict[str, tuple[float, dict[str, Call]]]:
    """By measure: how many times the plain formula's time is allowed, and what to time."""
    s, t = jax.random.normal(jax.random.key(0), (2, 32, 10))
    value = {name: jax.jit(loss) for name, loss in LOSSES.items()}
    gradient = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in LOSSES.items()}
    steps = {name: _train_step(loss) for name, loss in LOSSES.items()}
    return {
        "call of a jitted loss, 32x10": (1.3, _repeated(value, s, t)),
        "call of a jitted value and gradient, 32x10": (1.3, _repeated(gradient, s, t)),
        f"call of a train step over {PARAMETERS} arrays": (1.1, steps),
    }


def traces() -> dict[str, tuple[float, float]]:
    """By loss: the CPU seconds allowed, and taken, by tracing and lowering value and gradient."""
    of = jax.ShapeDtypeStruct
    logits = of((shapes.BUDGET_TOKENS, shapes.BUDGET_VOCAB), jnp.float32)
    tokens, hidden = shapes.BUDGET_HEAD_TOKENS, shapes.BUDGET_HEAD_HIDDEN
    states, kernel = (
        of(shape, jnp.float32) for shape in ((tokens, hidden), (hidden, shapes.BUDGET_HEAD_VOCAB))
    )
    labels = of((shapes.BUDGET_TOKENS,), jnp.int32)

    def heads(h: Array, k: Array, teacher_h: Array, teacher_k: Array) -> Array:
        student, teacher = kljax.Head(h, k), kljax.Head(teacher_h, teacher_k)
        return kljax.forward_kl(student, teacher, reduction="mean")

    def distillation(s: Array, t: Array, labels: Array) -> Array:
        return kljax.distillation_loss(s, t, labels, temperature=2.0, hard_weight=0.5)[0]

    return {
        "forward KL": (0.15, _traced(ours, logits, logits)),
        "heads": (0.4, _traced(heads, states, kernel, states, kernel)),
        "distillation with labels": (0.4, _traced(distillation, logits, logits, labels)),
    }


def _repeated(functions: Mapping[str, Callable[..., Any]], *arguments: Array) -> dict[str, Call]:
    def repeat(function: Callable[..., Any]) -> Call:
        def call() -> Any:
            out = None
            for _ in range(CALLS):
                out = function(*arguments)
            return jax.block_until_ready(out)

        return call

    return {name: repeat(function) for name, function in functions.items()}


def _train_step(loss: Callable[[Array, Array], Array]) -> Call:
    """Momentum on a model of many small arrays: what a step costs is what it is called with."""
    keys = jax.random.split(jax.random.key(0), PARAMETERS)
    params = {f"w{i}": jax.random.normal(key, (1, 10)) for i, key in enumerate(keys)}
    x, t = jax.random.normal(jax.random.key(1), (2, 32, 10))
    optimizer = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        def of(params: Any) -> Array:
            return loss(x + sum(params.values(), jnp.zeros((1, 10))), t)

        value, gradient = jax.value_and_grad(of)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    def call() -> Any:
        held, state, value = params, optimizer.init(params), None
        for _ in range(CALLS // 10):
            held, state, value = step(held, state)
        return jax.block_until_ready(value)

    return call


def _traced(loss: Callable[..., Array], *arguments: Any) -> float:
    seconds = []
    for _ in range(3):
        jax.clear_caches()
        began = time.process_time()
        jax.jit(jax.value_and_grad(lambda *given: loss(*given))).lower(*arguments)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)
