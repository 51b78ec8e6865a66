"""What each divergence makes of a student that cannot fit its teacher.

The student is one Gaussian, too little for either teacher: three unequal bumps on a line, and a
ring in the plane that is heavier on one side. Both live on a fine grid, so that teacher and student
are logits over so many classes, and every loss is one call of kljax:

    forward KL        covers all that the teacher does, and the void between: mean and covariance
                      become the teacher's
    skew forward KL   forgives some of what is missed: it gives up the small bump far away, but no
                      part of the ring
    Jensen-Shannon    forgives on both sides: two of the three bumps, an arc of the ring
    skew reverse KL   forgives some mass in the void, yet takes one bump only; a shorter arc
    reverse KL        shuns the void: one bump, and which one depends on the start

Each student is trained from many random starts: drawn solid is the best of them, dashed are the
other local optima. On the line all but forward KL have some: a student on one bump gains nothing
by a small step towards another.

A second figure turns a knob, the β of `jensen_shannon(s, t, beta=β, normalized=True)`: forward KL
at 0, reverse KL at 1. Each local optimum moves little and continuously while it lasts; the best of
them jumps, from three bumps to two and from two to one.

    python examples/mode_seeking.py             # about 20 seconds on two CPU cores
    python examples/mode_seeking.py --quick     # a smoke run

Needs jax, optax and matplotlib. Writes results.md and two figures into the folder named by
--output. In the table a spread is the root mean square distance from the mean, and almost all of a
distribution is the smallest set of points that holds 99% of it. Covered is what the teacher has
where almost all of the student is, wasted what the student has elsewhere than almost all of the
teacher. Starts counts those that ended in the best student.
"""

import argparse
import functools
import itertools
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

import kljax

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (once the backend is chosen)

Args = argparse.Namespace
Divergence = Callable[..., Array]
DIVERGENCES: dict[str, Divergence] = {
    "forward KL": kljax.forward_kl,
    "skew forward KL": kljax.skew_forward_kl,
    "Jensen–Shannon": kljax.jensen_shannon,
    "skew reverse KL": kljax.skew_reverse_kl,
    "reverse KL": kljax.reverse_kl,
}
KNOB = functools.partial(kljax.jensen_shannon, normalized=True)
BUMPS = ((0.55, -3.0, 0.5), (0.30, 0.0, 0.5), (0.15, 5.5, 0.5))  # weight, place, width
ALMOST_ALL = 0.99
SAME = 0.1  # the total variation within which two students are one local optimum
COLORS = ("#0072B2", "#3D9BD1", "#009E73", "#CC8400", "#D55E00")  # Okabe-Ito, two of them darker
TEACHER = "#CCCCCC"
BEST: Any = {"linestyle": "solid", "linewidth": 2.2}
OTHERS: Any = {"linestyle": (0, (4, 2)), "linewidth": 1.0}
QUICK = {"starts": 16, "steps": 300, "betas": 21}


class Problem(NamedTuple):
    points: Array  # [N, dimensions], the grid
    teacher: Array  # [N], log-probabilities


class Student(NamedTuple):
    """Gaussians, one for each start."""

    loc: Array  # [starts, dimensions]
    log_scale: Array  # [starts, dimensions]
    shear: Array  # [starts, dimensions, dimensions], below the diagonal


class Fitted(NamedTuple):
    """Where training ended from every start, the best first."""

    log_probs: np.ndarray  # [starts, N]
    values: np.ndarray  # [starts]


def make_problem(points: np.ndarray, logits: np.ndarray) -> Problem:
    return Problem(jnp.float32(points), jax.nn.log_softmax(jnp.float32(logits)))


def three_bumps() -> Problem:
    points = np.linspace(-12, 12, 481)[:, None]
    weight, place, width = np.asarray(BUMPS).T[:, None]
    bumps = np.log(weight / width) - 0.5 * ((points - place) / width) ** 2
    return make_problem(points, np.logaddexp.reduce(bumps, axis=-1))


def ring() -> Problem:
    x, y = (z.ravel() for z in np.meshgrid(*2 * [np.linspace(-7.5, 7.5, 61)]))
    along = np.log(1 + 0.6 * np.cos(np.arctan2(y, x) - 2))
    across = -0.5 * ((np.hypot(x, y) - 3) / 0.35) ** 2
    return make_problem(np.stack([x, y], axis=-1), along + across)


