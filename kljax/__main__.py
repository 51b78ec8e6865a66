"""`python -m kljax`: what a bug report needs to say, and a self-check of some ten seconds.

On the default device, values and gradients are compared with formulas written here once more, in
NumPy and float64; one loss is timed beside the plain formula.
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy import ndarray

import kljax
from kljax import _reading
from kljax._engine import blocks, paths
from kljax._engine.pairs import PairState

PACKAGES = ("jax", "jaxlib", "optax", "chex", "flax", "numpy")
FLAGS = (
    "enable_x64",
    "default_matmul_precision",
    "numpy_dtype_promotion",
    "debug_nans",
    "debug_infs",
    "disable_jit",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kljax", description=__doc__)
    parser.add_argument("--no-checks", action="store_true", help="print the facts alone")
    options = parser.parse_args(arguments)
    for name, fact in facts():  # flushed, to be seen even if the next step hangs
        print(f"{name:<31} {fact}", flush=True)
    print("\nHow a value is computed here, in a program for one device")
    for name, way in ways():
        print(f"{name:<46} {way}", flush=True)
    return 0 if options.no_checks else self_check()


def facts() -> Iterator[tuple[str, object]]:
    """What needs no device comes first: it may be the device that is broken."""
    yield "kljax", f"{kljax.__version__}, from {os.path.dirname(kljax.__file__)}"
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"
    yield "treated as jax", "0.10" if blocks._UPDATES_BITS else "0.12"
    yield "python", sys.version.replace("\n", " ")
    yield "system", f"{platform.platform()}, {os.cpu_count()} CPU cores"
    yield from ((f"jax_{flag}", getattr(jax.config, f"jax_{flag}")) for flag in FLAGS)
    yield "XLA_FLAGS", os.environ.get("XLA_FLAGS", "not set")
    yield "default backend", jax.default_backend()
    kinds = [f"{device.device_kind} ({device.platform})" for device in jax.devices()]
    yield "devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    nbytes = (_device().memory_stats() or {}).get("bytes_limit")
    memory = "not told" if nbytes is None else f"{nbytes / 2**30:.1f} GiB"
    yield "default device", f"{_device()}, memory {memory}"


def _device() -> jax.Device:
    return next(iter(jnp.zeros(()).devices()))


# --- the ways to compute ---


def ways() -> Iterator[tuple[str, str]]:
    """Of a few problems, how the library would compute them here; nothing is computed."""
    of: Any = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    small, large = of((32, 1000)), of((4096, 32768))
    head = kljax.Head(of((4096, 512)), of((512, 32768)))
    top_k = kljax.TopK(of((4096, 64), dtype=jnp.int32), of((4096, 64)), of((4096,)))
    yield "forward KL, logits 32 x 1000", way(kljax.forward_kl, small, small)
    yield "forward KL, logits 4096 x 32768", way(kljax.forward_kl, large, large)
    yield "Jensen-Shannon, logits 4096 x 32768", way(kljax.jensen_shannon, large, large)
    yield "forward KL, Heads 4096 x 512 x 32768", way(kljax.forward_kl, head, head)
    yield "forward KL, top-64 teacher, 4096 x 32768", way(kljax.forward_kl, large, top_k)


def way(divergence: Any, predictions: Any, targets: Any) -> str:
    """How the batch is cut, and whether one reduction of both rows gives the state of the pair."""
    cut = blocks_of(divergence, predictions, targets, platform=_device().platform)
    rows, turns = math.prod(cut.extents), math.prod(cut.counts)
    how = "whole" if cut.single else f"{turns} blocks of {rows} rows"
    if isinstance(targets, kljax.TopK):
        return f"{how}, on a few classes"
    loss = partial(divergence, reduction="mean")
    program = jax.jit(lambda *sides: loss(*sides)).lower(predictions, targets).as_text()
    widths = map(int, re.findall(r":(\d+) = stablehlo\.reduce", program))
    one = max(widths, default=1) >= len(PairState._fields)
    return f"{how}, {'one pass' if one else 'two passes'} over both sides"


def blocks_of(divergence: Any, *sides: Any, platform: str) -> blocks.Blocks:
    """Asked as `_pipeline` asks, of shapes alone."""
    asked, found = divergence.bind().formula, []

    def ask(*sides: Any) -> None:
        inputs = _reading.read(asked.name, dict(zip(asked.arguments, sides, strict=True)))
        found.append(paths.choose(asked.name, None, inputs.layout, inputs.sides).on(platform))

    jax.eval_shape(ask, *sides)
    return found[0]


# --- formulas, in NumPy ---


def log_softmax(logits: ndarray) -> ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def _times(log_p: ndarray, x: ndarray) -> ndarray:
    """p · x, with 0 · inf = 0."""
    return np.where(np.exp(log_p) > 0, np.exp(log_p) * x, 0)


def _jensen_shannon(s: ndarray, t: ndarray) -> tuple[ndarray, ndarray]:
    m = np.logaddexp(s, t) - np.log(2)
    return (_times(s, s - m) + _times(t, t - m)) / 2, _times(s, s - m) / 2


def _skew_forward(s: ndarray, t: ndarray) -> tuple[ndarray, ndarray]:
    m = np.logaddexp(t + np.log(0.1), s + np.log(0.9))
    return _times(t, t - m), -0.9 * _times(t, np.exp(s - m))


# From log s and log t: what each class adds to D, and its slope s · dD/ds, up to a multiple of s.
FORMULAS: dict[str, Callable[[ndarray, ndarray], tuple[ndarray, ndarray]]] = {
    "forward_kl": lambda s, t: (_times(t, t - s), -np.exp(t)),
    "reverse_kl": lambda s, t: (_times(s, s - t), _times(s, s - t)),
    "jeffreys": lambda s, t: (_times(t, t - s) + _times(s, s - t), _times(s, s - t) - np.exp(t)),
    "jensen_shannon": _jensen_shannon,
    "skew_forward_kl": _skew_forward,
    "cross_entropy": lambda s, t: (_times(t, -s), -np.exp(t)),
}


def reference(name: str, log_s: ndarray, log_t: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    """Values, their gradients to the logits of s, and the largest slope of each row."""
    each, slope = FORMULAS[name](log_s, log_t)
    gradient = slope - np.exp(log_s) * slope.sum(-1, keepdims=True)  # of forward KL: s - t
    return each.sum(-1), gradient, np.abs(slope).max(-1, keepdims=True)


# --- checks ---


Check = tuple[str, float, float]  # what, the error found, the bound

# All is computed in float32: 256 roundings of it, for sums of thousands of classes and exponentials
# that accelerators give to a few units of the last place. A gradient has the dtype of its logits.
BOUND = 2.0**-15
TO_LOGITS = {"float32": BOUND, "bfloat16": 2.0**-7}


def error(got: Any, want: ndarray, least: Any = 1e-2) -> float:
    """The largest, relative to the largest number of its row; NaN where NaN was not wanted."""
    rows = (len(want), -1)
    got, want = np.asarray(got).astype(np.float64).reshape(rows), want.reshape(rows)
    scale = np.maximum(np.abs(want).max(-1, keepdims=True), least)
    return float(np.where(got == want, 0, np.abs(got - want) / scale).max())


def special_rows(name: str, dtype: str) -> Iterator[Check]:
    """Where formulas break, a row each."""
    s, t = 3 * np.random.default_rng(0).normal(size=(2, 12, 1000))
    where, live, labels = np.full(s.shape, True), np.full(12, True), np.arange(1, 13)
    t[0] = s[0]
    t[1, 500:] = -np.inf
    s[2, 500:] = t[2, 500:] = -np.inf
    s[3, 4] = -np.inf  # D is infinite
    t[4] = np.where(np.arange(1000) == 5, 0, -np.inf)  # one-hot
    s[5], t[5] = 1e12 * s[5], 1e12 * t[5]
    s[6], live[6] = np.nan, False
    t[7, ::5], where[7, ::5] = np.nan, False
    s, t = (x.astype(jnp.dtype(dtype)) for x in (s, t))
    masked = (np.where(live[:, None], np.where(where, x, -np.inf), 0) for x in (s, t))
    log_s, log_t = map(log_softmax, masked)
    if name == "cross_entropy":
        t, log_t = labels, np.where(np.arange(1000) == labels[:, None], 0, -np.inf)
    values, gradient, slopes = reference(name, log_s, log_t)
    smooth = live & np.isfinite(gradient).all(-1)

    @jax.jit
    def run(s: Array, t: Array, live: Array, smooth: Array) -> tuple[Array, Array]:
        loss = lambda s, **options: getattr(kljax, name)(s, t, where=where, **options)  # noqa: E731
        total = lambda s: loss(s, weights=smooth, reduction="sum")  # noqa: E731
        return loss(s, weights=live), jax.grad(total)(s)

    got = run(s, t, live, smooth)
    yield f"{name} {dtype}", error(got[0], np.where(live, values, 0)), BOUND
    # It is a difference of slopes, which in float32 lose what is small beside them.
    gradient, slopes = (np.where(smooth[:, None], x, 0) for x in (gradient, slopes))
    off = error(got[1], gradient, np.maximum(slopes, 1e-2))
    yield f"{name} {dtype}, gradient", off, TO_LOGITS[dtype]


def mean_forward_kl(student: Any, teacher: Any) -> Array:
    return kljax.forward_kl(student, teacher, reduction="mean")


def plain(student: Array, teacher: Array) -> Array:
    """The formula as a user writes it."""
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1))


def of_mean(name: str, got: Any, values: ndarray, gradient: ndarray) -> Iterator[Check]:
    yield name, error(got[0], values.mean(keepdims=True)), BOUND
    yield f"{name}, gradient", error(got[1], gradient / len(values), 0), BOUND


def close_rows() -> Iterator[Check]:
    """Relative to D itself, of which the plain formula in float32 has no digit right."""
    rng = np.random.default_rng(1)
    t = rng.normal(size=(8, 4096)).astype(np.float32)
    s = t + (1e-4 * rng.normal(size=t.shape)).astype(np.float32)
    values, gradient, _ = reference("forward_kl", log_softmax(s), log_softmax(t))
    got, mean = jax.jit(jax.value_and_grad(mean_forward_kl))(s, t), values.mean(keepdims=True)
    name, off = f"forward_kl of {mean[0]:.0e}", error(jax.jit(plain)(s, t), mean, 0)
    yield f"{name} (plain formula: {off:.1e})", error(got[0], mean, 0), 1e-3
    # A TPU's gradient keeps the rounding of the masses, as the plain formula's does.
    bound = 1e-1 if _device().platform == "tpu" else 1e-3
    yield f"{name}, gradient", error(got[1], gradient / len(s), 0), bound


def heads(dtype: str) -> Iterator[Check]:
    """Products in full float32, which accelerators would round by default."""
    rng = np.random.default_rng(2)
    shapes = (1024, 32), (32, 2048), (1024, 64), (64, 2048)
    given = [(0.5 * rng.normal(size=n)).astype(jnp.dtype(dtype)) for n in shapes]

    def loss(hidden: Array, kernel: Array, *teacher: Any) -> Array:
        return mean_forward_kl(kljax.Head(hidden, kernel), kljax.Head(*teacher))

    with jax.default_matmul_precision("highest"):
        value, to_parts = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*given)
    h, w, *teacher = (x.astype(np.float64) for x in given)
    logs = log_softmax(h @ w), log_softmax(np.matmul(*teacher))
    values, gradient, _ = reference("forward_kl", *logs)
    name = f"Heads {dtype}, matmul precision highest"
    yield name, error(value, values.mean(keepdims=True)), BOUND
    wanted = {"hidden": gradient @ w.T / len(h), "kernel": h.T @ gradient / len(h)}
    for (part, want), got in zip(wanted.items(), to_parts, strict=True):
        # Of bfloat16 the gradient to the logits is rounded, too, before its product.
        yield f"Heads {dtype}, gradient to {part}", error(got, want, 0), 2 * TO_LOGITS[dtype]


def top_k() -> Iterator[Check]:
    """All classes but k are one more, on both sides."""
    s, t = (3 * np.random.default_rng(3).normal(size=(2, 32, 1000))).astype(np.float32)
    best, rest = np.split(np.argsort(-t), [16], axis=-1)
    rests = [np.take_along_axis(log_softmax(x), rest, -1) for x in (s, t)]
    tails = [np.log(np.exp(x).sum(-1, keepdims=True)) for x in rests]
    few = [np.take_along_axis(log_softmax(x), best, -1) for x in (s, t)]
    values, to_few, _ = reference("forward_kl", *map(np.hstack, zip(few, tails, strict=True)))
    gradient = np.empty(s.shape)
    np.put_along_axis(gradient, best, to_few[:, :16], -1)
    np.put_along_axis(gradient, rest, to_few[:, 16:] * np.exp(rests[0] - tails[0]), -1)
    loss = lambda s, t: mean_forward_kl(s, kljax.top_k(t, 16))  # noqa: E731
    yield from of_mean("top-16 teacher", jax.jit(jax.value_and_grad(loss))(s, t), values, gradient)


def against_plain_formula() -> Iterator[Check]:
    """Time and memory of value and gradient, and whether what is timed is right."""
    s, t = np.random.default_rng(4).normal(size=(2, 512, 8192)).astype(np.float32)
    programs = {
        name: jax.jit(jax.value_and_grad(loss)).lower(s, t).compile()
        for name, loss in {"kljax": mean_forward_kl, "plain formula": plain}.items()
    }
    values, gradient, _ = reference("forward_kl", log_softmax(s), log_softmax(t))
    yield from of_mean("forward_kl 512 x 8192", programs["kljax"](s, t), values, gradient)
    s, t = map(jnp.asarray, (s, t))
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(12):
        for name, program in programs.items():  # in turn, so that noise hits both alike
            began = time.perf_counter()
            jax.block_until_ready(program(s, t))
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(samples[1:]) for name, samples in seconds.items()}
    print("\nValue and gradient of these, medians of calls in turn; nothing is demanded")
    for name, program in programs.items():
        stats = program.memory_analysis()
        memory = f"{stats.temp_size_in_bytes / 2**20:.1f} MiB" if stats else "not told"
        print(f"{name:<31} {1e3 * medians[name]:8.2f} ms, temporary memory {memory}")
    ratio = medians["plain formula"] / medians["kljax"]
    print(f"{'plain formula over kljax':<31} {ratio:8.2f}")


CHECKS: list[Callable[[], Iterator[Check]]] = [
    *(partial(special_rows, name, dtype) for name in FORMULAS for dtype in TO_LOGITS),
    close_rows,
    *(partial(heads, dtype) for dtype in TO_LOGITS),
    top_k,
    against_plain_formula,
]


def self_check() -> int:
    """Each check on a line of its own; 1 if one failed."""
    began, passed = time.perf_counter(), []
    print(f"\n{'Self-check against NumPy in float64':<52} {'error':>8} {'bound':>8}")
    for check in CHECKS:
        try:
            # Infinities are meant, and what is timed is compiled.
            with np.errstate(all="ignore"), jax.debug_infs(False), jax.disable_jit(False):
                for name, off, bound in check():
                    passed.append(off <= bound)
                    verdict = "ok" if passed[-1] else "FAILED"
                    print(f"{name:<52} {off:8.1e} {bound:8.1e} {verdict}", flush=True)
        except Exception:  # the other checks may tell more
            passed.append(False)
            print(f"{traceback.format_exc()}FAILED", flush=True)
    failed, took = passed.count(False), time.perf_counter() - began
    verdict = f"{failed} of {len(passed)} checks FAILED" if failed else "All checks passed"
    print(f"\n{verdict}, in {took:.1f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
