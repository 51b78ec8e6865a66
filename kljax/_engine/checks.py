"""The only place that raises on input.

Shapes, dtypes and options raise at trace time. What would otherwise broadcast silently raises
directly; the rest goes through chex and obeys `chex.disable_asserts`. What can only be known of
values is reported by `value_checks`, and only where the user asked for it.
"""

import difflib
import numbers
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from kljax._engine.classes import Layout, Shape

T = TypeVar("T")
Names = tuple[str, ...]


def fail(caller: str, argument: str, expected: str, got: str, remedy: str) -> NoReturn:
    raise ValueError(message_of(caller, argument, expected, got, remedy))


def to_array(caller: str, argument: str, value: Any) -> Array:
    """Anything numeric, lists included, as a JAX array; arrays as they are."""
    if isinstance(value, Array):  # under a transform even `asarray` is an operation
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.size:
        narrow = np.iinfo(jax.dtypes.canonicalize_dtype(value.dtype))
        if value.max() > narrow.max or value.min() < narrow.min:
            got = f"{value.dtype} up to {value.max()}, down to {value.min()}"
            remedy = "They would wrap around; enable jax_enable_x64 if they are meant."
            fail(caller, argument, f"within {narrow.dtype}", got, remedy)
    try:
        return jnp.asarray(value)
    except OverflowError:
        expected, remedy = "within the default integers", "Enable jax_enable_x64 if they are meant."
        fail(caller, argument, expected, "larger ones", remedy)
    except (TypeError, ValueError) as error:
        got, remedy = type(value).__name__, "Pass a JAX or NumPy array."
        if isinstance(value, np.ndarray):
            got = f"one of dtype {value.dtype}"
            if value.dtype == "V2":  # what NumPy's files make of bfloat16
                remedy = "Give it its dtype again, by x.view(jnp.bfloat16)."
        raise TypeError(message_of(caller, argument, "an array", got, remedy)) from error


# ---- shapes, dtypes, options: at trace time ----


def require_choice(
    caller: str, argument: str, value: Any, choices: Iterable[str], *, optional: bool = False
) -> None:
    listed = [f'"{choice}"' for choice in choices]
    if optional:
        listed = ["None", *listed]
    if not isinstance(value, str) or f'"{value}"' not in listed:
        got = f'"{value}"' if isinstance(value, str) else repr(value)
        fail(caller, argument, "one of " + ", ".join(listed), got, "Names are case-sensitive.")


def require_axis_names(caller: str, argument: str, value: Any) -> tuple[Any, ...]:
    """The names of mapped axes, one or several or none."""
    names = tuple(value) if isinstance(value, list | tuple) else (value,) * (value is not None)
    if len(set(names)) != len(names):
        fail(caller, argument, "distinct names", f"{value}", "Name each axis once.")
    return names


def require_disjoint(caller: str, names: tuple[Any, ...], class_names: tuple[Any, ...]) -> None:
    both = [name for name in class_names if name in names]
    if both:
        expected, got = "other axes than axis_name", f"{both[0]!r} in both"
        remedy = "An axis has either its own examples or its own classes."
        fail(caller, "class_axis_name", expected, got, remedy)


def require_float(caller: str, argument: str, x: Array) -> None:
    remedy = "Convert with .astype(jnp.float32)."
    if argument == "targets":
        remedy += " Integer labels go to cross_entropy."
    if argument == "predictions" and not jnp.issubdtype(x.dtype, jnp.floating):
        remedy = "Predictions come first, labels or targets second."
    expected = "floating point"
    require_type(x, float, caller, argument, expected, remedy)


def require_scalar(caller: str, argument: str, x: Array) -> None:
    """A scalar option: an array would broadcast silently."""
    if x.shape != ():
        fail(caller, argument, "a scalar", f"shape {x.shape}", "It is one number for all examples.")
    _require_real(x, caller, argument, "a real number", "Pass a float.")


