"""How long a step takes at least, and a run, by what the chips can do at most.

A stated roofline: the longest of three times is the step's, as if the others were hidden behind it.

- arithmetic: useful FLOPs at the chip's peak in bfloat16;
- memory: the bytes that pass through HBM (``traffic``) at its bandwidth;
- interconnect: the bytes that a chip must send for the collectives, over all links at once. An
  all-reduce of b bytes over n chips takes 2 b (n - 1) / n of each; a gather, a scatter and an
  exchange b (n - 1) / n; a permutation b.

What it leaves out makes a step slower: vector work, the cost of one gathered row, what is computed
again, the latency of thousands of small operations, a loop whose length depends on the data, input.
All that follows from it is an estimate, a lower bound on time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from aqdetr_jax.planning.chips import ChipKind
from aqdetr_jax.planning.traffic import Collective, Program

_SHARES = {"all-reduce": 2, "collective-permute": 1, "collective-broadcast": 1}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The three times of one step, seconds."""

    arithmetic: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The longest."""
        return max(dataclasses.astuple(self))

    @property
    def bound(self) -> str:
        """Which of them that is."""
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)


def sent_bytes(collectives: Iterable[Collective], devices: int) -> float:
    """What a device sends for the collectives of a step.

    Args:
      collectives: of the program.
      devices: of the slice; those of a group where it names none.
    """
    total = 0.0
    for found in collectives:
        count = found.group or devices
        others = 1.0 if found.kind.startswith("collective-") else (count - 1) / count
        total += _SHARES.get(found.kind, 1) * others * found.bytes * found.times
    return total


def roofline(program: Program, flops: float, kind: ChipKind, devices: int) -> Roofline:
    """The times of a program's step.

    Args:
      program: as one device runs it.
      flops: useful ones of the device.
      kind: of the chip; a device has its share.
      devices: of the slice.
    """
    share = kind.devices
    return Roofline(
        arithmetic=flops * share / kind.peak,
        memory=program.traffic * share / kind.bandwidth,
        interconnect=sent_bytes(program.collectives, devices) * share / kind.interconnect,
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a run takes, an estimate.

    Attributes:
      steps: of training.
      evaluations: how many of them.
      training_hours: of the steps.
      evaluation_hours: of the evaluations; 0 where no evaluation step is known.
      chips: of the slice.
    """

    steps: int
    evaluations: int
    training_hours: float
    evaluation_hours: float
    chips: int

    @property
    def hours(self) -> float:
        """Of the run."""
        return self.training_hours + self.evaluation_hours

    @property
    def chip_hours(self) -> float:
        """Hours times chips."""
        return self.hours * self.chips


def evaluations_of(steps: int, every: int) -> int:
    """How often a run is evaluated: every so many steps, and at its end."""
    return -(-steps // every) if every else 1


def schedule(
    *,
    steps: int,
    eval_every: int,
    train_seconds: Iterable[float],
    eval_seconds: Iterable[float],
    eval_images: int,
    eval_rows: int,
    chips: int,
) -> Schedule:
    """What the configured run takes.

    Args:
      steps: of training.
      eval_every: steps between evaluations; 0 = at the end alone.
      train_seconds: a step's, one for each bucket: a run draws them evenly.
      eval_seconds: an evaluation step's, likewise.
      eval_images: of the evaluation set.
      eval_rows: images of an evaluation step, over the slice.
      chips: of the slice.
    """
    train, evaluation = list(train_seconds), list(eval_seconds)
    count = evaluations_of(steps, eval_every)
    batches = -(-eval_images // eval_rows)
    each = sum(evaluation) / len(evaluation) if evaluation else 0.0
    step = sum(train) / len(train) if train else 0.0
    return Schedule(
        steps=steps,
        evaluations=count,
        training_hours=steps * step / 3600,
        evaluation_hours=count * batches * each / 3600,
        chips=chips,
    )
