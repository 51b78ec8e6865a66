"""The normal distribution."""

import math
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
class Normal(Family):
    r"""The normal distribution, of a scale or of the logarithm of its square.

    .. math:: D(p\|q) = \frac{1}{2}\left(\frac{\sigma_p^2}{\sigma_q^2} - 1
              - \log\frac{\sigma_p^2}{\sigma_q^2}\right)
              + \frac{(\mu_p - \mu_q)^2}{2 \sigma_q^2}

    Summed of two terms that are not negative, each accurate where the two are close. A pytree.

    Args:
        loc: The means.
        scale: The standard deviations, positive; or else
        log_variance: log σ², which any network may put out.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> posterior = kljax.families.Normal(jnp.ones((2, 3)), log_variance=jnp.zeros((2, 3)))
        >>> print(kljax.kl(posterior, kljax.families.Normal(0.0, 1.0), axis=-1))
        [1.5 1.5]

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014), appendix B.
    """

    loc: ArrayLike
    scale: ArrayLike | None = None
    log_variance: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "loc": Parameter("real", 0),
        "scale": Parameter("positive", 1),
        "log_variance": Parameter("real", 0),
    }
    one_of: ClassVar[tuple[str, ...]] = ("scale", "log_variance")

    def kl(self: Any, other: Any) -> Array:
        step = (self.loc - other.loc) / _scale(other)
        return 0.5 * (excess(2 * _log_ratio_of_scales(self, other)) + step**2)

    def entropy(self: Any) -> Array:
        return 0.5 * (1 + math.log(2 * math.pi)) + _log_scale(self)


def _scale(of: Any) -> Array:
    return jnp.exp(0.5 * of.log_variance) if of.scale is None else of.scale


def _log_scale(of: Any) -> Array:
    return 0.5 * of.log_variance if of.scale is None else jnp.log(of.scale)


def _log_ratio_of_scales(a: Any, b: Any) -> Array:
    if a.scale is None and b.scale is None:
        return 0.5 * (a.log_variance - b.log_variance)
    return log_ratio(_scale(a), _scale(b))