def require_number(caller: str, argument: str, value: Any) -> Array:
    value = to_array(caller, argument, value)
    require_scalar(caller, argument, value)
    return value


def require_same_batch(caller: str, argument: str, shape: Shape, whole: Shape) -> None:
    if shape != whole:
        remedy = "Give one distribution per example."
        fail(caller, argument, f"shape {whole}, like predictions", f"{shape}", remedy)


def require_weights(
    caller: str, argument: str, weights: Array, batch: Shape, classes: Shape | None = None
) -> None:
    if weights.shape != batch:
        if classes and weights.dtype == bool and weights.shape == classes:
            remedy = "A mask of classes goes into `where`."
            fail(caller, argument, f"shape {batch}, the batch shape", f"{weights.shape}", remedy)
        squeezed = tuple(n for n in weights.shape if n != 1) == tuple(n for n in batch if n != 1)
        remedy = "Give one weight per example."
        if squeezed and weights.shape[:-1] == batch:
            remedy = "Squeeze the last axis."
        elif squeezed:
            remedy = f"Reshape to {batch}."
        fail(caller, argument, f"shape {batch}, the batch shape", f"{weights.shape}", remedy)
    _require_real(weights, caller, argument, "bool, int or float", "Convert them.")


def require_where(caller: str, where: Array, layout: Layout) -> None:
    remedy = "Write `where > 0`; weights of examples go into `weights`."
    require_type(where, bool, caller, "where", "bool", remedy)
    if where.shape not in (layout.classes, layout.shape):
        expected = f"shape {layout.classes}, the classes, or {layout.shape}, the whole input's"
        remedy = "It masks classes; a mask of examples goes into `weights`."
        fail(caller, "where", expected, f"{where.shape}", remedy)


def require_said(caller: str, argument: str, x: Array) -> None:
    """Floats that do not say what they are could be one-hot, soft labels or logits."""
    expected = "integer labels, or a distribution that says what it is"
    remedy = "Wrap one-hot or soft labels in Probs, a teacher's logits in Logits."
    if jnp.issubdtype(x.dtype, jnp.integer):
        return
    if x.dtype == bool:
        remedy = "Convert labels with .astype(int); wrap one-hot labels in Probs, as floats."
    raise TypeError(message_of(caller, argument, expected, f"bare {x.dtype}", remedy))


def require_labels(caller: str, labels: Array, layout: Layout) -> None:
    remedy = "Wrap soft labels in Probs or LogProbs."
    require_type(labels, int, caller, "labels", "integers", remedy)
    if len(layout.axis) != 1:
        got = f"{len(layout.axis)} class axes"
        fail(caller, "axis", "a single axis with integer labels", got, "Flatten the classes.")
    if labels.shape != layout.batch:
        expected = f"shape {layout.batch}, the batch shape"
        remedy = "Give one label per example; one-hot labels go in as Probs."
        fail(caller, "labels", expected, f"{labels.shape}", remedy)


def require_said_labels(caller: str, argument: str, labels: Any, *, fits: bool) -> None:
    if not fits:
        got = type(labels).__name__
        fail(caller, argument, "integers, Probs or LogProbs", got, "A teacher goes into `targets`.")


def require_no_smoothing(caller: str, label_smoothing: Any) -> None:
    if not is_static(label_smoothing, 0):
        expected, remedy = "left out with a distribution", "Mix it with the uniform one."
        fail(caller, "label_smoothing", expected, f"{label_smoothing}", remedy)


def require_parameters(caller: str, missing: list[str]) -> None:
    if missing:
        remedy = f"Pass {missing[0]}=…, or give it a default in the term."
        message = message_of(caller, missing[0], "given", "nothing", remedy)
        raise TypeError(message)


def require_divergence(caller: str, argument: str, value: Any, found: T | None) -> T:
    """What was found out about it, if it is one."""
    if found is None:
        expected = "a divergence of kljax, or a partial of one that binds its own parameters"
        remedy = "Make your own with kljax.divergence; options go to the call."
        raise TypeError(message_of(caller, argument, expected, repr(value), remedy))
    return found


