"""Records what timm's EfficientNet-Lite computes, for tests that must not need torch.

python -m experiments.record.efficientnet_lite [--out=tests/fixtures]

Needs the extra "parity". See ``experiments/parity/lite.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

from experiments.parity import store
from experiments.parity.cases import FIXTURES
from experiments.parity.lite import compute
from experiments.parity.lite_cases import FIXTURE


def main() -> None:
    """Writes the fixture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / FIXTURE
    store.save(path, compute(), [f"torch {torch.__version__}", f"timm {timm.__version__}"])
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
