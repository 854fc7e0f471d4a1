"""Which attention kernel a model uses over whole rows.

One that cannot serve a machine or a model is refused, never replaced. This file knows
kernels by name; what each computes is its own file's.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
from jaxtyping import Array

from dpojax.models.attention import Window
from dpojax.models.blockwise import blockwise_attention
from dpojax.models.cudnn import cudnn_attention
from dpojax.models.flash import LARGEST_DIMENSION, flash_attention
from dpojax.models.linear import Attend

Kernel = Literal["xla", "flash", "cudnn"]
KernelChoice = Literal["auto", "xla", "flash", "cudnn"]
_BACKENDS = {"flash": "tpu", "cudnn": "gpu"}
_FUNCTIONS: dict[Kernel, Attend] = {"flash": flash_attention, "cudnn": cudnn_attention}


def choose_kernel(
    choice: KernelChoice,
    head_dimension: int,
    platform: str | None = None,
    num_contexts: int = 1,
) -> Kernel:
    """The kernel of that name; ``auto``: flash on TPUs where it can, elsewhere XLA's.

    Args:
      choice: its name.
      head_dimension: of the model.
      platform: of the devices that compute; None: those that are there.
      num_contexts: parts into which a row's positions are divided.

    Raises:
      ValueError: for a kernel of another kind of machine, or that needs whole rows.
    """
    if num_contexts > 1:
        if choice not in ("auto", "xla"):
            raise ValueError(
                f"--attention {choice} needs whole rows, and --mesh.context "
                f"{num_contexts} divides them; leave one of the two out."
            )
        return "xla"
    backend = platform or jax.default_backend()
    if choice == "auto":
        can = backend == "tpu" and head_dimension <= LARGEST_DIMENSION
        return "flash" if can else "xla"
    if choice != "xla" and _BACKENDS[choice] != backend:
        raise ValueError(
            f"--attention {choice} needs a {_BACKENDS[choice].upper()}, and this is a "
            f"{backend.upper()}; leave it out, or choose xla."
        )
    return choice


def make_attend(
    kernel: Kernel,
    by_shard: Callable[[Attend], Attend] = lambda attend: attend,
    by_context: Callable[[Attend], Attend] = lambda attend: attend,
) -> Attend:
    """A model's attention over whole rows.

    Args:
      kernel: its name.
      by_shard: makes kernels, which XLA does not divide, be computed by each shard of
        rows and heads for itself.
      by_context: makes XLA's attention be computed by each part of a row for itself.
    """
    if kernel == "xla":
        return by_context(blockwise_attention)
    function = _FUNCTIONS[kernel]

    def attend(
        *arrays: Array, window: Window | None, scale: float | None, cap: float | None
    ) -> Array:
        fixed = partial(function, scale=scale, cap=cap)
        return by_shard(fixed)(*arrays, window=window)

    return attend
