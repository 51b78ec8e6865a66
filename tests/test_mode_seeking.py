"""examples/mode_seeking.py: what its figures show is so, by theorems and by plain NumPy."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import assert_close
from scipy.special import logsumexp, rel_entr

pytestmark = pytest.mark.usefixtures("optimized")

pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[1] / "examples"
FORMULAS = {
    "forward KL": lambda s, t: rel_entr(t, s),
    "skew forward KL": lambda s, t: rel_entr(t, 0.1 * t + 0.9 * s),
    "Jensen–Shannon": lambda s, t: 0.5 * (rel_entr(t, (s + t) / 2) + rel_entr(s, (s + t) / 2)),
    "skew reverse KL": lambda s, t: rel_entr(s, 0.1 * s + 0.9 * t),
    "reverse KL": lambda s, t: rel_entr(s, t),
}


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("mode_seeking")


@pytest.fixture(scope="module")
def fit(example):
    """With so many steps that nothing is left to gain."""
    args = example.parse_arguments(["--steps", "1000"])

    def fit(divergence, problem, **options):
        with jax.numpy_dtype_promotion("standard"):  # as for users: optax's Adam needs it
            return example.fit(divergence, problem, args, **options)

    return fit


@pytest.fixture(scope="module", params=["three_bumps", "ring"])
def problem(example, request):
    return getattr(example, request.param)()


@pytest.fixture(scope="module")
def bumps(example):
    return example.three_bumps()


@pytest.mark.slow
def test_forward_kl_matches_mean_and_covariance(example, fit, problem):
    """A theorem for any exponential family, from every start; nothing else here does."""
    want = example.moments(problem.teacher, problem)
    for log_probs in fit(example.DIVERGENCES["forward KL"], problem).log_probs:
        for got, moment in zip(example.moments(log_probs, problem), want, strict=True):
            np.testing.assert_allclose(got, moment, atol=2e-3)
    _, covariance = want
    for name in ("Jensen–Shannon", "skew reverse KL", "reverse KL"):
        best = fit(example.DIVERGENCES[name], problem).log_probs[0]
        assert np.trace(example.moments(best, problem)[1]) < 0.5 * np.trace(covariance)


def test_the_grid_is_fine_and_wide_enough(example, bumps):
    weight, place, width = np.asarray(example.BUMPS).T
    mean, covariance = example.moments(bumps.teacher, bumps)
    assert_close(mean, [weight @ place])
    assert_close(covariance, [[weight @ (place**2 + width**2) - (weight @ place) ** 2]])


@pytest.mark.slow
def test_reverse_kl_sits_on_one_bump(example, fit, bumps):
    """The best student on the heaviest, others on the others: -log weight is what that costs."""
    fitted = fit(example.DIVERGENCES["reverse KL"], bumps)
    found = example.optima(fitted)
    assert sum(found.values()) == len(fitted.values)
    means = np.asarray([example.moments(fitted.log_probs[i], bumps)[0][0] for i in found])
    nearest = [np.argmin(np.abs(means - place)) for _, place, _ in example.BUMPS]
    assert nearest[0] == 0
    for (weight, place, width), k in zip(example.BUMPS, nearest, strict=True):
        i = [*found][k]
        _, variance = example.moments(fitted.log_probs[i], bumps)
        np.testing.assert_allclose(means[k], place, atol=0.03)
        np.testing.assert_allclose(variance[0, 0] ** 0.5, width, rtol=0.05)
        np.testing.assert_allclose(fitted.values[i], -np.log(weight), rtol=0.01)


@pytest.mark.slow
def test_each_student_is_the_best_by_its_own_divergence(example, fit, problem):
    fits = {name: fit(of, problem) for name, of in example.DIVERGENCES.items()}
    table = example.cross_table(problem, fits)
    diagonal = np.diagonal(table)
    assert_close(diagonal, [fitted.values[0] for fitted in fits.values()])
    assert np.all(diagonal <= table.min(axis=0) + 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMULAS)
def test_no_gaussian_is_better(example, fit, bumps, name):
    """Of a mesh of means and scales, by NumPy in float64: the best of the starts is the best."""
    x, t = np.float64(bumps.points[:, 0]), np.exp(np.float64(bumps.teacher))
    value = fit(example.DIVERGENCES[name], bumps).values[0]
    scales = np.geomspace(0.3, 6, 61)[:, None]
    best = np.inf
    for mean in np.linspace(-8, 8, 161):
        logits = -0.5 * ((x - mean) / scales) ** 2
        s = np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
        best = min(best, FORMULAS[name](s, t).sum(-1).min())
    assert value < best + 1e-6
    np.testing.assert_allclose(value, best, atol=5e-3)


@pytest.mark.slow
def test_the_knob_turns_from_forward_to_reverse_kl(example, fit, bumps):
    ends = {"forward KL": (0.0, 1e-4), "reverse KL": (1.0, 1 - 1e-4)}
    for name, (end, near) in ends.items():
        want = fit(example.DIVERGENCES[name], bumps)
        at_end, close = (fit(example.KNOB, bumps, beta=np.float32(beta)) for beta in (end, near))
        assert_close(at_end.values[0], want.values[0])
        assert example.total_variation(at_end.log_probs[0], want.log_probs[0]) < 1e-3
        assert example.total_variation(close.log_probs[0], want.log_probs[0]) < 1e-2

    places = np.searchsorted(bumps.points[:, 0], [place for _, place, _ in example.BUMPS])
    for beta, covered in {0.01: 3, 0.3: 2, 0.9: 1}.items():
        best = fit(example.KNOB, bumps, beta=np.float32(beta)).log_probs[0]
        assert example.region(best)[places].sum() == covered


@pytest.mark.slow
def test_a_start_on_the_far_bump_leaves_it_under_forward_kl_only(example, fit, bumps):
    """However small β is: the landscape, unlike its best place, is not continuous at 0."""
    ended = {beta: fit(example.KNOB, bumps, beta=np.float32(beta)) for beta in (0.0, 1e-4)}
    assert len(example.optima(ended[0.0])) == 1
    assert np.isclose(
        example.moments(ended[1e-4].log_probs[-1], bumps)[0], example.BUMPS[-1][1], atol=0.1
    )


@pytest.mark.slow
def test_it_writes_tables_and_figures(example, tmp_path):
    small = ["--starts", "4", "--steps", "30", "--betas", "5"]
    with jax.numpy_dtype_promotion("standard"):
        example.main([*small, "--output", str(tmp_path)])
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert all(table.count(f"| {name} ") >= 4 for name in example.DIVERGENCES)
    assert {path.name for path in tmp_path.glob("*.png")} == {"students.png", "knob.png"}
