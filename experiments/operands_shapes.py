"""Which of weights, activations and attention costs what: one of them at few bits, the others at 8.

python experiments/operands_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

LSQ students of both families on the embedded set, by the quickstart's schedule.
"""

from __future__ import annotations

from collections.abc import Iterator

from study import Row, run_study

FAMILIES = {"detr": "", "deformable": "deformable-"}


def policies() -> Iterator[tuple[str, str]]:
    """(what is at few bits, policy)."""
    yield "nothing", "w8a8"
    for bits in (4, 2):
        yield f"weights {bits}", f"w{bits}a8-attn8"
        yield f"activations {bits}", f"w8a{bits}-attn8"
        yield f"attention {bits}", f"w8a8-attn{bits}"
        yield f"weights and activations {bits}", f"w{bits}a{bits}-attn8"


def rows() -> Iterator[Row]:
    """By family, then by policy."""
    for family, prefix in FAMILIES.items():
        for what, policy in policies():
            yield Row(
                f"{family}_{policy}",
                f"configs/shapes_quickstart.py:{prefix}lsq",
                "train",
                (f"quant.policy={policy}",),
                {"family": family, "method": what, "policy": policy, "seed": 0},
            )


if __name__ == "__main__":
    run_study("operands_shapes", rows(), __doc__.splitlines()[0])
