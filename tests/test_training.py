"""Training pieces: against the one big batch, the dense matrix, and what optax does by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec as P

import kljax
from kljax import families, training


@pytest.fixture(autouse=True)
def lenient():
    """Optax's own arithmetic mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def model(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def parameters(rng, dtype=np.float32):
    shapes = {"a": (5, 4), "b": (4, 3)}
    return {k: jnp.asarray(rng.normal(size=s) * 0.5, dtype) for k, s in shapes.items()}


# ---- Distillation ----


def test_distillation_at_a_step_is_the_loss_with_its_numbers(rng):
    student, teacher = (np.float32(rng.normal(size=(4, 5))) for _ in range(2))
    labels, weights = np.array([0, 1, 2, 4]), np.float32([1, 0, 2, 1])
    numbers = {"soft_weight": 0.5, "label_smoothing": 0.1}
    distill = training.Distillation(
        kljax.reverse_kl,
        temperature=optax.linear_schedule(4.0, 1.0, 100),
        hard_weight=optax.constant_schedule(0.3),
        **numbers,
    )
    for step, temperature in ((0, 4.0), (50, 2.5), (1000, 1.0)):
        got = distill(student, teacher, labels, step=step, weights=weights)
        want = kljax.distillation_loss(
            student,
            teacher,
            labels,
            divergence=kljax.reverse_kl,
            temperature=temperature,
            hard_weight=0.3,
            weights=weights,
            **numbers,
        )
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(one, other)
    plain = training.Distillation(temperature=2.0)
    assert_close(
        plain(student, teacher)[0], kljax.distillation_loss(student, teacher, temperature=2.0)[0]
    )
    assert plain == training.Distillation(temperature=2.0)


def test_schedules_do_not_trace_again(rng):
    student, teacher = (np.float32(rng.normal(size=(4, 5))) for _ in range(2))
    distill = training.Distillation(temperature=optax.linear_schedule(4.0, 1.0, 100))
    step = jax.jit(lambda s, k: distill(s, teacher, step=k)[0])
    want = step(student, jnp.int32(0))
    with jax.no_tracing():
        later = step(student, jnp.int32(50))
    assert later != want


def test_a_schedule_without_a_step():
    distill = training.Distillation(hard_weight=lambda step: 0.1 * step)
    with pytest.raises(ValueError, match="step must be given where hard_weight is a schedule"):
        distill(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.array([0]))


# ---- accumulation ----


def batch_of(rng, size=12):
    weights = rng.uniform(size=size) * (rng.uniform(size=size) > 0.3)
    return {
        "x": jnp.asarray(rng.normal(size=(size, 5)), jnp.float32),
        "teacher": jnp.asarray(rng.normal(size=(size, 3)), jnp.float32),
        "labels": jnp.asarray(rng.integers(3, size=size)),
        "weights": jnp.asarray(weights, jnp.float32),
        "label_weights": jnp.asarray(rng.uniform(size=size) > 0.5),
    }


def two_weights(batch):
    return {"soft": batch["weights"], "hard": batch["label_weights"]}


def loss(params, batch, normalizer=None, axis_name=None):
    normalizer = normalizer or {"soft": None, "hard": None}
    value, metrics = kljax.distillation_loss(
        model(params, batch["x"].astype(params["a"].dtype)),
        batch["teacher"],
        batch["labels"],
        temperature=2.0,
        hard_weight=0.5,
        weights=batch["weights"],
        label_weights=batch["label_weights"],
        normalizer=normalizer["soft"],
        label_normalizer=normalizer["hard"],
        axis_name=axis_name,
    )
    return value, metrics.soft


