"""Elementwise terms on log-probabilities, and the zero rules.

This is the only module that knows what 0 · log 0 and 0 · inf mean. A probability of zero is a
log-probability of -inf. NaN is never hidden: a zero rule applies to zeros and infinities alone.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from numpy.polynomial import Polynomial

# Below this |log q - log p| the direct forms of KL and Jensen-Shannon terms round, and below this
# |z| that of log(1 + z): a series serves.
_SERIES_BOUND = 0.5


def log_difference(log_a: Array, log_b: Array) -> Array:
    """log a - log b, with 0 where both are log 0."""
    both_zero = jnp.isneginf(log_a) & jnp.isneginf(log_b)
    return jnp.where(both_zero, 0, log_a) - jnp.where(both_zero, 0, log_b)


def log_ratio_of_probs(a: Array, b: Array, log_ratio: Array) -> Array:
    """log a - log b from the probabilities' difference where they are close, else as given."""
    excess = a - b
    near = (jnp.abs(excess) <= 0.5 * b) & (b > 0)
    z = jnp.where(near, excess, 0) / jnp.where(near, b, 1)
    return jnp.where(near, z + log1p_minus(z), log_ratio)


def nan_unless(valid: Array, value: Array) -> Array:
    """The value where it is valid, else NaN: made by arithmetic, and only where it is due.

    A NaN constant would stop a user who looks for NaN with ``jax_debug_nans``.
    """
    infinite, one = jnp.where(valid, 0, jnp.inf), jnp.where(valid, 1, 0)
    return jnp.where(valid, value, (infinite * one).astype(value.dtype))


def _times_exp(log_p: Array, x: Array) -> Array:
    """p · x: 0 where p = 0; inf where x is, even if p is too small for its dtype."""
    zero = jnp.isneginf(log_p) & ~jnp.isnan(x)
    p = jnp.exp(log_p)
    p = jnp.where(jnp.isinf(x), jnp.maximum(p, jnp.finfo(p.dtype).tiny), p)
    return p * jnp.where(zero, 0, x)


def weigh(weight: Array, value: Array) -> Array:
    """weight · value, where weight 0 removes the value whatever it is."""
    return _weigh(*jnp.broadcast_arrays(weight, value))


@jax.custom_jvp
def _weigh(weight: Array, value: Array) -> Array:
    # The outer select says that a product is rounded: fused into a sum, one of two terms would not
    # be, and a symmetric divergence would not be symmetric.
    removed = weight == 0
    return jnp.where(removed, 0, weight * jnp.where(removed, 0, value))


@_weigh.defjvp
def _weigh_jvp(primals, tangents):
    (weight, value), (weight_dot, value_dot) = primals, tangents
    # Where a zero weight removes a value that is not finite, nothing of it is left. Elsewhere the
    # product's own derivatives hold, also mixed ones: weight 0 is a point like any other.
    removed = (weight == 0) & ~jnp.isfinite(value)
    seen, seen_dot = jnp.where(removed, 0, value), jnp.where(removed, 0, value_dot)
    return _weigh(weight, value), seen * weight_dot + weight * seen_dot


def term_kl(log_p: Array, log_q: Array, log_ratio: Array | None = None) -> Array:
    r"""The textbook contribution to KL: p (log p - log q).

    .. math:: p_i (\log p_i - \log q_i)

    Shapes: elementwise; both arguments broadcast. Units: nats.

    Zeros: 0 where p = 0, also where q = 0 there; +inf where only q = 0. NaN gives NaN.
    Gradients: to both arguments, in every mode and order; 0 where p = 0.

    Args:
        log_p: Log-probabilities, -inf allowed.
        log_q: Log-probabilities, -inf allowed.
        log_ratio: log q - log p, where it is known more exactly than as that difference.

    Returns:
        The contribution of each class.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> p, q = jnp.array([0.5, 0.0]), jnp.array([0.25, 0.0])
        >>> print(kljax.term_kl(jnp.log(p), jnp.log(q)).round(4))
        [0.3466 0.    ]

    Source: Cover and Thomas, Elements of Information Theory, section 2.3.
    """
    if log_ratio is None:
        log_ratio = log_difference(log_q, log_p)
    return _times_exp(log_p, -log_ratio)


