"""How exact numbers are: what float32 holds, and how its matrix products are taken.

Accelerators multiply float32 in fewer bits unless told otherwise, and a backward pass
is traced outside of any context that tells them. This file knows dtypes only.
"""

from typing import Any

import jax
import jax.numpy as jnp

# What is given in more bits must be neither infinite nor 0 in these.
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4e38, 1e-37


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """A float32 model gets a true float32 product on every chip."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