def require_fraction(caller: str, argument: str, value: Any) -> Array:
    """A share in [0, 1]: what is not known while tracing is a value check."""
    if _is_static(value) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= 1)):
        fail(caller, argument, "in [0, 1]", f"{value}", "It is the share of one side in a mixture.")
    return require_number(caller, argument, value)


def require_temperature(caller: str, temperature: Any, batch: Shape) -> Array:
    """One number, or one per example."""
    if _is_static(temperature) and not np.all(np.asarray(temperature) > 0):
        fail(caller, "temperature", "positive", f"{temperature}", "Use None for no temperature.")
    temperature = to_array(caller, "temperature", temperature)
    if temperature.shape not in ((), batch):
        got, remedy = f"shape {temperature.shape}", "It is one number, or one per example."
        fail(caller, "temperature", f"a scalar, or of the batch shape {batch}", got, remedy)
    _require_real(temperature, caller, "temperature", "a real number", "Pass a float.")
    return temperature


def require_layout(
    caller: str, shapes: dict[str, Shape], axis: int | Iterable[int], class_axis_name: Any = None
) -> Layout:
    """Batch and classes of the whole input; nothing but a missing batch broadcasts."""
    whole = max(shapes, key=lambda argument: len(shapes[argument]))
    names = require_axis_names(caller, "class_axis_name", class_axis_name)
    layout = Layout.of(shapes[whole], require_axes(caller, shapes[whole], axis), names)
    if names and len(layout.axis) != 1:
        got = f"{len(layout.axis)} class axes"
        fail(caller, "axis", "a single axis with class_axis_name", got, "Flatten the classes.")
    for argument, shape in shapes.items():
        if shape not in (layout.shape, layout.classes):
            _fail_shape(caller, argument, shape, whole, layout)
    return layout


def require_contributions(caller: str, contributions: Any, shape: Shape) -> None:
    if getattr(contributions, "shape", None) != shape:
        got = f"{getattr(contributions, 'shape', type(contributions).__name__)}"
        remedy = "A term is elementwise: the library sums over the classes."
        fail(caller, "term", f"a function that returns shape {shape}", got, remedy)
    expected = "a function that returns floats"
    require_type(contributions, float, caller, "term", expected, "Convert them.")


def require_head(
    caller: str,
    argument: str,
    parts: dict[str, Array],
    softcap: float | None,
    transposed: bool,
) -> None:
    """The parts of an output head fit each other."""
    for part, x in parts.items():
        require_float(caller, f"{argument}.{part}", x)
    hidden, kernel = parts["hidden"].shape, parts["kernel"].shape
    if not hidden:
        fail(caller, f"{argument}.hidden", "shape batch + (H,)", "()", "Its last axis is H.")
    features = 1 if transposed else 0
    if len(kernel) != 2 or kernel[features] != hidden[-1]:
        wanted = f"(classes, {hidden[-1]})" if transposed else f"({hidden[-1]}, classes)"
        expected = f"shape {wanted}, for hidden states of shape {hidden}"
        remedy = "Slice it."
        if len(kernel) == 2 and kernel[1 - features] == hidden[-1]:
            remedy = "Transpose it." if transposed else "Say transposed=True."
        fail(caller, f"{argument}.kernel", expected, f"{kernel}", remedy)
    if "bias" in parts and parts["bias"].shape != (kernel[1 - features],):
        got, remedy = f"{parts['bias'].shape}", "It has one entry per class."
        fail(
            caller, f"{argument}.bias", f"shape {(kernel[1 - features],)}, the classes", got, remedy
        )
    if "scale" in parts:
        require_scalar(caller, f"{argument}.scale", parts["scale"])
    if softcap is not None and not (isinstance(softcap, numbers.Real) and softcap > 0):
        remedy = "It is static: a Python float, or None."
        fail(caller, f"{argument}.softcap", "a positive number", f"{softcap}", remedy)


