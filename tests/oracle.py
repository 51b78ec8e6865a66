"""The independent oracle: every divergence in NumPy float64, from its textbook formula.

Nothing here is shared with the library, and no automatic differentiation is used. Derivatives are
complex steps: f is analytic in the perturbed entry, so Im f(x + ih) / h with a tiny h is its
derivative to float64 accuracy.

Conventions: predictions s first, targets t second; 0·log 0 = 0; p > 0 = q gives +inf; NaN at an
allowed class gives NaN, even where p = 0; a masked class takes part in nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np

Array = np.ndarray
Axis = int | Sequence[int]

_STEP = 1e-50  # of the complex step; its error is of the order of the square
_NEVER = -1e30  # stands in for a logit of -inf: exp of it is 0, arithmetic with it stays finite


# --- layout: batch first, one trailing class axis ---


def _number(x: Any) -> Array:
    """Return x as float64, or as complex128 where a complex step passes through."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """Return the class axes as sorted non-negative integers."""
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    return tuple(sorted(a % ndim for a in axes))


def _batch_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Return the shape left when the class axes are taken away."""
    axes = _axes(axis, len(shape))
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _class_shape(shape: tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """Return the shape of one distribution."""
    return tuple(shape[i] for i in _axes(axis, len(shape)))


def _rows(x: Array, axis: Axis) -> Array:
    """Return x as (*batch, classes), the class axes flattened into one."""
    axes = _axes(axis, x.ndim)
    batch = _batch_shape(x.shape, axis)
    x = np.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    return x.reshape(*batch, math.prod(x.shape[len(batch) :]))


def _unrows(rows: Array, shape: tuple[int, ...], axis: Axis) -> Array:
    """Undo _rows."""
    axes = _axes(axis, len(shape))
    full = rows.reshape(_batch_shape(shape, axis) + _class_shape(shape, axis))
    return np.moveaxis(full, range(full.ndim - len(axes), full.ndim), axes)


def _full_where(where: Any, shape: tuple[int, ...], axis: Axis) -> Array:
    """Return `where` (class shape, or the whole shape) as a bool array of the whole shape."""
    if where is None:
        return np.ones(shape, bool)
    where = np.asarray(where, bool)
    if where.shape != shape:
        keep = _axes(axis, len(shape))
        where = where.reshape([n if i in keep else 1 for i, n in enumerate(shape)])
    return np.broadcast_to(where, shape)


def _share(x: Any, shape: tuple[int, ...], axis: Axis) -> Array:
    """Broadcast a side without a batch over the batch of the other side."""
    x = _number(x)
    if x.shape == shape:
        return x
    keep = _axes(axis, len(shape))
    x = x.reshape([n if i in keep else 1 for i, n in enumerate(shape)])
    return np.broadcast_to(x, shape)


# --- log-probabilities ---


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(x)


def _log_softmax(x: Array, axis: tuple[int, ...], temperature: Any) -> Array:
    """Return log softmax(x / T) over the given axes; a row without any class stays -inf."""
    with np.errstate(divide="ignore", invalid="ignore"):
        top = x.real.max(axis=axis, keepdims=True)
        # Apart, as an infinite complex number divided by T has a NaN for a part.
        dead = (x.real == -np.inf) & (top > -np.inf)
        x = np.where(dead, 0.0, x - top) / (1.0 if temperature is None else temperature)
        total = np.where(dead, 0.0, np.exp(x)).sum(axis=axis, keepdims=True)
        return np.where(dead, -np.inf, x - np.log(total))


def log_probs(
    x: Any,
    kind: str = "logits",
    *,
    axis: Axis = -1,
    where: Any = None,
    temperature: Any = None,
) -> Array:
    """Return float64 log-probabilities; classes that `where` masks are -inf.

    Logits are normalised over the allowed classes. "log_probs" and "probs" are taken at their word,
    unless a temperature is given: then they become softmax(log-probabilities / T).
    A row whose every class is masked is all -inf; a row of -inf logits that are allowed is NaN.
    """
    if kind not in ("logits", "log_probs", "probs"):
        raise ValueError(f"unknown kind {kind!r}")
    x = _number(x)
    allowed = _full_where(where, x.shape, axis)
    x = _log(x) if kind == "probs" else x
    x = np.where(allowed, x, -np.inf)
    if kind == "logits" or temperature is not None:
        x = _log_softmax(x, _axes(axis, x.ndim), temperature)
    return np.where(allowed, x, -np.inf)


def labels_to_log_probs(labels: Any, classes: int, *, axis: int = -1) -> Array:
    """Return the log-probabilities of one-hot labels; a label out of range is a row of NaN."""
    labels = np.asarray(labels)[..., None]
    onehot = _log((labels == np.arange(classes)).astype(np.float64))
    return np.moveaxis(np.where((labels >= 0) & (labels < classes), onehot, np.nan), -1, axis)


# --- elementwise terms ---


def kl_terms(log_p: Any, log_q: Any) -> Array:
    """Return p (log p - log q), elementwise."""
    log_p, log_q = _number(log_p), _number(log_q)
    p_zero, q_zero = log_p.real == -np.inf, log_q.real == -np.inf
    with np.errstate(invalid="ignore"):
        terms = np.exp(log_p) * (log_p - log_q)
    terms = np.where(q_zero & ~np.isnan(log_p), np.inf, terms)
    return np.where(p_zero, np.where(np.isnan(log_q), np.nan, 0.0), terms)


def cross_entropy_terms(log_p: Any, log_q: Any) -> Array:
    """Return -p log q, elementwise."""
    log_p, log_q = _number(log_p), _number(log_q)
    p_zero, q_zero = log_p.real == -np.inf, log_q.real == -np.inf
    with np.errstate(invalid="ignore"):
        terms = -np.exp(log_p) * log_q
    terms = np.where(q_zero & ~np.isnan(log_p), np.inf, terms)
    return np.where(p_zero, np.where(np.isnan(log_q), np.nan, 0.0), terms)


def log_mixture(log_a: Any, log_b: Any, weight: Any) -> Array:
    """Return log(weight·a + (1 - weight)·b), elementwise."""
    log_a, log_b = _number(log_a), _number(log_b)
    if weight in (0, 1):
        chosen, other = (log_a, log_b) if weight == 1 else (log_b, log_a)
        return np.where(np.isnan(other), np.nan, chosen)
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.maximum(log_a.real, log_b.real)
        mixed = top + np.log(weight * np.exp(log_a - top) + (1 - weight) * np.exp(log_b - top))
    return np.where(top == -np.inf, -np.inf, mixed)


# --- divergences: per-example values from log-probabilities ---


def _sum(terms: Array, axis: Axis) -> Array:
    return terms.sum(axis=_axes(axis, terms.ndim))


def forward_kl(log_s: Any, log_t: Any, axis: Axis = -1) -> Array:
    """D(t‖s)."""
    return _sum(kl_terms(log_t, log_s), axis)


def reverse_kl(log_s: Any, log_t: Any, axis: Axis = -1) -> Array:
    """D(s‖t)."""
    return _sum(kl_terms(log_s, log_t), axis)


def jeffreys(log_s: Any, log_t: Any, axis: Axis = -1) -> Array:
    """D(t‖s) + D(s‖t)."""
    return forward_kl(log_s, log_t, axis) + reverse_kl(log_s, log_t, axis)


def jensen_shannon(
    log_s: Any, log_t: Any, axis: Axis = -1, beta: Any = 0.5, normalized: bool = False
) -> Array:
    """β·D(t‖m) + (1-β)·D(s‖m), m = β·t + (1-β)·s; `normalized` divides by β(1-β).

    Normalised, the ends are the limits: forward KL at β = 0, reverse KL at β = 1. Close to them
    the quotient cancels: keep β at 0, at 1 or in [1e-4, 1 - 1e-4].
    """
    if normalized and beta == 0:
        return forward_kl(log_s, log_t, axis)
    if normalized and beta == 1:
        return reverse_kl(log_s, log_t, axis)
    log_m = log_mixture(log_t, log_s, beta)
    from_t = 0.0 if beta == 0 else beta * _sum(kl_terms(log_t, log_m), axis)
    from_s = 0.0 if beta == 1 else (1 - beta) * _sum(kl_terms(log_s, log_m), axis)
    return (from_t + from_s) / (beta * (1 - beta) if normalized else 1)


def skew_forward_kl(log_s: Any, log_t: Any, axis: Axis = -1, alpha: Any = 0.1) -> Array:
    """D(t ‖ α·t + (1-α)·s)."""
    return _sum(kl_terms(log_t, log_mixture(log_t, log_s, alpha)), axis)


def skew_reverse_kl(log_s: Any, log_t: Any, axis: Axis = -1, alpha: Any = 0.1) -> Array:
    """D(s ‖ α·s + (1-α)·t)."""
    return _sum(kl_terms(log_s, log_mixture(log_s, log_t, alpha)), axis)


def cross_entropy(log_s: Any, log_t: Any, axis: Axis = -1) -> Array:
    """H(t, s) = -Σ t log s."""
    return _sum(cross_entropy_terms(log_t, log_s), axis)


def entropy(log_p: Any, axis: Axis = -1) -> Array:
    """H(p) = -Σ p log p."""
    return cross_entropy(log_p, log_p, axis)


DIVERGENCES: dict[str, Callable[..., Array]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "cross_entropy": cross_entropy,
    "kl": reverse_kl,  # kl(p, q) is D(p‖q): its first argument stands where predictions do
}


def divergence(
    name: str,
    predictions: Any,
    targets: Any = None,
    *,
    kinds: tuple[str, str] = ("logits", "logits"),
    axis: Axis = -1,
    where: Any = None,
    temperature: Any = None,
    **params: Any,
) -> Array:
    """Return the per-example divergence of what the user holds; name is a key of DIVERGENCES.

    "entropy" is that of the predictions. The kind "labels" takes integer targets, of the batch
    shape, as one-hot. A side without any batch is shared by the batch of the other.
    """
    shape = _shape(predictions, targets, kinds)
    if kinds[1] == "labels":
        targets = np.exp(labels_to_log_probs(targets, np.shape(predictions)[axis], axis=axis))
        # One-hot is one-hot at every temperature.
        log_t = log_probs(targets, "probs", axis=axis, where=where)
    elif targets is not None:
        targets = _share(targets, shape, axis)
        log_t = log_probs(targets, kinds[1], axis=axis, where=where, temperature=temperature)
    predictions = _share(predictions, shape, axis)
    log_s = log_probs(predictions, kinds[0], axis=axis, where=where, temperature=temperature)
    if name == "entropy":
        return entropy(log_s, axis)
    return DIVERGENCES[name](log_s, log_t, axis, **params)


def _shape(predictions: Any, targets: Any, kinds: tuple[str, str]) -> tuple[int, ...]:
    """Return the shape of the side that has the batch."""
    shape = np.shape(predictions)
    if targets is None or kinds[1] == "labels":
        return shape
    return max(shape, np.shape(targets), key=len)


# --- one number ---


def reduce(
    values: Any, weights: Any = None, reduction: str = "none", normalizer: Any = None
) -> Array:
    """Weigh and reduce per-example values; weight 0 excludes an example, even NaN; 0/0 is 0.

    "none": wℓ. "sum": Σwℓ. "mean": Σwℓ / Σw, or / normalizer. "batchmean": Σwℓ / leading size.
    """
    if reduction not in ("none", "sum", "mean", "batchmean"):
        raise ValueError(f"unknown reduction {reduction!r}")
    values = _number(values)
    w = np.ones(values.shape) if weights is None else np.asarray(weights).astype(np.float64)
    weighted = np.where(w == 0, 0.0, w * np.where(w == 0, 0.0, values))
    if reduction == "none":
        return weighted
    if reduction == "sum":
        return weighted.sum()
    if reduction == "mean":
        denominator = w.sum() if normalizer is None else np.float64(normalizer)
    else:
        denominator = np.float64(values.shape[0] if values.ndim else 1)
    return weighted.sum() / denominator if denominator != 0 else np.float64(0.0)


# --- derivatives ---


def derivative(f: Callable[[Any], Any], x: float) -> Any:
    """Return f'(x) of an oracle function of one scalar (T, α, β, a weight) by a complex step.

    x must lie inside its range: at α or β of exactly 0 or 1 the formulas branch.
    """
    return np.imag(f(complex(x, _STEP))) / _STEP


def gradient(
    name: str,
    predictions: Any,
    targets: Any = None,
    wrt: int = 0,
    *,
    weights: Any = None,
    kinds: tuple[str, str] = ("logits", "logits"),
    axis: Axis = -1,
    where: Any = None,
    temperature: Any = None,
    **params: Any,
) -> Array:
    """Return the float64 gradient of Σ wℓ with respect to predictions (0) or targets (1).

    Where a log-probability or logit is -inf the derivative is its limit there: a class without mass
    gets 0 from a term that weighs it by its own mass, and softmax(q) - p from D(p‖q) where p > 0.
    Examples that are NaN, or whose derivative is infinite on logits (D(p‖q) to p where p > 0 = q),
    give a row of NaN. A `Probs` entry of 0 gets (derivative by its log) / 0 with 0/0 = 0; where the
    true one-sided limit is infinite for a reason other than p > 0 = q (x log x at 0), that is the
    convention that a zero is masked. Masked classes and examples of weight 0 get 0.

    Not served: a side without batch where one of several examples is NaN or of weight 0 and NaN;
    Jensen-Shannon and skew divergences at a `Probs` entry of 0 where the other side is positive.
    """
    options = {"axis": axis, "where": where, "temperature": temperature, **params}
    sides, log_kinds = _log_sides(predictions, targets, kinds)
    value = divergence(name, *sides, kinds=log_kinds, **options)
    sides = [_finite(side, kind) for side, kind in zip(sides, log_kinds, strict=True)]
    w = np.ones(value.shape) if weights is None else np.asarray(weights).astype(np.float64)

    x = sides[wrt]
    rows = _rows(x, axis)
    out = np.empty(rows.shape)
    for j in range(rows.shape[-1]):
        step = np.zeros(rows.shape[-1], complex)
        step[j] = 1j * _STEP
        sides[wrt] = _unrows(rows + step, x.shape, axis)
        with np.errstate(invalid="ignore", over="ignore"):
            slope = divergence(name, *sides, kinds=log_kinds, **options).imag / _STEP
            slope = np.where(w == 0, 0.0, w * np.where(np.isnan(value), np.nan, slope))
        out[..., j] = slope.sum() if rows.ndim == 1 else slope
    infinite = (np.abs(out) > 1e20).any(axis=-1, keepdims=True)
    out = np.where(infinite, np.nan, out)

    shape = _shape(predictions, targets, kinds)
    allowed = _rows(_full_where(where, shape, axis), axis)
    if rows.ndim == 1:
        allowed = allowed.reshape(-1, rows.shape[-1]).any(axis=0)
    out = _unrows(np.where(allowed, out, 0.0), x.shape, axis)
    return _per_probability(out, (predictions, targets)[wrt]) if kinds[wrt] == "probs" else out


def _log_sides(
    predictions: Any, targets: Any, kinds: tuple[str, str]
) -> tuple[list[Any], tuple[str, str]]:
    """Return both sides with probabilities replaced by their logarithms, and the new kinds."""
    pairs = list(zip((predictions, targets), kinds, strict=True))
    sides = [_log(_number(x)) if k == "probs" and x is not None else x for x, k in pairs]
    first, second = ("log_probs" if k == "probs" else k for _, k in pairs)
    return sides, (first, second)


def _finite(x: Any, kind: str) -> Any:
    """Return x with -inf replaced by a number that is as good, but finite."""
    if x is None or kind == "labels":
        return x
    x = _number(x)
    return np.where(x == -np.inf, _NEVER, x)


def _per_probability(by_log: Array, probs: Any) -> Array:
    """Turn a derivative by log p into one by p; 0/0 is 0: a zero is masked."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(by_log == 0, 0.0, by_log / _number(probs))


def hessian(
    name: str,
    predictions: Any,
    targets: Any = None,
    wrt: int | tuple[int, int] = 0,
    **options: Any,
) -> Array:
    """Return the float64 Hessian [classes, classes] of one example (1-D sides, axis -1).

    wrt=(i, j) is the block d²/d(side i) d(side j), its first index belonging to side i. Sixth-order
    central differences of `gradient` give about 1e-12. Served: what `gradient` serves, and besides
    a `Probs` entry of 0, which gets a column of zeros.
    """
    first, second = (wrt, wrt) if isinstance(wrt, (int, np.integer)) else wrt
    kinds = options.get("kinds", ("logits", "logits"))
    sides = [None if side is None else _number(side) for side in (predictions, targets)]
    x = sides[second]
    columns = []
    for j in range(x.size):
        h = 2e-3 * (x[j] if kinds[second] == "probs" else 1.0)
        column = np.zeros(x.size if first == second else sides[first].size)
        if h > 0 and x[j] > -np.inf:
            for k, c in ((1, 3 / 4), (2, -3 / 20), (3, 1 / 60)):
                for sign in (1, -1):
                    moved = x.copy()
                    moved[j] += sign * k * h
                    sides[second] = moved
                    column = column + sign * c / h * gradient(name, *sides, first, **options)
        columns.append(column)
    return np.stack(columns, axis=-1)


# --- distillation ---


def distillation_loss(
    predictions: Any,
    targets: Any,
    labels: Any = None,
    *,
    divergence: str = "forward_kl",
    temperature: float | None = None,
    scale_by_temperature: bool = True,
    soft_weight: float = 1.0,
    hard_weight: float = 0.0,
    weights: Any = None,
    label_weights: Any = None,
    reduction: str = "mean",
    normalizer: Any = None,
    kinds: tuple[str, str] = ("logits", "logits"),
    axis: int = -1,
    where: Any = None,
    **params: Any,
) -> tuple[Array, dict[str, Array]]:
    """Return soft_weight·T²·divergence at T + hard_weight·CE at T = 1, and the metrics.

    A label of weight 0 is never read; any other label out of range gives NaN. The normalizer
    divides both terms. Metrics are weighted means whatever the reduction: soft (at T, before T² and
    its weight), hard (weighted by label_weights; 0 without labels), divergence (at T = 1),
    agreement (of the argmax), teacher_entropy (at T = 1), and the sum weight_sum.
    """
    options = {"kinds": kinds, "axis": axis, "where": where}
    soft = _divergence(
        divergence, predictions, targets, temperature=temperature, **options, **params
    )
    plain = _divergence(divergence, predictions, targets, **options, **params)
    square = 1.0 if temperature is None or not scale_by_temperature else temperature**2
    loss = soft_weight * square * reduce(soft, weights, reduction, normalizer)

    shape = _shape(predictions, targets, kinds)
    w = np.ones(soft.shape) if weights is None else np.asarray(weights).astype(np.float64)
    label_weights = w if label_weights is None else label_weights
    hard = np.zeros(soft.shape)
    if labels is not None:
        hard = _divergence(
            "cross_entropy",
            predictions,
            labels,
            **{**options, "kinds": (kinds[0], "labels")},
        )
        loss = loss + hard_weight * reduce(hard, label_weights, reduction, normalizer)

    log_s, log_t = (
        _rows(log_probs(_share(x, shape, axis), kind, axis=axis, where=where), axis)
        for x, kind in zip((predictions, targets), kinds, strict=True)
    )
    metrics = {
        "soft": reduce(soft, w, "mean"),
        "hard": reduce(hard, label_weights, "mean"),
        "divergence": reduce(plain, w, "mean"),
        "agreement": reduce(log_s.argmax(-1) == log_t.argmax(-1), w, "mean"),
        "teacher_entropy": reduce(entropy(log_t), w, "mean"),
        "weight_sum": w.sum(),
    }
    return loss, metrics


_divergence = divergence  # distillation_loss has an argument of that name


# --- beyond float64 ---


def forward_kl_exact(x: Any, y: Any, digits: int = 40) -> float:
    """Return D(softmax(y) ‖ softmax(x)) of two finite logit vectors, rounded once from 40 digits.

    D = Σ p (y - x) - (lse(y) - lse(x)) exactly as written: at this precision the cancellation
    between the two parts leaves 1e-9 relative down to a divergence of 1e-28.
    """
    with mpmath.workdps(digits):
        xs, ys = ([mpmath.mpf(float(v)) for v in np.ravel(side)] for side in (x, y))
        x_top, y_top = max(xs), max(ys)
        x_exp = [mpmath.exp(v - x_top) for v in xs]
        y_exp = [mpmath.exp(v - y_top) for v in ys]
        x_sum, y_sum = mpmath.fsum(x_exp), mpmath.fsum(y_exp)
        mean = mpmath.fdot(y_exp, [b - a for a, b in zip(xs, ys, strict=True)]) / y_sum
        return float(mean - (y_top + mpmath.log(y_sum) - x_top - mpmath.log(x_sum)))


def jensen_shannon_term_exact(
    log_a: float, ratio: float, w: float, digits: int = 40
) -> tuple[float, float]:
    """Return w a log(a/m) + (1 - w) b log(b/m) for b = a e^ratio, and its derivative to log b."""
    with mpmath.workdps(digits):
        log_a, ratio, w = (mpmath.mpf(float(v)) for v in (log_a, ratio, w))
        a, b = mpmath.exp(log_a), mpmath.exp(log_a + ratio)
        m = w * a + (1 - w) * b
        from_b = (1 - w) * b * mpmath.log(b / m)
        return float(w * a * mpmath.log(a / m) + from_b), float(from_b)


def skew_term_exact(
    log_a: float, ratio: float, w: float, digits: int = 40
) -> tuple[float, float, float]:
    """Return a log(a/m) - a + m for b = a e^ratio, its derivative to log b, and that to log a."""
    with mpmath.workdps(digits):
        log_a, ratio, w = (mpmath.mpf(float(v)) for v in (log_a, ratio, w))
        a, b = mpmath.exp(log_a), mpmath.exp(log_a + ratio)
        m = w * a + (1 - w) * b
        to_b = (1 - w) * b * (1 - a / m)
        to_a = a * mpmath.log(a / m) + w * a * (1 - a / m)
        return float(a * mpmath.log(a / m) - a + m), float(to_b), float(to_a)
