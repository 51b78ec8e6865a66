"""Compile every contender, call them in turn, and time each call."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import reference, torch_peers
from benchmarks.cases import Case, Inputs, Rates, floor, inputs, structs
from benchmarks.peers import Contender, Loss

Call = Callable[[], Any]


class Limits(NamedTuple):
    """How long and how often to call, and how much memory there is."""

    seconds: float  # of calls per case, all contenders together
    repeats: int  # at most; at least three, but one for a contender that would take too long
    memory: int  # bytes


class Program(NamedTuple):
    """A contender made ready for a case."""

    value: Call
    value_and_grad: Call  # -> gradients to the student's arrays
    memory: dict[str, int]  # empty where the compiler does not say
    gathered: Callable[[Any, list[int], int], np.ndarray]


def device_memory() -> int:
    """Bytes that the device has, or that this machine has free."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    with open("/proc/meminfo") as lines:
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kibibytes["MemAvailable"] * 1024


# --- rates ---


def measure_rates(dtypes: Iterable[str], nbytes: int = 2**28, seconds: float = 0.1) -> Rates:
    """The best of a streaming sum in place, and of square matrix products."""
    x, y = (jnp.ones(nbytes // 4, jnp.float32) for _ in range(2))
    add = jax.jit(jnp.add, donate_argnums=0).lower(x, y).compile()
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x, y))
        best = min(best, time.perf_counter() - began)
    return Rates(3 * nbytes / best, {dtype: _matmul_rate(dtype, seconds) for dtype in dtypes})


def _matmul_rate(dtype: str, seconds: float) -> float:
    """Of the smallest product, by doubling its side, that takes so long."""
    size, best = 512, 0.0
    while best < seconds:
        size *= 2
        best = _product_seconds(size, dtype)
    return 2 * size**3 / best


def _product_seconds(size: int, dtype: str) -> float:
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul).lower(x, x).compile()
    return min(_timed(lambda: jax.block_until_ready(product(x, x))) for _ in range(5))


def _timed(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- timing ---


def in_turn(calls: dict[Any, Call], limits: Limits) -> dict[Any, list[float]]:
    """Seconds of each call, called alternately, so that noise hits all alike.

    All have been compiled; the first call here warms up, the second tells how long it takes. One
    so slow that three more would not fit an equal share of the time is left at that one sample.
    """
    first = {}
    for name, call in calls.items():
        call()
        first[name] = _timed(call)
    share = limits.seconds / len(calls)
    names = [name for name, seconds in first.items() if 3 * seconds <= share]
    samples = {name: [] if name in names else [seconds] for name, seconds in first.items()}
    rounds = int(limits.seconds / sum(first[name] for name in names)) if names else 0
    for i in range(min(max(rounds, 3), limits.repeats)):
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            samples[name].append(_timed(calls[name]))
    return samples


def summary(samples: list[float]) -> dict[str, Any]:
    """Seconds: the median with the extremes, and all of them."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": samples,
    }


# --- programs ---


def compile_gradient(loss: Loss, given: Inputs) -> Any:
    """Value with gradients to the student, compiled for arrays or for their shapes."""
    return jax.jit(jax.value_and_grad(loss)).lower(*given).compile()


def memory(compiled: Any) -> dict[str, int]:
    """Bytes beyond inputs and outputs, and of everything at once, as the compiler counts them."""
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    temporary = stats.temp_size_in_bytes
    return {"temporary": temporary, "peak": held + temporary}


def _program(contender: Contender, case: Case, given: Inputs, limits: Limits) -> Program | str:
    """The contender ready to be called, or why it is not."""
    loss = contender.loss(case)
    if loss is None:
        return "has no such loss"
    if contender.torch:
        # Eager torch holds at least log-probabilities, products and gradients of them in float32.
        needed = 8 * 4 * case.tokens * case.vocab
        if needed > limits.memory:
            return f"would need about {_size(needed)}"
        value, value_and_grad = torch_peers.prepare(case, loss, given)
        return Program(value, value_and_grad, {}, torch_peers.gathered)
    value = jax.jit(loss).lower(*given).compile()
    value_and_grad = compile_gradient(loss, given)
    needed = memory(value_and_grad)
    if needed["peak"] > limits.memory:
        return f"needs {_size(needed['peak'])}"
    return Program(
        lambda: jax.block_until_ready(value(*given)),
        lambda: jax.block_until_ready(value_and_grad(*given))[1],
        {"value_temporary": memory(value)["temporary"], **needed},
        lambda x, index, axis: np.asarray(jnp.take(x, np.array(index), axis)).astype(np.float64),
    )


def _reason(contender: Contender, failure: Exception) -> str:
    """A peer that cannot run is part of the result, and so is any lack of memory."""
    if contender.name.startswith("kljax") and not isinstance(failure, jax.errors.JaxRuntimeError):
        raise failure
    return f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


# --- one case ---


def measure(
    case: Case, contenders: list[Contender], rates: Rates, limits: Limits
) -> dict[str, Any]:
    """Every contender on one case."""
    given = inputs(case)
    programs: dict[str, Program] = {}
    results: list[dict[str, Any]] = []
    for contender in contenders:
        try:
            program = _program(contender, case, given, limits)
            if isinstance(program, Program):
                program.value_and_grad()
        except Exception as failure:
            program = _reason(contender, failure)
        if isinstance(program, Program):
            programs[contender.name] = program
        else:
            results.append({"contender": contender.name, "status": program})

    least = floor(case, rates)
    for name, found in _measured(case, given, programs, limits).items():
        ratios = {
            f"{part}_over_floor": found[part]["median"] / getattr(least, part)
            for part in ("value", "value_and_grad")
        }
        results.append({"contender": name, "status": "ok", **found, **ratios})
    order = [contender.name for contender in contenders]
    return {
        **vars(case),
        "name": case.name,
        "logits_bytes": case.logits_bytes,
        "floor": least._asdict(),
        "contenders": sorted(results, key=lambda result: order.index(result["contender"])),
    }


def _measured(
    case: Case, given: Inputs, programs: dict[str, Program], limits: Limits
) -> dict[str, dict[str, Any]]:
    if not programs:
        return {}
    exact = reference.reference(case, given)
    calls = {(name, "value"): program.value for name, program in programs.items()}
    calls |= {
        (name, "value_and_grad"): program.value_and_grad for name, program in programs.items()
    }
    samples = in_turn(calls, limits)
    return {
        name: {
            "value": summary(samples[name, "value"]),
            "value_and_grad": summary(samples[name, "value_and_grad"]),
            "memory": program.memory,
            "gradient_error": _error(exact, program),
        }
        for name, program in programs.items()
    }


def _error(exact: reference.Reference, program: Program) -> float:
    first, *kernel = program.value_and_grad()
    rows = program.gathered(first, exact.tokens, 0)
    columns = program.gathered(kernel[0], exact.classes, 1) if kernel else None
    return reference.error(exact, rows, columns)


def memory_of(cases: Iterable[Case], contenders: list[Contender]) -> list[dict[str, Any]]:
    """Bytes of value and gradient, compiled only: no array is made, so none can be too large."""
    found = []
    for case, contender in itertools.product(cases, contenders):
        loss = None if contender.torch else contender.loss(case)
        if loss is None:
            continue
        row = {**vars(case), "contender": contender.name}
        try:
            sizes = memory(compile_gradient(loss, structs(case)))
        except Exception as failure:
            found.append({**row, "status": _reason(contender, failure)})
        else:
            found.append({**row, "status": "ok", **sizes})
    return found
