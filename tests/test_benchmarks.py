"""The benchmarks measure what they say: floors, references, slopes, peers, what is written."""

import importlib.util
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_large
import pytest

from benchmarks import __main__ as runs
from benchmarks import (
    budgets,
    overhead,
    peers,
    programs,
    reference,
    report,
    runner,
    shapes,
    torch_peers,
)
from benchmarks.cases import DIVERGENCES, KINDS, Case, Rates, floor, inputs

pytestmark = pytest.mark.usefixtures("optimized")

TINY = shapes.Shape("tiny", 24, 5, 7, "float32")
LIMITS = runner.Limits(seconds=0.01, repeats=3, memory=2**40)


def _case(kind, divergence="forward_kl", dtype="float32", tokens=6):
    return runs._case(TINY, kind, divergence, dtype, tokens)


def test_floors_by_hand():
    rates = Rates(bandwidth=8.0, operations={"bfloat16": 12.0})
    logits = Case("logits", "forward_kl", "float32", 2, 3)
    assert floor(logits, rates) == (2 * 24 / 8, 3 * 24 / 8)
    top_k = Case("top-k", "forward_kl", "float32", 2, 3, k=1)
    cached = 2 * (4 + 4 + 4)  # an index, a log-probability and a tail for each token
    assert floor(top_k, rates) == ((24 + cached) / 8, (2 * 24 + cached) / 8)
    # Operations: 2NV(H + H') for the value, 2NV(3H + H') with gradients.
    head = Case("head", "forward_kl", "bfloat16", 2, 3, 4, 5)
    assert floor(head, rates._replace(bandwidth=1e9)) == (12 * 9 / 12, 12 * 17 / 12)


@pytest.mark.parametrize("exponent", [0.0, 0.93, 2.0])
def test_slope_of_a_power_law(exponent):
    sizes = [2.0**20 * 4**i for i in range(6)]
    assert budgets.fit_slope(sizes, [3e-9 * n**exponent for n in sizes]) == pytest.approx(exponent)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_of_logits(divergence, rng):
    student, teacher = 3 * rng.normal(size=(2, 4, 9))
    got = reference.logits_gradient(divergence, student, oracle.log_probs(teacher), None)
    want = oracle.gradient(divergence, student, teacher)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reference_of_heads(divergence):
    """Of the mean over tokens, to some rows of hidden and some columns of the kernel."""
    case = _case("head", divergence)
    given = inputs(case)
    (hidden, kernel), teacher = (tuple(map(np.asarray, side)) for side in given)

    def mean(student):
        sides = (student, dict(zip(("hidden", "kernel"), teacher, strict=True)))
        return oracle_large.divergence(divergence, *sides).mean()

    want = oracle_large.gradients(mean, {"hidden": hidden, "kernel": kernel})
    got = reference.reference(case, given)
    assert got.tokens == [0, 3, 5]
    assert got.classes == [0, 12, 23]
    np.testing.assert_allclose(got.rows, want["hidden"][got.tokens], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.columns, want["kernel"][:, got.classes], rtol=1e-10, atol=1e-12)


def test_reference_of_a_top_k_teacher():
    case = _case("top-k")
    given = inputs(case)
    names = ("indices", "log_probs", "log_tail")
    cached = dict(zip(names, map(np.asarray, given.teacher), strict=True))
    want = oracle_large.gradients(
        lambda x: oracle_large.top_k_divergence("forward_kl", x["z"], **cached).mean(),
        {"z": np.asarray(given.student[0])},
    )["z"]
    got = reference.reference(case, given)
    np.testing.assert_allclose(got.rows, want[got.tokens], rtol=1e-10, atol=1e-12)


def test_error_is_of_the_worst_array_and_keeps_nan():
    exact = reference.Reference([0], np.array([[2.0, -4.0]]), [0], np.array([[1.0], [0.5]]))
    assert reference.error(exact, np.array([[2.0, -4.4]]), exact.columns) == pytest.approx(0.1)
    assert reference.error(exact, exact.rows, np.array([[1.0], [0.0]])) == pytest.approx(0.5)
    assert math.isnan(reference.error(exact, np.array([[2.0, np.nan]]), exact.columns))


