"""The one place for tolerances."""

import jax.numpy as jnp
import numpy as np

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