def require_top_k(
    caller: str, argument: str, indices: Array, log_probs: Array, log_tail: Array | None
) -> None:
    """The parts of a top-k fit each other."""
    which, remedy = f"{argument}.indices", "They name classes."
    require_type(indices, int, caller, which, "integers", remedy)
    require_float(caller, f"{argument}.log_probs", log_probs)
    if indices.shape != log_probs.shape or not indices.shape:
        expected = f"shape {indices.shape}, like indices, with k last"
        fail(caller, f"{argument}.log_probs", expected, f"{log_probs.shape}", "One per index.")
    if log_tail is not None:
        require_float(caller, f"{argument}.log_tail", log_tail)
        if log_tail.shape != log_probs.shape[:-1]:
            expected = f"shape {log_probs.shape[:-1]}, one per distribution"
            got = f"{log_tail.shape}"
            fail(caller, f"{argument}.log_tail", expected, got, "It is the mass of the rest.")


def require_class_axis(caller: str, argument: str, shape: Shape) -> None:
    if not shape:
        fail(caller, argument, "an array with a class axis", "a scalar", "Classes come last.")


def require_classes(caller: str, argument: str, side: Any) -> None:
    """A distribution that says how many classes there are."""
    if not side.has_classes:
        remedy = "A top-k teacher goes in as the targets of forward_kl or another divergence."
        fail(caller, argument, "a whole distribution", type(side).__name__, remedy)


def require_logits(caller: str, argument: str, side: Any, *, fits: bool) -> None:
    if not fits:
        remedy = "Logarithms of probabilities are logits: pass those."
        fail(caller, argument, "logits or a Head", type(side).__name__, remedy)


def require_whole_classes(caller: str, argument: str, are_spread: bool) -> None:
    if are_spread:
        expected, got = "an array with all classes of an example on one device", "classes sharded"
        remedy = (
            "Only a gather of all logits could do it: jax.sharding.reshard them if that is meant."
        )
        fail(caller, argument, expected, got, remedy)


def require_count(caller: str, argument: str, value: Any, classes: int | None = None) -> int:
    """How many classes to keep or draw: the size of a result."""
    expected = "a positive int" if classes is None else f"an int in [1, {classes}], the classes"
    count = 0
    if not isinstance(value, bool | Tracer) and hasattr(value, "__index__"):
        count = operator.index(value)
    if count < 1 or (classes is not None and count > classes):
        fail(caller, argument, expected, f"{value}", "It is static, the size of the result.")
    return count


def require_all_classes(caller: str, argument: str, side: Any) -> None:
    if side.makes_classes:
        got = type(side).__name__
        fail(caller, argument, "an array of all classes", got, "Its terms are the whole array.")


def require_one_array(caller: str, argument: str, side: Any, *, fits: bool) -> None:
    if not fits:
        remedy = "distillation_loss has it among its metrics for any two sides."
        fail(caller, argument, "logits, LogProbs or Probs", type(side).__name__, remedy)


def require_implementation(
    caller: str, implementation: Any, chunked: type, *, only_whole: str | None, known: bool
) -> None:
    """One that there is, and that serves these arrays; `only_whole` says why no block does."""
    if implementation is None:
        return
    if not isinstance(implementation, chunked):
        choices = ("dense", "chunked")
        require_choice(caller, "implementation", implementation, choices, optional=True)
    if only_whole and implementation != "dense":
        remedy = 'Leave implementation=None or "dense", or use shard_map.'
        fail(caller, "implementation", f"able to serve {implementation}", only_whole, remedy)
    if not known and implementation != "dense":
        expected, remedy = 'None or "dense" with symbolic dimensions', "A block's size is a number."
        fail(caller, "implementation", expected, f"{implementation}", remedy)
    if isinstance(implementation, chunked):
        rows = implementation.rows
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            expected, got = "Chunked of a positive int of rows", f"Chunked(rows={rows!r})"
            fail(caller, "implementation", expected, got, "Give one.")


