r"""Policies that balance a pole on a cart, and how far each update moves them.

Reinforcement learning improves a policy on episodes that the policy itself has played, and what
they say of another policy fades with its divergence from the one that played. Three ways to deal
with that, on the same task, network, critic and batches of fresh episodes:

    natural gradient   each step as far as a fixed KL radius allows (TRPO):
                       `kljax.training.natural_gradient`
    PPO, KL penalty    Adam on the clipped objective and `kljax.sampled_kl_loss`, whose coefficient
                       `kljax.training.adaptive_kl_coefficient` leads to a target
    policy gradient    one step of Adam on the plain policy gradient; no KL, a control
    …, reused          as many such steps on a batch as PPO makes; no KL, the other control

The cart-pole is that of Barto, Sutton and Anderson (1983), written in JAX: a reward of 1 for each
of at most 500 steps until the pole leans more than 12 degrees or the cart has left the track.
Episodes end at different times: what comes after is masked by ``weights``.

    python examples/policy_kl.py             # about two minutes on two CPU cores
    python examples/policy_kl.py --quick     # a smoke run
    python examples/policy_kl.py --max-kl 0.03 --clip inf

Needs jax, optax, matplotlib and tqdm. Writes results.md, results.json and two figures into the
folder named by --output.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

import kljax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

Args = argparse.Namespace
Params = list[tuple[Array, Array]]
GRAVITY, CART, POLE, HALF_LENGTH, FORCE, TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02  # SI units
TRACK, LEAN = 2.4, float(np.deg2rad(12))
STEPS = 500
DISCOUNT, TRACE = 0.99, 0.95  # Schulman et al., generalised advantage estimation (2016)
SOLVED = 475  # of 500 steps
COLORS = {  # of the Okabe-Ito palette
    "natural gradient": "#0072B2",
    "PPO, KL penalty": "#E69F00",
    "policy gradient": "#555555",
    "policy gradient, reused": "#CC79A7",
}
QUICK = {"updates": 6, "seeds": 2, "episodes": 4, "final": 3}


def perceptron(sizes: Sequence[int], last: float, key: Array) -> Params:
    """Weights and biases; those of the last layer are scaled by `last`."""
    scales = [1.0] * (len(sizes) - 2) + [last]
    keys = jax.random.split(key, len(scales))
    init = jax.nn.initializers.lecun_normal()
    return [
        (scale * init(key, (inputs, outputs)), jnp.zeros(outputs))
        for key, scale, inputs, outputs in zip(keys, scales, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params: Params, x: Array) -> Array:
    *hidden, (kernel, bias) = params
    for inner, shift in hidden:
        x = jnp.tanh(x @ inner + shift)
    return x @ kernel + bias


def advance(state: Array, action: Array) -> Array:
    """The cart-pole's equations of motion, one Euler step: equations 1 and 2 of the paper.

    Without friction, and the force as it acts on cart and pole together.
    """
    x, velocity, angle, spin = jnp.moveaxis(state, -1, 0)
    sine, cosine, mass = jnp.sin(angle), jnp.cos(angle), CART + POLE
    force = jnp.where(action == 1, FORCE, -FORCE)
    push = (force + POLE * HALF_LENGTH * spin**2 * sine) / mass
    inertia = HALF_LENGTH * (4 / 3 - POLE * cosine**2 / mass)
    spun = (GRAVITY * sine - cosine * push) / inertia
    moved = push - POLE * HALF_LENGTH * spun * cosine / mass
    rates = jnp.stack([velocity, moved, spin, spun], axis=-1)
    return state + TAU * rates


def fell(state: Array) -> Array:
    return (jnp.abs(state[..., 0]) > TRACK) | (jnp.abs(state[..., 2]) > LEAN)


class Batch(NamedTuple):
    """What a policy did: [time, episodes]. Nothing counts where `alive` is 0."""

    states: Array
    actions: Array
    alive: Array
    logits: Array  # of the policy that acted
    advantages: Array
    returns: Array


def play(policy: Params, critic: Params, key: Array, episodes: int) -> Batch:
    start_key, key = jax.random.split(key)
    start = jax.random.uniform(start_key, (episodes, 4), minval=-0.05, maxval=0.05)

    def step(now: tuple[Array, Array], key: Array) -> tuple[Any, Any]:
        state, alive = now
        logits = apply(policy, state)
        action = jax.random.categorical(key, logits)
        after = jnp.where(alive[:, None], advance(state, action), state)
        return (after, alive & ~fell(after)), (state, action, alive, logits)

    begun = start, jnp.ones(episodes, bool)
    (last, still), (states, actions, alive, logits) = jax.lax.scan(
        step, begun, jax.random.split(key, STEPS)
    )
    values = value(critic, jnp.concatenate([states, last[None]]))
    continues = jnp.concatenate([alive[1:], still[None]])  # where time is up, its value goes on
    errors = 1 + DISCOUNT * continues * values[1:] - values[:-1]

    def backwards(later: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        error, continues = now
        advantage = error + DISCOUNT * TRACE * continues * later
        return advantage, advantage

    none = jnp.zeros(episodes)
    _, advantages = jax.lax.scan(backwards, none, (errors, continues), reverse=True)
    returns = advantages + values[:-1]
    return Batch(states, actions, alive, logits, standardized(advantages, alive), returns)


def mean(values: Array, batch: Batch) -> Array:
    return kljax.reduce(values, weights=batch.alive, reduction="mean")


def standardized(x: Array, alive: Array) -> Array:
    average = functools.partial(kljax.reduce, weights=alive, reduction="mean")
    centered = x - average(x)
    return centered / jnp.sqrt(average(centered**2) + 1e-8)


def value(critic: Params, states: Array) -> Array:
    """In units of the longest discounted return, so that the network's outputs are around 1."""
    return apply(critic, states)[..., 0] / (1 - DISCOUNT)


