"""What the systems share: their dtypes and shapes, and the core's term from probabilities."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from kljax._engine import meshes


def promoted(*sides: ArrayLike | DTypeLike) -> jnp.dtype:
    """The dtype of a product of the sides, also where JAX is told to be strict about dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*sides)


def computed(*sides: Array) -> list[Array]:
    """The sides broadcast, in float32, or float64 if any of them is."""
    wide = jnp.float64 if any(side.dtype == jnp.float64 for side in sides) else jnp.float32
    return meshes.broadcast([side.astype(wide) for side in sides])


def log(probs: Array) -> Array:
    """Log-probabilities that give a probability of zero no gradient."""
    zero = probs == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, probs)))


def kl_of_probs(probs: Array, log_q: Array) -> Array:
    """The core's `term_kl` from probabilities as they are: exp(log p) would cost digits.

    A zero is masked in value and gradient, unless log q is NaN or +inf, which no probability has.
    """
    zero = probs == 0
    p = jnp.where(zero, 1, probs)
    masked = jnp.where(log_q < jnp.inf, 0, jnp.nan)
    return jnp.where(zero, masked, p * (jnp.log(p) - log_q))
