"""Every public name in a call as a user makes it, for type checkers at their strictest.

Arrays come as arguments or from NumPy: what makes arrays in JAX, and its transforms, has types that
strict checkers call partly unknown. `tests/test_typing.py` calls every function here, so that what
the checkers accept runs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, assert_type, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.experimental import checkify

import kljax
import kljax.metrics.nnx
from kljax import families, metrics, training
from kljax.compat import gluon, keras, torch, torchmetrics
from kljax.compat import optax as losses


class Batch(NamedTuple):
    """Two examples of four classes."""

    student: Array
    teacher: Array
    labels: Array
    mask: Array  # bool, one per example


CLASSES = np.ones(4, bool)
Step = Callable[[Array, Array], tuple[tuple[Array, kljax.DistillationMetrics], Array]]


def divergences(batch: Batch) -> Array:
    s, t, mask = batch.student, batch.teacher, batch.mask
    assert_type(kljax.reverse_kl(s, t, weights=mask, reduction="batchmean"), Array)
    assert_type(kljax.jeffreys(s, t, reduction="sum"), Array)
    assert_type(kljax.jensen_shannon(s, t, beta=0.1, normalized=True), Array)
    assert_type(kljax.skew_forward_kl(s, t, alpha=0.1, reduction="mean"), Array)
    assert_type(kljax.skew_reverse_kl(s, t, alpha=jnp.float32(0.1)), Array)
    assert_type(kljax.kl(s, t, temperature=2.0, implementation="dense"), Array)
    assert_type(kljax.kl_terms(s, t, where=CLASSES), Array)
    assert_type(kljax.entropy(s, axis=(-1,), implementation=kljax.Chunked(rows=1)), Array)
    assert_type(kljax.cross_entropy(s, batch.labels, label_smoothing=0.1), Array)
    assert_type(kljax.cross_entropy(s, kljax.Probs(jax.nn.softmax(t))), Array)
    assert_type(kljax.consistency_loss(s, t, reduction="none", weights=mask), Array)
    values = assert_type(kljax.forward_kl(predictions=s, targets=t), Array)
    assert_type(kljax.reduce(values, weights=mask, reduction="mean", normalizer=2.0), Array)
    return kljax.forward_kl(
        s,
        t,
        axis=-1,
        where=CLASSES,
        temperature=np.ones(2, np.float32),
        weights=mask,
        reduction="mean",
        normalizer=jnp.sum(mask),
        implementation="chunked",
    )


def divergences_across_devices(batch: Batch) -> Array:
    def loss(s: Array, t: Array) -> Array:
        return kljax.forward_kl(s, t, reduction="mean", axis_name=("batch",), class_axis_name=())

    return jax.vmap(loss, axis_name="batch")(batch.student, batch.teacher)


def divergences_by_name(batch: Batch) -> dict[str, Array]:
    def mean(divergence: kljax.DivergenceFn) -> Array:
        return divergence(batch.student, batch.teacher, temperature=2.0, reduction="mean")

    each = [
        mean(kljax.forward_kl),
        mean(kljax.reverse_kl),
        mean(kljax.jeffreys),
        mean(kljax.jensen_shannon),
        mean(kljax.skew_forward_kl),
        mean(kljax.skew_reverse_kl),
    ]
    return {kljax.forward_kl.__name__: each[0], kljax.jensen_shannon.__name__: each[3]}


def divergences_of_my_own(batch: Batch) -> Array:
    @kljax.divergence
    def power(log_s: Array, log_t: Array, *, gamma: float = 0.5) -> Array:
        return gamma * (jnp.exp(gamma * log_s) - jnp.exp(gamma * log_t)) ** 2

    def to_mixture(log_s: Array, log_t: Array) -> Array:
        mixed, over_s, over_t = kljax.log_mixture(log_s, log_t, jnp.float32(0.5))
        assert_type(over_s, Array)
        assert_type(over_t, Array)
        parts = kljax.term_kl(log_t, mixed) + kljax.term_generalized_kl(log_s, mixed)
        return parts + kljax.term_cross_entropy(log_t, mixed) - kljax.term_entropy(log_t)

    assert_type(power, kljax.DivergenceFn)
    mine = kljax.divergence(to_mixture, needs_mass=False)
    found = assert_type(mine(batch.student, batch.teacher, reduction="mean"), Array)
    soft, _ = kljax.distillation_loss(
        batch.student, batch.teacher, divergence=partial(power, gamma=1.0)
    )
    return found + soft


def distributions(batch: Batch, hidden: Array, kernel: Array) -> list[Array]:
    s, t = batch.student, batch.teacher
    head = kljax.Head(hidden, kernel, np.zeros(4, np.float32), softcap=30.0, scale=0.5)
    tied = kljax.Head(hidden, kernel.T, transposed=True)
    best = assert_type(kljax.top_k(kljax.Logits(t), 2, temperature=1.0, where=CLASSES), kljax.TopK)
    targets: list[kljax.Distribution] = [
        head,
        kljax.Logits(s),
        kljax.LogProbs(jax.nn.log_softmax(s)),
        kljax.Probs(jax.nn.softmax(s)),
        assert_type(kljax.mixture(s, t, 0.9), kljax.LogProbs),
        kljax.top_k(head, 2),
        kljax.TopK(best.indices, best.log_probs, best.log_tail, tail="renormalize"),
        kljax.sample_targets(jax.random.key(0), tied, 3, proposal_power=0.5),
    ]
    return [kljax.forward_kl(tied, target, reduction="mean") for target in targets]


def distillation(batch: Batch) -> kljax.DistillationMetrics:
    loss, logged = kljax.distillation_loss(
        batch.student,
        batch.teacher,
        batch.labels,
        divergence=partial(kljax.jensen_shannon, beta=0.5),
        temperature=4.0,
        soft_weight=0.9,
        hard_weight=0.1,
        label_weights=batch.mask,
        label_normalizer=2,
        label_smoothing=0.1,
    )
    assert_type(loss, Array)
    assert_type(logged.agreement, Array)
    mixup = kljax.Probs(jax.nn.softmax(batch.teacher))
    assert_type(
        kljax.distillation_loss(batch.student, batch.teacher, mixup, divergence=kljax.reverse_kl),
        tuple[Array, kljax.DistillationMetrics],
    )
    return logged


def transforms(batch: Batch) -> Array:
    def loss(student: Array, teacher: Array) -> tuple[Array, kljax.DistillationMetrics]:
        return kljax.distillation_loss(student, teacher, temperature=2.0)

    # What comes back is for the user to say: the transforms do not.
    graded = jax.value_and_grad(loss, has_aux=True)  # pyright: ignore[reportUnknownMemberType]
    step = cast(Step, jax.jit(graded))  # pyright: ignore[reportUnknownMemberType]
    (_, logged), gradient = step(batch.student, batch.teacher)
    return assert_type(gradient, Array) + assert_type(logged.soft, Array)


def samples(batch: Batch) -> Array:
    policy, reference = jax.nn.log_softmax(batch.student), jax.nn.log_softmax(batch.teacher)
    seen = kljax.sampled_kl(policy, reference, estimator="k1", sequence_axis=-1)
    assert_type(seen, Array)
    return kljax.sampled_kl_loss(
        policy, reference, log_behavior=reference, max_ratio=2.0, value="k3", reduction="mean"
    )


def latents(batch: Batch) -> Array:
    posterior = families.Normal(batch.student, log_variance=batch.teacher)
    assert_type(kljax.elbo_kl(posterior, beta=0.5, free_bits=0.1, free_bits_per="dim"), Array)
    return kljax.balanced_kl(batch.student[None], batch.teacher[None], axis=-2, free_bits=1.0)


def closed_forms(batch: Batch) -> list[Array]:
    x = jnp.exp(batch.student)
    given: list[families.Family] = [
        families.Bernoulli(logits=x),
        families.Beta(x, x),
        families.Binomial(10, probs=jax.nn.sigmoid(x)),
        families.Categorical(logits=x),
        families.Dirichlet(x),
        families.Exponential(x),
        families.Gamma(x, rate=2.0),
        families.Geometric(probs=0.5),
        families.Gumbel(0.0, scale=x),
        families.Laplace(loc=x, scale=1.0),
        families.LogNormal(0.0, x),
        families.MultivariateNormal(x, scale_tril=jnp.identity(4)),
        families.Normal(x, scale=1.0),
        families.Poisson(rate=x),
        families.Uniform(low=0.0, high=x),
        families.VonMises(0.0, concentration=x),
    ]
    assert_type(kljax.entropy(families.Normal(x, 1.0), axis=-1), Array)
    return [kljax.kl(one, one, reduction="mean") for one in given]


def checks(batch: Batch) -> Array:
    assert_type(kljax.__version__, str)
    loss = kljax.checked(kljax.distillation_loss)
    assert_type(
        loss(batch.student, batch.teacher, batch.labels, hard_weight=1.0),
        tuple[Array, kljax.DistillationMetrics],
    )

    @kljax.checked
    def mean(x: Array, *, scale: float) -> Array:
        return scale * jnp.mean(kljax.entropy(x))

    assert_type(mean(batch.student, scale=2.0), Array)
    reported = checkify.checkify(kljax.entropy, errors=checkify.user_checks)
    with kljax.value_checks():
        error, _ = reported(batch.student)
    error.throw()
    return kljax.checked(kljax.forward_kl)(batch.student, batch.teacher, temperature=2.0)


def streams(batch: Batch) -> metrics.Summary:
    values = kljax.forward_kl(batch.student, batch.teacher)
    same = metrics.agreement(batch.student, kljax.Logits(batch.teacher), where=CLASSES)
    state = metrics.Divergence.empty(jnp.float32)
    state = state.update(values, batch.mask, agreement=assert_type(same, Array))
    state = assert_type(state.merge(metrics.Divergence.empty()), metrics.Divergence)
    assert_type(state.quantile(0.5), Array)
    summary = state.compute()
    assert_type(summary.mean, Array)
    return summary


def streams_of_flax(batch: Batch) -> metrics.Summary:
    metric = kljax.metrics.nnx.Divergence(kljax.reverse_kl, temperature=2.0)
    metric.update(predictions=batch.student, targets=batch.teacher, mask=batch.mask)
    metric.update(values=np.ones(2, np.float32), weights=np.ones(2, np.float32))
    assert_type(metric.state, metrics.Divergence)
    both = nnx.MultiMetric(loss=nnx.metrics.Average(), divergence=metric)
    summary = metric.compute()
    both.reset()
    return summary


def schedules(batch: Batch) -> Array:
    distill = training.Distillation(
        kljax.forward_kl,
        temperature=optax.linear_schedule(4.0, 1.0, 1000),
        soft_weight=0.9,
        hard_weight=lambda step: 0.1 * step,
        label_smoothing=0.1,
        scale_by_temperature=True,
    )
    loss, logged = distill(
        batch.student, batch.teacher, batch.labels, step=3, weights=batch.mask, label_weights=None
    )
    assert_type(logged, kljax.DistillationMetrics)
    return loss


def micro_batches(batch: Batch) -> Array:
    def loss(
        params: dict[str, Array], part: Batch, normalizer: Array
    ) -> tuple[Array, kljax.DistillationMetrics]:
        student = part.student * params["scale"]
        return kljax.distillation_loss(
            student, part.teacher, weights=part.mask, normalizer=normalizer
        )

    accumulated = training.accumulated_value_and_grad(loss, 2, weights=lambda part: part.mask)
    (value, logged), gradients = accumulated({"scale": jnp.float32(1)}, batch)
    assert_type(value, Array)
    assert_type(logged, kljax.DistillationMetrics)
    assert_type(gradients, dict[str, Array])
    return value


def optimizers(batch: Batch) -> tuple[Array, Array]:
    params = {"w": batch.student}
    mean = training.ema_teacher(optax.sgd(0.1), decay=lambda step: 1 - 1 / (step + 1))
    _, state = mean.update(params, mean.init(params), params)
    assert isinstance(state, training.EmaTeacherState)
    gate = training.apply_if_kl_below(optax.sgd(0.1), max_kl=0.02)
    _, after = gate.update(params, gate.init(params), params, kl=0.01)
    assert isinstance(after, training.ApplyIfKlBelowState)
    return assert_type(state.count, Array), assert_type(after.rejected, Array)


def penalty() -> Array:
    controller = training.adaptive_kl_coefficient(0.01, horizon=10, initial=0.2)
    assert_type(controller, training.AdaptiveKlCoefficient)
    state = assert_type(controller.init(), training.AdaptiveKlState)
    return controller.update(state, kl=0.05, n=5).coefficient


def natural_gradient(batch: Batch) -> training.NaturalGradientState:
    params = {"logits": batch.student}

    def outputs(params: dict[str, Array]) -> Array:
        return params["logits"]

    def objective(params: dict[str, Array]) -> Array:
        return kljax.forward_kl(params["logits"], batch.teacher, reduction="mean")

    product = training.fisher_vector_product(outputs, params, damping=0.1, temperature=2.0)
    assert_type(product(params), dict[str, Array])
    tx = training.natural_gradient(max_kl=0.01, damping=0.1, cg_iterations=2, axis=-1)
    _, state = tx.update(params, tx.init(params), params, outputs_fn=outputs, value_fn=objective)
    assert isinstance(state, training.NaturalGradientState)
    return state


def from_pytorch(batch: Batch) -> Array:
    log_s, t = jax.nn.log_softmax(batch.student), jax.nn.softmax(batch.teacher)
    assert_type(torch.kl_div(log_s, t, reduction="batchmean"), Array)
    return torch.KLDivLoss(reduction="batchmean", log_target=False)(log_s, t)


def from_torchmetrics(batch: Batch) -> Array:
    p, q = jax.nn.softmax(batch.teacher), jax.nn.softmax(batch.student)
    assert_type(torchmetrics.kl_divergence(p, q, reduction="sum"), Array)
    assert_type(torchmetrics.jensen_shannon_divergence(p, q, log_prob=False), Array)
    metric, other = torchmetrics.KLDivergence(reduction="mean"), torchmetrics.KLDivergence()
    metric.update(p, q)
    assert_type(other(p, q), Array)
    metric.merge_state(other)
    total = assert_type(metric.compute(), Array)
    metric.reset()
    return total + torchmetrics.JensenShannonDivergence(reduction="sum")(p, q)


def from_gluon(batch: Batch) -> Array:
    loss = gluon.KLDivLoss(from_logits=False, axis=-1, weight=0.5, batch_axis=0, aggregate="sum")
    return loss(batch.student, jax.nn.softmax(batch.teacher))


def from_keras(batch: Batch) -> Array:
    assert_type(keras.kl_divergence([[0.5, 0.5]], [[0.0, 1.0]]), Array)
    return keras.kl_divergence(jax.nn.softmax(batch.teacher), jax.nn.softmax(batch.student))


def from_optax(batch: Batch) -> Array:
    log_s, t = jax.nn.log_softmax(batch.student), jax.nn.softmax(batch.teacher)
    assert_type(losses.kl_divergence(log_s, t, axis=-1, where=CLASSES[None]), Array)
    assert_type(losses.kl_divergence_with_log_targets(log_s, jnp.log(t)), Array)
    assert_type(losses.generalized_kl_divergence(log_s, t, axis=None), Array)
    assert_type(losses.convex_kl_divergence(log_s, t), Array)
    assert_type(losses.softmax_cross_entropy(batch.student, t), Array)
    assert_type(losses.safe_softmax_cross_entropy(batch.student, t), Array)
    return losses.softmax_cross_entropy_with_integer_labels(batch.student, batch.labels)
