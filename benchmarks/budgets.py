"""The bounds that the library holds itself to, each measured against its peer in the same run."""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import kljax
from benchmarks import overhead, shapes, targets, torch_peers
from benchmarks.cases import DIVERGENCES, Case, Inputs, inputs, structs
from benchmarks.peers import Contender, Loss, kljax_dense, kljax_loss
from benchmarks.runner import Call, Limits, compile_gradient, in_turn, memory, summary


class Budget(NamedTuple):
    """One measure and its bound; `met` is None where it could not be measured."""

    measure: str
    bound: str
    measured: str
    met: bool | None
    samples: dict[str, Any]  # of the times behind it


_DTYPES = ("float32", "bfloat16")
_TEMPORARY = 0.15  # of one logits array


def all_budgets(contenders: list[Contender], limits: Limits) -> Iterator[Budget]:
    """Every bound, one after another as they are measured."""
    yield from _overhead(limits)
    for dtype in _DTYPES:
        yield from _two_logits(dtype, contenders, limits)
    yield from _head(limits)
    yield _on_tpu()
    for divergence in DIVERGENCES:
        yield _no_wide_copy(divergence)
    yield _slope("N", shapes.SCALING_TOKENS, limits)
    yield _slope("V", shapes.SCALING_VOCAB, limits)


def logits_case(divergence: str, dtype: str) -> Case:
    return Case("logits", divergence, dtype, shapes.BUDGET_TOKENS, shapes.BUDGET_VOCAB)


# --- beside the arithmetic ---


def _overhead(limits: Limits) -> Iterator[Budget]:
    for measure, (bound, calls) in overhead.calls().items():
        samples = in_turn(calls, limits)
        ratio = _median_ratio(samples, "kljax", "plain formula")
        named = f"{measure}: time over the plain formula's"
        yield _budget(named, f"≤ {bound:g}", ratio, ratio <= bound, samples)
    for name, (bound, seconds) in overhead.traces().items():
        measure = f"trace and lower value and gradient, CPU seconds: {name}"
        yield Budget(measure, f"≤ {bound:g}", f"{seconds:.2f}", seconds <= bound, {})


# --- two arrays of logits ---


def _two_logits(dtype: str, contenders: list[Contender], limits: Limits) -> list[Budget]:
    """Time against optax, torch.compile and between divergences; temporary memory."""
    forward = logits_case("forward_kl", dtype)
    given = inputs(forward)
    calls: dict[str, Call] = {
        divergence: _value_and_grad(kljax_loss(logits_case(divergence, dtype)), given)
        for divergence in DIVERGENCES
    }
    for peer in contenders:
        loss = peer.loss(forward) if peer.name in ("optax", "torch.compile") else None
        if loss is None:
            continue
        if peer.torch:
            calls[peer.name] = torch_peers.prepare(forward, loss, given)[1]
        else:
            calls[peer.name] = _value_and_grad(loss, given)
    samples = in_turn(calls, limits)
    what = f"forward KL, value + gradient, {_shape(forward)} {dtype}"
    found = [
        _faster(f"{what}: speed over optax", samples, "forward_kl", "optax", 4.0),
        _faster(f"{what}: speed over torch.compile", samples, "forward_kl", "torch.compile", 1.0),
    ]
    for name, temporary in _temporaries(dtype).items():
        ratio = temporary / forward.logits_bytes
        measure = f"temporary memory, {name}, {_shape(forward)} {dtype}, in logits arrays"
        bound = f"≤ {_TEMPORARY}"
        found.append(Budget(measure, bound, f"{ratio:.3g}", ratio <= _TEMPORARY, {}))
    for other in DIVERGENCES[1:]:
        ratio = _median_ratio(samples, other, "forward_kl")
        measure = f"{other}, value + gradient, {_shape(forward)} {dtype}: time over forward KL"
        chosen = {name: samples[name] for name in (other, "forward_kl")}
        found.append(_budget(measure, "≤ 1.5", ratio, ratio <= 1.5, chosen))
    return found


def _temporaries(dtype: str) -> dict[str, int]:
    """Bytes beyond inputs and gradient of the loss as people use it."""
    given = structs(logits_case("forward_kl", dtype))
    (student,), (teacher,) = given
    found = {}
    for divergence in DIVERGENCES:
        mean = kljax_loss(logits_case(divergence, dtype))
        each = getattr(kljax, divergence)
        name = divergence
        uses: dict[str, Loss] = {
            name: mean,
            f"0.5 * {name}": lambda s, t, mean=mean: 0.5 * mean(s, t),
            f'{name} "none" then .mean()': lambda s, t, each=each: each(*s, *t).mean(),
        }
        for use, loss in uses.items():
            found[use] = memory(compile_gradient(loss, given))["temporary"]
        along = jax.jit(
            lambda s, t, s_dot, mean=mean: jax.jvp(lambda x: mean((x,), (t,)), (s,), (s_dot,))
        )
        found[f"jvp of {name}"] = memory(along.lower(student, teacher, student).compile())[
            "temporary"
        ]
    return found


def _no_wide_copy(divergence: str) -> Budget:
    """No float32 array of the size of the 16-bit logits, in what the compiler made."""
    case = logits_case(divergence, "bfloat16")
    text = compile_gradient(kljax_loss(case), structs(case)).as_text()
    count = len(wide_arrays(text, case.tokens * case.vocab))
    measure = f"float32 arrays of logits size in the compiled {divergence}, bfloat16"
    return Budget(measure, "0", str(count), count == 0, {})


