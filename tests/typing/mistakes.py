"""What users get wrong, and type checkers tell them.

Nothing here is called. A mark says which complaint a line must draw from which checker; where one
lets the line pass, its mark is unused, which is an error as well.
"""
# pyright: reportUnnecessaryTypeIgnoreComment=true
# What a mistake has for a result is not known, which nobody need be told as well.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import optax
from jax import Array

import kljax
from kljax import families, metrics, training
from kljax.compat import gluon, keras, torch, torchmetrics
from kljax.compat import optax as losses
from kljax.metrics import nnx


def names(s: Array, t: Array) -> None:
    from kljax import foward_kl  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-module-attribute]

    foward_kl(s, t)
    kljax.reverse_lk(s, t)  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]
    _ = kljax.Distributions  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]
    _ = kljax.compat.tensorflow  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]


def sides(s: Array, t: Array) -> None:
    kljax.forward_kl(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.forward_kl(s, t, t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    kljax.forward_kl(s, target=t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument, unexpected-keyword]
    kljax.forward_kl(s, "teacher")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(kljax.Probs, t)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.kl(s, prediction=t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument, unexpected-keyword]
    kljax.jensen_shannon(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.cross_entropy(s, None)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.entropy(s, t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    kljax.mixture(s, t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.top_k(kljax.Probs(t), 3)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.sampled_kl(kljax.LogProbs(s), kljax.LogProbs(t))  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]


def options(s: Array, t: Array) -> None:
    kljax.forward_kl(s, t, temprature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.forward_kl(s, t, mask=s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.forward_kl(s, t, -1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    kljax.forward_kl(s, t, reduction="avg")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, reduction=None)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, temperature="2")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, axis=1.5)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, axis_name=0)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, implementation="fast")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.forward_kl(s, t, implementation=kljax.Chunked())  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.forward_kl(s, t, alpha=0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.kl_terms(s, t, reduction="mean")  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.entropy(s, reduction="avg")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.consistency_loss(s, t, temprature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.reduce(s, s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]


def parameters(s: Array, t: Array) -> None:
    kljax.jensen_shannon(s, t, bta=0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.jensen_shannon(s, t, 0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    kljax.jensen_shannon(s, t, temprature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.skew_forward_kl(s, t, alpha="0.1")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.skew_reverse_kl(s, t, reduction="avg")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.cross_entropy(s, t, smoothing=0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.sampled_kl(s, t, estimator="k4")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.sampled_kl_loss(s, t, estimator="k3")  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.elbo_kl(s, free_bits_per="latent")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.balanced_kl(s, t, beta=0.5)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]


def distributions(h: Array, k: Array) -> None:
    kljax.Head(h, k, kernal=3)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.Head(h)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.Head(h, k, softcap="30")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.TopK(h, k, tail="buckets")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.TopK(h, k, tail=3)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.TopK(h)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.Probs(h, k)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    kljax.LogProbs("p")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.top_k(h, "64")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.sample_targets(h, 64)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.Logits(h).logits = k  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[read-only]
    _ = kljax.Logits(h).probs  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]


def distillation(s: Array, t: Array) -> None:
    kljax.distillation_loss(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    kljax.distillation_loss(s, t, hard_wieght=0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.distillation_loss(s, t, temperature="4")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.distillation_loss(s, t, divergence="forward_kl")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.distillation_loss(s, t, kljax.TopK(s, t))  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.distillation_loss(s, t, reduction="avg")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.distillation_loss(s, t).mean()  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]
    _, logged = kljax.distillation_loss(s, t)
    _ = logged.agrement  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]


def divergences_of_my_own(s: Array, t: Array) -> None:
    def term(log_s: Array, log_t: Array) -> Array:
        return kljax.log_mixture(log_s, log_t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-return, missing-argument]

    def named(divergence: kljax.DivergenceFn) -> Array:
        return divergence(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]

    kljax.divergence(term, need_mass=True)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    mine = kljax.divergence(term)
    mine(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    mine(s, t, 0.1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    named(term)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    named(kljax.entropy)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    named(kljax.distillation_loss)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.divergence("term")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    kljax.checked(kljax.forward_kl)(s, t, temprature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    kljax.checked(kljax.distillation_loss)(s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]


def closed_forms(x: Array) -> None:
    families.Normal(x, sigma=x)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    families.Bernoulli(logit=x)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    families.Beta(x)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    families.Gamma(x, 1.0, scale=x)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    families.MultivariateNormal(x, covariance=x)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    families.Uniform(0.0, "1")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    families.Gaussian(x)  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]


def streams(s: Array, t: Array) -> None:
    state = metrics.Divergence.empty()
    state.update(s, t, t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]
    state.update(s, mask=t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    state.merge(s)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    _ = state.compute().median  # pyright: ignore[reportAttributeAccessIssue]  # pyrefly: ignore[missing-attribute]
    metrics.agreement(s, t, axis=(0, 1))  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    metric = nnx.Divergence("forward_kl")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    metric.update(s, t)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[bad-argument-count]


def in_training(s: Array, t: Array) -> None:
    training.Distillation(temprature=4.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    distill = training.Distillation(temperature="4")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    distill(s, t, weigths=s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    distill(s, t, temperature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]

    def loss(params: Array, batch: Array) -> tuple[Array, Array]:
        return params, batch

    def whole(params: Array, batch: Array, normalizer: Array) -> tuple[Array, Array]:
        return params, batch / normalizer

    training.accumulated_value_and_grad(loss, 2, weights=lambda batch: batch)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    training.accumulated_value_and_grad(whole, 2)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    training.accumulated_value_and_grad(whole, 2, weights=lambda batch: batch)({"w": s}, t)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    training.ema_teacher(0.99, optax.sgd(0.1))  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    training.apply_if_kl_below(optax.sgd(0.1), 0.1, kl=s)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    training.adaptive_kl_coefficient(0.01)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[missing-argument]
    training.fisher_vector_product(lambda x: x, s, reduction="sum")  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    training.natural_gradient(max_kl=0.1, temprature=2.0)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]


def in_other_systems(s: Array, t: Array) -> None:
    torch.kl_div(s, t, log_targets=True)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    torchmetrics.kl_divergence(s, t, reduction="batchmean")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    torchmetrics.KLDivergence(log_probs=True)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    gluon.KLDivLoss(aggregate="none")  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
    keras.kl_divergence(s, t, axis=-1)  # pyright: ignore[reportCallIssue]  # pyrefly: ignore[unexpected-keyword]
    losses.softmax_cross_entropy_with_integer_labels(s, t, axis=None)  # pyright: ignore[reportArgumentType]  # pyrefly: ignore[bad-argument-type]
