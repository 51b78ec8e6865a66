"""The package as a whole: public names, their documentation, the direction of its imports."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kljax
from kljax._options import Options
from kljax._pipeline import OPTIONS

ROOT = Path(kljax.__file__).parent
PUBLIC = sorted(name for name in vars(kljax) if not name.startswith("_"))
FUNCTIONS = {name: getattr(kljax, name) for name in PUBLIC}
FUNCTIONS = {name: one for name, one in FUNCTIONS.items() if inspect.isfunction(one)}
CLASSES = {name: getattr(kljax, name) for name in PUBLIC if inspect.isclass(getattr(kljax, name))}

# Leaves: nothing imports them, and they are loaded when asked for.
SYSTEMS = ["gluon", "keras", "optax", "torch", "torchmetrics"]
LEAVES = [f"kljax.compat.{system}" for system in SYSTEMS]
LEAVES += ["kljax.metrics.nnx", "kljax.metrics", "kljax.training"]
FAMILIES = ["categorical", "binomial", "geometric", "bernoulli", "beta", "dirichlet", "exponential"]
FAMILIES += ["gamma", "gumbel", "laplace", "log_normal", "multivariate_normal", "normal"]
FAMILIES += ["poisson", "uniform", "von_mises", "_math"]

# From the top to the bottom: a module imports only those below it.
ORDER = [
    "kljax.__main__",
    *LEAVES,
    "kljax.compat._elements",
    "kljax.compat._checks",
    "kljax.compat",
    "kljax",
    "kljax.latents",
    "kljax.families",
    *(f"kljax.families.{family}" for family in FAMILIES),
    "kljax.mixtures",
    "kljax.estimators",
    "kljax.objectives",
    "kljax.divergences",
    "kljax._making",
    "kljax._options",
    "kljax.sparse",
    "kljax._pipeline",
    "kljax._closed_forms",
    "kljax._reading",
    "kljax.reduction",
    "kljax.distributions",
    "kljax.distributions.top_k",
    "kljax.distributions.head",
    "kljax.distributions.labels",
    "kljax.distributions.arrays",
    "kljax.distributions._pytree",
    "kljax._engine.captures",
    "kljax._engine.blockwise",
    "kljax._engine.devices",
    "kljax._engine.paths",
    "kljax._engine.loss",
    "kljax._engine.picks",
    "kljax._engine.linear",
    "kljax._engine.blocks",
    "kljax._engine.rows",
    "kljax._engine.formula",
    "kljax._engine.side",
    "kljax._engine.value_checks",
    "kljax._engine.checks",
    "kljax._engine.pairs",
    "kljax._engine.classes",
    "kljax._engine.states",
    "kljax._engine.lowering",
    "kljax._engine.meshes",
    "kljax._engine.primitives",
    "kljax._engine.terms",
    "kljax._engine",
]


def modules():
    for path in ROOT.rglob("*.py"):
        name = ".".join(("kljax", *path.relative_to(ROOT).with_suffix("").parts))
        yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def for_type_checkers(tree):
    return [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    ]


def imported(tree):
    skipped = for_type_checkers(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in ORDER else node.module


def test_imports_point_downwards():
    """No module imports one above it, and every module has its place."""
    found = dict(modules())
    assert sorted(found) == sorted(ORDER)
    for name, tree in found.items():
        for other in imported(tree):
            if other.startswith("kljax"):
                assert ORDER.index(other) > ORDER.index(name), f"{name} imports {other}"


def test_only_checks_raises():
    """Input errors come from one place."""
    for name, tree in modules():
        raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        if name in ("kljax", "kljax.compat"):  # of submodules that there are not
            raises = [node for node in raises if "AttributeError" not in ast.unparse(node)]
        assert not raises or name in ("kljax._engine.checks", "kljax.compat._checks"), name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_short_and_whole(name):
    """`help` shows every option by its name, and each is described."""
    function = FUNCTIONS[name]
    signature = inspect.signature(function)
    assert "options" not in signature.parameters
    described = f"{function.__doc__}{kljax.forward_kl.__doc__}"
    for option in signature.parameters.values():
        assert option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD)
        if option.kind is option.KEYWORD_ONLY:
            assert re.search(rf"^ *{option.name}: ", described, re.MULTILINE), option
    if "implementation" in signature.parameters:
        assert len(str(signature)) < 480
        assert "class_axis_name=None" in str(signature)


def test_options_are_declared_for_type_checkers_as_they_are_taken():
    assert sorted(Options.__annotations__) == sorted(OPTIONS)


def test_leaves_are_imported_by_nobody():
    """But for the state that the NNX metric wraps."""
    for name, tree in modules():
        leaves = [other for other in imported(tree) if other in LEAVES]
        assert leaves == (["kljax.metrics"] if name == "kljax.metrics.nnx" else []), name


def test_import_loads_neither_flax_nor_optax_nor_pallas():
    """`import kljax` stays light, in a fresh interpreter, and so do the leaves but for Flax's."""
    light = {*LEAVES, "kljax.families"} - {"kljax.metrics.nnx", "kljax.training"}
    code = (
        "import sys, kljax; heavy = {'flax', 'optax', 'torch', 'torchmetrics', 'keras'}; "
        "lazy = kljax._LAZY; "
        "found = lambda: [m for m in sys.modules if m.split('.')[0] in heavy or 'pallas' in m]; "
        "leaves = [m for m in sys.modules if m.startswith(tuple(f'kljax.{x}' for x in lazy))]; "
        f"print(found(), leaves); import {', '.join(light)}; print(found())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[] []", "[]"]


