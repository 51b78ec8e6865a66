"""What was measured, as JSON, as Markdown tables and as plots."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MET = {True: "yes", False: "NO", None: "not measured"}
_PARTS = ("value", "value_and_grad")


def write(report: dict[str, Any], stem: Path) -> list[Path]:
    """Write `stem`.json, `stem`.md and, where matplotlib is installed, the plots."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    data, text = _beside(stem, ".json"), _beside(stem, ".md")
    data.write_text(json.dumps(_finite(report), indent=1, allow_nan=False) + "\n")
    plots = _plots(report, stem)
    text.write_text(markdown(report, [plot.name for plot in plots]))
    return [data, text, *plots]


def _beside(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _finite(value: Any) -> Any:
    """The same with "nan" and "inf" as words, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- Markdown ---


def markdown(report: dict[str, Any], plots: Iterable[str] = ()) -> str:
    """The whole report as one page."""
    run = report["run"]
    lines = [f"# {run['preset']} on {run['device']}", ""]
    lines += [f"{run['date']}, `{run['command']}`", ""]
    lines += [", ".join(f"{name} {version}" for name, version in run["versions"].items()), ""]
    lines += list(_rates(report["rates"]))
    if report["budgets"]:
        lines += ["", "## Budgets", "", *_budgets(report["budgets"])]
    if report["cases"]:
        lines += ["", "## Cases", "", *_legend(), "", *_cases(report["cases"])]
    if report["memory"]:
        lines += ["", "## Temporary memory of value + gradient", "", *_memory(report["memory"])]
    for plot in plots:
        lines += ["", f"![{plot}]({plot})"]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---' for _ in header)}|"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def _rates(rates: dict[str, Any]) -> Iterator[str]:
    products = (
        f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in rates["operations"].items()
    )
    yield f"Measured in this run: {rates['bandwidth'] / 1e9:.1f} GB/s read and written;"
    yield f"matrix products {', '.join(products)}."


def _budgets(budgets: list[dict[str, Any]]) -> Iterator[str]:
    rows = [[b["measure"], b["bound"], b["measured"], MET[b["met"]]] for b in budgets]
    return _table(["measure", "bound", "measured", "met"], rows)


def _legend() -> list[str]:
    return [
        "Times in ms: the median (least to most) of calls taken in turn. × is over the floor: each",
        "input read and each gradient written once, or the matrix products, at the rates above.",
        "Memory of value + gradient as the compiler counts it: beyond inputs and outputs, and all;",
        "and what the process grew by at most, which includes scratch that no compiler counts.",
        "Error: the largest of the gradient against float64, over the gradient's largest entry.",
    ]


def _cases(cases: list[dict[str, Any]]) -> Iterator[str]:
    header = ["contender", "value", "×", "value + gradient", "×"]
    header += ["temporary", "all", "grown", "error"]
    for case in cases:
        yield f"### {case['name']}"
        yield ""
        yield from _table(header, [_row(found) for found in case["contenders"]])
        yield ""


def _row(found: dict[str, Any]) -> list[str]:
    if found["status"] != "ok":
        return [found["contender"], found["status"], *[""] * 7]
    cells = [found["contender"]]
    for part in _PARTS:
        cells += [_spread(found[part]), f"{found[f'{part}_over_floor']:.2f}"]
    sizes = found["memory"]
    cells += [size(sizes[name]) if sizes else "n/a" for name in ("temporary", "peak")]
    cells.append("n/a" if found["grown"] is None else size(found["grown"]))
    return [*cells, f"{found['gradient_error']:.1e}"]


def _spread(times: dict[str, Any]) -> str:
    low, middle, high = (f"{times[name] * 1e3:.4g}" for name in ("min", "median", "max"))
    return f"{middle} ({low} to {high})" if len(times["samples"]) > 1 else f"{middle} (one call)"


def size(nbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.3g} GiB"


def _memory(found: list[dict[str, Any]]) -> Iterator[str]:
    for (kind, model), rows in _grouped(found, "kind", "model").items():
        tokens = sorted({row["tokens"] for row in rows})
        by_name = _grouped(rows, "contender")
        yield f"### {kind}, {model}, {rows[0]['dtype']}"
        yield ""
        yield from _table(
            ["contender", *(f"{n} tokens" for n in tokens)],
            [
                [
                    name,
                    *(size(r["temporary"]) if r["status"] == "ok" else r["status"] for r in each),
                ]
                for (name,), each in by_name.items()
            ],
        )
        yield ""


def _grouped(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Any]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


# --- plots ---

_COLOURS = {  # of one contender in every plot
    "kljax": "tab:blue",
    "kljax dense": "tab:cyan",
    "plain formula": "tab:gray",
    "jax.checkpoint": "tab:olive",
    "optax": "tab:orange",
    "torch eager": "tab:red",
    "torch.compile": "tab:purple",
    "Liger": "tab:green",
    "Liger fused linear KL": "tab:brown",
}


def _plots(report: dict[str, Any], stem: Path) -> list[Path]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return []
    found = []
    if panels := _time_panels(report["cases"]):
        figure = _figure(Figure, panels, "vocabulary", "µs per token")
        found.append(_save(figure, _beside(stem, "-time.png"), "Value + gradient of forward KL"))
    if panels := _memory_panels(report["memory"]):
        figure = _figure(Figure, panels, "tokens", "MiB, at least 1")
        title = "Temporary memory of value + gradient of forward KL"
        found.append(_save(figure, _beside(stem, "-memory.png"), title))
    return found


Panels = dict[str, dict[str, list[tuple[float, float]]]]  # title -> contender -> points


def _time_panels(cases: list[dict[str, Any]]) -> Panels:
    panels: Panels = {}
    largest = max((case["vocab"] for case in cases), default=0)
    for case in cases:
        # A vocabulary far below the others would squeeze them together.
        if case["divergence"] != "forward_kl" or case["vocab"] < largest / 100:
            continue
        for found in case["contenders"]:
            if found["status"] == "ok":
                per_token = found["value_and_grad"]["median"] / case["tokens"] * 1e6
                lines = panels.setdefault(_TITLES[case["kind"]], {})
                lines.setdefault(found["contender"], []).append((case["vocab"], per_token))
    return panels


_TITLES = {
    "logits": "two logits arrays",
    "head": "heads on both sides",
    "top-k": "logits, top-k teacher",
    "top-k head": "head, top-k teacher",
}


def _memory_panels(rows: list[dict[str, Any]]) -> Panels:
    panels: Panels = {}
    for row in rows:
        if row["status"] == "ok":
            title = f"{_TITLES[row['kind']]}, {row['model']}, {row['dtype']}"
            lines = panels.setdefault(title, {})
            mebibytes = max(row["temporary"] / 2**20, 1)
            lines.setdefault(row["contender"], []).append((row["tokens"], mebibytes))
    return panels


def _figure(make: Any, panels: Panels, x: str, y: str) -> Any:
    figure = make(figsize=(6.5 * len(panels), 5), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(every, panels.items(), strict=True):
        for name, points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            wide = 2.5 if name == "kljax" else 1.3
            axes.plot(xs, ys, "o-", color=_COLOURS[name], label=name, linewidth=wide, markersize=4)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=90, fontsize=8)
        axes.minorticks_off()
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))  # also within one decade
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _save(figure: Any, path: Path, title: str) -> Path:
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return path
