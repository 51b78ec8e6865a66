"""Objectives: what a training step minimises, built from divergences."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, export, lax
from jax.typing import ArrayLike

from kljax import _pipeline, _reading
from kljax import reduction as reductions
from kljax._engine import checks, closures, rowwise
from kljax._engine.blocks import Axes
from kljax._engine.checks import Layout
from kljax._engine.dispatch import Choice, Implementation
from kljax._engine.representation import Operands, Spec, compute_dtype, with_infinity
from kljax._engine.rowwise import Run
from kljax._engine.terms import nan_unless
from kljax._engine.top_k import TopKInput, allowed
from kljax._reading import Held, Sides
from kljax.distributions import Distribution, LogProbs, Probs
from kljax.divergences import (
    ENTROPY,
    LABELS,
    Given,
    Request,
    forward_kl,
    request_of,
    smoothing,
)
from kljax.reduction import AxisName, Reduction


@partial(export.register_namedtuple_serialization, serialized_name="kljax.DistillationMetrics")
class DistillationMetrics(NamedTuple):
    """Scalars to log, without gradient: weighted means over the batch (and ``axis_name``)."""

    soft: Array  # the divergence at the temperature, before T² and soft_weight
    hard: Array  # the cross-entropy with the labels; 0 without labels
    divergence: Array  # at T = 1: comparable across temperatures; NaN with a top-k of another T
    agreement: Array  # share of examples where student and teacher have the same argmax
    teacher_entropy: Array  # at T = 1; NaN likewise
    weight_sum: Array  # the number of examples where there are no weights


def distillation_loss(
    predictions: Given,
    targets: Given,
    labels: ArrayLike | Probs | LogProbs | None = None,
    *,
    divergence: Callable[..., Array] = forward_kl,
    temperature: ArrayLike | None = None,
    scale_by_temperature: bool = True,
    soft_weight: ArrayLike = 1.0,
    hard_weight: ArrayLike = 0.0,
    label_weights: ArrayLike | None = None,
    label_normalizer: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
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
        predictions: The student: `Logits` or a bare array, `LogProbs`, `Probs`, or `Head`.
        targets: The teacher, likewise, or `TopK`; its gradient is stopped.
        labels: For the hard term: integers of the batch shape, or `Probs` or `LogProbs` of the
            whole shape (mixup), which get a gradient.
        divergence: One of this library, made by `divergence`, or a partial of one that binds its
            own parameters.
        temperature: T of the soft term, a scalar or one per example, each with its own T²; None is
            no temperature, and T² = 1. May be traced.
        scale_by_temperature: Multiply the soft term by T², which keeps its gradient's size.
        soft_weight: Factor of the soft term; may be traced.
        hard_weight: Factor of the hard term; may be traced.
        label_weights: Weights of the hard term, with a denominator of their own: few labels,
            many examples. Default: ``weights`` and their denominator.
        label_normalizer: With "mean", the denominator of the hard term, as ``normalizer`` is that
            of the soft one: for micro-batches with label weights.
        label_smoothing: ε of integer labels, as in `cross_entropy`; also in ``metrics.hard``.
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
    request = checks.require_divergence(_NAME, "divergence", divergence, request_of(divergence))
    sides = ("predictions", "targets")
    held = tuple(map(partial(_reading.read, _NAME), sides, (predictions, targets)))
    checks.require_no_top_k(_NAME, "predictions", held[0].kind)
    layout = _reading.read_layout(_NAME, sides, held, axis)
    held_labels = None if labels is None else _read_labels(labels, layout)
    if isinstance(labels, Distribution):
        checks.require_no_smoothing(_NAME, label_smoothing)
    if labels is None and not checks.is_static(hard_weight, 0):
        checks.fail(_NAME, "labels", "given", "None", "Or set hard_weight=0.0.")
    where, temperature = _reading.read_options(_NAME, layout, where, temperature, held)
    weights, normalizer = reductions.prepare(
        _NAME, layout, weights, reduction, normalizer, axis_name
    )
    _, label_normalizer = reductions.prepare(
        _NAME, layout, None, reduction, label_normalizer, axis_name
    )
    dtype = compute_dtype(tuple(side.value for side in held))
    weights = jnp.ones(layout.batch, dtype) if weights is None else weights.astype(dtype)
    if label_weights is not None:
        label_weights = checks.to_array(_NAME, "label_weights", label_weights)
        checks.require_weights(_NAME, "label_weights", label_weights, layout.batch)
        label_weights = label_weights.astype(dtype)
    soft_factor = checks.require_number(_NAME, "soft_weight", soft_weight).astype(dtype)
    hard_factor = checks.require_number(_NAME, "hard_weight", hard_weight).astype(dtype)
    if scale_by_temperature and temperature is not None:
        soft_factor = soft_factor * temperature.astype(dtype) ** 2
    specs = _specs(request, held, temperature, layout)
    terms = [spec.term for spec in specs]
    setup = _Setup(
        *specs,
        _reading.sides_of(_NAME, *_all_sides(held, held_labels), layout),
        not checks.is_static(soft_weight, 0),
        not checks.is_static(hard_weight, 0) and labels is not None,
        reduction,
        axis_name,
        _pipeline.choose_blocks(_NAME, layout, held, implementation, terms),
    )
    batch = _Batch(
        tuple(side.value for side in _all_sides(held, held_labels)[1]),
        where,
        temperature,
        jax.tree.map(jnp.asarray, request.params),
        smoothing(_NAME, label_smoothing),
        weights,
        label_weights,
        normalizer,
        label_normalizer,
    )
    pure = all(map(closures.is_pure, terms))
    return (_distill_jitted if pure else _distill)(setup, batch, soft_factor, hard_factor)


_NAME = "distillation_loss"


class _Setup(NamedTuple):
    """All that chooses code."""

    soft: Spec  # at the temperature
    plain: Spec  # at T = 1
    sides: Sides  # student, teacher, and labels if there are any
    has_soft: bool
    has_hard: bool
    reduction: Reduction
    axis_name: AxisName | None
    choice: Choice


class _Batch(NamedTuple):
    """All that is traced, but for the factors of the two terms."""

    inputs: tuple[Any, ...]  # of each side
    where: Array | None
    temperature: Array | None
    params: Any
    smoothing: dict[str, Array]
    weights: Array
    label_weights: Array | None
    normalizer: Array | None
    label_normalizer: Array | None


class _Examples(NamedTuple):
    """What the loss of each example is made of."""

    soft: Operands  # its scale is never None
    plain: Operands | None
    labels: Array | None
    hard_scale: Array | None
    smoothing: dict[str, Array]


def _read_labels(labels: Any, layout: Layout) -> Held:
    if not isinstance(labels, Distribution):
        labels = checks.to_array(_NAME, "labels", labels)
        checks.require_labels(_NAME, labels, layout)
        return Held("labels", labels)
    held = _reading.read(_NAME, "labels", labels)
    checks.require_said_labels(_NAME, "labels", held.kind)
    checks.require_same_batch(_NAME, "labels", held.value.shape, layout.shape)
    return held


def _all_sides(
    held: tuple[Held, ...], labels: Held | None
) -> tuple[tuple[str, ...], tuple[Held, ...]]:
    if labels is None:
        return ("predictions", "targets"), held
    return ("predictions", "targets", "labels"), (*held, labels)


def _specs(
    request: Request, held: tuple[Held, ...], temperature: Array | None, layout: Layout
) -> tuple[Spec, Spec]:
    ask = partial(_pipeline.choose_spec, request.formula, held, layout=layout)
    return ask(temperature=temperature), ask(temperature=None)


def _distill(
    setup: _Setup, batch: _Batch, soft_factor: Array, hard_factor: Array
) -> tuple[Array, DistillationMetrics]:
    sides = _assemble(setup, batch)
    student, teacher, *labels = sides.inputs
    soft_scale = _scale(setup, soft_factor * batch.weights, batch.weights, batch.normalizer)
    own = batch.weights if batch.label_weights is None else batch.label_weights
    normalizer = batch.normalizer if batch.label_weights is None else None
    normalizer = normalizer if batch.label_normalizer is None else batch.label_normalizer
    hard_scale = _scale(setup, hard_factor * own, own, normalizer) if setup.has_hard else None

    inputs = (student, lax.stop_gradient(teacher))
    soft = sides._replace(inputs=inputs, scale=soft_scale)
    spec, plain_spec, plain = setup.soft, setup.plain, None
    if not closures.is_pure(spec.term):
        cut = setup.sides.layout.batch_axes, setup.choice
        plain_spec, plain = closures.hoist(plain_spec, soft._replace(temperature=None), *cut)
        spec, soft = closures.hoist(spec, soft, *cut)
    examples = _Examples(soft, plain, labels[0] if labels else None, hard_scale, batch.smoothing)
    run = Run(
        partial(_each_example, setup, spec, plain_spec),
        setup.sides.layout.batch,
        jax.tree.structure(examples),
        _axes(setup, examples),
        *setup.choice,
    )
    compute = rowwise.values if setup.reduction == "none" else rowwise.total
    value, seen = compute(run, examples)
    loss, seen = reductions.total(value, setup.reduction, setup.axis_name), _Seen(*seen)
    return loss, lax.stop_gradient(_metrics(setup, batch, seen, own))


_distill_jitted = jax.jit(_distill, static_argnums=0)


class _Seen(NamedTuple):
    """One number of each example."""

    soft: Array
    plain: Array
    hard: Array
    same: Array
    entropy: Array


def _each_example(
    setup: _Setup, spec: Spec, plain_spec: Spec, examples: _Examples
) -> tuple[Array, _Seen]:
    """The loss of each example of a block, and what to log: both from the same logits."""
    soft = examples.soft
    unscaled = lax.stop_gradient(soft._replace(scale=None))
    loss = seen_soft = seen_plain = seen_hard = jnp.zeros_like(jnp.asarray(soft.scale))
    if setup.has_soft:
        loss = loss + _pipeline.example_values(spec, soft)
    seen_soft = seen_plain = _pipeline.example_values(spec, unscaled)
    if soft.temperature is not None:
        seen_plain = _at_one(plain_spec, examples.plain or unscaled, soft.temperature)
    if examples.labels is not None:
        student = Operands(
            (soft.inputs[0], examples.labels),
            soft.where,
            None,
            examples.smoothing,
            examples.hard_scale,
        )
        kinds = (setup.sides.kinds[0], setup.sides.kinds[2])
        linear = None if kinds[1] == "labels" else 1
        hard_spec = Spec(LABELS.term, kinds, setup.sides.layout.axis, linear=linear)
        if setup.has_hard:
            loss = loss + _pipeline.example_values(hard_spec, student)
        seen_hard = _pipeline.example_values(
            hard_spec, lax.stop_gradient(student._replace(scale=None))
        )
    best = [_argmax(x, soft.where, setup.sides.layout) for x in unscaled.inputs]
    same = jnp.broadcast_to(best[0] == best[1], loss.shape).astype(loss.dtype)
    teacher = unscaled._replace(inputs=unscaled.inputs[1:], params=())
    entropy_spec = Spec(ENTROPY.term, setup.sides.kinds[1:2], setup.sides.layout.axis)
    entropy = jnp.broadcast_to(_at_one(entropy_spec, teacher, soft.temperature), loss.shape)
    return loss, _Seen(seen_soft, seen_plain, seen_hard, same, entropy)


def _at_one(spec: Spec, operands: Operands, temperature: Array | None) -> Array:
    """A metric at T = 1; NaN with a top-k of another temperature: it has only its own."""
    values = _pipeline.example_values(
        spec, lax.stop_gradient(operands._replace(temperature=None, scale=None))
    )
    if "top_k" not in spec.kinds or temperature is None:
        return values
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, spec.axis)
    return nan_unless(jnp.broadcast_to(temperature == 1, values.shape), values)


def _assemble(setup: _Setup, batch: _Batch) -> Operands:
    """All sides on the axes of the whole input; a side counts where any term reads it."""
    counted = [batch.weights, batch.weights]
    if len(setup.sides.kinds) > 2:
        own = batch.weights if batch.label_weights is None else batch.label_weights
        counted = [(batch.weights != 0) | (own != 0), batch.weights, own]
    return _reading.assemble(
        setup.sides,
        batch.inputs,
        tuple(counted),
        batch.where,
        batch.temperature,
        batch.params,
        {"weights": batch.weights, "label_weights": batch.label_weights},
    )


def _axes(setup: _Setup, examples: _Examples) -> tuple[Axes, ...]:
    layout = setup.sides.layout
    leading = tuple(range(len(layout.batch)))
    parts = (examples.soft, examples.plain)
    axes = [a for part in parts if part for a in _reading.batch_axes(layout, part)]
    axes += [] if examples.labels is None else [layout.batch_axes]
    axes += [] if examples.hard_scale is None else [leading]
    return (*axes, *(None for _ in examples.smoothing))


def _scale(setup: _Setup, scaled: Array, weights: Array, normalizer: Array | None) -> Array | None:
    """The factor goes in with the weights, so that the loss's derivative rule holds it too."""
    if setup.reduction == "mean" and normalizer is None:
        normalizer = reductions.total(weights, "sum", setup.axis_name)
    return reductions.example_scale(
        setup.sides.layout.batch,
        weights.dtype,
        scaled,
        setup.reduction,
        normalizer,
        setup.axis_name,
    )


