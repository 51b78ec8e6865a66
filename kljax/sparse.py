"""A teacher in few numbers: its best classes, or a sample of them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from kljax import _reading
from kljax._engine import blockwise, checks, meshes, paths
from kljax._engine.blockwise import Rows
from kljax._engine.classes import Classes
from kljax._engine.paths import Path
from kljax._engine.picks import Few, marked, picked
from kljax._engine.side import block_of, compute_dtype, held, in_axes, with_infinity
from kljax._reading import ClassAxisName, Inputs
from kljax.distributions import Distribution, Head, Logits, TopK
from kljax.distributions.top_k import log_sum_exp


def top_k(
    logits: ArrayLike | Logits | Head,
    k: int,
    *,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    class_axis_name: ClassAxisName | None = None,
) -> TopK:
    r"""Take the k best classes of each distribution, and the mass of the rest.

    .. math:: \log p_i = z_i / T - \log \sum_j \exp(z_j / T), \quad i \in K; \qquad
              \log \Bigl(1 - \sum_{i \in K} p_i\Bigr) = \log \sum_{j \notin K} p_j

    The rest is summed over the classes outside K, for 1 minus the sum over K would be rounding
    noise where the teacher is confident.

    Shapes: logits ``batch + (V,)``; the result's arrays ``batch + (k,)``, its tail ``batch``.
    Units: nats.

    Zeros: a logit of -inf is a class of probability 0, and padding if it is among the k.
    Gradients: to the logits and the temperature, in every mode; of a `Head` none at all, to the
    temperature neither.

    Args:
        logits: The teacher's, or `Logits`; classes on the last axis. Or its `Head`, whose logits
            are made for a block of examples at a time.
        k: How many classes to keep, at most V.
        where: bool, which classes exist, as in `forward_kl`; the others are padding.
        temperature: T; the loss must be given the same.
        class_axis_name: Named mapped axes over which the classes are spread, as in `forward_kl`;
            the indices number the whole vocabulary, the k best of all shards.

    Returns:
        A `TopK` with ``tail="bucket"``; ``dataclasses.replace`` gives it another tail.

    Raises:
        ValueError: If k is not in [1, V], the temperature not positive, or the logits another kind
            of distribution.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(kljax.forward_kl(student, kljax.top_k(teacher, 2)).round(4))
        [0.1768]

    Source: the tail as one class: TRL's and DistillKit's sparse distillation; the bound is the
    data-processing inequality (Cover and Thomas, Elements of Information Theory, section 2.8).
    """
    teacher = _read("top_k", logits, where, temperature, class_axis_name)
    k = checks.require_count("top_k", "k", k, teacher.layout.all_classes)
    indices, log_probs, log_tail = _few(partial(_best, k), _path(teacher), teacher, ())
    return TopK(indices, log_probs, log_tail, temperature)


def sample_targets(
    key: Array,
    logits: ArrayLike | Logits | Head,
    n: int,
    *,
    proposal_power: float = 1.0,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    class_axis_name: ClassAxisName | None = None,
) -> TopK:
    r"""Sample sparse targets whose expected gradient is that of the whole teacher.

    .. math:: i_1, \ldots, i_n \sim q \propto p^\tau, \qquad
              \hat t_i = \frac{1}{n} \sum_{m : i_m = i} \frac{p_i}{q_i}, \qquad
              \mathrm{E}[\hat t] = p

    For losses linear in the targets, cross-entropy and forward KL's gradient to the predictions,
    the expectation over keys is exact; the value of forward KL is not, for the entropy of a
    sample is not that of the teacher. Other divergences are not unbiased.

    Shapes: logits ``batch + (V,)``; the result's arrays ``batch + (n,)``. A class drawn twice
    takes one slot; the slots left over are padding. Units: nats.

    Zeros: a logit of -inf is never drawn, nor a class that ``where`` masks.
    Gradients: to the logits through p only, not through the draws; of a `Head` none at all.

    Args:
        key: A JAX random key.
        logits: The teacher's, `Logits` or `Head`, as in `top_k`.
        n: Draws per distribution, with replacement.
        proposal_power: τ; below 1 the rarer classes are drawn more often.
        where: bool, which classes exist, as in `top_k`.
        temperature: T of p; the loss must be given the same.
        class_axis_name: As in `top_k`; each shard draws with noise of its own, so the draws are
            others than on one device.

    Returns:
        A `TopK` with ``tail="truncate"``, whose probabilities need not sum to 1.

    Raises:
        ValueError: If n or the temperature is not positive, or the logits are another kind of
            distribution.
        TypeError: For a dtype.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> targets = kljax.sample_targets(jax.random.key(0), teacher, 8)
        >>> print(jnp.exp(targets.log_probs).sum())
        1.0

    Source: Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs
    (2025), section 3.
    """
    teacher = _read("sample_targets", logits, where, temperature, class_axis_name)
    n = checks.require_count("sample_targets", "n", n)
    power = checks.require_number("sample_targets", "proposal_power", proposal_power)
    keys = jax.random.split(key, teacher.layout.batch)
    indices, log_weights = _few(partial(_drawn, n), _path(teacher), teacher, (keys, power))
    return TopK(indices, log_weights, None, temperature, "truncate")


def _read(
    caller: str,
    logits: ArrayLike | Logits | Head,
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    class_axis_name: ClassAxisName | None,
) -> Inputs:
    fits = isinstance(logits, Logits | Head) or not isinstance(logits, Distribution)
    checks.require_logits(caller, "logits", logits, fits=fits)
    if not isinstance(logits, Head):
        checks.require_class_axis(caller, "logits", np.shape(*jax.tree.leaves(logits)[:1]))
    teacher = _reading.read(
        caller,
        {"logits": logits},
        where=where,
        temperature=temperature,
        class_axis_name=class_axis_name,
    )
    (side,), layout = teacher.sides, teacher.layout
    sharding = None if side.array is None else meshes.of_first([side.array])
    if sharding is not None:
        checks.require_whole_classes(caller, "logits", meshes.spreads(sharding, layout.axis))
    return teacher


def _path(teacher: Inputs) -> Path:
    return paths.choose(teacher.caller, None, teacher.layout, teacher.sides)


@partial(jax.jit, static_argnums=(0, 1))
def _few(
    choose: Callable[..., tuple[Array, ...]],
    path: Path,
    teacher: Inputs,
    more: tuple[Array, ...],
) -> tuple[Array, ...]:
    """What is chosen of each example, by its logits and log-probabilities."""
    layout = teacher.layout

    def of_block(given: tuple[Any, ...]) -> Rows:
        ((side,), classes, temperature), more = given
        x = held(side.array)
        if classes.where is not None:
            x = jnp.where(classes.where, with_infinity(x), -jnp.inf)
        seen = side.view(classes, temperature, block_of((side,)))
        inverse = None if temperature is None else 1 / temperature
        found = choose(_Teacher(x, inverse, seen.log_probs, classes), *more)
        return jnp.zeros(x.shape[:-1]), found  # of values there are none

    placed = teacher.on(path).place((None,))
    if teacher.sides[0].array is not None:
        return of_block((placed, more))[1]
    # Keys are one per example, a power is not.
    per_example = tuple(layout.per_example if x.ndim else None for x in more)
    axes = in_axes(layout, *placed) + per_example
    return blockwise.values(of_block, path, lax.stop_gradient((placed, more)), axes)[1]


class _Teacher(NamedTuple):
    """A block of it."""

    logits: Array
    inverse_temperature: Array | None
    log_probs: Array
    classes: Classes


def _best(count: int, teacher: _Teacher) -> tuple[Array, Array, Array]:
    """The best classes, and the mass of the rest."""
    logits, held_here = teacher.logits, teacher.logits.shape[-1]
    names, where = teacher.classes.names, teacher.classes.where
    # By the logits: log-probabilities are rounded once more, and then may tie.
    values, indices = lax.top_k(lax.stop_gradient(logits), min(count, held_here))
    if names:
        indices = _best_of_shards(count, values, indices, held_here, names)
    if meshes.explicit(logits):
        best = jnp.take_along_axis(teacher.log_probs, indices, axis=-1)
        outside = jnp.where(marked(indices, held_here), -jnp.inf, teacher.log_probs)
        return indices, best, log_sum_exp(outside)
    few = Few.among(indices, jnp.ones(indices.shape, bool), held_here, names)
    best, rest = picked(logits, teacher.inverse_temperature, few)
    if where is not None:  # of no classes all are padding
        some = teacher.classes.any(where)
        best, rest = jnp.where(some[..., None], best, -jnp.inf), jnp.where(some, rest, -jnp.inf)
    return indices, best, rest


def _best_of_shards(
    count: int, values: Array, indices: Array, classes: int, names: tuple[str, ...]
) -> Array:
    """The numbers of the best among the best of each shard."""
    numbers = indices + lax.axis_index(names).astype(indices.dtype) * classes
    own = (jnp.arange(lax.axis_size(names), dtype=jnp.int32) == lax.axis_index(names))[:, None]

    def gathered(x: Array) -> Array:  # as a sum, it is known to be the same on all shards
        x = lax.psum(jnp.where(own, x[..., None, :], 0), names)
        return x.reshape(*x.shape[:-2], -1)

    best = lax.top_k(gathered(values.astype(compute_dtype(values))), count)[1]
    return jnp.take_along_axis(gathered(numbers), best, axis=-1)


def _drawn(count: int, teacher: _Teacher, keys: Array, power: Array) -> tuple[Array, Array]:
    """Classes drawn from p to a power, and the weights that make up for it."""
    log_probs = teacher.log_probs
    tilted = log_probs * power.astype(log_probs.dtype)
    tilted = lax.stop_gradient(jnp.where(jnp.isneginf(log_probs), -jnp.inf, tilted))

    sharding = meshes.of_first([tilted])
    if sharding is not None:  # what is mapped must be spread alike
        keys = meshes.spread(keys, meshes.dropping(sharding, [tilted.ndim - 1]))

    classes, held_here = teacher.classes, tilted.shape[-1]
    shard = lax.axis_index(classes.names) if classes.names else 0

    def draw(key: Array, scores: Array, m: Array) -> tuple[Array, Array]:
        noise = jax.random.gumbel(jax.random.fold_in(key, m), scores.shape, scores.dtype)
        best = jnp.argmax(scores + noise)
        return (scores + noise)[best], best

    for _axis in range(log_probs.ndim - 1):
        draw = jax.vmap(draw, (0, 0, None))
    # One after another: a draw takes noise of the size of the logits.
    scores, draws = lax.map(
        lambda m: draw(keys, tilted, m), jnp.arange(count, dtype=jnp.int32) + shard * count
    )
    draws = classes.best_of_all(scores, draws.astype(jnp.int32) + shard * held_here)
    indices = jnp.sort(jnp.moveaxis(draws, 0, -1), axis=-1)
    same = indices[..., :, None] == indices[..., None, :]
    repeated = jnp.any(jnp.tril(same, -1), axis=-1)
    log_p, log_q = classes.at(log_probs, indices), classes.at(tilted, indices)
    log_q -= log_sum_exp(tilted, classes.names)[..., None]
    share = jnp.sum(same, axis=-1).astype(log_q.dtype) / count
    padding = repeated | jnp.isneginf(log_p)  # the latter where no class is left to draw
    return indices, jnp.where(padding, -jnp.inf, log_p - log_q + jnp.log(share))
