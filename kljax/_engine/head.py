"""The output head: from hidden states to logits, and derivatives back to what they are made of.

Within a block the logits are float32, or float64, whatever the hidden states and the kernel are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

Tree = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "kernel", "bias", "scale", "live"],
    meta_fields=["softcap", "transposed"],
)
@dataclass(frozen=True)
class HeadInput:
    """Logits z = scale · (hidden @ kernel + bias), then softcap · tanh(z / softcap)."""

    hidden: Array  # [..., H]
    kernel: Array  # [H, V]
    bias: Array | None  # [V]
    scale: Array | None
    live: Array | None  # which examples count; of the others nothing that is not finite is read
    softcap: float | None
    transposed: bool  # the kernel is [V, H]

    @property
    def class_axis(self) -> int:
        """Of the kernel."""
        return 0 if self.transposed else 1


class Projected(NamedTuple):
    """Operands with logits in place of heads, and their moving leaves."""

    operands: Tree
    moving: tuple[int, ...]


def project(operands: Tree) -> Tree:
    """Put its logits in place of every head."""
    return jax.tree.map(lambda x: _logits(x)[0] if _is_head(x) else x, operands, is_leaf=_is_head)


def project_with_pullback(
    operands: Tree, moving: tuple[int, ...]
) -> tuple[Projected, Callable[[list[Array]], list[Array]]]:
    """`project`, and the way back from gradients to logits to those of the moving leaves."""
    items, tree = jax.tree.flatten(operands, is_leaf=_is_head)
    position, places, pullbacks = 0, [], []
    for place, item in enumerate(items):
        count = len(jax.tree.leaves(item))
        own = [i - position for i in moving if position <= i < position + count]
        position += count
        if _is_head(item):
            items[place], parts = _logits(item)
            pullbacks += [partial(_pull, item, parts, own)] if own else []
        else:
            pullbacks += [lambda ct: [ct]] if own else []
        places += [place] if own else []

    def pullback(cts: list[Array]) -> list[Array]:
        return [x for pull, ct in zip(pullbacks, cts, strict=True) for x in pull(ct)]

    return Projected(jax.tree.unflatten(tree, items), tuple(places)), pullback


class _Parts(NamedTuple):
    hidden: Array
    raw: Array  # before the scale
    logits: Array


def _logits(head: HeadInput) -> tuple[Array, _Parts]:
    dtype = compute_dtype(head)
    hidden = head.hidden
    if head.live is not None:
        hidden = jnp.where(head.live[..., None] | jnp.isfinite(hidden), hidden, 0)
    raw = _dot(head, hidden, head.kernel, "...h,hv->...v")
    if head.bias is not None:
        raw = raw + head.bias.astype(dtype).reshape((1,) * (raw.ndim - 1) + (-1,))
    logits = raw if head.scale is None else _scaled(raw, head.scale.astype(dtype))
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    return logits, _Parts(hidden, raw, logits)


def _scaled(raw: Array, scale: Array) -> Array:
    """raw · scale, where what is infinite, as by a bias of -inf, stays so: no derivative."""
    infinite = jnp.isinf(raw)
    return jnp.where(infinite, raw, jnp.where(infinite, 0, raw) * scale)


def _pull(head: HeadInput, parts: _Parts, own: list[int], ct: Array) -> list[Array]:
    """The gradients to those of the head's leaves that move, in the dtype of computation."""
    dtype = ct.dtype
    if head.softcap is not None:
        ct = ct * (1 - (parts.logits / head.softcap) ** 2)
    to_scaled = ct
    if head.scale is not None:
        ct = ct * head.scale.astype(dtype)
    makers = {
        "hidden": lambda: _dot(head, ct, head.kernel, "...v,hv->...h"),
        "kernel": lambda: _dot(head, _features_first(parts.hidden), ct, "h...,...v->hv"),
        "bias": lambda: jnp.sum(ct, axis=tuple(range(ct.ndim - 1))),
        "scale": lambda: jnp.sum(jnp.where(jnp.isinf(parts.raw), 0, to_scaled * parts.raw)),
        "live": lambda: jnp.zeros(()),  # bool: it never moves
    }
    present = [name for name in makers if getattr(head, name) is not None]
    return [makers[present[i]]() for i in own]


def _dot(head: HeadInput, a: Array, b: Array, subscripts: str) -> Array:
    """A product of the head's own factors, or of gradients, accumulated in the wide dtype."""
    wide = compute_dtype(head)
    if head.transposed:
        subscripts = subscripts.replace("hv", "vh")
    narrow = head.hidden.dtype == head.kernel.dtype == jnp.bfloat16
    factors = (x.astype(jnp.bfloat16 if narrow else wide) for x in (a, b))
    return jnp.einsum(subscripts, *factors, preferred_element_type=wide)


def _features_first(hidden: Array) -> Array:
    """Transposed, and on CPU stored so: a product that must transpose a factor is slower there."""
    hidden = jnp.moveaxis(hidden, -1, 0)
    return lax.platform_dependent(hidden, cpu=lax.optimization_barrier, default=lambda x: x)


def compute_dtype(head: HeadInput) -> jnp.dtype:
    wide = jnp.float64 in (head.hidden.dtype, head.kernel.dtype)
    return jnp.dtype("float64" if wide else "float32")


def _is_head(x: Any) -> bool:
    return isinstance(x, HeadInput)
