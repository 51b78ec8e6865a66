"""The categorical distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax import divergences
from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.distributions.arrays import Logits


@pytree
@dataclass(frozen=True, eq=False)
class Categorical(Family):
    r"""The categorical distribution; its event is the last axis, and batch shapes broadcast.

    .. math:: D(p\|q) = \sum_i p_i (\log p_i - \log q_i)

    As `Logits`, for code that treats all families alike. Without blocks, temperature or mask of
    classes: for large vocabularies pass `Logits` or `Head` instead.

    Args:
        probs: Probabilities, which are normalised; or else
        logits: unnormalised log-probabilities.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Categorical([1.0, 1.0]), kljax.families.Categorical([1.0, 3.0])
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.1438

    Source: Cover and Thomas, Elements of Information Theory, section 2.3.
    """

    probs: ArrayLike | None = None
    logits: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "probs": Parameter("not negative", 1, event_axes=1),
        "logits": Parameter("real", 0, event_axes=1),
    }
    one_of: ClassVar[tuple[str, ...]] = ("probs", "logits")

    def kl(self: Any, other: Any) -> Array:
        p, q = jnp.broadcast_arrays(_logits(self), _logits(other))
        return divergences.kl(Logits(p), Logits(q), implementation="dense")

    def entropy(self: Any) -> Array:
        return divergences.entropy(Logits(_logits(self)), implementation="dense")


def _logits(of: Any) -> Array:
    """Logarithms that the divergence normalises; a class without mass has no gradient."""
    if of.probs is None:
        return jnp.asarray(of.logits)
    nothing = of.probs == 0
    return jnp.where(nothing, -jnp.inf, jnp.log(jnp.where(nothing, 1, of.probs)))
