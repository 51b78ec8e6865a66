"""What closed forms are made of: each function exact to rounding where its arguments are close."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy import special

from kljax._engine.terms import log1p_minus, nan_unless

EULER = 0.5772156649015329
Function = Callable[[Array], Array]


def log_ratio(a: Array, b: Array, difference: Array | None = None) -> Array:
    """log(a / b) of positive numbers, from their difference where they are close.

    Args:
        difference: a - b, where it is known more exactly than as that difference.
    """
    return _log_ratio(*jnp.broadcast_arrays(a, b, a - b if difference is None else difference))


@jax.custom_jvp
def _log_ratio(a: Array, b: Array, difference: Array) -> Array:
    near = (jnp.abs(difference) < 0.5 * b) & (b > 0)
    z = jnp.where(near, difference, 0) / jnp.where(near, b, 1)
    return jnp.where(near, z + log1p_minus(z), jnp.log(a) - jnp.log(b))


@_log_ratio.defjvp
def _log_ratio_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    a, b, _ = primals
    a_dot, b_dot, _ = tangents  # the difference is no third variable
    return _log_ratio(*primals), a_dot / a - b_dot / b


def generalized_kl(a: Array, b: Array, difference: Array) -> Array:
    """a log(a / b) + b - a of masses, which may be 0, and b - a; it is not negative."""
    near, nothing = jnp.abs(difference) < 0.5 * a, a == 0
    z = jnp.where(near, difference, 0) / jnp.where(near, a, 1)
    apart_a, apart_b = (jnp.where(near | nothing, 1, x) for x in (a, b))
    direct = difference - a * (jnp.log(apart_b) - jnp.log(apart_a))
    return jnp.where(near, -a * log1p_minus(z), jnp.where(nothing, b, direct))


@jax.custom_jvp
def infinite_unless(holds: Array, value: Array) -> Array:
    """The value where something holds; elsewhere infinite, with NaN for a derivative."""
    return jnp.where(holds, value, jnp.inf)


@infinite_unless.defjvp
def _infinite_unless_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (holds, value), (_, value_dot) = primals, tangents
    return infinite_unless(holds, value), nan_unless(holds, jnp.ones_like(value)) * value_dot


class Potential(NamedTuple):
    """A convex function, of which only differences from its tangents matter."""

    value: Function
    slope: Function
    curvature: Function
    reach: float  # at x its series converge well within (x + reach) / 2


def _potential(value: Function, slope: Function, curvature: Function, reach: float) -> Potential:
    """Each is the derivative of the one before: JAX's own would compile for seconds."""
    slope = _with_derivative(slope, curvature)
    return Potential(_with_derivative(value, slope), slope, curvature, reach)


def _with_derivative(function: Function, derivative: Function) -> Function:
    function = jax.custom_jvp(function)
    function.defjvps(lambda x_dot, _, x: derivative(x) * x_dot)
    return function


def bregman(of: Potential, y: Array, x: Array, step: Array | None = None) -> Array:
    """φ(y) - φ(x) - φ'(x) (y - x), which is not negative.

    Where the two are close it is the remainder's integral, by Gauss and Legendre.

    Args:
        step: y - x, where it is known more exactly than as that difference.
    """
    step = y - x if step is None else step
    near = jnp.abs(step) <= 0.5 * (x + of.reach)
    start, moved = jnp.where(near, x, 1), jnp.where(near, step, 0)
    nodes, weights = (
        jnp.asarray(each, x.dtype).reshape(-1, *x.ndim * [1])
        for each in _gauss_legendre(11 if x.dtype == jnp.float64 else 6)
    )
    curved = (
        weights
        * (1 - nodes)
        * of.curvature(jnp.expand_dims(start, 0) + nodes * jnp.expand_dims(moved, 0))
    )
    a, b = jnp.where(near, 1, x), jnp.where(near, 1, y)
    apart = of.value(b) - of.value(a) - of.slope(a) * (b - a)
    return jnp.where(near, moved**2 * jnp.sum(curved, 0), apart)


def _gauss_legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return 0.5 * (nodes + 1), 0.5 * weights


def _below(bound: float, x: Array, small: Function, large: Function) -> Array:
    is_small = x < bound
    return jnp.where(
        is_small, small(jnp.where(is_small, x, bound)), large(jnp.where(is_small, bound, x))
    )


