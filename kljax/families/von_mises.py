"""The von Mises distribution."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families._math import BESSEL, bregman


@pytree
@dataclass(frozen=True, eq=False)
class VonMises(Family):
    r"""The von Mises distribution on the circle.

    .. math:: D(p\|q) = \log\frac{I_0(\kappa_q)}{I_0(\kappa_p)} + A(\kappa_p) (\kappa_p
              - \kappa_q \cos(\mu_p - \mu_q)), \qquad A = I_1 / I_0

    Args:
        loc: The mean directions, in radians.
        concentration: κ, not negative; 0 is the uniform distribution.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.VonMises(0.0, 2.0), kljax.families.VonMises(1.0, 2.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.6415

    Source: Kitagawa and Rowley, von Mises-Fisher distributions and their statistical divergence
    (2022), section 3.
    """

    loc: ArrayLike
    concentration: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "loc": Parameter("real", 0),
        "concentration": Parameter("not negative", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        a, b = jnp.broadcast_arrays(self.concentration, other.concentration)
        turned = 2 * jnp.sin(0.5 * (self.loc - other.loc)) ** 2  # 1 - cos
        return bregman(BESSEL, b, a) + (1 + BESSEL.slope(a)) * b * turned

    def entropy(self: Any) -> Array:
        k = self.concentration
        return math.log(2 * math.pi) + BESSEL.value(k) - k * BESSEL.slope(k)
