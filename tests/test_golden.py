"""The golden values are what the systems' own packages compute, where these are installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import tol

FOLDER = Path(__file__).parent / "golden"


def split(x):
    """All numbers of nested lists and dictionaries, in order, and all else."""
    if isinstance(x, int | float) and not isinstance(x, bool):
        return [x], []
    if not isinstance(x, list | dict):
        return [], [x]
    numbers, rest = [], [len(x), *(x if isinstance(x, dict) else ())]
    for one in x.values() if isinstance(x, dict) else x:
        more_numbers, more_rest = split(one)
        numbers += more_numbers
        rest += more_rest
    return numbers, rest


def coarsest(case):
    """The arithmetic of 16 bits may be reordered by a release."""
    dtypes = [*case.get("dtypes", ()), case.get("input dtype", "float64")]
    return max(dtypes, key=lambda dtype: tol(dtype)["rtol"])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["torch", "torchmetrics", "optax", "keras", "gluon"])
def test_goldens_are_the_system_s(system, tmp_path):
    """Made anew, they are the committed ones."""
    if system != "gluon" and importlib.util.find_spec(system) is None:
        pytest.skip(f"{system} is not installed")
    command = [sys.executable, str(FOLDER / "make.py"), system, "--output", str(tmp_path)]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    made, kept = (
        json.loads((folder / f"{system}.json").read_text())["cases"]
        for folder in (tmp_path, FOLDER)
    )
    assert len(made) == len(kept)
    for one, other in zip(made, kept, strict=True):
        (numbers, rest), (want, known) = split(one), split(other)
        assert rest == known
        np.testing.assert_allclose(numbers, want, **tol(coarsest(other)))