def term_generalized_kl(log_p: Array, log_q: Array, log_ratio: Array | None = None) -> Array:
    r"""The non-negative contribution to KL: q - p + p (log p - log q).

    .. math:: q_i - p_i + p_i (\log p_i - \log q_i)

    Its sum is the KL divergence wherever p and q have the same total. No contribution is
    negative, each is exactly 0 where p = q, and each stays accurate where p and q are close,
    for with d = log q - log p it is summed as p (e\ :sup:`d` - 1 - d).

    Shapes: elementwise; both arguments broadcast. Units: nats.

    Zeros: q where p = 0; +inf where only q = 0. NaN gives NaN.
    Gradients: to both arguments, in every mode and order: q - p to log q, p (log p - log q) to
    log p.

    Args:
        log_p: Log-probabilities, -inf allowed.
        log_q: Log-probabilities, -inf allowed.
        log_ratio: log q - log p, where it is known more exactly than as that difference.

    Returns:
        The contribution of each class.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> log_p, log_q = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> print(kljax.term_generalized_kl(log_p, log_q).round(4))
        [0.0966 0.0473]

    Source: Csiszár, Why least squares and maximum entropy?, Annals of Statistics 19 (1991),
    section 2 (the I-divergence of unnormalised distributions).
    """
    if log_ratio is None:
        log_ratio = log_difference(log_q, log_p)
    return _generalized_kl(*jnp.broadcast_arrays(log_p, log_q, log_ratio))


@jax.custom_jvp
def _generalized_kl(log_p: Array, log_q: Array, d: Array) -> Array:
    return _generalized(jnp.exp(log_p), jnp.exp(log_q), d)


def _generalized(p: Array, q: Array, d: Array) -> Array:
    near = jnp.abs(d) < _SERIES_BOUND
    return jnp.where(near, p * expm1_minus(jnp.where(near, d, 0)), (q - p) - _times(p, d))


def _times(p: Array, d: Array) -> Array:
    """p · d for d = log q - log p.

    It is -inf where only q = 0, even if p is too small for its dtype, and inf where only p = 0.
    """
    infinite = jnp.isinf(d)
    return jnp.where(infinite, jnp.minimum(d, 0), p * jnp.where(infinite, 0, d))


@partial(_generalized_kl.defjvp, symbolic_zeros=True)
def _generalized_kl_jvp(primals, tangents):
    log_p, log_q, d = primals
    log_p_dot, log_q_dot, _ = tangents  # d is log q - log p, known better: no third variable
    tangent = jnp.zeros_like(d)
    # One side's derivative may be infinite where only the other's is asked for.
    if not isinstance(log_p_dot, SymbolicZero):
        tangent += term_kl(log_p, log_q, d) * log_p_dot
    if not isinstance(log_q_dot, SymbolicZero):
        tangent += _probability_difference(log_p, log_q, d) * log_q_dot
    return _generalized_kl(*primals), tangent


@jax.custom_jvp
def _probability_difference(log_p: Array, log_q: Array, d: Array) -> Array:
    """q - p, without cancellation where the two are close."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    near = jnp.abs(d) < _SERIES_BOUND
    d = jnp.where(near, d, 0)
    return jnp.where(near, p * (d + expm1_minus(d)), q - p)


@_probability_difference.defjvp
def _probability_difference_jvp(primals, tangents):
    log_p, log_q, _ = primals
    log_p_dot, log_q_dot, _ = tangents
    tangent = jnp.exp(log_q) * log_q_dot - jnp.exp(log_p) * log_p_dot
    return _probability_difference(*primals), tangent


def expm1_minus(d: Array, bound: float = _SERIES_BOUND) -> Array:
    """exp(d) - 1 - d for |d| below 1/2 or 1/8, by its Taylor series to the dtype's last bits."""
    last = {0.5: (9, 17), 0.125: (5, 12)}[bound][d.dtype == jnp.float64]
    return _polynomial([1 / math.factorial(n) for n in range(2, last + 1)], d) * (d * d)


