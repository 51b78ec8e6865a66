"""Training with KL: pure functions in optax's manner, none of which owns the loop.

What has a state keeps it in an optax state, so that whatever checkpoints one checkpoints the other;
schedules are functions of the step. All of it works under ``jit`` and with any pytree of
parameters: plain dictionaries, Flax Linen's and NNX's, Equinox's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike

from kljax._engine import checks
from kljax._engine.meshes import varying
from kljax._options import SharedOptions, UnweightedOptions, plainly
from kljax._reading import Given
from kljax.distributions import LogProbs, Probs
from kljax.divergences import forward_kl, kl
from kljax.objectives import DistillationMetrics, distillation_loss
from kljax.reduction import AxisName, Reduction

Schedule = Callable[[Array], ArrayLike]
Scheduled = ArrayLike | Schedule
Params = TypeVar("Params")
Batch = TypeVar("Batch")
Aux = TypeVar("Aux")


class _DistillationOptions(SharedOptions, total=False):
    """What `distillation_loss` takes besides the numbers of a `Distillation`."""

    weights: ArrayLike | None
    reduction: Reduction
    label_weights: ArrayLike | None
    label_normalizer: ArrayLike | None


@dataclass(frozen=True)
class Distillation:
    r"""`distillation_loss` with its numbers, each of which may be an optax schedule of the step.

    .. math:: L_k = \lambda_\text{soft}(k) T(k)^2 D(\text{predictions}, \text{targets}; T(k))
              + \lambda_\text{hard}(k) H(\text{labels}, \text{predictions}; 1)

    Args:
        divergence: As for `distillation_loss`, as is all that follows.
        temperature: A number, None or a schedule.
        soft_weight: A number or a schedule.
        hard_weight: A number or a schedule.
        label_smoothing: A number or a schedule.
        scale_by_temperature: Whether to multiply the soft term by T².

    Example:
        >>> import jax.numpy as jnp, kljax, optax
        >>> distill = kljax.training.Distillation(
        ...     temperature=optax.linear_schedule(4.0, 1.0, 1000), soft_weight=0.9, hard_weight=0.1
        ... )
        >>> student, teacher = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, 1.0, 4.0]])
        >>> loss, metrics = distill(student, teacher, jnp.array([2]), step=500)
        >>> print(f"{loss:.4f}")
        0.3456
    """

    divergence: Callable[..., Array] = forward_kl
    temperature: Scheduled | None = None
    soft_weight: Scheduled = 1.0
    hard_weight: Scheduled = 0.0
    label_smoothing: Scheduled = 0.0
    scale_by_temperature: bool = True

    def __call__(
        self,
        predictions: Given,
        targets: Given,
        labels: ArrayLike | Probs | LogProbs | None = None,
        *,
        step: ArrayLike | None = None,
        **options: Unpack[_DistillationOptions],
    ) -> tuple[Array, DistillationMetrics]:
        """The loss and its metrics at a step.

        Args:
            predictions: The student.
            targets: The teacher.
            labels: As for `distillation_loss`.
            step: Of the schedules; not needed where there are none.
            **options: Any others of `distillation_loss`: ``weights``, ``where``, …
        """
        scheduled = ("temperature", "soft_weight", "hard_weight", "label_smoothing")
        numbers = {name: _at(step, name, getattr(self, name)) for name in scheduled}
        return distillation_loss(
            predictions,
            targets,
            labels,
            divergence=self.divergence,
            scale_by_temperature=self.scale_by_temperature,
            **numbers,
            **options,
        )


def _at(step: ArrayLike | None, name: str, value: Scheduled | None) -> Any:
    if not callable(value):
        return value
    checks.require_step("Distillation", name, step)
    return value(jnp.asarray(step))


def accumulated_value_and_grad(
    loss: Callable[[Params, Batch, Any], tuple[Array, Aux]],
    steps: int,
    *,
    weights: Callable[[Batch], Any],
    axis_name: AxisName | None = None,
) -> Callable[[Params, Batch], tuple[tuple[Array, Aux], Params]]:
    r"""The loss and gradient of a batch, one micro-batch at a time: those of the whole at once.

    .. math:: \sum_m \frac{\sum_{n \in m} w_n \ell_n}{\sum_n w_n}

    A mean of the micro-batches' means is another number wherever their weights differ. So the
    weights are summed over the whole batch first, and each micro-batch divides by that sum: it is
    the ``normalizer`` of `forward_kl`, `distillation_loss` and `reduce`.

    Shapes: every array of a batch has the examples first, a multiple of ``steps``. Micro-batch m
    holds the examples m, m + steps, …: so each of them is spread over devices as the batch is.
    Units: the loss's own.

    Zeros: a micro-batch without weight adds 0.
    Gradients: to the parameters, summed in float32 and returned in their own dtypes.

    Args:
        loss: ``loss(params, batch, normalizer) -> (value, aux)``, a sum over the batch divided by
            the normalizer. With ``axis_name`` it must not sum over the axis itself.
        steps: How many micro-batches.
        weights: Of a batch, what the denominator is the sum of: an array, one weight per example,
            or a tree of them, as for ``normalizer`` and ``label_normalizer``. The normalizer is of
            the same structure.
        axis_name: Named mapped axes (``shard_map``) over which each device has a batch of its own;
            value and gradients, of parameters that all share, are summed over them, once.

    Returns:
        ``f(params, batch) -> ((value, aux), gradients)``, aux stacked by micro-batch.

    Raises:
        ValueError: When called, if the examples are no multiple of ``steps``.

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> def loss(params, batch, normalizer):
        ...     values = (batch["x"] * params) ** 2
        ...     total = kljax.reduce(
        ...         values, weights=batch["mask"], reduction="mean", normalizer=normalizer
        ...     )
        ...     return total, values
        >>> f = kljax.training.accumulated_value_and_grad(loss, 2, weights=lambda b: b["mask"])
        >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 4.0]), "mask": jnp.array([1, 1, 1, 0])}
        >>> (value, aux), gradient = f(jnp.float32(1.0), batch)
        >>> print(f"{value:.4f} {gradient:.4f}")
        4.6667 9.3333

    Source: the weighted mean; on what happens without it, the issue "Gradient accumulation yields
    worse results" that many training libraries had.
    """
    names = checks.require_axis_names("accumulated_value_and_grad", "axis_name", axis_name)
    steps = checks.require_count("accumulated_value_and_grad", "steps", steps)

    def value_and_grad(params: Params, batch: Batch) -> tuple[tuple[Array, Aux], Params]:
        arrays = jax.tree.leaves(batch)
        checks.require_multiple("accumulated_value_and_grad", "batch", arrays, steps)
        normalizer = jax.tree.map(partial(_total, names), weights(batch))
        # Each device's own until the end: else JAX would sum their gradients in every turn.
        apart = [name for name in names if name in varying(arrays)]
        own = jax.tree.map(lambda x: _varies_over(x, apart), params)
        cut = jax.tree.map(lambda x: x.reshape(x.shape[0] // steps, steps, *x.shape[1:]), batch)

        def turn(sums: Params, m: Array) -> tuple[Params, tuple[Array, Aux]]:
            part = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, 1, keepdims=False), cut)
            found, gradients = jax.value_and_grad(loss, has_aux=True)(own, part, normalizer)
            return jax.tree.map(lambda total, x: total + x, sums, gradients), found

        sums, (values, aux) = lax.scan(turn, jax.tree.map(_nothing, own), jnp.arange(steps))

        def summed(total: Array, x: Array) -> Array:
            shared = tuple(name for name in names if name not in varying([x]))
            return (lax.psum(total, shared) if shared else total).astype(x.dtype)

        value = jnp.sum(values)
        value = lax.psum(value, names) if names else value
        return (value, aux), jax.tree.map(summed, sums, params)

    return value_and_grad


def _total(names: tuple[str, ...], weights: Array) -> Array:
    total = jnp.sum(weights, dtype=_wide(weights))
    return lax.psum(total, names) if names else total


def _varies_over(x: Array, names: list[str]) -> Array:
    missing = tuple(name for name in names if name not in varying([x]))
    return lax.pcast(x, missing, to="varying") if missing else x


def _nothing(x: Array) -> Array:
    """Where gradients to x begin to add up."""
    return _varies_over(jnp.zeros(x.shape, _wide(x)), list(varying([x])))


def _wide(x: Array) -> jnp.dtype:
    return jnp.dtype("float64" if x.dtype == jnp.float64 else "float32")


def _one_more(count: Any) -> Any:
    return optax.safe_increment(count)


def _dot(a: Any, b: Any) -> Any:
    return optax.tree.vdot(a, b)


class EmaTeacherState(NamedTuple):
    """How many steps were made, the average of the parameters, and the optimizer's own state."""

    count: Array
    ema_params: Any
    inner_state: Any


