"""What the user holds: distributions that say how they are represented."""

import json
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

import numpy as np
from jax import export
from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import ArrayLike

from kljax._engine.top_k import Tail

T = TypeVar("T")

_STATIC = ("softcap", "tail", "transposed")


def _pytree(cls: type[T]) -> type[T]:
    """Register a class of arrays and static options.

    A temperature that is a plain number is static too: it does not become one per example when
    the arrays are mapped or cut. Not with `register_dataclass`: the tree structures of two such
    classes compare equal, and a trace of one would serve the other.
    """
    names = [field.name for field in fields(cast(Any, cls))]

    def is_static(side: Any, name: str) -> bool:
        number = isinstance(getattr(side, name), numbers.Real)
        return name in _STATIC or (name == "temperature" and number)

    def flatten(side: Any) -> tuple[list[tuple[GetAttrKey, Any]], tuple[tuple[str, Any], ...]]:
        static = tuple((name, getattr(side, name)) for name in names if is_static(side, name))
        leaves = [name for name in names if not is_static(side, name)]
        return [(GetAttrKey(name), getattr(side, name)) for name in leaves], static

    def unflatten(static: tuple[tuple[str, Any], ...], children: Iterable[Any]) -> Any:
        options = dict(static)
        leaves = [name for name in names if name not in options]
        return cls(**dict(zip(leaves, children, strict=True)), **options)

    register_pytree_with_keys(cls, flatten, unflatten)
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"kljax.{cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(static, default=float).encode(),
        deserialize_auxdata=lambda text: tuple(map(tuple, json.loads(text))),
    )
    return cls


class Distribution:
    """What every distribution is: a frozen pytree that says what it holds.

    For annotations and ``isinstance``; `Logits`, `LogProbs`, `Probs`, `Head` and `TopK` are those
    there are.
    """


@_pytree
@dataclass(frozen=True, eq=False)
class Logits(Distribution):
    r"""Unnormalised log-probabilities; a bare array means the same.

    .. math:: p_i = \exp(x_i / T) / \sum_j \exp(x_j / T)

    The library normalises them, over the classes that ``where`` allows. -inf is a class of
    probability zero; its gradient is finite. A pytree: passes through every transform.

    Args:
        logits: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.Logits(jnp.zeros(4))):.4f}")
        1.3863
    """

    logits: ArrayLike


@_pytree
@dataclass(frozen=True, eq=False)
class LogProbs(Distribution):
    r"""Log-probabilities, taken at their word.

    .. math:: p_i = \exp(\ell_i)

    -inf is a class of probability zero. They are not normalised again, unless a temperature is
    given. That they are normalised is checked only under `checked`.
    A pytree: passes through every transform.

    Args:
        log_probs: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.LogProbs(jax.nn.log_softmax(jnp.zeros(4)))):.4f}")
        1.3863
    """

    log_probs: ArrayLike


@_pytree
@dataclass(frozen=True, eq=False)
class Probs(Distribution):
    r"""Probabilities, taken at their word.

    0 is allowed. They are not normalised again, unless a temperature is given. That they are
    non-negative and sum to 1 is checked only under `checked`.
    A pytree: passes through every transform.

    Args:
        probs: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.Probs(jnp.array([0.5, 0.5, 0.0]))):.4f}")
        0.6931
    """

    probs: ArrayLike


@_pytree
@dataclass(frozen=True, eq=False)
class Head(Distribution):
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


@_pytree
@dataclass(frozen=True, eq=False)
class TopK(Distribution):
    r"""A teacher's k best classes, as targets; from `top_k`, `sample_targets` or a cache.

    With K the given classes, the rest is one more class: :math:`1 - \sum_{i \in K} p_i`.
    How the tail is treated (``tail``, a static option):

    - "bucket": predictions and targets keep one more class for all others. A true divergence on
      k + 1 classes; for KL in either direction, Jeffreys and Jensen–Shannon a lower bound of the
      full one; value and gradient are 0 at equality.
    - "renormalize": the targets are renormalised on K and 0 elsewhere. Reverse KL and Jeffreys
      would be infinite and raise.
    - "renormalize_both": both sides are renormalised on K; blind to mass elsewhere.
    - "truncate": the bare partial sum over K, which may be negative.

    Entries of log-probability -inf are padding; other indices are distinct. Classes that a loss's
    ``where`` masks do not exist: what is left of the targets is renormalised (not with "truncate"),
    and if nothing is left the example gives 0. What the rest holds of such classes is not known:
    give ``where`` to `top_k` too. A pytree.

    Args:
        indices: Integers, ``batch + (k,)``.
        log_probs: Their log-probabilities under the full vocabulary, ``batch + (k,)``.
        log_tail: The log of the rest's mass, of the batch shape; None is what log_probs lack from
            1, which float32 and a 16-bit cache know poorly where the teacher is confident.
        temperature: What they were taken at; static if a plain number. A loss must be given the
            same one, which then applies to the predictions: a cached top-k cannot be given another.
        tail: One of the four above.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> teacher = kljax.TopK(jnp.array([0]), jnp.log(jnp.array([0.9])), tail="truncate")
        >>> print(f"{kljax.reverse_kl(kljax.Probs([0.6, 0.4]), teacher):.3f}")
        -0.243
    """

    indices: ArrayLike
    log_probs: ArrayLike
    log_tail: ArrayLike | None = None
    temperature: ArrayLike | None = None
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        """A cache written with ``np.savez`` reads static options back as arrays without axes."""
        for name, value in (("tail", self.tail), ("temperature", self.temperature)):
            if isinstance(value, np.ndarray) and value.ndim == 0:
                object.__setattr__(self, name, value.item())
