"""Make the golden values: what other systems' own packages compute.

    python tests/golden/make.py [torch] [torchmetrics] [optax] [keras] [gluon] [--output FOLDER]

Without names, all of them. Each needs its package (optax and keras run on JAX), but for Gluon: the
numbers of MXNet, which installs nowhere any more, come from its published formula in float64.
Every case holds the inputs, the result and its gradients to all inputs, for the cotangent that
`cotangent` says. Numbers are written as they are: NaN where a system gives NaN.
"""

import argparse
import itertools
import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

INF, NAN = float("inf"), float("nan")


def cotangent(shape):
    """What gradients are taken of: the result times these numbers, which bfloat16 holds too."""
    return 0.5 + np.arange(np.prod(shape, dtype=int)).reshape(shape) % 4 / 4


def log_probs(rng, shape):
    """Log-probabilities along the last axis, exact in bfloat16."""
    x = rng.normal(size=shape)
    return short(x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True)))


def probs(rng, shape):
    """Probabilities along the last axis, exact in bfloat16, so only nearly normalised."""
    return short(np.exp(log_probs(rng, shape)))


def short(x):
    """Round to 8 bits of mantissa."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def numbers(x):
    """Nested lists of the shortest digits that give the number back."""
    x = np.asarray(x)
    if x.dtype == np.float32:
        return [numbers(row) for row in x] if x.ndim else float(str(x))
    return x.astype(np.float64).tolist()


# ---- PyTorch ----


def torch_cases():
    import torch

    rng = np.random.default_rng(1)
    shape, classes = (2, 3, 4), (4,)
    inputs = {
        "same": (log_probs(rng, shape), probs(rng, shape)),
        "shared target": (log_probs(rng, (3, 4)), probs(rng, classes)),
        "shared input": (log_probs(rng, classes), probs(rng, (3, 4))),
        "a row": (log_probs(rng, (1, 4)), probs(rng, (3, 4))),
        "two scalars": (np.float64(-0.75), np.float64(0.5)),
        "scalar target": (log_probs(rng, classes), np.float64(0.25)),
        "scalar input": (np.float64(-1.5), probs(rng, classes)),
        "no rows": (np.zeros((0, 4)), np.zeros((0, 4))),
        "no classes": (np.zeros((3, 0)), np.zeros((3, 0))),
    }
    grid = ("none", "mean", "sum", "batchmean"), (False, True)
    some = ("sum", False), ("mean", False), ("batchmean", True), ("none", True)
    wide, mixed = ("float64", "float64"), [("float32", "bfloat16"), ("bfloat16", "float16")]
    plans = [
        ("same", (dtype, dtype), *options)
        for dtype in ("float64", "float32", "bfloat16", "float16")
        for options in itertools.product(*grid)
    ]
    plans += [(name, wide, *options) for name in inputs for options in some if name != "same"]
    plans += [("same", dtypes, "batchmean", False) for dtypes in mixed]
    plans += [(name, ("float64", "float32"), "none", False) for name in ("scalar target", "same")]
    plans += [(name, ("float64", "float32"), "none", False) for name in ("scalar input",)]
    for name, dtypes, reduction, log_target in plans:
        x, t = inputs[name]
        t = short(np.log(t)) if log_target else t
        sides = [torch_tensor(side, dtype) for side, dtype in zip((x, t), dtypes, strict=True)]
        options = {"reduction": reduction, "log_target": log_target}
        yield {"name": name, **torch_case(torch.nn.functional.kl_div, sides, dtypes, options)}
    for log_target, targets in (
        (False, [0.0, -0.0, 1.0, 0.5, 1e-30, NAN]),
        (True, [-INF, 0.0, -1.0, -50.0, 2.0, NAN]),
    ):
        x, t = (a.ravel() for a in np.meshgrid([-INF, INF, NAN, 0.0, -1.0, -50.0, 2.0], targets))
        sides, dtypes = [torch_tensor(side, "float32") for side in (x, t)], ("float32", "float32")
        options = {"reduction": "none", "log_target": log_target}
        case = torch_case(torch.nn.functional.kl_div, sides, dtypes, options)
        yield {"name": "special points", **case}
    x, t = (torch_tensor(side, "float64") for side in inputs["same"])
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        for reduction in ("mean", "batchmean", "none", "elementwise_mean", "banana"):
            arguments = (size_average, reduce, reduction)
            yield {"name": "legacy", "arguments": arguments, **torch_legacy(x, t, arguments)}


def torch_tensor(x, dtype):
    import torch

    return torch.tensor(x, dtype=getattr(torch, dtype), requires_grad=True)


def torch_case(function, sides, dtypes, options):
    import torch

    value = function(*sides, **options)
    ones = torch.tensor(cotangent(tuple(value.shape)), dtype=value.dtype)
    gradients = torch.autograd.grad(value, sides, ones)
    plain = [x.detach() for x in (*sides, value, *gradients)]
    *given, value_out, gx, gt = [
        numbers(x.numpy() if x.dtype in (torch.float32, torch.float64) else x.double().numpy())
        for x in plain
    ]
    return {
        "options": options,
        "dtypes": dtypes,
        "inputs": given,
        "dtype": str(value.dtype).removeprefix("torch."),
        "value": value_out,
        "gradients": [gx, gt],
    }


def torch_legacy(x, t, arguments):
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = torch.nn.functional.kl_div(x, t, *arguments)
            result = {"value": numbers(value.detach().numpy()), "error": None}
        except ValueError:
            result = {"value": None, "error": "ValueError"}
    return {
        "inputs": [numbers(side.detach().numpy()) for side in (x, t)],
        "warnings": [str(one.message) for one in caught],
        **result,
    }


# ---- torchmetrics ----


def torchmetrics_cases():
    import torch
    import torchmetrics.functional.regression as functional
    import torchmetrics.regression as metrics

    rng = np.random.default_rng(2)
    logs = [log_probs(rng, (3, 4)) for _ in range(2)]
    counts = [short(rng.gamma(2.0, size=(3, 4)) + 0.125) for _ in range(2)]
    for name in ("kl_divergence", "jensen_shannon_divergence"):
        plans = list(itertools.product(("float64",), (False, True), ("mean", "sum", "none", None)))
        for dtype in ("float32", "bfloat16"):
            plans += [(dtype, False, "mean"), (dtype, True, "none")]
        for dtype, log_prob, reduction in plans:
            sides = [torch_tensor(x, dtype) for x in (logs if log_prob else counts)]
            options = {"log_prob": log_prob, "reduction": reduction}
            case = torch_case(getattr(functional, name), sides, (dtype, dtype), options)
            yield {"name": name, **case}
        zeros = [[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
        others = [[0.0, 1.0, 2.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
        sides = [torch_tensor(np.array(x), "float32") for x in (zeros, others)]
        options = {"reduction": "none"}
        case = torch_case(getattr(functional, name), sides, ("float32",) * 2, options)
        yield {"name": name, "zeros": True, **case}
    for name, dtype, reduction in itertools.product(
        ("KLDivergence", "JensenShannonDivergence"), ("float64", "float32"), ("mean", "sum", "none")
    ):
        first, second = (getattr(metrics, name)(reduction=reduction) for _ in range(2))
        batches, forward = [], []
        for rows in (3, 1, 4):
            p, q = (torch_tensor(rng.gamma(2.0, size=(rows, 3)), dtype).detach() for _ in range(2))
            forward.append(numbers(first(p, q).numpy()))
            second.update(q, p)
            batches.append([numbers(p.numpy()), numbers(q.numpy())])
        alone = first.compute()
        first._computed = None  # else it answers from before the merge
        first.merge_state(second)
        yield {
            "name": name,
            "options": {"reduction": reduction},
            "input dtype": dtype,
            "batches": batches,
            "forward": forward,
            "dtype": str(alone.dtype).removeprefix("torch."),
            "value": numbers(alone.numpy()),
            "merged": numbers(first.compute().numpy()),
        }
    assert torch


# ---- Optax and Keras, on JAX ----


def jax_case(function, sides, dtypes, options, given):
    import jax
    import jax.numpy as jnp

    sides = [jnp.asarray(side).astype(dtype) for side, dtype in zip(sides, dtypes, strict=True)]

    @jax.jit
    def run(*sides):
        value, pull = jax.vjp(lambda *sides: function(*sides, **options), *sides)
        return value, pull(jnp.asarray(cotangent(value.shape)).astype(value.dtype))

    value, gradients = run(*sides)
    return {
        "options": given,
        "dtypes": dtypes,
        "inputs": [numbers(side) for side in sides],
        "dtype": str(value.dtype),
        "value": numbers(value),
        "gradients": [numbers(gradient) for gradient in gradients],
    }


def optax_cases():
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(3)
    shape = (3, 4)
    x, t = log_probs(rng, shape), probs(rng, shape)
    mask = np.array([[True, True, False, True], [False] * 4, [True, False, True, True]])
    everywhere = [{}, {"axis": 0}, {"axis": None}, {"axis": [0, 1]}, {"where": mask.tolist()}]
    per_row, per_class = {"where": [True, False, True]}, {"where": [True, False, True, True]}
    for name in (
        "kl_divergence",
        "kl_divergence_with_log_targets",
        "generalized_kl_divergence",
        "softmax_cross_entropy",
    ):
        function = getattr(optax.losses, name)
        second = short(np.log(t)) if name.endswith("log_targets") else t
        more = per_row if name == "softmax_cross_entropy" else per_class
        plans = [("float64", options) for options in [*everywhere, more]]
        plans += [(d, options) for d in ("float32", "bfloat16") for options in ({}, everywhere[-1])]
        for dtype, given in plans:
            options = dict(given)
            if "where" in given:
                options["where"] = np.array(given["where"])
            if given.get("axis") == [0, 1]:
                options["axis"] = (0, 1)
            yield {
                "name": name,
                **jax_case(function, (x, second), (dtype, dtype), options, given),
            }
        for name_of_shapes, sides in (
            ("shared first", (x[0], second)),
            ("shared second", (x, second[:1])),
        ):
            case = jax_case(function, sides, ("float64",) * 2, {}, {})
            yield {"name": name, "shapes": name_of_shapes, **case}
        targets = [-INF, 0.0, -1.0, -50.0] if name.endswith("log_targets") else [0.0, 1.0, 0.5]
        sides = [a.reshape(-1, 1) for a in np.meshgrid([-INF, 0.0, -1.0, -50.0], targets)]
        if name == "softmax_cross_entropy":
            logits = np.array([[1.0, -INF, 1.0], [1.0, -INF, 1.0], [1e4, 0.0, 0.0]])
            sides = [logits, np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])]
        case = jax_case(function, sides, ("float32",) * 2, {}, {})
        yield {"name": name, "special": True, **case}


def keras_cases():
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(4)
    values = [0.0, 1e-8, 1e-7, 0.25, 1.0, 1.5, -0.5, NAN, INF]
    special = [a.reshape(-1, 1) for a in np.meshgrid(values, values)]
    one_hot = np.eye(4)[[0, 2, 3]]
    s, t = probs(rng, (3, 4)), probs(rng, (3, 4))
    function = keras.losses.kl_divergence
    for name, dtypes, sides in [
        ("soft", ("float64",) * 2, (t, s)),
        ("soft", ("float32",) * 2, (t, s)),
        ("soft", ("bfloat16",) * 2, (t, s)),
        ("mixed", ("float32", "bfloat16"), (t, s)),
        ("mixed", ("float64", "float32"), (t, s)),
        ("one-hot", ("float64",) * 2, (one_hot, s)),
        ("one-hot", ("float32",) * 2, (one_hot, one_hot[::-1].copy())),
        ("shared", ("float64",) * 2, (t[0], s)),
        ("special points", ("float32",) * 2, special),
    ]:
        yield {"name": name, **jax_case(function, sides, dtypes, {}, {})}


# ---- Gluon: the published formula, in float64 ----


def gluon_cases():
    rng = np.random.default_rng(5)
    shape = (3, 2, 4)
    pred, label = log_probs(rng, shape), probs(rng, shape)
    label[0, 0, 1] = label[2, 1, 0] = 0.0
    by_example = np.array([0.5, 2.0, 0.0]).reshape(3, 1, 1)
    by_class = short(rng.uniform(size=shape))
    for options, weights in [
        ({}, None),
        ({"aggregate": "sum"}, None),
        ({"from_logits": False}, None),
        ({"from_logits": False, "axis": 1}, None),
        ({"batch_axis": 1, "weight": 3.0}, None),
        ({"batch_axis": -1, "aggregate": "sum"}, by_class),
        ({"weight": 0.5}, by_example),
        ({"from_logits": False, "aggregate": "sum"}, by_example),
    ]:
        yield {"name": "tensor", **gluon_case(pred, label, weights, **options)}
    points = np.meshgrid([0.0, -1.0, -50.0], [0.0, 1.0, 0.25])
    yield {"name": "special points", **gluon_case(*(a.ravel() for a in points), None)}
    infinite = np.array([0.5, 1.0]), np.array([-INF, -INF])
    yield {"name": "infinite", **gluon_case(infinite[1], infinite[0], None)}


def gluon_case(
    pred, label, weights, *, from_logits=True, axis=-1, weight=None, batch_axis=0, aggregate="mean"
):
    """label * (log(label + 1e-12) - pred), weighted, reduced over all axes but the batch's."""
    log_q = pred
    if not from_logits:
        exp = np.exp(pred - pred.max(axis, keepdims=True))
        log_q = np.log(exp / exp.sum(axis, keepdims=True))
    scale = np.ones(pred.shape)
    if weights is not None:
        scale = scale * weights
    if weight is not None:
        scale = scale * weight
    others = tuple(i for i in range(pred.ndim) if i != batch_axis % pred.ndim)
    if aggregate == "mean":
        scale = scale / np.prod([pred.shape[i] for i in others], dtype=int)
    gap = np.log(label + 1e-12) - log_q
    with np.errstate(invalid="ignore"):
        value = np.sum(label * gap * scale, axis=others)
    out = np.expand_dims(cotangent(value.shape), others) * scale
    to_label = out * (gap + label / (label + 1e-12))
    to_pred = -out * label
    if not from_logits:
        to_pred = to_pred - np.exp(log_q) * to_pred.sum(axis, keepdims=True)
    options = {"from_logits": from_logits, "axis": axis, "weight": weight}
    return {
        "options": {**options, "batch_axis": batch_axis, "aggregate": aggregate},
        "inputs": [numbers(x) for x in (pred, label)],
        "weights": None if weights is None else numbers(weights),
        "value": numbers(value),
        "gradients": [numbers(x) for x in (to_pred, to_label)],
    }


SYSTEMS = {
    "torch": torch_cases,
    "torchmetrics": torchmetrics_cases,
    "optax": optax_cases,
    "keras": keras_cases,
    "gluon": gluon_cases,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="*", choices=[[], *SYSTEMS], default=list(SYSTEMS))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    for name in given.systems:
        made = "MXNet's published formula" if name == "gluon" else f"{name} {version(name)}"
        lines = ",\n".join(json.dumps(case) for case in SYSTEMS[name]())
        text = f'{{"made with": {json.dumps(made)}, "cases": [\n{lines}\n]}}\n'
        (given.output / f"{name}.json").write_text(text)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