def _polynomial(coefficients: Sequence[float | Array], x: Array) -> Array:
    """Σ c_n x^n, from c_0 on, by Horner's rule."""
    *lower, last = coefficients
    total: Array = jnp.full_like(x, last) if isinstance(last, float) else last
    for coefficient in reversed(lower):
        total = total * x + coefficient
    return total


@jax.custom_jvp
def excess(x: Array) -> Array:
    """exp(x) - 1 - x, which is not negative: q/p - 1 - log(q/p) for x = log(q/p)."""
    near = jnp.abs(x) < 0.5
    direct = jnp.where(jnp.isposinf(x), x, jnp.expm1(x) - jnp.where(jnp.isposinf(x), 0, x))
    return jnp.where(near, expm1_minus(jnp.where(near, x, 0)), direct)


@excess.defjvp
def _excess_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    return excess(x), jnp.expm1(x) * x_dot


def term_cross_entropy(log_p: Array, log_q: Array) -> Array:
    r"""The contribution to the cross-entropy H(p, q): -p log q.

    .. math:: -p_i \log q_i

    Shapes: elementwise; both arguments broadcast. Units: nats.

    Zeros: 0 where p = 0, also where q = 0 there; +inf where only q = 0. NaN gives NaN.
    Gradients: to both arguments, in every mode and order; 0 where p = 0.

    Args:
        log_p: Log-probabilities, -inf allowed.
        log_q: Log-probabilities, -inf allowed.

    Returns:
        The contribution of each class.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> p, q = jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])
        >>> print(kljax.term_cross_entropy(jnp.log(p), jnp.log(q)).round(4))
        [0.6931 0.    ]

    Source: Murphy, Probabilistic Machine Learning: An Introduction, section 6.1.2.
    """
    return _times_exp(log_p, -log_q)


def term_entropy(log_p: Array) -> Array:
    r"""The contribution to the entropy H(p): -p log p.

    .. math:: -p_i \log p_i

    Shapes: elementwise. Units: nats.

    Zeros: 0 where p = 0. NaN gives NaN.
    Gradients: in every mode and order; 0 where p = 0.

    Args:
        log_p: Log-probabilities, -inf allowed.

    Returns:
        The contribution of each class.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(kljax.term_entropy(jnp.log(jnp.array([0.5, 0.5, 0.0]))).round(4))
        [0.3466 0.3466 0.    ]

    Source: Cover and Thomas, Elements of Information Theory, section 2.1.
    """
    return term_cross_entropy(log_p, log_p)


def term_jensen_shannon(log_a: Array, log_b: Array, weight: Array, log_ratio: Array) -> Array:
    """w KL(a, m) + (1 - w) KL(b, m) for m = w a + (1 - w) b, of which no term is negative.

    Textbook and generalised KL terms give the same, for q - p cancels between the two.
    """
    return _jensen_shannon(log_a, log_b, jnp.asarray(weight, log_ratio.dtype), log_ratio)


@jax.custom_jvp
def _jensen_shannon(log_a: Array, log_b: Array, w: Array, r: Array) -> Array:
    of = _from_heavy(w, _finite(r))
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    heavy, light = jnp.where(of.a_is_heavy, a, b), jnp.where(of.a_is_heavy, b, a)
    close = heavy * _taylor(_mixture_series(r.dtype)[1], of.share, of.small)
    over_heavy, over_light = of.over_both()
    # The heavy side first, for a sum of two products is rounded by the order of its terms.
    direct = (1 - of.share) * over_heavy * heavy + of.share * over_light * light
    return jnp.where(of.near, close, -direct)


