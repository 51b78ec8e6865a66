"""`python -m benchmarks`: measure, print, and write what was measured."""

import argparse
import datetime
import importlib.metadata
import itertools
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU's memory

import jax

from benchmarks import report, shapes, torch_peers
from benchmarks.budgets import all_budgets
from benchmarks.cases import DIVERGENCES, KINDS, Case, Floor, Kind, Rates, floor
from benchmarks.peers import Contender, contenders
from benchmarks.runner import Limits, device_memory, measure, measure_rates, memory_of

_PACKAGES = ("jax", "jaxlib", "kljax", "numpy", "optax", "torch", "liger_kernel", "libtpu")
_HELP = """\
Measure kljax beside the plain formula, jax.checkpoint over it, optax and, where installed, torch,
torch.compile and (on NVIDIA GPUs) Liger-Kernel, all in this run and called in turn.

    pip install -e '.[benchmarks]'           # torch and libtpu are found where installed
    python -m benchmarks --quick             # small shapes, under a minute: does it all work?
    python -m benchmarks --budgets           # the bounds that the library holds itself to
    python -m benchmarks --models            # shapes of real models, cut to memory and time
    python -m benchmarks --models --case 'head.*forward' --contender kljax --contender optax
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # Else a short program's time on CPU is that of handing it to another thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    everyone = contenders() + torch_peers.contenders()
    chosen = [each for each in everyone if _chosen(each, options)]
    if not chosen:
        raise SystemExit(f"no such contender; here are {', '.join(c.name for c in everyone)}")
    limits = Limits(options.limit, options.repeats, int(0.8 * device_memory()))
    found: dict[str, Any] = {"run": _run(options), "cases": [], "memory": [], "budgets": []}
    rates = _rates(options)
    found["rates"] = rates._asdict()

    device = re.sub(r"\W+", "-", found["run"]["device"]).strip("-")
    stem = options.output / f"{device}-jax-{jax.__version__}-{options.preset}"
    try:
        _measure_all(found, options, chosen, rates, limits)
    finally:  # also what an interrupted run has found
        print("\n".join(["", *map(str, report.write(found, stem))]))
    return 0


def _measure_all(
    found: dict[str, Any],
    options: argparse.Namespace,
    chosen: list[Contender],
    rates: Rates,
    limits: Limits,
) -> None:
    if options.preset == "budgets":
        for budget in all_budgets(chosen, limits):
            found["budgets"].append(budget._asdict())
            print(f"{report.MET[budget.met]:12} {budget.measure}: {budget.measured}", flush=True)
    for case in _cases(options, rates, limits):
        print(f"\n{case.name}", flush=True)
        found["cases"].append(measure(case, chosen, rates, limits))
        for each in found["cases"][-1]["contenders"]:
            print(_line(each), flush=True)
    found["memory"] = memory_of(_memory_cases(options), chosen)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks", description=_HELP, formatter_class=raw)
    presets = parser.add_mutually_exclusive_group(required=True)
    for preset in ("quick", "budgets", "models"):
        presets.add_argument(f"--{preset}", dest="preset", action="store_const", const=preset)
    add = parser.add_argument
    add("--case", metavar="REGEX", help="only cases whose name has it, as 'top-k' or 'Llama'")
    add("--contender", action="append", metavar="NAME", help="only these; repeat for more")
    add("--dtype", action="append", help="instead of the model's own; repeat for more")
    add("--limit", type=float, metavar="S", help="seconds of calls per case (quick 1, else 60)")
    add("--repeats", type=int, default=15, metavar="N", help="at most so many calls (15)")
    add("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    if options.limit is None:
        options.limit = 1.0 if options.preset == "quick" else 60.0
    return options


def _chosen(contender: Contender, options: argparse.Namespace) -> bool:
    if options.contender:
        return contender.name in options.contender
    # Its C++ or Triton compiler would take most of the minute.
    return not (options.preset == "quick" and contender.name == "torch.compile")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "preset": options.preset,
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "device": _device(),
        "versions": versions,
    }


def _device() -> str:
    kind = jax.devices()[0].device_kind
    if kind != "cpu":
        return kind
    names = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    model = names[0].split(":")[1].strip() if names else platform.machine()
    return f"{os.cpu_count()} cores {model}"


# --- what to measure ---


def _rates(options: argparse.Namespace) -> Rates:
    dtypes = {"float32", "bfloat16", *(options.dtype or ())}
    if options.preset == "quick":
        return measure_rates(sorted(dtypes), nbytes=2**24, seconds=0.01)
    return measure_rates(sorted(dtypes))


def _cases(options: argparse.Namespace, rates: Rates, limits: Limits) -> list[Case]:
    if options.preset == "budgets":
        return []
    quick = options.preset == "quick"
    found = []
    for shape in [shapes.QUICK] if quick else shapes.MODELS:
        for dtype, kind in itertools.product(options.dtype or [shape.dtype], KINDS):
            divergences = DIVERGENCES[:1] if quick or "top-k" in kind else DIVERGENCES
            found += [_fitting(shape, kind, each, dtype, rates, limits) for each in divergences]
    return _named(found, options)


def _named(cases: list[Case], options: argparse.Namespace) -> list[Case]:
    return [case for case in cases if re.search(options.case or "", case.name)]


def _case(shape: shapes.Shape, kind: Kind, divergence: str, dtype: str, tokens: int) -> Case:
    case = Case(kind, divergence, dtype, tokens, shape.vocab, model=shape.model)
    if case.has_head:
        case = replace(case, hidden=shape.hidden)
    if kind == "head":
        case = replace(case, teacher_hidden=shape.teacher_hidden)
    return replace(case, k=min(shapes.TOP_K, shape.vocab // 2)) if case.has_top_k else case


def _fitting(
    shape: shapes.Shape, kind: Kind, divergence: str, dtype: str, rates: Rates, limits: Limits
) -> Case:
    """As many tokens as leave memory for two dense contenders in turn, and time for all."""
    ladder = (*shapes.FEWER_TOKENS, *shapes.TOKENS)
    if shape is shapes.QUICK:
        ladder = shapes.QUICK_TOKENS[:1]
    cases = [_case(shape, kind, divergence, dtype, tokens) for tokens in ladder]

    def fits(case: Case) -> bool:
        least: Floor = floor(case, rates)
        wide = 4 * case.tokens * case.vocab
        return 8 * wide <= limits.memory and 40 * least.value_and_grad <= limits.seconds

    return next((case for case in reversed(cases) if fits(case)), cases[0])


def _memory_cases(options: argparse.Namespace) -> list[Case]:
    """Two logits arrays, and two heads, of ever more tokens."""
    if options.preset == "budgets":
        return []
    quick = options.preset == "quick"
    shape = shapes.QUICK if quick else shapes.MEMORY_MODEL
    tokens = shapes.QUICK_TOKENS if quick else shapes.TOKENS
    kinds: tuple[Kind, ...] = ("logits", "head")
    cases = [_case(shape, kind, "forward_kl", shape.dtype, n) for kind in kinds for n in tokens]
    return _named(cases, options)


def _line(found: dict[str, Any]) -> str:
    if found["status"] != "ok":
        return f"  {found['contender']:22} {found['status']}"
    times = (f"{found[part]['median'] * 1e3:10.3f} ms" for part in ("value", "value_and_grad"))
    kept = report.size(found["memory"]["temporary"]) if found["memory"] else "n/a"
    more = report.size(found["grown"]) if found["grown"] is not None else "n/a"
    cells = [f"  {found['contender']:22}", *times, f"{kept:>9}", f"{more:>9}"]
    return "  ".join([*cells, f"{found['gradient_error']:.1e}"])


if __name__ == "__main__":
    sys.exit(main())
