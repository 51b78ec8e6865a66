"""`python -m kljax`: what a bug report needs to say, and a self-check of some ten seconds.

The check compares values and gradients on the default device with formulas that are written here
once more, in NumPy and float64, and times one loss beside the plain formula.
"""

import argparse
import math
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import kljax
from kljax import _pipeline, _reading
from kljax._engine import blocks, paths
from kljax._engine.blocks import Blocks
from kljax._engine.pairs import PairState

PACKAGES = ("jax", "jaxlib", "optax", "chex", "flax", "numpy")
FLAGS = ("enable_x64", "default_matmul_precision", "numpy_dtype_promotion", "debug_nans")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kljax", description=__doc__)
    parser.add_argument("--no-checks", action="store_true", help="print the facts alone")
    options = parser.parse_args(arguments)
    for name, fact in facts():
        _print(f"{name:<30} {fact}")
    _print("\nHow a value is computed here, in a program for one device")
    for name, way in ways():
        _print(f"{name:<46} {way}")
    return 0 if options.no_checks else self_check()


def _print(line: str) -> None:
    print(line, flush=True)  # what is known is shown even if the next step hangs


# --- facts ---


def facts() -> Iterator[tuple[str, object]]:
    """What needs no device comes first: it may be the device that is broken."""
    yield "kljax", kljax.__version__
    yield from ((package, _version(package)) for package in PACKAGES)
    yield "treated as jax", "0.10" if blocks._UPDATES_BITS else "0.12"
    yield "python", sys.version.replace("\n", " ")
    yield "system", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    yield from ((f"jax_{flag}", getattr(jax.config, f"jax_{flag}")) for flag in FLAGS)
    yield "XLA_FLAGS", os.environ.get("XLA_FLAGS", "not set")
    yield "default backend", jax.default_backend()
    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    yield "devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    device = _device()
    memory = (device.memory_stats() or {}).get("bytes_limit")
    yield "default device", f"{device}, memory {_size(memory) if memory else 'not told'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> jax.Device:
    return next(iter(jnp.zeros(()).devices()))


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.1f} GiB"


# --- ways ---


def ways() -> Iterator[tuple[str, str]]:
    """Of a few problems, how the library would compute them here; nothing is computed."""
    of = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    small, large, head = of((32, 1000)), of((4096, 32768)), (of((4096, 512)), of((512, 32768)))
    heads, best = kljax.Head(*head), of((4096, 64))
    teacher = kljax.TopK(jax.ShapeDtypeStruct(best.shape, jnp.int32), best, of((4096,)))
    yield "forward KL, logits 32 x 1000", way(kljax.forward_kl, small, small)
    yield "forward KL, logits 4096 x 32768", way(kljax.forward_kl, large, large)
    yield "Jensen-Shannon, logits 4096 x 32768", way(kljax.jensen_shannon, large, large)
    yield "forward KL, Heads 4096 x 512 x 32768", way(kljax.forward_kl, heads, heads)
    yield "forward KL, top-64 teacher, 4096 x 32768", way(kljax.forward_kl, large, teacher)


def way(divergence: Any, predictions: Any, targets: Any) -> str:
    cut = blocks_of(divergence, predictions, targets, platform=_device().platform)
    rows, turns = math.prod(cut.extents), math.prod(cut.counts)
    how = "whole" if cut.single else f"{turns} blocks of {rows} rows"
    if isinstance(targets, kljax.TopK):
        return f"{how}, on the few classes"
    passes = "one pass" if in_one_pass(divergence, predictions, targets) else "two passes"
    return f"{how}, {passes} over both sides"


def blocks_of(divergence: Any, *sides: Any, platform: str) -> Blocks:
    """Asked as `_pipeline` asks, of shapes alone."""
    asked, found = divergence.bind().formula, []

    def ask(*sides: Any) -> None:
        inputs = _reading.read(asked.name, dict(zip(asked.arguments, sides, strict=True)))
        waits = _pipeline.choose_term(asked, inputs).sums_slopes(inputs.sides)
        chosen = paths.choose(asked.name, None, inputs.layout, inputs.sides, sums_slopes=waits)
        found.append(chosen.on(platform))

    jax.eval_shape(ask, *sides)
    return found[0]


