"""Objectives: what a training step minimises, built from divergences."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from kljax import _pipeline
from kljax import reduction as reductions
from kljax._engine import checks, closures
from kljax._engine.checks import Layout
from kljax._engine.dispatch import Implementation
from kljax._engine.representation import compute_dtype
from kljax.distributions import Distribution
from kljax.divergences import Divergence, Given, cross_entropy, entropy, forward_kl
from kljax.reduction import AxisName, Reduction


class DistillationMetrics(NamedTuple):
    """Scalars to log, without gradient: weighted means over the batch (and ``axis_name``)."""

    soft: Array  # the divergence at the temperature, before T² and soft_weight
    hard: Array  # the cross-entropy with the labels; 0 without labels
    divergence: Array  # the divergence at T = 1: comparable across temperatures
    agreement: Array  # share of examples where student and teacher have the same argmax
    teacher_entropy: Array  # at T = 1
    weight_sum: Array  # the number of examples where there are no weights


def distillation_loss(
    predictions: Given,
    targets: Given,
    labels: ArrayLike | None = None,
    *,
    divergence: Divergence = forward_kl,
    temperature: ArrayLike | None = None,
    scale_by_temperature: bool = True,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    label_weights: ArrayLike | None = None,
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, DistillationMetrics]:
    r"""Knowledge distillation: soft targets from a teacher, and labels if there are any.

    .. math:: L = \lambda_\text{soft} T^2 D(\text{predictions}, \text{targets}; T)
              + \lambda_\text{hard} H(\text{labels}, \text{predictions}; 1)

    Shapes, units, options not named here: as `forward_kl`. Made for
    ``jax.value_and_grad(..., has_aux=True)``.

    Zeros: those of the divergence. A label of weight 0 is never read; any other label out of
    range gives NaN.
    Gradients: to predictions, temperature, the two weights and the example weights. The
    targets' gradient is stopped.

    Args:
        predictions: The student: `Logits` or a bare array, `LogProbs`, `Probs`.
        targets: The teacher, likewise; its gradient is stopped.
        labels: Integers of the batch shape, for the hard term.
        divergence: Any divergence of this library, or made by `divergence`.
        temperature: T of the soft term; None is no temperature, and T² = 1. May be traced.
        scale_by_temperature: Multiply the soft term by T², which keeps its gradient's size.
        soft_weight: Factor of the soft term; may be traced.
        hard_weight: Factor of the hard term; may be traced.
        label_weights: Weights of the hard term, with a denominator of their own: few labels,
            many examples. Default: ``weights`` and their denominator.
        axis: The axis, or axes, that one distribution occupies.
        where: bool, which classes exist.
        weights: One per example.
        reduction: Of both terms; the metrics are weighted means whatever it is.
        normalizer: With "mean", the denominator of every term that ``weights`` weight.
        axis_name: Named mapped axes to sum numerators and denominators over.
        implementation: As for `forward_kl`.

    Returns:
        (loss, metrics).

    Raises:
        ValueError: Without labels unless hard_weight is 0; and as `forward_kl`. TypeError: for a
            dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> loss, metrics = kljax.distillation_loss(
        ...     student, teacher, jnp.array([2]), temperature=2.0, soft_weight=0.9, hard_weight=0.1
        ... )
        >>> print(f"{loss:.4f} {metrics.agreement:.4f}")
        0.3283 1.0000

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015),
    section 2.
    """
    checks.require_callable(_NAME, "divergence", divergence)
    sides = ("predictions", "targets")
    held = tuple(map(partial(_pipeline.read, _NAME), sides, (predictions, targets)))
    layout = _pipeline.read_layout(_NAME, sides, held, axis)
    if labels is not None:
        labels = checks.to_array(_NAME, "labels", labels)
        checks.require_labels(_NAME, labels, layout)
    elif not checks.is_static_zero(hard_weight):
        checks.fail(_NAME, "labels", "given", "None", "Or set hard_weight=0.0.")
    where, temperature = _pipeline.read_options(_NAME, layout, where, temperature)
    weights, normalizer = reductions.prepare(
        _NAME, layout.batch, weights, reduction, normalizer, axis_name
    )
    dtype = compute_dtype(tuple(side.array for side in held))
    weights = jnp.ones(layout.batch, dtype) if weights is None else weights.astype(dtype)
    if label_weights is not None:
        label_weights = checks.to_array(_NAME, "label_weights", label_weights)
        checks.require_weights(_NAME, "label_weights", label_weights, layout.batch)
        label_weights = label_weights.astype(dtype)
    soft_factor = checks.require_number(_NAME, "soft_weight", soft_weight).astype(dtype)
    hard_factor = checks.require_number(_NAME, "hard_weight", hard_weight).astype(dtype)
    if scale_by_temperature and temperature is not None:
        soft_factor = soft_factor * temperature.astype(dtype) ** 2
    setup = _Setup(
        divergence,
        not checks.is_static_zero(soft_weight),
        not checks.is_static_zero(hard_weight),
        layout,
        reduction,
        axis_name,
        implementation,
    )
    student, teacher = (_pipeline.restore(side, layout) for side in held)
    batch = _Batch(student, teacher, labels, where, temperature, weights, label_weights, normalizer)
    distill = _distill_jitted if closures.is_pure(divergence) else _distill
    return distill(setup, batch, soft_factor, hard_factor)


_NAME = "distillation_loss"


class _Setup(NamedTuple):
    """All that chooses code."""

    divergence: Divergence
    has_soft: bool
    has_hard: bool
    layout: Layout
    reduction: Reduction
    axis_name: AxisName | None
    implementation: Implementation | None


class _Batch(NamedTuple):
    """All that is traced, but for the factors of the two terms."""

    predictions: Array | Distribution
    targets: Array | Distribution
    labels: Array | None
    where: Array | None
    temperature: Array | None
    weights: Array
    label_weights: Array | None
    normalizer: Array | None


def _distill(
    setup: _Setup, batch: _Batch, soft_factor: Array, hard_factor: Array
) -> tuple[Array, DistillationMetrics]:
    batch = batch._replace(targets=lax.stop_gradient(batch.targets))
    loss = jnp.zeros_like(batch.weights, shape=None if setup.reduction == "none" else ())
    if setup.has_soft:
        soft = _soft(setup, batch)
        loss += _weighted(setup, soft, soft_factor, batch.weights, batch.normalizer)
    if setup.has_hard and batch.labels is not None:
        weights, normalizer = batch.weights, batch.normalizer
        if batch.label_weights is not None:
            weights, normalizer = batch.label_weights, None
        loss += _weighted(
            setup, _hard(setup, batch, batch.labels), hard_factor, weights, normalizer
        )
    return loss, _metrics(setup, lax.stop_gradient(batch))


_distill_jitted = jax.jit(_distill, static_argnums=0)


def _weighted(
    setup: _Setup,
    loss: Callable[..., Array],
    factor: Array,
    weights: Array,
    normalizer: Array | None,
) -> Array:
    """The factor goes in with the weights, so that the loss's derivative rule holds it too."""
    if setup.reduction == "mean" and normalizer is None:
        normalizer = reductions.total(weights, "sum", setup.axis_name)
    return loss(
        weights=factor * weights,
        reduction=setup.reduction,
        normalizer=normalizer,
        axis_name=setup.axis_name,
    )


