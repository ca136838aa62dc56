"""Which of weights, activations and attention costs what: one of them at few bits, the others at 8.

python experiments/operands_shapes.py --work=DIR [--only=...] [--minutes=M] [--list]

LSQ students of both families on the embedded set, by the quickstart's schedule.
"""

from __future__ import annotations

from collections.abc import Iterator

from shapes_rows import FAMILIES, student
from study import Row, run_study


def policies() -> Iterator[tuple[int, str, str]]:
    """(bits, of what, policy)."""
    yield 8, "nothing", "w8a8"
    for bits in (4, 2):
        yield bits, f"weights {bits}", f"w{bits}a8-attn8"
        yield bits, f"activations {bits}", f"w8a{bits}-attn8"
        yield bits, f"attention {bits}", f"w8a8-attn{bits}"
        yield bits, f"weights and activations {bits}", f"w{bits}a{bits}-attn8"


def rows() -> Iterator[Row]:
    """By family, then by policy."""
    for family in FAMILIES:
        for bits, what, policy in policies():
            facts = {"method": what, "policy": policy}
            words = (f"quant.policy={policy}",)
            yield student(f"{family}_{policy}", family, "lsq", words, facts, bits=bits)


if __name__ == "__main__":
    run_study("operands_shapes", rows(), __doc__.splitlines()[0])
