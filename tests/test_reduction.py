"""Weights, reductions and mapped axes: `reduce` and the same options of every divergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kljax

REDUCTIONS = ["none", "mean", "sum", "batchmean"]
TO_ONE = REDUCTIONS[1:]
S = np.array([[0.3, -1.2, 0.8], [1.5, 0.1, -0.4], [0.0, 3.0, -2.0]], np.float32)
T = np.array([[1.0, 0.2, -0.7], [1.4, 0.1, -0.4], [-1.0, 2.0, 0.5]], np.float32)
W = np.array([0.5, 0.0, 2.0], np.float32)
LOSSES = np.array([1.5, -0.25, 4.0], np.float32)  # of no divergence: a reduction takes any number

DEVICES = 8
REPLICATED, SPLIT = P(), P("shards")
_RNG = np.random.default_rng(7)
# 8 shards of 2 examples; the shards' weights differ, and shard 2 has none.
SHARDED_S, SHARDED_T = _RNG.normal(size=(2, 8, 2, 3)).astype(np.float32)
SHARDED_W = _RNG.uniform(0.1, 3.0, size=(8, 2)).astype(np.float32)
SHARDED_W[2] = 0
SHARDED_W[5, 1] = 0
FLAT_S, FLAT_T, FLAT_W = SHARDED_S.reshape(16, 3), SHARDED_T.reshape(16, 3), SHARDED_W.reshape(16)


def exact_zero(x):
    """Assert that every entry is 0: not nearly, and not NaN."""
    np.testing.assert_array_equal(np.asarray(x), np.zeros(np.shape(x)))


def total(reduction, weights, normalizer=None):
    """Return the oracle's factor of Σwℓ in a reduction."""
    ones = np.ones(len(weights))
    return oracle.reduce(ones, weights, reduction, normalizer) / np.sum(weights, dtype=np.float64)


