"""The binomial distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine import value_checks
from kljax._engine.terms import nan_unless
from kljax.distributions._pytree import pytree
from kljax.families._math import infinite_unless
from kljax.families.bernoulli import Bernoulli, probability


@pytree
@dataclass(frozen=True, eq=False)
class Binomial(Family):
    r"""The binomial distribution: how many of n trials succeed.

    .. math:: D(p\|q) = n \, D(\text{Bernoulli}(p) \| \text{Bernoulli}(q))

    Infinite where p has more trials than q. Where it has fewer there is no closed form: NaN, and an
    error under `checked`. Its entropy has none either.

    Args:
        total_count: n, not negative, without gradient.
        probs: The probabilities of success; or else
        logits: their log-odds.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Binomial(10, 0.5), kljax.families.Binomial(10, 0.25)
        >>> print(f"{kljax.kl(p, q):.4f}")
        1.4384

    Source: the chain rule, Cover and Thomas, Elements of Information Theory, section 2.5.
    """

    total_count: ArrayLike
    probs: ArrayLike | None = None
    logits: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "total_count": Parameter("not negative", 1),
        "probs": Parameter("a probability", 0.5),
        "logits": Parameter("real", 0),
    }
    one_of: ClassVar[tuple[str, ...]] = ("probs", "logits")

    def kl(self: Any, other: Any) -> Array:
        n, other_n = jax.lax.stop_gradient((self.total_count, other.total_count))
        one, other_one = (Bernoulli(each.probs, each.logits) for each in (self, other))
        value_checks.check_same_counts("Binomial", n, other_n)
        values = other_n * one.kl(other_one)
        n, other_n, p, values = jnp.broadcast_arrays(n, other_n, probability(one), values)
        known = (n >= other_n) | (p == 0)
        return infinite_unless((n <= other_n) | (p == 0), nan_unless(known, values))
