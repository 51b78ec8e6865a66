"""The geometric distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax.distributions._pytree import pytree
from kljax.families.bernoulli import Bernoulli, probability


@pytree
@dataclass(frozen=True, eq=False)
class Geometric(Family):
    r"""The geometric distribution: how many trials fail before the first success.

    .. math:: D(p\|q) = \frac{1}{p} D(\text{Bernoulli}(p) \| \text{Bernoulli}(q))

    Args:
        probs: The probabilities of success, in (0, 1]; or else
        logits: their log-odds.

    Example:
        >>> import kljax
        >>> p, q = kljax.families.Geometric(0.5), kljax.families.Geometric(0.25)
        >>> print(f"{kljax.kl(p, q):.4f}")
        0.2877

    Source: the chain rule, Cover and Thomas, Elements of Information Theory, section 2.5: on
    average 1/p trials are made.
    """

    probs: ArrayLike | None = None
    logits: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "probs": Parameter("a probability", 0.5),
        "logits": Parameter("real", 0),
    }
    one_of: ClassVar[tuple[str, ...]] = ("probs", "logits")

    def kl(self: Any, other: Any) -> Array:
        one, other_one = (Bernoulli(each.probs, each.logits) for each in (self, other))
        return one.kl(other_one) / probability(one)

    def entropy(self: Any) -> Array:
        trial = Bernoulli(self.probs, self.logits)
        return trial.entropy() / probability(trial)
