"""What a plan tells, as one dictionary and as tables.

What was not computed is not in it. This file computes no costs.
"""

from collections.abc import Sequence
from typing import Any

from dpojax.planning.roofline import Roofline, Speed
from dpojax.planning.step import Buffer, Memory
from dpojax.progress import say, show_table

Figures = dict[str, Any]
_GIB = 2**30


def memory_figures(
    memory: Memory, chip_memory: float, arguments: Sequence[Buffer],
    temporaries: Sequence[Buffer],
) -> Figures:  # fmt: skip
    """Of one chip."""
    return {
        "arguments_bytes": memory.arguments,
        "outputs_bytes": memory.outputs,
        "aliased_bytes": memory.aliased,
        "temporaries_bytes": memory.temporaries,
        "peak_bytes": memory.peak,
        "chip_bytes": chip_memory,
        "largest_arguments": [buffer._asdict() for buffer in arguments],
        "largest_temporaries": [buffer._asdict() for buffer in temporaries],
    }


def roofline_figures(roofline: Roofline) -> Figures:
    """Seconds by term, and which one it is."""
    return {
        "compute_seconds": roofline.compute,
        "memory_seconds": roofline.memory,
        "interconnect_seconds": roofline.interconnect,
        "seconds": roofline.seconds,
        "bound": roofline.bound,
    }


def speed_figures(
    speeds: Sequence[Speed], num_chips: int, num_steps: int | None
) -> list[Figures]:
    """Times at each efficiency; hours where the run's length is known."""
    found = []
    for speed in speeds:
        figures = dict(speed._asdict())
        if num_steps is not None:
            hours = num_steps * speed.step_seconds / 3600
            figures |= {"hours": hours, "chip_hours": hours * num_chips}
        found.append(figures)
    return found


def show(figures: Figures) -> None:
    """Prints tables of a plan."""
    step = figures["step"]
    estimated = "estimate: " if figures["is_estimate"] else ""
    title = (
        f"{estimated}{figures['loss']} of {figures['model']}, "
        f"{figures['parameters']:,} parameters, on {figures['topology']}, "
        f"{figures['chips']} chips, mesh {_mesh(figures['mesh'])}"
    )
    show_table(title, ("", ""), [*_step_rows(step), *_memory_rows(figures)])
    if not figures["fits"]:
        return
    show_table(f"{estimated}a step of one chip", ("", ""), _work_rows(figures))
    columns = ["share of the roofline's speed"]
    rows = [["seconds a step"], ["tokens/s"], ["model FLOPs utilisation"]]
    if "steps" in figures:
        rows += [[f"hours of {figures['steps']:,} steps"], ["chip-hours"]]
    for speed in figures["speeds"]:
        columns.append(f"{speed['efficiency']:.0%}")
        values = [
            f"{speed['step_seconds']:.4g}",
            f"{speed['tokens_per_second']:,.0f}",
            f"{speed['flops_utilization']:.1%}",
        ]
        if "steps" in figures:
            values += [f"{speed['hours']:.3g}", f"{speed['chip_hours']:,.4g}"]
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    show_table(f"{estimated}the whole slice", columns, rows)
    for note in figures["notes"]:
        say(note)


def gib(size: float) -> str:
    """Bytes as people read them."""
    return f"{size / _GIB:.2f} GiB" if size >= _GIB / 100 else f"{size / 2**20:.2f} MiB"


def _mesh(mesh: Figures) -> str:
    return ", ".join(f"{name} {size}" for name, size in mesh.items() if size > 1) or "1"


def _step_rows(step: Figures) -> list[tuple[str, str]]:
    return [
        ("rows", f"{step['rows']:,} of {step['row_length']:,} positions"),
        ("examples, of", f"{step['examples']:,}, {step['source']}"),
        ("padding", f"{step['padding']:.1%}"),
        ("recomputed, microbatches", f"{step['remat']}, {step['microbatches']}"),
        ("attention, dtype", f"{step['attention']}, {step['compute_dtype']}"),
    ]


def _memory_rows(figures: Figures) -> list[tuple[str, str]]:
    memory, fits = figures["memory"], figures["fits"]
    rows = [("fits a chip", "yes" if fits else "NO")]
    if "reason" in figures:
        rows.append(("the compiler says", figures["reason"]))
    if "arguments_bytes" in memory:
        rows.append(("arguments", gib(memory["arguments_bytes"])))
    if "temporaries_bytes" in memory:
        rows.append(("temporaries", gib(memory["temporaries_bytes"])))
    if "peak_bytes" in memory:
        peak, chip = memory["peak_bytes"], memory["chip_bytes"]
        rows.append(("peak, of a chip's", f"{gib(peak)} of {gib(chip)}"))
    for name in ("arguments", "temporaries"):
        for number, buffer in enumerate(memory.get(f"largest_{name}", [])):
            label = f"largest {name}" if number == 0 else ""
            rows.append((label, f"{gib(buffer['bytes'])} {buffer['what']}"))
    return rows


def _work_rows(figures: Figures) -> list[tuple[str, str]]:
    flops, roofline = figures["flops"], figures["roofline"]
    rows = [("FLOPs of products", _tera(flops["per_chip"]))]
    if "flash_kernels_per_chip" in flops:
        rows.append(("of these, flash kernels", _tera(flops["flash_kernels_per_chip"])))
    if "by_hand_per_chip" in flops:
        by_hand = flops["by_hand_per_chip"]
        apart = flops["per_chip"] / by_hand - 1
        rows.append(("counted by hand", f"{_tera(by_hand)} ({apart:+.1%})"))
    rows.append(("of these the result needs", _tera(flops["model_per_chip"])))
    rows.append(("memory read and written", gib(figures["memory_traffic_bytes"])))
    if figures.get("host_traffic_bytes"):
        rows.append(("to and from the host", gib(figures["host_traffic_bytes"])))
    for kind, sent in figures["interconnect"].items():
        times = f" in {sent['number']:,.0f}" if "number" in sent else ""
        rows.append((f"sent: {kind}", f"{gib(sent['bytes'])}{times}"))
    for term in ("compute", "memory", "interconnect"):
        mark = "  <- bound" if roofline["bound"] == term else ""
        rows.append((f"roofline: {term}", f"{roofline[f'{term}_seconds']:.4g} s{mark}"))
    return rows


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g} TFLOP"
