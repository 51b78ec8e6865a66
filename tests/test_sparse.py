"""A teacher's best classes, or some drawn at random: `top_k` and `sample_targets`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest
from helpers import assert_close, named, report

import kljax

N, V, K = 6, 8, 3
X = np.linspace(0, 1, N * V, dtype=np.float32).reshape(N, V)


def logits(rng, *shape, scale=2.0):
    return np.asarray(rng.normal(size=shape or (N, V)) * scale, np.float32)


# --- top_k ---


def test_top_k(rng):
    """The k best classes, their log-probabilities under all classes, and the log of the rest."""
    x = logits(rng, 2, 3, V)
    for temperature, trace in ((None, jax.jit), (2.0, lambda f: f)):
        got = trace(partial(kljax.top_k, k=K, temperature=temperature))(x)
        want = oracle_large.top_k(x, K, temperature=temperature)
        np.testing.assert_array_equal(got.indices, want["indices"])
        assert_close(got.log_probs, want["log_probs"])
        assert_close(got.log_tail, want["log_tail"])
        assert got.tail == "bucket"
        assert got.temperature == temperature
    narrow = kljax.top_k(jnp.asarray(x, jnp.bfloat16), K)
    want = oracle_large.top_k(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32), K)
    assert narrow.log_probs.dtype == narrow.log_tail.dtype == jnp.float32
    assert_close(narrow.log_probs, want["log_probs"])
    assert_close(narrow.log_tail, want["log_tail"])
    assert jnp.issubdtype(got.indices.dtype, jnp.integer)


def test_gradient_through_top_k(rng):
    """A teacher that learns gets the derivative of the divergence from its best classes."""
    a = {"x": logits(rng), "y": logits(rng)}

    @jax.jit
    @jax.grad
    def step(a):
        targets = kljax.top_k(a["y"], K, temperature=2.0)
        return kljax.jensen_shannon(a["x"], targets, temperature=2.0, reduction="sum")

    def want(a):
        kept = oracle_large.top_k(a["y"], K, temperature=2.0)
        return oracle_large.top_k_divergence(
            "jensen_shannon", a["x"], **kept, temperature=2.0
        ).sum()

    got, slopes = step(a), oracle_large.gradients(want, a)
    for side in a:
        assert_close(got[side], slopes[side])


def test_near_ties_are_ordered_by_the_logits():
    """Not by log-probabilities, in which they round to one number."""
    x = jnp.zeros(30_000).at[7].set(5e-8)
    assert kljax.top_k(x, 1).indices[0] == 7


# --- sample_targets ---


SETTINGS = {"temperature": 2.0, "proposal_power": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, SETTINGS, {"proposal_power": 0.0}], ids=["own", "flat", "even"]
)
def test_sampled_targets_are_unbiased(rng, options):
    """Every outcome has the weights count·p/(n·q); over all of them the gradient is the full one.

    The expectation is exact: each outcome enters with its multinomial probability.
    """
    classes, n = 3, 3
    teacher, x = logits(rng, classes, scale=1.0), logits(rng, classes)
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = partial(kljax.sample_targets, logits=teacher, n=n, **options)
    drawn = jax.jit(jax.vmap(lambda key: (lambda t: (t.indices, t.log_probs))(draw(key))))(keys)
    indices, log_probs = map(np.asarray, drawn)
    assert indices.shape == log_probs.shape == (2000, n)

    # What was drawn, read back from the weights.
    weights = np.zeros((2000, classes))
    np.add.at(weights, (np.arange(2000)[:, None], indices), np.exp(log_probs.astype(np.float64)))
    unit = oracle_large.importance_weights(teacher, np.eye(classes), **options).diagonal() / n
    counts = np.rint(weights / unit)
    assert_close(weights, counts * unit)
    assert (counts.sum(-1) == n).all()
    # Duplicates are merged: a class fills one slot, and the slots that are left are padding.
    assert ((log_probs > -np.inf).sum(-1) == (counts > 0).sum(-1)).all()

    q = np.exp(oracle_large.proposal(teacher, **options))
    share, deviation = counts.sum(0) / counts.sum(), np.sqrt(q * (1 - q) / counts.sum())
    assert (abs(share - q) < 5 * deviation).all()

    outcomes = list(oracle_large.draws(np.log(q), n))
    first = [np.flatnonzero((counts == count).all(-1))[0] for count, _ in outcomes]
    targets = kljax.TopK(
        indices[first], log_probs[first], temperature=options.get("temperature"), tail="truncate"
    )
    chances = np.array([chance for _, chance in outcomes], np.float32)
    full = {"temperature": options.get("temperature")}

    @partial(jax.jit, static_argnums=1)
    def expected(x, f):
        each = lambda x: f(jnp.tile(x, (len(first), 1)), targets, **full)  # noqa: E731
        return jax.value_and_grad(lambda x: chances @ each(x))(x)

    for name in ("forward_kl", "cross_entropy"):
        value, gradient = expected(x, named(name))
        assert_close(gradient, oracle.gradient(name, x, teacher, **full))
    assert_close(value, oracle.divergence("cross_entropy", x, teacher, **full))


def test_sampled_targets(rng):
    """A batch, an impossible class, any transform; and the divergences take them as they are."""
    teacher, x = logits(rng), logits(rng)
    teacher[:, 3] = -np.inf
    key = jax.random.key(1)
    draw = jax.jit(partial(kljax.sample_targets, n=16, **SETTINGS))
    targets = draw(key, teacher)
    assert isinstance(targets, kljax.TopK)
    assert targets.tail == "truncate"
    assert targets.indices.shape == targets.log_probs.shape == (N, 16)
    assert targets.log_probs.dtype == jnp.float32
    present = np.asarray(targets.log_probs) > -np.inf
    assert not (present & (np.asarray(targets.indices) == 3)).any()
    assert ((targets.indices >= 0) & (targets.indices < V)).all()
    again, other = draw(key, teacher), draw(jax.random.key(2), teacher)
    np.testing.assert_array_equal(again.log_probs, targets.log_probs)
    assert (np.asarray(other.log_probs) != np.asarray(targets.log_probs)).any()
    rows = np.asarray(kljax.sample_targets(key, np.tile(teacher[:1], (64, 1)), 2).indices)
    assert len(np.unique(rows, axis=0)) > 4, "examples are drawn independently"

    # Weights above 1 are no error, and 16 slots of 8 classes are none either.
    f = partial(kljax.forward_kl, temperature=2.0)
    assert report(jax.jit(f), x, targets) is None
    kept = {"indices": targets.indices, "log_probs": targets.log_probs, "tail": "truncate"}
    assert_close(
        f(x, targets), oracle_large.top_k_divergence("forward_kl", x, **kept, temperature=2.0)
    )
    eager = kljax.sample_targets(key, teacher, 16, **SETTINGS)
    with pytest.raises(ValueError, match="temperature"):
        kljax.forward_kl(x, eager, temperature=1.0)
    with pytest.raises(ValueError, match="sample_targets: n .*got 0"):
        kljax.sample_targets(key, teacher, 0)


@pytest.mark.usefixtures("optimized")
def test_sampling_takes_the_memory_of_few_arrays():
    """The noise of one draw at a time, not of all: a few arrays of the logits' size, not n."""
    x = jax.ShapeDtypeStruct((64, 4096), np.float32)
    draw = jax.jit(lambda x: kljax.sample_targets(jax.random.key(0), x, 32))
    temporary = draw.lower(x).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 10 * 4 * 64 * 4096


