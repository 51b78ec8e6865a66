"""The output head: from hidden states to logits, and derivatives back to what they are made of.

Within a block the logits are float32, or float64, whatever the hidden states and the kernel are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.classes import Axes, Classes, Layout, Shape
from kljax._engine.meshes import Names, Spread
from kljax._engine.side import Classed, Pullback, Side, compute_dtype, held
from kljax._engine.states import RowState
from kljax.distributions._pytree import pytree
from kljax.distributions.arrays import Logits


@partial(pytree, static=("softcap", "transposed"))
@dataclass(frozen=True, eq=False)
class Head(Classed):
    r"""Logits that a model's output head would give, never held as a whole.

    .. math:: z = c \tanh(s (h W + b) / c), \qquad p = \mathrm{softmax}(z / T)

    They are computed for a block of examples at a time, in float32, and so are the gradients to
    everything here; with a reduction these are made along with the value, unless one is float16.
    The gradient to the kernel is accumulated in float32. A loss's ``where`` takes a copy of the
    kernel without the classes that exist nowhere. Classes are on the last axis. A pytree.

    Args:
        hidden: What the head is applied to, ``batch + (H,)``.
        kernel: ``(H, V)``; or ``(V, H)`` where ``transposed``.
        bias: ``(V,)``, or None.
        softcap: c, a number; None leaves the logits as they are.
        scale: s, a scalar that may be traced; None is 1.
        transposed: The kernel is ``(V, H)``, as an embedding table is, tied or not: no transposed
            copy is made of it, and its gradient has its shape.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student = kljax.Head(jnp.ones((2, 3)), jnp.eye(3, 5))
        >>> teacher = kljax.Head(jnp.ones((2, 4)), jnp.eye(4, 5))
        >>> print(kljax.forward_kl(student, teacher).round(4))
        [0.0726 0.0726]
    """

    hidden: ArrayLike
    kernel: ArrayLike
    bias: ArrayLike | None = None
    softcap: float | None = None
    scale: ArrayLike | None = None
    transposed: bool = False

    makes_classes = True
    has_kernel = True

    def read(self, caller: str, argument: str) -> Self:
        parts = {
            part: checks.to_array(caller, f"{argument}.{part}", getattr(self, part))
            for part in ("hidden", "kernel", "bias", "scale")
            if getattr(self, part) is not None
        }
        softcap, transposed = self.softcap, bool(self.transposed)
        checks.require_head(caller, argument, parts, softcap, transposed)
        softcap = None if softcap is None else float(softcap)
        return replace(self, **parts, softcap=softcap, transposed=transposed)

    def shape(self, other: Shape) -> Shape:
        return (*jnp.shape(self.hidden)[:-1], jnp.shape(self.kernel)[self._class_axis])

    def fit(self, caller: str, argument: str, layout: Layout, temperature: Any) -> Self:
        checks.require_classes_last(caller, argument, layout)
        return self

    def normalizes(self, temperature: Array | None) -> bool:
        return True

    def partition(self, layout: Layout) -> Sequence[Names]:
        *rows, _ = meshes.spec(held(self.hidden))
        classes = meshes.spec(held(self.kernel))[self._class_axis]
        return (*(None for _ in range(len(layout.batch) - len(rows))), *rows, classes)

    @property
    def _class_axis(self) -> int:
        """The kernel's axis of classes."""
        return 0 if self.transposed else 1

    def place(
        self, layout: Layout, where: Array | None, live: Array | None, spread: Spread | None
    ) -> Self:
        hidden, kernel, bias = held(self.hidden), held(self.kernel), self.bias
        if spread is not None and spread.per_device:
            along = partial(meshes.along, name=spread.classes, mesh=spread.sharding.mesh)
            kernel = along(kernel, self._class_axis)
            bias = None if bias is None else along(held(bias), 0)
        if where is not None:  # nothing is read at classes that exist for no example
            exists = jnp.any(where, axis=tuple(range(where.ndim - 1)))
            bias = None if bias is None else _where(exists, held(bias))
            kernel = _where(jnp.expand_dims(exists, 1 - self._class_axis), kernel)
        if hidden.ndim == len(layout.shape) and live is not None:
            hidden = _where(live[..., None], hidden, or_finite=True)
        hidden = hidden.reshape((1,) * (len(layout.shape) - hidden.ndim) + hidden.shape)
        return replace(self, hidden=hidden, kernel=kernel, bias=bias)

    def in_axes(self, layout: Layout) -> tuple[Axes, ...]:
        return (layout.per_example, *(None for _ in jax.tree.leaves(self)[1:]))

    def report(
        self,
        which: str,
        layout: Layout,
        classes: Classes,
        live: Array | None,
        temperature: Array | None,
    ) -> None:
        counted = classes.only(live).where
        exists = jnp.ones(1, bool)
        if counted is not None:
            exists = jnp.any(counted, axis=tuple(range(counted.ndim - 1)))
        of_classes = jnp.expand_dims(exists, 1 - self._class_axis)
        parts = {
            "hidden": (self.hidden, jnp.any(exists)),  # what does not count is no NaN once placed
            "kernel": (self.kernel, of_classes),
            "bias": (self.bias, exists),
            "scale": (self.scale, jnp.any(exists)),
        }
        value_checks.check_head(which, parts)

    def project(self) -> tuple[Logits, Pullback]:
        dtype = compute_dtype((self.hidden, self.kernel))
        raw = _dot(self, self.hidden, self.kernel, "...h,hv->...v")
        if self.bias is not None:
            bias = held(self.bias).astype(dtype)
            raw = raw + bias.reshape((1,) * (raw.ndim - 1) + (-1,))
        logits = raw if self.scale is None else _scaled(raw, held(self.scale).astype(dtype))
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return Logits(logits), partial(_pull, self, raw, logits)

    def view(
        self,
        classes: Classes,
        temperature: Array | None,
        like: jax.ShapeDtypeStruct,
        state: RowState | None = None,
    ) -> Side:
        return self.project()[0].view(classes, temperature, like, state)

    def best(self, classes: Classes) -> Array:
        return self.project()[0].best(classes)