def require_classes_last(caller: str, argument: str, layout: Layout) -> None:
    if layout.axis != (len(layout.shape) - 1,):
        got = f"{_and(layout.axis)}"
        fail(caller, "axis", f"the last with the {argument} given", got, "Leave axis=-1.")


def require_tail(caller: str, tail: str, rest_is_known: bool) -> None:
    """What is infinite where targets are 0 must know what mass is outside K."""
    if tail == "renormalize":
        expected = "a tail that leaves the targets some mass outside the k classes"
        remedy = 'It would be infinite; use tail="bucket".'
        fail(caller, "targets.tail", expected, '"renormalize"', remedy)
    if tail == "bucket" and not rest_is_known:
        remedy = (
            "What log_probs lack from 1 is rounding noise where the teacher is confident, and the "
            "loss infinite where that is nothing: store log_tail, which kljax.top_k returns."
        )
        fail(caller, "targets.log_tail", 'given with tail="bucket"', "None", remedy)


def require_same_temperature(caller: str, taken_at: Any, temperature: Any) -> None:
    """A cached top-k cannot be given another; what is not known yet is a value check."""
    one, other = (1.0 if value is None else value for value in (taken_at, temperature))
    expected = f"{1.0 if taken_at is None else taken_at}, what the top-k was taken at"
    remedy = "A cached top-k cannot be given another: take it anew with top_k(…, temperature=…)."
    known = _is_static(one) and _is_static(other)
    if known and np.any(np.asarray(one, np.float32) != np.asarray(other, np.float32)):
        fail(caller, "temperature", expected, f"{temperature}", remedy)


_ELSEWHERE = {
    "T": "temperature",
    "tau": "temperature",
    "mask": "weights",
    "sample_weight": "weights",
    "weight": "weights",
    "dim": "axis",
    "num_items_in_batch": "normalizer",
}


def require_options(caller: str, given: Iterable[str], known: Collection[str]) -> None:
    """A misspelt option is told the nearest one, and other libraries' names their own."""
    for name in given:
        if name not in known:
            message = f"{caller}() has no option {name!r}; "
            if not known:
                raise TypeError(message + "it has none of its own.")
            (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0)
            meant = _ELSEWHERE.get(name, nearest)
            meant = meant if meant in known else nearest
            raise TypeError(f"{message}did you mean {meant!r}? It has {', '.join(known)}.")


def require_axes(
    caller: str, shape: Shape, axis: int | Iterable[int], argument: str = "axis"
) -> tuple[int, ...]:
    ndim = len(shape)
    try:
        given = tuple(map(operator.index, axis if isinstance(axis, Iterable) else (axis,)))
    except TypeError:
        fail(caller, argument, "an int or several", repr(axis), "Count from 0, or back from -1.")
    if any(not -ndim <= a < ndim for a in given):
        fail(
            caller, argument, f"within the {ndim} axes of shape {shape}", f"{axis}", "Count from 0."
        )
    axes = tuple(sorted(a % ndim for a in given))
    if len(set(axes)) != len(axes):
        fail(caller, argument, "distinct axes", f"{axis}", "Name each axis once.")
    return axes


def _fail_shape(caller: str, argument: str, shape: Shape, other: str, layout: Layout) -> NoReturn:
    same_rank = len(shape) == len(layout.shape)
    classes = tuple(shape[a] for a in layout.axis) if same_rank else shape
    if classes != layout.classes and len(classes) == len(layout.classes):
        expected = f"{_and(layout.classes)} classes along axis {_and(layout.axis)}, like {other}"
        remedy = (
            "Slice both to the classes that they share, a vocabulary to the tokenizer's size; "
            "never pad with zeros."
        )
        fail(caller, argument, expected, _and(classes), remedy)
    expected = f"shape {layout.shape}, like {other}, or {layout.classes}, one distribution for all"
    remedy = "Nothing else broadcasts; use jnp.broadcast_to where that is meant."
    fail(caller, argument, expected, f"{shape}", remedy)


