"""Other systems' KL losses with their own signatures, orders and numbers: one module for each."""

import typing as _typing
from importlib import import_module as _import_module
from types import ModuleType as _ModuleType

_LAZY = ("gluon", "keras", "optax", "torch", "torchmetrics")

if _typing.TYPE_CHECKING:
    from kljax.compat import gluon as gluon
    from kljax.compat import keras as keras
    from kljax.compat import optax as optax
    from kljax.compat import torch as torch
    from kljax.compat import torchmetrics as torchmetrics
else:  # or type checkers would take any name for one that there is

    def __getattr__(name: str) -> _ModuleType:
        if name in _LAZY:
            return _import_module(f"kljax.compat.{name}")
        raise AttributeError(f"module 'kljax.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
