"""The Poisson distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families._math import generalized_kl, log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Poisson(Family):
    r"""The Poisson distribution; a rate of 0 has all its mass at 0.

    .. math:: D(p\|q) = \lambda_p \log\frac{\lambda_p}{\lambda_q} - \lambda_p + \lambda_q

    Zeros: D(0‖λ) is λ, D(λ‖0) infinite, D(0‖0) is 0. Its entropy has no closed form.

    Args:
        rate: λ, not negative.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Poisson(1.0), kljax.families.Poisson(2.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.3069

    Source: Csiszár, Why least squares and maximum entropy?, Annals of Statistics 19 (1991),
    section 2.
    """

    rate: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {"rate": Parameter("not negative", 1)}

    def kl(self: Any, other: Any) -> Array:
        return _divergence(*jnp.broadcast_arrays(self.rate, other.rate))


@jax.custom_jvp
def _divergence(p: Array, q: Array) -> Array:
    return generalized_kl(p, q, q - p)


@_divergence.defjvp
def _divergence_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (p, q), (p_dot, q_dot) = primals, tangents
    nothing = p == 0
    to_p = jnp.where(nothing, 0, log_ratio(jnp.where(nothing, 1, p), jnp.where(nothing, 1, q)))
    both = nothing & (q == 0)
    to_q = jnp.where(nothing, 1, (q - p) / jnp.where(both, 1, q))
    return _divergence(p, q), to_p * p_dot + to_q * q_dot
