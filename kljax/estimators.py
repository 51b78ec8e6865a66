"""KL divergence from samples: what reinforcement learning and on-policy distillation have."""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks, value_checks
from kljax._engine.classes import Layout
from kljax._engine.side import compute_dtype
from kljax._engine.terms import excess, weigh
from kljax.reduction import AxisName, Reduction, Weighting

Estimator = Literal["k1", "k2", "k3"]


def sampled_kl(
    log_p: ArrayLike,
    log_q: ArrayLike,
    *,
    estimator: Estimator = "k3",
    sequence_axis: int | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""D(p‖q) from the log-probabilities of samples x ∼ p: a value, of which a gradient is a trap.

    .. math:: \delta = \log p(x) - \log q(x), \qquad
              k_1 = \delta, \quad k_2 = \tfrac{1}{2} \delta^2, \quad k_3 = e^{-\delta} - 1 + \delta

    It is differentiated as it stands. For samples x ∼ p, in expectation over them:

    ====================================  =========================  ============================
    \                                     value                      gradient to p's parameters
    ====================================  =========================  ============================
    ``sampled_kl(…, estimator="k1")``     D(p‖q)                     0
    ``sampled_kl(…, estimator="k2")``     of second order in δ only  ∇ D(p‖q)
    ``sampled_kl(…, estimator="k3")``     D(p‖q), never negative     ∇ D(q‖p), the other direction
    ``sampled_kl_loss(…)``                as its ``value`` says      ∇ D(p‖q)
    ====================================  =========================  ============================

    So log the value, and train with `sampled_kl_loss`.

    Shapes: both arrays alike, one log-probability per sample; that is the batch shape. With
    ``sequence_axis`` the batch shape is what is left without it. Units: nats.

    Zeros: δ = 0 gives exactly 0, and k3 is accurate close to it. An example of weight 0 has no
    effect, in value and gradients, whatever it holds. q(x) = 0 gives +inf.
    Gradients: to both sides, weights and normalizer, in every mode.

    Args:
        log_p: log p(x) of samples from p: the policy's.
        log_q: log q(x) of the same samples: the reference's.
        estimator: "k1" is unbiased and may be negative; "k2" is biased; "k3" is unbiased where q
            has no mass that p lacks, never negative, and of lower variance where p and q are close.
        sequence_axis: The axis of the tokens of one sample: their log-probabilities are summed
            first, so that the result is the sequence's divergence. None: each token is a sample.
        weights: bool, int or float, one per example. With ``sequence_axis`` one per sequence, or
            one per token, with which log-probabilities are summed: a mask of padding; a sequence
            without a token left does not count.
        reduction: "none", "mean" (by the sum of weights), "sum" or "batchmean".
        normalizer: With "mean", what to divide by instead; already global.
        axis_name: Named mapped axes to sum numerator and denominator over before dividing.

    Raises:
        ValueError: For a shape or option that does not fit.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> policy, reference = jnp.array([-1.0, -2.0, -0.5]), jnp.array([-1.5, -2.0, -jnp.inf])
        >>> mask = jnp.array([1, 1, 0])
        >>> print(f"{kljax.sampled_kl(policy, reference, weights=mask, reduction='mean'):.4f}")
        0.0533

    Source: Schulman, Approximating KL Divergence (2020); Tang and Munos, On a few pitfalls in KL
    divergence gradient estimation for RL (2025).
    """
    checks.require_choice("sampled_kl", "estimator", estimator, get_args(Estimator))
    samples = _read("sampled_kl", {"log_p": log_p, "log_q": log_q}, sequence_axis)
    weighting, tokens = _read_weights(
        "sampled_kl", samples, sequence_axis, weights, reduction, normalizer, axis_name
    )
    return _sampled(estimator, sequence_axis, samples, weighting, tokens)


def sampled_kl_loss(
    log_p: ArrayLike,
    log_q: ArrayLike,
    *,
    log_behavior: ArrayLike | None = None,
    max_ratio: ArrayLike | None = None,
    value: Estimator = "k3",
    sequence_axis: int | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Array:
    r"""D(p‖q) from samples, as a loss: its gradient is an unbiased estimate of ∇ D(p‖q).

    .. math:: \rho \, k(\delta), \qquad \nabla = \rho \, \delta \, \nabla \log p(x), \qquad
              \rho = p(x) / \mu(x)

    For samples from μ, p itself where ``log_behavior`` is None, and then ρ = 1. `sampled_kl`
    tells what differentiating the value would give instead.

    Per token the gradient is that of the divergence at the states visited, which are taken as
    given; with ``sequence_axis`` that of the divergence of whole sequences, of higher variance.

    Shapes, units, options not named here: as `sampled_kl`.

    Zeros: as `sampled_kl`. Where p(x) = 0, off-policy, the gradient is 0 and the value what ρ k
    tends to: 0, or q(x)/μ(x) for k3.
    Gradients: to log_p, in every mode and order; log_q and log_behavior are stopped. With
    ``max_ratio`` they are biased where it truncates.

    Args:
        log_p: log p(x): the policy's, to differentiate.
        log_q: log q(x): the reference's, which gets no gradient.
        log_behavior: log μ(x) of the policy that drew the samples, if it was not p.
        max_ratio: Truncate ρ at it, for less variance and some bias; may be traced.
        value: Which estimate of the value is returned; the gradient is the same.
        sequence_axis: As for `sampled_kl`.
        weights: As for `sampled_kl`.
        reduction: As for `sampled_kl`.
        normalizer: As for `sampled_kl`.
        axis_name: As for `sampled_kl`.

    Raises:
        ValueError: For a shape or option that does not fit, and for a ``max_ratio`` without
            ``log_behavior``.
        TypeError: For a dtype.

    Example:
        >>> import jax, jax.numpy as jnp, kljax
        >>> policy, reference = jnp.array([-1.0, -2.0]), jnp.array([-1.5, -2.0])
        >>> print(jax.grad(lambda p: kljax.sampled_kl_loss(p, reference).sum())(policy))
        [0.5 0. ]

    Source: Schulman, Approximating KL Divergence (2020); Tang and Munos, On a few pitfalls in KL
    divergence gradient estimation for RL (2025); Ionides, Truncated Importance Sampling (2008).
    """
    caller = "sampled_kl_loss"
    checks.require_choice(caller, "value", value, get_args(Estimator))
    given = {"log_p": log_p, "log_q": log_q}
    if log_behavior is not None:
        given["log_behavior"] = log_behavior
    if max_ratio is not None:
        checks.require_positive(caller, "max_ratio", max_ratio)
        checks.require_beside(caller, "max_ratio", "log_behavior", log_behavior)
        max_ratio = checks.require_number(caller, "max_ratio", max_ratio)
    samples = _read(caller, given, sequence_axis)
    weighting, tokens = _read_weights(
        caller, samples, sequence_axis, weights, reduction, normalizer, axis_name
    )
    return _loss(value, sequence_axis, samples, max_ratio, weighting, tokens)


def _read(caller: str, given: dict[str, Any], sequence_axis: int | None) -> tuple[Array, ...]:
    found = {argument: checks.to_array(caller, argument, x) for argument, x in given.items()}
    for argument, x in found.items():
        checks.require_float(caller, argument, x)
        checks.require_same_shape(caller, argument, x.shape, found["log_p"].shape, "log_p")
    if sequence_axis is not None:
        checks.require_axes(caller, found["log_p"].shape, sequence_axis, "sequence_axis")
    return tuple(found.values())


def _read_weights(
    caller: str,
    samples: tuple[Array, ...],
    sequence_axis: int | None,
    weights: ArrayLike | None,
    reduction: Reduction,
    normalizer: ArrayLike | None,
    axis_name: AxisName | None,
) -> tuple[Weighting, Array | None]:
    """Of examples, and of the tokens of each."""
    shape = samples[0].shape
    axis = () if sequence_axis is None else (sequence_axis % len(shape),)
    layout, tokens = Layout.of(shape, axis), None
    if weights is not None:
        weights = checks.to_array(caller, "weights", weights)
        if axis and weights.shape == shape:
            checks.require_weights(caller, "weights", weights, shape)
            tokens, weights = weights, jnp.any(weights != 0, axis)
    weighting = Weighting.read(
        caller,
        layout,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
    )
    value_checks.check_weights(caller, "weights", tokens)
    value_checks.check_weights(caller, "weights", weighting.weights)
    return weighting, tokens


@partial(jax.jit, static_argnums=(0, 1))
def _sampled(
    estimator: Estimator,
    sequence_axis: int | None,
    samples: tuple[Array, ...],
    weighting: Weighting,
    tokens: Array | None,
) -> Array:
    log_p, log_q = _examples(samples, sequence_axis, weighting, tokens)
    delta = log_p - log_q
    values = {"k1": delta, "k2": 0.5 * delta**2, "k3": excess(-delta)}
    return weighting.reduced(values[estimator])


@partial(jax.jit, static_argnums=(0, 1))
def _loss(
    estimator: Estimator,
    sequence_axis: int | None,
    samples: tuple[Array, ...],
    max_ratio: Array | None,
    weighting: Weighting,
    tokens: Array | None,
) -> Array:
    log_p, *others = _examples(samples, sequence_axis, weighting, tokens)
    log_q, *behavior = lax.stop_gradient(others)
    log_behavior = behavior[0] if behavior else lax.stop_gradient(log_p)
    most = jnp.inf if max_ratio is None else jnp.log(max_ratio.astype(log_p.dtype))
    values = _importance_weighted(
        estimator, log_p, log_q, log_behavior, jnp.full_like(log_p, lax.stop_gradient(most))
    )
    return weighting.reduced(values)


def _examples(
    samples: tuple[Array, ...],
    sequence_axis: int | None,
    weighting: Weighting,
    tokens: Array | None,
) -> list[Array]:
    """Log-probabilities of each example; 0 in place of what does not count."""
    dtype = compute_dtype(samples)
    found = [x.astype(dtype) for x in samples]
    if sequence_axis is not None:
        if tokens is not None:
            found = [weigh(tokens.astype(dtype), x) for x in found]
        found = [jnp.sum(x, sequence_axis) for x in found]
    if weighting.weights is not None:
        live = weighting.weights.astype(bool)
        found = [jnp.where(live, x, 0) for x in found]
    return found


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _importance_weighted(
    estimator: Estimator, log_p: Array, log_q: Array, log_behavior: Array, log_max_ratio: Array
) -> Array:
    ratio, delta = _ratio(log_p, log_behavior, log_max_ratio), log_p - log_q
    if estimator == "k1":
        return weigh(ratio, delta)
    if estimator == "k2":
        return weigh(ratio, 0.5 * delta**2)
    # ρ (exp(-δ) - 1 + δ): where that exponential could overflow, ρ exp(-δ) as one.
    close = jnp.abs(delta) < 1
    within = log_p - log_behavior <= log_max_ratio
    tilted = jnp.exp(jnp.where(within, log_q - log_behavior, log_max_ratio - delta))
    return jnp.where(
        close, ratio * excess(jnp.where(close, -delta, 0)), tilted + weigh(ratio, delta - 1)
    )


@_importance_weighted.defjvp
def _importance_weighted_jvp(
    estimator: Estimator, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    log_p, log_q, log_behavior, log_max_ratio = primals
    # Of ρ k3 it is the true derivative; and ρ is differentiated again, for second orders.
    slope = weigh(_ratio(log_p, log_behavior, log_max_ratio), log_p - log_q)
    return _importance_weighted(estimator, *primals), slope * tangents[0]


def _ratio(log_p: Array, log_behavior: Array, log_max_ratio: Array) -> Array:
    return jnp.exp(jnp.minimum(log_p - log_behavior, log_max_ratio))
