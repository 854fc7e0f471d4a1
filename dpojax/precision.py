"""How exact a matrix product is: the rule of every product that is not a layer's own.

Accelerators multiply float32 in fewer bits unless told otherwise, and a backward pass
is traced outside of any context that tells them. This file knows dtypes only.
"""

from typing import Any

import jax
import jax.numpy as jnp


def precision_of(dtype: Any) -> jax.lax.Precision | None:
    """A float32 model gets a true float32 product on every chip."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
