"""`python -m kljax`: its facts are those of the library, and its checks can fail."""

import subprocess
import sys
from functools import partial, wraps

import jax
import jax.numpy as jnp
import pytest

import kljax
from kljax import __main__ as report
from kljax._engine import lowering

NAMES = ["-".join(["", *c.args]) if isinstance(c, partial) else c.__name__ for c in report.CHECKS]
FAST = ["-forward_kl-float32", "-jensen_shannon-bfloat16", "-bfloat16", "close_rows", "top_k"]


def test_the_facts_alone():
    command = [sys.executable, "-m", "kljax", "--no-checks"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line)
    assert lines["jax"] == jax.__version__
    assert lines["kljax"].startswith(f"{kljax.__version__}, from ")
    assert lines["jax_enable_x64"] in ("True", "False")
    assert "forward KL, Heads 4096 x 512 x 32768" in done.stdout
    assert "Self-check" not in done.stdout


def test_what_is_not_installed_is_said_to_be(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("jax", "no-such-package"))
    assert dict(report.facts())["no-such-package"] == "not installed"


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_blocks_are_those_of_the_program(platform, monkeypatch):
    """What is said without a program is what the program for that platform does."""
    monkeypatch.setattr(lowering, "_platforms", lambda ctx: (platform,))

    def problem(divergence, *sides):
        cut = report.blocks_of(divergence, *sides, platform=platform)
        loss = lambda *sides: divergence(*sides, reduction="mean")  # noqa: E731
        program = jax.jit(loss).lower(*sides).as_text()
        assert ("stablehlo.while" in program) == (not cut.single)
        if not cut.single:
            assert f"dense<{cut.counts[0]}> : tensor<i32>" in program
        return ""

    monkeypatch.setattr(report, "way", problem)
    assert len(list(report.ways())) == 5


@pytest.mark.parametrize(
    ("platform", "passes"), [("cpu", "two passes"), ("tpu", "one pass"), ("cuda", "one pass")]
)
def test_passes_are_those_of_the_platform(platform, passes, monkeypatch):
    monkeypatch.setattr(lowering, "_platforms", lambda ctx: (platform,))
    x = jax.ShapeDtypeStruct((32, 1000), jnp.float32)
    assert report.way(kljax.reverse_kl, x, x) == f"whole, {passes} over both sides"


@pytest.mark.slow(but=FAST)
@pytest.mark.parametrize("name", NAMES)
def test_checks_pass(name, monkeypatch, capsys, request):
    if name == "close_rows" and request.config.getoption("as_on") == "tpu":
        pytest.skip("its bound is that of the device")
    monkeypatch.setattr(report, "CHECKS", [report.CHECKS[NAMES.index(name)]])
    assert report.self_check() == 0, capsys.readouterr().out


def wrong_value(value):
    return 1.001 * value


@jax.custom_vjp
def wrong_gradient(value):
    return value


wrong_gradient.defvjp(lambda value: (value, None), lambda _, ct: (1.001 * ct,))


def an_error(value):
    raise ValueError("broken")


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [(wrong_value, "2 of 2"), (wrong_gradient, "1 of 2"), (an_error, "1 of 1")],
)
def test_checks_can_fail(broken, verdict, monkeypatch, capsys):
    @wraps(kljax.forward_kl)
    def forward_kl(*sides, **options):
        return broken(original(*sides, **options))

    original = kljax.forward_kl
    monkeypatch.setattr(kljax, "forward_kl", forward_kl)
    monkeypatch.setattr(report, "ways", lambda: ())
    monkeypatch.setattr(report, "CHECKS", [partial(report.special_rows, "forward_kl", "float32")])
    assert report.main([]) == 1
    printed = capsys.readouterr().out
    assert f"{verdict} checks FAILED" in printed
    assert printed.count("FAILED\n") == int(verdict[0])
