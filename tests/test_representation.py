"""A representation that the package does not have, as docs/internals.md tells how to add one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close

import kljax
from kljax._engine import checks
from kljax._engine.side import Classed, held
from kljax.distributions import LogProbs
from kljax.distributions._pytree import pytree


@pytree
@dataclass(frozen=True, eq=False)
class Mixed(Classed):
    """A softmax, of which a share u is given to all classes alike."""

    logits: jax.Array
    share: jax.Array

    makes_classes = True

    def read(self, caller, argument):
        logits, share = (checks.to_array(caller, argument, x) for x in (self.logits, self.share))
        checks.require_float(caller, argument, logits)
        return Mixed(logits, share)

    def shape(self, other):
        return self.logits.shape

    def normalizes(self, temperature):
        return temperature is not None

    def place(self, layout, where, live, spread):
        return Mixed(layout.expand(held(self.logits)), self.share)

    def in_axes(self, layout):
        return layout.batch_axes, None

    def project(self):
        log_probs, pull = jax.vjp(log_mixed, self.logits, self.share)
        return LogProbs(log_probs), lambda leaves, ct: [pull(ct)[i] for i in leaves]

    def view(self, classes, temperature, like, state=None):
        return self.project()[0].view(classes, temperature, like, state)

    def best(self, classes):
        return classes.best(self.logits)


def log_mixed(logits, share):
    uniform = jnp.log(share) - jnp.log(logits.shape[-1])
    return jnp.logaddexp(jnp.log1p(-share) + jax.nn.log_softmax(logits), uniform)


@pytest.mark.slow(but=["2.0-whole"])
@pytest.mark.parametrize("implementation", [None, kljax.Chunked(rows=4)], ids=["whole", "blocks"])
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_one_file_is_enough(rng, implementation, temperature):
    """On either side of a divergence, in every derivative, under jit and vmap."""
    x, y, step = (jnp.asarray(rng.normal(size=(9, 5)), jnp.float32) for _ in range(3))
    options = {"implementation": implementation, "temperature": temperature}

    def loss(x, share, wrap):
        made = wrap(x, share)
        there = kljax.forward_kl(made, y, reduction="mean", **options)
        back = kljax.jensen_shannon(y, made, **options)
        return there + back.sum() + kljax.distillation_loss(y, made, **options)[0]

    def derivatives(wrap):
        def total(x, share):
            return loss(x, share, wrap)

        gradient = jax.grad(total, (0, 1))
        moved, steps = (x, jnp.float32(0.3)), (step, jnp.float32(0.2))
        mapped = jax.vmap(lambda x: total(x, 0.3))(jnp.stack([x, step]))
        return jax.jvp(total, moved, steps), jax.jvp(gradient, moved, steps), mapped

    got = jax.jit(lambda: derivatives(Mixed))()
    want = jax.jit(lambda: derivatives(lambda x, share: LogProbs(log_mixed(x, share))))()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b)