def ema_teacher(
    inner: optax.GradientTransformation, decay: Scheduled
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that also keeps a teacher: the moving average of what it makes.

    .. math:: \bar\theta \leftarrow d \, \bar\theta + (1 - d) (\theta + \text{update})

    The teacher starts at the parameters, so that nothing need be debiased. Take it with
    ``optax.tree.get(state, "ema_params")``. It is float32 where the parameters have 16 bits, which
    could not hold the small steps of an average.

    Shapes: as the parameters. Units: theirs.
    Zeros: a decay of 0 gives the new parameters themselves.
    Gradients: none; stop the teacher's outputs with ``jax.lax.stop_gradient``.

    Args:
        inner: The optimizer; outside others that change the update, or the average is of another.
        decay: d in [0, 1], or a schedule of the number of steps made before.

    Example:
        >>> import jax.numpy as jnp, kljax, optax
        >>> tx = kljax.training.ema_teacher(optax.sgd(1.0), decay=0.5)
        >>> params = jnp.array([1.0])
        >>> updates, state = tx.update(jnp.array([1.0]), tx.init(params), params)
        >>> print(optax.apply_updates(params, updates), optax.tree.get(state, "ema_params"))
        [0.] [0.5]

    Source: Tarvainen and Valpola, Mean teachers are better role models (2017), equation 2.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> EmaTeacherState:
        start = jax.tree.map(lambda x: jnp.array(x, _wide(x)), params)
        return EmaTeacherState(jnp.zeros((), jnp.int32), start, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        checks.require_given("ema_teacher", "params", params, "params")
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        share = 1 - jnp.asarray(decay(state.count) if callable(decay) else decay)
        moved = jax.tree.map(
            lambda new, old: new.astype(old.dtype),
            optax.apply_updates(params, updates),
            state.ema_params,
        )
        ema = optax.incremental_update(moved, state.ema_params, share)
        ema = jax.tree.map(lambda new, old: new.astype(old.dtype), ema, state.ema_params)
        return updates, EmaTeacherState(_one_more(state.count), ema, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class ApplyIfKlBelowState(NamedTuple):
    """Whether the last update was applied, how many were not, and the optimizer's own state."""

    last_applied: Array
    rejected: Array
    inner_state: Any


def apply_if_kl_below(
    inner: optax.GradientTransformation, max_kl: ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""An optimizer that makes no step once the policy is too far from where it was.

    .. math:: \text{update} = \begin{cases} \text{the inner one} & D \leq d_\text{max} \\
              0 & \text{else, or } D \text{ is NaN} \end{cases}

    As ``optax.apply_if_finite``: where the update is 0 the inner state stays as it was.
    ``tx.update(gradients, state, params, kl=kl)``, and with Flax NNX
    ``optimizer.update(model, gradients, kl=kl)``.

    Shapes: ``kl`` is one number. Units: those of ``kl``, nats.
    Zeros: a divergence of 0 is below any bound but a negative one.
    Gradients: none.

    Args:
        inner: The optimizer.
        max_kl: The bound.

    Example:
        >>> import jax.numpy as jnp, kljax, optax
        >>> tx = kljax.training.apply_if_kl_below(optax.sgd(1.0), max_kl=0.02)
        >>> params = jnp.array([1.0])
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jnp.array([1.0]), state, params, kl=0.01)
        >>> print(updates)
        [-1.]
        >>> updates, state = tx.update(jnp.array([1.0]), state, params, kl=0.03)
        >>> print(updates, state.rejected)
        [0.] 1

    Source: the early stop of Spinning Up's PPO; Schulman et al., Proximal Policy Optimization
    Algorithms (2017), section 4.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ApplyIfKlBelowState:
        return ApplyIfKlBelowState(jnp.array(True), jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        checks.require_given("apply_if_kl_below", "kl", extra.get("kl"), "kl=kl")
        kl = checks.require_number("apply_if_kl_below", "kl", extra["kl"])
        below = kl <= max_kl

        def apply() -> Any:
            return inner.update(updates, state.inner_state, params, **extra)

        def reject() -> Any:
            return optax.tree.zeros_like(updates), state.inner_state

        made, inner_state = lax.cond(below, apply, reject)
        rejected = jnp.where(below, state.rejected, _one_more(state.rejected))
        return made, ApplyIfKlBelowState(below, rejected, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


class AdaptiveKlState(NamedTuple):
    """The coefficient of the KL penalty, one number, to multiply the divergence by."""

    coefficient: Array


@dataclass(frozen=True)
class AdaptiveKlCoefficient:
    """What `adaptive_kl_coefficient` makes: ``init`` gives a state, `update` the next one."""

    target: ArrayLike
    horizon: ArrayLike
    initial: ArrayLike

    def init(self) -> AdaptiveKlState:
        return AdaptiveKlState(jnp.asarray(self.initial, jnp.float32))

    def update(self, state: AdaptiveKlState, kl: ArrayLike, n: ArrayLike = 1) -> AdaptiveKlState:
        """After n steps, or samples, of a mean divergence ``kl``."""
        error = jnp.clip(jnp.asarray(kl, jnp.float32) / self.target - 1, -0.2, 0.2)
        return AdaptiveKlState(state.coefficient * (1 + error * n / self.horizon))


def adaptive_kl_coefficient(
    target: ArrayLike, *, horizon: ArrayLike, initial: ArrayLike = 1.0
) -> AdaptiveKlCoefficient:
    r"""The coefficient of a KL penalty, led so that the divergence goes to a target.

    .. math:: c \leftarrow c \left(1 + \text{clip}\left(D / D_\text{target} - 1, \pm 0.2\right)
              n / \text{horizon} \right)

    Shapes: numbers. Units: ``target`` in those of the divergence, ``horizon`` in those of n.
    Zeros: a divergence of 0 shrinks the coefficient; NaN makes it NaN.
    Gradients: to all of it, which nobody wants: it is no part of the loss's own graph.

    Args:
        target: The divergence to hold.
        horizon: In how many steps, or samples, an error of 20% changes the coefficient by 20%.
        initial: Where it begins: a number, or one for each of several runs at once.

    Returns:
        An object with ``init() -> state`` and ``update(state, kl, n=1) -> state``; the loss is
        given ``state.coefficient``.

    Example:
        >>> import kljax
        >>> controller = kljax.training.adaptive_kl_coefficient(0.01, horizon=10)
        >>> state = controller.update(controller.init(), kl=0.05, n=5)
        >>> print(f"{state.coefficient:.4f}")
        1.1000

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences (2019), section 2.2.
    """
    return AdaptiveKlCoefficient(target, horizon, initial)


@partial(plainly, without=("reduction",))
def fisher_vector_product(
    outputs_fn: Callable[[Params], Any],
    params: Params,
    *,
    damping: ArrayLike = 0.0,
    weights: ArrayLike | None = None,
    **options: Unpack[UnweightedOptions],
) -> Callable[[Params], Params]:
    r"""Products with the Fisher matrix of what a model puts out, without the matrix.

    .. math:: v \mapsto (F + \text{damping} \cdot I) v, \qquad
              F = \nabla^2_{\theta'} \, \overline{D(\text{old}\|\text{new}(\theta'))}
              = \overline{J^\top F_\text{out} J} \quad \text{at } \theta' = \theta

    Exact: one forward pass of tangents and one backward pass each, through a model that is
    linearised once.

    Shapes: v, and the result, as the parameters. Units: nats per squared unit of a parameter.
    Zeros: an example of weight 0 has no part in it.
    Gradients: in v it is linear; to the parameters in reverse and forward mode.

    Args:
        outputs_fn: ``outputs_fn(params)``, logits or any distribution, families too.
        params: Where F is taken.
        damping: What is added to the diagonal.
        weights: One per example, of the mean.
        **options: Others of `forward_kl`: ``axis``, ``where``, ``temperature``, ….

    Example:
        >>> import jax.numpy as jnp, kljax
        >>> product = kljax.training.fisher_vector_product(lambda x: x, jnp.zeros((1, 2)))
        >>> print(product(jnp.array([[1.0, 0.0]])))
        [[ 0.25 -0.25]]

    Source: Martens, New Insights and Perspectives on the Natural Gradient Method (2020), sections
    5 and 9.
    """
    outputs, forward = jax.linearize(outputs_fn, params)
    backward = jax.linear_transpose(forward, params)
    old = lax.stop_gradient(outputs)

    def divergence(new: Any) -> Array:
        return kl(old, new, weights=weights, reduction="mean", **options)

    def product(v: Params) -> Params:
        curved = jax.jvp(jax.grad(divergence), (outputs,), (forward(v),))[1]
        (found,) = backward(curved)
        return jax.tree.map(lambda x, y: x + damping * y, found, v)

    return product


class NaturalGradientState(NamedTuple):
    """The divergence of the last step from where it began, and the share of the whole step."""

    kl: Array
    share: Array


class _Tried(NamedTuple):
    """A step of some share of the whole, and what became of it."""

    count: Array
    share: Array
    kl: Array
    fits: Array


@partial(plainly, without=("reduction", "weights"))
def natural_gradient(
    max_kl: ArrayLike,
    *,
    damping: ArrayLike = 1e-3,
    cg_iterations: int = 10,
    backtracks: int = 10,
    **options: Unpack[UnweightedOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""A step of natural gradient as far as a trust region allows, as TRPO's.

    .. math:: \Delta = -\sqrt{\frac{2 d_\text{max}}{x^\top F x}} \, x, \qquad
              (F + \text{damping} \cdot I) x = \nabla

    shortened until the mean D(old‖new) is at most ``max_kl`` and the objective has not risen; if
    that never happens the update is 0. F x is solved for by conjugate gradients
    (``jax.scipy.sparse.linalg.cg``).

    ``tx.update(gradients, state, params, outputs_fn=…, value_fn=…, weights=None)``: the model's
    outputs and the objective, to be minimised, as functions of the parameters. The update is the
    whole step: what comes after it in ``optax.chain`` changes its radius.

    Shapes: the update's are the parameters'. Units: ``max_kl`` in nats.
    Zeros: without gradient the update is 0.
    Gradients: not through the search.

    Args:
        max_kl: The radius: of the mean divergence over examples.
        damping: What is added to F's diagonal; more of it makes the step more like the gradient.
        cg_iterations: Of conjugate gradients.
        backtracks: How often the step is shortened at most.
        **options: Others of `forward_kl`: ``axis``, ``where``, ``temperature``, ….

    Example:
        >>> import jax, jax.numpy as jnp, kljax, optax
        >>> objective = lambda logits: -jax.nn.softmax(logits)[0, 1]
        >>> tx = kljax.training.natural_gradient(max_kl=0.01)
        >>> logits = jnp.zeros((1, 2))
        >>> updates, state = tx.update(
        ...     jax.grad(objective)(logits),
        ...     tx.init(logits),
        ...     logits,
        ...     outputs_fn=lambda x: x,
        ...     value_fn=objective,
        ... )
        >>> print(f"{state.kl:.4f} {objective(optax.apply_updates(logits, updates)):.4f}")
        0.0100 -0.5702

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C.
    """

    def init(params: Any) -> NaturalGradientState:
        return NaturalGradientState(jnp.zeros(()), jnp.zeros(()))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        outputs_fn: Any = None,
        value_fn: Any = None,
        weights: ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, NaturalGradientState]:
        given = {"params": params, "outputs_fn": outputs_fn, "value_fn": value_fn}
        for argument, value in given.items():
            checks.require_given("natural_gradient", argument, value, f"{argument}=…")
        radius = jnp.asarray(max_kl)
        gradient = jax.tree.map(lambda x: x.astype(_wide(x)), updates)
        product = fisher_vector_product(outputs_fn, params, weights=weights, **options)

        def damped(v: Any) -> Any:
            curved = product(jax.tree.map(lambda x, like: x.astype(like.dtype), v, params))
            return jax.tree.map(lambda x, y: x.astype(y.dtype) + damping * y, curved, v)

        # Not a constant: XLA:CPU misreads products with constants that it broadcasts.
        start = jax.tree.map(lambda x: 0 * x, gradient)
        direction, _ = jax.scipy.sparse.linalg.cg(damped, gradient, start, maxiter=cg_iterations)
        length = _dot(direction, damped(direction)) - damping * _dot(direction, direction)
        moves = length > 0
        longest = jnp.where(moves, jnp.sqrt(2 * radius / jnp.where(moves, length, 1)), 0)
        old, before = lax.stop_gradient(outputs_fn(params)), value_fn(params)

        def step(share: Array) -> Any:
            return jax.tree.map(
                lambda x, like: (-share * longest * x).astype(like.dtype), direction, params
            )

        def tried(count: Array, share: Array) -> _Tried:
            new = optax.apply_updates(params, step(share))
            moved = kl(old, outputs_fn(new), weights=weights, reduction="mean", **options)
            return _Tried(count, share, moved, (moved <= radius) & (value_fn(new) <= before))

        def shorter(last: _Tried) -> _Tried:
            too_far = last.kl > radius  # by how much tells how much shorter the step should be
            by = jnp.clip(0.98 * jnp.sqrt(radius / jnp.where(too_far, last.kl, 1)), 0.1, 0.98)
            return tried(last.count + 1, last.share * jnp.where(too_far, by, 0.5))

        goes_on = lambda last: ~last.fits & (last.count < backtracks)  # noqa: E731
        first = tried(jnp.zeros((), jnp.int32), jnp.ones_like(longest))
        _, share, moved, fits = lax.while_loop(goes_on, shorter, first)
        share = jnp.where(fits, share, 0)
        made = jax.tree.map(lambda x: jnp.where(fits, x, 0), step(share))
        return made, NaturalGradientState(jnp.where(fits, moved, 0), share)

    return optax.GradientTransformationExtraArgs(init, update)