def _metrics(setup: _Setup, batch: _Batch, seen: _Seen, own: Array) -> DistillationMetrics:
    def mean(values: Array, weights: Array = batch.weights) -> Array:
        return reductions.reduce(
            values, weights=weights, reduction="mean", axis_name=setup.axis_name
        )

    return DistillationMetrics(
        soft=mean(seen.soft),
        hard=mean(seen.hard, own),
        divergence=mean(seen.plain),
        agreement=mean(seen.same),
        teacher_entropy=mean(seen.entropy),
        weight_sum=reductions.total(batch.weights, "sum", setup.axis_name),
    )


def _argmax(x: Any, where: Array | None, layout: Layout) -> Array:
    if isinstance(x, TopKInput):
        log_probs = jnp.where(allowed(x.indices, where), with_infinity(x.log_probs), -jnp.inf)
        best = jnp.argmax(log_probs, axis=-1, keepdims=True)
        indices = jnp.broadcast_to(x.indices, log_probs.shape)
        return jnp.take_along_axis(indices, best, axis=-1)[..., 0]
    scores = x if where is None else jnp.where(where, with_infinity(x), -jnp.inf)
    classes_last = jnp.moveaxis(scores, layout.axis, range(-len(layout.axis), 0))
    batch = classes_last.shape[: -len(layout.axis)]
    return jnp.argmax(classes_last.reshape(*batch, math.prod(layout.classes)), axis=-1).astype(
        jnp.int32
    )
