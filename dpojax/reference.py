"""The frozen reference: an argument of the step, never its state.

It is not differentiated, not donated and not checkpointed. Today it is parameters in
memory; this file knows nothing of losses or steps.
"""

from typing import Any

import jax
import jax.numpy as jnp

Params = Any


def copy_params(params: Params) -> Params:
    """A copy with the same shardings.

    The step donates the policy's buffers; a reference that shared them would be deleted
    with the first update.
    """
    return jax.tree.map(jnp.copy, params)
