"""Which implementation serves a call: one table of how many bytes of logits a block may hold."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kljax._engine import checks
from kljax._engine.blocks import Blocks, exactly, fitting, whole
from kljax._engine.representation import Kind


@dataclass(frozen=True)
class Chunked:
    """Compute so many examples at a time.

    Args:
        rows: How many; the last block takes what is left.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> x = jnp.zeros((10, 5))
        >>> print(kljax.entropy(x, implementation=kljax.Chunked(rows=4)).shape)
        (10,)
    """

    rows: int


Implementation = Literal["dense", "chunked"] | Chunked

_MIB = 2**20


class _Budget(NamedTuple):
    """Bytes of float32 logits in one block, and in a batch that is not cut."""

    share: float  # of the bytes of the narrowest logits array: what a block takes beside it
    least: int
    most: int
    at_once: int
    least_rows: int = 1

    def rows(self, batch: tuple[int, ...], classes: int, itemsize: int) -> int:
        whole = itemsize * classes * math.prod(batch)
        rows = int(min(max(self.share * whole, self.least), self.most)) // (4 * classes)
        return max(rows, self.least_rows)


# On CPU a block and what is made of it stays in a core's cache, as all of a small batch does;
# unless there is a head: then the kernel and its gradient are passed over once a block, which a
# hundred rows make up for. Elsewhere the compiler fuses whole arrays into as few passes as it can,
# and only what must be made first, a head's logits or a top-k's complement, goes in blocks: of
# thousands of tokens, to fill the device.
_CPU = _Budget(1 / 64, _MIB // 4, 2 * _MIB, 8 * _MIB)
_CPU_HEAD = _Budget(1 / 16, _MIB // 4, 32 * _MIB, 4 * _MIB, least_rows=128)
_ELSEWHERE_MADE = _Budget(1, 64 * _MIB, 1024 * _MIB, 256 * _MIB)
# Asked for by name, where arrays would go at once.
_CPU_CHUNKED = _CPU._replace(at_once=_MIB)
_ELSEWHERE_CHUNKED = _Budget(1, _MIB, 64 * _MIB, 4 * _MIB)


class Choice(NamedTuple):
    """How the batch is cut where it runs."""

    cpu: Blocks
    elsewhere: Blocks


def at_once(batch: tuple[int, ...]) -> Choice:
    return Choice(whole(batch), whole(batch))


def choose(
    caller: str,
    implementation: Implementation | None,
    batch: tuple[int, ...],
    classes: int,
    *,
    itemsize: int,
    kinds: Collection[Kind],
    explicit_mesh: bool,
) -> Choice:
    """How to run. A named implementation runs or raises; None leaves the choice here."""
    if implementation is not None and not isinstance(implementation, Chunked):
        checks.require_choice(
            caller, "implementation", implementation, ("dense", "chunked"), optional=True
        )
    if explicit_mesh and implementation not in (None, "dense"):
        got = "a mesh with explicit axes"
        remedy = 'Leave implementation=None or "dense", or use shard_map.'
        checks.fail(caller, "implementation", f"able to serve {implementation}", got, remedy)
    sizes = (*batch, classes)
    if implementation not in (None, "dense") and not all(map(checks.is_known_size, sizes)):
        expected, remedy = 'None or "dense" with symbolic dimensions', "A block's size is a number."
        checks.fail(caller, "implementation", expected, f"{implementation}", remedy)
    if isinstance(implementation, Chunked):
        rows = implementation.rows
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            expected, got = "Chunked of a positive int of rows", f"Chunked(rows={rows!r})"
            checks.fail(caller, "implementation", expected, got, "Give one.")
        return Choice(*[exactly(batch, rows)] * 2)
    if implementation == "dense" or explicit_mesh or not all(map(checks.is_known_size, sizes)):
        return at_once(batch)
    if math.prod(sizes) == 0:
        return at_once(batch)
    cpu, elsewhere = _CPU, None
    if implementation == "chunked":
        cpu, elsewhere = _CPU_CHUNKED, _ELSEWHERE_CHUNKED
    if "head" in kinds:
        cpu = _CPU_HEAD
    if "head" in kinds or "top_k" in kinds:
        elsewhere = _ELSEWHERE_MADE
    return Choice(*(_blocks(batch, classes, itemsize, budget) for budget in (cpu, elsewhere)))


def _blocks(batch: tuple[int, ...], classes: int, itemsize: int, budget: _Budget | None) -> Blocks:
    if budget is None or 4 * classes * math.prod(batch) <= budget.at_once:
        return whole(batch)
    return fitting(batch, budget.rows(batch, classes, itemsize))