def require_type(
    x: Array, kind: type, caller: str, argument: str, expected: str, remedy: str
) -> None:
    """By chex, in our words alone: it puts its own before them."""
    try:
        chex.assert_type(x, kind)
    except AssertionError:
        raise TypeError(message_of(caller, argument, expected, str(x.dtype), remedy)) from None


def _require_real(x: Array, caller: str, argument: str, expected: str, remedy: str) -> None:
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)):
        require_type(x, float, caller, argument, expected, remedy)


def _and(sizes: Iterable[Any]) -> str:
    return " and ".join(map(str, sizes))


def message_of(caller: str, argument: str, expected: str, got: str, remedy: str) -> str:
    verb = "have" if expected.startswith("shape ") or expected[0].isdigit() else "be"
    return f"{caller}: {argument} must {verb} {expected}; got {got}. {remedy}"


def is_static(value: Any, number: float) -> bool:
    """Whether an option is known to be this number while tracing."""
    return _is_static(value) and np.shape(value) == () and bool(value == number)


def is_known_size(n: Any) -> bool:
    """Whether a dimension is a number, not a symbol of `jax.export`."""
    return isinstance(n, int)


def _is_static(value: Any) -> bool:
    """Whether the value can be read while tracing."""
    if isinstance(value, Array):
        return not isinstance(value, Tracer) and value.is_fully_addressable
    return isinstance(value, numbers.Real | np.ndarray)


# ---- training ----


def require_step(caller: str, argument: str, step: Any) -> None:
    if step is None:
        expected, remedy = f"given where {argument} is a schedule", "Pass step=… to the call."
        fail(caller, "step", expected, "None", remedy)


def require_multiple(caller: str, argument: str, arrays: list[Array], steps: int) -> None:
    """All of as many examples, which fall into so many micro-batches."""
    sizes = sorted({x.shape[0] if x.ndim else 1 for x in arrays})
    if len(sizes) != 1 or sizes[0] % steps:
        expected, got = f"of a multiple of {steps} examples, in every array", f"{_and(sizes)}"
        fail(caller, argument, expected, got, "Pad it with examples of weight 0.")


def require_given(caller: str, argument: str, value: Any, passed: str) -> None:
    if value is None:
        remedy = f"Call tx.update(updates, state, …, {passed})."
        fail(caller, argument, "given to update", "None", remedy)


# ---- latent variables ----


def require_mean(caller: str, argument: str, value: str, reduction: str, serves_all: bool) -> None:
    if reduction != "mean" and not serves_all:
        expected, got = 'given with reduction="mean"', f'"{value}" with reduction="{reduction}"'
        fail(caller, argument, expected, got, "What is compared with λ is a mean over examples.")


def require_prior(caller: str, posterior: Any, is_normal: bool) -> None:
    if not is_normal:
        expected = f"given with a posterior of {type(posterior).__name__}"
        remedy = "Only normal distributions have a standard one."
        raise TypeError(message_of(caller, "prior", expected, "None", remedy))


def require_apart(
    caller: str, argument: str, axes: tuple[int, ...], class_axes: tuple[int, ...]
) -> None:
    if set(axes) & set(class_axes):
        remedy = "For batch + (latents, classes) it is -2; for one latent, ()."
        expected = f"other axes than class_axis, {_and(class_axes)}"
        fail(caller, argument, expected, _and(axes), remedy)


# ---- samples ----


def require_same_shape(caller: str, argument: str, shape: Shape, whole: Shape, other: str) -> None:
    if shape != whole:
        remedy = "Each is of the same samples."
        fail(caller, argument, f"shape {whole}, like {other}", f"{shape}", remedy)


def require_positive(caller: str, argument: str, value: Any) -> None:
    if _is_static(value) and not np.all(np.asarray(value) > 0):
        fail(caller, argument, "positive", f"{value}", "Use None for none.")


def require_beside(caller: str, argument: str, other: str, value: Any) -> None:
    if value is None:
        fail(caller, argument, f"given with {other}", "it alone", "There is nothing to truncate.")


