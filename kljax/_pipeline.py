"""The pipeline behind every divergence: representation → terms → sum → weights → reduction."""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from kljax import reduction as reductions
from kljax._engine import checks, closures, dense, dispatch, rowwise
from kljax._engine.blocks import Axes
from kljax._engine.checks import Layout
from kljax._engine.dispatch import Choice, Implementation
from kljax._engine.head import HeadInput
from kljax._engine.representation import (
    Kind,
    Operands,
    Spec,
    Term,
    compute_dtype,
    normalizes,
)
from kljax._engine.rowwise import Run
from kljax._engine.top_k import Tail, TopKInput, coarsen
from kljax.distributions import Distribution, Head, Logits, LogProbs, Probs, TopK
from kljax.reduction import AxisName, Reduction

Input = Array | HeadInput | TopKInput


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
    value: Input
    bare: bool = False  # the user did not say what it is
    temperature: ArrayLike | None = None  # what a top-k was taken at


class Plan(NamedTuple):
    """All that chooses code, known before tracing."""

    name: str
    arguments: tuple[str, ...]
    spec: Spec
    bare: tuple[bool, ...]
    layout: Layout
    choice: Choice


class Given(NamedTuple):
    """All that is traced, as the user gave it."""

    inputs: tuple[Input, ...]
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
    plan, given = _prepare(
        formula, distributions, term_params, axis, where, temperature, implementation
    )
    weights, normalizer = reductions.prepare(
        formula.name, plan.layout.batch, weights, reduction, normalizer, axis_name
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
    spec, layout = plan.spec, plan.layout
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
        batch_axes(layout, operands),
        *plan.choice,
    )
    compute = rowwise.values if reduction == "none" else rowwise.total
    return reductions.total(compute(run, operands)[0], reduction, axis_name)


_run_jitted = jax.jit(_run, static_argnums=(0, 1, 2))


def _each_example(spec: Spec, operands: Operands) -> tuple[Array, tuple[()]]:
    return example_values(spec, operands), ()


def example_values(spec: Spec, operands: Operands) -> Array:
    """One value per example, from sides whose heads are logits by now."""
    return dense.rows(*coarsen(_projected(spec), operands))


def _projected(spec: Spec) -> Spec:
    kinds = tuple("logits" if kind == "head" else kind for kind in spec.kinds)
    return spec._replace(kinds=kinds)


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
    for argument, kind in zip(plan.arguments, plan.spec.kinds, strict=True):
        checks.require_arrays(formula.name, argument, kind)
    return _run_elements(plan, given)


@partial(jax.jit, static_argnums=0)
def _run_elements(plan: Plan, given: Given) -> Array:
    return dense.elements(plan.spec, _assemble(plan, given, None))


def read(name: str, argument: str, value: Any) -> Held:
    """What an argument holds; a bare array holds logits."""
    array = partial(checks.to_array, name)
    match value:
        case Held():
            return value
        case Head():
            return Held("head", _read_head(name, argument, value))
        case TopK(indices, log_probs, log_tail, temperature, tail):
            checks.require_choice(name, f"{argument}.tail", tail, get_args(Tail))
            given = TopKInput(
                array(f"{argument}.indices", indices),
                array(f"{argument}.log_probs", log_probs),
                None if log_tail is None else array(f"{argument}.log_tail", log_tail),
                tail,
            )
            checks.require_top_k(name, argument, given.indices, given.log_probs, given.log_tail)
            return Held("top_k", given, temperature=temperature)
        case Logits(logits=x):
            held = Held("logits", array(argument, x))
        case LogProbs(log_probs=x):
            held = Held("log_probs", array(argument, x))
        case Probs(probs=x):
            held = Held("probs", array(argument, x))
        case _:
            held = Held("logits", array(argument, value), bare=True)
    checks.require_float(name, argument, held.value)
    return held


def _read_head(name: str, argument: str, head: Head) -> HeadInput:
    parts = {
        part: checks.to_array(name, f"{argument}.{part}", getattr(head, part))
        for part in ("hidden", "kernel", "bias", "scale")
        if getattr(head, part) is not None
    }
    checks.require_head(name, argument, parts, head.softcap)
    softcap = None if head.softcap is None else float(head.softcap)
    return HeadInput(
        parts["hidden"], parts["kernel"], parts.get("bias"), parts.get("scale"), None, softcap
    )


