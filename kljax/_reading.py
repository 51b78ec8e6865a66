"""What a call is given: from the user's arguments to the engine's operands."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.blocks import Axes
from kljax._engine.checks import Layout
from kljax._engine.head import HeadInput
from kljax._engine.representation import Kind, Operands, compute_dtype, normalizes
from kljax._engine.top_k import Tail, TopKInput
from kljax.distributions import Head, Logits, LogProbs, Probs, TopK

Input = Any  # Array, HeadInput or TopKInput


class Held(NamedTuple):
    """A distribution, unpacked."""

    kind: Kind
    value: Input
    bare: bool = False  # the user did not say what it is
    temperature: ArrayLike | None = None  # what a top-k was taken at


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
            if given.indices.dtype.itemsize < 4:  # the number of classes must fit
                given = replace(given, indices=given.indices.astype(jnp.int32))
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
    transposed = bool(head.transposed)
    checks.require_head(name, argument, parts, head.softcap, transposed)
    softcap = None if head.softcap is None else float(head.softcap)
    return HeadInput(
        parts["hidden"],
        parts["kernel"],
        parts.get("bias"),
        parts.get("scale"),
        None,
        softcap,
        transposed,
    )


def read_layout(
    name: str, arguments: tuple[str, ...], held: tuple[Held, ...], axis: int | Iterable[int]
) -> Layout:
    """Where batch and classes lie, from the sides that have classes; the others fit or raise."""
    shapes = {
        argument: shape_of(side)
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


def shape_of(side: Held) -> tuple[int, ...]:
    """Batch and classes."""
    value = side.value
    if isinstance(value, HeadInput):
        return (*value.hidden.shape[:-1], value.kernel.shape[value.class_axis])
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
            given = (1.0 if value is None else value for value in (side.temperature, temperature))
            value_checks.check_same_temperature(name, *given)
    if where is not None:
        where = checks.to_array(name, "where", where)
        checks.require_where(name, where, layout)
    if temperature is not None:
        temperature = checks.require_temperature(name, temperature, layout.batch)
    return where, temperature


class Sides(NamedTuple):
    """What is known of a call's sides before tracing."""

    name: str  # of the function, for messages
    arguments: tuple[str, ...]
    kinds: tuple[Kind, ...]
    bare: tuple[bool, ...]
    layout: Layout


def sides_of(
    name: str, arguments: tuple[str, ...], held: tuple[Held, ...], layout: Layout
) -> Sides:
    kinds, bare = tuple(side.kind for side in held), tuple(side.bare for side in held)
    return Sides(name, arguments, kinds, bare, layout)


def assemble(
    sides: Sides,
    inputs: tuple[Input, ...],
    counted: tuple[Array | None, ...],
    where: Array | None,
    temperature: Array | None,
    params: tuple[Any, ...],
    weights: dict[str, Array | None],
) -> Operands:
    """Everything on the axes of the whole input, with its values checked.

    `counted` has the weights under which each side is read: nothing is at weight 0.
    """
    layout = sides.layout
    whole = tuple(
        _expand(layout, kind, x, where, own)
        for kind, x, own in zip(sides.kinds, inputs, counted, strict=True)
    )
    whole_where = None if where is None else layout.expand(where)
    whole, whole_where = _share_sharding(whole, whole_where, layout)
    if temperature is not None:
        temperature = temperature.astype(compute_dtype(whole))
        if temperature.ndim:
            temperature = jnp.expand_dims(temperature, layout.axis)
    operands = Operands(whole, whole_where, temperature, params, None)
    _check_values(sides, operands, counted, weights)
    return operands


def _expand(
    layout: Layout, kind: Kind, x: Input, where: Array | None, weights: Array | None
) -> Input:
    """A side on the axes of the whole input; axes that it lacks have the size 1."""
    if isinstance(x, HeadInput | TopKInput):
        rank = len(layout.batch)
        lead = lambda z: z.reshape((1,) * (rank + 1 - z.ndim) + z.shape)  # noqa: E731
        if isinstance(x, HeadInput):
            shared = x.hidden.ndim <= rank
            live = None if weights is None or shared else weights.astype(bool)
            return replace(_without_masked(x, where), hidden=lead(x.hidden), live=live)
        tail = x.log_tail
        if tail is not None and tail.ndim < rank:
            tail = tail.reshape((1,) * rank)
        return replace(x, indices=lead(x.indices), log_probs=lead(x.log_probs), log_tail=tail)
    return jnp.expand_dims(x, layout.axis) if kind == "labels" else layout.expand(x)


