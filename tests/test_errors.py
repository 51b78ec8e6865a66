"""Bad input raises when tracing: function, argument, expected, got, remedy."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kljax

X = jnp.zeros((8, 10))
EXACT = {
    "weights with a last axis": (
        lambda: kljax.forward_kl(X, X, weights=jnp.ones((8, 1))),
        "forward_kl: weights must have shape (8,), the batch shape; got (8, 1). "
        "Squeeze the last axis.",
    ),
    "weights transposed": (
        lambda: kljax.forward_kl(X, X, weights=jnp.ones((1, 8))),
        "forward_kl: weights must have shape (8,), the batch shape; got (1, 8). Reshape to (8,).",
    ),
    "weights of the classes": (
        lambda: kljax.reverse_kl(X, X, weights=jnp.ones(10)),
        "reverse_kl: weights must have shape (8,), the batch shape; got (10,). "
        "Give one weight per example.",
    ),
    "scalar weight": (
        lambda: kljax.reduce(jnp.ones(3), weights=2.0),
        "reduce: weights must have shape (3,), the batch shape; got (). "
        "Give one weight per example.",
    ),
    "complex weights": (
        lambda: kljax.forward_kl(X, X, weights=jnp.ones(8, jnp.complex64)),
        "forward_kl: weights must be bool, int or float; got complex64.",
    ),
    "vocabularies": (
        lambda: kljax.forward_kl(X, jnp.zeros((8, 12))),
        "forward_kl: targets must have 10 classes along axis 1, like predictions; got 12. "
        "Slice both to the classes that they share, a vocabulary to the tokenizer's size; "
        "never pad with zeros.",
    ),
    "broadcast batch": (
        lambda: kljax.jeffreys(X, jnp.zeros((1, 10))),
        "jeffreys: targets must have shape (8, 10), like predictions, or (10,), one distribution "
        "for all; got (1, 10). Nothing else broadcasts; use jnp.broadcast_to where that is meant.",
    ),
    "broadcast classes": (
        lambda: kljax.kl(X, jnp.zeros((8, 1))),
        "kl: q must have 10 classes along axis 1, like p; got 1.",
    ),
    "batch of another size": (
        lambda: kljax.kl_terms(X, jnp.zeros((4, 10))),
        "kl_terms: q must have shape (8, 10), like p, or (10,), one distribution for all; "
        "got (4, 10).",
    ),
    "axis outside": (
        lambda: kljax.entropy(X, axis=2),
        "entropy: axis must be within the 2 axes of shape (8, 10); got 2.",
    ),
    "axis twice": (
        lambda: kljax.entropy(X, axis=(1, -1)),
        "entropy: axis must be distinct axes; got (1, -1).",
    ),
    "integer predictions": (
        lambda: kljax.forward_kl(X.astype(int), X),
        "forward_kl: predictions must be floating point; got int32. "
        "Predictions come first, labels or targets second.",
    ),
    "integer targets": (
        lambda: kljax.forward_kl(X, jnp.zeros(8, int)),
        "forward_kl: targets must be floating point; got int32. "
        "Convert with .astype(jnp.float32). Integer labels go to cross_entropy.",
    ),
    "no array": (
        lambda: kljax.forward_kl({"logits": X}, X),
        "forward_kl: predictions must be an array; got dict.",
    ),
    "float mask": (
        lambda: kljax.forward_kl(X, X, where=jnp.ones(10)),
        "forward_kl: where must be bool; got float32. "
        "Write `where > 0`; weights of examples go into `weights`.",
    ),
    "mask of examples": (
        lambda: kljax.forward_kl(X, X, where=jnp.ones(8, bool)),
        "forward_kl: where must have shape (10,), the classes, or (8, 10), the whole input's; "
        "got (8,). It masks classes; a mask of examples goes into `weights`.",
    ),
    "broadcasting mask": (
        lambda: kljax.forward_kl(X, X, where=jnp.ones((8, 1), bool)),
        "forward_kl: where must have shape (10,), the classes, or (8, 10), the whole input's; "
        "got (8, 1).",
    ),
    "unknown reduction": (
        lambda: kljax.forward_kl(X, X, reduction="MEAN"),
        'forward_kl: reduction must be one of "none", "mean", "sum", "batchmean"; got "MEAN".',
    ),
    "no reduction": (
        lambda: kljax.reduce(X, reduction=None),
        'reduce: reduction must be one of "none", "mean", "sum", "batchmean"; got None.',
    ),
    "unknown implementation": (
        lambda: kljax.forward_kl(X, X, implementation="fast"),
        'forward_kl: implementation must be one of None, "dense"',
    ),
    "normalizer without mean": (
        lambda: kljax.forward_kl(X, X, reduction="sum", normalizer=3.0),
        'forward_kl: normalizer must be given with reduction="mean"; got reduction="sum". '
        "Leave it out, or take the mean.",
    ),
    "array normalizer": (
        lambda: kljax.forward_kl(X, X, reduction="mean", normalizer=jnp.ones(8)),
        "forward_kl: normalizer must be a scalar; got shape (8,).",
    ),
    "axis_name without reduction": (
        lambda: kljax.forward_kl(X, X, axis_name="batch"),
        'forward_kl: axis_name must be given with a reduction; got reduction="none". '
        "Nothing is summed over the axis without one.",
    ),
    "an axis named twice": (
        lambda: kljax.forward_kl(X, X, reduction="mean", axis_name=["data", "data"]),
        "forward_kl: axis_name must be distinct names; got ['data', 'data']. Name each axis once.",
    ),
    "rows that are a bool": (
        lambda: kljax.forward_kl(X, X, implementation=kljax.Chunked(rows=True)),
        "forward_kl: implementation must be Chunked of a positive int of rows; "
        "got Chunked(rows=True).",
    ),
    "temperature zero": (
        lambda: kljax.forward_kl(X, X, temperature=0.0),
        "forward_kl: temperature must be positive; got 0.0. Use None for no temperature.",
    ),
    "array temperature": (
        lambda: kljax.forward_kl(X, X, temperature=jnp.ones(3)),
        "forward_kl: temperature must be a scalar, or of the batch shape (8,); got shape (3,).",
    ),
    "axis of another type": (
        lambda: kljax.entropy(X, axis=None),
        "entropy: axis must be an int or several; got None.",
    ),
    "concrete temperature": (
        lambda: kljax.forward_kl(X, X, temperature=jnp.float32(-2)),
        "forward_kl: temperature must be positive; got -2.0.",
    ),
    "soft weights per example": (
        lambda: kljax.distillation_loss(X, X, soft_weight=jnp.ones(8)),
        "distillation_loss: soft_weight must be a scalar; got shape (8,).",
    ),
    "hard weights per example": (
        lambda: kljax.distillation_loss(X, X, jnp.zeros(8, int), hard_weight=jnp.ones(8)),
        "distillation_loss: hard_weight must be a scalar; got shape (8,).",
    ),
    "concrete beta": (
        lambda: kljax.jensen_shannon(X, X, beta=jnp.float32(1.5)),
        "jensen_shannon: beta must be in [0, 1]; got 1.5.",
    ),
    "beta": (
        lambda: kljax.jensen_shannon(X, X, beta=1.5),
        "jensen_shannon: beta must be in [0, 1]; got 1.5.",
    ),
    "alpha": (
        lambda: kljax.skew_forward_kl(X, X, alpha=-0.1),
        "skew_forward_kl: alpha must be in [0, 1]; got -0.1.",
    ),
    "alpha of the reverse": (
        lambda: kljax.skew_reverse_kl(X, X, alpha=np.float64(2)),
        "skew_reverse_kl: alpha must be in [0, 1]; got 2.0.",
    ),
    "labels of another shape": (
        lambda: kljax.cross_entropy(X, jnp.zeros((8, 1), int)),
        "cross_entropy: labels must have shape (8,), the batch shape; got (8, 1). "
        "Give one label per example; one-hot labels go in as Probs.",
    ),
    "labels over two axes": (
        lambda: kljax.cross_entropy(X, jnp.array(3), axis=(0, 1)),
        "cross_entropy: axis must be a single axis with integer labels; got 2 class axes.",
    ),
    "float labels": (
        lambda: kljax.distillation_loss(X, X, jnp.zeros(8), hard_weight=1.0),
        "distillation_loss: labels must be integers; got float32. "
        "Wrap soft labels in Probs or LogProbs.",
    ),
    "bare floats as labels": (
        lambda: kljax.cross_entropy(X, X),
        "cross_entropy: targets must be integer labels, or a distribution that says what it is; "
        "got bare float32. Wrap one-hot or soft labels in Probs, a teacher's logits in Logits.",
    ),
    "bool labels": (
        lambda: kljax.cross_entropy(X, jnp.zeros(8, bool)),
        "got bare bool. Convert labels with .astype(int); wrap one-hot labels in Probs, as floats.",
    ),
    "labels that wrap around": (
        lambda: kljax.cross_entropy(X, np.full(8, 2**32 + 1)),
        "cross_entropy: targets must be within int32; got int64 up to 4294967297, down to "
        "4294967297. They would wrap around",
    ),
    "smoothing of a distribution": (
        lambda: kljax.cross_entropy(X, kljax.Probs(X), label_smoothing=0.1),
        "cross_entropy: label_smoothing must be left out with a distribution; got 0.1.",
    ),
    "smoothing out of range": (
        lambda: kljax.cross_entropy(X, jnp.zeros(8, int), label_smoothing=1.1),
        "cross_entropy: label_smoothing must be in [0, 1]; got 1.1.",
    ),
    "a teacher as labels": (
        lambda: kljax.distillation_loss(X, X, kljax.Logits(X), hard_weight=1.0),
        "distillation_loss: labels must be integers, Probs or LogProbs; got Logits.",
    ),
    "soft labels of another shape": (
        lambda: kljax.distillation_loss(X, X, kljax.Probs(X[0]), hard_weight=1.0),
        f"distillation_loss: labels must have shape {X.shape}, like predictions; got {X[0].shape}.",
    ),
    "a function as divergence": (
        lambda: kljax.distillation_loss(X, X, divergence=lambda s, t, **_: s),
        "distillation_loss: divergence must be a divergence of kljax",
    ),
    "a partial that binds an option": (
        lambda: kljax.distillation_loss(X, X, divergence=partial(kljax.forward_kl, axis=0)),
        "distillation_loss: divergence must be a divergence of kljax",
    ),
    "a mask of classes as weights": (
        lambda: kljax.forward_kl(X, X, weights=jnp.ones(X.shape[1:], bool)),
        "A mask of classes goes into `where`.",
    ),
    "no labels": (
        lambda: kljax.distillation_loss(X, X, hard_weight=0.5),
        "distillation_loss: labels must be given; got None. Or set hard_weight=0.0.",
    ),
    "label weights": (
        lambda: kljax.distillation_loss(X, X, jnp.zeros(8, int), label_weights=jnp.ones((8, 1))),
        "distillation_loss: label_weights must have shape (8,), the batch shape; got (8, 1).",
    ),
    "name of a divergence": (
        lambda: kljax.distillation_loss(X, X, divergence="forward_kl"),
        "distillation_loss: divergence must be a divergence of kljax, or a partial of one that "
        "binds its own parameters; got 'forward_kl'. Make your own with kljax.divergence; "
        "options go to the call.",
    ),
    "distillation weights": (
        lambda: kljax.distillation_loss(X, X, weights=jnp.ones((8, 1))),
        "distillation_loss: weights must have shape (8,), the batch shape; got (8, 1).",
    ),
    "a term that sums": (
        lambda: kljax.divergence(lambda s, t: jnp.sum(s - t, -1))(X, X),
        "divergence: term must be a function that returns shape (8, 10); got (8,). "
        "A term is elementwise: the library sums over the classes.",
    ),
    "a term that ignores": (
        lambda: kljax.divergence(lambda s, t: 1.0)(X, X),
        "divergence: term must be a function that returns shape (8, 10); got float.",
    ),
}
TYPE_ERRORS = {
    "complex weights",
    "integer predictions",
    "integer targets",
    "no array",
    "float mask",
    "float labels",
    "name of a divergence",
    "bare floats as labels",
    "bool labels",
    "a function as divergence",
    "a partial that binds an option",
}


@pytest.mark.parametrize("case", EXACT)
def test_message(case):
    """The message is this one, its type ValueError, or TypeError for dtypes and types."""
    call, message = EXACT[case]
    with pytest.raises(Exception, match=re.escape(message)) as raised:
        call()
    assert raised.type is (TypeError if case in TYPE_ERRORS else ValueError)


def test_errors_come_while_tracing():
    """Under jit and eval_shape too, before anything runs."""
    with pytest.raises(ValueError, match="weights must have shape"):
        jax.eval_shape(lambda x, w: kljax.forward_kl(x, x, weights=w), X, jnp.ones((8, 1)))
    with pytest.raises(ValueError, match="temperature must be positive"):
        jax.jit(lambda x: kljax.distillation_loss(x, x, temperature=-1.0))(X)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kljax.forward_kl(X, jnp.zeros((1, 10))),
        lambda: kljax.forward_kl(X, X, weights=jnp.ones((8, 1))),
        lambda: kljax.forward_kl(X, X, where=jnp.ones((8, 1), bool)),
        lambda: kljax.forward_kl(X, X, temperature=jnp.ones((8, 1))),
        lambda: kljax.reduce(jnp.ones(8), weights=jnp.ones((8, 1)), reduction="mean"),
    ],
    ids=["batch", "weights", "where", "temperature", "reduce"],
)
def test_disabled_asserts_do_not_let_shapes_broadcast(call):
    """What would broadcast silently raises even under chex.disable_asserts."""
    chex.disable_asserts()
    try:
        with pytest.raises(ValueError, match="must"):
            call()
    finally:
        chex.enable_asserts()


def test_options_are_keywords():
    """A third positional argument, or an unknown option, is a TypeError."""
    with pytest.raises(TypeError):
        kljax.forward_kl(X, X, -1)
    for name in ("forward_kl", "kl", "entropy"):
        message = f"{name}() has no option 'temprature'; did you mean 'temperature'?"
        with pytest.raises(TypeError, match=re.escape(message)):
            getattr(kljax, name)(*(X, X)[: 1 if name == "entropy" else 2], temprature=2.0)
    for theirs, ours in {"mask": "weights", "T": "temperature", "dim": "axis"}.items():
        with pytest.raises(TypeError, match=f"no option '{theirs}'; did you mean '{ours}'?"):
            kljax.forward_kl(X, X, **{theirs: 1})
    with pytest.raises(TypeError, match="no option 'alpha'; it has none of its own"):
        kljax.distillation_loss(X, X, divergence=partial(kljax.forward_kl, alpha=0.1))
    mine = kljax.divergence(mine_term)
    with pytest.raises(
        TypeError, match=re.escape("mine_term() has no option 'gama'; did you mean 'gamma'?")
    ):
        mine(X, X, gama=1.0)
    with pytest.raises(TypeError, match="mine_term: gamma must be given; got nothing"):
        mine(X, X)


def mine_term(log_s, log_t, *, gamma):
    return gamma * log_s


def test_numpy_integers_are_axes():
    """np.int64 counts axes as well as int."""
    np.testing.assert_array_equal(kljax.entropy(X, axis=np.int64(1)), kljax.entropy(X))


def test_a_cache_of_bfloat16_read_by_numpy():
    """NumPy's files keep its bytes, and forget what they are."""
    log_probs = np.asarray(jnp.zeros(1, jnp.bfloat16)).view("V2")
    message = r"forward_kl: targets.log_probs must be an array; got one of dtype \|V2. Give it"
    with pytest.raises(TypeError, match=message):
        kljax.forward_kl(X, kljax.TopK(np.array([0]), log_probs))
    assert kljax.TopK(np.array([0]), log_probs.view(jnp.bfloat16)).log_probs.dtype == jnp.bfloat16