# --- of a head ---


def head_of(rng, batch=(N,), **options):
    hidden, kernel = logits(rng, *batch, 4), logits(rng, 4, V)
    return kljax.Head(hidden, kernel, **options), np.matmul(hidden, kernel)


@pytest.mark.parametrize("where", [None, np.arange(V) < V - 2], ids=["all", "masked"])
def test_the_best_of_a_head(rng, where):
    """As of its logits; masked classes are never among them, and hold no mass."""
    head, z = head_of(rng, scale=0.5)
    z = 0.5 * z if where is None else np.where(where, 0.5 * z, -np.inf)
    kept = oracle_large.top_k(z, K, temperature=2.0)
    for teacher in (head, kljax.Logits(0.5 * np.matmul(head.hidden, head.kernel))):
        got = kljax.top_k(teacher, K, where=where, temperature=2.0)
        np.testing.assert_array_equal(got.indices, kept["indices"])
        assert_close(got.log_probs, kept["log_probs"])
        assert_close(got.log_tail, kept["log_tail"])
        assert got.temperature == 2.0
    of_both = kljax.forward_kl(z, got, where=where, temperature=2.0)
    assert_close(kljax.forward_kl(head, got, where=where, temperature=2.0), of_both)


@pytest.mark.slow
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_samples_of_a_head(rng, make_key):
    """The same draws as from its logits, none of a masked class, whatever the blocks."""
    head, z = head_of(rng, (3, 20))
    draw = partial(kljax.sample_targets, make_key(0), n=9, where=np.arange(V) != 1)
    of_head, of_logits = draw(head), draw(z)
    np.testing.assert_array_equal(of_head.indices, of_logits.indices)
    assert_close(of_head.log_probs, of_logits.log_probs)
    assert not (of_head.indices == 1)[np.isfinite(of_head.log_probs)].any()
    again = kljax.sample_targets(make_key(0), kljax.Head(head.hidden, head.kernel), 9)
    assert (again.indices == 1).any(), "without a mask it is drawn"


