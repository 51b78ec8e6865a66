"""Tests see what users run: float32 unless a test asks for float64, and no silent promotion.

`pytest` runs a fast set over every module and every path; `pytest --rest` all that is marked slow;
`pytest --aot v5e` what the TPU's compiler makes of it, `--aot H200` what NVIDIA's does.
`--as-on tpu` takes the choices that are made on that platform, and runs them here. `--every 2` runs
half of what is asked for, chosen by the tests' names. `--unoptimized` compiles in less time than
for users, but for those tests that are about numbers, memory or long runs.
"""

import os
import zlib
from functools import partial

import jax
import numpy as np
import pytest

from kljax._engine import lowering

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--rest", action="store_true", help="run the slow tests, and only those")
    parser.addoption(
        "--aot", help="run the tests that compile for this accelerator, and only those"
    )
    parser.addoption(
        "--every", type=int, default=1, help="run one of n of these tests, by its name"
    )
    parser.addoption("--unoptimized", action="store_true", help="compile in less time")
    parser.addoption(
        "--as-on", choices=["tpu", "cuda"], help="take each platform's choice as there, and run it"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow(but=()): one of the rest; but for cases so named")
    config.addinivalue_line("markers", "aot: compiles for an accelerator that need not be here")
    optimize(not config.getoption("--unoptimized"))
    if platform := config.getoption("--as-on"):
        jax.lax.platform_dependent = partial(chosen, platform)
        lowering._platforms = lambda ctx: (platform,)


def chosen(platform, *operands, default=None, **branches):
    """What `lax.platform_dependent` would choose on a platform that is not here."""
    return branches.get(platform, default)(*operands)


def pytest_collection_modifyitems(config, items):
    kept, others = [], []
    for item in items:
        asked = config.getoption("--aot") is not None, config.getoption("rest")
        is_aot = item.get_closest_marker("aot") is not None
        (kept if (is_aot, is_slow(item)) == asked else others).append(item)
    every = config.getoption("every")
    by_name = {item: zlib.crc32(item.nodeid.encode()) % every for item in kept}
    others += [item for item in kept if by_name[item]]
    kept = [item for item in kept if not by_name[item]]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept


def is_slow(item):
    mark = item.get_closest_marker("slow")
    return mark is not None and not any(f"[{case}]" in item.name for case in but(mark))


def but(mark):
    return mark.kwargs.get("but", ())


def optimize(on):
    """Also in the processes that a test starts."""
    jax.config.update("jax_disable_most_optimizations", not on)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(not on)


@pytest.fixture
def optimized(request):
    """Programs compiled as users compile them."""
    optimize(True)
    yield
    optimize(not request.config.getoption("--unoptimized"))


@pytest.fixture
def x64():
    """float64 arrays within one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)