@partial(_jensen_shannon.defjvp, symbolic_zeros=True)
def _jensen_shannon_jvp(primals, tangents):
    log_a, log_b, w, r = primals
    a_dot, b_dot, w_dot, _ = tangents
    _, over_a, over_b = _log_mixture(log_a, log_b, w, _finite(r))
    tangent = jnp.zeros_like(log_a)
    if not isinstance(a_dot, SymbolicZero):
        tangent += -w * jnp.exp(log_a) * over_a * a_dot
    if not isinstance(b_dot, SymbolicZero):
        tangent += -(1 - w) * jnp.exp(log_b) * over_b * b_dot
    if not isinstance(w_dot, SymbolicZero):
        tangent += (_skew(log_a, log_b, w, r) - _skew(log_b, log_a, 1 - w, -r)) * w_dot
    return _jensen_shannon(*primals), tangent


def term_skew_kl(log_a: Array, log_b: Array, weight: Array, log_ratio: Array) -> Array:
    """The generalised KL(a, m) for m = w a + (1 - w) b, of which no term is negative."""
    return _skew(log_a, log_b, jnp.asarray(weight, log_ratio.dtype), log_ratio)


@jax.custom_jvp
def _skew(log_a: Array, log_b: Array, w: Array, r: Array) -> Array:
    a, seen = jnp.exp(log_a), _seen_from(w, 1 - w, r)
    over_a = jnp.where(w == 0, r, seen.log)  # only without a in it m may be nothing beside a
    direct = _excess(log_a, log_b, w, r) - _times(a, over_a)
    return jnp.where(seen.is_small, -a * seen.less, direct)


@partial(_skew.defjvp, symbolic_zeros=True)
def _skew_jvp(primals, tangents):
    log_a, log_b, w, _ = primals
    a_dot, b_dot, w_dot, _ = tangents
    (_, over_a, over_b), excess = _log_mixture(*primals), _excess(*primals)
    tangent = jnp.zeros_like(log_a)
    if not isinstance(a_dot, SymbolicZero):
        of_a = weigh(w, jnp.exp(-over_a))
        tangent += (_times_exp(log_a, -over_a) + excess * of_a) * a_dot
    if not isinstance(b_dot, SymbolicZero):
        tangent += excess * _part_of_b(*primals) * b_dot
    if not isinstance(w_dot, SymbolicZero):
        tangent += excess * (jnp.exp(-over_a) - jnp.exp(-over_b)) * w_dot
    return _skew(*primals), tangent


@jax.custom_jvp
def _excess(log_a: Array, log_b: Array, w: Array, r: Array) -> Array:
    """m - a, without cancellation where a and b are close."""
    a, z = jnp.exp(log_a), _seen_from(w, 1 - w, r).z
    return jnp.where(r < 1, a * z, (1 - w) * (jnp.exp(log_b) - a))


@_excess.defjvp
def _excess_jvp(primals, tangents):
    plain = lambda a, b, w, r: jnp.exp(_log_mixture(a, b, w, r)[0]) - jnp.exp(a)  # noqa: E731
    return _excess(*primals), jax.jvp(plain, primals, tangents)[1]


@jax.custom_jvp
def _part_of_b(log_a: Array, log_b: Array, w: Array, r: Array) -> Array:
    """(1 - w) b / m."""
    seen = _seen_from(w, 1 - w, r)
    return (1 - w) * seen.b_over_a / seen.m_over_a


@_part_of_b.defjvp
def _part_of_b_jvp(primals, tangents):
    plain = lambda a, b, w, r: weigh(1 - w, jnp.exp(-_log_mixture(a, b, w, r)[2]))  # noqa: E731
    return _part_of_b(*primals), jax.jvp(plain, primals, tangents)[1]