def read_layout(
    name: str, arguments: tuple[str, ...], held: tuple[Held, ...], axis: int | Iterable[int]
) -> Layout:
    """Where batch and classes lie, from the sides that have classes; the others fit or raise."""
    shapes = {
        argument: _shape(side)
        for argument, side in zip(arguments, held, strict=True)
        if side.kind not in ("labels", "top_k")
    }
    for argument, side in zip(arguments, held, strict=True):
        if side.kind == "top_k":  # of the predictions' classes
            (whole,) = shapes.values()
            shapes[argument] = (*side.value.log_probs.shape[:-1], *whole[-1:])
    layout = checks.require_layout(name, shapes, axis)
    for argument, side in zip(arguments, held, strict=True):
        if side.kind == "labels":
            checks.require_labels(name, side.value, layout)
        if side.kind in ("head", "top_k"):
            checks.require_classes_last(name, argument, layout)
    return layout


def _shape(side: Held) -> tuple[int, ...]:
    value = side.value
    if isinstance(value, HeadInput):
        return (*value.hidden.shape[:-1], value.kernel.shape[-1])
    return value.shape


def read_options(
    name: str,
    layout: Layout,
    where: ArrayLike | None,
    temperature: ArrayLike | None,
    held: tuple[Held, ...],
) -> tuple[Array | None, Array | None]:
    """The options that change the distributions, as arrays."""
    for side in held:
        if side.kind == "top_k":
            checks.require_same_temperature(name, side.temperature, temperature)
    if where is not None:
        where = checks.to_array(name, "where", where)
        checks.require_where(name, where, layout)
    if temperature is not None:
        temperature = checks.require_temperature(name, temperature)
    return where, temperature


def choose_spec(
    formula: Formula, held: tuple[Held, ...], temperature: Array | None, axis: tuple[int, ...]
) -> Spec:
    """What to compute: with the non-negative term where all sides are normalised here."""
    for side in held:
        if side.kind == "top_k":
            checks.require_tail(formula.name, side.value.tail)
    spec = Spec(formula.term, tuple(side.kind for side in held), axis)
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
    name: str, layout: Layout, held: tuple[Held, ...], implementation: Implementation | None
) -> Choice:
    return dispatch.choose(
        name,
        implementation,
        layout.batch,
        math.prod(layout.classes),
        made_in_blocks=any(side.kind in ("head", "top_k") for side in held),
        explicit_mesh=any(_on_explicit_mesh(side.value) for side in held),
    )


def _on_explicit_mesh(value: Input) -> bool:
    meshes = (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(value))
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


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
    held = tuple(read(name, a, d) for a, d in zip(arguments, distributions, strict=True))
    checks.require_no_top_k(name, arguments[0], held[0].kind)
    layout = read_layout(name, arguments, held, axis)
    where, temperature = read_options(name, layout, where, temperature, held)
    spec = choose_spec(formula, held, temperature, layout.axis)
    choice = choose_blocks(name, layout, held, implementation)
    if not closures.is_pure(spec.term) and implementation is None and _holds_arrays(held):
        choice = dispatch.at_once(layout.batch)  # what it captures may be of the batch's size
    bare = tuple(side.bare for side in held)
    plan = Plan(name, arguments, spec, bare, layout, choice)
    params = jax.tree.map(jnp.asarray, params)
    return plan, Given(tuple(side.value for side in held), where, temperature, params)


def _holds_arrays(held: tuple[Held, ...]) -> bool:
    return all(side.kind not in ("head", "top_k") for side in held)


def _assemble(plan: Plan, given: Given, weights: Array | None) -> Operands:
    """Everything on the axes of the whole input, with its values checked."""
    layout, kinds = plan.layout, plan.spec.kinds
    inputs = tuple(
        expand(layout, kind, x, weights) for kind, x in zip(kinds, given.inputs, strict=True)
    )
    where = None if given.where is None else layout.expand(given.where)
    inputs, where = share_sharding(inputs, where, layout)
    temperature = given.temperature
    if temperature is not None:
        temperature = temperature.astype(compute_dtype(inputs))
    operands = Operands(inputs, where, temperature, given.params, None)
    check_values(plan.name, plan.arguments, kinds, plan.bare, layout, operands, weights)
    return operands


