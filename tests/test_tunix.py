"""examples/tunix_distillation.py: a strategy that Tunix's trainer runs as it runs its own."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Tunix's own calls
]

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBERS = {"temperature": 3.0, "alpha": 0.7}
BATCH, LENGTH, VOCABULARY = 4, 6, 11


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("tunix", reason="pip install google-tunix")
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as Tunix needs
        yield importlib.import_module("tunix_distillation")


@pytest.fixture
def losses(example):
    """Of the same logits and labels, ours and theirs: ((loss, metrics), gradient)."""
    functions = (example.logits, example.logits, example.next_tokens)
    ours = example.KljaxStrategy(*functions, **NUMBERS)
    theirs = example.LogitStrategy(*functions, **NUMBERS)

    def both(student, teacher, labels):
        one_hot = jax.nn.one_hot(labels, student.shape[-1])
        return [
            jax.jit(jax.value_and_grad(strategy.compute_loss, has_aux=True))(student, teacher, y)
            for strategy, y in ((ours, labels), (theirs, one_hot))
        ]

    return both


@pytest.fixture
def given(rng):
    student, teacher = (
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, VOCABULARY)) * 3, jnp.float32) for _ in range(2)
    )
    return student, teacher, jnp.asarray(rng.integers(VOCABULARY, size=(BATCH, LENGTH)), jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_tunix_loss_where_all_counts(losses, given, dtype):
    """Value, gradient, and each metric that both have."""
    student, teacher, labels = given
    ours, theirs = losses(student.astype(dtype), teacher.astype(dtype), labels)
    ((value, seen), gradient), ((want, expected), slope) = ours, theirs
    assert_close(value, want)
    assert gradient.dtype == slope.dtype == dtype
    assert_close(gradient, np.asarray(slope, np.float64), dtype)
    assert_close(seen["distill/soft"], expected["distill/kl_div"])
    assert_close(seen["distill/soft"] * NUMBERS["temperature"] ** 2, expected["distill/soft_loss"])
    assert_close(seen["distill/hard"], expected["distill/hard_loss"])


def test_with_padding_it_is_tunix_loss_of_what_counts(losses, given):
    """Tunix's own loss with padding is another: that trains the student, and is counted."""
    student, teacher, labels = given
    counts = np.arange(LENGTH) < np.array([6, 2, 1, 4])[:, None]
    ours, theirs = losses(student, teacher, jnp.where(counts, labels, -1))
    _, unpadded = losses(student[counts], teacher[counts], labels[counts])
    assert_close(ours[0][0], unpadded[0][0])
    assert_close(ours[1][counts], unpadded[1])
    assert (ours[1][~counts] == 0).all()
    assert (np.abs(theirs[1][~counts]).max(axis=-1) > 0).all()
    shrunk = unpadded[0][1]["distill/hard_loss"] * counts.mean()
    assert_close(theirs[0][1]["distill/hard_loss"], shrunk)


def test_a_class_masked_by_infinity_is_not_nan(losses, given):
    """As it is with Tunix: a vocabulary padded for the hardware, say."""
    student, teacher, labels = given
    ours, theirs = losses(*(x.at[..., -1].set(-jnp.inf) for x in (student, teacher)), labels % 10)
    _, without = losses(student[..., :-1], teacher[..., :-1], labels % 10)
    assert np.isnan(theirs[0][0])
    assert_close(ours[0][0], without[0][0])
    assert_close(ours[1][..., :-1], without[1])
    assert (ours[1][..., -1] == 0).all()


def test_tunix_trainer_lowers_the_loss(example):
    """The same from logits and from heads; and the student comes nearer to its teacher."""
    teacher = example.train_teacher(steps=20)
    before = example.evaluate(example.Model(32), teacher)
    courses = {}
    for name, strategy in example.STRATEGIES.items():
        student, courses[name] = example.distill(strategy(), teacher, steps=20)
        after = example.evaluate(student, teacher)
        assert after.divergence < 0.8 * before.divergence
        assert after.hard < before.hard
        assert courses[name][-1] < 0.8 * courses[name][0]
    np.testing.assert_allclose(courses["kljax, heads"], courses["kljax, logits"], rtol=1e-3)


def test_tunix_trainer_evaluates(example):
    """Its loss there is the labels' alone, of what counts."""
    strategy, (batch,) = example.STRATEGIES["kljax, heads"](), example.batches(1, seed=3)
    model, inputs = example.Model(32), {"input_tokens": batch.input_tokens}
    inputs["input_mask"] = batch.input_mask
    got, _ = strategy.get_eval_loss(model, inputs)
    logs = jax.nn.log_softmax(example.logits(model, **inputs))
    labels = example.next_tokens(**inputs)
    hard = -jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    assert_close(got, jnp.mean(hard[labels >= 0]))


@pytest.mark.usefixtures("optimized")
def test_temporaries_are_fewer(example):
    """Of the compiled loss and gradient at 32,768 classes; from heads, less than the logits."""
    nnx, classes, tokens = example.nnx, 2**15, jax.ShapeDtypeStruct((64, 64), jnp.int32)
    inputs = {"input_tokens": tokens, "input_mask": jax.ShapeDtypeStruct((64, 64), bool)}
    student, teacher = (
        nnx.eval_shape(lambda width=width: example.Model(width, classes)) for width in (32, 64)
    )

    def one_hot(**inputs):
        return jax.nn.one_hot(example.next_tokens(**inputs), classes)

    def temporaries(strategy):
        graph, state = nnx.split(student)

        def loss(state, teacher_output, inputs):
            return strategy.get_train_loss(nnx.merge(graph, state), teacher_output, inputs)

        target = nnx.eval_shape(strategy.get_teacher_outputs, teacher, inputs)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(state, target, inputs)
        return step.compile().memory_analysis().temp_size_in_bytes

    dense, head = example.logits, example.head
    theirs = temporaries(example.LogitStrategy(dense, dense, one_hot))
    ours = temporaries(example.KljaxStrategy(dense, dense, example.next_tokens))
    heads = temporaries(example.KljaxStrategy(head, head, example.next_tokens))
    assert 0 < heads < ours < theirs
    assert heads < 4 * tokens.size * classes
