"""MXNet Gluon's `gluon.loss.KLDivLoss`."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax.compat import _checks
from kljax.compat import _elements as elements

Aggregate = Literal["mean", "sum"]

_EPSILON = 1e-12


class KLDivLoss:
    r"""Gluon's ``KLDivLoss``: one value for each example of the batch, D(label‖pred).

    .. math:: \ell_n = \operatorname{mean}_i \, w_{ni} \, y_{ni} (\log(y_{ni} + 10^{-12}) - x_{ni})

    Called with ``(pred, label, sample_weight=None)``. The mean is over all axes but the batch's,
    so it divides by the classes too, and by masked entries: MXNet up to 1.8 and 2.0 compute this,
    as does its tutorial. MXNet 1.9 sums instead, though it documents a mean: ``aggregate="sum"``.
    The epsilon inside the logarithm is part of MXNet's numbers.

    Shapes: pred and label broadcast against each other, sample weights against their result; all
    axes but the batch axis are reduced. The result has the promoted dtype; 16-bit inputs are
    computed in float32 and rounded once. Units: nats.

    Zeros: a label of 0 contributes 0, also under a pred of -inf (MXNet: NaN), and a weight of 0
    removes what it weights, whatever it is (MXNet: NaN from an infinity). +inf where only the
    prediction is 0. NaN gives NaN.
    Gradients: to pred, label and sample weights, in every mode. To a label of 0 it is
    log 1e-12 - pred, about -27.6 - pred, as in MXNet, and 0 under a pred of -inf.

    Args:
        from_logits: True says that pred holds log-probabilities; False takes its log_softmax. (In
            Keras and TensorFlow these words mean the opposite.)
        axis: The axis of that softmax.
        weight: A number that multiplies the loss.
        batch_axis: The axis that is kept.
        aggregate: "mean", or "sum" for MXNet 1.9.

    Raises:
        ValueError: For shapes or axes that do not fit (MXNet's MXNetError), an unknown aggregate.
            TypeError: when called, for anything but arrays of floats, or a weight that is no
            number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from kljax.compat.gluon import KLDivLoss
        >>> pred, label = jnp.log(jnp.array([[0.25, 0.75]])), jnp.array([[0.5, 0.5]])
        >>> mean, total = KLDivLoss(), KLDivLoss(aggregate="sum")
        >>> print(f"{mean(pred, label)[0]:.4f} {total(pred, label)[0]:.4f}")
        0.0719 0.1438

    Source: Apache MXNet 1.8, 1.9 and 2.0, python/mxnet/gluon/loss.py.
    """

    def __init__(
        self,
        from_logits: bool = True,
        axis: int = -1,
        weight: float | None = None,
        batch_axis: int = 0,
        *,
        aggregate: Aggregate = "mean",
    ):
        checks.require_choice(_NAME, "aggregate", aggregate, get_args(Aggregate))
        self.from_logits: bool = from_logits
        self.axis: int = axis
        self.weight: float | None = weight
        self.batch_axis: int = batch_axis
        self.aggregate: Aggregate = aggregate

    def __call__(
        self, pred: ArrayLike, label: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> Array:
        given = {"pred": pred, "label": label, "sample_weight": sample_weight}
        sides = {name: _floats(name, side) for name, side in given.items() if side is not None}
        if self.weight is not None:
            checks.require_number(_NAME, "weight", self.weight)
        shapes = {argument: side.shape for argument, side in sides.items()}
        _checks.require_broadcastable(_NAME, shapes)
        shape = jnp.broadcast_shapes(*shapes.values())
        (batch_axis,) = _checks.require_axis(_NAME, shape, self.batch_axis)
        axis = None if self.from_logits else self.axis
        if axis is not None:
            _checks.require_axis(_NAME, shapes["pred"], axis)
        return _loss(sides, self.weight, axis, batch_axis, self.aggregate)

    def __repr__(self) -> str:
        return f"KLDivLoss(batch_axis={self.batch_axis}, w={self.weight})"


_NAME = "KLDivLoss"


def _floats(argument: str, side: ArrayLike) -> Array:
    _checks.require_array(_NAME, argument, side)
    side = jnp.asarray(side)
    _checks.require_wide_float(_NAME, argument, side)
    return side


@partial(jax.jit, static_argnames=("softmax_axis", "batch_axis", "aggregate"))
def _loss(
    sides: dict[str, Array],
    weight: ArrayLike | None,
    softmax_axis: int | None,
    batch_axis: int,
    aggregate: Aggregate,
) -> Array:
    dtype = elements.promoted(*(side.dtype for side in sides.values()))
    (x,) = elements.computed(sides["pred"])
    if softmax_axis is not None:
        x = jax.nn.log_softmax(x, softmax_axis)
    w = sides.get("sample_weight", jnp.ones((), x.dtype))
    x, y, w = elements.computed(x, sides["label"], w)
    gone = (w == 0) & ~jnp.isfinite(_terms(x, y))
    values = w * _terms(jnp.where(gone, 0, x), jnp.where(gone, 0, y))
    if weight is not None:
        values = values * jnp.asarray(weight, values.dtype)
    others = tuple(i for i in range(values.ndim) if i != batch_axis)
    reduce = jnp.mean if aggregate == "mean" else jnp.sum
    return reduce(values, others).astype(dtype)


def _terms(x: Array, y: Array) -> Array:
    """Not the core's term: the epsilon makes the gradient to a label of 0 finite."""
    masked = (y == 0) & jnp.isneginf(x)
    return y * (jnp.log(y + _EPSILON) - jnp.where(masked, 0, x))
