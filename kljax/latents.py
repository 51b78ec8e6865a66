"""KL terms of latent variables: variational autoencoders and world models."""

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax import _pipeline, _reading
from kljax._closed_forms import Family, require_batch
from kljax._engine import checks, value_checks
from kljax._engine.classes import Layout
from kljax._reading import Given
from kljax.divergences import KL
from kljax.reduction import AxisName, Reduction, Weighting

FreeBitsPer = Literal["example", "dim", "batch"]


def elbo_kl(
    posterior: Given,
    prior: Given | None = None,
    *,
    axis: int | Iterable[int] = -1,
    class_axis: int = -1,
    beta: ArrayLike = 1.0,
    free_bits: ArrayLike = 0.0,
    free_bits_per: FreeBitsPer = "example",
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""The KL term of an evidence lower bound: summed over latents, averaged over examples.

    .. math:: \beta \, \frac{1}{N} \sum_n \max\Bigl(\lambda, \sum_j D(q_{nj} \| p_{nj})\Bigr)

    Shapes: with families, the posterior's batch shape is examples and latents, and ``axis`` names
    the latents; the axes of an event, as of `families.MultivariateNormal`, are no part of it. A
    distribution over classes has one more axis, ``class_axis``, and ``axis`` must name others: for
    ``batch + (latents, classes)`` that is -2, and for a single latent it is ().

    Units: nats, free_bits too.

    Zeros: those of the divergence. An example of weight 0 has no effect, whatever it holds.
    Gradients: to both sides, beta, free_bits and weights; none to what is below free_bits.

    Args:
        posterior: q(z|x): a family, or a distribution over classes.
        prior: p(z), likewise; None is the standard normal distribution.
        axis: The latents' axes.
        class_axis: The classes' axis, unless the sides are families.
        beta: Factor of the whole; a schedule is called with the step, ``beta=schedule(step)``.
        free_bits: λ, below which a divergence costs λ and has no gradient.
        free_bits_per: What is compared with λ, all else being pooled: "example", the sum over an
            example's latents; "dim", each latent's mean over the examples, and then the sum over
            latents is taken; "batch", the mean over examples of the sum. The last two need
            ``reduction="mean"``.
        weights: One per example.
        reduction: "none", "mean", "sum" or "batchmean", over examples.
        normalizer: With "mean", what to divide by instead; already global.
        axis_name: Named mapped axes to sum numerator and denominator over before dividing.

    Raises:
        ValueError: For a shape or option that does not fit.
        TypeError: For a posterior that is not normal without a prior.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> mean, log_variance = jnp.ones((8, 3)), jnp.zeros((8, 3))
        >>> posterior = kljax.families.Normal(mean, log_variance=log_variance)
        >>> print(kljax.elbo_kl(posterior), kljax.elbo_kl(posterior, free_bits=2.0))
        1.5 2.0

    Source: Kingma and Welling, Auto-Encoding Variational Bayes (2014), section 2; β: Higgins et
    al., beta-VAE (2017); free bits: Kingma et al., Improved Variational Inference with Inverse
    Autoregressive Flow (2016), appendix C.8, where they are per dim.
    """
    checks.require_choice(_NAME, "free_bits_per", free_bits_per, get_args(FreeBitsPer))
    per_example = free_bits_per == "example"
    checks.require_mean(_NAME, "free_bits_per", free_bits_per, reduction, per_example)
    beta = checks.require_number(_NAME, "beta", beta)
    floor = checks.require_number(_NAME, "free_bits", free_bits)
    prior = _standard(posterior) if prior is None else prior
    layout = _layout(posterior, prior, axis, class_axis)
    weighting = Weighting.read(
        _NAME,
        layout,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
    )
    value_checks.check_weights(_NAME, "weights", weighting.weights)
    each = _each_latent(posterior, prior, layout, class_axis, weighting.weights)

    def above(x: Array) -> Array:
        if checks.is_static(free_bits, 0):
            return x
        least = floor.astype(x.dtype)
        return jnp.where(x <= least, least, x)

    if per_example:
        values = weighting.reduced(above(jnp.sum(each, layout.axis)))
    else:
        by_latent = jnp.moveaxis(each, layout.axis, range(len(layout.axis)))
        by_latent = by_latent.reshape(math.prod(layout.classes), *layout.batch)
        means = jax.vmap(weighting.reduced)(by_latent)
        values = jnp.sum(above(means)) if free_bits_per == "dim" else above(jnp.sum(means))
        some = weighting.reduced(jnp.ones(layout.batch, each.dtype)) != 0
        values = jnp.where(some, values, 0)  # of no examples there is no floor either
    return beta.astype(values.dtype) * values


_NAME = "elbo_kl"
_FORMULA = KL._replace(name=_NAME, arguments=("posterior", "prior"))


def balanced_kl(
    posterior: Given,
    prior: Given,
    *,
    prior_weight: ArrayLike = 1.0,
    posterior_weight: ArrayLike = 0.1,
    free_bits: ArrayLike = 1.0,
    axis: int | Iterable[int] = -1,
    class_axis: int = -1,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""A world model's KL term: the prior learns from the posterior faster than the reverse.

    .. math:: w_p \max(\lambda, D(\bar q \| p)) + w_q \max(\lambda, D(q \| \bar p))

    where the barred side is stopped. Mix a share of the uniform distribution into both sides with
    `mixture`, so that neither is ever certain.

    Shapes, units, errors: as `elbo_kl`, with free bits per example.
    Zeros: as `elbo_kl`.
    Gradients: to the prior from the first term, to the posterior from the second.

    Args:
        posterior: What the model infers from the observation.
        prior: What it predicts without it.
        prior_weight: Of the term that trains the prior, "dynamics".
        posterior_weight: Of the term that trains the posterior, "representation".
        free_bits: λ of both terms, in nats.
        axis: As for `elbo_kl`.
        class_axis: As for `elbo_kl`.
        weights: As for `elbo_kl`.
        reduction: As for `elbo_kl`.
        normalizer: As for `elbo_kl`.
        axis_name: As for `elbo_kl`.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> posterior = 3 * jnp.eye(4)[None]  # one example, four latents of four classes
        >>> loss = kljax.balanced_kl(posterior, jnp.zeros((1, 4, 4)), axis=-2)
        >>> print(f"{loss:.4f}")
        3.7718

    Source: Hafner et al., Mastering Diverse Domains through World Models (DreamerV3, 2023),
    equation 5.
    """

    def term(posterior: Given, prior: Given, weight: ArrayLike) -> Array:
        return elbo_kl(
            posterior,
            prior,
            axis=axis,
            class_axis=class_axis,
            beta=weight,
            free_bits=free_bits,
            weights=weights,
            reduction=reduction,
            normalizer=normalizer,
            axis_name=axis_name,
        )

    to_prior = term(lax.stop_gradient(posterior), prior, prior_weight)
    return to_prior + term(posterior, lax.stop_gradient(prior), posterior_weight)


def _standard(posterior: Given) -> Family:
    from kljax import families  # not before it is asked for

    if isinstance(posterior, families.MultivariateNormal):
        size = jnp.shape(posterior.loc)[-1]
        return families.MultivariateNormal(jnp.zeros(size), jnp.eye(size))
    checks.require_prior(_NAME, posterior, isinstance(posterior, families.Normal))
    return families.Normal(0.0, 1.0)


def _layout(posterior: Given, prior: Given, axis: int | Iterable[int], class_axis: int) -> Layout:
    """Where examples and latents lie in the divergences; the latter in place of classes."""
    if isinstance(posterior, Family) and isinstance(prior, Family):
        read = posterior.read(_NAME, "posterior"), prior.read(_NAME, "prior")
        batch = require_batch(_NAME, dict(zip(("posterior", "prior"), read, strict=True)))
        return Layout.of(batch, checks.require_axes(_NAME, batch, axis))
    sides = {"posterior": posterior, "prior": prior}
    of_classes = _reading.read(_NAME, sides, axis=class_axis).layout
    latents = checks.require_axes(_NAME, of_classes.shape, axis)
    checks.require_apart(_NAME, "axis", latents, of_classes.axis)
    places = tuple(of_classes.batch_axes.index(i) for i in latents)
    return Layout.of(of_classes.batch, places)


def _each_latent(
    posterior: Given, prior: Given, layout: Layout, class_axis: int, weights: Array | None
) -> Array:
    """The divergence of each latent; 0 in examples that do not count, whatever they hold."""
    options: dict[str, Any] = {} if isinstance(posterior, Family) else {"axis": class_axis}
    if weights is not None:
        live = jnp.expand_dims(weights.astype(bool), layout.axis)
        options["weights"] = jnp.broadcast_to(live, layout.shape)
    return _pipeline.evaluate(_FORMULA, (posterior, prior), {}, **options)