def expand(layout: Layout, kind: Kind, x: Input, weights: Array | None) -> Input:
    """A side on the axes of the whole input; axes that it lacks have the size 1."""
    if isinstance(x, HeadInput | TopKInput):
        rank = len(layout.batch)
        lead = lambda z: z.reshape((1,) * (rank + 1 - z.ndim) + z.shape)  # noqa: E731
        if isinstance(x, HeadInput):
            shared = x.hidden.ndim <= rank
            live = None if weights is None or shared else weights.astype(bool)
            return replace(x, hidden=lead(x.hidden), live=live)
        tail = x.log_tail
        if tail is not None and tail.ndim < rank:
            tail = tail.reshape((1,) * rank)
        return replace(x, indices=lead(x.indices), log_probs=lead(x.log_probs), log_tail=tail)
    return jnp.expand_dims(x, layout.axis) if kind == "labels" else layout.expand(x)


def batch_axes(layout: Layout, operands: Operands) -> tuple[Axes, ...]:
    """Where each leaf of the operands has its batch axes."""
    leading = tuple(range(len(layout.batch)))

    def of(x: Any) -> Any:
        if isinstance(x, HeadInput):
            live = None if x.live is None else leading
            none = lambda z: None if z is None else ()  # noqa: E731
            return replace(
                x, hidden=leading, kernel=(), bias=none(x.bias), scale=none(x.scale), live=live
            )
        if isinstance(x, TopKInput):
            return jax.tree.map(lambda _: leading, x)
        return layout.batch_axes

    mine = operands._replace(
        inputs=tuple(map(of, operands.inputs)),
        where=None if operands.where is None else layout.batch_axes,
        temperature=None if operands.temperature is None else (),
        params=jax.tree.map(lambda _: (), operands.params),
        scale=None if operands.scale is None else leading,
    )
    is_axes = lambda x: isinstance(x, tuple) and all(isinstance(i, int) for i in x)  # noqa: E731
    axes = jax.tree.structure(operands).flatten_up_to(mine)
    assert all(map(is_axes, axes))
    return tuple(a or None if layout.batch else None for a in axes)


def share_sharding(
    inputs: tuple[Input, ...], where: Array | None, layout: Layout
) -> tuple[tuple[Input, ...], Array | None]:
    """On a mesh of explicit axes a select demands that its operands are spread alike."""
    arrays = [x for x in inputs if isinstance(x, Array)]
    specs = (jax.typeof(x).sharding.spec for x in arrays if x.shape == layout.shape)
    spec = next((spec for spec in specs if any(spec)), None)
    if spec is None:
        return inputs, where

    def spread(x: Any) -> Any:
        if not isinstance(x, Array):
            return x
        if jnp.issubdtype(x.dtype, jnp.integer):  # labels have no classes to spread over
            return jax.sharding.reshard(
                x, PartitionSpec(*(None if i in layout.axis else n for i, n in enumerate(spec)))
            )
        return jax.sharding.reshard(jnp.broadcast_to(x, layout.shape), PartitionSpec(*spec))

    return tuple(map(spread, inputs)), None if where is None else spread(where)


def check_values(
    name: str,
    arguments: tuple[str, ...],
    kinds: tuple[Kind, ...],
    bare: tuple[bool, ...],
    layout: Layout,
    operands: Operands,
    weights: Array | None,
) -> None:
    """Report values that cannot be what their type says, under checkify."""
    if any(map(_on_explicit_mesh, operands.inputs)):
        return  # checkify's checks cannot be mapped over such an axis
    checks.check_weights(name, "weights", weights)
    checks.check_temperature(name, operands.temperature)
    live = None if weights is None else jnp.expand_dims(weights.astype(bool), layout.axis)
    counted = live if operands.where is None else operands.where
    if live is not None and operands.where is not None:
        counted = operands.where & live
    for argument, kind, x, is_bare in zip(arguments, kinds, operands.inputs, bare, strict=True):
        if kind == "head":
            continue  # its logits are never held as a whole
        if kind == "labels":
            checks.check_labels(name, x, live, layout.classes[0])
            continue
        if kind == "top_k":
            checks.check_top_k(f"{name}: {argument}", x.indices, x.log_probs, live, layout)
            continue
        whole = jnp.broadcast_to(x, layout.shape)  # a shared side counts where any example does
        at_its_word = not normalizes(kind, operands.temperature)
        checks.check_distribution(
            f"{name}: {argument}",
            kind,
            whole,
            counted,
            layout.axis,
            bare=is_bare,
            exact=at_its_word,
        )
