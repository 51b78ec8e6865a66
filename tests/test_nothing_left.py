"""A call leaves mathematics in the user's program: no effect, no check; it exports."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import export

import kljax
from kljax import metrics
from kljax.compat import gluon, keras, optax, torch, torchmetrics

LABELS = jnp.array([0, 3, 5, 1])
STATE = metrics.Divergence.empty().update(jnp.array([1.0, 2.0]))


def of_two(divergence, **options):
    return lambda s, t: divergence(s, t, temperature=2.0, reduction="mean", **options)


def distillation(s, t):
    labels = jnp.zeros(s.shape[:-1], jnp.int32)
    return kljax.distillation_loss(s, t, labels, temperature=2.0, hard_weight=0.5)


def probs(s, t):
    return jax.nn.softmax(s), jax.nn.softmax(t)


def normal(x):
    return kljax.families.Normal(x, log_variance=x)


# Of every public function a program of student and teacher logits.
PROGRAMS = {
    "kl": of_two(kljax.kl),
    "kl_terms": kljax.kl_terms,
    "forward_kl": of_two(kljax.forward_kl),
    "reverse_kl": of_two(kljax.reverse_kl),
    "jeffreys": of_two(kljax.jeffreys),
    "jensen_shannon": lambda s, t: kljax.jensen_shannon(s, t, beta=jnp.float32(0.3)),
    "skew_forward_kl": lambda s, t: kljax.skew_forward_kl(s, t, alpha=jnp.float32(0.3)),
    "skew_reverse_kl": lambda s, t: kljax.skew_reverse_kl(s, t, alpha=jnp.float32(0.3)),
    "cross_entropy": lambda s, t: kljax.cross_entropy(s, jnp.zeros(s.shape[:-1], jnp.int32)),
    "entropy": lambda s, t: kljax.entropy(s, weights=jnp.ones(s.shape[:-1])),
    "divergence": lambda s, t: kljax.divergence(lambda a, b: kljax.term_kl(b, a))(s, t),
    "distillation_loss": distillation,
    "reduce": lambda s, t: kljax.reduce(s[..., 0], weights=t[..., 0] ** 2, reduction="mean"),
    "top_k": lambda s, t: kljax.forward_kl(s, kljax.top_k(t, 2)),
    "sample_targets": lambda s, t: kljax.sample_targets(jax.random.key(0), t, 3).log_probs,
    "log_mixture": lambda s, t: kljax.log_mixture(s, t, 0.3),
    "term_kl": kljax.term_kl,
    "term_generalized_kl": kljax.term_generalized_kl,
    "term_cross_entropy": kljax.term_cross_entropy,
    "term_entropy": lambda s, t: kljax.term_entropy(s),
    "metrics.Divergence": lambda s, t: STATE.update(s[..., 0]).merge(STATE).compute(),
    "metrics.agreement": metrics.agreement,
    "compat.torch": lambda s, t: torch.kl_div(s, jax.nn.softmax(t), reduction="sum"),
    "compat.torchmetrics": lambda s, t: torchmetrics.kl_divergence(*probs(s, t)),
    "compat.gluon": lambda s, t: gluon.KLDivLoss()(s, jax.nn.softmax(t)),
    "compat.keras": lambda s, t: keras.kl_divergence(*probs(s, t)),
    "compat.optax": lambda s, t: optax.kl_divergence(s, jax.nn.softmax(t)),
    "compat.optax.softmax_cross_entropy": lambda s, t: optax.softmax_cross_entropy(s, t**2),
    "sampled_kl": lambda s, t: kljax.sampled_kl(s, t, weights=t**2, reduction="mean"),
    "sampled_kl_loss": lambda s, t: kljax.sampled_kl_loss(s, t, log_behavior=t, max_ratio=2.0),
    "elbo_kl": lambda s, t: kljax.elbo_kl(normal(s), free_bits=1.0, weights=t[..., 0] ** 2),
    "balanced_kl": lambda s, t: kljax.balanced_kl(s, t, axis=()),
    "consistency_loss": kljax.consistency_loss,
    "mixture": lambda s, t: kljax.mixture(s, t, 0.9).log_probs,
    "families": lambda s, t: kljax.jeffreys(normal(s), normal(t), axis=-1),
    "Head": lambda s, t: kljax.forward_kl(
        kljax.Head(s, jnp.eye(6, 11)), kljax.Head(t, jnp.eye(6, 11)), reduction="mean"
    ),
}
NOT_PROGRAMS = {"checked", "value_checks"}


def test_every_public_function_is_here():
    functions = {n for n in dir(kljax) if not n.startswith("_") and n[0].islower()}
    functions = {n for n in functions if not isinstance(getattr(kljax, n), type(jax))}
    assert functions - NOT_PROGRAMS <= set(PROGRAMS)


def differentiated(program):
    """The program with its gradient to the student, where it has one."""

    def run(s, t):
        def total(s):
            out = program(s, t)
            floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
            return sum(jnp.sum(jnp.where(jnp.isfinite(x), x, 0)) for x in floats) + 0 * s.sum(), out

        return jax.value_and_grad(total, has_aux=True)(s)

    return run


@pytest.fixture
def sides(rng):
    return tuple(jnp.asarray(rng.normal(size=(4, 6)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_effects_and_no_checks(sides, name):
    jaxpr = jax.make_jaxpr(differentiated(PROGRAMS[name]))(*sides)
    assert not jaxpr.effects
    assert not [word for word in ("check[", "callback[") if word in str(jaxpr)]


def test_a_check_that_was_asked_for_is_seen(sides):
    """The test above can fail."""
    with kljax.value_checks():
        jaxpr = jax.make_jaxpr(differentiated(PROGRAMS["entropy"]))(*sides)
    assert jaxpr.effects
    assert "check[" in str(jaxpr)


@pytest.mark.slow(
    but=["forward_kl", "distillation_loss", "metrics.Divergence", "top_k", "compat.torch"]
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exported_and_read_back(sides, name):
    """With a symbolic batch, for CPU: the same numbers."""
    run = differentiated(PROGRAMS[name])
    spec = jax.ShapeDtypeStruct(export.symbolic_shape("b, 6"), jnp.float32)
    exported = export.export(jax.jit(run))(spec, spec)
    again = export.deserialize(exported.serialize())
    for got, want in zip(
        jax.tree.leaves(again.call(*sides)), jax.tree.leaves(run(*sides)), strict=True
    ):
        assert_close(got, want)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_lowered_for_accelerators(sides, name, platform):
    run = differentiated(PROGRAMS[name])
    export.export(jax.jit(run), platforms=(platform,))(*sides).serialize()


def test_a_warm_function_is_not_traced_again(sides):
    f = jax.jit(partial(kljax.forward_kl, reduction="mean"))
    want = f(*sides)
    with jax.no_tracing():
        np.testing.assert_array_equal(f(*sides), want)


def test_distributions_are_exported_as_arguments(sides):
    student, teacher = kljax.Logits(sides[0]), kljax.top_k(sides[1], 2, temperature=2.0)
    f = jax.jit(partial(kljax.forward_kl, temperature=2.0))
    again = export.deserialize(export.export(f)(student, teacher).serialize())
    assert_close(again.call(student, teacher), f(student, teacher))
