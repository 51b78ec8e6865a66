"""The multivariate normal distribution."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import excess
from kljax.distributions._pytree import pytree
from kljax.families._math import log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class MultivariateNormal(Family):
    r"""The multivariate normal distribution; its event is the last axis.

    .. math:: D(p\|q) = \frac{1}{2}\left(\lVert L_q^{-1} L_p \rVert_F^2 - n
              - 2 \log\frac{\det L_p}{\det L_q}
              + \lVert L_q^{-1} (\mu_p - \mu_q) \rVert^2\right)

    Accurate where the two are close as far as the factors L are: best from scale_tril.

    Args:
        loc: The means, ``batch + (n,)``.
        scale_tril: The lower triangular factor L of the covariance, ``batch + (n, n)``, with a
            positive diagonal; what is above the diagonal is not read. Or else
        covariance_matrix: L Lᵀ, or else
        precision_matrix: its inverse.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> p = kljax.families.MultivariateNormal(jnp.ones(2), scale_tril=jnp.eye(2))
        >>> q = kljax.families.MultivariateNormal(jnp.zeros(2), covariance_matrix=jnp.eye(2))
        >>> print(kljax.kl(p, q))
        1.0

    Source: Penny, KL-divergences of Normal, Gamma, Dirichlet and Wishart densities (2001),
    section 2.
    """

    loc: ArrayLike
    scale_tril: ArrayLike | None = None
    covariance_matrix: ArrayLike | None = None
    precision_matrix: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "loc": Parameter("real", 0, event_axes=1),
        "scale_tril": Parameter("real", 1, event_axes=2),
        "covariance_matrix": Parameter("real", 1, event_axes=2),
        "precision_matrix": Parameter("real", 1, event_axes=2),
    }
    one_of: ClassVar[tuple[str, ...]] = ("scale_tril", "covariance_matrix", "precision_matrix")

    def kl(self: Any, other: Any) -> Array:
        a, b = _factor(self), _factor(other)
        step = self.loc - other.loc
        batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2], step.shape[:-1])
        n = step.shape[-1]
        a, b = (jnp.broadcast_to(x, (*batch, n, n)) for x in (a, b))
        step = jnp.broadcast_to(step, (*batch, n))
        # L_q⁻¹ L_p is I + E: its diagonal is known as ratios, what is below it from a - b alone.
        beside = jnp.tril(solve_triangular(b, a - b, lower=True), -1)
        diagonal = log_ratio(_diagonal(a), _diagonal(b))
        moved = solve_triangular(b, step[..., None], lower=True)
        squares = jnp.sum(beside**2, (-2, -1)) + jnp.sum(moved**2, (-2, -1))
        return 0.5 * (jnp.sum(excess(2 * diagonal), -1) + squares)

    def entropy(self: Any) -> Array:
        factor = _factor(self)
        each = 0.5 * (1 + math.log(2 * math.pi)) + jnp.log(_diagonal(factor))
        return jnp.sum(each, -1)


def _diagonal(x: Array) -> Array:
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def _factor(of: Any) -> Array:
    """The lower triangular factor of the covariance."""
    if of.scale_tril is not None:
        return jnp.tril(of.scale_tril)
    if of.covariance_matrix is not None:
        return jnp.linalg.cholesky(of.covariance_matrix)
    # P = U Uᵀ with U upper triangular, so that U⁻ᵀ is the lower triangular factor of P⁻¹.
    flipped = jnp.linalg.cholesky(jnp.flip(of.precision_matrix, (-2, -1)))
    upper = jnp.flip(flipped, (-2, -1))
    identity = jnp.broadcast_to(jnp.eye(upper.shape[-1], dtype=upper.dtype), upper.shape)
    return solve_triangular(upper, identity, trans=1, lower=False)
