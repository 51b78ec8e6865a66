"""The uniform distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families._math import infinite_unless, log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Uniform(Family):
    r"""The uniform distribution on an interval.

    .. math:: D(p\|q) = \log\frac{h_q - l_q}{h_p - l_p}

    Infinite, and without gradient, where p reaches beyond q.

    Args:
        low: Where it begins.
        high: Where it ends, above low.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Uniform(0.0, 1.0), kljax.families.Uniform(0.0, 2.0)
        >>> print(f"{kljax.kl(p, q):.4f} {kljax.kl(q, p):.4f}")
        0.6931 inf

    Source: Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate
    continuous distributions, Information Sciences 249 (2013), table 3.
    """

    low: ArrayLike
    high: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "low": Parameter("real", 0),
        "high": Parameter("real", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        inside = (other.low <= self.low) & (self.high <= other.high)
        wider = (other.high - self.high) + (self.low - other.low)
        wider = log_ratio(other.high - other.low, self.high - self.low, wider)
        return infinite_unless(*jnp.broadcast_arrays(inside, wider))

    def entropy(self: Any) -> Array:
        return jnp.log(self.high - self.low)
