"""Records what Hugging Face transformers computes, for tests that must not need torch.

python -m experiments.record.parity [--out=tests/fixtures] [--only=detr_dc5,...]

Needs the extra "parity" (torch and transformers, gigabytes). Every fixture is a tiny random model,
all of its parameters and running statistics randomised, and what it makes of one batch of two
images of unequal size (parity_batch.npz): in double precision the outputs of every stage, loss
terms, and of every gradient its norm and its product with a fixed random direction. Loss weights
are the official ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers

from experiments.parity import store as parity_store
from experiments.parity import theirs as parity_theirs
from experiments.parity.cases import FIXTURES, TINY, batch


def main() -> None:
    """Writes the fixtures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FIXTURES)
    parser.add_argument("--only", default=",".join(TINY))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    given = batch()
    np.savez_compressed(options.out / parity_store.BATCH, **given)
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    for name in options.only.split(","):
        path = options.out / f"{name}.npz"
        parity_store.save(path, parity_theirs.compute(TINY[name], given), versions)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
