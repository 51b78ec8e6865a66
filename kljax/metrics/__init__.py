"""Divergences over a data set: a state that batches are added to, and that merges with others.

`Divergence` is the state, plain JAX; `kljax.metrics.nnx` holds the same as a `flax.nnx.Metric`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export, lax
from jax.typing import ArrayLike

from kljax._engine import checks, meshes, value_checks
from kljax._engine.terms import weigh
from kljax.distributions import Distribution, Logits, LogProbs, Probs
from kljax.reduction import AxisName

# The histogram: bins of equal width in log(value). Beyond them only the extremes are known.
_WIDTH = 0.039
_LOWEST, _BINS = -29.0, 1024  # from 3e-13 to 5e4 nats


@partial(export.register_namedtuple_serialization, serialized_name="kljax.metrics.Summary")
class Summary(NamedTuple):
    """What is known of all examples together; NaN where there are none.

    Args:
        mean: Weighted.
        minimum: Of the examples whose weight is not 0.
        maximum: Likewise.
        agreement: Weighted share; NaN unless updates told it.
        weight_sum: The number of examples where there were no weights.
    """

    mean: Array
    minimum: Array
    maximum: Array
    agreement: Array
    weight_sum: Array


@partial(export.register_namedtuple_serialization, serialized_name="kljax.metrics._Sum")
class _Sum(NamedTuple):
    """high + low, not added: a sum of twice its dtype's precision."""

    high: Array
    low: Array


@partial(export.register_namedtuple_serialization, serialized_name="kljax.metrics._Sums")
class _Sums(NamedTuple):
    weight: _Sum
    value: _Sum
    compared: _Sum
    agreeing: _Sum
    histogram: _Sum


@partial(export.register_namedtuple_serialization, serialized_name="kljax.metrics.Divergence")
class Divergence(NamedTuple):
    r"""The values of a divergence, or of anything else, over a stream of examples.

    .. math:: \text{mean} = \frac{\sum_n w_n \ell_n}{\sum_n w_n}

    An immutable pytree: ``empty()`` makes one, ``update`` and ``merge`` return a new one,
    ``compute()`` and ``quantile(q)`` read it; all of them inside ``jit``, ``scan`` and
    ``shard_map`` too. The order of batches and merges does not matter: sums carry their rounding
    errors along, so that the mean of 10\ :sup:`7` float32 examples is right to the last digit or
    two. An example of weight 0 has no effect whatever it holds; any other NaN shows in the mean
    and the extremes.

    Across devices, pass ``axis_name`` to ``update`` and the state is that of all of them. Across
    processes, gather the states, ``multihost_utils.process_allgather(state)``, and merge them.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> from kljax.metrics import Divergence
        >>> state = Divergence.empty()
        >>> state = state.update(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1, 1, 0]))
        >>> state = state.merge(Divergence.empty().update(jnp.array([5.0])))
        >>> print(state.compute().mean, state.compute().maximum)
        3.0 5.0
    """

    sums: _Sums
    minimum: Array
    maximum: Array

    @classmethod
    def empty(cls, dtype: jax.typing.DTypeLike = jnp.float32) -> "Divergence":
        """No examples: merging it changes nothing. Values are taken in this dtype."""
        zero = _Sum(jnp.zeros((), dtype), jnp.zeros((), dtype))
        histogram = _Sum(jnp.zeros(_BINS, dtype), jnp.zeros(_BINS, dtype))
        none = jnp.full((), jnp.inf, dtype)
        return cls(_Sums(zero, zero, zero, zero, histogram), none, -none)

    def update(
        self,
        values: ArrayLike,
        weights: ArrayLike | None = None,
        *,
        agreement: ArrayLike | None = None,
        axis_name: AxisName | None = None,
    ) -> "Divergence":
        """Add a batch.

        Args:
            values: One per example, of any shape: what a divergence returns unreduced.
            weights: bool, int or float, exactly the shape of ``values``; a mask is weights.
            agreement: bool, exactly that shape: `agreement`, for instance.
            axis_name: Named mapped axes (``vmap``, ``shard_map``) over which the batch is spread.

        Raises:
            ValueError: For a shape that does not fit.
            TypeError: For a dtype.
        """
        values = checks.to_array(_NAME, "values", values)
        checks.require_float(_NAME, "values", values)
        if weights is not None:
            weights = checks.to_array(_NAME, "weights", weights)
            checks.require_weights(_NAME, "weights", weights, values.shape)
        if agreement is not None:
            agreement = checks.to_array(_NAME, "agreement", agreement)
            checks.require_weights(_NAME, "agreement", agreement, values.shape)
        return _update(*lax.stop_gradient((self, values, weights, agreement)), axis_name)

    def merge(self, other: "Divergence") -> "Divergence":
        """The state of the examples of both."""
        return _merge(self, other)

    def compute(self) -> Summary:
        """Mean, extremes and agreement over all examples."""
        return _compute(self)

    def quantile(self, q: ArrayLike) -> Array:
        """The least value that a weighted share q of the examples does not exceed, within 2 %.

        Read from a histogram of 1024 bins, 3e-13 to 5e4 nats; below and above it is the minimum
        or the maximum, and NaN where there are no examples or one of them is NaN.
        """
        return _quantile(self, checks.to_array(_NAME, "q", q))


