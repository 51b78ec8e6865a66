"""torchmetrics' KL and Jensen–Shannon divergences, as functions and as metrics."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

import kljax
from kljax import LogProbs, Probs
from kljax._engine import checks
from kljax.compat import _checks
from kljax.compat import _elements as elements

Reduction = Literal["mean", "sum", "none"] | None


def kl_divergence(
    p: ArrayLike, q: ArrayLike, log_prob: bool = False, reduction: Reduction = "mean"
) -> Array:
    r"""torchmetrics' functional ``kl_divergence``: D(p‖q) of each row, p being the data.

    .. math:: \sum_i p_i (\log p_i - \log q_i)

    The order is the reverse of PyTorch's ``kl_div``.

    Shapes: both exactly (rows, classes). "none" gives one value for each row, the others a scalar.
    Probabilities are divided by their row's sum, so that counts serve; log-probabilities are
    taken at their word. The result has the promoted dtype, float32 for integers; 16-bit inputs
    are computed in float32 and rounded once. Units: nats.

    Zeros: a p of 0 contributes 0; +inf where only q is 0; NaN for a row of zeros and for negative
    probabilities. A log-probability of -inf counts as 0 (torchmetrics: NaN).
    Gradients: to both sides, in every mode, also in rows with a zero, where torchmetrics' are NaN.

    Args:
        p: The data's distributions.
        q: The approximating distributions.
        log_prob: Whether both hold log-probabilities.
        reduction: "mean" over rows, "sum", "none" or None.

    Raises:
        ValueError: For shapes that differ (torchmetrics' RuntimeError) or are not 2-D, and for an
            unknown reduction (which torchmetrics' functions, not its metrics, let pass).
        TypeError: For what is no array of numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat.torchmetrics import kl_divergence
        >>> p, q = jnp.array([[0.36, 0.48, 0.16]]), jnp.array([[1 / 3, 1 / 3, 1 / 3]])
        >>> print(f"{kl_divergence(p, q):.4f}")
        0.0853

    Source: torchmetrics 1.9, functional/regression/kl_divergence.py.
    """
    return _reduced("kl_divergence", kljax.kl, p, q, log_prob, reduction)


def jensen_shannon_divergence(
    p: ArrayLike, q: ArrayLike, log_prob: bool = False, reduction: Reduction = "mean"
) -> Array:
    r"""torchmetrics' functional ``jensen_shannon_divergence`` of each row.

    .. math:: \tfrac{1}{2} D(p\|m) + \tfrac{1}{2} D(q\|m), \qquad m = \tfrac{1}{2} (p + q)

    Shapes, units (nats), arguments, errors: as `kl_divergence`. torchmetrics computes log 2 in
    float32 for log-probabilities, which puts its float64 results 1.9e-9 off; here they are exact.

    Zeros: always finite, at most log 2; NaN for a row of zeros and for negative probabilities.
    Gradients: as `kl_divergence`.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat.torchmetrics import jensen_shannon_divergence
        >>> p, q = jnp.array([[0.36, 0.48, 0.16]]), jnp.array([[1 / 3, 1 / 3, 1 / 3]])
        >>> print(f"{jensen_shannon_divergence(p, q):.4f}")
        0.0225

    Source: torchmetrics 1.9, functional/regression/js_divergence.py.
    """
    return _reduced("jensen_shannon_divergence", kljax.jensen_shannon, p, q, log_prob, reduction)


class _RowMetric:
    """What both metrics share. An object of the host: inside ``jit`` use `kljax.metrics`."""

    _divergence: ClassVar[Callable[..., Array]]

    def __init__(self, log_prob: bool = False, reduction: Reduction = "mean"):
        self._name = type(self).__name__
        _checks.require_bool(self._name, "log_prob", log_prob)
        _check_reduction(self._name, reduction)
        self.log_prob: bool = log_prob
        self.reduction: Reduction = reduction
        self.reset()

    def reset(self) -> None:
        """Forget every batch."""
        self._rows: list[Array] = []
        self._sum, self._count = jnp.zeros((), jnp.float32), 0
        self._updated = False

    def update(self, p: ArrayLike, q: ArrayLike) -> None:
        """Add a batch of rows."""
        self._updated = True
        self._add(_row_values(self._name, self._divergence, p, q, self.log_prob))

    def __call__(self, p: ArrayLike, q: ArrayLike) -> Array:
        """Add a batch of rows, and give the value of this batch alone."""
        values = _row_values(self._name, self._divergence, p, q, self.log_prob)
        self._updated = True
        self._add(values)
        if self._keeps_rows:
            return values
        dtype = elements.promoted(jnp.float32, values.dtype)
        return _reduce(values, self.reduction).astype(dtype)

    def compute(self) -> Array:
        """The value over all batches: of the rows, not of the batches' means."""
        if not self._updated:
            warnings.warn(
                f"The ``compute`` method of metric {self._name} was called before the ``update`` "
                "method which may lead to errors, as metric states have not yet been updated.",
                UserWarning,
                stacklevel=2,
            )
        if self._keeps_rows:
            _checks.require_samples(self._name, self._rows)
            dtype = elements.promoted(*(rows.dtype for rows in self._rows))
            return jnp.concatenate([rows.astype(dtype) for rows in self._rows])
        return self._sum / self._count if self.reduction == "mean" else self._sum

    def merge_state(self, incoming_state: "_RowMetric") -> None:
        """Add the batches of another metric of the same class and reduction."""
        _checks.require_same_metric(
            self._name, incoming_state, type(self), "reduction", self.reduction
        )
        self._rows = incoming_state._rows + self._rows
        self._add_sum(incoming_state._sum, incoming_state._count)

    def __repr__(self) -> str:
        return f"{self._name}()"

    @property
    def _keeps_rows(self) -> bool:
        return self.reduction in ("none", None)

    def _add(self, values: Array) -> None:
        values = jax.lax.stop_gradient(values)  # a state outlives the transform it is updated in
        if self._keeps_rows:
            self._rows.append(values)
        else:
            self._add_sum(_reduce(values, "sum"), len(values))

    def _add_sum(self, total: Array, count: int) -> None:
        dtype = elements.promoted(self._sum.dtype, total.dtype)
        self._sum = self._sum.astype(dtype) + total.astype(dtype)
        self._count += count


class KLDivergence(_RowMetric):
    """torchmetrics' ``KLDivergence``: `kl_divergence` over a stream of batches.

    ``update(p, q)`` adds a batch, a call adds it and returns its own value, ``compute()`` is over
    all rows of all batches, uneven or not; ``reset()`` and ``merge_state(other)`` as there. Before
    any update ``compute()`` warns and is NaN ("sum": 0; "none": ValueError). Sums are float32,
    or float64 after a batch of it. torchmetrics' keywords for devices and processes are not there.

    Args:
        log_prob: Whether batches hold log-probabilities.
        reduction: "mean" over rows, "sum", "none" or None.

    Raises:
        ValueError: For an unknown reduction; later as `kl_divergence`.
        TypeError: For a ``log_prob`` that is not bool.

    Example:
        >>> import jax.numpy as jnp
        >>> from kljax.compat.torchmetrics import KLDivergence
        >>> metric = KLDivergence()
        >>> metric.update(jnp.array([[1.0, 0.0], [0.5, 0.5]]), jnp.array([[0.5, 0.5]] * 2))
        >>> metric.update(jnp.array([[0.0, 2.0]]), jnp.array([[3.0, 1.0]]))
        >>> print(f"{metric.compute():.4f}")
        0.6931
    """

    _divergence = staticmethod(kljax.kl)


class JensenShannonDivergence(_RowMetric):
    """torchmetrics' ``JensenShannonDivergence``: `jensen_shannon_divergence` over a stream.

    Methods, arguments and errors are those of `KLDivergence`.
    """

    _divergence = staticmethod(kljax.jensen_shannon)


def _reduced(
    name: str,
    divergence: Callable[..., Array],
    p: ArrayLike,
    q: ArrayLike,
    log_prob: bool,
    reduction: Reduction,
) -> Array:
    _check_reduction(name, reduction)
    return _reduce(_row_values(name, divergence, p, q, log_prob), reduction)


def _check_reduction(name: str, reduction: Any) -> None:
    checks.require_choice(
        name, "reduction", "none" if reduction is None else reduction, ("mean", "sum", "none")
    )


def _row_values(
    name: str, divergence: Callable[..., Array], p: ArrayLike, q: ArrayLike, log_prob: bool
) -> Array:
    sides = {"p": p, "q": q}
    for argument, side in sides.items():
        _checks.require_array(name, argument, side)
    p, q = (_as_float(name, argument, jnp.asarray(side)) for argument, side in sides.items())
    _checks.require_same_matrices(name, {"p": p.shape, "q": q.shape})
    return _rows(divergence, p, q, bool(log_prob))


def _as_float(name: str, argument: str, side: Array) -> Array:
    _checks.require_real(name, argument, side)
    return side if jnp.issubdtype(side.dtype, jnp.floating) else side.astype(jnp.float32)


@partial(jax.jit, static_argnums=(0, 3))
def _rows(divergence: Callable[..., Array], p: Array, q: Array, log_prob: bool) -> Array:
    dtype = elements.promoted(p.dtype, q.dtype)
    p, q = elements.computed(p, q)
    if log_prob:
        return divergence(LogProbs(p), LogProbs(q)).astype(dtype)
    p, q = (side / jnp.sum(side, axis=-1, keepdims=True) for side in (p, q))
    return divergence(Probs(p), Probs(q)).astype(dtype)


def _reduce(values: Array, reduction: Reduction) -> Array:
    """Sum as wide as PyTorch does, and round once; no rows give a mean of NaN, as there."""
    if reduction in ("none", None):
        return values
    (wide,) = elements.computed(values)
    total = jnp.sum(wide) / (values.shape[0] if reduction == "mean" else 1)
    return total.astype(values.dtype)
