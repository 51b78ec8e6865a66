"""The Bernoulli distribution."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._closed_forms import Family, Parameter
from kljax._engine.terms import log_difference, term_entropy, term_generalized_kl
from kljax.distributions._pytree import pytree
from kljax.families._math import generalized_kl, log_ratio


@pytree
@dataclass(frozen=True, eq=False)
class Bernoulli(Family):
    r"""The Bernoulli distribution; with ``axis=-1``, many independent labels.

    .. math:: D(p\|q) = p \log\frac{p}{q} + (1 - p) \log\frac{1 - p}{1 - q}

    Zeros: probabilities of 0 and 1 and infinite logits are allowed. What p does not do costs
    nothing, and has no gradient to p; what only q never does costs infinitely much.

    Args:
        probs: The probabilities of 1; or else
        logits: their log-odds, log p / (1 - p).

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)
        >>> sides = (kljax.families.Bernoulli(logits=x) for x in (student, teacher))
        >>> print(kljax.forward_kl(*sides, axis=-1).round(4))
        [0.9834 0.9834]

    Source: Cover and Thomas, Elements of Information Theory, section 2.3.
    """

    probs: ArrayLike | None = None
    logits: ArrayLike | None = None

    parameters: ClassVar[dict[str, Parameter]] = {
        "probs": Parameter("a probability", 0.5),
        "logits": Parameter("real", 0),
    }
    one_of: ClassVar[tuple[str, ...]] = ("probs", "logits")

    def kl(self: Any, other: Any) -> Array:
        if self.probs is None and other.probs is None:
            return _of_logits(self.logits, other.logits)
        return _of_probs(*jnp.broadcast_arrays(probability(self), probability(other)))

    def entropy(self: Any) -> Array:
        if self.probs is None:
            return term_entropy(_log(self.logits)) + term_entropy(_log(-self.logits))
        return _entropy(self.probs)


def probability(of: Any) -> Array:
    return jax.nn.sigmoid(of.logits) if of.probs is None else of.probs


def _log(logits: Array) -> Array:
    return jax.nn.log_sigmoid(logits)


def _of_logits(a: Array, b: Array) -> Array:
    """Of both outcomes the generalised term, from ratios that are exact where a and b are close."""

    def of(p: Array, q: Array) -> Array:
        return term_generalized_kl(_log(p), _log(q), _log_ratio(p, q))

    return of(a, b) + of(-a, -b)


def _log_ratio(a: Array, b: Array) -> Array:
    """log σ(b) / σ(a) = -log(1 + σ(-a) (exp(a - b) - 1)); a constant, for the term knows more."""
    a, b = jax.lax.stop_gradient((a, b))
    step = jnp.where(a == b, 0, a) - jnp.where(a == b, 0, b)
    near = jnp.abs(step) < 0.5
    close = -jnp.log1p(jax.nn.sigmoid(-a) * jnp.expm1(jnp.where(near, step, 0)))
    return jnp.where(near, close, log_difference(_log(b), _log(a)))


@jax.custom_jvp
def _of_probs(p: Array, q: Array) -> Array:
    return generalized_kl(p, q, q - p) + generalized_kl(1 - p, 1 - q, p - q)


@_of_probs.defjvp
def _of_probs_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (p, q), (p_dot, q_dot) = primals, tangents
    never, always = p == 0, p == 1
    of_one = jnp.where(never, 0, log_ratio(jnp.where(never, 1, p), jnp.where(never, 1, q)))
    of_zero = log_ratio(
        jnp.where(always, 1, 1 - p), jnp.where(always, 1, 1 - q), jnp.where(always, 0, q - p)
    )
    to_q = jnp.where(never, 1, q - p) / jnp.where(never, 1, q)
    to_q = jnp.where(always, -1 / jnp.where(always, q, 1), to_q / jnp.where(always, 1, 1 - q))
    return _of_probs(p, q), (of_one - of_zero) * p_dot + to_q * q_dot


@jax.custom_jvp
def _entropy(p: Array) -> Array:
    def term(p: Array, log_p: Array) -> Array:
        return -jnp.where(p == 0, 0, p * log_p)

    never, always = p == 0, p == 1
    log_not = jnp.log1p(-jnp.where(always, 0, p))
    return term(p, jnp.log(jnp.where(never, 1, p))) + term(1 - p, log_not)


@_entropy.defjvp
def _entropy_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (p,), (p_dot,) = primals, tangents
    inside = (p != 0) & (p != 1)
    p = jnp.where(inside, p, 0.5)
    return _entropy(*primals), (jnp.log1p(-p) - jnp.log(p)) * p_dot