def starts(problem: Problem, count: int, seed: int) -> Student:
    dimensions = problem.points.shape[-1]
    place, size = jax.random.split(jax.random.key(seed))
    reach = 0.5 * problem.points.max()
    loc = jax.random.uniform(place, (count, dimensions), minval=-reach, maxval=reach)
    log_scale = jax.random.uniform(size, (count, 1), minval=-1.5, maxval=0.5)
    shear = jnp.zeros((count, dimensions, dimensions))
    return Student(loc, jnp.tile(log_scale, dimensions), shear)


def logits(student: Student, points: Array) -> Array:
    """[starts, N], linear in x and xxᵀ; the losses normalise them."""
    inverse_scale = jnp.exp(-student.log_scale)[:, None] * jnp.eye(points.shape[-1])[None]
    root = inverse_scale + jnp.tril(student.shear, -1)
    precision = root @ root.swapaxes(1, 2)
    linear = jnp.einsum("sij,sj,ni->sn", precision, student.loc, points)
    squares = points[:, :, None] * points[:, None]
    return linear - 0.5 * jnp.einsum("sij,nij->sn", precision, squares)


@functools.partial(jax.jit, static_argnames=("divergence", "steps"))
def train(
    divergence: Divergence, problem: Problem, start: Student, steps: int, **options: Any
) -> Array:
    """The log-probabilities that every start ends with."""
    # Steep at a narrow start and flat at the end: Adam had better forget the former soon.
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, steps), b2=0.95)

    def loss(student: Student) -> Array:
        # Adam treats each number by itself, so that the sum trains each start alone.
        predictions = logits(student, problem.points)
        return divergence(predictions, problem.teacher, reduction="sum", **options)

    def train_step(state: Any, _: None) -> tuple[Any, None]:
        student, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(student), moments)
        return (optax.apply_updates(student, updates), moments), None

    (student, _), _ = jax.lax.scan(train_step, (start, optimizer.init(start)), length=steps)
    return jax.nn.log_softmax(logits(student, problem.points))


def fit(divergence: Divergence, problem: Problem, args: Args, **options: Any) -> Fitted:
    start = starts(problem, args.starts, args.seed)
    log_probs = train(divergence, problem, start, steps=args.steps, **options)
    values = np.asarray(divergence(log_probs, problem.teacher, **options))
    order = np.argsort(values)
    return Fitted(np.asarray(log_probs)[order], values[order])


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return 0.5 * float(np.abs(np.exp(log_p) - np.exp(log_q)).sum())


def optima(fitted: Fitted) -> dict[int, int]:
    """The best student of each local optimum, and how many starts ended there."""
    found: dict[int, int] = {}
    for i, log_p in enumerate(fitted.log_probs):
        same = (k for k in found if total_variation(fitted.log_probs[k], log_p) < SAME)
        k = next(same, i)
        found[k] = found.get(k, 0) + 1
    return found


def jumps(sweep: list[Fitted]) -> list[int]:
    """The settings of the knob at which the best student is suddenly another."""
    best = [fitted.log_probs[0] for fitted in sweep]
    return [i for i in range(1, len(best)) if total_variation(best[i - 1], best[i]) > SAME]


