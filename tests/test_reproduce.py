"""docs/reproducing.md: its settings give other systems' published formulas."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

import kljax
from kljax import LogProbs, Probs
from kljax.compat import keras as compat_keras
from kljax.compat import optax as compat_optax
from kljax.compat import torch as compat_torch
from kljax.compat import torchmetrics
from kljax.compat.gluon import KLDivLoss

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"
TABLE = (DOCS / "reproducing.md").read_text()
CELLS = dict(re.findall(r"^\| ([^|`]+?) \|[^|`]*\| `(.+)` \|$", TABLE, re.MULTILINE))

rng = np.random.default_rng(7)
S, T_LOGITS = 2 * rng.normal(size=(2, 5, 4))
LABELS = np.array([0, 3, 1, 2, 2])
MASK = np.array([True, True, False, True, False])
T, BETA, ALPHA, LAM, RATIO, N = 2.0, 0.3, 0.7, 0.9, 0.25, 11.0


def log_softmax(x, temperature=1.0):
    z = x / temperature
    return z - np.log(np.sum(np.exp(z), axis=-1, keepdims=True))


def kl_div(input, target):
    """PyTorch's, of log-probabilities, summed over the classes."""
    return np.sum(np.exp(target) * (target - input), axis=-1)


def masked_mean(values):
    return np.sum(values * MASK) / np.sum(MASK)


def jsd(temperature, beta):
    """TRL's and Liger's: the teacher's share is beta."""
    s, t = log_softmax(S, temperature), log_softmax(T_LOGITS, temperature)
    mixture = np.logaddexp(s + np.log1p(-beta), t + np.log(beta))
    return beta * kl_div(mixture, t) + (1 - beta) * kl_div(mixture, s)


def labels_loss():
    return -np.take_along_axis(log_softmax(S), LABELS[:, None], -1)[:, 0]


def distillm(name, lam=None):
    """distillm/losses.py, without its masking of infinite logits: there are none."""
    log_s, log_t = log_softmax(S), log_softmax(T_LOGITS)
    s, t = np.exp(log_s), np.exp(log_t)
    forward = -masked_mean(np.sum(t * log_s, -1))
    reverse = -masked_mean(np.sum(s * log_t - s * log_s, -1))
    match name:
        case "forward_kl":
            return forward
        case "reverse_kl":
            return reverse
        case "symmetric_kl":
            return (1 - lam) * forward + lam * reverse
        case "js_distance":
            log_m = np.log((1 - lam) * t + lam * s)
            from_s = -masked_mean(np.sum(s * log_m - s * log_s, -1))
            return lam * from_s + (1 - lam) * -masked_mean(np.sum(t * log_m - t * log_t, -1))
        case "skewed_forward_kl":
            return -masked_mean(np.sum(t * np.log(lam * t + (1 - lam) * s), -1))
        case "skewed_reverse_kl":
            return -masked_mean(np.sum(s * np.log((1 - lam) * t + lam * s) - s * log_s, -1))


def soft(temperature=T):
    """D(t‖s) at the temperature, per example."""
    return kl_div(log_softmax(S, temperature), log_softmax(T_LOGITS, temperature))


def clipped(true, pred):
    """Keras' kl_divergence."""
    true, pred = np.clip(true, 1e-7, 1), np.clip(pred, 1e-7, 1)
    return np.sum(true * np.log(true / pred), axis=-1)


FORMULAS = {
    "TRL GKD, 0 < beta < 1": masked_mean(jsd(T, BETA)),
    "TRL GKD, beta = 0": masked_mean(soft()),
    "TRL GKD, beta = 1": masked_mean(kl_div(log_softmax(T_LOGITS, T), log_softmax(S, T))),
    "TRL GKD, num_items_in_batch = n": np.sum(jsd(T, BETA) * MASK) / N,
    "Liger fused_linear_jsd": 0.5 * masked_mean(labels_loss()) + 0.5 * masked_mean(jsd(T, BETA)),
    "Tunix LogitStrategy": ALPHA * np.mean(soft() * T**2) + (1 - ALPHA) * np.mean(labels_loss()),
    "MaxText distillation": ALPHA * masked_mean(soft()) * T**2
    + (1 - ALPHA) * masked_mean(labels_loss()),
    **{
        f"DistiLLM {name}": distillm(name, LAM)
        for name in (
            "forward_kl",
            "reverse_kl",
            "symmetric_kl",
            "js_distance",
            "skewed_forward_kl",
            "skewed_reverse_kl",
        )
    },
    "torchtune ForwardKLLoss": distillm("forward_kl"),
    "torchtune ReverseKLLoss": distillm("reverse_kl"),
    "torchtune SymmetricKLLoss": RATIO * distillm("forward_kl")
    + (1 - RATIO) * distillm("reverse_kl"),
    "DeiT soft distillation": (1 - ALPHA) * np.mean(labels_loss())
    + ALPHA * np.sum(soft()) * T * T / S.size,
    "timm LogitDistillationTask": BETA * np.mean(labels_loss())
    + ALPHA * np.sum(soft()) / len(S) * T**2,
    "Keras Distiller, loss=KLDivergence()": LAM * np.mean(labels_loss())
    + (1 - LAM)
    * T**2
    * np.mean(clipped(np.exp(log_softmax(T_LOGITS, T)), np.exp(log_softmax(S, T)))),
    "Keras LogitsDistillation, default loss": np.mean(clipped(T_LOGITS / T, S / T)),
}


