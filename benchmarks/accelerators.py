"""What programs for TPU and NVIDIA move through memory, from their own compilers.

    python -m benchmarks.accelerators --target v5e --target H200 --output benchmarks/results

Value and gradient to the student of the mean over tokens, beside the plain formula and optax.
L is one array of logits, 4096 x 128256 in bfloat16: the floor is 3 L, of the value alone 2 L.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kljax
from benchmarks import hlo, targets
from benchmarks.cases import Case, structs
from benchmarks.peers import kljax_loss, optax_loss, plain

TOKENS, VOCAB, K = 4096, 128_256, 64
HEAD_TOKENS, HIDDEN, TEACHER_HIDDEN = 8192, 2048, 4096
TARGETS = ("v5e", "v6e", "tpu7x", "H100", "H200")


class Program(NamedTuple):
    """A loss `(student, *others) -> scalar`, the shapes of its arguments, and which move."""

    loss: Callable[..., Any]
    arguments: Any
    moving: tuple[int, ...] = (0,)
    has_aux: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        if not self.moving:
            return self.loss
        return jax.value_and_grad(self.loss, self.moving, has_aux=self.has_aux)


def programs(tokens: int = TOKENS, vocab: int = VOCAB) -> dict[str, dict[str, Program]]:
    """By measure, and then by contender."""
    case = Case("logits", "forward_kl", "bfloat16", tokens, vocab)
    logits, each = structs(case).student[0], jax.ShapeDtypeStruct((tokens,), jnp.float32)
    two = (logits, logits)
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def mean(name: str, **options: Any) -> Callable[..., Any]:
        return lambda s, t: getattr(kljax, name)(s, t, reduction="mean", **options)

    def peers(name: str) -> dict[str, Program]:
        peer = Case("logits", name, "bfloat16", tokens, vocab)
        made = {"plain formula": plain(peer), "optax": optax_loss(peer)}
        return {
            who: Program(lambda s, t, loss=loss: loss((s,), (t,)), two)
            for who, loss in made.items()
        }

    def distillation(s: Any, t: Any, labels: Any) -> Any:
        return kljax.distillation_loss(s, t, labels, temperature=2.0, hard_weight=0.5)

    def plain_distillation(s: Any, t: Any, labels: Any) -> Any:
        s, t = s.astype(jnp.float32), t.astype(jnp.float32)
        log_s, log_t = jax.nn.log_softmax(s / 2), jax.nn.log_softmax(t / 2)
        soft = jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1).mean()
        hard = -jnp.take_along_axis(jax.nn.log_softmax(s), labels[:, None], -1).mean()
        same = jnp.mean(s.argmax(-1) == t.argmax(-1))
        return 4 * soft + 0.5 * hard, (soft, hard, same)

    def plain_labels(s: Any, labels: Any) -> Any:
        log_s = jax.nn.log_softmax(s.astype(jnp.float32))
        return -jnp.take_along_axis(log_s, labels[:, None], -1).mean()

    def optax_labels(s: Any, labels: Any) -> Any:
        import optax

        return optax.softmax_cross_entropy_with_integer_labels(s, labels).mean()

    def weighted(s: Any, t: Any, weights: Any) -> Any:
        return kljax.forward_kl(s, t, weights=weights, reduction="mean")

    def tempered(s: Any, t: Any, temperature: Any) -> Any:
        return kljax.forward_kl(s, t, temperature=temperature, reduction="mean")

    def masked(s: Any, t: Any, where: Any) -> Any:
        return kljax.forward_kl(s, t, where=where, reduction="mean")

    def to_probs(s: Any, probs: Any) -> Any:
        return kljax.forward_kl(s, kljax.Probs(probs), reduction="mean")

    probs = jax.ShapeDtypeStruct((tokens, vocab), jnp.float32)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    exist = jax.ShapeDtypeStruct((vocab,), jnp.bool_)
    top_k = Case("top-k", "forward_kl", "bfloat16", tokens, vocab, k=K)
    given = structs(top_k)
    makers = {"kljax": kljax_loss, "plain formula": plain, "optax": optax_loss}
    split = {
        who: Program(_on_top_k(make(top_k)), (logits, *given.teacher))
        for who, make in makers.items()
    }
    one = lambda loss, *more: {"kljax": Program(loss, (*two, *more))}  # noqa: E731
    value = lambda found: {k: p._replace(moving=()) for k, p in found.items()}  # noqa: E731
    forward = one(mean("forward_kl")) | peers("forward_kl")
    return {
        "forward KL": forward,
        "forward KL, value": value(forward),
        "forward KL, weights": one(weighted, each),
        "forward KL, T = 2": one(mean("forward_kl", temperature=2.0)),
        "forward KL, T learned": {"kljax": Program(tempered, (*two, number), (0, 2))},
        "forward KL, where": one(masked, exist),
        "forward KL, targets float32 Probs": {"kljax": Program(to_probs, (logits, probs))},
        "reverse KL": one(mean("reverse_kl")) | peers("reverse_kl"),
        "Jeffreys": one(mean("jeffreys")),
        "Jensen-Shannon": one(mean("jensen_shannon")) | peers("jensen_shannon"),
        "Jensen-Shannon, both sides": {
            "kljax": Program(mean("jensen_shannon"), two, (0, 1)),
        },
        "skew forward KL": one(mean("skew_forward_kl")),
        "integer labels": {
            "kljax": Program(
                lambda s, y: kljax.cross_entropy(s, y, reduction="mean"), (logits, labels)
            ),
            "plain formula": Program(plain_labels, (logits, labels)),
            "optax": Program(optax_labels, (logits, labels)),
        },
        "distillation, T = 2, labels, metrics": {
            "kljax": Program(distillation, (*two, labels), has_aux=True),
            "plain formula": Program(plain_distillation, (*two, labels), has_aux=True),
        },
        "top-64 teacher": split,
    }


def _on_top_k(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda s, *teacher: loss((s,), teacher)


def measure(program: Program, target: str, logits_bytes: float) -> dict[str, Any]:
    """Compile for a target and count."""
    began = time.perf_counter()
    arguments = targets.on_one(target, program.arguments)
    compiled: Any = jax.jit(program.function).lower(*arguments).compile()
    counts = hlo.count(compiled.as_text())
    return {
        "L": round(counts.bytes / logits_bytes, 2),
        "stored GiB": round(counts.largest / 2**30, 3),
        "temporaries GiB": round(compiled.memory_analysis().temp_size_in_bytes / 2**30, 3),
        "operations": round(counts.operations / (logits_bytes / 2), 1),
        "turns": counts.loops,
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(found: dict[str, Any]) -> str:
    """A row for each program: bytes moved and, in parentheses, GiB of temporaries."""
    names = list(found)
    rows = list(dict.fromkeys(row for of in found.values() if isinstance(of, dict) for row in of))
    lines = ["| L moved (GiB of temporaries; operations per pair) | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in rows:
        cells = (found[name].get(row) if isinstance(found[name], dict) else None for name in names)
        lines.append(f"| {row} | " + " | ".join(map(_cell, cells)) + " |")
    lines += [f"\n{name}: {of}" for name, of in found.items() if isinstance(of, str)]
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return "–"
    if "error" in one:
        return one["error"]
    return f"{one['L']} ({one['temporaries GiB']}; {one['operations']})"


def all_of(target: str, matching: str = "", own: bool = False) -> dict[str, Any]:
    """Every program for one target, in this process."""
    found = {}
    for name, contenders in programs().items():
        for who, program in contenders.items():
            if matching not in name or (own and who != "kljax"):
                continue
            size = 2 * TOKENS * VOCAB
            try:
                found[f"{name}: {who}"] = measure(program, target, size)
            except Exception as error:  # a compiler's refusal is a result
                found[f"{name}: {who}"] = {"error": type(error).__name__}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=[*targets.TARGETS])
    parser.add_argument("--only", help="compile for this target in this process; print JSON")
    parser.add_argument("--matching", default="", help="a part of the measure's name")
    parser.add_argument("--own", action="store_true", help="without the other contenders")
    parser.add_argument("--output", type=Path, help="a folder for a table and its numbers")
    given = parser.parse_args(arguments)
    if given.only:
        print(json.dumps(all_of(given.only, given.matching, given.own)))  # noqa: T201
        return 0
    more = ["--matching", given.matching, *(["--own"] if given.own else [])]
    found = {
        name: targets.in_another_process("benchmarks.accelerators", name, *more)
        for name in given.target or TARGETS
    }
    text = table(found)
    print(text)  # noqa: T201
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        stem = f"accelerators-jax-{jax.__version__}"
        (given.output / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.output / f"{stem}.md").write_text(f"jax {jax.__version__}\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
