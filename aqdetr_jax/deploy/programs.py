"""An exported folder of StableHLO programs, one for each size of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aqdetr_jax.deploy.carriers import DEVICE_KINDS, UNKNOWN_TPU
from aqdetr_jax.deploy.detector import DeployedBundle, detect
from aqdetr_jax.deploy.jax_operations import JaxOperations
from aqdetr_jax.deploy.stablehlo import export_stablehlo, load_stablehlo


def write_programs(folder: Path, bundle: DeployedBundle, chip: str = UNKNOWN_TPU) -> ProgramFolder:
    """Writes a folder ``HEIGHTxWIDTH`` for every bucket of the model's image rule.

    Args:
      folder: empty, or not there yet.
      bundle: the network and what goes with it.
      chip: the kind of TPU that carriers are chosen for, see ``carriers``; elsewhere they do not
        depend on it.

    Raises:
      ValueError: an unknown TPU.
    """
    kinds = [*dict.fromkeys(DEVICE_KINDS.values()), UNKNOWN_TPU]
    if chip not in kinds:
        raise ValueError(f"--chip={chip} is no TPU that is known: {', '.join(kinds)}")
    folder.mkdir(parents=True, exist_ok=True)
    network = bundle.network
    facts = {"class_names": list(bundle.class_names), "category_ids": list(bundle.category_ids)}
    for height, width in bundle.input.buckets:

        def run(images, sizes):
            ops = JaxOperations(tpu=chip)
            logits, boxes = detect(ops, network, images, sizes)
            return {"logits": logits, "boxes": boxes}

        arguments = {"images": (f"b, {height}, {width}, 3", np.uint8), "sizes": ("b, 2", np.int32)}
        export_stablehlo(folder / f"{height}x{width}", run, arguments, tpu=chip, facts=facts)
    return ProgramFolder(folder)


class ProgramFolder:
    """The programs of a folder as one detector, see ``gate.Runtime``.

    Args:
      folder: with folders of ``write_programs``.
    """

    name = "StableHLO"
    batch = 1
    raw = True
    codes = None  # a program has no outputs but its own

    def __init__(self, folder: Path):
        self._by_size = {
            tuple(int(n) for n in path.name.split("x")): load_stablehlo(path)
            for path in sorted(folder.iterdir())
            if path.is_dir()
        }

    def detect(self, images: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        """See ``gate.Runtime``."""
        found = self._by_size[images.shape[1:3]](images, sizes)
        return np.asarray(found["logits"]), np.asarray(found["boxes"])
