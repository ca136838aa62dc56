"""Our steps and forward pass beside PyTorch's and ONNX Runtime's, on this CPU, in one run.

PYTHONPATH=experiments python -m outside [--outside=PYTHON] [--rounds=5] [--only=detr_step,...]
    [--out=FILE]

Two processes a case, alive throughout, compute in turn; ratios are medians over rounds of theirs
over ours, of CPU-seconds (which other programs disturb little) and of wall time: above 1, ours is
the faster. Keeps its rows in the file that ``experiments/step_time.py`` writes, under "outside".
``PYTHON`` has torch, transformers and onnxruntime; without them nothing is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from aqdetr_jax.io import read_json, write_json_atomic
from aqdetr_jax.provenance import git_commit
from outside.cases import CASES, ROOT
from outside.compare import PARITY, ROUNDS, compare


def main() -> int:
    """Measures and keeps; 1 where it cannot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outside", default=str(PARITY), metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between them")
    parser.add_argument("--out", default=str(ROOT / "experiments/results/step_time.json"))
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}; one of {', '.join(CASES)}")
    found = compare(options.outside, options.rounds, names)
    if "skipped" in found:
        print(f"not measured: {found['skipped']}", file=sys.stderr)
        return 1
    out = Path(options.out)
    result = read_json(out) if out.is_file() else {}
    kept = {row["case"]: row for row in result.get("outside", {}).get("rows", [])}
    rows = kept | {row["case"]: row for row in found["rows"]}
    result["outside"] = {"commit": git_commit(), **found, "rows": list(rows.values())}
    write_json_atomic(out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