def moments(log_probs: Any, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance."""
    x, p = np.asarray(problem.points, np.float64), np.exp(np.asarray(log_probs, np.float64))
    mean = p @ x
    return mean, (x - mean).T @ (p[:, None] * (x - mean))


def region(log_probs: Any) -> np.ndarray:
    """Where almost all of it is."""
    probs = np.exp(np.asarray(log_probs, np.float64))
    falling = np.argsort(-probs)
    inside = np.empty(len(probs), bool)
    inside[falling] = np.cumsum(probs[falling]) <= ALMOST_ALL
    return inside


def covered_and_wasted(log_probs: Any, problem: Problem) -> tuple[float, float]:
    student, teacher = np.exp(log_probs), np.exp(problem.teacher)
    covered, wasted = teacher[region(log_probs)], student[~region(problem.teacher)]
    return float(covered.sum()), float(wasted.sum())


def cross_table(problem: Problem, fits: dict[str, Fitted]) -> np.ndarray:
    """The best students, one a row, by every divergence, one a column."""
    return np.asarray(
        [
            [of(fitted.log_probs, problem.teacher)[0] for of in DIVERGENCES.values()]
            for fitted in fits.values()
        ]
    )


def markdown(rows: list[list[str]]) -> str:
    """A table, of which the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def report(title: str, problem: Problem, fits: dict[str, Fitted]) -> str:
    rows = [["student of", "mean", "spread", "covered, %", "wasted, %", "starts"]]
    best = {name: fitted.log_probs[0] for name, fitted in fits.items()}
    for name, log_probs in {"(the teacher)": problem.teacher, **best}.items():
        mean, covariance = moments(log_probs, problem)
        place, spread = ", ".join(f"{x:.2f}" for x in mean), f"{np.trace(covariance) ** 0.5:.2f}"
        shares = [f"{100 * share:.1f}" for share in covered_and_wasted(log_probs, problem)]
        ended = f"{optima(fits[name])[0]} of {len(fits[name].values)}" if name in fits else ""
        rows.append([name, place, spread, *shares, ended])
    crossed = [["trained with ↓, measured by →", *fits]]
    for name, values in zip(fits, cross_table(problem, fits), strict=True):
        crossed.append([name, *(f"{value:.3f}" for value in values)])
    return f"## {title}\n\n{markdown(rows)}\n\n{markdown(crossed)}\n"


def draw_line(axis: Any, problem: Problem, fitted: Fitted, color: str) -> None:
    x = np.asarray(problem.points[:, 0])
    teacher, *students = np.exp([problem.teacher, *fitted.log_probs]) / (x[1] - x[0])
    axis.fill_between(x, teacher, color=TEACHER, linewidth=0)
    axis.axhline(0, color=TEACHER, linewidth=1)
    for i in optima(fitted):
        y = np.where(students[i] > 0.003, students[i], np.nan)
        axis.plot(x, y, color=color, **(OTHERS if i else BEST))
    axis.set(xlim=(-8.2, 8.2), ylim=(-0.01, 0.83))


def draw_plane(axis: Any, problem: Problem, fitted: Fitted, color: str) -> None:
    side = round(len(problem.points) ** 0.5)
    x, y, teacher = (z.reshape(side, side) for z in (*problem.points.T, np.exp(problem.teacher)))
    axis.pcolormesh(x, y, teacher, cmap="Greys", vmax=2 * teacher.max(), shading="gouraud")
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for i in optima(fitted):
        mean, covariance = moments(fitted.log_probs[i], problem)
        for mass in [0.9] if i else [0.5, 0.9]:
            away = np.sqrt(-2 * np.log1p(-mass)) * np.linalg.cholesky(covariance) @ circle
            axis.fill(*(mean[:, None] + away), fill=False, color=color, **(OTHERS if i else BEST))
    axis.set(xlim=(-5.3, 4.6), ylim=(-4, 5.7), aspect="equal")


def plot_students(
    problems: dict[str, Problem], fits: dict[str, dict[str, Fitted]], path: Path
) -> None:
    figure, axes = plt.subplots(2, 5, figsize=(10, 5.2), layout="constrained")
    for row, draw, title in zip(axes, (draw_line, draw_plane), problems, strict=True):
        for axis, color, fitted in zip(row, COLORS, fits[title].values(), strict=True):
            draw(axis, problems[title], fitted, color)
            covered, wasted = covered_and_wasted(fitted.log_probs[0], problems[title])
            axis.set(xlabel=f"covers {covered:.0%}, wastes {wasted:.0%}", xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, color, (name, divergence) in zip(axes[0], COLORS, DIVERGENCES.items(), strict=True):
        axis.set_title(name, color=color, weight="bold", fontsize=13, pad=20)
        call = f"{getattr(divergence, '__name__', '')}(s, t)"
        style: Any = {"ha": "center", "fontsize": 9, "family": "monospace"}
        axis.text(0.5, 1.04, call, transform=axis.transAxes, **style)
    axes[0, 0].text(-3, 0.46, "teacher t", color="#777777", ha="center")
    axes[0, 0].text(1.5, 0.15, "student s", color=COLORS[0])
    note = (
        "\nSolid: the best Gaussian student; dashed: other local optima; "
        "the ellipses hold 50% and 90% of the mass.\n"
        "Covers: the teacher's mass where the student has 99% of its own. "
        "Wastes: the student's mass outside the teacher's 99%."
    )
    figure.supxlabel(note, fontsize=9.5, color="#444444", linespacing=1.5)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)


def plot_knob(problem: Problem, betas: np.ndarray, sweep: list[Fitted], path: Path) -> None:
    """The density of the best student over β, and upon it the means of all local optima."""
    x, at = np.asarray(problem.points[:, 0]), np.log(betas / (1 - betas))
    figure, (left, axis) = plt.subplots(
        1, 2, figsize=(10, 5), layout="constrained", sharey=True, width_ratios=(1, 10)
    )
    left.fill_betweenx(x, -np.exp(problem.teacher), color=TEACHER, linewidth=0)
    left.set_title("teacher t", color="#777777", fontsize=10)
    left.set(xticks=[], yticks=[], ylim=(-8, 8))

    best = np.stack([fitted.log_probs[0] for fitted in sweep])
    # Of the root: else the broad student is too pale beside the narrow one.
    axis.pcolormesh(at, x, np.exp(0.5 * best.T), cmap="Blues", shading="nearest")
    for here, fitted in zip(at, sweep, strict=True):
        for i in optima(fitted):
            colors = ("white", "black") if i else ("black", "white")
            style: Any = dict(zip(("mfc", "mec"), colors, strict=True), ms=3 if i else 6, mew=0.8)
            axis.plot(here, moments(fitted.log_probs[i], problem)[0], "o", **style)

    for first, end in itertools.pairwise([0, *jumps(sweep), len(sweep)]):
        covered = region(best[first])[np.searchsorted(x, [place for _, place, _ in BUMPS])].sum()
        middle = (at[first] + at[end - 1]) / 2
        axis.text(middle, -7.2, f"{covered} of 3 bumps", ha="center", fontsize=11)
    axis.text(at[-1], 5.9, "○ means of the other local optima", ha="right", fontsize=9.5)
    axis.text(at[-1], -4.9, "● mean of the best student", ha="right", fontsize=9.5)
    ticks = np.asarray([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    axis.set_xticks(np.log(ticks / (1 - ticks)), [f"{tick:g}" for tick in ticks])
    axis.set_xlabel("β", fontsize=12)
    for name, color, side in (("← forward KL", COLORS[0], 0), ("reverse KL →", COLORS[-1], 1)):
        place: Any = {"transform": axis.transAxes, "ha": ("left", "right")[side]}
        axis.text(side, -0.12, name, color=color, weight="bold", **place)
    axis.set_title("The best student of jensen_shannon(s, t, beta=β, normalized=True)", fontsize=11)
    for each in (left, axis):
        each.spines[:].set_visible(False)
    figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.12)
    plt.close(figure)


def parse_arguments(argv: Sequence[str] | None) -> Args:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--starts", type=int, default=32, help="of every student (32)")
    add("--steps", type=int, default=400, help="of Adam, from every start (400)")
    add("--betas", type=int, default=61, help="settings of the knob (61)")
    add("--seed", type=int, default=0, help="of the starts (0)")
    add("--output", type=Path, default=Path("results/mode_seeking"), help="folder to write to")
    add("--quick", action="store_true", help="a smoke run: 16 starts, 300 steps, 21 betas")
    if parser.parse_args(argv).quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_arguments(argv)
    problems = {"Three bumps": three_bumps(), "A ring": ring()}
    fits: dict[str, dict[str, Fitted]] = {}
    text = ""
    for title, problem in problems.items():
        fits[title] = {name: fit(of, problem, args) for name, of in DIVERGENCES.items()}
        text += report(title, problem, fits[title]) + "\n"
    line = problems["Three bumps"]
    betas = np.asarray(jax.nn.sigmoid(jnp.linspace(-7.0, 7.0, args.betas)))
    sweep = [fit(KNOB, line, args, beta=beta) for beta in betas]
    where = ", ".join(f"{betas[i - 1]:.3f} to {betas[i]:.3f}" for i in jumps(sweep))
    text += f"The best student of the three bumps jumps as β goes from {where or '0 to 1: never'}."
    print(text)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.md").write_text(text + "\n", encoding="utf-8")
    plot_students(problems, fits, args.output / "students.png")
    plot_knob(line, betas, sweep, args.output / "knob.png")
    print(f"Wrote {args.output}/ in {time.perf_counter() - started:.0f} s in all.")


if __name__ == "__main__":
    main()