# --- the formulas ---


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reduce_equals_the_oracle(reduction, shape, rng):
    """Any rank, and weights of any type, give the textbook formula in float32."""
    values = rng.normal(size=shape).astype(np.float32)
    whole = rng.integers(0, 3, size=shape)
    kinds = [None, (whole * 0.3).astype(np.float32)]
    if len(shape) == 2:
        kinds += [whole > 0, whole.astype(np.int8) * 100]
    for weights in kinds:
        got = kljax.reduce(values, weights=weights, reduction=reduction)
        want = oracle.reduce(values, weights, reduction)
        assert got.dtype == jnp.float32
        assert got.shape == (shape if reduction == "none" else ())
        assert_close(got, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_divergence_reduces_as_reduce_does(reduction):
    """The options of a divergence mean what they mean in `reduce`."""
    each = oracle.divergence("forward_kl", S, T)
    for weights in (None, W > 0, [1, 0, 3])[: None if reduction == "mean" else 2]:
        got = kljax.forward_kl(S, T, weights=weights, reduction=reduction)
        assert_close(got, oracle.reduce(each, weights, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_two_axes_reduces_whole(reduction, rng):
    """Every batch axis is reduced; only batchmean divides by the leading one alone."""
    s, t = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    weights = np.array([[1, 0, 2], [3, 1, 1]])
    got = kljax.reverse_kl(s, t, weights=weights, reduction=reduction)
    want = oracle.reduce(oracle.divergence("reverse_kl", s, t), weights, reduction)
    assert_close(got, want)


def test_one_example_without_batch_reduces_to_itself():
    """Without batch axes the mean is the value, and N is 1."""
    want = oracle.divergence("forward_kl", S[0], T[0])
    assert_close(kljax.forward_kl(S[0], T[0], reduction="mean", weights=2.0), want)
    assert_close(kljax.forward_kl(S[0], T[0], reduction="batchmean"), want)
    assert_close(kljax.forward_kl(S[0], T[0], reduction="batchmean", weights=2.0), 2 * want)


def test_batchmean_ignores_weights_in_its_denominator():
    """It divides by the leading batch size, whatever the weights."""
    got = kljax.reduce(LOSSES, weights=[1, 0, 0], reduction="batchmean")
    assert_close(got, LOSSES[0] / 3)


def test_narrow_weights_are_summed_in_float32():
    """The sum of weights neither rounds nor overflows in the weights' own dtype."""
    values = np.array([1.0, 2.0, 4.0], np.float32)
    heavy = np.array([60000, 60000, 0], np.float16)
    assert_close(kljax.reduce(values, weights=heavy, reduction="mean"), 1.5)
    fine = jnp.array([256, 1, 1], jnp.bfloat16)
    assert_close(kljax.reduce(values, weights=fine, reduction="mean"), 262 / 258)


# --- zeros ---


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weight_zero_removes_bad_values(reduction):
    """A NaN or infinite value of weight 0 leaves value and derivatives as if it were finite."""

    @jax.jit
    def all_of(losses):
        f = partial(kljax.reduce, weights=W, reduction=reduction)
        return f(losses), jax.jacrev(f)(losses), jax.jacfwd(f)(losses)

    want = np.diag(W) if reduction == "none" else W * total(reduction, W)
    for bad in (np.nan, np.inf, -np.inf):
        losses = np.array([1.5, bad, 4.0], np.float32)
        value, *jacobians = all_of(losses)
        assert_close(value, oracle.reduce(losses, W, reduction))
        for got in jacobians:
            assert_close(got, want)
            exact_zero(np.asarray(got)[..., 1])


def test_weight_zero_removes_bad_tangents():
    """The NaN tangent of a NaN value of weight 0 goes no further."""

    @jax.jit
    def along(tangents):
        f = partial(kljax.reduce, weights=W, reduction="mean")
        return jax.jvp(f, (jnp.asarray(LOSSES).at[1].set(jnp.nan),), (tangents,))[1]

    got = along(np.array([1.0, np.nan, 1.0], np.float32))
    assert_close(got, 1.0)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weight_zero_removes_bad_examples(reduction):
    """NaN and infinities in an example of weight 0 reach neither value nor gradient nor tangent."""

    @jax.jit
    def all_of(s, t):
        def loss(s, t):
            return kljax.forward_kl(s, t, weights=W, reduction=reduction)

        # Along a row of ones logits do not change their distribution: take another direction.
        along = (jnp.tile(jnp.arange(3.0), (3, 1)),) * 2
        gradient = jax.grad(lambda s, t: jnp.sum(loss(s, t)), (0, 1))
        return (
            loss(s, t),
            jax.jvp(loss, (s, t), along)[1],
            gradient(s, t),
            jax.jvp(gradient, (s, t), along)[1],
        )

    want_value, want_tangent, want_grad, want_second = all_of(S, T)
    assert_close(want_value, oracle.reduce(oracle.divergence("forward_kl", S, T), W, reduction))
    factor = 1.0 if reduction == "none" else total(reduction, W)
    for wrt in range(2):
        grad = oracle.gradient("forward_kl", S, T, wrt, weights=W)
        assert_close(want_grad[wrt], grad * factor)
    for side in range(2):
        for bad in ([np.nan] * 3, [np.inf, 0, 0], [-np.inf] * 3, [np.inf, -np.inf, np.nan]):
            pair = (S.copy(), T.copy())
            pair[side][1] = bad
            value, tangent, grad, second = jax.device_get(all_of(*pair))
            assert_close(value, want_value)
            assert_close(tangent, want_tangent)
            for wrt in range(2):
                assert_close(grad[wrt], want_grad[wrt])
                assert_close(second[wrt], want_second[wrt])
                exact_zero(grad[wrt][1])
                exact_zero(second[wrt][1])


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_all_weights_zero_gives_zero(reduction):
    """With no example left the value is 0 and so is every gradient, even over NaN."""

    @jax.jit
    def value_and_grad(*arguments):
        def loss(s, t, weights):
            return kljax.forward_kl(s, t, weights=weights, reduction=reduction)

        return jax.value_and_grad(loss, (0, 1, 2))(*arguments)

    bad = np.where(np.eye(3, dtype=bool), np.float32(np.nan), S)
    for zeros in (np.zeros(3, np.float32), -np.zeros(3, np.float32)):
        for s in (S, bad):
            value, (to_s, to_t, to_weights) = value_and_grad(s, T, zeros)
            exact_zero(value)
            exact_zero(to_s)
            exact_zero(to_t)
            assert np.isfinite(to_weights).all()


def test_nan_is_not_hidden_by_a_nonzero_weight():
    """A NaN in an example that counts makes the reduction NaN, however small its weight."""
    for reduction in TO_ONE:
        losses = np.array([1.0, np.nan, 2.0], np.float32)
        got = kljax.reduce(losses, weights=[1.0, 1e-6, 1.0], reduction=reduction)
        assert np.isnan(got)


# --- normalizer ---


def test_normalizer_replaces_the_sum_of_weights():
    """The mean is divided by the normalizer, given as a number or traced; 0 gives 0."""

    def mean(normalizer):
        return kljax.reduce(LOSSES, weights=W, reduction="mean", normalizer=normalizer)

    traced = jax.jit(mean)
    for normalizer in (4, 2.5, 0, 0.0):
        want = oracle.reduce(LOSSES, W, "mean", normalizer)
        assert_close(mean(normalizer), want)
        assert_close(traced(np.float32(normalizer)), want)
    exact_zero(mean(0))


def test_normalizer_of_a_divergence():
    """A divergence divides by the normalizer, and a normalizer of 0 gives 0 with gradient 0."""

    def mean(s, normalizer):
        return kljax.forward_kl(s, T, weights=W, reduction="mean", normalizer=normalizer)

    value_and_grad = jax.jit(jax.value_and_grad(mean))
    value, grad = value_and_grad(S, np.float32(5))
    assert_close(value, oracle.reduce(oracle.divergence("forward_kl", S, T), W, "sum") / 5)
    assert_close(grad, oracle.gradient("forward_kl", S, T, weights=W) / 5)
    value, grad = value_and_grad(S, np.float32(0))
    exact_zero(value)
    exact_zero(grad)


def test_gradient_to_normalizer():
    """It is -Σwℓ / n², in reverse and forward mode; at 0, where the value is fixed at 0, finite."""

    def mean(normalizer):
        return kljax.reduce(LOSSES, weights=W, reduction="mean", normalizer=normalizer)

    want = -(W * LOSSES).sum() / 4.0**2
    reverse, forward = jax.jit(jax.grad(mean)), jax.jit(jax.jacfwd(mean))
    assert_close(reverse(4.0), want)
    assert_close(forward(4.0), want)
    assert np.isfinite(reverse(0.0))


def test_micro_batches_add_up_to_the_batch():
    """With the global sum of weights as normalizer, micro-batches sum to the batch."""

    @jax.jit
    def part(s, t, w):
        def loss(s):
            return kljax.forward_kl(s, t, weights=w, reduction="mean", normalizer=FLAT_W.sum())

        return jax.value_and_grad(loss)(s)

    parts = [part(*one) for one in zip(SHARDED_S, SHARDED_T, SHARDED_W, strict=True)]
    each = oracle.divergence("forward_kl", FLAT_S, FLAT_T)
    assert_close(sum(value for value, _ in parts), oracle.reduce(each, FLAT_W, "mean"))
    grad = oracle.gradient("forward_kl", FLAT_S, FLAT_T, weights=FLAT_W) / FLAT_W.sum()
    assert_close(np.concatenate([g for _, g in parts]), grad)


# --- gradient to weights ---


def weights_gradient(values, weights, reduction):
    """Return by hand the derivative of a reduction to each of its weights."""
    values, weights = np.float64(values), np.float64(weights)
    if reduction == "mean":
        return (values - oracle.reduce(values, weights, "mean")) / weights.sum()
    return values / (len(values) if reduction == "batchmean" else 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_to_weights(reduction):
    """It is that of the formula in both modes, also at a weight of exactly 0."""

    def reduced(weights):
        return kljax.reduce(LOSSES, weights=weights, reduction=reduction)

    def divergence(weights):
        return kljax.forward_kl(S, T, weights=weights, reduction=reduction)

    @jax.jit
    def jacobians(weights):
        return [[mode(f)(weights) for mode in (jax.jacrev, jax.jacfwd)] for f in both]

    both = (reduced, divergence)
    each = (LOSSES, oracle.divergence("forward_kl", S, T))
    for values, got in zip(each, jacobians(W), strict=True):
        want = weights_gradient(values, W, reduction)
        want = np.diag(want) if reduction == "none" else want
        assert_close(got[0], want)
        assert_close(got[1], want)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_to_weights_with_a_bad_removed_example(reduction):
    """A removed NaN example spoils the gradient to no weight, and leaves the others exact."""
    s = S.copy()
    s[1] = np.nan

    def loss(weights):
        return kljax.forward_kl(s, T, weights=weights, reduction=reduction)

    got = np.asarray(jax.jit(jax.grad(loss))(W))
    want = weights_gradient(oracle.divergence("forward_kl", S, T), W, reduction)
    assert_close(got[[0, 2]], want[[0, 2]])
    assert np.isfinite(got).all()


def test_gradient_to_weights_has_their_dtype():
    """bfloat16 weights get a bfloat16 gradient."""
    got = jax.grad(lambda w: kljax.reduce(LOSSES, weights=w, reduction="mean"))(
        jnp.asarray(W, jnp.bfloat16)
    )
    assert got.dtype == jnp.bfloat16
    assert_close(got, weights_gradient(LOSSES, W, "mean"), jnp.bfloat16)


# --- dtypes ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_values_give_float32(dtype):
    """Up to 32 bits the result is float32, accumulated in it, with gradients in the own dtype."""
    # 256 + 1 + 1 is 256 in bfloat16.
    values = jnp.array([256, 1, 1], dtype)
    for reduction in ("none", "sum"):
        got = kljax.reduce(values, reduction=reduction)
        assert got.dtype == jnp.float32
        assert_close(got, oracle.reduce([256, 1, 1], None, reduction))
    value_and_grad = jax.jit(jax.value_and_grad(partial(kljax.forward_kl, reduction="mean")))
    value, grad = value_and_grad(jnp.asarray(S, dtype), jnp.asarray(T, dtype))
    assert value.dtype == jnp.float32
    assert grad.dtype == dtype


def test_float64_stays_float64(x64):
    """float64 values reduce in float64, whatever the weights are."""
    losses = np.float64([1.5, -0.25, 4.0]) / 3
    for weights in (W, W > 0, W.astype(np.float64) / 7):
        for reduction in ("none", "mean"):
            got = kljax.reduce(losses, weights=weights, reduction=reduction)
            assert got.dtype == jnp.float64
            assert_close(got, oracle.reduce(losses, weights, reduction), np.float64)
    got = kljax.reduce(losses, reduction="mean", normalizer=np.float32(3))
    assert_close(got, losses.sum() / 3, np.float64)


def test_float32_stays_float32_under_x64(x64):
    """That float64 is allowed changes nothing for those who do not use it."""
    for reduction in ("none", "mean"):
        got = kljax.reduce(LOSSES, weights=np.float64(W), reduction=reduction)
        assert got.dtype == jnp.float32
        got = kljax.forward_kl(S, T, weights=np.float64(W), reduction=reduction)
        assert got.dtype == jnp.float32


# --- options that do not fit ---


def test_options_that_do_not_fit_raise():
    """Weights of another shape, a stray normalizer or axis_name, and unknown names raise."""
    with pytest.raises(ValueError, match=r"reduce: weights .*\(3,\).*\(3, 1\)"):
        kljax.reduce(LOSSES, weights=W[:, None])
    with pytest.raises(ValueError, match=r"weights .*\(3,\)"):
        kljax.forward_kl(S, T, weights=1.0)
    with pytest.raises(ValueError, match="normalizer"):
        kljax.reduce(LOSSES, reduction="sum", normalizer=2.0)
    with pytest.raises(ValueError, match="normalizer"):
        kljax.reduce(LOSSES, reduction="mean", normalizer=W)
    with pytest.raises(ValueError, match="axis_name"):
        jax.vmap(partial(kljax.reduce, axis_name="shards"), axis_name="shards")(S)
    with pytest.raises(ValueError, match="reduction"):
        kljax.reduce(LOSSES, reduction="average")
    with pytest.raises(TypeError, match="values"):
        kljax.reduce(np.arange(3))


# --- mapped axes ---


def want_sharded(reduction):
    """Return value and gradient of the unsharded loss, from the oracle."""
    each = oracle.divergence("forward_kl", FLAT_S, FLAT_T)
    grad = oracle.gradient("forward_kl", FLAT_S, FLAT_T, weights=FLAT_W)
    return oracle.reduce(each, FLAT_W, reduction), grad * total(reduction, FLAT_W)


def local_loss(s, t, w, reduction, axis_name="shards"):
    """Return the loss that every shard computes of its own examples."""
    return kljax.forward_kl(s, t, weights=w, reduction=reduction, axis_name=axis_name)


def eight_devices():
    """Return the mesh of all virtual CPU devices."""
    return Mesh(np.array(jax.devices()[:DEVICES]), ("shards",), axis_types=(AxisType.Auto,))


def over_shards(check_vma, out_specs=REPLICATED):
    """Return shard_map over 8 devices, all arguments split along the first axis."""
    return partial(
        jax.shard_map,
        mesh=eight_devices(),
        in_specs=SPLIT,
        out_specs=out_specs,
        check_vma=check_vma,
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
def test_vmap_axis_is_summed_before_dividing(reduction):
    """Under vmap each shard gets the loss of all examples; grad outside is the unsharded one."""
    mapped = jax.vmap(partial(local_loss, reduction=reduction), axis_name="shards")
    value, grad = want_sharded(reduction)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def mean_and_all(s):
        losses = mapped(s, SHARDED_T, SHARDED_W)  # the same one 8 times
        return jnp.mean(losses), losses

    (_, losses), got = mean_and_all(SHARDED_S)
    assert_close(losses, np.full(8, value))
    assert_close(got, grad.reshape(8, 2, 3))


@pytest.mark.parametrize("reduction", TO_ONE)
def test_reduce_over_two_vmap_axes(reduction):
    """Two named axes are summed over together."""
    values = _RNG.normal(size=(2, 4, 3)).astype(np.float32)
    weights = _RNG.uniform(size=(2, 4, 3)).astype(np.float32)
    weights[0] = 0

    def local(values, weights):
        return kljax.reduce(values, weights=weights, reduction=reduction, axis_name=("a", "b"))

    mapped = jax.jit(jax.vmap(jax.vmap(local, axis_name="b"), axis_name="a"))
    got = mapped(values, weights)
    want = oracle.reduce(values.reshape(24), weights.reshape(24), reduction)
    assert_close(got, np.full((2, 4), want))


def test_unweighted_examples_are_counted_over_the_axis():
    """Without weights, and with weights of one value for all shards, every shard's count adds."""
    each = oracle.divergence("forward_kl", FLAT_S, FLAT_T)
    for weights in (None, np.ones(2, np.float32)):
        for reduction in ["mean", "batchmean"][: 2 if weights is None else 1]:
            local = partial(local_loss, w=weights, reduction=reduction)
            mapped = jax.jit(jax.vmap(local, axis_name="shards"))
            want = oracle.reduce(each, None, reduction)
            assert_close(mapped(SHARDED_S, SHARDED_T), np.full(8, want))


def test_normalizer_is_not_summed_over_the_axis():
    """It is already global."""

    def local(values):
        return kljax.reduce(values, reduction="mean", normalizer=5.0, axis_name="shards")

    got = jax.jit(jax.vmap(local, axis_name="shards"))(SHARDED_W)
    assert_close(got, np.full(8, FLAT_W.sum() / 5))


@pytest.mark.parametrize(
    ("reduction", "check_vma"),
    [("mean", True), ("mean", False), ("batchmean", True)],
)
def test_shard_map_equals_unsharded(reduction, check_vma):
    """On 8 devices of uneven weights, value and grad outside the map are the unsharded ones."""
    mapped = over_shards(check_vma)(partial(local_loss, reduction=reduction))
    value, grad = want_sharded(reduction)
    got = jax.jit(jax.value_and_grad(mapped))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got[0], value)
    assert_close(got[1], grad)


def test_shard_map_gradient_to_weights():
    """The gradient to weights crosses shards through the denominator."""
    mapped = over_shards(True)(partial(local_loss, reduction="mean"))
    got = jax.jit(jax.grad(mapped, 2))(FLAT_S, FLAT_T, FLAT_W)
    each = oracle.divergence("forward_kl", FLAT_S, FLAT_T)
    assert_close(got, weights_gradient(each, FLAT_W, "mean"))


def test_shard_map_without_any_weight_gives_zero():
    """When no shard has a weight the loss is 0 on all, and so is the gradient."""
    mapped = over_shards(True)(partial(local_loss, reduction="mean"))
    value, grad = jax.jit(jax.value_and_grad(mapped))(FLAT_S, FLAT_T, np.zeros_like(FLAT_W))
    exact_zero(value)
    exact_zero(grad)


# --- grad inside the map ---
# One parameter for all shards: a temperature-like scale of the logits. Its true gradient sums
# over all examples; a shard sees its own.

SCALE = np.float32(1.5)


def scaled_loss(scale, s, t, w):
    """Return the loss of a shard whose logits share one parameter."""
    return local_loss(scale * s, t, w, "mean")


def want_scale_gradient():
    """Return the gradient of the unsharded loss to the shared parameter, from the oracle."""

    def loss(scale):
        return oracle.reduce(oracle.divergence("forward_kl", scale * FLAT_S, FLAT_T), FLAT_W, "sum")

    step = 1e-4
    rise = loss(np.float64(SCALE) + step) - loss(np.float64(SCALE) - step)
    return rise / (2 * step) / FLAT_W.sum(dtype=np.float64)


def test_grad_inside_checked_shard_map_to_own_logits():
    """With check_vma=True each shard's grad to its logits is its part of the unsharded one."""
    inside = jax.grad(partial(local_loss, reduction="mean"))
    got = jax.jit(over_shards(True, SPLIT)(inside))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got, want_sharded("mean")[1])


def test_grad_inside_checked_shard_map_to_a_shared_parameter():
    """With check_vma=True the grad to a replicated parameter is already summed over the shards."""

    def inside(s, t, w):
        return jax.grad(scaled_loss)(SCALE, s, t, w)

    got = jax.jit(over_shards(True)(inside))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got, want_scale_gradient())


def test_grad_inside_checked_shard_map_to_a_local_copy_of_a_parameter():
    """With check_vma=True a shard's own copy gets the shard's part; psum makes it whole."""

    def inside(s, t, w):
        own = lax.pcast(SCALE, "shards", to="varying")
        return lax.psum(jax.grad(scaled_loss)(own, s, t, w), "shards")

    got = jax.jit(over_shards(True)(inside))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got, want_scale_gradient())


def unchecked_maps():
    """Return the two maps inside which JAX's transposed psum multiplies by the axis size."""

    def under_vmap(f):
        def whole(s, t, w):
            split = (x.reshape(DEVICES, 2, *x.shape[1:]) for x in (s, t, w))
            return jax.vmap(f, axis_name="shards")(*split)

        return whole

    def under_shard_map(f):
        return over_shards(False, SPLIT)(lambda *shard: f(*shard)[None])

    return {"vmap": under_vmap, "check_vma=False": under_shard_map}


@pytest.mark.parametrize("name", ["vmap", "check_vma=False"])
def test_grad_inside_an_unchecked_map_is_too_large_and_pmean_mends_it(name):
    """There, a shared parameter's grads sum to axis size × the true one; their pmean is the true.

    As `reduce` documents. A JAX that transposes psum otherwise would fail this.
    """
    unchecked = unchecked_maps()[name]

    def inside(s, t, w):
        local = jax.grad(scaled_loss)(SCALE, s, t, w)
        return jnp.stack([lax.psum(local, "shards"), lax.pmean(local, "shards")])

    got = jax.jit(unchecked(inside))(FLAT_S, FLAT_T, FLAT_W)
    want = want_scale_gradient()
    assert_close(got, np.broadcast_to([DEVICES * want, want], (DEVICES, 2)))


@pytest.mark.parametrize("name", ["vmap", "check_vma=False"])
def test_grad_inside_an_unchecked_map_to_own_logits_is_too_large(name):
    """There, a shard's grad to what it alone holds is axis size × the true: divide, not pmean."""
    unchecked = unchecked_maps()[name]

    def inside(s, t, w):
        return jax.grad(partial(local_loss, reduction="mean"))(s, t, w)

    got = jax.jit(unchecked(inside))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got.reshape(16, 3), DEVICES * want_sharded("mean")[1])