def log_mixture(
    log_a: Array, log_b: Array, weight: ArrayLike, log_ratio: Array | None = None
) -> tuple[Array, Array, Array]:
    r"""The log of a mixture m of two distributions, and its log-ratios to both.

    .. math:: m_i = w a_i + (1 - w) b_i

    The ratios log m - log a and log m - log b are those of m before it is rounded, so that a
    divergence from m stays accurate where a and b are close, and all three are exact where a = b.

    Shapes: elementwise; the arguments broadcast. Units: nats.

    Zeros: either distribution, or both, may be zero; so may either weight. Where a log-ratio
    would be log 0 - log 0 it is 0. NaN gives NaN.
    Gradients: to both distributions and the weight.

    Args:
        log_a: Log-probabilities, -inf allowed.
        log_b: Log-probabilities, -inf allowed.
        weight: The share w of ``a``, in [0, 1].
        log_ratio: log b - log a, where it is known more exactly than as that difference.

    Returns:
        (log m, log m - log a, log m - log b).

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> log_a, log_b = jnp.log(jnp.array([1.0, 0.0])), jnp.log(jnp.array([0.5, 0.5]))
        >>> print(jnp.exp(kljax.log_mixture(log_a, log_b, 0.5)[0]).round(4))
        [0.75 0.25]

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on
    Information Theory 37 (1991), section IV.
    """
    if log_ratio is None:
        log_ratio = log_difference(log_b, log_a)
    weight = jnp.asarray(weight, log_ratio.dtype)
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (log_a, log_b, weight, log_ratio)))
    log_a, log_b, log_ratio = (jnp.broadcast_to(x, shape) for x in (log_a, log_b, log_ratio))
    return _log_mixture(log_a, log_b, weight, log_ratio)


@jax.custom_jvp
def _log_mixture(log_a: Array, log_b: Array, w: Array, r: Array) -> tuple[Array, Array, Array]:
    of = _from_heavy(w, r)
    over_heavy, over_light = of.over_both()
    over_a = jnp.where(of.a_is_heavy, over_heavy, over_light)
    over_b = jnp.where(of.a_is_heavy, over_light, over_heavy)
    # Stepping from the larger side never adds inf to -inf.
    from_b = r > 0
    log_m = jnp.where(from_b, log_b, log_a) + jnp.where(from_b, over_b, over_a)
    return log_m, over_a, over_b


@partial(_log_mixture.defjvp, symbolic_zeros=True)
def _log_mixture_jvp(primals, tangents):
    log_a, log_b, w, _ = primals
    a_dot, b_dot, w_dot, _ = tangents  # the ratio is log b - log a: no fourth variable
    log_m, over_a, over_b = _log_mixture(*primals)
    m_dot, a_moves, b_moves = jnp.zeros_like(log_m), jnp.zeros_like(log_m), jnp.zeros_like(log_m)
    if not isinstance(a_dot, SymbolicZero):
        m_dot, a_moves = m_dot + weigh(w, jnp.exp(-over_a)) * a_dot, a_dot
    if not isinstance(b_dot, SymbolicZero):
        m_dot, b_moves = m_dot + weigh(1 - w, jnp.exp(-over_b)) * b_dot, b_dot
    if not isinstance(w_dot, SymbolicZero):
        m_dot += (jnp.exp(-over_a) - jnp.exp(-over_b)) * w_dot
    return (log_m, over_a, over_b), (m_dot, m_dot - a_moves, m_dot - b_moves)


class _FromHeavy(NamedTuple):
    """m = w a + (1 - w) b as the side of more weight sees it.

    m / heavy = 1 + l (e^x - 1) for the light side's weight l and x = log light - log heavy, so that
    a small weight costs no accuracy and one logarithm serves both sides.
    """

    a_is_heavy: Array  # of equal weights the more probable side is: their order is nothing
    share: Array  # the weight of the light side, at most 1/2
    ratio: Array  # x
    near: Array  # whether both sides are close
    small: Array  # x where they are, else 0

    def over_both(self) -> tuple[Array, Array]:
        """(log m - log heavy, log m - log light)."""
        share, x, overflow = self.share, self.ratio, _overflow(self.ratio)
        z = share * (jnp.exp(jnp.minimum(x, overflow)) - 1)
        # As exact as log1p, with which XLA:CPU does not vectorize the loop over a few classes.
        log = jnp.log(1 + z) + (z - ((1 + z) - 1)) / (1 + z)
        close = share * self.small + _taylor(_mixture_series(x.dtype)[0], share, self.small)
        over_heavy = jnp.where(self.near, close, log)

        # Where exp overflows the heavy side's part of m is nothing.
        only_light = x > jnp.where(share == 0, jnp.inf, overflow)
        over_light = jnp.where(only_light, jnp.log(share), over_heavy - x)
        return jnp.where(only_light, x + jnp.log(share), over_heavy), over_light