def test_the_table_gives_the_published_formulas():
    """Every row, in one compilation."""
    assert CELLS.keys() == FORMULAS.keys()
    names = {**vars(kljax), "partial": partial, "compat_keras": compat_keras}
    names |= {"T": T, "beta": BETA, "alpha": ALPHA, "lam": LAM, "ratio": RATIO, "n": N}
    names |= {"labels": jnp.asarray(LABELS), "mask": jnp.asarray(MASK)}

    @jax.jit
    def run(s, t):
        return {row: eval(cell, names | {"s": s, "t": t}) for row, cell in CELLS.items()}

    got = run(jnp.asarray(S, jnp.float32), jnp.asarray(T_LOGITS, jnp.float32))
    for row, want in FORMULAS.items():
        assert got[row].shape == (), row
        np.testing.assert_allclose(got[row], want, rtol=2e-5, atol=2e-6, err_msg=row)


def test_native_calls_give_the_drop_in_numbers():
    """What the guide's tables set side by side."""
    s, t = np.float32(S), np.float32(T_LOGITS)
    log_s, log_t = (np.float32(log_softmax(x)) for x in (s, t))
    p_s, p_t = np.exp(log_s), np.exp(log_t)
    forward = partial(kljax.forward_kl, s, t)
    weights = np.array([1, 0, 2, 1, 1], np.float32)
    pairs = [
        (compat_torch.kl_div(log_s, p_t, reduction="batchmean"), forward(reduction="mean")),
        (compat_torch.kl_div(log_s, p_t, reduction="sum"), forward(reduction="sum")),
        (compat_torch.kl_div(log_s, p_t, reduction="none"), kljax.kl_terms(t, s)),
        (
            compat_torch.kl_div(log_s[None], log_t[None], reduction="batchmean", log_target=True),
            kljax.forward_kl(LogProbs(log_s[None]), LogProbs(log_t[None]), reduction="batchmean"),
        ),
        (
            KLDivLoss(weight=2.0)(log_s, p_t, weights[:, None]),
            2 * forward(weights=weights) / s.shape[-1],
        ),
        (KLDivLoss(from_logits=False, aggregate="sum")(s, p_t), forward()),
        (compat_optax.kl_divergence(log_s, p_t), forward()),
        (
            compat_optax.generalized_kl_divergence(log_s, p_t),
            kljax.divergence(lambda ls, lt: kljax.term_generalized_kl(lt, ls))(s, t),
        ),
        (compat_optax.softmax_cross_entropy(s, p_t), kljax.cross_entropy(s, Probs(p_t))),
        (compat_keras.kl_divergence(p_t, p_s), forward()),
        (torchmetrics.kl_divergence(3 * p_t, p_s), forward(reduction="mean")),
        (
            torchmetrics.jensen_shannon_divergence(log_t, log_s, log_prob=True),
            kljax.jensen_shannon(s, t, reduction="mean"),
        ),
    ]
    for drop_in, native in pairs:
        np.testing.assert_allclose(drop_in, native, rtol=2e-5, atol=2e-6)


def test_keras_default_distillation():
    """The numbers that Keras 3.15 itself gives for these logits."""
    t, s = jnp.array([[1.0, 2, 3], [3, 1, 2]]), jnp.array([[3.0, 2, 1], [0, 0, 1]])
    got = kljax.reduce(compat_keras.kl_divergence(t / 3.0, s / 3.0), reduction="mean")
    np.testing.assert_allclose(got, 11.1595, atol=1e-4)
    loss, _ = kljax.distillation_loss(s, t, temperature=3.0)
    np.testing.assert_allclose(loss, 0.8922, atol=1e-4)


def test_the_recipe_for_clu():
    """Uneven, masked batches merge as clu merges them."""
    pytest.importorskip("clu")
    names = {}
    guide = (DOCS / "migrating.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    s, t = np.float32(S), np.float32(T_LOGITS)
    state = names["KL"].empty()
    for rows in (slice(0, 2), slice(2, 5)):
        state = state.merge(
            names["KL"].from_model_output(student=s[rows], teacher=t[rows], mask=MASK[rows])
        )
    assert_close(state.compute(), masked_mean(soft(1.0)))