def _errors(case, losses):
    """The error of each loss's gradient on one case."""
    given = inputs(case)
    exact = reference.reference(case, given)
    found = []
    for first, *kernel in jax.jit(lambda *sides: [jax.grad(f)(*sides) for f in losses])(*given):
        rows = np.asarray(first)[exact.tokens]
        columns = np.asarray(kernel[0])[:, exact.classes] if kernel else None
        found.append(reference.error(exact, rows, columns))
    return found


@pytest.mark.slow(but=["logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_contenders_compute_the_same(kind):
    everyone = peers.contenders()
    for divergence in DIVERGENCES[:1] if "top-k" in kind else DIVERGENCES:
        case = _case(kind, divergence)
        losses = [each.loss(case) for each in everyone]
        *errors, wrong = _errors(case, [*losses, lambda s, t, f=losses[0]: 1.01 * f(s, t)])
        assert max(errors) < 2e-5, list(zip(everyone, errors, strict=True))
        assert wrong > 5e-3


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_torch_computes_the_same(kind):
    for divergence, dtype in itertools.product(DIVERGENCES, ("float32", "bfloat16")):
        case = _case(kind, divergence, dtype)
        given = inputs(case)
        exact = reference.reference(case, given)
        first, *kernel = torch_peers.prepare(case, torch_peers.eager(case), given)[1]()
        rows = torch_peers.gathered(first, exact.tokens, 0)
        columns = torch_peers.gathered(kernel[0], exact.classes, 1) if kernel else None
        assert reference.error(exact, rows, columns) < (2e-5 if dtype == "float32" else 0.1)


def test_slow_calls_are_not_repeated(monkeypatch):
    seconds = {"slow": 4.0, "fast": 0.5}
    calls = []
    monkeypatch.setattr(runner, "_timed", lambda call: seconds[call()])
    found = runner.in_turn(
        {name: lambda name=name: calls.append(name) or name for name in seconds},
        runner.Limits(seconds=10.0, repeats=7, memory=0),
    )
    assert found == {"slow": [4.0], "fast": [0.5] * 7}
    assert calls.count("slow") == 2


@pytest.mark.skipif(not runner._STATUS.exists(), reason="Linux tells what is resident")
def test_growth_is_what_a_call_holds_at_most():
    def call():
        passing = np.ones(2**26, np.uint8)
        del passing
        return np.ones(2**25, np.uint8)

    assert 2**26 - 2**20 <= runner.grown(call) < 2**26 + 2**24


def test_stored_float32_arrays_are_found():
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)

    def compiled(f):
        wide = lambda x: f(x.astype(jnp.float32)).astype(jnp.bfloat16)  # noqa: E731
        return jax.jit(wide).lower(x).compile().as_text()

    fused, stored = compiled(lambda x: jnp.exp(x + 1)), compiled(jax.nn.softmax)
    assert "f32[64,4096]" in fused
    assert budgets.wide_arrays(fused, 64 * 4096) == []
    assert budgets.wide_arrays(stored, 64 * 4096)
    assert budgets.wide_arrays(stored, 64 * 4096 + 1) == []


@pytest.mark.slow
def test_budgets(monkeypatch):
    """Every measure is there and says whether it is met."""
    for name, value in {
        "BUDGET_TOKENS": 8,
        "BUDGET_VOCAB": 64,
        "BUDGET_HEAD_TOKENS": 8,
        "BUDGET_HEAD_HIDDEN": 4,
        "BUDGET_HEAD_VOCAB": 64,
        "SCALING_TOKENS": ((4, 64), (16, 64)),
        "SCALING_VOCAB": ((4, 64), (4, 256)),
    }.items():
        monkeypatch.setattr(shapes, name, value)
    monkeypatch.setattr(overhead, "CALLS", 20)
    monkeypatch.setattr(overhead, "PARAMETERS", 3)
    monkeypatch.setattr(budgets, "_DTYPES", ("bfloat16",))
    monkeypatch.setattr(budgets, "DIVERGENCES", ("forward_kl", "reverse_kl"))
    monkeypatch.setattr(budgets.targets, "in_another_process", lambda *_: "no compiler")
    peer = peers.Contender("optax", peers.plain)
    found = list(budgets.all_budgets([peer], LIMITS))
    assert len(found) == 6 + 2 + 8 + 1 + 2 + 1 + 2 + 2
    by_measure = {budget.measure: budget for budget in found}
    assert len(by_measure) == len(found)
    unmet = [b.measure for b in found if b.met is None]
    assert len(unmet) == 4  # torch.compile, the TPU, and slopes over less than three decades
    over_optax = next(b for b in found if "over optax" in b.measure)
    times = over_optax.samples
    ratio = times["optax"]["median"] / times["forward_kl"]["median"]
    assert over_optax.measured.startswith(f"{ratio:.2f} ")
    assert over_optax.met == (ratio >= 4)


@pytest.mark.slow
def test_quick_run(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "QUICK", TINY)
    monkeypatch.setattr(shapes, "QUICK_TOKENS", (6, 12))
    chosen = ["--contender", "kljax", "--contender", "plain formula"]
    options = ["--quick", *chosen, "--limit", "0.05", "--output", str(tmp_path)]
    assert runs.main(options) == 0

    (data,) = tmp_path.glob("*-quick.json")
    assert f"jax-{jax.__version__}" in data.name
    found = json.loads(data.read_text())
    assert found["run"]["versions"]["jax"] == jax.__version__
    assert {case["kind"] for case in found["cases"]} == set(KINDS)
    for case in found["cases"]:
        assert [each["contender"] for each in case["contenders"]] == ["kljax", "plain formula"]
        for each in case["contenders"]:
            assert each["gradient_error"] < 2e-5
            assert each["memory"]["peak"] > each["memory"]["temporary"] >= 0
            for part in ("value", "value_and_grad"):
                times = each[part]
                assert 0 < times["min"] <= times["median"] <= times["max"]
                ratio = times["median"] / case["floor"][part]
                assert each[f"{part}_over_floor"] == pytest.approx(ratio)
    assert [row["tokens"] for row in found["memory"]] == [6, 6, 12, 12] * 2

    page = data.with_suffix(".md").read_text()
    for case in found["cases"]:
        assert case["name"] in page
    if importlib.util.find_spec("matplotlib") is not None:
        for plot in ("time", "memory"):
            image = data.with_name(f"{data.stem}-{plot}.png").read_bytes()
            assert image.startswith(b"\x89PNG")
            assert len(image) > 10_000


def test_infinities_are_written_as_words(tmp_path):
    empty = {"rates": {"bandwidth": 1.0, "operations": {}}, "budgets": [], "memory": []}
    run = {"preset": "quick", "device": "d", "date": "", "command": "", "versions": {}}
    path, *_ = report.write({**empty, "run": run, "cases": [], "x": [math.inf]}, tmp_path / "a.b")
    assert path.name == "a.b.json"
    assert json.loads(path.read_text())["x"] == ["inf"]


def test_a_contender_that_lacks_memory_is_named():
    case = _case("logits")
    rates = Rates(1.0, {"float32": 1.0})
    kljax_only = peers.contenders()[:1]
    found = runner.measure(case, kljax_only, rates, LIMITS._replace(memory=100))
    assert found["contenders"] == [{"contender": "kljax", "status": "needs 0.0 GiB"}]


def test_only_a_peer_may_fail():
    def broken(case):
        raise TypeError("broken")

    case, rates = _case("logits"), Rates(1.0, {"float32": 1.0})
    peer, ours = (peers.Contender(name, broken) for name in ("optax", "kljax"))
    found = runner.measure(case, [peer], rates, LIMITS)["contenders"]
    assert found == [{"contender": "optax", "status": "TypeError: broken"}]
    with pytest.raises(TypeError, match="broken"):
        runner.measure(case, [ours], rates, LIMITS)


def test_a_program_s_hash_tells_what_it_computes_not_its_names():
    def one(x):
        return jnp.sin(x) + 1

    def same(other_name):
        return jnp.sin(other_name) + 1

    x = jnp.ones(3)
    first, again, another = (
        programs.measure(f, (x,))["program"] for f in (one, same, lambda x: jnp.sin(x) + 2)
    )
    assert first == again != another
