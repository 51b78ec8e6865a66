r"""Variational autoencoders of handwritten digits, and what is done to their KL term.

An encoder gives a normal posterior q(z|x) for each image, a decoder the probability that each
pixel is lit. Trained is the evidence lower bound: `kljax.cross_entropy` of Bernoulli pixels, and
`kljax.elbo_kl` of the posterior from the standard normal prior. From the same parameters, with the
same batches and for as many steps, four models differ in the options of the latter alone:

    plain        as it is, β = 1
    β = 2        a larger price on latents: fewer are used
    free bits    each latent dimension may tell a tenth of a nat at no further cost
    warm-up      β rises from 0 to 1 over the first half of the steps, an optax schedule

All are judged alike, by the bound with β = 1 and no free bits, on images held out from training.
A further model of two latent dimensions is there to be looked at.

    python examples/vae.py             # about a minute and a half on two CPU cores
    python examples/vae.py --quick     # a smoke run
    python examples/vae.py --latents 32 --free-bits 0.05

Needs jax, flax, optax, scikit-learn (it bundles the digits), matplotlib and tqdm. Writes
results.md, results.json and three figures into the folder named by --output.
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
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import kljax
from kljax.families import Bernoulli, Normal

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

Args = argparse.Namespace
SIDE = 8  # of an image
DRAWS = 32  # of z for each held-out image
ACTIVE = (
    0.01  # the variance of a used dimension's posterior means: Burda et al. (2016), section 5.3
)
COLORS = {"plain": "#555555", "β = 2": "#D55E00", "free bits": "#56B4E9", "warm-up": "#009E73"}
OF_DIGITS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#B8A800", "#0072B2", "#D55E00", "#CC79A7")
OF_DIGITS = (*OF_DIGITS, "#888888", "#7A4B1E")  # Okabe-Ito's palette, and two more
QUICK = {"epochs": 12, "seeds": 1}


class Digits(NamedTuple):
    train: np.ndarray  # [N, pixels], from 0 to 1
    held_out: np.ndarray
    held_out_labels: np.ndarray


class Objective(NamedTuple):
    """What a run asks of the KL term."""

    beta: Callable[[Array], Any]  # of the step
    free_bits: float  # nats per latent dimension


class Plan(NamedTuple):
    """What all trainings share; one optimizer too, or each of them would be compiled."""

    epochs: int
    steps: int  # in an epoch
    batch_size: int
    width: int
    optimizer: optax.GradientTransformation


class HeldOut(NamedTuple):
    """A trained model's bound, in nats per image, and its posterior of each held-out image."""

    reconstruction: float
    kl_of_each: np.ndarray  # by latent dimension
    active: int
    loc: np.ndarray  # [N, latents]


class Trained(NamedTuple):
    model: "VAE"
    held_out: HeldOut


def load_split(seed: int) -> Digits:
    digits: Any = load_digits()
    pixels = digits.data.astype(np.float32) / 16
    parts = train_test_split(
        pixels, digits.target, test_size=0.25, stratify=digits.target, random_state=seed
    )
    return Digits(parts[0], parts[1], parts[3])


