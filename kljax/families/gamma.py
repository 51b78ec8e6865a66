"""The gamma distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import excess
from kljax.distributions._pytree import pytree
from kljax.families._math import GAMMA, bregman, log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Gamma(Family):
    r"""The gamma distribution.

    .. math:: D(p\|q) = \alpha_q (m - 1 - \log m) + \varphi(\alpha_q) - \varphi(\alpha_p)
              - \varphi'(\alpha_p) (\alpha_q - \alpha_p)

    with the ratio m of the means α/β and :math:`\varphi(x) = \log\Gamma(x) - x \log x + x`.

    Args:
        concentration: α, positive.
        rate: β, positive.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Gamma(2.0, 1.0), kljax.families.Gamma(3.0, 1.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.2704

    Source: Penny, KL-divergences of Normal, Gamma, Dirichlet and Wishart densities (2001),
    section 3.
    """

    concentration: ArrayLike
    rate: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "concentration": Parameter("positive", 1),
        "rate": Parameter("positive", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        a, b = self.concentration, other.concentration
        log_ratio_of_means = log_ratio(a, b) + log_ratio(other.rate, self.rate)
        return b * excess(log_ratio_of_means) + bregman(GAMMA, *jnp.broadcast_arrays(b, a))

    def entropy(self: Any) -> Array:
        a = self.concentration
        return jnp.log(a) - jnp.log(self.rate) + GAMMA.value(a) + (1 - a) * GAMMA.slope(a)
