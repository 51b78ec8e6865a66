"""Objectives: what a training step minimises, built from divergences."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import Array, export, lax
from jax.typing import ArrayLike

from kljax import _pipeline, _reading
from kljax import reduction as reductions
from kljax._engine import blockwise, captures, checks, paths, value_checks
from kljax._engine.classes import Classes
from kljax._engine.formula import Formula, Loss
from kljax._engine.paths import Implementation, Path
from kljax._engine.side import Classed, Rows, block_of, compute_dtype, held, in_axes, wide
from kljax._engine.states import RowState
from kljax._engine.terms import nan_unless
from kljax._making import bound
from kljax._options import OtherOptions, plainly
from kljax._reading import ClassAxisName, Given, Inputs
from kljax.distributions import Distribution, LogProbs, Probs, TopK
from kljax.distributions.labels import Labels
from kljax.divergences import (
    CROSS_ENTROPY,
    ENTROPY,
    LABELS,
    forward_kl,
    jeffreys,
    smoothing,
)
from kljax.reduction import AxisName, Reduction, Weighting


@partial(export.register_namedtuple_serialization, serialized_name="kljax.DistillationMetrics")
class DistillationMetrics(NamedTuple):
    """Scalars to log, without gradient: weighted means over the batch (and ``axis_name``).

    Args:
        soft: The divergence at the temperature, before T² and ``soft_weight``.
        hard: The cross-entropy with the labels; 0 without labels.
        divergence: At T = 1, comparable across temperatures; NaN with a top-k of another T.
        agreement: The share of examples where student and teacher have the same argmax.
        teacher_entropy: At T = 1; NaN likewise.
        weight_sum: The number of examples where there are no weights.
    """

    soft: Array
    hard: Array
    divergence: Array
    agreement: Array
    teacher_entropy: Array
    weight_sum: Array


@plainly
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
    class_axis_name: ClassAxisName | None = None,
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
            whole shape (mixup), which get a gradient. Without ``hard_weight`` for metrics alone.
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
        class_axis_name: Named mapped axes over which the classes are spread.
        implementation: As for `forward_kl`.

    Returns:
        (loss, metrics).

    Raises:
        ValueError: Without labels unless hard_weight is 0; and as `forward_kl`.
        TypeError: For a dtype.

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
    asked = checks.require_divergence(_NAME, "divergence", divergence, bound(divergence))
    checks.require_no_smoothing(_NAME, asked.params.get(_pipeline.SMOOTHING, 0.0))
    inputs = _reading.read(
        _NAME,
        {"predictions": predictions, "targets": targets},
        axis=axis,
        where=where,
        temperature=temperature,
        class_axis_name=class_axis_name,
    )
    layout, temperature = inputs.layout, inputs.temperature
    dtype = compute_dtype(inputs.sides)
    formula = _pipeline.choose_term(asked.formula, inputs)
    plain = asked.formula.on(inputs.sides, None)
    pure = formula.cached and plain.cached
    path = paths.choose(
        _NAME,
        implementation,
        layout,
        inputs.sides,
        capturing=not pure,
    )
    if labels is not None:
        inputs = inputs.also("labels", _say_labels(labels, inputs, label_smoothing))
    elif not checks.is_static(hard_weight, 0):
        checks.fail(_NAME, "labels", "given", "None", "Or set hard_weight=0.0.")
    read = partial(Weighting.read, _NAME, layout, reduction=reduction, axis_name=axis_name)
    soft = read(weights=weights, normalizer=normalizer)
    hard = read(weights=label_weights, normalizer=label_normalizer, prefix="label_")
    ones = jnp.ones(layout.batch, dtype)
    soft = replace(soft, weights=ones if soft.weights is None else soft.weights.astype(dtype))
    if hard.weights is not None:
        hard = replace(hard, weights=hard.weights.astype(dtype))
    elif hard.normalizer is None:
        hard = soft
    else:
        hard = replace(hard, weights=soft.weights)
    soft_factor = checks.require_number(_NAME, "soft_weight", soft_weight).astype(dtype)
    if scale_by_temperature and temperature is not None:
        soft_factor = soft_factor * temperature.astype(dtype) ** 2
    terms = _Terms(
        formula,
        plain,
        not checks.is_static(soft_weight, 0),
        not checks.is_static(hard_weight, 0) and labels is not None,
        _pipeline.as_arrays(asked.params),
        smoothing(_NAME, label_smoothing),
        soft,
        hard,
        soft_factor,
        checks.require_number(_NAME, "hard_weight", hard_weight).astype(dtype),
    )
    return (_distill_jitted if pure else _distill)(path, inputs.on(path), terms)


@plainly
def consistency_loss(
    a: Given, b: Given, *, reduction: Reduction = "mean", **options: Unpack[OtherOptions]
) -> Array:
    r"""Two predictions of one example made to agree, as under two dropout masks (R-Drop).

    .. math:: \tfrac{1}{2} D(a\|b) + \tfrac{1}{2} D(b\|a)

    Half of `jeffreys`, also of families. Shapes, units, errors: as there.

    Zeros: as `jeffreys`.
    Gradients: to both sides.

    Args:
        a: One prediction, as for `forward_kl`.
        b: The other.
        reduction: As for `forward_kl`.
        **options: As for `forward_kl`.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> a, b = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(f"{kljax.consistency_loss(a, b):.4f}")
        0.2218

    Source: Wu et al., R-Drop: Regularized Dropout for Neural Networks (2021), equation 2.
    """
    return 0.5 * _pipeline.evaluate(_CONSISTENCY, (a, b), {}, reduction=reduction, **options)


_CONSISTENCY = jeffreys.bind().formula._replace(name="consistency_loss", arguments=("a", "b"))
_NAME = "distillation_loss"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "smoothing", "soft", "hard", "soft_factor", "hard_factor"],
    meta_fields=["formula", "plain", "has_soft", "has_hard"],
)
@dataclass(frozen=True)
class _Terms:
    """The two terms of the loss."""

    formula: Formula  # at the temperature
    plain: Formula  # at T = 1
    has_soft: bool
    has_hard: bool
    params: Any
    smoothing: dict[str, Array]
    soft: Weighting
    hard: Weighting
    soft_factor: Array
    hard_factor: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "sides",
        "classes",
        "temperature",
        "params",
        "plain_params",
        "smoothing",
        "soft_factor",
        "hard_factor",
    ],
    meta_fields=["formula", "plain", "has_soft"],
)
@dataclass(frozen=True)
class _Examples:
    """What the loss of each example is made of."""

    formula: Formula
    plain: Formula
    has_soft: bool
    sides: tuple[Classed, ...]  # student, teacher, and labels if there are any
    classes: Classes
    temperature: Array | None
    params: Any
    plain_params: Any
    smoothing: dict[str, Array]
    soft_factor: Array  # one per example, as is the next
    hard_factor: Array | None


class _Seen(NamedTuple):
    """One number of each example."""

    soft: Array
    plain: Array
    hard: Array
    same: Array
    entropy: Array


def _say_labels(labels: Any, inputs: Inputs, label_smoothing: ArrayLike) -> Distribution:
    if not isinstance(labels, Distribution):
        return Labels(labels)
    checks.require_no_smoothing(_NAME, label_smoothing)
    fits = isinstance(labels, Probs | LogProbs)
    checks.require_said_labels(_NAME, "labels", labels, fits=fits)
    shape = jnp.shape(*vars(labels).values())
    checks.require_same_batch(_NAME, "labels", shape, inputs.layout.shape)
    return labels


def _distill(path: Path, inputs: Inputs, terms: _Terms) -> tuple[Array, DistillationMetrics]:
    soft, hard = terms.soft, terms.hard
    examples = _examples(path, inputs, terms)
    axes = in_axes(inputs.layout, examples.sides, examples.classes, examples.temperature)
    shared = (examples.params, examples.plain_params, examples.smoothing)
    axes += tuple(None for _ in jax.tree.leaves(shared))
    axes += (inputs.layout.per_example,) * (2 if terms.has_hard else 1)
    compute = blockwise.values if soft.reduction == "none" else blockwise.total
    value, seen = compute(_each_example, path, examples, axes)
    metrics = lax.stop_gradient(_metrics(_Seen(*seen), soft, hard))
    return soft.over_axes(value), metrics


_distill_jitted = jax.jit(_distill, static_argnums=0)


def _examples(path: Path, inputs: Inputs, terms: _Terms) -> _Examples:
    layout = inputs.layout
    soft, hard = (held(term.weights) for term in (terms.soft, terms.hard))
    counted = [soft, soft]  # a side is read where any term reads it
    if len(inputs.sides) > 2:
        counted = [held((soft != 0) | (hard != 0)), soft, hard]
    for which, weights in {"weights": soft, "label_weights": hard}.items():
        value_checks.check_weights(_NAME, which, weights)
    (student, teacher, *labels), classes, temperature = inputs.place(tuple(counted))
    teacher = lax.stop_gradient(teacher)
    loss = Loss(terms.formula, (student, teacher), classes, temperature, terms.params)
    plain = replace(loss, formula=terms.plain, temperature=None)
    if not (terms.formula.cached and terms.plain.cached):
        loss, plain = (captures.hoist(each, layout, path) for each in (loss, plain))
    shares = (held(t.factor(layout.batch, soft.dtype)) for t in (terms.soft, terms.hard))
    soft_share, hard_share = shares
    return _Examples(
        loss.formula,
        plain.formula,
        terms.has_soft,
        (student, teacher, *labels),
        classes,
        temperature,
        loss.params,
        plain.params,
        terms.smoothing,
        terms.soft_factor * soft_share,
        terms.hard_factor * hard_share if terms.has_hard else None,
    )


def _each_example(of: _Examples) -> tuple[Array, _Seen]:
    """The loss of each example of a block, and what to log: both from the same logits."""
    of = replace(of, sides=_with_rows(of.sides, of.temperature))
    at_temperature, at_one, best = _rows(of)
    student, teacher, *labels = of.sides
    if not isinstance(teacher, TopK):  # whose gradient is entries set in an array of this dtype
        student = wide(student)  # the gradients of both terms are added before they are rounded
    soft = Loss(of.formula, (student, teacher), of.classes, of.temperature, of.params)
    soft = replace(soft, rows=_given(at_temperature))
    loss = none = jnp.zeros_like(of.soft_factor)
    if of.has_soft:
        loss = loss + _pipeline.example_values(replace(soft, factor=of.soft_factor))
    seen_soft = seen_plain = _seen(soft)
    if of.temperature is not None:
        plain = replace(soft, formula=of.plain, params=of.plain_params, rows=_given(at_one))
        seen_plain = _at_one(plain)
    seen_hard = none
    if labels:
        formula = LABELS if isinstance(labels[0], Labels) else CROSS_ENTROPY
        hard = Loss(formula, (student, *labels), of.classes, None, of.smoothing, of.hard_factor)
        hard = replace(hard, rows=_given((at_one[0], None)))
        if of.hard_factor is not None:
            loss = loss + _pipeline.example_values(hard)
        seen_hard = _seen(hard)
    same = jnp.broadcast_to(best[0] == best[1], loss.shape).astype(loss.dtype)
    teacher_alone = replace(soft, formula=ENTROPY, sides=of.sides[1:2], params=())
    entropy = _at_one(replace(teacher_alone, rows=_given(at_one[1:])))
    return loss, _Seen(
        seen_soft, seen_plain, seen_hard, same, jnp.broadcast_to(entropy, loss.shape)
    )


def _with_rows(sides: tuple[Classed, ...], temperature: Array | None) -> tuple[Classed, ...]:
    """What all examples share becomes a row of each, where each has its own temperature."""
    if temperature is None or not temperature.ndim:
        return sides
    arrays = tuple(side for side in sides if side.array is not None)
    whole = partial(jnp.broadcast_to, shape=block_of(arrays).shape)
    return tuple(side if side.array is None else jax.tree.map(whole, side) for side in sides)


_States = tuple[RowState | None, ...]


def _rows(of: _Examples) -> tuple[_States, _States, tuple[Array, ...]]:
    """Of student and teacher: states at the temperature and at 1, and the best class.

    All of a side from one pass over it, where memory is the limit.
    """
    inverse = None if of.temperature is None else 1 / lax.stop_gradient(of.temperature)
    dtype = compute_dtype(of.sides)
    at_temperature, at_one, best = [], [], []
    for side in lax.stop_gradient(of.sides[:2]):
        asked = [] if inverse is None else [inverse]
        asked += [None] if side.normalizes(None) else []
        logs = side.logs(of.classes, dtype)
        if logs is None or not asked:
            found, number = (), side.best(of.classes)
        else:
            found, number = of.classes.states_and_best(logs, asked, dtype)
        at_temperature.append(found[0] if found else None)
        at_one.append(found[-1] if found and side.normalizes(None) else None)
        best.append(number)
    return tuple(at_temperature), tuple(at_one), tuple(best)


def _given(states: _States) -> Rows | None:
    """As a loss takes them; nothing where one side's are not known."""
    return Rows(states) if any(states) else None


def _seen(loss: Loss) -> Array:
    return _pipeline.example_values(lax.stop_gradient(replace(loss, factor=None)))


def _at_one(loss: Loss) -> Array:
    """A metric at T = 1; NaN with a top-k of another temperature: it has only its own."""
    values, temperature = _seen(replace(loss, temperature=None)), loss.temperature
    if temperature is None or not isinstance(loss.sides[-1], TopK):
        return values
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, loss.classes.axis)
    return nan_unless(jnp.broadcast_to(temperature == 1, values.shape), values)


def _metrics(seen: _Seen, soft: Weighting, hard: Weighting) -> DistillationMetrics:
    def mean(values: Array, weighting: Weighting = soft) -> Array:
        return reductions.reduce(
            values,
            weights=weighting.weights,
            reduction="mean",
            axis_name=weighting.axis_name or None,
        )

    return DistillationMetrics(
        soft=mean(seen.soft),
        hard=mean(seen.hard, hard),
        divergence=mean(seen.plain),
        agreement=mean(seen.same),
        teacher_entropy=mean(seen.entropy),
        weight_sum=soft.over_axes(jnp.sum(held(soft.weights))),
    )
