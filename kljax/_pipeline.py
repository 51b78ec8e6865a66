"""The pipeline behind every divergence: representation → terms → sum → weights → reduction."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from kljax import reduction as reductions
from kljax._engine import checks, closures, dense, dispatch
from kljax._engine.checks import Layout
from kljax._engine.dispatch import Implementation
from kljax._engine.representation import (
    Kind,
    Operands,
    Spec,
    Term,
    compute_dtype,
    normalizes,
)
from kljax.distributions import Distribution, Logits, LogProbs, Probs
from kljax.reduction import AxisName, Reduction


class Formula(NamedTuple):
    """A divergence as it is called: its name and arguments, for messages, and its terms."""

    name: str
    arguments: tuple[str, ...]
    term: Term
    normalized: Term | None = None  # serves where the library normalised every side
    slope_sums: tuple[float | None, ...] = ()  # of `normalized`, as in Spec


class Held(NamedTuple):
    """A distribution, unpacked."""

    kind: Kind
    array: Array
    bare: bool = False  # the user did not say what it is


class Plan(NamedTuple):
    """All that chooses code, known before tracing."""

    name: str
    arguments: tuple[str, ...]
    spec: Spec
    bare: tuple[bool, ...]
    layout: Layout


class Given(NamedTuple):
    """All that is traced, as the user gave it."""

    arrays: tuple[Array, ...]
    where: Array | None
    temperature: Array | None
    params: tuple[Any, ...]


def evaluate(
    formula: Formula,
    distributions: tuple[ArrayLike | Distribution | Held, ...],
    *,
    term_params: tuple[Any, ...] = (),
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
    plan, given = _prepare(formula, distributions, term_params, axis, where, temperature)
    weights, normalizer = reductions.prepare(
        formula.name, plan.layout.batch, weights, reduction, normalizer, axis_name
    )
    implementation = dispatch.choose(formula.name, implementation)
    run = _run_jitted if closures.is_pure(plan.spec.term) else _run
    return run(plan, implementation, reduction, axis_name, given, weights, normalizer)


def _run(
    plan: Plan,
    implementation: Implementation,
    reduction: Reduction,
    axis_name: AxisName | None,
    given: Given,
    weights: Array | None,
    normalizer: Array | None,
) -> Array:
    spec, operands = plan.spec, _assemble(plan, given, weights)
    if not closures.is_pure(spec.term):
        spec, operands = closures.hoist(spec, operands)
    dtype = compute_dtype(operands.inputs)
    scale = reductions.example_scale(
        plan.layout.batch, dtype, weights, reduction, normalizer, axis_name
    )
    values = dispatch.rows(implementation)(spec, operands._replace(scale=scale))
    return reductions.total(values, reduction, axis_name)


_run_jitted = jax.jit(_run, static_argnums=(0, 1, 2, 3))


def evaluate_elements(
    formula: Formula,
    distributions: tuple[ArrayLike | Distribution, ...],
    *,
    axis: int | Iterable[int],
    where: ArrayLike | None,
    temperature: ArrayLike | None,
) -> Array:
    """One value per class: the pipeline without the sum and all that follows."""
    plan, given = _prepare(formula, distributions, (), axis, where, temperature)
    return _run_elements(plan, given)


@partial(jax.jit, static_argnums=0)
def _run_elements(plan: Plan, given: Given) -> Array:
    return dense.elements(plan.spec, _assemble(plan, given, None))


def read(name: str, argument: str, value: Any) -> Held:
    """What an argument holds; a bare array holds logits."""
    match value:
        case Held():
            return value
        case Logits(logits=x):
            held = Held("logits", checks.to_array(name, argument, x))
        case LogProbs(log_probs=x):
            held = Held("log_probs", checks.to_array(name, argument, x))
        case Probs(probs=x):
            held = Held("probs", checks.to_array(name, argument, x))
        case _:
            held = Held("logits", checks.to_array(name, argument, value), bare=True)
    checks.require_float(name, argument, held.array)
    return held


def restore(held: Held, layout: Layout) -> Array | Distribution:
    """The argument again: an array, and as large as the batch that shares it."""
    array = jnp.broadcast_to(layout.expand(held.array), layout.shape)
    types = {"logits": Logits, "log_probs": LogProbs, "probs": Probs}
    return array if held.bare else types[held.kind](array)


def read_layout(
    name: str, arguments: tuple[str, ...], held: tuple[Held, ...], axis: int | Iterable[int]
) -> Layout:
    """Where batch and classes lie, from the sides that have classes; labels then fit or raise."""
    shapes = {
        argument: side.array.shape
        for argument, side in zip(arguments, held, strict=True)
        if side.kind != "labels"
    }
    layout = checks.require_layout(name, shapes, axis)
    for side in held:
        if side.kind == "labels":
            checks.require_labels(name, side.array, layout)
    return layout


def read_options(
    name: str, layout: Layout, where: ArrayLike | None, temperature: ArrayLike | None
) -> tuple[Array | None, Array | None]:
    """The options that change the distributions, as arrays."""
    if where is not None:
        where = checks.to_array(name, "where", where)
        checks.require_where(name, where, layout)
    if temperature is not None:
        temperature = checks.require_temperature(name, temperature)
    return where, temperature


def _prepare(
    formula: Formula,
    distributions: tuple[Any, ...],
    params: tuple[Any, ...],
    axis: int | Iterable[int],
    where: ArrayLike | None,
    temperature: ArrayLike | None,
) -> tuple[Plan, Given]:
    name, arguments = formula.name, formula.arguments
    held = tuple(read(name, a, d) for a, d in zip(arguments, distributions, strict=True))
    layout = read_layout(name, arguments, held, axis)
    where, temperature = read_options(name, layout, where, temperature)
    kinds, arrays, bare = (tuple(column) for column in zip(*held, strict=True))

    normalized = all(normalizes(kind, temperature) for kind in kinds)
    spec = Spec(formula.term, kinds, layout.axis)
    if normalized and formula.normalized:
        spec = spec._replace(term=formula.normalized, slope_sums=formula.slope_sums)
    plan = Plan(name, arguments, spec, bare, layout)
    return plan, Given(arrays, where, temperature, params)


def _assemble(plan: Plan, given: Given, weights: Array | None) -> Operands:
    """Everything on the axes of the whole input, with its values checked."""
    layout, kinds = plan.layout, plan.spec.kinds
    inputs = tuple(
        jnp.expand_dims(x, layout.axis) if kind == "labels" else layout.expand(x)
        for kind, x in zip(kinds, given.arrays, strict=True)
    )
    where = None if given.where is None else layout.expand(given.where)
    inputs, where = _share_sharding(inputs, where, layout)
    temperature = given.temperature
    if temperature is not None:
        temperature = temperature.astype(compute_dtype(inputs))
    operands = Operands(inputs, where, temperature, given.params, None)
    _check_values(plan, operands, weights)
    return operands


def _share_sharding(
    inputs: tuple[Array, ...], where: Array | None, layout: Layout
) -> tuple[tuple[Array, ...], Array | None]:
    """On a mesh of explicit axes a select demands that its operands are spread alike."""
    specs = (jax.typeof(x).sharding.spec for x in inputs if x.shape == layout.shape)
    spec = next((spec for spec in specs if any(spec)), None)
    if spec is None:
        return inputs, where

    def spread(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.integer):  # labels have no classes to spread over
            return jax.sharding.reshard(
                x, PartitionSpec(*(None if i in layout.axis else n for i, n in enumerate(spec)))
            )
        return jax.sharding.reshard(jnp.broadcast_to(x, layout.shape), PartitionSpec(*spec))

    return tuple(map(spread, inputs)), None if where is None else spread(where)


def _check_values(plan: Plan, operands: Operands, weights: Array | None) -> None:
    name, layout = plan.name, plan.layout
    if AxisType.Explicit in jax.typeof(operands.inputs[0]).sharding.mesh.axis_types:
        return  # checkify's checks cannot be mapped over such an axis
    checks.check_weights(name, "weights", weights)
    checks.check_temperature(name, operands.temperature)
    live = None if weights is None else jnp.expand_dims(weights.astype(bool), layout.axis)
    counted = live if operands.where is None else operands.where
    if live is not None and operands.where is not None:
        counted = operands.where & live
    for argument, kind, x, bare in zip(
        plan.arguments, plan.spec.kinds, operands.inputs, plan.bare, strict=True
    ):
        if kind == "labels":
            checks.check_labels(name, x, live, layout.classes[0])
            continue
        whole = jnp.broadcast_to(x, layout.shape)  # a shared side counts where any example does
        at_its_word = not normalizes(kind, operands.temperature)
        checks.check_distribution(
            f"{name}: {argument}", kind, whole, counted, layout.axis, bare=bare, exact=at_its_word
        )