def wide_arrays(hlo: str, elements: int) -> list[str]:
    """Instructions that store float32 results of at least so many elements: none in a fusion."""
    fused = set(re.findall(r"fusion\(.*calls=%?([\w.-]+)", hlo))
    found, inside = [], False
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            inside = opened[1] in fused
        assigned = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ?[\w-]+\(", line)
        if inside or not assigned:
            continue
        for dims in re.findall(r"f32\[([\d,]+)\]", assigned[1]):
            if math.prod(map(int, dims.split(","))) >= elements:
                found.append(line.strip())
    return found


# --- heads ---


def _head(limits: Limits) -> list[Budget]:
    """The fused head against logits made first, both sides."""
    tokens, hidden = shapes.BUDGET_HEAD_TOKENS, shapes.BUDGET_HEAD_HIDDEN
    case = Case("head", "forward_kl", "float32", tokens, shapes.BUDGET_HEAD_VOCAB, hidden, hidden)
    given = inputs(case)
    programs = {"fused": compile_gradient(kljax_loss(case), given)}
    programs["dense"] = compile_gradient(kljax_dense(case), given)
    calls = {name: _calling(program, given) for name, program in programs.items()}
    samples = in_turn(calls, limits)
    sizes = {name: memory(program)["temporary"] for name, program in programs.items()}
    ratio = sizes["fused"] / sizes["dense"]
    measured = f"{ratio:.3g} ({sizes['fused'] / 2**20:.0f} of {sizes['dense'] / 2**20:.0f} MiB)"
    what = f"Head on both sides, value + gradients, {_shape(case)}, H={hidden}, float32"
    return [
        Budget(f"{what}: temporary over dense", "≤ 0.1", measured, ratio <= 0.1, {}),
        _faster(f"{what}: speed over dense", samples, "fused", "dense", 1.5),
    ]


# --- TPU ---


def _on_tpu() -> Budget:
    measure = "bytes over three passes, TPU v5e ahead of time, value + gradient, 4096x128256 bf16"
    only_forward = ("--matching", "forward KL")
    found = targets.in_another_process("benchmarks.accelerators", "v5e", *only_forward)
    if isinstance(found, str):
        return Budget(measure, "≤ 1.7", f"not measured: {found}", None, {})
    ratio, peer = (found[f"forward KL: {who}"]["L"] / 3 for who in ("kljax", "plain formula"))
    met = 1.0 <= ratio <= 1.7
    return Budget(measure, "≤ 1.7", f"{ratio:.2f} (plain formula {peer:.2f})", met, {})


# --- scaling ---


def _slope(name: str, sweep: Sequence[tuple[int, int]], limits: Limits) -> Budget:
    """How the time of value and gradient grows with tokens or with vocabulary."""
    measure = f"log-log slope of forward KL's time against {name}, float32"
    sizes, calls = [], {}
    for tokens, vocab in sweep:
        case = Case("logits", "forward_kl", "float32", tokens, vocab)
        loss = kljax_loss(case)
        held = memory(compile_gradient(loss, structs(case)))["peak"]
        if held + sum(2 * size for size in sizes) > limits.memory:
            break
        sizes.append(case.logits_bytes)
        calls[case.logits_bytes] = _value_and_grad(loss, inputs(case))
    samples = in_turn(calls, limits)
    slope = fit_slope(sizes, [statistics.median(samples[size]) for size in sizes])
    decades = math.log10(sizes[-1] / sizes[0])
    measured = f"{slope:.3f} ({_mebibytes(sizes[0])} to {_mebibytes(sizes[-1])} MiB of logits)"
    met = 0.9 <= slope <= 1.1 if decades >= 3 else None
    return Budget(measure, "0.9 to 1.1", measured, met, _summaries(samples))


def fit_slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent of the power law nearest to the times, in least squares of logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


# --- helpers ---


def _value_and_grad(loss: Loss, given: Inputs) -> Call:
    return _calling(compile_gradient(loss, given), given)


def _calling(program: Callable[..., Any], given: Inputs) -> Call:
    return lambda: jax.block_until_ready(program(*given))


def _faster(
    measure: str, samples: dict[str, list[float]], ours: str, theirs: str, bound: float
) -> Budget:
    """How many times as fast as a peer, which may not be installed."""
    text = f"≥ {bound:g}"
    if theirs not in samples:
        return Budget(measure, text, f"not measured: no {theirs} in this run", None, {})
    ratio = _median_ratio(samples, theirs, ours)
    return _budget(measure, text, ratio, ratio >= bound, {n: samples[n] for n in (ours, theirs)})


def _budget(
    measure: str, bound: str, ratio: float, met: bool, samples: dict[str, list[float]]
) -> Budget:
    times = ", ".join(
        f"{name} {statistics.median(each) * 1e3:.1f} ms" for name, each in samples.items()
    )
    return Budget(measure, bound, f"{ratio:.2f} ({times})", met, _summaries(samples))


def _median_ratio(samples: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(samples[above]) / statistics.median(samples[below])


def _summaries(samples: dict[Any, list[float]]) -> dict[str, Any]:
    return {str(name): summary(each) for name, each in samples.items()}


def _shape(case: Case) -> str:
    return f"{case.tokens}x{case.vocab}"


def _mebibytes(nbytes: int) -> str:
    return f"{nbytes / 2**20:g}"
