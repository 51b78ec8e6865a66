"""How a formula becomes a divergence, a user's as the library's own."""

import inspect
import sys
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any, NamedTuple, ParamSpec, Protocol, Unpack, cast

from jax import Array

from kljax import _pipeline
from kljax._engine import captures, checks
from kljax._engine.formula import Formula
from kljax._options import Options, plainly
from kljax._reading import Given

Parameters = ParamSpec("Parameters")

SIDES = ("predictions", "targets")


class Bound(NamedTuple):
    """What a call of a divergence asks for: a formula, and what its term is given besides."""

    formula: Formula
    params: dict[str, Any]


class DivergenceFn(Protocol):
    """A loss from two distributions, as `divergence` makes it; its own parameters are keywords."""

    __name__: str

    def __call__(self, predictions: Given, targets: Given, **options: Any) -> Array: ...

    def bind(self, **params: Any) -> Bound:
        """What a call with these parameters would ask for."""
        ...


class PlainDivergenceFn(Protocol):
    """One without parameters of its own, so that a type checker knows every keyword."""

    __name__: str

    def __call__(self, predictions: Given, targets: Given, **options: Unpack[Options]) -> Array: ...

    def bind(self, **params: Any) -> Bound: ...


class KnownDivergenceFn(Protocol[Parameters]):
    """One with parameters of its own that a type checker knows, too."""

    __name__: str

    def __call__(self, *args: Parameters.args, **options: Parameters.kwargs) -> Array: ...

    def bind(self, **params: Any) -> Bound: ...


def divergence(
    term: Callable[..., Array],
    *,
    normalized: Callable[..., Array] | None = None,
    needs_mass: bool = False,
) -> DivergenceFn:
    r"""Make a divergence from a term; also a decorator.

    .. math:: D = \sum_i f(\log s_i, \log t_i)

    Shapes: the term is elementwise on log-probabilities, float32 unless an input is float64; the
    divergence has the options, shapes and derivatives of `forward_kl`. Units: the term's own.

    Zeros: -inf reaches the term and is its own to answer for; the exported pieces (`term_kl`,
    `term_cross_entropy`, `log_mixture`, …) do. Masked classes never reach it.
    Gradients: to both sides, to the parameters and to arrays that the term captures, in every mode.
    Make a divergence once, for a new function is compiled anew. A term that captures anything but
    functions is not cached by the library's own ``jit``: call its divergence inside yours.
    Globals that a term reads must not change, as under ``jit``.

    Args:
        term: ``term(log_pred, log_target, *, <its parameters>)``, the contribution of each class.
            Its keyword-only arguments become keywords of the divergence, which may be traced.
        normalized: A term of the same sum and parameters for two sides that the library itself
            normalised, as ``normalized(log_pred, log_target, log_ratio, *, …)``. ``log_ratio`` is
            log pred - log target before these were rounded: with `term_generalized_kl` it keeps
            a divergence accurate near equality.
        needs_mass: It is infinite where targets are 0, so that a `TopK` teacher must know what
            mass is outside the k classes.

    Returns:
        ``f(predictions, targets, *, <its parameters>, <options of forward_kl>)``.

    Raises:
        ValueError: When called, if the term does not return one contribution per class.
        TypeError: For an unknown option or parameter.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> @kljax.divergence
        ... def power(log_s, log_t, *, gamma=0.5):
        ...     return gamma * (jnp.exp(gamma * log_s) - jnp.exp(gamma * log_t)) ** 2
        >>> print(f"{power(kljax.Probs([0.5, 0.5]), kljax.Probs([1.0, 0.0])):.4f}")
        0.2929
        >>> print(f"{power(kljax.Probs([0.5, 0.5]), kljax.Probs([1.0, 0.0]), gamma=1.0):.4f}")
        0.5000

    Source: the f-divergences of Csiszár and Shields, Information Theory and Statistics: A
    Tutorial (2004), section 4.
    """
    return _Made(term, normalized, needs_mass)


class _Made:
    """A divergence made of a user's term."""

    __name__: str
    __qualname__: str

    def __init__(
        self, term: Callable[..., Array], normalized: Callable[..., Array] | None, needs_mass: bool
    ):
        self._made_of = term, normalized, needs_mass
        name = getattr(term, "__name__", "divergence")
        self._formula = Formula(
            "divergence" if name == "<lambda>" else name,
            SIDES,
            lambda log_probs, _, params: term(*log_probs, **params),
            normalized
            and (lambda log_probs, ratio, params: normalized(*log_probs, ratio, **params)),
            needs_mass=needs_mass,
            cached=all(map(captures.is_pure, (term, normalized))),
        )
        given = inspect.signature(term).parameters.values()
        self._parameters = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
        self.__name__ = self._formula.name
        named_like(term, self)
        sides = [inspect.Parameter(a, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in SIDES]
        own = [p.replace(annotation=p.empty) for p in given if p.kind is p.KEYWORD_ONLY]
        self.__signature__ = inspect.Signature([*sides, *own, *_pipeline.OPTIONS.values()])

    def __call__(self, predictions: Given, targets: Given, **options: Any) -> Array:
        own = {name: options.pop(name) for name in self._parameters if name in options}
        known = (*self._parameters, *_pipeline.OPTIONS)
        checks.require_options(self._formula.name, options, known)
        formula, params = self.bind(**own)
        return _pipeline.evaluate(formula, (predictions, targets), params, **options)

    def bind(self, **params: Any) -> Bound:
        checks.require_options(self._formula.name, params, tuple(self._parameters))
        whole = {**self._parameters, **params}
        checks.require_parameters(
            self._formula.name, [k for k, v in whole.items() if v is inspect.Parameter.empty]
        )
        return Bound(self._formula, whole)

    def __reduce__(self) -> str | tuple[Any, ...]:
        """As a decorator it is found by its name, otherwise made again."""
        found: Any = sys.modules.get(self.__module__)
        for part in self.__qualname__.split("."):
            found = getattr(found, part, None)
        return self.__qualname__ if found is self else (_Made, self._made_of)


def bound(divergence: Callable[..., Array]) -> Bound | None:
    """What a divergence, or a partial of one, will ask for; None if it is not the library's."""
    given: dict[str, Any] = {}
    while isinstance(divergence, partial) and not divergence.args:
        given = {**divergence.keywords, **given}
        divergence = divergence.func
    bind = getattr(divergence, "bind", None)
    if bind is None or set(given) & set(_pipeline.OPTIONS):
        return None
    return bind(**given)


def binds(
    bind: Callable[..., Bound],
) -> Callable[[Callable[Parameters, Array]], KnownDivergenceFn[Parameters]]:
    """Let a divergence tell what it will ask for, with the defaults of its signature."""

    def decorate(divergence: Callable[Parameters, Array]) -> KnownDivergenceFn[Parameters]:
        given = inspect.signature(divergence).parameters.values()
        own = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}

        def with_defaults(**params: Any) -> Bound:
            checks.require_options(divergence.__name__, params, tuple(own))
            return bind(**{**own, **params})

        cast(Any, divergence).bind = with_defaults
        return cast(Any, plainly(divergence))

    return decorate


def named_like(function: Callable[..., Array], wrapper: Callable[..., Array]) -> Any:
    """Take over name and documentation, but not the signature."""
    assigned = ("__module__", "__name__", "__qualname__", "__doc__")
    wrapper = update_wrapper(wrapper, function, assigned, updated=())
    del wrapper.__wrapped__
    return wrapper
