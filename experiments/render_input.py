"""Figures of docs/data.md from what ``input_pipeline.py`` wrote."""

from __future__ import annotations

import statistics
from typing import Any

import render_tpu
from results_files import short

HOST_CHIPS = 4
"""Chips of a host in a slice of several, of v5e, v6e and v5p alike."""
VCPUS = {"v5e": 112}
"""Of such a host (machine type ct5lp-hightpu-4t), where it was looked up."""
SIDES = {
    "ours": "this program, COCO folder",
    "ours_records": "this program, records of `prepare-data`",
    "tensor_uint8": "torchvision v2, tensors of bytes",
    "pil_uint8": "torchvision v2, Pillow's images, bytes",
    "pil_float": "torchvision v2, Pillow's images, floats (DETR's original)",
}


def input_text(result: dict[str, Any] | None, plan: list[dict[str, Any]] | None) -> str:
    """What a core reads, and how many of them a host's chips ask for at most."""
    command = "`python experiments/input_pipeline.py`"
    if result is None:
        return f"{command}: {render_tpu.NOT_RUN}."
    lines = [
        "| pipeline | images/s a core | CPU ms an image | theirs / ours |",
        "|---|---|---|---|",
    ]
    for name, title in SIDES.items():
        if row := result["sides"].get(name):
            took = statistics.median(row["cpu_milliseconds_an_image"])
            ratio = f"{row['theirs_by_ours']:.2f}"
            lines.append(f"| {title} | {row['images_a_second']:.0f} | {took:.1f} | {ratio} |")
    other = result["versions_of_theirs"] or {}
    torch = ", ".join(f"{name} {version}" for name, version in other.items())
    lines += ["", f"{command}: {result['images']}; {torch}; commit `{short(result['commit'])}`."]
    if plan:
        rate = result["sides"]["ours_records"]["images_a_second"]
        lines += [
            "",
            "Cores that a host's chips ask for at most, by the step's upper bound in "
            "[plan.md](plan.md):",
            "",
            "| config | slice | chips a host | images/s a host at most | cores | vCPUs there |",
            "|---|---|---|---|---|---|",
        ]
        for row in sorted(plan, key=lambda x: (x["given"], x["chips"], x["topology"])):
            kind = row["topology"].partition(":")[0]
            if row["chips"] <= HOST_CHIPS:
                continue
            there = VCPUS.get(kind, "–")
            images = HOST_CHIPS * render_tpu.chip_rate(row)
            lines.append(
                f"| `{row['given']}` | {row['topology']} | {HOST_CHIPS} | {images:.0f} | "
                f"{images / rate:.1f} | {there} |"
            )
    return "\n".join(lines)
