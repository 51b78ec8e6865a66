"""The Gumbel distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import excess
from kljax.distributions._pytree import pytree
from kljax.families._math import EULER, GAMMA, bregman, log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Gumbel(Family):
    r"""The Gumbel distribution, of maxima.

    .. math:: D(p\|q) = (e^w - 1 - w) + \log\Gamma(r) + \gamma (r - 1), \qquad
              r = \beta_p / \beta_q, \quad w = (\mu_q - \mu_p) / \beta_q + \log\Gamma(1 + r)

    Args:
        loc: The modes.
        scale: β, positive.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Gumbel(0.0, 1.0), kljax.families.Gumbel(1.0, 1.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.7183

    Source: Gil, Alajaji and Linder, Rényi divergence measures for commonly used univariate
    continuous distributions, Information Sciences 249 (2013), table 3.
    """

    loc: ArrayLike
    scale: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "loc": Parameter("real", 0),
        "scale": Parameter("positive", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        log_r = log_ratio(self.scale, other.scale)
        r = self.scale / other.scale
        beyond_one = (self.scale - other.scale) / other.scale
        # log Γ(r) + γ (r - 1): the tangent's distance at 1, in the two parts of that potential.
        of_gamma = bregman(GAMMA, r, jnp.ones_like(r)) + r * excess(-log_r)
        w = (other.loc - self.loc) / other.scale + log_r - EULER * beyond_one + of_gamma
        return excess(w) + of_gamma

    def entropy(self: Any) -> Array:
        return 1 + EULER + jnp.log(self.scale)
