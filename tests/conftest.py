"""Tests see what users run: float32 unless a test asks for float64, and no silent promotion.

`pytest` runs a fast set over every module and every path; `pytest --rest` all that is marked slow.
"""

from functools import partial

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--rest", action="store_true", help="run the slow tests, and only those")
    parser.addoption(
        "--as-on", choices=["tpu", "cuda"], help="take each platform's choice as there, and run it"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow(but=()): one of the rest; but for cases so named")
    if platform := config.getoption("--as-on"):
        jax.lax.platform_dependent = partial(chosen, platform)


def chosen(platform, *operands, default=None, **branches):
    """What `lax.platform_dependent` would choose on a platform that is not here."""
    return branches.get(platform, default)(*operands)


def pytest_collection_modifyitems(config, items):
    kept, others = [], []
    for item in items:
        (kept if is_slow(item) == config.getoption("rest") else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def is_slow(item):
    mark = item.get_closest_marker("slow")
    return mark is not None and not any(f"[{case}]" in item.name for case in but(mark))


def but(mark):
    return mark.kwargs.get("but", ())


@pytest.fixture
def x64():
    """float64 arrays within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)