def in_one_pass(divergence: Any, *sides: Any) -> bool:
    """Whether the program that XLA is given reduces two rows at once to the state of the pair."""
    lowered = jax.jit(lambda *sides: divergence(*sides, reduction="mean")).lower(*sides)
    widths = re.findall(r":(\d+) = stablehlo\.reduce", lowered.as_text())
    return max(map(int, widths), default=1) >= len(PairState._fields)


# --- formulas, in NumPy ---


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _times(log_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    """p · x, with 0 · inf = 0."""
    return np.where(np.exp(log_p) > 0, np.exp(log_p) * x, 0)


def _kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return _times(log_p, log_p - log_q)


def _mixture(log_p: np.ndarray, log_q: np.ndarray, alpha: float) -> np.ndarray:
    return np.logaddexp(log_p + np.log(alpha), log_q + np.log1p(-alpha))


def _jensen_shannon(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    m = _mixture(s, t, 0.5)
    return (_kl(s, m) + _kl(t, m)) / 2, _kl(s, m) / 2


def _skew_forward(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    m = _mixture(t, s, 0.1)
    return _kl(t, m), -_times(t, 0.9 * np.exp(s - m))


def _skew_reverse(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    m = _mixture(s, t, 0.1)
    return _kl(s, m), _times(s, s - m - 0.1 * np.exp(s - m))


# From log s and log t: what each class adds to D, and its slope s · dD/ds, up to a multiple of s.
FORMULAS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
    "forward_kl": lambda s, t: (_kl(t, s), -np.exp(t)),
    "reverse_kl": lambda s, t: (_kl(s, t), _kl(s, t)),
    "jeffreys": lambda s, t: (_kl(t, s) + _kl(s, t), _kl(s, t) - np.exp(t)),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward,
    "skew_reverse_kl": _skew_reverse,
    "cross_entropy": lambda s, t: (_times(t, -s), -np.exp(t)),
}


class Reference(NamedTuple):
    values: np.ndarray  # of each example
    gradient: np.ndarray  # to the logits of s
    slopes: np.ndarray  # the largest of each row: the gradient is a difference of such


def reference(name: str, log_s: np.ndarray, log_t: np.ndarray) -> Reference:
    each, slope = FORMULAS[name](log_s, log_t)
    gradient = slope - np.exp(log_s) * slope.sum(-1, keepdims=True)  # of forward KL: s - t
    return Reference(each.sum(-1), gradient, np.abs(slope).max(-1, keepdims=True))


# --- checks ---


class Check(NamedTuple):
    name: str
    error: float
    bound: float


# All is computed in float32: 256 roundings of it, for sums of thousands of classes and exponentials
# that accelerators give to a few units of the last place.
BOUND = 2.0**-15
CLOSE_GRADIENT = 1e-2
ROUNDED = {"float32": BOUND, "bfloat16": 2.0**-7}  # a gradient has the dtype of its logits


def error(got: Any, want: np.ndarray, least: Any = 1e-2) -> float:
    """The largest, relative to the largest number of its row; NaN where NaN was not wanted."""
    rows = (len(want), -1)
    got, want = np.asarray(got).astype(np.float64).reshape(rows), want.reshape(rows)
    scale = np.maximum(np.abs(want).max(-1, keepdims=True), least)
    return float(np.where(got == want, 0, np.abs(got - want) / scale).max())


def special_rows(name: str, dtype: str) -> Iterator[Check]:
    """Where formulas break, a row each."""
    s, t = 3 * np.random.default_rng(0).normal(size=(2, 12, 1000))
    where, live, labels = np.full(s.shape, True), np.full((12, 1), True), np.arange(1, 13)
    t[0] = s[0]
    t[1, 500:] = -np.inf
    s[2, 500:] = t[2, 500:] = -np.inf
    s[3, 4] = -np.inf  # D is infinite
    t[4] = np.where(np.arange(1000) == 5, 0, -np.inf)  # one-hot
    s[5], t[5] = 1e12 * s[5], 1e12 * t[5]
    s[6], live[6] = np.nan, False
    t[7, ::5], where[7, ::5] = np.nan, False
    s, t = (x.astype(jnp.dtype(dtype)) for x in (s, t))
    masked = (np.where(live, np.where(where, x, -np.inf), 0) for x in (s, t))
    log_s, log_t = map(log_softmax, masked)
    if name == "cross_entropy":
        t, log_t = labels, np.where(np.arange(1000) == labels[:, None], 0, -np.inf)
    want = reference(name, log_s, log_t)
    smooth = live & np.isfinite(want.gradient).all(-1, keepdims=True)

    @jax.jit
    def run(s: Array, t: Array, live: Array, smooth: Array) -> tuple[Array, Array]:
        loss = lambda s, **options: getattr(kljax, name)(s, t, where=where, **options)  # noqa: E731
        total = lambda s: loss(s, weights=smooth, reduction="sum")  # noqa: E731
        return loss(s, weights=live), jax.grad(total)(s)

    values, gradient = run(s, t, live[:, 0], smooth[:, 0])
    yield Check(f"{name} {dtype}", error(values, np.where(live[:, 0], want.values, 0)), BOUND)
    exact, least = np.where(smooth, want.gradient, 0), np.where(smooth, want.slopes, 0)
    off = error(gradient, exact, np.maximum(least, 1e-2))
    yield Check(f"{name} {dtype}, gradient", off, ROUNDED[dtype])


def close_rows() -> Iterator[Check]:
    """Relative to D itself, of which the plain formula in float32 has no digit right."""
    rng = np.random.default_rng(1)
    t = rng.normal(size=(8, 4096)).astype(np.float32)
    s = t + (1e-4 * rng.normal(size=t.shape)).astype(np.float32)
    want = reference("forward_kl", log_softmax(s), log_softmax(t))
    mean = want.values.mean(keepdims=True)
    value, gradient = jax.jit(jax.value_and_grad(mean_forward_kl))(s, t)
    of, off = f"forward_kl of {mean[0]:.0e}", error(jax.jit(plain)(s, t), mean, 0)
    yield Check(f"{of} (plain formula: {off:.1e})", error(value, mean, 0), 1e-3)
    yield Check(f"{of}, gradient", error(gradient, want.gradient / len(s), 0), CLOSE_GRADIENT)


def heads(dtype: str) -> Iterator[Check]:
    """Products in full float32, which accelerators would round by default."""
    rng = np.random.default_rng(2)
    shapes = (1024, 32), (32, 2048), (1024, 64), (64, 2048)
    given = [(0.5 * rng.normal(size=n)).astype(jnp.dtype(dtype)) for n in shapes]

    def loss(*given: Array) -> Array:
        return mean_forward_kl(kljax.Head(*given[:2]), kljax.Head(*given[2:]))

    with jax.default_matmul_precision("highest"):
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*given)
    h, w, *teacher = (x.astype(np.float64) for x in given)
    want = reference("forward_kl", log_softmax(h @ w), log_softmax(np.matmul(*teacher)))
    to_logits, of = want.gradient / len(h), f"forward_kl of Heads {dtype}, highest precision"
    yield Check(of, error(value, want.values.mean(keepdims=True)), BOUND)
    exact = {"hidden": to_logits @ w.T, "kernel": h.T @ to_logits}
    for got, (part, by) in zip(gradients, exact.items(), strict=True):
        yield Check(f"the same, gradient to {part}", error(got, by, 0), ROUNDED[dtype])


def top_k() -> Iterator[Check]:
    """All classes but k are one more, on both sides."""
    s, t = (3 * np.random.default_rng(3).normal(size=(2, 32, 1000))).astype(np.float32)
    best, rest = np.split(np.argsort(-t), [16], axis=-1)
    rests = [np.take_along_axis(log_softmax(x), rest, -1) for x in (s, t)]
    tails = [np.log(np.exp(x).sum(-1, keepdims=True)) for x in rests]
    few = [np.take_along_axis(log_softmax(x), best, -1) for x in (s, t)]
    want = reference("forward_kl", *(np.hstack(both) for both in zip(few, tails, strict=True)))
    exact = np.empty(s.shape)
    np.put_along_axis(exact, best, want.gradient[:, :16], -1)
    np.put_along_axis(exact, rest, want.gradient[:, 16:] * np.exp(rests[0] - tails[0]), -1)

    @jax.jit
    def run(s: Array, t: Array) -> tuple[Array, Array]:
        loss = lambda s: kljax.forward_kl(s, kljax.top_k(t, 16))  # noqa: E731
        return loss(s), jax.grad(lambda s: loss(s).sum())(s)

    values, gradient = run(s, t)
    yield Check("forward_kl, top-16 teacher", error(values, want.values), BOUND)
    yield Check("forward_kl, top-16 teacher, gradient", error(gradient, exact), BOUND)


def mean_forward_kl(student: Any, teacher: Any) -> Array:
    return kljax.forward_kl(student, teacher, reduction="mean")


def plain(student: Array, teacher: Array) -> Array:
    """The formula as a user writes it."""
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1))


