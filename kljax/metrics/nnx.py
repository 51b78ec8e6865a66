"""`kljax.metrics.Divergence` as a metric of Flax NNX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

import kljax
from kljax import metrics
from kljax._engine import checks
from kljax.distributions import Distribution, Logits, LogProbs, Probs


class Divergence(nnx.Metric):
    """A divergence over a stream of batches, for ``nnx.jit`` and ``nnx.MultiMetric``.

    ``update`` takes the two sides, or values that are already there; ``compute`` returns a
    `kljax.metrics.Summary` with mean, minimum, maximum, agreement and weight sum; ``reset`` starts
    again. What ``mask`` hides has no effect, even if it is NaN, and the denominator counts what it
    shows. ``state`` holds the `kljax.metrics.Divergence`, to merge or to ask for quantiles.

    Args:
        divergence: Any divergence of this library, or made by `kljax.divergence`.
        **options: Its options: ``temperature``, ``axis``, ``where``, …

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> from kljax.metrics.nnx import Divergence
        >>> metric = Divergence(kljax.reverse_kl)
        >>> student = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]])
        >>> teacher = jnp.array([[2.0, 2.0], [0.0, 1.0]])
        >>> metric.update(predictions=student, targets=teacher, mask=jnp.array([True, False]))
        >>> print(f"{metric.compute().mean:.4f} {metric.compute().agreement:.1f}")
        0.1109 0.0
    """

    def __init__(self, divergence: Callable[..., Array] = kljax.forward_kl, **options: Any):
        known = divergence if callable(divergence) else None
        checks.require_divergence("Divergence", "divergence", divergence, known)
        self.divergence: _Bound = _Bound(divergence, options)
        self._names, leaves = _flat(metrics.Divergence.empty())
        held = {n: nnx.metrics.MetricState(x) for n, x in zip(self._names, leaves, strict=True)}
        self.accumulated: nnx.Dict[nnx.metrics.MetricState] = nnx.Dict(held)

    @property
    def state(self) -> metrics.Divergence:
        leaves = [self.accumulated[name].get_value() for name in self._names]
        return jax.tree.unflatten(jax.tree.structure(metrics.Divergence.empty()), leaves)

    def _set(self, state: metrics.Divergence) -> None:
        for name, leaf in zip(*_flat(state), strict=True):
            self.accumulated[name].set_value(leaf)

    def reset(self) -> None:
        """Forget every batch."""
        self._set(metrics.Divergence.empty())

    def update(
        self,
        *,
        predictions: ArrayLike | Distribution | None = None,
        targets: ArrayLike | Distribution | None = None,
        values: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        mask: Array | None = None,
        **_: Any,
    ) -> None:
        """Add a batch.

        Args:
            predictions: As for the divergence.
            targets: As for the divergence.
            values: One per example; read only if the two sides are not both given.
            weights: One per example.
            mask: bool, one per example; where it is False the weight is 0.
        """
        agreement = None
        if predictions is not None and targets is not None:
            values = self.divergence(predictions, targets)
            agreement = _agreement(predictions, targets, **self.divergence.options)
        given = checks.require_values("Divergence.update", values)
        if mask is not None and weights is not None:
            weights = jnp.where(jnp.asarray(mask).astype(bool), jnp.asarray(weights), 0)
        weights = mask if weights is None else weights
        self._set(self.state.update(given, weights, agreement=agreement))

    def compute(self) -> metrics.Summary:
        """Mean, extremes and agreement over all batches."""
        return self.state.compute()


class _Bound:
    """A divergence and its options: equal to another of the same, so that jit knows it again."""

    def __init__(self, divergence: Callable[..., Array], options: dict[str, Any]):
        self.divergence: Callable[..., Array] = divergence
        self.options: dict[str, Any] = options

    def __call__(self, predictions: Any, targets: Any) -> Array:
        return self.divergence(predictions, targets, **self.options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Bound) or self.divergence is not other.divergence:
            return False
        mine, its = self.options, other.options
        return mine.keys() == its.keys() and all(_same(mine[key], its[key]) for key in mine)

    def __hash__(self) -> int:
        return hash((self.divergence, tuple(self.options)))


def _same(a: Any, b: Any) -> bool:
    arrays = isinstance(a, Array | np.ndarray) or isinstance(b, Array | np.ndarray)
    return a is b if arrays else type(a) is type(b) and a == b


def _flat(state: metrics.Divergence) -> tuple[tuple[str, ...], list[Array]]:
    """The arrays of a state, each by a name that a checkpoint can hold."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state)
    names = (jax.tree_util.keystr(path, simple=True, separator="_") for path, _ in paths)
    return tuple(names), [leaf for _, leaf in paths]


def _agreement(
    predictions: Any, targets: Any, *, axis: Any = -1, where: Any = None, **_: Any
) -> Array | None:
    """Where both sides hold all classes, on one axis."""
    whole = isinstance(axis, int) and all(map(_holds_all_classes, (predictions, targets)))
    return metrics.agreement(predictions, targets, axis=axis, where=where) if whole else None


def _holds_all_classes(side: Any) -> bool:
    if isinstance(side, Distribution):
        return isinstance(side, Logits | LogProbs | Probs)
    return jnp.issubdtype(jnp.result_type(side), jnp.floating)