_NAME = "Divergence"


def agreement(
    predictions: ArrayLike | Logits | LogProbs | Probs,
    targets: ArrayLike | Logits | LogProbs | Probs,
    *,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    r"""Whether both sides put their greatest probability on the same class.

    .. math:: \operatorname{argmax}_i s_i = \operatorname{argmax}_i t_i

    Shapes: as `kljax.forward_kl` with one class axis; the result has the batch shape. Units: none,
    it is bool.

    Zeros: play no part; of equal classes the first counts. Masked classes never win.
    Gradients: none.

    Args:
        predictions: Logits, `LogProbs` or `Probs`: what is greatest is the same in all.
        targets: Likewise.
        axis: The class axis.
        where: bool, which classes exist.

    Raises:
        ValueError: For shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.metrics import agreement
        >>> print(agreement(jnp.array([[1.0, 2.0], [2.0, 1.0]]), jnp.array([0.0, 5.0])))
        [ True False]

    Source: top-1 agreement, as in Stanton et al., Does Knowledge Distillation Really Work?
    (2021), section 3.
    """
    arrays = []
    for name, side in (("predictions", predictions), ("targets", targets)):
        if isinstance(side, Distribution):
            fits = isinstance(side, Logits | LogProbs | Probs)
            checks.require_one_array("agreement", name, side, fits=fits)
            (side,) = jax.tree.leaves(side)
        arrays.append(checks.to_array("agreement", name, side))
    shapes = dict(zip(("predictions", "targets"), (x.shape for x in arrays), strict=True))
    layout = checks.require_layout("agreement", shapes, axis)
    best = []
    if where is not None:
        where = checks.to_array("agreement", "where", where)
        checks.require_where("agreement", where, layout)
        where = jnp.broadcast_to(layout.expand(where), layout.shape)
    for x in arrays:
        x = jnp.broadcast_to(layout.expand(x), layout.shape)
        best.append(jnp.argmax(x if where is None else jnp.where(where, x, -jnp.inf), axis=axis))
    return best[0] == best[1]


@partial(jax.jit, static_argnames="axis_name")
def _update(
    state: Divergence,
    values: Array,
    weights: Array | None,
    agreement: Array | None,
    axis_name: AxisName | None,
) -> Divergence:
    value_checks.check_weights(_NAME, "weights", weights)
    dtype = state.maximum.dtype
    values = _flat(values).astype(dtype)
    weights = None if weights is None else _flat(weights).astype(dtype)
    kept = True if weights is None else weights != 0
    if weights is None:
        weight, value = _count(values.size, dtype), _total(values)
    else:
        weight, value = _total(weights), _total(weigh(weights, values))
    compared = agreeing = _count(0, dtype)
    if agreement is not None:
        agree = _flat(agreement).astype(bool)
        compared = weight
        if weights is None:
            agreeing = _count(jnp.sum(agree, dtype=jnp.int32), dtype)
        else:
            agreeing = _total(jnp.where(agree, weights, 0))
    batch = Divergence(
        _Sums(weight, value, compared, agreeing, _histogram(values, weights)),
        jnp.min(values, where=kept, initial=jnp.inf),
        jnp.max(values, where=kept, initial=-jnp.inf),
    )
    if axis_name is not None:
        batch = Divergence(
            lax.psum(batch.sums, axis_name),
            lax.pmin(batch.minimum, axis_name),
            lax.pmax(batch.maximum, axis_name),
        )
    return _merge(state, batch)


@jax.jit
def _merge(a: Divergence, b: Divergence) -> Divergence:
    sums = jax.tree.map(_add, a.sums, b.sums, is_leaf=lambda x: isinstance(x, _Sum))
    return Divergence(sums, jnp.minimum(a.minimum, b.minimum), jnp.maximum(a.maximum, b.maximum))


@jax.jit
def _compute(state: Divergence) -> Summary:
    weight, value, compared, agreeing, _ = (x.high + x.low for x in state.sums)
    some = weight != 0
    return Summary(
        mean=value / weight,
        minimum=jnp.where(some, state.minimum, jnp.nan),
        maximum=jnp.where(some, state.maximum, jnp.nan),
        agreement=agreeing / compared,
        weight_sum=weight,
    )


@jax.jit
def _quantile(state: Divergence, q: Array) -> Array:
    counts = jnp.cumsum(state.sums.histogram.high + state.sums.histogram.low)
    # At least something: a share of 0 is that of the first example, not of an empty bin.
    wanted = jnp.maximum(q.astype(counts.dtype) * counts[-1], jnp.finfo(counts.dtype).tiny)
    bin = jnp.searchsorted(counts, wanted)
    value = jnp.exp(_LOWEST + (bin.astype(counts.dtype) - 0.5) * _WIDTH)
    value = jnp.where(bin == 0, -jnp.inf, jnp.where(bin >= _BINS - 1, jnp.inf, value))
    known = jnp.clip(value, state.minimum, state.maximum)
    return jnp.where(jnp.isnan(state.maximum) | (counts[-1] == 0), jnp.nan, known)


def _flat(x: Array) -> Array:
    """One axis; on a mesh of explicit axes whole on every device, for it is one per example."""
    return meshes.whole(x).ravel()


def _count(n: int | Array, dtype: jnp.dtype) -> _Sum:
    """A number of examples; to sum ones would have XLA fold a constant as large as the batch."""
    n = jnp.asarray(n, jnp.int32)
    high = n.astype(dtype)
    return _Sum(high, (n - high.astype(jnp.int32)).astype(dtype))


def _histogram(values: Array, weights: Array | None) -> _Sum:
    """Bin i > 0 begins at exp(lowest + (i - 1) width); the first holds all below."""
    logs = jnp.log(jnp.where(values > 0, values, 0))
    bins = jnp.clip(jnp.floor((logs - _LOWEST) / _WIDTH) + 1, 0, _BINS - 1)
    bins = jnp.where(jnp.isnan(bins), 0, bins).astype(jnp.int32)
    counts = jnp.zeros(_BINS, values.dtype).at[bins].add(1 if weights is None else weights)
    return _Sum(counts, jnp.zeros_like(counts))


def _total(values: Array) -> _Sum:
    """The sum of all values, as exact as `_add`."""
    low = jnp.zeros_like(values)
    zero = np.zeros((), values.dtype)

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return tuple(_add(_Sum(*a), _Sum(*b)))

    return _Sum(*lax.reduce((values, low), (zero, zero), add, (0,)))


def _add(a: _Sum, b: _Sum) -> _Sum:
    """Knuth's two-sum: what rounding loses is kept, unless the sum is not finite."""
    high = a.high + b.high
    part = high - a.high
    lost = (a.high - (high - part)) + (b.high - part)
    low = jnp.where(jnp.isfinite(high), a.low + b.low + lost, 0)
    total = high + low
    return _Sum(total, jnp.where(jnp.isfinite(total), low - (total - high), 0))
