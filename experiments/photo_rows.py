"""What the studies on photographs share: from a backbone to a teacher to its students."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from study import Row, calibrations


def chain(
    config: str,
    family: str,
    order: Sequence[tuple[int, int, Sequence[str]]],
    *,
    pretrain: bool = False,
    lite: bool = False,
) -> Iterator[Row]:
    """The rows of a family: pretraining, teacher, calibrations, students.

    Args:
      config: of the data set, whose variants are those of ``configs/lite0.py``.
      family: "detr" or "deformable".
      order: (bits, seed, methods) of the students.
      pretrain: a backbone first, which the teacher starts from in place of the configuration's.
      lite: on EfficientNet-Lite0.
    """
    prefix = ("" if family == "detr" else f"{family}-") + "lite-" * lite
    facts = {"family": family, "bits": 32, "seed": 0}
    start, teacher = "pretrain" if pretrain else "", f"{family}_float"
    if pretrain:
        yield Row(start, f"{config}:pretrain", "pretrain", facts={"method": "pretrain"})
    whole = {**facts, "method": "float"}
    yield Row(teacher, f"{config}:{prefix}teacher", facts=whole, start=start)
    for bits in dict.fromkeys(bits for bits, _, _ in order):
        yield from calibrations(f"{config}:{prefix}lsq", family, bits, start=teacher)
    for bits, seed, methods in order:
        for method in methods:
            yield Row(
                f"{family}_w{bits}_{method}_seed{seed}",
                f"{config}:{prefix}{method}",
                "train",
                (f"quant.policy=w{bits}a{bits}", f"seed={seed}"),
                {"family": family, "method": method, "bits": bits, "seed": seed},
                start=teacher,
            )
