"""What the studies on the embedded set share: families, the split that judges.

Choices (weights of the losses, schedules) are made on the validation split and one seed. A study's
numbers are of the test split, 1200 images that no choice has seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from study import Row

FAMILIES = {"detr": "", "deformable": "deformable-"}
PREFIXES = {**FAMILIES, "queries100": "queries100-"}
"""Of the configurations' variants."""
JUDGE = ("data.eval_split=test",)


def student(
    name: str,
    family: str,
    method: str,
    overrides: Iterable[str] = (),
    facts: Mapping[str, Any] | None = None,
    *,
    bits: int = 4,
    seed: int = 0,
    start: str = "",
    teacher: str = "",
    config: str = "shapes_quickstart",
    study: str = "",
) -> Row:
    """A row that trains a student.

    Args:
      name: of the row.
      family: one of ``PREFIXES``.
      method: variant of the configuration.
      overrides: more of the configuration; a policy among them stands for ``bits``.
      facts: more of them, or others, than family, method, bits and seed.
      bits: of weights, activations and attention.
      seed: of the training.
      start: see ``Row``.
      teacher: see ``Row``.
      config: whose schedule it has.
      study: see ``Row``.
    """
    words = tuple(overrides)
    if not any(word.startswith("quant.policy=") for word in words):
        words = (f"quant.policy=w{bits}a{bits}", *words)
    return Row(
        name,
        f"configs/{config}.py:{PREFIXES[family]}{method}",
        "train",
        (*words, f"seed={seed}"),
        {"family": family, "method": method, "bits": bits, "seed": seed, **(facts or {})},
        start=start,
        teacher=teacher,
        judge=JUDGE,
        study=study,
    )