def _metrics(setup: _Setup, batch: _Batch) -> DistillationMetrics:
    layout, axis_name, weights = setup.layout, setup.axis_name, batch.weights
    mean = partial(_mean, axis_name=axis_name, weights=weights)
    hard = jnp.zeros((), weights.dtype)
    if batch.labels is not None:
        own = weights if batch.label_weights is None else batch.label_weights
        hard = mean(_hard(setup, batch, batch.labels), weights=own)
    classes = [_argmax(side, batch.where, layout) for side in (batch.predictions, batch.targets)]
    same = (classes[0] == classes[1]).astype(weights.dtype)
    return DistillationMetrics(
        soft=mean(_soft(setup, batch)),
        hard=hard,
        divergence=mean(_soft(setup, batch._replace(temperature=None))),
        agreement=mean(partial(reductions.reduce, same)),
        teacher_entropy=mean(partial(entropy, batch.targets, axis=layout.axis, where=batch.where)),
        weight_sum=reductions.total(weights, "sum", axis_name),
    )


def _mean(loss: Callable[..., Array], *, weights: Array, axis_name: AxisName | None) -> Array:
    return loss(weights=weights, reduction="mean", axis_name=axis_name)


def _soft(setup: _Setup, batch: _Batch) -> Callable[..., Array]:
    return partial(
        setup.divergence,
        batch.predictions,
        batch.targets,
        axis=setup.layout.axis,
        where=batch.where,
        temperature=batch.temperature,
        implementation=setup.implementation,
    )


def _hard(setup: _Setup, batch: _Batch, labels: Array) -> Callable[..., Array]:
    return partial(
        cross_entropy,
        batch.predictions,
        labels,
        axis=setup.layout.axis,
        where=batch.where,
        implementation=setup.implementation,
    )


def _argmax(side: Array | Distribution, where: Array | None, layout: Layout) -> Array:
    (scores,) = jax.tree.leaves(side)
    if where is not None:
        scores = jnp.where(layout.expand(where), scores, -jnp.inf)
    classes_last = jnp.moveaxis(scores, layout.axis, range(-len(layout.axis), 0))
    return jnp.argmax(classes_last.reshape(*layout.batch, -1), axis=-1)
