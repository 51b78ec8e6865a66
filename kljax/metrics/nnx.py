"""`kljax.metrics.Divergence` as a metric of Flax NNX."""

from functools import partial
from typing import Any

import jax.numpy as jnp
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

    def __init__(self, divergence: Any = kljax.forward_kl, **options: Any):
        checks.require_callable("Divergence", "divergence", divergence)
        self.divergence = partial(divergence, **options)  # as one object: options may hold arrays
        self.accumulated = nnx.metrics.MetricState(metrics.Divergence.empty())

    @property
    def state(self) -> metrics.Divergence:
        return self.accumulated.get_value()

    def reset(self) -> None:
        """Forget every batch."""
        self.accumulated.set_value(metrics.Divergence.empty())

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
            agreement = _agreement(predictions, targets, **self.divergence.keywords)
        given = checks.require_values("Divergence.update", values)
        if mask is not None and weights is not None:
            weights = jnp.where(jnp.asarray(mask).astype(bool), jnp.asarray(weights), 0)
        weights = mask if weights is None else weights
        self.accumulated.set_value(self.state.update(given, weights, agreement=agreement))

    def compute(self) -> metrics.Summary:
        """Mean, extremes and agreement over all batches."""
        return self.state.compute()


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