def _without_masked(head: HeadInput, where: Array | None) -> HeadInput:
    """A head of which nothing is read at classes that exist for no example."""
    if where is None:
        return head
    exists = jnp.any(where, axis=tuple(range(where.ndim - 1)))
    bias = None if head.bias is None else jnp.where(exists, head.bias, 0)
    of_kernel = jnp.expand_dims(exists, 1 - head.class_axis)
    return replace(head, kernel=jnp.where(of_kernel, head.kernel, 0), bias=bias)


def batch_axes(layout: Layout, operands: Operands) -> tuple[Axes, ...]:
    """Where each leaf of the operands, in order, has its batch axes; None: it has none."""
    leading = tuple(range(len(layout.batch)))

    def of(x: Input) -> list[Axes]:
        if isinstance(x, HeadInput):
            shared: list[Axes] = [None for z in (x.kernel, x.bias, x.scale) if z is not None]
            return [leading, *shared, *([] if x.live is None else [leading])]
        if isinstance(x, TopKInput):
            return [leading for _ in jax.tree.leaves(x)]
        return [layout.batch_axes]

    axes = [a for x in operands.inputs for a in of(x)]
    axes += [] if operands.where is None else [layout.batch_axes]
    if operands.temperature is not None:
        axes += [layout.batch_axes if operands.temperature.ndim else None]
    axes += [None for _ in jax.tree.leaves(operands.params)]
    return (*axes, *([] if operands.scale is None else [leading]))


def _share_sharding(
    inputs: tuple[Input, ...], where: Array | None, layout: Layout
) -> tuple[tuple[Input, ...], Array | None]:
    """On a mesh of explicit axes a select demands that its operands are spread alike."""
    arrays = [x for x in inputs if isinstance(x, Array)]
    sharding = meshes.of_first([x for x in arrays if x.shape == layout.shape])
    if sharding is None:
        return inputs, where

    def spread(x: Any) -> Any:
        if isinstance(x, TopKInput):  # few columns beside the whole of the other side
            batch = meshes.without(sharding, layout.axis)
            lead = lambda z: meshes.spread(  # noqa: E731
                jnp.broadcast_to(z, (*layout.batch, z.shape[-1])), batch
            )
            tail = x.log_tail
            if tail is not None:
                tail = jnp.broadcast_to(tail, layout.batch)
                tail = meshes.spread(tail, meshes.dropping(sharding, layout.axis))
            return replace(x, indices=lead(x.indices), log_probs=lead(x.log_probs), log_tail=tail)
        if not isinstance(x, Array):
            return x
        if jnp.issubdtype(x.dtype, jnp.integer):  # labels have no classes to spread over
            return meshes.spread(x, meshes.without(sharding, layout.axis))
        return meshes.spread(jnp.broadcast_to(x, layout.shape), sharding)

    return tuple(map(spread, inputs)), None if where is None else spread(where)


def _check_values(
    sides: Sides,
    operands: Operands,
    counted: tuple[Array | None, ...],
    weights: dict[str, Array | None],
) -> None:
    """Report values that cannot be what their type says, where it was asked for."""
    if meshes.explicit(operands.inputs):
        return  # checkify's checks cannot be mapped over such an axis
    name, layout = sides.name, sides.layout
    for which, given in weights.items():
        value_checks.check_weights(name, which, given)
    value_checks.check_temperature(name, operands.temperature)
    for argument, kind, x, bare, own in zip(
        sides.arguments, sides.kinds, operands.inputs, sides.bare, counted, strict=True
    ):
        which = f"{name}: {argument}"
        live = None if own is None else jnp.expand_dims(own.astype(bool), layout.axis)
        if kind == "labels":
            value_checks.check_labels(name, x, live, layout.classes[0])
        elif kind == "top_k":
            value_checks.check_top_k(
                which, x.indices, x.log_probs, x.log_tail, x.tail, live, layout.classes[0]
            )
        elif kind != "head":  # whose logits are never held as a whole
            present = live if operands.where is None else operands.where
            if live is not None and operands.where is not None:
                present = operands.where & live
            whole = jnp.broadcast_to(x, layout.shape)  # a shared side counts where any does
            at_its_word = not normalizes(kind, operands.temperature)
            value_checks.check_distribution(
                which, kind, whole, present, layout.axis, bare=bare, exact=at_its_word
            )
