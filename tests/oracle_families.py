"""The independent oracle of parametric distributions: densities, and sums and integrals of them.

No closed form of a divergence or an entropy is used. Parameters are named, and mean, what they do
in torch.distributions; one distribution at a time, no batches.

D(p‖q) is the integral of p log(p/q), or of p (r - 1 - log r) with r = q/p, whichever is the better
conditioned. As p and q both have mass 1 the two are equal, but no term of the second is negative:
its relative accuracy does not depend on how close p and q are. Where only q has mass that term is
q. Log-densities, and hence log r, have 40 digits before anything is rounded to float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

import mpmath
import numpy as np

Array = np.ndarray
Params = dict[str, float | Sequence[Any]]
LogDensity = Callable[[Any], Any]
Path = Callable[[float], tuple[Any, Any]]  # u on the real line -> (point, d point / du)
Axis = tuple[list[Path], LogDensity, LogDensity]
Table = tuple[Array, Array, Array, Array]  # mass of p at a node, log p, log q, log q/p

_mp = mpmath.MPContext()  # of its own, as the precision of mpmath.mp is the caller's
_mp.dps = 40

_REACH = 5.0  # of u: in each path it goes past where the mass falls below _NEGLIGIBLE
_NEGLIGIBLE = 1e-30  # where D < 0.03, hence q is much like p, q is below 1e-15 there too
_STEP = 1e-3  # of a derivative, as a part of the length over which D changes


# --- densities ---


def _xlogy(x: Any, y: Any) -> Any:
    return _mp.zero if x == 0 else x * _mp.log(y)


@lru_cache(maxsize=100_000)
def _log_factorial(n: int) -> Any:
    return _mp.log(_mp.factorial(n))


def _normal(loc: Any, scale: Any) -> LogDensity:
    top = -_mp.log(scale * _mp.sqrt(2 * _mp.pi))
    return lambda x: top - ((x - loc) / scale) ** 2 / 2


def _log_normal(loc: Any, scale: Any) -> LogDensity:
    normal = _normal(loc, scale)

    def log_density(x: Any) -> Any:
        log_x = _mp.log(x)
        return normal(log_x) - log_x

    return log_density


def _laplace(loc: Any, scale: Any) -> LogDensity:
    top = -_mp.log(2 * scale)
    return lambda x: top - abs(x - loc) / scale


def _gumbel(loc: Any, scale: Any) -> LogDensity:
    top = -_mp.log(scale)

    def log_density(x: Any) -> Any:
        z = (x - loc) / scale
        return top - z - _mp.exp(-z)

    return log_density


def _von_mises(loc: Any, concentration: Any) -> LogDensity:
    log_normalizer = _mp.log(2 * _mp.pi * _mp.besseli(0, concentration))
    return lambda x: concentration * _mp.cos(x - loc) - log_normalizer


def _uniform(low: Any, high: Any) -> LogDensity:
    top = -_mp.log(high - low)
    return lambda x: top if low <= x <= high else -_mp.inf


def _gamma(concentration: Any, rate: Any) -> LogDensity:
    top = concentration * _mp.log(rate) - _mp.loggamma(concentration)
    return lambda x: top + (concentration - 1) * _mp.log(x) - rate * x


def _exponential(rate: Any) -> LogDensity:
    top = _mp.log(rate)
    return lambda x: top - rate * x


def _poisson(rate: Any) -> LogDensity:
    log_rate = _mp.log(rate)
    return lambda k: (k * log_rate if k else 0) - rate - _log_factorial(k)


def _geometric(probs: Any) -> LogDensity:
    success, failure = _mp.log(probs), _mp.log(1 - probs)
    return lambda k: (k * failure if k else 0) + success


def _binomial(total_count: Any, probs: Any) -> LogDensity:
    n = int(total_count)

    def log_pmf(k: int) -> Any:
        if k > n:
            return -_mp.inf
        ways = _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
        return ways + _xlogy(k, probs) + _xlogy(n - k, 1 - probs)

    return log_pmf


def _categorical(probs: Any) -> LogDensity:
    log_probs = [_mp.log(x / _mp.fsum(probs)) for x in probs]
    return lambda k: log_probs[k]


def _bernoulli(probs: Any) -> LogDensity:
    return _categorical([1 - probs, probs])


def _multivariate_normal(loc: Any, covariance_matrix: Any) -> LogDensity:
    covariance = _mp.matrix(covariance_matrix)
    precision = _mp.inverse(covariance)
    top = -_mp.log(_mp.det(2 * _mp.pi * covariance)) / 2

    def log_density(x: Any) -> Any:
        z = x - _mp.matrix(loc)
        return top - (z.T * precision * z)[0] / 2

    return log_density


def _sticks(concentration: Sequence[Any]) -> list[LogDensity]:
    """Split a log-density of Dirichlet into one addend for each of the sticks y that are broken.

    x_i = y_i Π_{j<i} (1 - y_j), so that log x is a sum over y. A point is the pair (y, 1 - y).
    """
    log_beta = _mp.fsum(map(_mp.loggamma, concentration)) - _mp.loggamma(_mp.fsum(concentration))

    def stick(i: int) -> LogDensity:
        top = -log_beta if i == 0 else _mp.zero
        taken, left = concentration[i] - 1, _mp.fsum(c - 1 for c in concentration[i + 1 :])
        return lambda y: top + taken * _mp.log(y[0]) + left * _mp.log(y[1])

    return [stick(i) for i in range(len(concentration) - 1)]


# --- paths: changes of variable after which the trapezoidal rule converges exponentially ---


def _line(loc: Any, scale: Any) -> Path:
    """To the whole line, for what decays at least exponentially by `scale` around loc."""
    return lambda u: (loc + scale * math.sinh(u), scale * math.cosh(u))


def _exp_line(loc: Any, scale: Any) -> Path:
    """To x > 0, the logarithm on a line."""
    line = _line(loc, scale)

    def path(u: float) -> tuple[Any, Any]:
        t, dt = line(u)
        x = _mp.exp(t)
        return x, x * dt

    return path


def _half_line(end: Any, scale: Any) -> Path:
    """From end towards the sign of scale, for what decays exponentially by its size."""

    def path(u: float) -> tuple[Any, Any]:
        x = scale * math.exp(u - math.exp(-u))
        return end + x, abs(x) * (1 + math.exp(-u))

    return path


def _unit(t: Any) -> tuple[Any, Any]:
    """Return the logistic function y of t and, accurate near y = 1 as well, 1 - y."""
    small = _mp.exp(-abs(t))
    y = small / (1 + small), 1 / (1 + small)
    return y if t < 0 else y[::-1]


def _segment(low: Any, high: Any) -> Path:
    """To an interval, dense at both ends (tanh-sinh)."""

    def path(u: float) -> tuple[Any, Any]:
        y, rest = _unit(_mp.mpf(math.pi * math.sinh(u)))
        return low + (high - low) * y, (high - low) * y * rest * (math.pi * math.cosh(u))

    return path


def _stick_path(a: Any, b: Any, later: int) -> Path:
    """To (y, 1 - y), for mass like that of Beta(a, b), with the Jacobian of `later` sticks."""
    line = _line(_mp.log(a / b), _mp.sqrt(1 / a + 1 / b + 1 / a**2 + 1 / b**2))

    def path(u: float) -> tuple[Any, Any]:
        t, dt = line(u)
        y, rest = _unit(t)
        return (y, rest), y * rest * dt * rest**later

    return path


def _laplace_paths(p: Any, q: Any) -> list[Path]:
    low, high = sorted((p["loc"], q["loc"]))
    between = [_segment(low, high)] if low < high else []  # the densities have kinks at both
    return [_half_line(low, -p["scale"]), *between, _half_line(high, p["scale"])]


def _von_mises_paths(p: Any, _: Any) -> list[Path]:
    loc = p["loc"]  # the peak, however sharp, is where the nodes are dense
    return [_segment(loc - _mp.pi, loc), _segment(loc, loc + _mp.pi)]


def _gamma_path(concentration: Any, rate: Any) -> Path:
    return _exp_line(_mp.log(concentration / rate), _mp.sqrt(1 + concentration) / concentration)


_CONTINUOUS: dict[str, tuple[Callable[..., LogDensity], Callable[[Any, Any], list[Path]]]] = {
    "Normal": (_normal, lambda p, q: [_line(**p)]),
    "LogNormal": (_log_normal, lambda p, q: [_exp_line(**p)]),
    "Laplace": (_laplace, _laplace_paths),
    "Gumbel": (_gumbel, lambda p, q: [_line(**p)]),
    "VonMises": (_von_mises, _von_mises_paths),
    "Uniform": (_uniform, lambda p, q: [_segment(**p)]),
    "Gamma": (_gamma, lambda p, q: [_gamma_path(**p)]),
    "Exponential": (_exponential, lambda p, q: [_gamma_path(_mp.one, **p)]),
}

_DISCRETE: dict[str, Callable[..., LogDensity]] = {
    "Bernoulli": _bernoulli,
    "Categorical": _categorical,
    "Binomial": _binomial,
    "Poisson": _poisson,
    "Geometric": _geometric,
}


def _axes(family: str, p: Any, q: Any) -> list[Axis]:
    """Return one axis, or the several over which the log-densities are sums."""
    if family == "Beta":
        p, q = ({"concentration": [s["concentration1"], s["concentration0"]]} for s in (p, q))
    if family in ("Beta", "Dirichlet"):
        a = p["concentration"]
        n = len(a) - 1
        paths = [[_stick_path(a[i], _mp.fsum(a[i + 1 :]), n - 1 - i)] for i in range(n)]
        return list(zip(paths, _sticks(a), _sticks(q["concentration"]), strict=True))
    density, paths = _CONTINUOUS[family]
    return [(paths(p, q), density(**p), density(**q))]


def _support(family: str, p: Any, q: Any, log_p: LogDensity) -> Iterable[int]:
    """Return where p, or q, has mass, up to a negligible part of it."""
    if family == "Bernoulli":
        return range(2)
    if family == "Categorical":
        return range(len(p["probs"]))
    if family == "Binomial":
        return range(int(max(p["total_count"], q["total_count"])) + 1)
    # The pmf is log-concave: once it falls it falls faster than a geometric series.
    if family == "Poisson":
        low = high = int(p["rate"])
        stride = int(_mp.sqrt(p["rate"])) + 1
    else:
        low = high = 0
        stride = int(1 / p["probs"])
    least = log_p(low) + math.log(_NEGLIGIBLE)
    while log_p(high) > least:
        high += stride
    while low > 0 and log_p(low) > least:
        low = max(low - stride, 0)
    return range(low, high + 1)


# --- sums and integrals ---


def _row(x: Any, log_p: LogDensity, log_q: LogDensity) -> tuple[Any, Any, Any]:
    a, b = log_p(x), log_q(x)
    return a, b, b - a


def _discrete_table(family: str, p: Any, q: Any) -> Table:
    log_p, log_q = _DISCRETE[family](**p), _DISCRETE[family](**q)
    rows = [_row(k, log_p, log_q) for k in _support(family, p, q, log_p)]
    columns = np.array(rows, np.float64).T
    return np.exp(columns[0]), *columns


def _along(path: Path, log_p: LogDensity, log_q: LogDensity, us: Array) -> Array:
    """Return the columns of a table at the nodes of u."""
    rows = []
    for u in us.tolist():
        x, dx = path(u)
        row = _row(x, log_p, log_q)
        rows.append((dx * _mp.exp(row[0]), *row))
    return np.array(rows, np.float64).T


def _path_columns(path: Path, log_p: LogDensity, log_q: LogDensity) -> Iterator[Array]:
    """Yield tables of the trapezoidal rule along a path, each of half the step."""
    step = 0.25
    us = np.arange(-_REACH, _REACH + step, step)
    columns = _along(path, log_p, log_q, us)
    size = np.where(columns[0] > 0, columns[0] * (1 + abs(columns[3])), 0.0)
    kept = np.flatnonzero(size > _NEGLIGIBLE * size.max())
    if kept.size:
        # One more on the right; on the left the odd nodes go out by one step.
        used = slice(kept[0], kept[-1] + 2)
        us, columns = us[used], columns[:, used]
    while True:
        yield np.concatenate([columns[:1] * step, columns[1:]])[:, columns[0] > 0]
        odd = us - step / 2
        us = np.concatenate([us, odd])
        columns = np.concatenate([columns, _along(path, log_p, log_q, odd)], axis=1)
        step /= 2


def _tables(axes: list[Axis]) -> Iterator[Table]:
    """Yield tables of the product of all axes, ever finer."""
    rules = [[_path_columns(path, *densities) for path in paths] for paths, *densities in axes]
    while True:
        mass, *logs = np.concatenate([next(path) for path in rules[0]], axis=1)
        for rule in rules[1:]:
            more, *more_logs = np.concatenate([next(path) for path in rule], axis=1)
            mass = np.multiply.outer(mass, more).ravel()
            logs = [np.add.outer(a, b).ravel() for a, b in zip(logs, more_logs, strict=True)]
        yield mass, *logs


def _excess(d: Array) -> Array:
    """Return exp(d) - 1 - d."""
    series = [1 / math.factorial(k) for k in range(18, 1, -1)]
    near = abs(d) < 0.5
    return np.where(near, np.polyval(series, np.where(near, d, 0)) * d * d, np.expm1(d) - d)


def _divergence(table: Table) -> tuple[float, float]:
    """Return D and the size that its error is relative to."""
    mass, _, log_q, d = table
    here = mass > 0
    terms = mass[here] * -d[here]
    # Otherwise D < 0.03: E|log r| <= D + 2 TV, and TV² <= D/2.
    if terms.sum() >= 0.1 * abs(terms).sum():
        return terms.sum(), abs(terms).sum()
    out = (mass[here] * _excess(d[here])).sum() + np.exp(log_q[~here]).sum()
    return out, out


def _cross_entropy(table: Table) -> tuple[float, float]:
    """Return -E_p log q and the size that its error is relative to."""
    mass, _, log_q, _ = table
    terms = mass[mass > 0] * -log_q[mass > 0]
    return terms.sum(), abs(terms).sum()


def _multivariate_mean(p: Any, q: Any, of: Callable[[Any, Any], Any]) -> float:
    """Return E_p of a quadratic function, of log p and log q.

    Gauss-Hermite of two nodes, ±1, in each direction of z, x = loc + L z, is exact up to degree 3;
    the 40 digits take the place of a well-conditioned form.
    """
    log_p, log_q = _multivariate_normal(**p), _multivariate_normal(**q)
    root = _mp.cholesky(_mp.matrix(p["covariance_matrix"]))
    corners = list(product((-1, 1), repeat=len(p["loc"])))
    xs = [_mp.matrix(p["loc"]) + root * _mp.matrix(z) for z in corners]
    return float(_mp.fsum(of(log_p(x), log_q(x)) for x in xs) / len(xs))


def _integral(family: str, p: Any, q: Any, of: Callable[[Table], tuple[float, float]]) -> float:
    p, q = ({name: _exact(value) for name, value in side} for side in (p, q))
    with np.errstate(all="ignore"):
        if family == "MultivariateNormal":
            plain = of is _cross_entropy
            return _multivariate_mean(p, q, lambda a, b: -b if plain else a - b)
        if family in _DISCRETE:
            return float(of(_discrete_table(family, p, q))[0])
        last = math.nan
        for _, table in zip(range(8), _tables(_axes(family, p, q)), strict=False):
            value, size = of(table)
            # The error about squares when the step is halved, so that of `value` is far smaller.
            if value == last or abs(value - last) <= 1e-10 * size:
                return float(value)
            last = value
    raise ArithmeticError(f"the integral did not converge for {family}, {p}, {q}")


def _exact(value: Any) -> Any:
    return [_exact(v) for v in value] if isinstance(value, tuple) else _mp.mpf(value)


def _frozen(params: Params) -> Any:
    """Return parameters that can be hashed."""

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return tuple(
        (name, freeze(np.asarray(value, np.float64).tolist()))
        for name, value in sorted(params.items())
    )


_cached_integral = lru_cache(maxsize=10_000)(_integral)


def kl(family: str, p: Params, q: Params) -> float:
    """Return D(p‖q) in nats; inf where p has mass and q has none."""
    return _cached_integral(family, _frozen(p), _frozen(q), _divergence)


def cross_entropy(family: str, p: Params, q: Params) -> float:
    """Return -E_p log q in nats; inf where p has mass and q has none."""
    return _cached_integral(family, _frozen(p), _frozen(q), _cross_entropy)


def entropy(family: str, p: Params) -> float:
    """Return -E_p log p in nats, the differential entropy of a continuous distribution."""
    return cross_entropy(family, p, p)


# --- derivatives ---


def kl_gradient(
    family: str, p: Params, q: Params
) -> tuple[dict[str, float | Array], dict[str, float | Array]]:
    """Return the derivatives of D(p‖q) by each parameter of p and of q, but no total_count.

    Eighth-order central differences. `probs` of Categorical are normalised first, so each is free.
    The entries of a covariance matrix share: dD = Σ_ij G_ij dΣ_ij for symmetric dΣ. NaN where D is
    infinite or becomes so within any step, and at a probability of 0 or 1 or a rate of 0.
    """
    by_p, by_q = _cached_gradient(family, _frozen(p), _frozen(q))
    return {k: v.copy() for k, v in by_p.items()}, {k: v.copy() for k, v in by_q.items()}


@lru_cache(maxsize=10_000)
def _cached_gradient(family: str, p: Any, q: Any) -> Any:
    sides = [{name: np.array(value) for name, value in side} for side in (p, q)]
    return tuple(
        {
            name: _derivative(family, sides, side, name)[()]
            for name in sides[side]
            if name != "total_count"
        }
        for side in (0, 1)
    )


def _derivative(family: str, sides: list[dict[str, Array]], side: int, name: str) -> Array:
    """Return the derivatives by the entries of one parameter."""
    x = sides[side][name]
    lengths = np.broadcast_to(_length(family, sides, side, name), x.shape)
    out = np.empty(x.shape)
    for i in np.ndindex(x.shape):
        direction = np.zeros(x.shape)
        direction[i] = 1.0
        if name == "covariance_matrix":
            direction = (direction + direction.T) / 2

        def moved(step: float, direction: Array = direction) -> float:
            changed = list(sides)
            changed[side] = {**sides[side], name: x + step * direction}
            if (changed[side][name] == x).all():
                return math.nan
            return _integral(family, *map(_frozen, changed), _divergence)

        out[i] = _central(moved, _STEP * lengths[i])
    return out


def _central(f: Callable[[float], float], step: float) -> float:
    """Return f'(0); the step shrinks until f is finite all over it."""
    if not step > 0:
        return math.nan
    # Powers of two, which are added to a parameter without rounding.
    for h in 2.0 ** (math.floor(math.log2(step)) - np.arange(0, 33, 3)):
        pairs = [(f(k * h), f(-k * h)) for k in (1, 2, 3, 4)]
        if np.isfinite(pairs).all():
            weights = (4 / 5, -1 / 5, 4 / 105, -1 / 280)
            return sum(w * (a - b) for w, (a, b) in zip(weights, pairs, strict=True)) / h
    return math.nan


def _length(family: str, sides: list[dict[str, Array]], side: int, name: str) -> Any:
    """Return a length over which D is smooth in a parameter."""
    x = sides[side]
    if name == "covariance_matrix":
        return np.linalg.eigvalsh(x[name]).min()
    if name in ("low", "high"):
        return x["high"] - x["low"]
    if name == "probs" and family != "Categorical":
        return min(x[name], 1 - x[name])
    if name != "loc":
        return x[name]
    if family == "MultivariateNormal":
        return min(np.linalg.eigvalsh(s["covariance_matrix"]).min() for s in sides) ** 0.5
    if family == "VonMises":
        return 1 / max(1, *(s["concentration"] for s in sides)) ** 0.5
    scale = sides[0 if family == "Laplace" else 1]["scale"]
    apart = abs(sides[0]["loc"] - sides[1]["loc"])
    if family == "Laplace" and apart > 0:  # |loc - loc|³ is part of D
        return min(scale, apart / (4 * _STEP))
    return scale
