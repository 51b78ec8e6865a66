"""Every Python block of the README and of the site's pages runs, page by page and in order."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))])
BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(page):
    """As a newcomer pastes them, one after another."""
    names = {"__name__": page}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in BLOCKS.findall((ROOT / page).read_text()):
            if not block.startswith("# needs"):
                exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS.search((ROOT / page).read_text())])
def test_the_code_runs(page, capsys):
    run(page)
    assert "nan" not in capsys.readouterr().out