@pytest.mark.slow(but=["3"])
@pytest.mark.parametrize("steps", [1, 3, 12])
def test_micro_batches_add_up_to_the_whole(rng, steps):
    """Uneven masks, two denominators."""
    params, batch = parameters(rng), batch_of(rng)
    (want, _), slopes = jax.value_and_grad(loss, has_aux=True)(params, batch)
    f = jax.jit(training.accumulated_value_and_grad(loss, steps, weights=two_weights))
    (got, aux), gradients = f(params, batch)
    assert_close(got, want)
    assert aux.shape == (steps,)
    for name in params:
        assert_close(gradients[name], slopes[name])
    # aux is of the examples m, m + steps, …
    first = jax.tree.map(lambda x: x[::steps], batch)
    assert_close(aux[0], loss(params, first)[1])


def test_16_bit_parameters_are_summed_in_float32():
    """In bfloat16 a sum of ones would end at 256."""

    def loss(params, batch, normalizer):
        return jnp.sum(batch * params.astype(jnp.float32)) / normalizer, None

    f = training.accumulated_value_and_grad(loss, 300, weights=lambda batch: jnp.ones(1))
    _, gradient = f(jnp.bfloat16(1.0), jnp.ones(300))
    assert gradient.dtype == jnp.bfloat16
    assert gradient == 300