def _where(counts: Array, x: Array, *, or_finite: bool = False) -> Array:
    """x where it counts, or also where it is finite, else 0; however both are spread."""
    x, counts = meshes.broadcast([x, counts])
    return jnp.where(counts | jnp.isfinite(x) if or_finite else counts, x, 0)


def _scaled(raw: Array, scale: Array) -> Array:
    """raw · scale, where what is infinite, as by a bias of -inf, stays so: no derivative."""
    infinite = jnp.isinf(raw)
    return jnp.where(infinite, raw, jnp.where(infinite, 0, raw) * scale)


def _pull(head: Head, raw: Array, logits: Array, leaves: Sequence[int], ct: Array) -> list[Array]:
    """The gradients to some of the head's leaves, in the dtype of computation."""
    if head.softcap is not None:
        ct = ct * (1 - (logits / head.softcap) ** 2)
    to_scaled = ct
    if head.scale is not None:
        ct = ct * held(head.scale).astype(ct.dtype)
    makers = {  # in the order of the leaves
        "hidden": lambda: _dot(head, ct, head.kernel, "...v,hv->...h"),
        "kernel": lambda: _dot(head, _features_first(head.hidden), ct, "h...,...v->hv"),
        "bias": lambda: jnp.sum(ct, axis=tuple(range(ct.ndim - 1))),
        "scale": lambda: jnp.sum(jnp.where(jnp.isinf(raw), 0, to_scaled * raw)),
    }
    present = [name for name in makers if getattr(head, name) is not None]
    return [makers[present[i]]() for i in leaves]


def _dot(head: Head, a: ArrayLike, b: ArrayLike, subscripts: str) -> Array:
    """A product of the head's own factors, or of gradients, accumulated in the wide dtype."""
    wide = compute_dtype((head.hidden, head.kernel))
    if head.transposed:
        subscripts = subscripts.replace("hv", "vh")
    narrow = all(held(x).dtype == jnp.bfloat16 for x in (head.hidden, head.kernel))
    factors = (held(x).astype(jnp.bfloat16 if narrow else wide) for x in (a, b))
    return jnp.einsum(subscripts, *factors, preferred_element_type=wide)


def _features_first(hidden: ArrayLike) -> Array:
    """Transposed, and on CPU stored so: a product that must transpose a factor is slower there."""
    hidden = jnp.moveaxis(held(hidden), -1, 0)
    return lax.platform_dependent(hidden, cpu=lax.optimization_barrier, default=lambda x: x)
