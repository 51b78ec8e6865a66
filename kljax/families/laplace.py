"""The Laplace distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import excess
from kljax.distributions._pytree import pytree
from kljax.families._math import log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Laplace(Family):
    r"""The Laplace distribution.

    .. math:: D(p\|q) = (r - 1 - \log r) + r (e^{-t} - 1 + t), \qquad
              r = b_p / b_q, \quad t = |\mu_p - \mu_q| / b_p

    Args:
        loc: The medians.
        scale: The mean distances from them, b, positive.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Laplace(0.0, 1.0), kljax.families.Laplace(1.0, 1.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.3679

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
        distance = _distance_cost((self.loc - other.loc) / self.scale)
        return excess(log_ratio(self.scale, other.scale)) + self.scale / other.scale * distance

    def entropy(self: Any) -> Array:
        return 1 + jnp.log(2 * self.scale)


@jax.custom_jvp
def _distance_cost(x: Array) -> Array:
    """exp(-|x|) - 1 + |x|, which is as smooth at 0 as a parabola."""
    return excess(-jnp.abs(x))


@_distance_cost.defjvp
def _distance_cost_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return _distance_cost(x), _distance_slope(x) * x_dot


@jax.custom_jvp
def _distance_slope(x: Array) -> Array:
    return -jnp.sign(x) * jnp.expm1(-jnp.abs(x))


@_distance_slope.defjvp
def _distance_slope_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return _distance_slope(x), jnp.exp(-jnp.abs(x)) * x_dot
