"""PyTorch's `torch.nn.functional.kl_div` and `torch.nn.KLDivLoss`."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax._engine.terms import term_kl
from kljax.compat import _checks
from kljax.compat import _elements as elements


def kl_div(
    input: ArrayLike,
    target: ArrayLike,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Array:
    r"""PyTorch's ``kl_div``: elementwise D(target‖input), then a reduction of its own.

    .. math:: \ell_i = t_i (\log t_i - x_i), \quad
              \text{batchmean} = \frac{\sum_i \ell_i}{N}, \quad
              \text{mean} = \frac{\sum_i \ell_i}{\text{number of elements}}

    "mean" is not a mean over examples and warns, as PyTorch does: "batchmean" is.

    Shapes: any, and they broadcast. "none" gives the broadcast shape, the others a scalar. N is
    the leading size of ``input`` alone, 1 if it has no axes. The result has PyTorch's promoted
    dtype, but 16-bit inputs are computed in float32 and rounded once. Units: nats.

    Zeros: three differences from PyTorch, whose value or gradient is NaN there though the
    mathematics is not. A target of 0 under an input of -inf contributes 0. So does a log-target
    of -inf, whatever the input; one so low that its exponential is 0 gives +inf over -inf. And
    the gradient to a target of 0, or a log-target of -inf, is 0. Subnormal targets count as 0
    wherever XLA flushes them. NaN gives NaN, and so does a negative target.
    Gradients: to both sides, in every mode.

    Args:
        input: Log-probabilities: an array of JAX or NumPy. Lists and numbers raise.
        target: Probabilities, or log-probabilities with ``log_target``.
        size_average: Deprecated: overrides ``reduction``, but does not undo "batchmean".
        reduce: Deprecated, likewise.
        reduction: "none", "mean", "sum" or "batchmean"; "elementwise_mean" is "mean".
        log_target: Whether ``target`` holds log-probabilities.

    Raises:
        ValueError: For an unknown reduction; for shapes that do not broadcast (PyTorch's
            RuntimeError).
        TypeError: For anything but arrays of floats, or a ``log_target`` that is not bool.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kljax.compat.torch import kl_div
        >>> input = jax.nn.log_softmax(jnp.array([[1.0, 2.0, 3.0]]))
        >>> print(f"{kl_div(input, jnp.array([[0.0, 0.5, 0.5]]), reduction='batchmean'):.4f}")
        0.2145

    Source: PyTorch 2.13, torch/nn/functional.py and aten/src/ATen/native/Loss.cpp.
    """
    name = "kl_div"
    if size_average is not None or reduce is not None:
        kind = _legacy_reduction(size_average, reduce)
    else:
        kind = _checked_reduction(name, reduction)
    for argument, side in (("input", input), ("target", target)):
        _checks.require_array(name, argument, side)
    _checks.require_bool(name, "log_target", log_target)
    input, target = jnp.asarray(input), jnp.asarray(target)
    _checks.require_wide_float(name, "input", input)
    _checks.require_wide_float(name, "target", target)
    _checks.require_broadcastable(name, {"input": input.shape, "target": target.shape})
    batch = input.shape[0] if reduction == "batchmean" and input.ndim else None
    return _kl_div(input, target, kind, batch, bool(log_target))


class KLDivLoss:
    """PyTorch's ``KLDivLoss``: `kl_div` with its options bound, called with (input, target).

    As there, the deprecated ``size_average`` and ``reduce`` become a ``reduction`` when the loss
    is made, with a warning, and everything else is checked when it is called.
    """

    def __init__(
        self,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        log_target: bool = False,
    ):
        if size_average is not None or reduce is not None:
            reduction = _legacy_reduction(size_average, reduce)
        self.reduction = reduction
        self.log_target = log_target

    def __call__(self, input: ArrayLike, target: ArrayLike) -> Array:
        return kl_div(input, target, reduction=self.reduction, log_target=self.log_target)

    def __repr__(self) -> str:
        return "KLDivLoss()"


@partial(jax.jit, static_argnames=("kind", "batch", "log_target"))
def _kl_div(input: Array, target: Array, kind: str, batch: int | None, log_target: bool) -> Array:
    dtype = _result_dtype(input, target)
    log_q, t = elements.computed(input, target)
    values = term_kl(t, log_q) if log_target else elements.kl_of_probs(t, log_q)
    if kind != "none":
        count = values.size if kind == "mean" else 1
        values = jnp.sum(values) / count
    return (values if batch is None else values / batch).astype(dtype)


def _result_dtype(input: Array, target: Array) -> jnp.dtype:
    """PyTorch's promotion: an array without axes yields to one with axes."""
    ranked = [side for side in (input, target) if side.ndim] or [input, target]
    return elements.promoted(*(side.dtype for side in ranked))


def _checked_reduction(name: str, reduction: Any) -> str:
    if reduction == "mean":
        _warn(
            "reduction: 'mean' divides the total loss by both the batch size and the support size."
            "'batchmean' divides only by the batch size, and aligns with the KL div math "
            "definition. 'mean' stays as it is here."
        )
    elif reduction == "elementwise_mean":
        _warn("reduction='elementwise_mean' is deprecated. Please use reduction='mean' instead.")
    checks.require_choice(name, "reduction", reduction, _KINDS)
    return _KINDS[reduction]


_KINDS = {
    "none": "none",
    "mean": "mean",
    "sum": "sum",
    "batchmean": "sum",
    "elementwise_mean": "mean",
}


def _legacy_reduction(size_average: Any, reduce: Any) -> str:
    if reduce is not None and not reduce:
        reduction = "none"
    else:
        reduction = "mean" if size_average is None or size_average else "sum"
    _warn(
        "size_average and reduce args will be deprecated, "
        f"please use reduction='{reduction}' instead."
    )
    return reduction


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
