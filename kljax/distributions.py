"""What the user holds: distributions that say how they are represented."""

from dataclasses import dataclass, fields

from jax.tree_util import GetAttrKey, register_pytree_with_keys
from jax.typing import ArrayLike


def _pytree(cls: type) -> type:
    """Register a class of one array.

    Not with `register_dataclass`: the tree structures of two such classes compare equal, and a
    trace of one would serve the other.
    """
    (field,) = fields(cls)
    register_pytree_with_keys(
        cls,
        lambda side: (((GetAttrKey(field.name), getattr(side, field.name)),), None),
        lambda _, children: cls(*children),
    )
    return cls


@_pytree
@dataclass(frozen=True, eq=False)
class Logits:
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
class LogProbs:
    r"""Log-probabilities, taken at their word.

    .. math:: p_i = \exp(\ell_i)

    -inf is a class of probability zero. They are not normalised again, unless a temperature is
    given. That they are normalised is checked only under ``jax.experimental.checkify``.
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
class Probs:
    r"""Probabilities, taken at their word.

    0 is allowed. They are not normalised again, unless a temperature is given. That they are
    non-negative and sum to 1 is checked only under ``jax.experimental.checkify``.
    A pytree: passes through every transform.

    Args:
        probs: Any floating-point array; ``axis`` says where the classes are.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.entropy(kljax.Probs(jnp.array([0.5, 0.5, 0.0]))):.4f}")
        0.6931
    """

    probs: ArrayLike


Distribution = Logits | LogProbs | Probs