def _from_heavy(w: Array, r: Array) -> _FromHeavy:
    a_is_heavy = (w > 0.5) | ((w == 0.5) & (r <= 0))
    share, ratio = jnp.minimum(w, 1 - w), jnp.where(a_is_heavy, r, -r)
    near = jnp.abs(ratio) < _SERIES_BOUND
    return _FromHeavy(a_is_heavy, share, ratio, near, jnp.where(near, ratio, 0))


@cache
def _mixture_series(dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Taylor coefficients from x² on, over l (1 - l): rows of a polynomial in l, for |x| < 1/2.

    Of log(1 + l (e^x - 1)) less l x, and of the Jensen-Shannon term j over heavy's probability.
    The first generates the cumulants of a Bernoulli variable, k_1 = l and
    k_n+1 = l (1 - l) dk_n/dl; the second follows from dj/dx = l e^x (x - log(1 + l (e^x - 1))).
    """
    last = 18 if dtype == jnp.float64 else 9
    l = Polynomial([0.0, 1.0])  # noqa: E741
    cumulants = [Polynomial([1.0])]
    for _ in range(2, last):
        cumulants.append((1 - 2 * l) * cumulants[-1] + l * (1 - l) * cumulants[-1].deriv())
    log = [k / math.factorial(n) for n, k in enumerate(cumulants, 2)]
    term = [Polynomial([0.5])]
    for n in range(3, last + 1):
        known = sum(log[k - 2] / math.factorial(n - 1 - k) for k in range(2, n))
        term.append((1 / math.factorial(n - 2) - l * known) / n)
    rows = lambda series: np.stack([np.pad(p.coef, (0, last - len(p.coef))) for p in series])  # noqa: E731
    return rows(log), rows(term)


def _taylor(series: np.ndarray, share: Array, x: Array) -> Array:
    """l (1 - l) x² times the series at the share l, and x."""
    columns = series.T.reshape(*series.T.shape, *[1] * share.ndim)
    coefficients = _polynomial(list(jnp.asarray(columns, x.dtype)), share[None])
    return _polynomial(list((share * (1 - share))[None] * coefficients), x) * (x * x)


class _Seen(NamedTuple):
    """A mixture m = own a + other b as a sees it, so that a small weight costs no accuracy."""

    z: Array  # m / a - 1
    is_small: Array  # whether a series serves for its logarithm
    less: Array  # log(1 + z) - z where it does
    log: Array  # log(1 + z)
    m_over_a: Array
    b_over_a: Array


def _seen_from(own: Array, other: Array, r: Array) -> _Seen:
    """From r = log b - log a."""
    near = jnp.abs(r) < _SERIES_BOUND
    small, b_over_a = jnp.where(near, r, 0), jnp.exp(_finite(r))
    z = other * jnp.where(near, small + expm1_minus(small), b_over_a - 1)
    is_small = jnp.abs(z) < _SERIES_BOUND
    small = jnp.where(is_small, z, 0)
    less = log1p_minus(small)
    m_over_a = own + other * b_over_a
    log = jnp.where(is_small, small + less, jnp.log(m_over_a))
    return _Seen(z, is_small, less, log, m_over_a, b_over_a)


def _finite(log_ratio: Array) -> Array:
    """Cut off before exp overflows: there the one side is nothing beside the other."""
    return jnp.clip(log_ratio, -_overflow(log_ratio), _overflow(log_ratio))


def _overflow(x: Array) -> int:
    return 700 if x.dtype == jnp.float64 else 85


def log1p_minus(z: Array) -> Array:
    """log(1 + z) - z for |z| < 1/2, to the last bit of the dtype.

    From the series of log(1 + z) = 2 artanh(s) with s = z / (2 + z), for which 2 s - z = -s z.
    """
    s = z / (2 + z)
    square = s * s
    last = 31 if z.dtype == jnp.float64 else 13
    series = _polynomial([2 / n for n in range(3, last + 1, 2)], square)
    return s * (series * square - z)
