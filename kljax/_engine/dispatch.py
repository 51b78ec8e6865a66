"""Which implementation serves a call: one table."""

from collections.abc import Callable
from typing import Literal

from jax import Array

from kljax._engine import checks, dense
from kljax._engine.representation import Operands, Spec

Implementation = Literal["dense"]

_ROWS: dict[Implementation, Callable[[Spec, Operands], Array]] = {"dense": dense.rows}


def choose(caller: str, implementation: Implementation | None) -> Implementation:
    """The implementation to run. A named one runs or raises; None leaves the choice here."""
    if implementation is None:
        return "dense"
    checks.require_choice(caller, "implementation", implementation, _ROWS, optional=True)
    return implementation


def rows(implementation: Implementation) -> Callable[[Spec, Operands], Array]:
    return _ROWS[implementation]
