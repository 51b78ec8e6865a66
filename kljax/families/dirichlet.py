"""The Dirichlet distribution."""

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
class Dirichlet(Family):
    r"""The Dirichlet distribution over probabilities of K classes, the last axis.

    .. math:: D(p\|q) = \log\frac{\Gamma(P)}{\Gamma(Q)}
              + \sum_i \log\frac{\Gamma(q_i)}{\Gamma(p_i)}
              + \sum_i (p_i - q_i) (\psi(p_i) - \psi(P)), \qquad P = \sum_i p_i

    Args:
        concentration: ``batch + (K,)``, positive.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> p = kljax.families.Dirichlet(jnp.array([1.0, 1.0, 1.0]))
        >>> print(f"{kljax.kl(p, kljax.families.Dirichlet(jnp.array([2.0, 2.0, 2.0]))):.4f}")
        0.4057

    Source: Penny, KL-divergences of Normal, Gamma, Dirichlet and Wishart densities (2001),
    section 4.
    """

    concentration: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "concentration": Parameter("positive", 1, event_axes=1)
    }

    def kl(self: Any, other: Any) -> Array:
        p, q = jnp.broadcast_arrays(self.concentration, other.concentration)
        # Q times the divergence of the mean probabilities, and what the concentrations add.
        of_means = log_ratio(p, q) - jnp.expand_dims(_log_ratio_of_sums(p, q), -1)
        from_means = jnp.sum(q * excess(of_means), -1)
        whole = bregman(GAMMA, jnp.sum(q, -1), jnp.sum(p, -1), jnp.sum(q - p, -1))
        return from_means + (jnp.sum(bregman(GAMMA, q, p), -1) - whole)

    def entropy(self: Any) -> Array:
        a = self.concentration
        total = jnp.sum(a, -1)
        each = GAMMA.value(a) + jnp.log(a / jnp.expand_dims(total, -1)) - (a - 1) * GAMMA.slope(a)
        of_total = GAMMA.value(total) - (total - a.shape[-1]) * GAMMA.slope(total)
        return jnp.sum(each, -1) - of_total


def _log_ratio_of_sums(p: Array, q: Array) -> Array:
    return log_ratio(jnp.sum(p, -1), jnp.sum(q, -1), jnp.sum(p - q, -1))