def _series(x: Array, terms: dict[int, float]) -> Array:
    """Σ c x^-n."""
    inverse, total = 1 / x, jnp.zeros_like(x)
    for n in range(max(terms), 0, -1):
        total = (total + terms.get(n, 0)) * inverse
    return total


# log Γ(x) - x log x + x: what log Γ has beside the potential of generalised KL. Its curvature is
# 1 / 2x² for large x, where that of log Γ is 1 / x: no difference of large numbers is left.
# Series: NIST Digital Library of Mathematical Functions, 5.11.1 and 5.11.2.


def _log_gamma(x: Array) -> Array:
    return _below(
        16,
        x,
        lambda x: special.gammaln(x) - x * jnp.log(x) + x,
        lambda x: (
            0.5 * (math.log(2 * math.pi) - jnp.log(x))
            + _series(x, {1: 1 / 12, 3: -1 / 360, 5: 1 / 1260, 7: -1 / 1680, 9: 1 / 1188})
        ),
    )


def _digamma(x: Array) -> Array:
    return _below(
        16,
        x,
        lambda x: special.digamma(x) - jnp.log(x),
        lambda x: _series(
            x, {1: -1 / 2, 2: -1 / 12, 4: 1 / 120, 6: -1 / 252, 8: 1 / 240, 10: -1 / 132}
        ),
    )


def _trigamma(x: Array) -> Array:
    """By its recurrence until the series is good: sums of positive terms alone."""
    total = jnp.zeros_like(x)
    for k in range(16 if x.dtype == jnp.float64 else 8):
        total += 1 / ((x + k) ** 2 * (x + k + 1))
    z = x + (16 if x.dtype == jnp.float64 else 8)
    series = {2: 1 / 2, 3: 1 / 6, 5: -1 / 30, 7: 1 / 42, 9: -1 / 30, 11: 5 / 66, 13: -691 / 2730}
    return total + _series(z, series)


GAMMA = _potential(_log_gamma, _digamma, _trigamma, reach=0)


# log I0(x) - x. Series: the logarithm of DLMF 10.40.1, with the coefficients c_n of x^-n.
_BESSEL = {1: 1 / 8, 2: 1 / 16, 3: 25 / 384, 4: 13 / 128, 5: 1073 / 5120, 6: 103 / 192}


def _by_dtype(x: Array) -> tuple[int, int]:
    """From where the series is good, and how many intervals the trapezoidal rule takes below."""
    return (400, 128) if x.dtype == jnp.float64 else (20, 16)


def _log_i0e(x: Array) -> Array:
    return _below(
        _by_dtype(x)[0],
        x,
        lambda x: jnp.log(special.i0e(x)),
        lambda x: -0.5 * jnp.log(2 * math.pi * x) + _series(x, _BESSEL),
    )


def _mean_cosine_less_one(x: Array) -> Array:
    slopes = {n + 1: -n * c for n, c in _BESSEL.items()}
    return _below(
        _by_dtype(x)[0],
        x,
        lambda x: special.i1e(x) / special.i0e(x) - 1,
        lambda x: _series(x, {1: -1 / 2, **slopes}),
    )


def _variance_of_cosine(x: Array) -> Array:
    """Under the density exp(x cos θ), summed at equal steps: exact but for rounding."""
    bound, intervals = _by_dtype(x)
    theta = np.pi * np.arange(intervals + 1) / intervals
    ends = np.where((theta == 0) | (theta == np.pi), 0.5, 1)
    # 1 - cos θ, and what each step counts, along an axis of their own.
    down, step = (
        jnp.asarray(each, x.dtype).reshape(*x.ndim * [1], -1)
        for each in (2 * np.sin(theta / 2) ** 2, ends)
    )

    def summed(x: Array) -> Array:
        mass = step * jnp.exp(-jnp.expand_dims(x, -1) * down)
        mass = mass / jnp.sum(mass, -1, keepdims=True)
        mean = jnp.sum(mass * down, -1, keepdims=True)
        return jnp.sum(mass * (down - mean) ** 2, -1)

    curvatures = {n + 2: n * (n + 1) * c for n, c in _BESSEL.items()}
    return _below(bound, x, summed, lambda x: _series(x, {2: 1 / 2, **curvatures}))


BESSEL = _potential(_log_i0e, _mean_cosine_less_one, _variance_of_cosine, reach=1)
