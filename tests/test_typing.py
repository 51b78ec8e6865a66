"""`typing/user.py`, which type checkers read, runs, and leaves no public name out."""

import ast
import importlib
import inspect
import runpy
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_package import LEAVES

FILE = Path(__file__).parent / "typing" / "user.py"
USER = runpy.run_path(str(FILE), run_name="user")
FUNCTIONS = {
    name: one for name, one in USER.items() if inspect.isfunction(one) and one.__module__ == "user"
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_the_checkers_accept_runs(name):
    student = jnp.array([[1.0, 2.0, 3.0, 0.0], [0.5, 0.5, 0.0, 1.0]])
    batch = USER["Batch"](student, student[::-1], jnp.array([2, 0]), jnp.array([True, True]))
    given = {"batch": batch, "hidden": jnp.ones((2, 3)), "kernel": jnp.ones((3, 4))}
    given = [given[each] for each in inspect.signature(FUNCTIONS[name]).parameters]
    # Traced, for to compile it all would take a minute; but values are checked outside of jit only.
    run = FUNCTIONS[name] if name == "checks" else jax.jit(FUNCTIONS[name]).trace
    assert run(*given) is not None


def test_every_public_name_is_there():
    attributes = (n for n in ast.walk(ast.parse(FILE.read_text())) if isinstance(n, ast.Attribute))
    dotted = (ast.unparse(node).split(".") for node in attributes)
    used = [reduce(getattr, rest, USER[root]) for root, *rest in dotted if root in USER]
    for module in ("kljax", "kljax.families", *LEAVES):
        for name, one in vars(importlib.import_module(module)).items():
            if not name.startswith("_") and (inspect.isclass(one) or inspect.isfunction(one)):
                ours = one.__module__.startswith(module)
                assert not ours or any(one is each for each in used), f"{module}.{name}"