@pytest.mark.slow(but=["True"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_accumulation_on_a_mesh(rng, check_vma):
    """Each device has its own examples; all get the gradient of the whole, summed once."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params, batch = parameters(rng), batch_of(rng, 24)
    (want, _), slopes = jax.value_and_grad(loss, has_aux=True)(params, batch)
    f = training.accumulated_value_and_grad(loss, 3, weights=two_weights, axis_name="data")
    mapped = jax.jit(
        jax.shard_map(
            lambda params, batch: (lambda found: (found[0][0], found[1]))(f(params, batch)),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    got, gradients = mapped(params, batch)
    assert_close(got, want)
    for name in params:
        assert_close(gradients[name], slopes[name])
    (turns,) = scans(jax.make_jaxpr(mapped)(params, batch).jaxpr)
    assert "psum" not in str(turns)


def scans(jaxpr):
    """The bodies of its loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["jaxpr"]
        else:
            for inner in equation.params.values():
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from scans(inner)


def test_accumulation_under_vmap(rng):
    params, batch = parameters(rng), batch_of(rng, 24)
    (want, _), slopes = jax.value_and_grad(loss, has_aux=True)(params, batch)
    f = training.accumulated_value_and_grad(loss, 3, weights=two_weights, axis_name="n")
    split = jax.tree.map(lambda x: x.reshape(2, 12, *x.shape[1:]), batch)
    (got, _), gradients = jax.vmap(f, in_axes=(None, 0), axis_name="n")(params, split)
    assert_close(got, np.full(2, want))
    assert_close(gradients["a"], np.stack([slopes["a"]] * 2))


def test_an_empty_batch(rng):
    params, batch = parameters(rng), batch_of(rng, 0)
    f = training.accumulated_value_and_grad(loss, 3, weights=two_weights)
    (value, _), gradients = f(params, batch)
    assert value == 0
    np.testing.assert_array_equal(gradients["a"], 0)


def test_batches_that_do_not_divide(rng):
    f = training.accumulated_value_and_grad(loss, 5, weights=two_weights)
    with pytest.raises(ValueError, match="batch must be of a multiple of 5 examples.*got 12"):
        f(parameters(rng), batch_of(rng))
    with pytest.raises(ValueError, match="steps must be a positive int; got 0"):
        training.accumulated_value_and_grad(loss, 0, weights=two_weights)


# ---- optimizers ----


def run(tx, params, steps, state=None, **extra):
    """Some steps down a bowl."""
    state = tx.init(params) if state is None else state
    seen = []
    for _ in range(steps):
        gradients = jax.tree.map(lambda x: 2 * x, params)
        updates, state = jax.jit(tx.update)(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return params, state, seen


@pytest.mark.parametrize("decay", [0.9, optax.linear_schedule(0.0, 0.9, 3)])
def test_the_teacher_is_the_average_of_the_students(rng, decay):
    params = parameters(rng)
    tx = training.ema_teacher(optax.adam(0.1), decay)
    ema = params
    _, state, seen = run(tx, params, 5)
    for step, new in enumerate(seen):
        now = decay(step) if callable(decay) else decay
        ema = optax.incremental_update(new, ema, 1 - now)
    found = optax.tree.get(state, "ema_params")
    for name in params:
        assert_close(found[name], ema[name])
    assert optax.tree.get(tx.init(params), "ema_params")["a"] is not params["a"]


def test_a_teacher_of_16_bit_parameters_moves():
    """In bfloat16 an average of decay 0.999 would stand still."""
    params = {"a": jnp.ones(3, jnp.bfloat16)}
    tx = training.ema_teacher(optax.sgd(0.1), 0.999)
    params, state, seen = run(tx, params, 20)
    want = np.ones(3)
    for new in seen:
        want += 0.001 * (np.float64(new["a"]) - want)
    found = optax.tree.get(state, "ema_params")["a"]
    assert found.dtype == jnp.float32
    assert_close(found, want)
    assert params["a"].dtype == jnp.bfloat16


def test_the_gate_skips_update_and_state(rng):
    params = parameters(rng)
    tx = training.apply_if_kl_below(optax.adam(0.1), 0.02)
    params, state, _ = run(tx, params, 2, kl=0.01)
    for kl in (0.03, np.nan, np.inf):
        updates, after = jax.jit(tx.update)(params, state, params, kl=kl)
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_array_equal(leaf, 0)
        for one, other in zip(
            jax.tree.leaves(after.inner_state), jax.tree.leaves(state.inner_state), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        assert after.rejected == 1
        assert not after.last_applied
    plain, _, _ = run(optax.adam(0.1), params, 1, state.inner_state)
    gated, _, _ = run(tx, params, 1, state, kl=0.02)
    np.testing.assert_array_equal(plain["a"], gated["a"])
    with pytest.raises(ValueError, match=r"kl must be given to update; got None. Call tx.update"):
        tx.update(params, state, params)


def test_the_coefficient_is_led_to_the_target():
    controller = training.adaptive_kl_coefficient(0.1, horizon=10, initial=2.0)
    state = controller.init()
    for kl, n, factor in ((0.1, 1, 1.0), (0.11, 1, 1.01), (5.0, 5, 1.1), (0.0, 10, 0.8)):
        after = jax.jit(controller.update)(state, kl, n)
        assert_close(after.coefficient, state.coefficient * factor)
    assert_close(controller.update(state, 0.11).coefficient, 2.0 * 1.01)
    assert np.isnan(controller.update(state, np.nan).coefficient)


# ---- Fisher ----

OUTPUTS = {
    "logits": lambda params, x: model(params, x),
    "probs": lambda params, x: kljax.Probs(jax.nn.softmax(model(params, x))),
    "head": lambda params, x: kljax.Head(jnp.tanh(x @ params["a"]), params["b"]),
    "normal": lambda params, x: families.Normal(
        model(params, x)[:, 0], log_variance=model(params, x)[:, 1]
    ),
    "bernoulli": lambda params, x: families.Bernoulli(logits=model(params, x)[:, 0]),
}


def dense_fisher(params, x, weights, kind):
    """JᵀFJ of each example, from the Fisher matrices of the outputs in closed form."""
    flat, unravel = ravel_pytree(params)
    jacobian = np.float64(jax.jacobian(lambda f: model(unravel(f), x))(flat))
    z = np.float64(model(params, x))
    total = np.zeros((flat.size, flat.size))
    for n in range(len(x)):
        if kind in ("logits", "probs", "head"):
            p = np.exp(z[n]) / np.exp(z[n]).sum()
            of_outputs = np.diag(p) - np.outer(p, p)
        elif kind == "normal":  # of (loc, log σ²)
            of_outputs = np.diag([np.exp(-z[n, 1]), 0.5, 0])
        else:
            p = 1 / (1 + np.exp(-z[n, 0]))
            of_outputs = np.diag([p * (1 - p), 0, 0])
        total += weights[n] * jacobian[n].T @ of_outputs @ jacobian[n]
    return total / weights.sum()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_fisher_products_against_the_dense_matrix(rng, kind):
    params, x = parameters(rng), jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    weights = np.float32([1, 2, 0, 1, 0.5, 1])
    product = training.fisher_vector_product(
        lambda p: OUTPUTS[kind](p, x), params, damping=0.1, weights=weights
    )
    want = dense_fisher(params, x, weights, kind)
    flat, unravel = ravel_pytree(params)
    for _ in range(3):
        v = np.float32(rng.normal(size=flat.size))
        got, _ = ravel_pytree(jax.jit(product)(unravel(jnp.asarray(v))))
        np.testing.assert_allclose(got, want @ v + 0.1 * v, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_product_is_differentiated_in_the_parameters(rng):
    params, x = parameters(rng), jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    flat, unravel = ravel_pytree(params)
    v, w, step = (jnp.asarray(rng.normal(size=flat.size), jnp.float32) for _ in range(3))

    def along(flat):
        product = training.fisher_vector_product(lambda p: model(p, x), unravel(flat))
        return w @ ravel_pytree(product(unravel(v)))[0]

    forward = jax.jit(lambda: jax.jvp(along, (flat,), (step,))[1])()
    assert_close(jax.jit(jax.grad(along))(flat) @ step, forward)
    f = jax.jit(along)
    np.testing.assert_allclose(
        forward, (f(flat + 1e-2 * step) - f(flat - 1e-2 * step)) / 2e-2, rtol=2e-2
    )


def test_a_product_does_not_run_the_model_again(rng):
    """It is linearised once."""
    params, x = parameters(rng), jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    product = training.fisher_vector_product(lambda p: model(p, x), params)
    assert "tanh" not in str(jax.make_jaxpr(product)(params))


def trust_region(rng, kind):
    x = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    advantage = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    outputs = lambda p: OUTPUTS[kind](p, x)  # noqa: E731

    def objective(p):
        return -jnp.mean(jnp.sum(jax.nn.softmax(model(p, x)) * advantage, -1))

    return parameters(rng), outputs, objective


@pytest.mark.slow(but=["0.01"])
@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.3])
def test_natural_gradient_keeps_its_radius(rng, max_kl):
    """The divergence stays within, and close to it while the steps are small; nothing rises."""
    params, outputs, objective = trust_region(rng, "logits")
    tx, start = training.natural_gradient(max_kl), objective(params)
    state = tx.init(params)
    step = jax.jit(
        lambda p, s: tx.update(jax.grad(objective)(p), s, p, outputs_fn=outputs, value_fn=objective)
    )
    for _ in range(5):
        updates, state = step(params, state)
        new = optax.apply_updates(params, updates)
        moved = kljax.kl(outputs(params), outputs(new), reduction="mean")
        assert moved <= max_kl * (1 + 1e-5)
        assert_close(state.kl, moved)
        assert objective(new) <= objective(params)
        if max_kl < 1e-3:
            assert moved > 0.8 * max_kl
        params = new
    assert objective(params) < start


@pytest.mark.slow
def test_natural_gradient_where_no_step_helps(rng):
    """An objective that only rises, or is NaN: an update of 0."""
    params, outputs, objective = trust_region(rng, "logits")
    gradient = jax.grad(objective)(params)
    tx = training.natural_gradient(0.01)
    start = objective(params)

    @partial(jax.jit, static_argnums=0)
    def step(value_fn, gradient):
        state = tx.init(params)
        return tx.update(gradient, state, params, outputs_fn=outputs, value_fn=value_fn)

    worse = lambda p: jnp.where(objective(p) == start, 0.0, 1.0)  # noqa: E731
    lost = lambda p: jnp.where(objective(p) == start, 0.0, jnp.nan)  # noqa: E731
    for value_fn in (worse, lost):
        updates, state = step(value_fn, gradient)
        assert state.share == 0
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_array_equal(leaf, 0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = step(objective, nothing)
    np.testing.assert_array_equal(updates["a"], 0)
    with pytest.raises(ValueError, match="outputs_fn must be given to update"):
        tx.update(gradient, tx.init(params), params)


def test_natural_gradient_is_the_solution_of_the_damped_system(rng):
    params, outputs, objective = trust_region(rng, "logits")
    gradient = jax.grad(objective)(params)
    tx = training.natural_gradient(1e-5, damping=0.1, cg_iterations=50)
    updates, state = tx.update(
        gradient, tx.init(params), params, outputs_fn=outputs, value_fn=objective
    )
    product = training.fisher_vector_product(outputs, params, damping=0.1)
    back, _ = ravel_pytree(product(updates))
    flat, _ = ravel_pytree(gradient)
    cosine = -jnp.vdot(back, flat) / jnp.linalg.norm(back) / jnp.linalg.norm(flat)
    assert cosine > 0.9999
    assert state.share > 0.97


# ---- together with the rest of optax, and with Flax ----


def wrapped(rng):
    gated = training.apply_if_kl_below(optax.adam(0.1), 0.1)
    return {
        "chain": optax.chain(optax.clip_by_global_norm(1.0), training.ema_teacher(gated, 0.9)),
        "MultiSteps": optax.MultiSteps(
            training.ema_teacher(optax.adam(0.1), 0.9), every_k_schedule=2
        ),
        "apply_if_finite": optax.apply_if_finite(training.ema_teacher(optax.adam(0.1), 0.9), 3),
        "inject_hyperparams": optax.inject_hyperparams(
            lambda decay: training.ema_teacher(optax.adam(0.1), decay)
        )(decay=optax.linear_schedule(0.0, 0.9, 10)),
        "linesearch": training.ema_teacher(
            optax.chain(
                optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5)
            ),
            0.9,
        ),
    }


@pytest.mark.parametrize(
    "name", ["chain", "MultiSteps", "apply_if_finite", "inject_hyperparams", "linesearch"]
)
def test_composed_and_resumed(rng, name):
    """Whatever of optax is around it; and the state read back goes on bit for bit."""
    tx, params = wrapped(rng)[name], parameters(rng)
    bowl = lambda p: optax.tree.norm(p, squared=True)  # noqa: E731

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(bowl)(params)
        extra = {"kl": 0.01} if name == "chain" else {}
        if name == "linesearch":
            extra = {"value": value, "grad": gradients, "value_fn": bowl}
        updates, state = tx.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    leaves, tree = jax.tree.flatten((params, state))
    again = jax.tree.unflatten(tree, [jnp.asarray(np.array(x)) for x in leaves])
    for _ in range(3):
        params, state = step(params, state)
        again = step(*again)
    for one, other in zip(jax.tree.leaves((params, state)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert bowl(params) < bowl(parameters(np.random.default_rng(20240229)))
    assert optax.tree.get(state, "ema_params")["a"].shape == (5, 4)


def test_resumed_from_an_orbax_checkpoint(rng, tmp_path):
    """States of optax are what it saves."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx, params = wrapped(rng)["chain"], parameters(rng)
    params, state, _ = run(tx, params, 3, kl=0.01)
    controller = training.adaptive_kl_coefficient(0.1, horizon=10)
    coefficient = controller.update(controller.init(), 0.3)
    with checkpoint.StandardCheckpointer() as saved:
        saved.save(tmp_path / "state", (params, state, coefficient))
        saved.wait_until_finished()
        like = (parameters(rng), tx.init(params), controller.init())
        again = saved.restore(tmp_path / "state", like)
    want, _, _ = run(tx, params, 2, state, kl=0.01)
    got, _, _ = run(tx, again[0], 2, again[1], kl=0.01)
    np.testing.assert_array_equal(got["a"], want["a"])
    assert controller.update(again[2], 0.1) == controller.update(coefficient, 0.1)


def test_with_flax(rng):
    """Linen's TrainState by its parts, and NNX's Optimizer, which passes `kl` on."""
    nnx = pytest.importorskip("flax.nnx")
    from flax.training.train_state import TrainState

    tx = training.apply_if_kl_below(optax.sgd(0.1), 0.02)
    params = parameters(rng)
    state = TrainState.create(apply_fn=model, params=params, tx=tx)
    for kl, want in ((0.1, 1.0), (0.01, 0.9)):  # apply_gradients has no room for it
        updates, opt_state = state.tx.update(params, state.opt_state, state.params, kl=kl)
        new = optax.apply_updates(state.params, updates)
        state = state.replace(step=state.step + 1, params=new, opt_state=opt_state)
        assert_close(state.params["a"], want * params["a"])

    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    before = layer.kernel[...]
    optimizer = nnx.Optimizer(layer, tx, wrt=nnx.Param)
    gradients = nnx.grad(lambda layer: jnp.sum(layer(jnp.ones((1, 2))) ** 2))(layer)
    optimizer.update(layer, gradients, kl=0.1)
    np.testing.assert_array_equal(layer.kernel[...], before)
    optimizer.update(layer, gradients, kl=0.01)
    assert (layer.kernel[...] != before).any()


@pytest.mark.slow
def test_with_equinox(rng):
    """Its models are pytrees of arrays and functions; the arrays are the parameters."""
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.Linear(5, 3, key=jax.random.key(0))
    params, static = eqx.partition(layer, eqx.is_inexact_array)
    x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    outputs = lambda params: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731
    objective = lambda params: -jnp.mean(jax.nn.softmax(outputs(params))[:, 0])  # noqa: E731
    tx = training.natural_gradient(0.01)
    updates, state = eqx.filter_jit(tx.update)(
        jax.grad(objective)(params),
        tx.init(params),
        params,
        outputs_fn=outputs,
        value_fn=objective,
    )
    new = optax.apply_updates(params, updates)
    assert objective(new) < objective(params)
    assert 0.005 < kljax.kl(outputs(params), outputs(new), reduction="mean") <= 0.01


def test_distillation_in_a_jitted_step_with_everything(rng):
    """Schedule, accumulation, teacher by moving average, gate: one step, traced once."""
    params, batch = parameters(rng), batch_of(rng)
    distill = training.Distillation(temperature=optax.linear_schedule(3.0, 1.0, 10))
    tx = training.apply_if_kl_below(training.ema_teacher(optax.adam(1e-2), 0.99), 10.0)

    @jax.jit
    def step(params, state, batch, k):
        teacher = jax.lax.stop_gradient(optax.tree.get(state, "ema_params"))

        def loss(params, batch, normalizer):
            return distill(
                model(params, batch["x"]),
                model(teacher, batch["x"] + 0.1),
                step=k,
                weights=batch["weights"],
                normalizer=normalizer,
            )

        f = training.accumulated_value_and_grad(loss, 3, weights=lambda b: b["weights"])
        (value, metrics), gradients = f(params, batch)
        kl = jnp.mean(metrics.divergence)
        updates, state = tx.update(gradients, state, params, kl=kl)
        return optax.apply_updates(params, updates), state, value

    state = tx.init(params)
    params, state, first = step(params, state, batch, jnp.int32(0))
    with jax.no_tracing():
        for k in range(1, 4):
            params, state, value = step(params, state, batch, jnp.int32(k))
    assert np.isfinite(value)
    assert value < first
