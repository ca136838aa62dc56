"""Records the names and shapes of the original repositories' state dicts, from their own code.

python -m experiments.record.original_names --detr=CHECKOUT --deformable=CHECKOUT [--out=FILE]

Needs the extra "parity" and checkouts of facebookresearch/detr and
fundamentalvision/Deformable-DETR. No parameter is allocated.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import torch

from experiments.parity.cases import FIXTURES
from experiments.parity.original import MODELS, build


def main() -> None:
    """Writes {model: {name: shape}}."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detr", type=Path, required=True)
    parser.add_argument("--deformable", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=FIXTURES / "original_names.json.gz")
    options = parser.parse_args()
    found = {}
    for name, (family, _) in MODELS.items():
        with torch.device("meta"):
            model, _ = build(name, getattr(options, family))
        found[name] = {key: list(value.shape) for key, value in model.state_dict().items()}
        print(f"{name}: {len(found[name])} names")
    options.out.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