def log_prob(logits: Array, actions: Array) -> Array:
    """Of the actions taken."""
    return -kljax.cross_entropy(logits, actions)


def surrogate(policy: Params, batch: Batch, clip: float = np.inf) -> Array:
    """The advantage of a new policy over the one that played, from what that one did; negated."""
    new, old = (log_prob(x, batch.actions) for x in (apply(policy, batch.states), batch.logits))
    ratio = jnp.exp(new - old)
    gain = jnp.minimum(
        ratio * batch.advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * batch.advantages
    )
    return -mean(gain, batch)


def penalized(policy: Params, batch: Batch, coefficient: Array, clip: float) -> Array:
    """PPO's clipped objective, and the divergence from the policy that played, of its actions."""
    new, old = (log_prob(x, batch.actions) for x in (apply(policy, batch.states), batch.logits))
    divergence = kljax.sampled_kl_loss(
        new, old, log_behavior=old, weights=batch.alive, reduction="mean"
    )
    return surrogate(policy, batch, clip) + coefficient * divergence


def plain(policy: Params, batch: Batch, coefficient: Array) -> Array:
    return -mean(log_prob(apply(policy, batch.states), batch.actions) * batch.advantages, batch)


class Log(NamedTuple):
    """Of one update."""

    length: Array  # of the mean episode
    kl: Array  # D(old‖new), the mean over the states that were visited
    coefficient: Array


def descend(
    loss: Callable[..., Array],
    tx: optax.GradientTransformation,
    params: Params,
    state: Any,
    steps: int,
) -> tuple[Params, Any]:
    """Some steps on one batch."""

    def step(now: tuple[Params, Any], _: None) -> Any:
        params, state = now
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=steps)[0]


class Method(NamedTuple):
    """How a policy is improved: ``improve(policy, its optimizer's state, batch, coefficient)``."""

    tx: optax.GradientTransformation
    improve: Callable[[Params, Any, Batch, Array], tuple[Params, Any]]