@pytest.mark.slow
def test_a_teacher_of_a_head_in_blocks():
    """On a batch of many blocks: what its logits give, of a temporary that does not hold them."""
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, kernel = jax.random.normal(keys[0], (2048, 8)), jax.random.normal(keys[1], (8, 2048))

    def best(hidden):
        return kljax.top_k(kljax.Head(hidden, kernel), 4).log_probs

    def sampled(hidden):
        return kljax.sample_targets(keys[0], kljax.Head(hidden, kernel), 3).log_probs

    assert_close(best(hidden), kljax.top_k(hidden @ kernel, 4).log_probs)
    for f in (best, sampled):
        compiled = jax.jit(f).lower(hidden).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2048 * 2048
    assert_close(sampled(hidden), kljax.sample_targets(keys[0], hidden @ kernel, 3).log_probs)
    gradient = jax.grad(lambda hidden: best(hidden).sum())(hidden)
    assert (gradient == 0).all(), "a head of targets is frozen"


# --- what does not fit ---


def test_how_many():
    """NumPy's integers count too; bool and traced numbers do not."""
    assert kljax.top_k(X, np.int64(2)).indices.shape == (N, 2)
    for k in (True, 2.0, "2", 0, V + 1):
        with pytest.raises(ValueError, match=rf"top_k: k must be an int in \[1, {V}\].*{k}"):
            kljax.top_k(X, k)
    with pytest.raises(ValueError, match="n must be a positive int.*It is static"):
        jax.jit(lambda n: kljax.sample_targets(jax.random.key(0), X, n))(2)
    with pytest.raises(ValueError, match="top_k: logits must be an array with a class axis"):
        kljax.top_k(jnp.float32(1), 1)


def test_only_logits_have_best_classes():
    """Another distribution says what to pass instead."""
    message = "top_k: logits must be logits or a Head; got LogProbs. Logarithms of"
    with pytest.raises(ValueError, match=message):
        kljax.top_k(kljax.LogProbs(X), 2)
    with pytest.raises(ValueError, match="sample_targets: logits .*got Probs"):
        kljax.sample_targets(jax.random.key(0), kljax.Probs(X), 2)
    with pytest.raises(TypeError, match="top_k: where must be bool"):
        kljax.top_k(X, 2, where=np.ones(V))


# --- examples without classes ---


def test_few_of_no_classes_are_padding(rng):
    """Where the mask leaves none there is no best class and no sample, and the loss is 0."""
    x, where = jnp.asarray(logits(rng)), np.arange(N)[:, None] != np.full(V, 1)
    key = jax.random.key(0)
    for few in (kljax.top_k(x, 3, where=where), kljax.sample_targets(key, x, 3, where=where)):
        np.testing.assert_array_equal(np.isneginf(few.log_probs).all(-1), np.arange(N) == 1)
        assert kljax.forward_kl(x, few, where=where)[1] == 0