# ---- parametric families ----


def require_one_of(caller: str, argument: str, given: tuple[str, ...], one_of: Names) -> None:
    """Exactly one of the parameters that say the same."""
    found = [name for name in one_of if name in given]
    if one_of and len(found) != 1:
        got = _and(found) if found else "none of them"
        fail(caller, argument, f"made of one of {', '.join(one_of)}", got, "They say the same.")


def require_event(caller: str, argument: str, x: Array, event_axes: int) -> None:
    _require_real(x, caller, argument, "real numbers", "Convert them.")
    if x.ndim < event_axes:
        expected = f"an array of at least {event_axes} axes"
        fail(caller, argument, expected, f"shape {x.shape}", "Its last axes are the event's.")
    if event_axes == 2 and x.shape[-1] != x.shape[-2]:
        fail(caller, argument, "square matrices", f"shape {x.shape}", "They are the last two axes.")


def require_same_events(caller: str, argument: str, sizes: dict[str, int]) -> None:
    if len(set(sizes.values())) > 1:
        got = ", ".join(f"{name} {size}" for name, size in sizes.items())
        remedy = "An event does not broadcast."
        fail(caller, argument, "of events of one size", got, remedy)


def require_broadcasting(
    caller: str, argument: str, shape: Callable[[], Shape], shapes: dict[str, Shape]
) -> Shape:
    """Batch shapes that broadcast: then what they broadcast to."""
    try:
        return shape()
    except ValueError:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        remedy = "Batch shapes broadcast as in NumPy; the axes of an event do not."
        fail(caller, argument, "of shapes that broadcast", got, remedy)


def require_no_classes(caller: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if value is not None:
            remedy = "It is an option of distributions over classes."
            fail(caller, option, "left out with a parametric family", "it", remedy)


def require_same_family(caller: str, sides: dict[str, Any], family: type) -> None:
    first, *others = sides.items()
    if not isinstance(first[1], family):
        first, others = others[0], [first]
    kind = type(first[1])
    for argument, side in others:
        if type(side) is not kind:
            got = "Array" if isinstance(side, Array) else type(side).__name__
            expected = f"{kind.__name__}, like {first[0]}"
            remedy = "Closed forms are of two of the same family."
            raise TypeError(message_of(caller, argument, expected, got, remedy))


def require_closed_form(caller: str, side: Any, has_one: Any) -> None:
    if not has_one:
        expected = "a distribution over classes"
        remedy = "Families have closed forms for KL in both directions and Jeffreys; sample others."
        got = type(side).__name__
        raise TypeError(message_of(caller, "predictions", expected, got, remedy))


def require_entropy(caller: str, side: Any, found: T | None) -> T:
    if found is None:
        got, remedy = type(side).__name__, "Sum or sample it; its KL divergence has a closed form."
        message = message_of(caller, "the distribution", "one of known entropy", got, remedy)
        raise TypeError(message)
    return found


def require_classed(caller: str, argument: str, value: Any, are_classes: bool) -> None:
    if not are_classes:
        expected, got = "a distribution over classes", type(value).__name__
        remedy = "Families go to kl, forward_kl, reverse_kl, jeffreys, entropy, cross_entropy."
        raise TypeError(message_of(caller, argument, expected, got, remedy))


# ---- what the value checks ask and find ----


def require_known(caller: str, leaves: Iterable[Any]) -> None:
    """It stands outside all transforms."""
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        remedy = f"{caller} stands outermost: {caller}(jit(f)), {caller}(grad(f))."
        fail(caller, "arguments", "known values", "those of another transform", remedy)


def require_no_report(message: str | None) -> None:
    if message:
        raise ValueError(message.removesuffix(" (`check` failed)"))


def require_values(caller: str, values: Any) -> Any:
    if values is None:
        expected = "given, or predictions and targets"
        message = message_of(caller, "values", expected, "none of them", "Pass one or the other.")
        raise TypeError(message)
    return values
