"""All figures of one step: compiled where it is for a TPU, estimated for a GPU."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh

from dpojax.flops import num_positions
from dpojax.losses.make import Loss
from dpojax.models.families import aux_loss_coefficient
from dpojax.models.kernels import Kernel, choose_kernel
from dpojax.planning.analytic import (
    Setting,
    argument_bytes,
    computed_flops,
    estimate,
    model_flops,
)
from dpojax.planning.chips import Slice
from dpojax.planning.figures import (
    Figures,
    memory_figures,
    roofline_figures,
    speed_figures,
)
from dpojax.planning.roofline import Roofline, make_roofline, speed_at
from dpojax.planning.rows import Rows, num_steps
from dpojax.planning.search import Sizes
from dpojax.planning.step import Planned, TooLarge, argument_buffers, compile_step
from dpojax.run_log import num_parameters
from dpojax.sharding import AXES


class ByHand(NamedTuple):
    """Of one chip, before anything is compiled."""

    arguments: float  # bytes
    flops: float
    model_flops: float


def by_hand(planned: Planned, loss: Loss, sizes: Sizes) -> ByHand:
    """What is known of a step without a compiler."""
    setting, config = setting_of(planned, loss), planned.loaded.model.config
    chips = math.prod(sizes)
    mesh = AbstractMesh(sizes, AXES)
    return ByHand(
        argument_bytes(planned, mesh),
        computed_flops(config, planned.batch, setting) / chips,
        model_flops(config, planned.batch, setting) / chips,
    )


def setting_of(planned: Planned, loss: Loss) -> Setting:
    """What of a step is computed twice."""
    config, lora = planned.config, planned.loaded.model.lora
    whole = loss.batchwise or aux_loss_coefficient(planned.loaded.settings) != 0
    trained, num_layers = planned.policy.trained, planned.loaded.model.config.num_layers
    assert config.remat is not None
    return Setting(
        config.remat,
        _kernel(planned),
        "reference" in loss.needs and planned.batch.reference is None,
        None if lora is None else num_parameters(trained),
        whole and config.microbatches > 1,
        0 if lora is None else lora.trunk(num_layers),
    )


def roofline_of(
    wanted: Slice, flops: float, memory_bytes: float, sent_bytes: Mapping[str, float]
) -> Roofline:
    """Of one chip of a slice; what it sends by the kind of collective."""
    return make_roofline(
        flops=flops,
        memory_bytes=memory_bytes,
        sent_bytes=math.fsum(sent_bytes.values()),
        peak_flops=wanted.chip.flops,
        memory_speed=wanted.chip.memory_speed,
        interconnect_speed=wanted.interconnect_speed,
    )


def account(
    wanted: Slice, loss: Loss, planned: Planned, sizes: Sizes, rows: Rows
) -> Figures:
    """Every figure of a step that was computed; of GPUs those that are estimated.

    Args:
      wanted: the chips.
      loss: the objective.
      planned: the step.
      sizes: of the mesh.
      rows: the examples.
    """
    figures = _about(wanted, planned, sizes, rows)
    hand = by_hand(planned, loss, sizes)
    if wanted.chip.kind == "gpu":
        found = _estimated(wanted, loss, planned, sizes, hand)
    else:
        found = _compiled(wanted, planned, hand)
    figures |= found
    if figures["fits"]:
        figures |= _times(wanted, planned, rows, figures)
    return figures


def _about(wanted: Slice, planned: Planned, sizes: Sizes, rows: Rows) -> Figures:
    config, batch = planned.config, planned.batch
    every = num_parameters(planned.loaded.params)
    return {
        "is_estimate": wanted.chip.kind == "gpu",
        "topology": wanted.name,
        "chips": wanted.num_chips,
        "model": config.model or config.shape.name,
        "parameters": every,
        "trained_parameters": num_parameters(planned.policy.trained),
        "loss": config.loss.name,
        "mesh": dict(zip(AXES, sizes, strict=True)),
        "step": {
            "examples": config.batch_size,
            "source": rows.source,
            "rows": len(batch.tokens),
            "row_length": batch.tokens.shape[1],
            "padding": 1 - num_positions(batch) / np.size(batch.tokens),
            "remat": config.remat,
            "microbatches": config.microbatches,
            "attention": _kernel(planned),
            "compute_dtype": config.compute_dtype,
        },
    }


def _compiled(wanted: Slice, planned: Planned, hand: ByHand) -> Figures:
    compiled = compile_step(planned)
    chip = wanted.chip
    arguments = argument_buffers(planned)[:5]
    if isinstance(compiled, TooLarge):
        memory: Figures = {
            "arguments_bytes": hand.arguments,
            "chip_bytes": chip.memory,
            "largest_arguments": [buffer._asdict() for buffer in arguments],
        }
        return {"fits": False, "reason": compiled.reason, "memory": memory}
    counts = compiled.counts
    flops = {"per_chip": compiled.flops, "by_hand_per_chip": hand.flops}
    notes = []
    if compiled.flash_flops:
        flops["flash_kernels_per_chip"] = compiled.flash_flops
        notes.append(
            "The compiler does not see into the flash kernels: their FLOPs are counted "
            "from the blocks that these rows' mask leaves, their traffic as each "
            "array once."
        )
    roofline = roofline_of(
        wanted, compiled.flops, counts.memory_bytes, counts.sent_bytes
    )
    memory = memory_figures(
        compiled.memory, chip.memory, arguments, compiled.temporaries
    )
    return {
        "fits": True,
        "memory": memory,
        "flops": flops | {"model_per_chip": hand.model_flops},
        "memory_traffic_bytes": counts.memory_bytes,
        "host_traffic_bytes": counts.host_bytes,
        "interconnect": {
            kind: {"bytes": size, "number": counts.num_sent[kind]}
            for kind, size in sorted(counts.sent_bytes.items())
        },
        "roofline": roofline_figures(roofline),
        "notes": notes,
    }


def _estimated(
    wanted: Slice, loss: Loss, planned: Planned, sizes: Sizes, hand: ByHand
) -> Figures:
    chip, setting = wanted.chip, setting_of(planned, loss)
    found = estimate(planned, setting, AbstractMesh(sizes, AXES))
    peak = found.arguments + found.temporaries
    memory = {
        "arguments_bytes": found.arguments,
        "temporaries_bytes": found.temporaries,
        "peak_bytes": peak,
        "chip_bytes": chip.memory,
    }
    if peak > chip.memory:
        return {"fits": False, "memory": memory}
    roofline = roofline_of(wanted, hand.flops, found.memory_bytes, found.sent_bytes)
    return {
        "fits": True,
        "memory": memory,
        "flops": {"per_chip": hand.flops, "model_per_chip": hand.model_flops},
        "memory_traffic_bytes": found.memory_bytes,
        "interconnect": {
            kind: {"bytes": size} for kind, size in sorted(found.sent_bytes.items())
        },
        "roofline": roofline_figures(roofline),
        "notes": [
            "Nothing was compiled: arguments are exact, everything else of a GPU is an "
            "estimate by hand."
        ],
    }


def _times(
    wanted: Slice, planned: Planned, rows: Rows, figures: Figures
) -> dict[str, Any]:
    chip, chips = wanted.chip, wanted.num_chips
    terms = [figures["roofline"][f"{name}_seconds"] for name in _TERMS]
    steps = num_steps(planned.config, rows)
    speeds = [
        speed_at(
            efficiency,
            Roofline(*terms),
            tokens=num_positions(planned.batch),
            model_flops=figures["flops"]["model_per_chip"] * chips,
            peak_flops=chip.flops * chips,
        )
        for efficiency in planned.config.efficiency
    ]
    found: Figures = {"speeds": speed_figures(speeds, chips, steps)}
    return found if steps is None else found | {"steps": steps}


_TERMS = ("compute", "memory", "interconnect")


def _kernel(planned: Planned) -> Kernel:
    config = planned.config
    platform = planned.mesh.devices.flat[0].platform
    if config.attention == "cudnn":
        return "cudnn"
    dimension = planned.loaded.model.config.head_dimension
    return choose_kernel(config.attention, dimension, platform)
