"""A teacher in few numbers: its best classes, or a sample of them."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax._engine.representation import compute_dtype
from kljax._engine.top_k import log_sum_exp, marked
from kljax.distributions import Logits, TopK


def top_k(logits: ArrayLike | Logits, k: int, *, temperature: ArrayLike | None = None) -> TopK:
    r"""Take the k best classes of each distribution, and the mass of the rest.

    .. math:: \log p_i = z_i / T - \log \sum_j \exp(z_j / T), \quad i \in K; \qquad
              \log \Big(1 - \sum_{i \in K} p_i\Big) = \log \sum_{j \notin K} p_j

    The rest is summed over the classes outside K, for 1 minus the sum over K would be rounding
    noise where the teacher is confident.

    Shapes: logits ``batch + (V,)``; the result's arrays ``batch + (k,)``, its tail ``batch``.
    Units: nats.

    Zeros: a logit of -inf is a class of probability 0, and padding if it is among the k.
    Gradients: to the logits and the temperature, in every mode.

    Args:
        logits: The teacher's, or `Logits`; classes on the last axis.
        k: How many classes to keep, at most V.
        temperature: T; the loss must be given the same.

    Returns:
        A `TopK` with ``tail="bucket"``; `dataclasses.replace` gives it another tail.

    Raises:
        ValueError: If k is not in [1, V], or the temperature not positive. TypeError: for a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(kljax.forward_kl(student, kljax.top_k(teacher, 2)).round(4))
        [0.1768]

    Source: the tail as one class: TRL's and DistillKit's sparse distillation; the bound is the
    data-processing inequality (Cover and Thomas, Elements of Information Theory, section 2.8).
    """
    x = _read("top_k", logits)
    if not isinstance(k, int) or not 1 <= k <= x.shape[-1]:
        checks.fail(
            "top_k", "k", f"an int in [1, {x.shape[-1]}], the classes", f"{k}", "Take fewer."
        )
    scores, log_mass = _scores(x, "top_k", temperature)
    indices = lax.top_k(lax.stop_gradient(x), k)[1]
    best = jnp.take_along_axis(scores, indices, axis=-1)
    taken = marked(indices, x.shape[-1])
    log_tail = log_sum_exp(jnp.where(taken, -jnp.inf, scores)) - log_mass
    return TopK(indices, best - log_mass[..., None], log_tail, temperature)


def sample_targets(
    key: Array,
    logits: ArrayLike | Logits,
    n: int,
    *,
    proposal_power: float = 1.0,
    temperature: ArrayLike | None = None,
) -> TopK:
    r"""Sample sparse targets whose expected gradient is that of the whole teacher.

    .. math:: i_1, \dots, i_n \sim q \propto p^\tau, \qquad
              \hat t_i = \frac{1}{n} \sum_{m : i_m = i} \frac{p_i}{q_i}, \qquad
              \mathrm{E}[\hat t] = p

    For losses linear in the targets, cross-entropy and forward KL's gradient to the predictions,
    the expectation over keys is exact; the value of forward KL is not, for the entropy of a
    sample is not that of the teacher. Other divergences are not unbiased.

    Shapes: logits ``batch + (V,)``; the result's arrays ``batch + (n,)``. A class drawn twice
    takes one slot; the slots left over are padding. Units: nats.

    Zeros: a logit of -inf is never drawn.
    Gradients: to the logits through p only, not through the draws.

    Args:
        key: A JAX random key.
        logits: The teacher's, or `Logits`; classes on the last axis.
        n: Draws per distribution, with replacement.
        proposal_power: τ; below 1 the rarer classes are drawn more often.
        temperature: T of p; the loss must be given the same.

    Returns:
        A `TopK` with ``tail="truncate"``, whose probabilities need not sum to 1.

    Raises:
        ValueError: If n is not positive, or the temperature not. TypeError: for a dtype.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> targets = kljax.sample_targets(jax.random.key(0), teacher, 8)
        >>> print(jnp.exp(targets.log_probs).sum())
        1.0

    Source: Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs
    (2025), section 3.
    """
    x = _read("sample_targets", logits)
    if not isinstance(n, int) or n < 1:
        checks.fail("sample_targets", "n", "a positive int", f"{n}", "It counts the draws.")
    power = checks.require_number("sample_targets", "proposal_power", proposal_power)
    scores, log_mass = _scores(x, "sample_targets", temperature)
    tilted = scores * power.astype(scores.dtype)
    tilted = lax.stop_gradient(jnp.where(jnp.isneginf(scores), -jnp.inf, tilted))
    # One after another: a draw takes noise of the size of the logits.
    draws = lax.map(lambda key: jax.random.categorical(key, tilted), jax.random.split(key, n))
    indices = jnp.sort(jnp.moveaxis(draws, 0, -1), axis=-1)
    count = jnp.sum(indices[..., :, None] == indices[..., None, :], axis=-1)
    repeated = jnp.concatenate(
        [jnp.zeros_like(indices[..., :1], bool), indices[..., 1:] == indices[..., :-1]], axis=-1
    )
    at = lambda z: jnp.take_along_axis(z, indices, axis=-1)  # noqa: E731
    log_p = at(scores) - log_mass[..., None]
    log_q = at(tilted) - log_sum_exp(tilted)[..., None]
    log_weight = log_p - log_q + jnp.log(count.astype(scores.dtype) / n)
    return TopK(indices, jnp.where(repeated, -jnp.inf, log_weight), None, temperature, "truncate")


def _read(caller: str, logits: ArrayLike | Logits) -> Array:
    x = checks.to_array(caller, "logits", logits.logits if isinstance(logits, Logits) else logits)
    checks.require_float(caller, "logits", x)
    if x.ndim == 0:
        checks.fail(
            caller, "logits", "an array with a class axis", "a scalar", "Classes come last."
        )
    return x


def _scores(x: Array, caller: str, temperature: ArrayLike | None) -> tuple[Array, Array]:
    """The logits over T, their maximum at 0, and the log of the sum of their exponentials."""
    x = x.astype(compute_dtype(x))
    peak = jnp.max(lax.stop_gradient(x), axis=-1, keepdims=True)
    zero = jnp.isneginf(x)
    scores = jnp.where(zero, 0, x) - jnp.where(jnp.isneginf(peak), 0, peak)
    if temperature is not None:
        scores = scores / checks.require_temperature(caller, temperature).astype(x.dtype)
    scores = jnp.where(zero, -jnp.inf, scores)
    return scores, jnp.log(jnp.sum(jnp.exp(scores), axis=-1))
