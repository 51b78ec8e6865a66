"""The pipeline behind every divergence: read → place → run a path → reduce."""

import inspect
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax import _closed_forms, _reading
from kljax._engine import blockwise, captures, checks, paths, value_checks
from kljax._engine import loss as losses
from kljax._engine.formula import Formula, Loss
from kljax._engine.paths import Implementation, Path
from kljax._engine.side import Rows, block_of, compute_dtype
from kljax._engine.terms import weigh
from kljax._reading import ClassAxisName, Given, Inputs
from kljax.reduction import AxisName, Reduction, Weighting


def evaluate(
    formula: Formula, given: tuple[Given, ...], params: dict[str, Any], **options: Any
) -> Array:
    """One value per example, or one number; a misspelt option is told the nearest."""
    checks.require_options(formula.name, options, OPTIONS)
    if _closed_forms.are_asked_for(given):
        return _closed_forms.evaluate(formula, given, **options)
    return _evaluate(formula, given, params, **options)


def _evaluate(
    formula: Formula,
    given: tuple[Given, ...],
    params: dict[str, Any],
    *,
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    class_axis_name: ClassAxisName | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Check everything that is static, then run."""
    inputs = _reading.read(
        formula.name,
        dict(zip(formula.arguments, given, strict=True)),
        axis=axis,
        where=where,
        temperature=temperature,
        class_axis_name=class_axis_name,
    )
    weighting = Weighting.read(
        formula.name,
        inputs.layout,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
    )
    formula = choose_term(formula, inputs)
    path = paths.choose(
        formula.name,
        implementation,
        inputs.layout,
        inputs.sides,
        capturing=not formula.cached,
    )
    run = _run_jitted if formula.cached else _run
    return run(formula, path, inputs.on(path), weighting, as_arrays(params))


def as_arrays(params: dict[str, Any]) -> dict[str, Any]:
    """Arrays as they are: under a transform even `asarray` is an operation."""
    return jax.tree.map(lambda x: x if isinstance(x, Array) else jnp.asarray(x), params)


# What every divergence takes besides its distributions, with the defaults.
OPTIONS = {
    option.name: option.replace(annotation=inspect.Parameter.empty)
    for option in inspect.signature(_evaluate).parameters.values()
    if option.kind is option.KEYWORD_ONLY
}


def _run(
    formula: Formula, path: Path, inputs: Inputs, weighting: Weighting, params: dict[str, Array]
) -> Array:
    layout, weights = inputs.layout, weighting.weights
    placed = inputs.place((weights,) * len(inputs.sides))
    value_checks.check_weights(formula.name, "weights", weights)
    loss = Loss(formula, *placed, params)
    if not formula.cached:
        loss = captures.hoist(loss, layout, path)
    factor = weighting.factor(layout.batch, compute_dtype(loss.sides))
    loss = replace(loss, factor=factor)
    compute = blockwise.values if weighting.reduction == "none" else blockwise.total
    return weighting.over_axes(compute(_each_example, path, loss, loss.in_axes(layout))[0])


_run_jitted = jax.jit(_run, static_argnums=(0, 1))


def _each_example(loss: Loss) -> tuple[Array, tuple[()]]:
    return example_values(loss), ()


SMOOTHING = "label_smoothing"  # the parameter of a cross-entropy with labels


def example_values(loss: Loss) -> Array:
    """One value per example, from sides whose logits are at hand."""
    if not (isinstance(loss.params, dict) and SMOOTHING in loss.params):
        return losses.values(loss)
    classes, smoothing = loss.classes, loss.params[SMOOTHING]
    to_labels = losses.values(replace(loss, params={}))
    like = block_of(loss.sides)
    count = classes.sum(classes.present(jnp.ones(like.shape, like.dtype)))
    share = 1 / jnp.maximum(count, 1)
    uniform = replace(
        loss,
        formula=_UNIFORM,
        sides=loss.sides[:1],
        rows=Rows(loss.rows.states[:1]) if loss.rows else None,
        params={},
        factor=share if loss.factor is None else loss.factor * share,
    )
    smoothing = smoothing.astype(like.dtype)
    return weigh(1 - smoothing, to_labels) + weigh(smoothing, losses.values(uniform))


_UNIFORM = Formula("cross_entropy", ("predictions",), lambda log, *_: -log[0])


def evaluate_elements(
    formula: Formula,
    given: tuple[Given, ...],
    *,
    axis: int | Iterable[int],
    where: ArrayLike | None,
    temperature: ArrayLike | None,
) -> Array:
    """One value per class: the pipeline without the sum and all that follows."""
    named = dict(zip(formula.arguments, given, strict=True))
    inputs = _reading.read(formula.name, named, axis=axis, where=where, temperature=temperature)
    for argument, side in zip(inputs.arguments, inputs.sides, strict=True):
        checks.require_all_classes(formula.name, argument, side)
    return _run_elements(choose_term(formula, inputs), inputs)


@partial(jax.jit, static_argnums=0)
def _run_elements(formula: Formula, inputs: Inputs) -> Array:
    return losses.elements(Loss(formula, *inputs.place((None,) * len(inputs.sides))))


def choose_term(formula: Formula, inputs: Inputs) -> Formula:
    """The formula with the one term that serves these sides; or an error if none does."""
    if formula.needs_mass:
        for side in inputs.sides:
            side.require_mass(formula.name, inputs.layout)
    return formula.on(inputs.sides, inputs.temperature)
