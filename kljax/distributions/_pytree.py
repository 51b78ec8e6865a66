"""How a distribution becomes a pytree."""

import json
import numbers
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar, cast

from jax import export
from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")


def pytree(cls: type[T], *, static: tuple[str, ...] = ()) -> type[T]:
    """Register a class of arrays and, by their names, static options.

    A temperature that is a plain number is static too: it does not become one per example when
    the arrays are mapped or cut. Not with `register_dataclass`: the tree structures of two such
    classes compare equal, and a trace of one would serve the other.
    """
    names = [field.name for field in fields(cast(Any, cls))]

    arrays = [name for name in names if name not in static]
    but_temperature = [name for name in arrays if name != "temperature"]

    def leaf_names(side: Any) -> list[str]:
        number = arrays != but_temperature and isinstance(side.temperature, numbers.Real)
        return but_temperature if number else arrays

    def flatten(side: Any) -> tuple[list[Any], tuple[tuple[str, Any], ...]]:
        leaves = leaf_names(side)
        options = tuple((name, getattr(side, name)) for name in names if name not in leaves)
        return [getattr(side, name) for name in leaves], options

    def with_keys(side: Any) -> tuple[list[tuple[GetAttrKey, Any]], tuple[tuple[str, Any], ...]]:
        leaves, options = flatten(side)
        keys = map(GetAttrKey, leaf_names(side))
        return list(zip(keys, leaves, strict=True)), options

    def unflatten(options: tuple[tuple[str, Any], ...], children: Iterable[Any]) -> Any:
        given = dict(options)
        leaves = [name for name in names if name not in given]
        return cls(**dict(zip(leaves, children, strict=True)), **given)

    register_pytree_with_keys(cls, with_keys, unflatten, flatten)
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"kljax.{cls.__name__}",
        serialize_auxdata=lambda options: json.dumps(options, default=float).encode(),
        deserialize_auxdata=lambda text: tuple(map(tuple, json.loads(text))),
    )
    return cls
