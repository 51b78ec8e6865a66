"""The pipeline behind every divergence: representation → terms → sum → weights → reduction."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax import _reading
from kljax import reduction as reductions
from kljax._engine import checks, closures, dense, dispatch, meshes, rowwise
from kljax._engine.checks import Layout
from kljax._engine.dispatch import Choice, Implementation
from kljax._engine.representation import (
    Operands,
    Spec,
    Term,
    compute_dtype,
    normalizes,
    without_heads,
)
from kljax._engine.rowwise import Run
from kljax._engine.terms import weigh
from kljax._engine.top_k import TopKInput, coarsen
from kljax._reading import Held, Input, Sides
from kljax.distributions import Distribution
from kljax.reduction import AxisName, Reduction

OPTIONS = (
    "axis",
    "where",
    "temperature",
    "weights",
    "reduction",
    "normalizer",
    "axis_name",
    "implementation",
)


class Formula(NamedTuple):
    """A divergence as it is called: its name and arguments, for messages, and its terms."""

    name: str
    arguments: tuple[str, ...]
    term: Term
    normalized: Term | None = None  # serves where the library normalised every side
    slope_sums: tuple[float | None, ...] = ()  # of `normalized`, as in Spec
    needs_mass: bool = False  # infinite where targets are 0
    linear: int | None = None  # as in Spec


class Plan(NamedTuple):
    """All that chooses code, known before tracing."""

    sides: Sides
    spec: Spec
    choice: Choice


class Given(NamedTuple):
    """All that is traced, as the user gave it."""

    inputs: tuple[Input, ...]
    where: Array | None
    temperature: Array | None
    params: tuple[Any, ...]


def evaluate(
    formula: Formula, distributions: Any, *, params: dict[str, Any] | None = None, **options: Any
) -> Array:
    """One value per example, or one number; a misspelt option is told the nearest."""
    checks.require_options(formula.name, options, OPTIONS)
    return _evaluate(formula, distributions, params=params or {}, **options)


def _evaluate(
    formula: Formula,
    distributions: tuple[ArrayLike | Distribution | Held, ...],
    *,
    params: Any = (),
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """One value per example, or one number: check everything that is static, then run."""
    plan, given = _prepare(formula, distributions, params, axis, where, temperature, implementation)
    weights, normalizer = reductions.prepare(
        formula.name, plan.sides.layout, weights, reduction, normalizer, axis_name
    )
    run = _run_jitted if closures.is_pure(plan.spec.term) else _run
    return run(plan, reduction, axis_name, given, weights, normalizer)


def _run(
    plan: Plan,
    reduction: Reduction,
    axis_name: AxisName | None,
    given: Given,
    weights: Array | None,
    normalizer: Array | None,
) -> Array:
    spec, layout = plan.spec, plan.sides.layout
    operands = _assemble(plan, given, weights)
    if not closures.is_pure(spec.term):
        spec, operands = closures.hoist(spec, operands, layout.batch_axes, plan.choice)
    dtype = compute_dtype(operands.inputs)
    scale = reductions.example_scale(layout.batch, dtype, weights, reduction, normalizer, axis_name)
    operands = operands._replace(scale=scale)
    run = Run(
        partial(_each_example, spec),
        layout.batch,
        jax.tree.structure(operands),
        _reading.batch_axes(layout, operands),
        *plan.choice,
    )
    compute = rowwise.values if reduction == "none" else rowwise.total
    return reductions.total(compute(run, operands)[0], reduction, axis_name)


_run_jitted = jax.jit(_run, static_argnums=(0, 1, 2))


def _each_example(spec: Spec, operands: Operands) -> tuple[Array, tuple[()]]:
    return example_values(spec, operands), ()


def example_values(spec: Spec, operands: Operands) -> Array:
    """One value per example, from sides whose heads are logits by now."""
    spec = without_heads(spec)
    if isinstance(operands.params, dict) and SMOOTHING in operands.params:
        return _smoothed(spec, operands._replace(params=()), operands.params[SMOOTHING])
    return dense.rows(*coarsen(spec, operands))


SMOOTHING = "label_smoothing"


def _smoothed(spec: Spec, operands: Operands, smoothing: Array) -> Array:
    """The cross-entropy with labels, and with the uniform distribution over all classes."""
    values = dense.rows(spec, operands)
    (x, _), where, scale = operands.inputs, operands.where, operands.scale
    classes = jnp.ones(x.shape, bool) if where is None else jnp.broadcast_to(where, x.shape)
    count = jnp.maximum(jnp.sum(classes, axis=spec.axis), 1).astype(values.dtype)
    share = 1 / count if scale is None else scale / count
    uniform = Spec(lambda log, *_: -log[0], spec.kinds[:1], spec.axis)
    uniform = dense.rows(uniform, operands._replace(inputs=(x,), scale=share))
    smoothing = smoothing.astype(values.dtype)
    return weigh(1 - smoothing, values) + weigh(smoothing, uniform)


def evaluate_elements(
    formula: Formula,
    distributions: tuple[ArrayLike | Distribution, ...],
    *,
    axis: int | Iterable[int],
    where: ArrayLike | None,
    temperature: ArrayLike | None,
) -> Array:
    """One value per class: the pipeline without the sum and all that follows."""
    plan, given = _prepare(formula, distributions, (), axis, where, temperature, "dense")
    for argument, kind in zip(formula.arguments, plan.spec.kinds, strict=True):
        checks.require_arrays(formula.name, argument, kind)
    return _run_elements(plan, given)


@partial(jax.jit, static_argnums=0)
def _run_elements(plan: Plan, given: Given) -> Array:
    return dense.elements(plan.spec, _assemble(plan, given, None))


def choose_spec(
    formula: Formula, held: tuple[Held, ...], temperature: Array | None, layout: Layout
) -> Spec:
    """What to compute: with the non-negative term where all sides are normalised here."""
    for side in held:
        if side.kind == "top_k":
            given = side.value
            complete = given.indices.shape[-1:] == layout.classes  # there is no rest
            known = complete or given.log_tail is not None
            checks.require_tail(formula.name, given.tail, known, formula.needs_mass)
    kinds = tuple(side.kind for side in held)
    spec = Spec(formula.term, kinds, layout.axis, linear=formula.linear)
    normalized = all(
        side.value.tail != "truncate"
        if isinstance(side.value, TopKInput)
        else normalizes(side.kind, temperature)
        for side in held
    )
    if normalized and formula.normalized:
        spec = spec._replace(term=formula.normalized, slope_sums=formula.slope_sums)
    return spec


def choose_blocks(
    name: str,
    layout: Layout,
    held: tuple[Held, ...],
    implementation: Implementation | None,
    terms: Iterable[Term],
) -> Choice:
    kinds = {side.kind for side in held}
    only_arrays = not kinds & {"head", "top_k"}
    if implementation is None and only_arrays and not all(map(closures.is_pure, terms)):
        return dispatch.at_once(layout.batch)  # what a term captures may be of the batch's size
    arrays = [x.value for x in held if x.kind in ("logits", "log_probs", "probs")]
    return dispatch.choose(
        name,
        implementation,
        layout.batch,
        math.prod(layout.classes),
        itemsize=min((x.dtype.itemsize for x in arrays), default=4),
        kinds=kinds,
        explicit_mesh=meshes.explicit([side.value for side in held]),
    )


def _prepare(
    formula: Formula,
    distributions: tuple[Any, ...],
    params: tuple[Any, ...],
    axis: int | Iterable[int],
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    implementation: Implementation | None,
) -> tuple[Plan, Given]:
    name, arguments = formula.name, formula.arguments
    held = tuple(_reading.read(name, a, d) for a, d in zip(arguments, distributions, strict=True))
    checks.require_no_top_k(name, arguments[0], held[0].kind)
    layout = _reading.read_layout(name, arguments, held, axis)
    where, temperature = _reading.read_options(name, layout, where, temperature, held)
    spec = choose_spec(formula, held, temperature, layout)
    choice = choose_blocks(name, layout, held, implementation, (spec.term,))
    plan = Plan(_reading.sides_of(name, arguments, held, layout), spec, choice)
    params = jax.tree.map(jnp.asarray, params)
    return plan, Given(tuple(side.value for side in held), where, temperature, params)


def _assemble(plan: Plan, given: Given, weights: Array | None) -> Operands:
    counted = tuple(weights for _ in given.inputs)
    return _reading.assemble(
        plan.sides,
        given.inputs,
        counted,
        given.where,
        given.temperature,
        given.params,
        {"weights": weights},
    )