@pytest.mark.parametrize("name", ["vmap", "check_vma=False"])
def test_grad_inside_an_unchecked_map_without_axis_name(name):
    """There, the local sum over a global normalizer needs no psum inside: psum of grads is true."""
    unchecked = unchecked_maps()[name]

    def inside(s, t, w):
        def loss(scale):
            n = lax.psum(jnp.sum(w), "shards")
            return kljax.forward_kl(scale * s, t, weights=w, reduction="mean", normalizer=n)

        return lax.psum(jax.grad(loss)(SCALE), "shards")

    got = jax.jit(unchecked(inside))(FLAT_S, FLAT_T, FLAT_W)
    assert_close(got, np.full(DEVICES, want_scale_gradient()))


# --- a batch sharded by jit ---


def test_a_batch_sharded_under_jit_equals_unsharded():
    """Sharded inputs give the unsharded value and gradient, and no device gathers the batch."""
    mesh = eight_devices()
    split = NamedSharding(mesh, SPLIT)
    s, t, w = jax.device_put((FLAT_S, FLAT_T, FLAT_W), split)
    step = jax.jit(
        jax.value_and_grad(partial(kljax.forward_kl, reduction="mean")),
        out_shardings=(NamedSharding(mesh, REPLICATED), split),
    )
    compiled = step.lower(s, t, weights=w).compile()
    value, grad = compiled(s, t, weights=w)
    want_value, want_grad = want_sharded("mean")
    assert_close(value, want_value)
    assert_close(grad, want_grad)
    assert "all-gather" not in compiled.as_text()


def test_an_eager_call_on_a_sharded_batch_equals_unsharded():
    """Outside jit too, a sharded batch gives every example its value, on its own device."""
    mesh = eight_devices()
    split = NamedSharding(mesh, SPLIT)
    got = kljax.forward_kl(*jax.device_put((FLAT_S, FLAT_T), split))
    assert_close(got, oracle.divergence("forward_kl", FLAT_S, FLAT_T))
    assert got.sharding.is_equivalent_to(split, 1)
