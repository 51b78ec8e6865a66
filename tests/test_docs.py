"""Every Python block of the README and of the site's pages runs, page by page and in order."""

import importlib.util
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
OUTPUT = re.compile(r"```text\n(.*?)```", re.DOTALL)
BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)
OPTIONAL = {"clu", "equinox"}  # what blocks may need that the tests do not install
PAGES = {path: path.read_text() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
WITH_CODE = [path.name for path, text in PAGES.items() if BLOCKS.search(text)]


@pytest.mark.slow(but=["README.md"])
@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_runs(name, capsys):
    """As a newcomer pastes them, one after another."""
    (path,) = (path for path in PAGES if path.name == name)
    names = {"__name__": name}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCKS.findall(PAGES[path]):
            needed = OPTIONAL & set(re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE))
            if all(map(importlib.util.find_spec, needed)):
                exec(compile(block, name, "exec"), names)
    printed = capsys.readouterr().out
    assert "nan" not in printed
    if jax.default_backend() == "cpu":  # elsewhere the last digits are others
        for shown in OUTPUT.findall(PAGES[path]):
            assert shown in printed


def test_the_readme_fits_one_page():
    assert len(PAGES[ROOT / "README.md"].split()) <= 700


def test_links_between_pages_and_to_figures():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
