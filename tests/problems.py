"""One batch of problems for every way to compute a divergence, and those ways.

A new path is one more line of PATHS, and has the whole suite of `test_paths.py`. Rows: eight, a
multiple of the devices; classes: sixteen, some masked.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import kljax

INF, NAN = np.inf, np.nan
ROWS, CLASSES = 8, 16


class Problem(NamedTuple):
    """Logits of both sides, and all options that change the result."""

    x: np.ndarray
    y: np.ndarray
    where: np.ndarray
    temperature: float
    weights: np.ndarray


def problem() -> Problem:
    """Where formulas break, a row each; every value is finite."""
    rng = np.random.default_rng(7)
    x, y = (np.float32(3 * rng.normal(size=(ROWS, CLASSES))) for _ in range(2))
    y[1] = x[1]  # equal
    y[2] = x[2] + np.float32(1e-3 * rng.normal(size=CLASSES))  # close
    x[3, 4:9] = y[3, 4:9] = -INF  # neither has mass there
    x[4, 3] = y[4, 3] = 1e4  # nothing but one class
    x[5] *= 8  # far apart
    x[6, 2] = NAN  # in a row of weight 0
    where = np.arange(CLASSES) % 5 > 0
    y[7, 0] = NAN  # in a masked class
    return Problem(x, y, where, 2.0, np.float32([1, 2, 0.5, 1, 1, 3, 0, 1]))


Loss = Callable[..., jax.Array]  # (x, y, weights, **options): the weighted mean


def plainly(loss: Loss, **options: Any) -> Loss:
    return partial(loss, **options)


def from_heads(loss: Loss, **options: Any) -> Loss:
    """Logits as products; a class without mass is then one far below the others."""

    def head(logits):
        finite = jnp.where(jnp.isneginf(logits), -1e4, logits)
        live = jnp.where(jnp.isnan(finite), 0, finite)  # 0 · NaN would be in every row
        return kljax.Head(jnp.eye(ROWS, dtype=logits.dtype), live)

    return lambda x, y, weights: loss(head(x), head(y), weights, **options)


def over_examples(loss: Loss) -> Loss:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    body = partial(loss, axis_name="data")
    return jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P())


def over_classes(loss: Loss) -> Loss:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = (P(None, "model"), P(None, "model"), P())

    def body(x, y, weights):
        here = jax.lax.axis_index("model") * 2 + jnp.arange(2)
        return loss(x, y, weights, class_axis_name="model", classes=here)

    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())


def over_both(loss: Loss) -> Loss:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = (P("data", "model"), P("data", "model"), P("data"))

    def body(x, y, weights):
        here = jax.lax.axis_index("model") * 4 + jnp.arange(4)
        return loss(x, y, weights, axis_name="data", class_axis_name="model", classes=here)

    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P())


def explicitly(loss: Loss, **options: Any) -> Loss:
    """Arrays on a mesh of explicit axes, which `around` sets."""

    def run(x, y, weights):
        spread = lambda z, *names: jax.sharding.reshard(z, P(*names))  # noqa: E731
        both = spread(x, "data", "model"), spread(y, "data", "model")
        return loss(*both, spread(weights, "data"), **options)

    return run


def mapped(loss: Loss) -> Loss:
    """Each example by itself, the mean over the mapped axis."""

    def run(x, y, weights):
        each = partial(loss, axis_name="examples")
        return jax.vmap(each, axis_name="examples")(x, y, weights).mean()

    return run


PATHS: dict[str, Callable[[Loss], Loss]] = {
    "whole": partial(plainly, implementation="dense"),
    "blocks": partial(plainly, implementation=kljax.Chunked(rows=3)),
    "chosen": plainly,
    "heads": from_heads,
    "heads in blocks": partial(from_heads, implementation=kljax.Chunked(rows=3)),
    "examples over a mesh": over_examples,
    "classes over a mesh": over_classes,
    "both over a mesh": over_both,
    "an explicit mesh": explicitly,
    "blocks on an explicit mesh": partial(explicitly, implementation=kljax.Chunked(rows=4)),
    "heads on an explicit mesh": lambda loss: explicitly(from_heads(loss)),
    "vmap": mapped,
}


def around(path: str) -> Any:
    """The context that a path is called in."""
    if "explicit mesh" not in path:
        return nullcontext()
    return jax.set_mesh(
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    )
