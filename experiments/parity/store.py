"""The files of recorded results: few entries, each of many arrays, so that they stay small."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Groups = dict[str, dict[str, np.ndarray]]
"""{group: {name: array}} with the groups state, output, loss and gradient."""

BATCH = "parity_batch.npz"
"""The batch that all recorded models see."""


def save(path: Path, groups: Groups, versions: list[str]) -> None:
    """Writes one model's results.

    Raises:
      ValueError: a parameter that is no float16 number: half of each file would be lost.
    """
    state = groups["state"]
    flat = np.concatenate([x.reshape(-1) for x in state.values()])
    half = flat.astype(np.float16)
    if not np.array_equal(half.astype(flat.dtype), flat):
        raise ValueError("recorded parameters must be float16 numbers")
    shapes = np.zeros((len(state), 4), np.int32)
    for row, value in zip(shapes, state.values(), strict=True):
        row[: value.ndim] = value.shape
    np.savez_compressed(
        path,
        state=half,
        state_names=np.array(list(state)),
        state_shapes=shapes,
        versions=np.array(versions),
        **{f"output/{k}": v for k, v in groups["output"].items()},
        **{
            f"{group}{part}": value
            for group in ("loss", "gradient")
            for part, value in (
                ("_names", np.array(list(groups[group]))),
                ("", np.stack(list(groups[group].values()))),
            )
        },
    )


def load(path: Path) -> Groups:
    """Reads what ``save`` wrote; the state in float32."""
    with np.load(path) as stored:
        arrays = dict(stored)
    groups: Groups = {"state": {}, "output": {}}
    start = 0
    for name, shape in zip(arrays["state_names"], arrays["state_shapes"], strict=True):
        shape = tuple(int(n) for n in shape if n)
        end = start + int(np.prod(shape))
        groups["state"][str(name)] = arrays["state"][start:end].astype(np.float32).reshape(shape)
        start = end
    for key, value in arrays.items():
        if key.startswith("output/"):
            groups["output"][key.removeprefix("output/")] = value
    for group in ("loss", "gradient"):
        keys = [str(name) for name in arrays[f"{group}_names"]]
        groups[group] = dict(zip(keys, arrays[group], strict=True))
    return groups