def against_plain_formula() -> Iterator[Check]:
    """Time and memory of value and gradient, and whether what was timed is right."""
    s, t = map(jnp.asarray, np.random.default_rng(4).normal(size=(2, 512, 8192)).astype("float32"))
    losses = {"kljax": mean_forward_kl, "plain formula": plain}
    programs = {
        name: jax.jit(jax.value_and_grad(loss)).lower(s, t).compile()
        for name, loss in losses.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(12):  # in turn, so that noise hits both alike
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(s, t))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(samples[1:]) for name, samples in seconds.items()}
    _print("\nforward_kl 512 x 8192 float32, value and gradient, called in turn (no bound)")
    for name, program in programs.items():
        stats = program.memory_analysis()
        memory = _size(stats.temp_size_in_bytes) if stats else "not told"
        _print(f"{name:<30} {1e3 * medians[name]:8.2f} ms, temporary memory {memory}")
    ratio = medians["plain formula"] / medians["kljax"]
    _print(f"{'speed over the plain formula':<30} {ratio:8.2f}\n")
    value, gradient = programs["kljax"](s, t)
    want = reference("forward_kl", *(log_softmax(np.asarray(x)) for x in (s, t)))
    yield Check("what was timed", error(value, want.values.mean(keepdims=True)), BOUND)
    yield Check("what was timed, gradient", error(gradient, want.gradient / len(s), 0), BOUND)


CHECKS: list[Callable[[], Iterator[Check]]] = [
    *(partial(special_rows, name, dtype) for name in FORMULAS for dtype in ROUNDED),
    close_rows,
    partial(heads, "float32"),
    partial(heads, "bfloat16"),
    top_k,
    against_plain_formula,
]


def self_check() -> int:
    """Each check on a line of its own; 1 if one failed."""
    began, verdicts = time.perf_counter(), []
    _print(f"\n{'Self-check, against NumPy in float64':<52} {'error':>8} {'bound':>8}")
    for check in CHECKS:
        try:
            with np.errstate(all="ignore"):  # infinities are meant
                for name, off, bound in check():
                    verdicts.append(off <= bound)
                    _print(
                        f"{name:<52} {off:8.1e} {bound:8.1e} {'ok' if verdicts[-1] else 'FAILED'}"
                    )
        except Exception:  # the other checks may tell more
            verdicts.append(False)
            _print(f"{traceback.format_exc()}FAILED")
    failed, took = verdicts.count(False), time.perf_counter() - began
    verdict = f"{failed} of {len(verdicts)} checks FAILED" if failed else "all checks passed"
    _print(f"\n{verdict}, in {took:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
