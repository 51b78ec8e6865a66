"""The divergences.

A divergence is a formula on log-probabilities. How a call flows:

    forward_kl(predictions, targets, …)   its body is the formula; `_of_kl` hands it the KL term
    _pipeline.evaluate                    the term, the path and the weights chosen; then run
    _reading                              shapes and options checked, arrays read and placed
    _engine.blockwise                     block by block, with the gradient along the way
    _engine.side.view                     what a side holds → log-probabilities, and their ratio
    _engine.loss.values                   the term, summed over the classes, and its derivative
    reduction.Weighting                   weights and denominator before, the sum after

Predictions s come first and targets t second, except in `kl(p, q)`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kljax import _pipeline
from kljax._engine import checks, value_checks
from kljax._engine.formula import Formula, Term
from kljax._engine.terms import (
    log_mixture,
    term_cross_entropy,
    term_entropy,
    term_generalized_kl,
    term_jensen_shannon,
    term_kl,
    term_skew_kl,
    weigh,
)
from kljax._making import SIDES, Bound, PlainDivergenceFn, binds, named_like
from kljax._options import Options, plainly
from kljax._pipeline import SMOOTHING
from kljax._reading import Given
from kljax.distributions import Distribution
from kljax.distributions.labels import Labels

KLTerm = Callable[[Array, Array, Array], Array]  # (log p, log q, log q - log p)


def _of_kl(
    formula: Callable[..., Array],
    *,
    name: str | None = None,
    directions: tuple[bool, bool] | None = None,
    needs_mass: bool = False,
) -> Formula:
    """From a formula on KL terms: formula(kl, s, t, log s - log t, …).

    The textbook term serves sides taken at their word, the non-negative one sides that the
    library normalised; ``directions`` tell what the latter sums to.
    """

    def of(kl: KLTerm) -> Term:
        def term(log_probs: tuple[Array, ...], ratio: Array, params: dict[str, Array]) -> Array:
            own = {name: param.astype(ratio.dtype) for name, param in params.items()}
            return formula(kl, *log_probs, ratio, **own)

        return term

    return Formula(
        name or formula.__name__,
        SIDES,
        of(term_kl),
        of(term_generalized_kl),
        directions,
        needs_mass,
    )


def _divergence_of_kl(
    formula: Callable[..., Array],
    *,
    directions: tuple[bool, bool] | None = None,
    needs_mass: bool = False,
) -> PlainDivergenceFn:
    """Make a divergence from a formula on KL terms that has no parameters of its own."""
    made = _of_kl(formula, directions=directions, needs_mass=needs_mass)

    def compute(predictions: Given, targets: Given, **options: Unpack[Options]) -> Array:
        return _pipeline.evaluate(made, (predictions, targets), {}, **options)

    return binds(lambda: Bound(made, {}))(named_like(formula, compute))


@partial(_divergence_of_kl, directions=(False, True))
def forward_kl(kl: KLTerm, s: Array, t: Array, ratio: Array) -> Array:
    r"""Forward KL, D(targets‖predictions): the distillation loss; mass-covering.

    .. math:: D(t\|s) = \sum_i t_i (\log t_i - \log s_i)

    Shapes: both sides ``batch + classes``, equal; or one of them ``classes`` alone, one
    distribution for the whole batch. Nothing else broadcasts. The result has the batch shape, or
    none if reduced; float32, or float64 if an input is. Units: nats.

    Zeros: a zero target contributes 0, whatever the prediction; a zero prediction under a
    positive target gives +inf; an example with no class left gives 0. NaN gives NaN unless it is
    masked by ``where`` or has weight 0. Where the library normalised both sides (logits, or any
    side given a temperature) the result is never negative, and exactly 0 at equality.
    Gradients: to both sides, temperature, weights and normalizer, in reverse and forward mode
    and of second order. Nothing is stopped: stop a teacher with ``jax.lax.stop_gradient``. Where
    the value is +inf the gradient to predictions is finite on logits (softmax - t) and that to
    targets is NaN. Gradients through ``axis_name`` and ``class_axis_name``: see `reduce`.

    Args:
        predictions: The model, student or policy: `Logits` or a bare array, `LogProbs`, `Probs`,
            or `Head`.
        targets: The data, teacher or reference, likewise, or `TopK`.
        axis: The axis, or axes, that one distribution occupies.
        where: bool, which classes exist, for both sides: shape ``classes`` or the whole input's.
        temperature: Both sides become softmax(log-probabilities / T), T > 0: a scalar, or one per
            example (the batch shape). The result is not multiplied by T². None leaves the inputs
            untouched.
        weights: bool, int or float, one per example: exactly the batch shape.
        reduction: "none", "mean" (by the sum of weights), "sum" or "batchmean" (by the leading
            batch size, whatever the weights).
        normalizer: With "mean", what to divide by instead; already global. 0 gives 0.
        axis_name: Named mapped axes to sum numerator and denominator over before dividing.
        class_axis_name: Named mapped axes over which the classes are spread, in equal shards in
            the order of the axes; labels and top-k indices number the whole vocabulary, and the
            result is that of the whole. Without it each shard is a distribution of its own.
        implementation: None chooses; "dense" is the whole batch at once, "chunked" a block of
            examples at a time, ``Chunked(rows=…)`` so many at a time.

    Returns:
        wℓ per example, or their reduction.

    Raises:
        ValueError: For a shape or option that does not fit, when tracing; under `checked` also for
            values that cannot be what their type says.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(kljax.forward_kl(student, teacher).round(4))
        [0.1768]

    Source: Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015),
    section 2; Cover and Thomas, Elements of Information Theory, section 2.3.
    """
    return kl(t, s, ratio)


@partial(_divergence_of_kl, directions=(True, False), needs_mass=True)
def reverse_kl(kl: KLTerm, s: Array, t: Array, ratio: Array) -> Array:
    r"""Reverse KL, D(predictions‖targets): mode-seeking; RL, on-policy distillation.

    .. math:: D(s\|t) = \sum_i s_i (\log s_i - \log t_i)

    Shapes, units, options, errors: as `forward_kl`.

    Zeros: a zero prediction contributes 0; a zero target under a positive prediction gives +inf.
    Gradients: as `forward_kl`, with the sides exchanged: where the value is +inf, finite to
    targets and NaN to predictions.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(kljax.reverse_kl(student, teacher).round(4))
        [0.2668]

    Source: Murphy, Probabilistic Machine Learning: Advanced Topics, section 5.1.3.
    """
    return kl(s, t, -ratio)


@partial(_divergence_of_kl, directions=(True, True), needs_mass=True)
def jeffreys(kl: KLTerm, s: Array, t: Array, ratio: Array) -> Array:
    r"""Jeffreys divergence, forward plus reverse KL; symmetric.

    .. math:: D(t\|s) + D(s\|t) = \sum_i (t_i - s_i)(\log t_i - \log s_i)

    Shapes, units, options, errors: as `forward_kl`.

    Zeros: +inf where exactly one side is zero, 0 where both are.
    Gradients: as `forward_kl`; where the value is +inf they are those of its two parts, so NaN
    to the side that put mass where the other has none.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> print(kljax.jeffreys(student, teacher).round(4))
        [0.4437]

    Source: Jeffreys, Theory of Probability, section 3.10.
    """
    return kl(t, s, ratio) + kl(s, t, -ratio)


def _fraction(caller: str, argument: str, value: ArrayLike) -> Array:
    value = checks.require_fraction(caller, argument, value)
    value_checks.check_fraction(caller, argument, value)
    return value


@partial(_of_kl, name="jensen_shannon")
def _jensen_shannon(kl: KLTerm, s: Array, t: Array, ratio: Array, *, beta: Array) -> Array:
    return term_jensen_shannon(t, s, beta, ratio)


@partial(_of_kl, name="jensen_shannon")
def _jensen_shannon_scaled(kl: KLTerm, s: Array, t: Array, ratio: Array, *, beta: Array) -> Array:
    """J / (β(1 - β)), and at the ends its limit, to first order in β."""
    at_end = (beta == 0) | (beta == 1)
    inside = jnp.where(at_end, 0.5, beta)
    between = term_jensen_shannon(t, s, inside, ratio) / (inside * (1 - inside))
    s, t, ratio = (jnp.where(at_end, x, 0) for x in (s, t, ratio))
    forward, reverse = kl(t, s, ratio), kl(s, t, -ratio)
    excess = jnp.exp(t) - jnp.exp(s)
    from_0 = weigh(beta, forward - 0.5 * excess * jnp.expm1(-ratio))
    from_1 = weigh(1 - beta, reverse + 0.5 * excess * jnp.expm1(ratio))
    return jnp.where(at_end, jnp.where(beta == 0, forward + from_0, reverse + from_1), between)


def _bind_jensen_shannon(beta: ArrayLike, normalized: bool) -> Bound:
    formula = _jensen_shannon_scaled if normalized else _jensen_shannon
    formula = formula._replace(needs_mass=normalized and checks.is_static(beta, 1))
    return Bound(formula, {"beta": _fraction("jensen_shannon", "beta", beta)})


@binds(_bind_jensen_shannon)
def jensen_shannon(
    predictions: Given,
    targets: Given,
    *,
    beta: ArrayLike = 0.5,
    normalized: bool = False,
    **options: Unpack[Options],
) -> Array:
    r"""Generalised Jensen–Shannon divergence from the mixture m of both sides; bounded.

    .. math:: J = \beta D(t\|m) + (1 - \beta) D(s\|m), \qquad m = \beta t + (1 - \beta) s

    Shapes, units, options, errors: as `forward_kl`. Never above the entropy of (β, 1 - β):
    log 2 at ½.

    Zeros: always finite; a class that both sides lack contributes 0. With ``normalized``
    β = 0 and 1 follow the rules of forward and reverse KL.
    Gradients: to both sides and beta, finite where the value is; with ``normalized``, at the
    ends themselves, to beta of first order only.

    Args:
        predictions: As for `forward_kl`.
        targets: As for `forward_kl`.
        beta: The targets' share of the mixture, in [0, 1]; may be traced. J itself goes to 0 at
            both ends.
        normalized: Divide by β(1 - β): continuous in β, forward KL at 0, reverse KL at 1 and
            4 times the Jensen–Shannon divergence at ½.
        **options: As for `forward_kl`.

    Raises:
        ValueError: If beta is outside [0, 1]; when traced, under `checked`.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.jensen_shannon(kljax.Probs([1.0, 0.0]), kljax.Probs([0.0, 1.0])):.4f}")
        0.6931

    Source: Lin, Divergence measures based on the Shannon entropy, IEEE Transactions on
    Information Theory 37 (1991), section IV; Agarwal et al., On-Policy Distillation of Language
    Models (GKD, 2024), section 2.
    """
    formula, params = _bind_jensen_shannon(beta, normalized)
    return _pipeline.evaluate(formula, (predictions, targets), params, **options)


def _to_mixture(kl: KLTerm, log_a: Array, log_b: Array, weight: Array, log_ratio: Array) -> Array:
    """D(a‖m) for m = w a + (1 - w) b."""
    if kl is term_generalized_kl:
        return term_skew_kl(log_a, log_b, weight, log_ratio)
    m, m_over_a, _ = log_mixture(log_a, log_b, weight, log_ratio)
    return kl(log_a, m, m_over_a)


@partial(_of_kl, name="skew_forward_kl")
def _skew_forward(kl: KLTerm, s: Array, t: Array, ratio: Array, *, alpha: Array) -> Array:
    return _to_mixture(kl, t, s, alpha, ratio)


def _bind_skew_forward(alpha: ArrayLike) -> Bound:
    return Bound(_skew_forward, {"alpha": _fraction("skew_forward_kl", "alpha", alpha)})


@binds(_bind_skew_forward)
def skew_forward_kl(
    predictions: Given, targets: Given, *, alpha: ArrayLike = 0.1, **options: Unpack[Options]
) -> Array:
    r"""Skew forward KL: from the targets to a mixture that holds a little of them; bounded.

    .. math:: D(t \,\|\, \alpha t + (1 - \alpha) s)

    Shapes, units, options, errors: as `forward_kl`. Never above -log α.

    Zeros: finite for α > 0, where a zero prediction costs t log(1/α); α = 0 is `forward_kl`.
    Gradients: to both sides and alpha.

    Args:
        predictions: As for `forward_kl`.
        targets: As for `forward_kl`.
        alpha: The targets' share of the mixture, in [0, 1]; may be traced.
        **options: As for `forward_kl`.

    Raises:
        ValueError: If alpha is outside [0, 1]; when traced, under `checked`.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.skew_forward_kl(kljax.Probs([1.0, 0.0]), kljax.Probs([0.0, 1.0])):.4f}")
        2.3026

    Source: Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models
    (2024), section 3.1.
    """
    formula, params = _bind_skew_forward(alpha)
    return _pipeline.evaluate(formula, (predictions, targets), params, **options)


@partial(_of_kl, name="skew_reverse_kl")
def _skew_reverse(kl: KLTerm, s: Array, t: Array, ratio: Array, *, alpha: Array) -> Array:
    return _to_mixture(kl, s, t, alpha, -ratio)


def _bind_skew_reverse(alpha: ArrayLike) -> Bound:
    formula = _skew_reverse._replace(needs_mass=checks.is_static(alpha, 0))
    return Bound(formula, {"alpha": _fraction("skew_reverse_kl", "alpha", alpha)})


@binds(_bind_skew_reverse)
def skew_reverse_kl(
    predictions: Given, targets: Given, *, alpha: ArrayLike = 0.1, **options: Unpack[Options]
) -> Array:
    r"""Skew reverse KL: from the predictions to a mixture that holds a little of them; bounded.

    .. math:: D(s \,\|\, \alpha s + (1 - \alpha) t)

    Shapes, units, options, errors: as `forward_kl`. Never above -log α.

    Zeros: finite for α > 0, where a zero target costs s log(1/α); α = 0 is `reverse_kl`.
    Gradients: to both sides and alpha.

    Args:
        predictions: As for `forward_kl`.
        targets: As for `forward_kl`.
        alpha: The predictions' share of the mixture, in [0, 1]; may be traced.
        **options: As for `forward_kl`.

    Raises:
        ValueError: If alpha is outside [0, 1]; when traced, under `checked`.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.skew_reverse_kl(kljax.Probs([1.0, 0.0]), kljax.Probs([0.0, 1.0])):.4f}")
        2.3026

    Source: Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models
    (2024), section 3.1.
    """
    formula, params = _bind_skew_reverse(alpha)
    return _pipeline.evaluate(formula, (predictions, targets), params, **options)


@binds(lambda: Bound(KL, {}))
def kl(p: Given, q: Given, **options: Unpack[Options]) -> Array:
    r"""Kullback–Leibler divergence D(p‖q), with its arguments in the order of the formula.

    .. math:: D(p\|q) = \sum_i p_i (\log p_i - \log q_i)

    Shapes, units (nats), options, errors: as `forward_kl`, which is ``kl(targets, predictions)``;
    as a loss, prefer the functions that name the direction.

    Zeros: 0 where p = 0, whatever q; +inf where only q = 0.
    Gradients: to both sides, as `forward_kl`; where the value is +inf, finite to q and NaN to p.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(f"{kljax.kl(kljax.Probs([0.5, 0.5]), kljax.Probs([0.25, 0.75])):.4f}")
        0.1438

    Source: Kullback and Leibler, On Information and Sufficiency, Annals of Mathematical
    Statistics 22 (1951), section 2.
    """
    return _pipeline.evaluate(KL, (p, q), {}, **options)


@plainly
def kl_terms(
    p: Given,
    q: Given,
    *,
    axis: int | Iterable[int] = -1,
    where: ArrayLike | None = None,
    temperature: ArrayLike | None = None,
) -> Array:
    r"""The textbook contribution of each class to D(p‖q), not summed.

    .. math:: p_i (\log p_i - \log q_i)

    Shapes: as the inputs, a shared side broadcast. Single terms may be negative. Units: nats.

    Zeros: 0 where p = 0, also where q = 0 there; +inf where only q = 0; 0 at masked classes.
    Gradients: to both sides and temperature, in reverse and forward mode and of second order.

    Args:
        p: As for `kl`.
        q: As for `kl`.
        axis: The axis, or axes, that one distribution occupies.
        where: bool, which classes exist.
        temperature: Both sides become softmax(log-probabilities / T).

    Raises:
        ValueError: For a shape or option that does not fit.
        TypeError: For a dtype.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(kljax.kl_terms(kljax.Probs([1.0, 0.0]), kljax.Probs([0.5, 0.5])).round(4))
        [0.6931 0.    ]

    Source: Cover and Thomas, Elements of Information Theory, section 2.3.
    """
    return _pipeline.evaluate_elements(
        _KL_TERMS, (p, q), axis=axis, where=where, temperature=temperature
    )


def _bind_cross_entropy(label_smoothing: ArrayLike) -> Bound:
    return Bound(CROSS_ENTROPY, smoothing("cross_entropy", label_smoothing))


@binds(_bind_cross_entropy)
def cross_entropy(
    predictions: Given,
    targets: Given,
    *,
    label_smoothing: ArrayLike = 0.0,
    **options: Unpack[Options],
) -> Array:
    r"""Cross-entropy H(targets, predictions); targets may be integer labels.

    .. math:: H(t, s) = -\sum_i t_i \log s_i = H(t) + D(t\|s)

    Shapes, units, options: as `forward_kl`. Integer targets have the batch shape and one class
    axis; a temperature leaves them one-hot. Any other target says what it is: one-hot or soft
    labels are `Probs`, a teacher's logits `Logits`.

    Zeros: a zero target contributes 0; +inf where the prediction is zero under a positive one.
    A label out of range, or of a masked class, gives NaN; in an example of weight 0 it is never
    read.
    Gradients: as `forward_kl`; none to labels. It is linear in `Probs` targets: to them it is
    -log s, also at a zero target, but for 0 where s = 0 as well.

    Args:
        predictions: As for `forward_kl`.
        targets: Integer labels, or a distribution as for `forward_kl`.
        label_smoothing: ε in [0, 1], of labels only, may be traced: (1 - ε) times the
            cross-entropy with the labels and ε times that with the uniform distribution over the
            classes that exist.
        **options: As for `forward_kl`.

    Raises:
        ValueError: For a shape or option that does not fit, or smoothing of a distribution; under
            `checked` also for labels out of range.
        TypeError: For a dtype, and for bare floats as targets.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(kljax.cross_entropy(jnp.zeros((2, 4)), jnp.array([3, 0])).round(4))
        [1.3863 1.3863]

    Source: Murphy, Probabilistic Machine Learning: An Introduction, section 6.1.2.
    """
    formula, params = _bind_cross_entropy(label_smoothing)
    if not isinstance(targets, Distribution):
        labels = checks.to_array("cross_entropy", "targets", targets)
        checks.require_said("cross_entropy", "targets", labels)
        return _pipeline.evaluate(LABELS, (predictions, Labels(labels)), params, **options)
    checks.require_no_smoothing("cross_entropy", label_smoothing)
    return _pipeline.evaluate(formula, (predictions, targets), {}, **options)


def smoothing(caller: str, label_smoothing: ArrayLike) -> dict[str, Array]:
    """The parameter of a cross-entropy with labels; none where there is nothing to smooth."""
    if checks.is_static(label_smoothing, 0):
        return {}
    return {SMOOTHING: _fraction(caller, "label_smoothing", label_smoothing)}


@plainly
def entropy(p: Given, **options: Unpack[Options]) -> Array:
    r"""Shannon entropy H(p).

    .. math:: H(p) = -\sum_i p_i \log p_i

    Shapes: the batch shape, or none if reduced. Units: nats. Options, errors: as `forward_kl`.

    Zeros: a zero class contributes 0.
    Gradients: to p, temperature, weights and normalizer, in every mode; 0 to a zero class.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> print(kljax.entropy(jnp.zeros((2, 4))).round(4))
        [1.3863 1.3863]

    Source: Cover and Thomas, Elements of Information Theory, section 2.1.
    """
    return _pipeline.evaluate(ENTROPY, (p,), {}, **options)


KL = Formula(
    "kl",
    ("p", "q"),
    lambda log, ratio, _: term_kl(log[0], log[1], -ratio),
    lambda log, ratio, _: term_generalized_kl(log[0], log[1], -ratio),
    directions=(True, False),
    needs_mass=True,
)
_KL_TERMS = KL._replace(name="kl_terms", normalized=None, directions=None)
CROSS_ENTROPY = Formula(
    "cross_entropy",
    SIDES,
    lambda log, *_: term_cross_entropy(log[1], log[0]),
    cross_entropy=True,
)
LABELS = CROSS_ENTROPY._replace(
    arguments=("predictions", "labels"),
    term=lambda log, *_: jnp.where(jnp.isneginf(log[1]), 0, -log[0]),
)
ENTROPY = Formula("entropy", ("p",), lambda log, *_: term_entropy(log[0]))