def make_methods(args: Args) -> dict[str, Method]:
    trust_region = kljax.training.natural_gradient(args.max_kl)
    adam = optax.adam(args.learning_rate)

    def natural(policy: Params, state: Any, batch: Batch, coefficient: Array) -> Any:
        updates, state = trust_region.update(
            jax.grad(surrogate)(policy, batch),
            state,
            policy,
            outputs_fn=lambda policy: apply(policy, batch.states),
            value_fn=lambda policy: surrogate(policy, batch),
            weights=batch.alive,
        )
        return optax.apply_updates(policy, updates), state

    def first_order(loss: Callable[..., Array], steps: int) -> Method:
        def improve(policy: Params, state: Any, batch: Batch, coefficient: Array) -> Any:
            objective = functools.partial(loss, batch=batch, coefficient=coefficient)
            return descend(objective, adam, policy, state, steps)

        return Method(adam, improve)

    return {
        "natural gradient": Method(trust_region, natural),
        "PPO, KL penalty": first_order(functools.partial(penalized, clip=args.clip), args.steps),
        "policy gradient": first_order(plain, 1),
        "policy gradient, reused": first_order(plain, args.steps),
    }


class Task(NamedTuple):
    """What all methods share, each function compiled once; every array has the seeds first."""

    keys: Array
    policy: Params
    critic: Params
    critic_state: Any
    play: Callable[[Params, Params, Array], Batch]
    fit: Callable[[Params, Any, Batch], tuple[Params, Any]]


