"""The one place for tolerances."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden.make import cotangent
from jax.experimental import checkify

import kljax

# A few hundred roundings of the dtype: every test here sums at most some thousand classes.
_TOLERANCES = {
    np.dtype("float64"): {"rtol": 1e-12, "atol": 1e-13},
    np.dtype("float32"): {"rtol": 2e-5, "atol": 2e-6},
    np.dtype("float16"): {"rtol": 2e-3, "atol": 2e-3},
    np.dtype(jnp.bfloat16): {"rtol": 1e-2, "atol": 1e-2},
}


def tol(dtype) -> dict[str, float]:
    """rtol and atol for `np.testing.assert_allclose`."""
    return _TOLERANCES[np.dtype(dtype)]


def assert_close(got, want, dtype=np.float32) -> None:
    """Equal within the dtype's tolerance, NaN and infinities in the same places."""
    np.testing.assert_allclose(np.asarray(got, np.float64), want, **tol(dtype))


def named(name: str):
    """The divergence of that name; `cross_entropy` is told that bare targets are logits."""
    if name != "cross_entropy":
        return getattr(kljax, name)

    def cross_entropy(predictions, targets, **options):
        bare = hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.floating)
        return kljax.cross_entropy(
            predictions, kljax.Logits(targets) if bare else targets, **options
        )

    return cross_entropy


def report(f, *args) -> str | None:
    """What the value checks say of f(*args), if anything."""
    with kljax.value_checks():
        error, _ = checkify.checkify(f, errors=checkify.user_checks)(*args)
    return error.get()


def goldens(system: str) -> list[dict]:
    """What another system computed; see tests/golden/make.py."""
    file = Path(__file__).parent / "golden" / f"{system}.json"
    return json.loads(file.read_text())["cases"]


def assert_goldens(cases: list[dict], functions: list, sides: list, dtypes: list) -> None:
    """Values and gradients to all sides are the other system's; all cases compile as one."""

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # to compile fast
    def run(sides):
        values_pulls = [jax.vjp(f, *given) for f, given in zip(functions, sides, strict=True)]
        return [
            (value, *pull(jnp.asarray(cotangent(value.shape), value.dtype)))
            for value, pull in values_pulls
        ]

    for case, given, got, dtype in zip(cases, sides, run(sides), dtypes, strict=True):
        assert [one.dtype for one in got] == [case.get("dtype", dtype), *(x.dtype for x in given)]
        for one, want in zip(got, [case["value"], *case["gradients"]], strict=True):
            assert_close(one, np.asarray(want, np.float64), dtype)