@pytest.mark.parametrize(
    "call", ["kl(x, 2 * x)", "kl(x, Head(x, x.T @ x), implementation=Chunked(2))"]
)
def test_the_first_call_in_a_process_compiles_once(call):
    """What is imported while a function is traced must not change what JAX keys it by.

    If it fails at an import, `kljax/_engine/primitives.py` reads what JAX has moved.
    """
    code = (
        "import jax, jax.numpy as jnp; from kljax import Chunked, Head, kl; "
        f"f = jax.jit(jax.grad(lambda x: ({call}).sum())); "
        "x = jnp.ones((4, 5)); f(x); f(x); print(f._cache_size())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


for leaf in LEAVES:
    if leaf != "kljax.metrics.nnx" or importlib.util.find_spec("flax"):
        for name, one in vars(importlib.import_module(leaf)).items():
            if not name.startswith("_") and getattr(one, "__module__", None) == leaf:
                kind = CLASSES if inspect.isclass(one) else FUNCTIONS
                if callable(one):
                    kind[f"{leaf}.{name}"] = one


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("checked", "value_checks")])
def test_public_functions_are_documented(name):
    """One line, formula, shapes, units, zeros, gradients, example that runs, source."""
    doc = inspect.getdoc(FUNCTIONS[name])
    assert re.match(r"[^\n]+\.\n", doc), "one line, ending in a full stop"
    assert ".. math::" in doc
    parts = ["Shapes", "nits", "Zeros:", "Gradients:", "Source:"]
    if name == "reduce":  # the values keep their units
        parts.remove("nits")
    for part in parts:
        assert part in doc, part
    examples = doctest.DocTestParser().get_examples(doc)
    assert examples, "an example"
    assert any(example.want for example in examples)


@pytest.mark.parametrize("name", CLASSES)
def test_public_classes_are_documented(name):
    """At least what it holds."""
    assert len(inspect.getdoc(CLASSES[name])) > 60


def test_public_names_are_on_the_site():
    """Every public name, of submodules too, has its place in the reference."""
    pages = "\n".join(p.read_text() for p in (ROOT.parent / "docs" / "api").glob("*.md"))
    for module in ("kljax", "kljax.families", *LEAVES):
        for name, one in vars(importlib.import_module(module)).items():
            ours = getattr(one, "__module__", "").startswith(module) and not name.startswith("_")
            if ours and (inspect.isclass(one) or inspect.isfunction(one)):
                assert re.search(rf":: {name}$", pages, re.MULTILINE), f"{module}.{name}"


def test_one_version():
    """Of the package, its citation and its changelog."""
    top = ROOT.parent
    version = re.search(r'^version = "(.+)"$', (top / "pyproject.toml").read_text(), re.MULTILINE)[
        1
    ]
    assert f"\nversion: {version}\n" in (top / "CITATION.cff").read_text()
    assert f"\n## {version}, " in (top / "CHANGELOG.md").read_text()


def test_typed():
    """The types are published."""
    assert (ROOT / "py.typed").exists()
    assert importlib.import_module("kljax").__version__


def test_submodules_load_when_they_are_asked_for():
    code = (
        "import sys, kljax; print('kljax.metrics' in sys.modules, 'metrics' in dir(kljax)); "
        "print(kljax.metrics.__name__, kljax.compat.torch.__name__, hasattr(kljax, 'nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False True", "kljax.metrics kljax.compat.torch False"]