def make_task(args: Args) -> Task:
    tx = optax.adam(args.critic_learning_rate)
    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.seeds))

    @jax.jit
    @jax.vmap
    def begin(key: Array) -> tuple[Params, Params, Any]:
        policy_key, critic_key = jax.random.split(key)
        policy = perceptron((4, args.width, args.width, 2), 0.01, policy_key)
        critic = perceptron((4, args.width, args.width, 1), 1.0, critic_key)
        return policy, critic, tx.init(critic)

    def fit(critic: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        def loss(critic: Params) -> Array:
            errors = (value(critic, batch.states) - batch.returns) * (1 - DISCOUNT)
            return mean(errors**2, batch)

        return descend(loss, tx, critic, state, args.steps)

    policy, critic, state = begin(keys)
    play_all = jax.jit(jax.vmap(functools.partial(play, episodes=args.episodes)))
    return Task(keys, policy, critic, state, play_all, jax.jit(jax.vmap(fit)))


def train(method: Method, task: Task, args: Args, progress: tqdm) -> Log:
    """All seeds at once; returns arrays [updates, seeds]."""

    @jax.jit
    @jax.vmap
    def improve(policy: Params, state: Any, batch: Batch, coefficient: Array) -> Any:
        policy, state = method.improve(policy, state, batch, coefficient)
        new = apply(policy, batch.states)
        kl = kljax.kl(batch.logits, new, weights=batch.alive, reduction="mean")
        return policy, state, Log(batch.alive.sum(axis=0).mean(), kl, coefficient)

    controller = kljax.training.adaptive_kl_coefficient(
        args.max_kl, horizon=1, initial=jnp.ones(args.seeds)
    )
    keys, policy, critic, critic_state = task[:4]
    policy_state, kl_state, course = jax.vmap(method.tx.init)(policy), controller.init(), []
    for number in range(args.updates):
        batch = task.play(policy, critic, jax.vmap(jax.random.fold_in, (0, None))(keys, number))
        policy, policy_state, log = improve(policy, policy_state, batch, kl_state.coefficient)
        critic, critic_state = task.fit(critic, critic_state, batch)
        kl_state = controller.update(kl_state, log.kl)
        course.append(jax.tree.map(np.asarray, log))
        progress.set_postfix_str(f"{course[-1].length.mean():.0f} steps upright")
        progress.update()
    return jax.tree.map(lambda *each: np.stack(each), *course)


def report(logs: dict[str, Log], args: Args) -> str:
    """The results as Markdown; ± is the standard error over seeds, if there are several."""
    lines = [
        f"| method                  | episode length | updates to {SOLVED} | mean KL | greatest |",
        "|-------------------------|---------------:|---------------:|--------:|---------:|",
    ]
    for name, log in logs.items():
        final = np.asarray(log.length)[-args.final :].mean(axis=0)
        error = f" ± {final.std(ddof=1) / len(final) ** 0.5:.1f}" if len(final) > 1 else ""
        average = np.asarray(log.length).mean(axis=1)
        solved = str(np.argmax(average >= SOLVED) + 1) if (average >= SOLVED).any() else "never"
        length = f"{final.mean():.1f}{error}"
        kl = f"{log.kl.mean():>7.4f} | {log.kl.max():>8.4f}"
        lines.append(f"| {name:<23} | {length:>14} | {solved:>14} | {kl} |")
    note = (
        f"Episode length: the mean of the last {args.final} updates, of {STEPS} at most. "
        f"KL: of the policies before and after an update; radius and target are {args.max_kl:g}."
    )
    return "\n".join([*lines, "", note])


def plot_learning(logs: dict[str, Log], seeds: int, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for name, log in logs.items():
        lengths = np.asarray(log.length)
        updates = np.arange(1, len(lengths) + 1)
        axis.plot(updates, lengths.mean(axis=1), color=COLORS[name], lw=2, label=name)
        low, high = lengths.min(axis=1), lengths.max(axis=1)
        axis.fill_between(updates, low, high, color=COLORS[name], alpha=0.2, lw=0)
    axis.axhline(STEPS, color="#000000", lw=0.8, ls=":")
    title = f"Mean and range of {seeds} seeds"
    axis.set(title=title, xlabel="update", ylabel="steps upright", ylim=(0, STEPS * 1.04))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_kl(logs: dict[str, Log], target: float, path: Path) -> None:
    least = 1e-5  # a policy that has collapsed no longer moves
    figure, axes = plt.subplots(1, len(logs), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (name, log) in zip(axes, logs.items(), strict=True):
        updates = np.arange(1, len(log.kl) + 1)
        kl = np.maximum(log.kl, least)
        axis.plot(updates, kl, ".", color=COLORS[name], ms=4, alpha=0.5)
        axis.plot(updates, np.median(kl, axis=1), color=COLORS[name], lw=2, label="median")
        word = {"natural gradient": "radius", "PPO, KL penalty": "target"}.get(
            name, "not asked for"
        )
        axis.axhline(target, color="#000000", ls="--", lw=1, label=f"{target:g}, {word}")
        axis.set(title=name, xlabel="update", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
    greatest = max(log.kl.max() for log in logs.values())
    axes[0].set(ylabel="D(old‖new), nats (from 10⁻⁵ up)", ylim=(least / 500, 3 * greatest))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--max-kl", type=float, default=0.01, help="radius, and target of the penalty (0.01)")
    add("--updates", type=int, default=40, help="of each policy (40)")
    add("--final", type=int, default=10, help="last updates that the table averages (10)")
    add("--episodes", type=int, default=16, help="played for an update (16)")
    add("--steps", type=int, default=20, help="of Adam in an update (20)")
    add("--learning-rate", type=float, default=1e-2, help="of Adam for policies (0.01)")
    add("--critic-learning-rate", type=float, default=3e-3, help="of Adam for critics (0.003)")
    add("--clip", type=float, default=0.2, help="of PPO's ratio; inf: the penalty alone (0.2)")
    add("--width", type=int, default=32, help="of the two hidden layers (32)")
    add("--seed", type=int, default=0, help="the first seed (0)")
    add("--seeds", type=int, default=5, help="how many seeds (5)")
    add("--output", type=Path, default=Path("results/policy_kl"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: 2 seeds, 6 updates of 4 episodes")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name in ("max_kl", "updates", "final", "episodes", "steps", "learning_rate", "seeds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    methods, task, logs = make_methods(args), make_task(args), {}
    with tqdm(total=len(methods) * args.updates, unit="update") as progress:
        for name, method in methods.items():
            progress.set_description(f"{name:<23}")
            logs[name] = train(method, task, args, progress)
    table = report(logs, args)
    print(f"\n{table}\n")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    courses = {
        name: {field: np.asarray(x).tolist() for field, x in log._asdict().items()}
        for name, log in logs.items()
    }
    results = {"arguments": vars(args), "by update and seed": courses}
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    plot_learning(logs, args.seeds, args.output / "learning.png")
    plot_kl(logs, args.max_kl, args.output / "kl.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