class VAE(nnx.Module):
    """A perceptron that encodes and one that decodes."""

    def __init__(self, latents: int, width: int, rngs: nnx.Rngs) -> None:
        self.encoder = nnx.Sequential(
            nnx.Linear(SIDE * SIDE, width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(width, width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(width, 2 * latents, rngs=rngs),
        )
        self.decoder = nnx.Sequential(
            nnx.Linear(latents, width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(width, width, rngs=rngs),
            nnx.gelu,
            nnx.Linear(width, SIDE * SIDE, rngs=rngs),
        )

    def encode(self, images: Array) -> Normal:
        loc, log_variance = jnp.split(self.encoder(images), 2, axis=-1)
        return Normal(loc, log_variance=log_variance)

    def decode(self, z: Array) -> Bernoulli:
        return Bernoulli(logits=self.decoder(z))


def draw(posterior: Any, key: Array) -> Array:
    """A sample that the posterior's parameters have a gradient through."""
    noise = jax.random.normal(key, posterior.loc.shape)
    return posterior.loc + jnp.exp(0.5 * posterior.log_variance) * noise


def reconstruction(model: VAE, posterior: Normal, images: Array, key: Array) -> Array:
    """Nats per image. Grey pixels count as probabilities: of the same expectation as lit ones."""
    pixels = model.decode(draw(posterior, key))
    return kljax.cross_entropy(pixels, Bernoulli(probs=images), axis=-1, reduction="mean")


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="state")
def train_epoch(
    state: Any, batches: Array, betas: Array, free_bits: Array, key: Array, *, graph: Any
) -> tuple[Any, Array]:
    """Scans over the steps of an epoch; returns its mean loss too.

    The objective's numbers are traced: one compilation serves every run.
    """

    def train_step(state: Any, of_step: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        model, optimizer = nnx.merge(graph, state)
        images, beta, key = of_step

        def loss(model: VAE) -> Array:
            posterior = model.encode(images)
            kl = kljax.elbo_kl(posterior, beta=beta, free_bits=free_bits, free_bits_per="dim")
            return reconstruction(model, posterior, images, key) + kl

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return nnx.state((model, optimizer)), value

    keys = jax.random.split(key, len(batches))
    state, losses = jax.lax.scan(train_step, state, (batches, betas, keys))
    return state, losses.mean()


@nnx.jit
def bound(model: VAE, images: Array, key: Array) -> tuple[Array, Array, Array]:
    """The reconstruction, the KL of each latent dimension and the posterior means."""
    posterior = model.encode(images)
    draws = jax.vmap(lambda key: reconstruction(model, posterior, images, key))
    kl = kljax.kl(posterior, Normal(0.0, 1.0)).mean(axis=0)
    return draws(jax.random.split(key, DRAWS)).mean(), kl, jnp.asarray(posterior.loc)


def judge(model: VAE, images: np.ndarray, key: Array) -> HeldOut:
    nats, kl, loc = map(np.asarray, bound(model, jnp.asarray(images), key))
    return HeldOut(float(nats), kl, int(np.sum(loc.var(axis=0) > ACTIVE)), loc)


def fit(
    objective: Objective, latents: int, digits: Digits, seed: int, plan: Plan, progress: tqdm
) -> Trained:
    model = VAE(latents, plan.width, nnx.Rngs(seed))
    graph, state = nnx.split((model, nnx.Optimizer(model, plan.optimizer, wrt=nnx.Param)))
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    for epoch in range(plan.epochs):
        chosen = rng.permutation(len(digits.train))[: plan.steps * plan.batch_size]
        batches = jnp.asarray(digits.train[chosen].reshape(plan.steps, plan.batch_size, -1))
        steps = epoch * plan.steps + jnp.arange(plan.steps)
        betas = jax.vmap(objective.beta)(steps)
        numbers = betas, jnp.asarray(objective.free_bits), jax.random.fold_in(key, epoch)
        state, loss = train_epoch(state, batches, *numbers, graph=graph)
        progress.set_postfix_str(f"loss {loss:.2f}")
        progress.update()
    model, _ = nnx.merge(graph, state)
    return Trained(model, judge(model, digits.held_out, key))


def make_plan(args: Args, train_size: int) -> Plan:
    steps = train_size // args.batch_size
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.epochs * steps)
    return Plan(args.epochs, steps, args.batch_size, args.width, optax.adam(schedule))


def objectives(args: Args, steps: int) -> dict[str, Objective]:
    return {
        "plain": Objective(optax.constant_schedule(1.0), 0.0),
        "β = 2": Objective(optax.constant_schedule(2.0), 0.0),
        "free bits": Objective(optax.constant_schedule(1.0), args.free_bits),
        "warm-up": Objective(optax.linear_schedule(0.0, 1.0, steps // 2), 0.0),
    }


def report(runs: dict[str, list[HeldOut]], latents: int, floor: float) -> str:
    """The results as Markdown; ± is the standard deviation over seeds, if there are several."""

    def score(values: Sequence[float], digits: int = 2) -> str:
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    lines = [
        "| model     | reconstruction |          KL | negative ELBO | active latents |",
        "|-----------|---------------:|------------:|--------------:|---------------:|",
    ]
    for name, held_out in runs.items():
        kl = [float(of.kl_of_each.sum()) for of in held_out]
        nats = [of.reconstruction for of in held_out]
        sums = [a + b for a, b in zip(nats, kl, strict=True)]
        active = score([of.active for of in held_out], 1)
        numbers = f"{score(nats):>14} | {score(kl):>11} | {score(sums):>13} | {active:>14}"
        lines.append(f"| {name:<9} | {numbers} |")
    note = (
        f"Nats per held-out image; no reconstruction is below {floor:.2f}, the pixels' entropy. "
        f"Active, of {latents}: latents whose posterior mean has a variance above {ACTIVE:g}."
    )
    return "\n".join([*lines, "", note])


def show(axis: Any, rows: Any, title: str) -> None:
    """Tiles images [rows, columns, pixels] into one picture."""
    tiles = np.asarray(rows).reshape(len(rows), -1, SIDE, SIDE)
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, 2), (0, 2)))
    picture = padded.transpose(0, 2, 1, 3).reshape(len(rows) * (SIDE + 2), -1)
    axis.imshow(picture[:-2, :-2], cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def decoded(model: VAE, z: Any) -> np.ndarray:
    pixels: Any = model.decode(z)
    return np.asarray(jax.nn.sigmoid(pixels.logits))


def plot_images(trained: dict[str, Trained], digits: Digits, seed: int, path: Path) -> None:
    """A held-out image of each digit as the models reconstruct it, and images they make up."""
    originals = digits.held_out[[np.argmax(digits.held_out_labels == i) for i in range(10)]]
    real = np.random.default_rng(seed).choice(digits.train, len(originals), replace=False)
    reconstructed, made_up = [originals], [real]
    for run in trained.values():
        means: Any = run.model.encode(jnp.asarray(originals)).loc
        reconstructed.append(decoded(run.model, means))
        made_up.append(decoded(run.model, jax.random.normal(jax.random.key(seed), means.shape)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 2.9), layout="constrained")
    show(left, reconstructed, "Reconstructed from the posterior mean")
    show(right, made_up, "Decoded from draws of the prior")
    middles = np.arange(len(reconstructed)) * (SIDE + 2) + (SIDE - 1) / 2
    for axis, first in ((left, "held out"), (right, "training split")):
        axis.set_yticks(middles, [first, *trained])
        axis.tick_params(length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_latents(runs: dict[str, list[HeldOut]], free_bits: float, path: Path) -> None:
    """The KL of each dimension, those of a run in descending order."""
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 3.2), sharey=True, layout="constrained")
    for axis, (name, held_out) in zip(axes, runs.items(), strict=True):
        kl = np.sort(held_out[0].kl_of_each)[::-1]
        axis.bar(np.arange(1, len(kl) + 1), kl, color=COLORS[name])
        if name == "free bits":
            axis.axhline(free_bits, color="#000000", linestyle=":", label=f"λ = {free_bits:g}")
            axis.legend()
        axis.set(title=f"{name}: {kl.sum():.1f} nats", xlabel="latent dimension, by its KL")
        axis.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("KL, nats per held-out image")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_map(run: Trained, labels: np.ndarray, path: Path) -> None:
    """The plane of two latent dimensions: where images lie, and what is decoded there."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 5.2), layout="constrained")
    for digit, color in enumerate(OF_DIGITS):
        points = run.held_out.loc[labels == digit]
        left.scatter(*points.T, marker=f"${digit}$", s=42, color=color, linewidths=0.3)
    left.set(title="Posterior means of the held-out images", xlabel="z₁", ylabel="z₂")
    left.set_aspect("equal", adjustable="datalim")
    left.grid(alpha=0.3)
    count = 15
    ticks = np.asarray(jax.scipy.stats.norm.ppf((np.arange(count) + 0.5) / count))
    plane = np.stack(np.meshgrid(ticks, ticks[::-1]), axis=-1)
    show(right, decoded(run.model, plane), "Decoded at the prior's quantiles")
    right.set(xlabel="z₁", ylabel="z₂")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--latents", type=int, default=16, help="dimensions of z (16)")
    add("--free-bits", type=float, default=0.1, help="nats per dimension of that model (0.1)")
    add("--width", type=int, default=256, help="of the hidden layers (256)")
    add("--epochs", type=int, default=150, help="of every training (150)")
    add("--batch-size", type=int, default=64, help="images in a batch (64)")
    add("--learning-rate", type=float, default=2e-3, help="of Adam, decayed by a cosine (0.002)")
    add("--seed", type=int, default=0, help="the first seed, that of the figures (0)")
    add("--seeds", type=int, default=3, help="how many seeds (3)")
    add("--output", type=Path, default=Path("results/vae"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: 1 seed, 12 epochs")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    for name in ("latents", "width", "epochs", "batch_size", "learning_rate", "seeds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if args.free_bits < 0:
        parser.error("--free-bits must not be negative")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    digits = load_split(args.seed)
    plan = make_plan(args, len(digits.train))
    asked = objectives(args, plan.epochs * plan.steps)
    trainings: dict[str, list[Trained]] = {name: [] for name in asked}
    with tqdm(total=(args.seeds * len(asked) + 1) * args.epochs, unit="epoch") as progress:
        for seed in range(args.seed, args.seed + args.seeds):
            split = load_split(seed)
            for name, objective in asked.items():
                progress.set_description(f"seed {seed}, {name:<9}")
                trained = fit(objective, args.latents, split, seed, plan, progress)
                trainings[name].append(trained)
        progress.set_description("two latents")
        plane = fit(asked["plain"], 2, digits, args.seed, plan, progress)

    runs = {name: [run.held_out for run in of_seeds] for name, of_seeds in trainings.items()}
    pixels = Bernoulli(probs=digits.held_out)
    floor = float(kljax.entropy(pixels, axis=-1, reduction="mean"))
    table = report(runs, args.latents, floor)
    print(f"\n{table}\n")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(table + "\n", encoding="utf-8")
    results = {
        "arguments": vars(args),
        "reconstruction": {name: [of.reconstruction for of in run] for name, run in runs.items()},
        "kl": {name: [of.kl_of_each.tolist() for of in run] for name, run in runs.items()},
        "active": {name: [of.active for of in run] for name, run in runs.items()},
    }
    (args.output / "results.json").write_text(json.dumps(results, default=str, indent=1) + "\n")
    first = {name: of_seeds[0] for name, of_seeds in trainings.items()}
    plot_images(first, digits, args.seed, args.output / "images.png")
    plot_latents(runs, args.free_bits, args.output / "latents.png")
    plot_map(plane, digits.held_out_labels, args.output / "map.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
