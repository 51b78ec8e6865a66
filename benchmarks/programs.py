"""What the public functions compile to: to see whether a change of structure changes a program.

    python -m benchmarks.programs --out before.json
    python -m benchmarks.programs --out after.json --against before.json

Each program is a divergence, what its sides are, how it is computed and which derivative is taken.
Written down are a hash of the optimised program without its names, the bytes of its temporaries,
and the CPU seconds to trace and lower it.
"""

import argparse
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kljax

N, V, H = 24, 40, 8
PATHS = {"whole": None, "blocks": kljax.Chunked(rows=8), "rest": kljax.Chunked(rows=10)}
DIVERGENCES = {
    "forward": kljax.forward_kl,
    "reverse": kljax.reverse_kl,
    "jeffreys": kljax.jeffreys,
    "jsd": kljax.jensen_shannon,
    "skew": kljax.skew_forward_kl,
}


def sides(kind: str) -> Any:
    """Predictions and targets."""
    x, y = (jnp.sin(jnp.arange(N * V) * f).reshape(N, V) for f in (0.7, 1.3))
    hidden, kernel = x[:, :H], jnp.cos(jnp.arange(H * V)).reshape(H, V)
    return {
        "logits": (x, y),
        "bfloat16": (x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)),
        "log_probs": tuple(kljax.LogProbs(jax.nn.log_softmax(z)) for z in (x, y)),
        "probs": tuple(kljax.Probs(jax.nn.softmax(z)) for z in (x, y)),
        "shared": (x, y[0]),
        "heads": (kljax.Head(hidden, kernel, kernel[0], 3.0), kljax.Head(hidden * 2, kernel)),
        "top_k": (x, kljax.top_k(y, 4, temperature=2.0)),
        "head_top_k": (kljax.Head(hidden, kernel), kljax.top_k(y, 4, temperature=2.0)),
    }[kind]


def problems() -> Iterator[tuple[str, Callable[..., Any], Any]]:
    """Losses, by name, with their arguments."""
    options: dict[str, Any] = {
        "temperature": 2.0,
        "weights": jnp.arange(N) % 3,
        "reduction": "mean",
    }
    for kind in ("logits", "heads", "top_k"):
        for name, divergence in DIVERGENCES.items():
            for path in ("whole", "blocks") if kind == "logits" else ("blocks",):
                loss = partial(divergence, implementation=PATHS[path], **options)
                yield f"{name} {kind} {path}", loss, sides(kind)
    for kind in ("bfloat16", "log_probs", "probs", "shared", "head_top_k"):
        for path, implementation in PATHS.items():
            loss = partial(kljax.forward_kl, implementation=implementation, **options)
            yield f"forward {kind} {path}", loss, sides(kind)
    where = jnp.arange(V) % 5 > 0
    loss = partial(kljax.forward_kl, where=where, reduction="none")
    yield "forward logits where none", loss, sides("logits")
    labels = jnp.arange(N)
    yield (
        "labels",
        lambda x: kljax.cross_entropy(x, labels, label_smoothing=0.1),
        sides("logits")[:1],
    )
    yield "entropy", kljax.entropy, sides("logits")[:1]
    for kind in ("logits", "heads", "head_top_k"):
        loss = partial(
            kljax.distillation_loss,
            labels=labels,
            temperature=2.0,
            hard_weight=0.5,
            implementation=PATHS["blocks"],
        )
        yield f"distillation {kind}", loss, sides(kind)


def _with_last(loss: Callable[..., Any], last: Any, first: Any) -> Any:
    return loss(first, last)


def programs() -> Iterator[tuple[str, Callable[..., Any], Any]]:
    for name, loss, arguments in problems():
        if "top_k" in name:  # a cache is data
            loss, arguments = partial(_with_last, loss, arguments[1]), arguments[:1]
        first = lambda *args, loss=loss: jax.tree.leaves(loss(*args))[0]  # noqa: E731
        total = lambda *args, first=first: jnp.sum(first(*args))  # noqa: E731
        yield f"{name}: value", loss, arguments
        yield f"{name}: grad", jax.value_and_grad(total), arguments
        if name.startswith(("forward", "distillation")):
            push = lambda *args, first=first: jax.jvp(first, args, args)  # noqa: E731
            yield f"{name}: jvp", push, arguments
            hvp = lambda *args, total=total: jax.jvp(jax.grad(total), args, args)  # noqa: E731
            yield f"{name}: hvp", hvp, arguments


def canonical(text: str) -> str:
    """The program without metadata, with its values named in the order in which they come."""
    text = re.sub(r", metadata=\{[^}]*\}|, backend_config=\{.*?\}(?=$|,)", "", text, flags=re.M)
    text = re.sub(r"HloModule \S+", "HloModule", text)
    text = re.sub(r"^(\d+ [\"{].*|\w+(Names|Locations|Frames))$", "", text, flags=re.M)
    text = re.sub(r"\n\s*(?=\n)", "", text)
    text = re.sub(r"[\w.\-]+: (?=\w+\[|\()", "", text)  # the names of parameters
    names: dict[str, str] = {}
    number = lambda m: names.setdefault(m[0], f"%{len(names)}")  # noqa: E731
    return re.sub(r"%[\w.\-]+", number, text)


def measure(function: Callable[..., Any], arguments: Any) -> dict[str, Any]:
    start = time.process_time()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.process_time() - start
    compiled = lowered.compile()
    digest = hashlib.sha256(canonical(str(compiled.as_text())).encode()).hexdigest()[:12]
    memory: Any = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes
    return {"program": digest, "temporaries": temporaries, "trace": round(traced, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path, help="an earlier output: print what differs")
    options = parser.parse_args()
    found = {name: measure(function, arguments) for name, function, arguments in programs()}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    before = json.loads(options.against.read_text()) if options.against else found
    for name, now in found.items():
        then = before.get(name, {})
        if options.against is None or any(
            now[k] != then.get(k) for k in ("program", "temporaries")
        ):
            print(f"{name:45} {then} -> {now}")
    times = (sum(one["trace"] for one in some.values()) for some in (before, found))
    print("{} programs; trace and lower {:.1f} -> {:.1f} CPU seconds".format(len(found), *times))


if __name__ == "__main__":
    main()
