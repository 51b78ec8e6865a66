"""The log-normal distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families.normal import Normal


@pytree
@dataclass(frozen=True, eq=False)
class LogNormal(Family):
    r"""The distribution of exp(x) for a normal x; its divergence is that of the two normal ones.

    .. math:: D(p\|q) = D(\mathcal N(\mu_p, \sigma_p) \| \mathcal N(\mu_q, \sigma_q))

    Args:
        loc: The means of the logarithm.
        scale: Its standard deviations, positive.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.LogNormal(1.0, 1.0), kljax.families.LogNormal(0.0, 1.0)
        >>> print(kljax.kl(p, q))
        0.5

    Source: KL does not change under a map of x that has an inverse; Cover and Thomas, Elements of
    Information Theory, section 8.6.
    """

    loc: ArrayLike
    scale: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "loc": Parameter("real", 0),
        "scale": Parameter("positive", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        return Normal(self.loc, self.scale).kl(Normal(other.loc, other.scale))

    def entropy(self: Any) -> Array:
        return Normal(self.loc, self.scale).entropy() + self.loc
