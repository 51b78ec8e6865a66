"""JAX's class of primitives, from where it lies within JAX.

Its public place, `jax.extend.core`, loads Pallas: at import that is half a second, and while a
function is traced it changes what JAX keys its traces by, so that all is traced and compiled again.
"""

from typing import Any

from jax._src.core import Primitive


def of_many_results(name: str) -> Any:
    primitive = Primitive(name)
    primitive.multiple_results = True
    return primitive
