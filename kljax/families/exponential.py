"""The exponential distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import excess
from kljax.distributions._pytree import pytree
from kljax.families._math import log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Exponential(Family):
    r"""The exponential distribution.

    .. math:: D(p\|q) = r - 1 - \log r, \qquad r = \lambda_q / \lambda_p

    Args:
        rate: λ, positive.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Exponential(1.0), kljax.families.Exponential(2.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.3069

    Source: Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate
    continuous distributions, Information Sciences 249 (2013), table 3.
    """

    rate: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {"rate": Parameter("positive", 1)}

    def kl(self: Any, other: Any) -> Array:
        return excess(log_ratio(other.rate, self.rate))

    def entropy(self: Any) -> Array:
        return 1 - jnp.log(self.rate)
