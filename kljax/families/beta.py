"""The beta distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families.dirichlet import Dirichlet


@pytree
@dataclass(frozen=True, eq=False)
class Beta(Family):
    r"""The beta distribution, the Dirichlet distribution of two classes.

    .. math:: D(p\|q) = D(\text{Dir}(a_p, b_p) \| \text{Dir}(a_q, b_q))

    Args:
        concentration1: a, positive: that of x.
        concentration0: b, positive: that of 1 - x.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Beta(1.0, 1.0), kljax.families.Beta(2.0, 2.0)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.2082

    Source: Penny, KL-divergences of Normal, Gamma, Dirichlet and Wishart densities (2001),
    section 4.
    """

    concentration1: ArrayLike
    concentration0: ArrayLike

    parameters: ClassVar[dict[str, Parameter]] = {
        "concentration1": Parameter("positive", 1),
        "concentration0": Parameter("positive", 1),
    }

    def kl(self: Any, other: Any) -> Array:
        return _of_two_classes(self).kl(_of_two_classes(other))

    def entropy(self: Any) -> Array:
        return _of_two_classes(self).entropy()


def _of_two_classes(of: Any) -> Dirichlet:
    both = jnp.broadcast_arrays(of.concentration1, of.concentration0)
    return Dirichlet(jnp.stack(both, axis=-1))
