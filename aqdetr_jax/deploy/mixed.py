"""A choice of bits for every group of operations under a budget, and the policy that it is.

The choice is a multiple-choice knapsack: of every group one number of bits, each with a size and
with the damage that these bits do to the policy's own model, in which nothing else is changed: a
loss of AP or noise in the network's outputs. Damages are taken to add up, and their sum is made as
small as the budget allows, exactly.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "KIB": 1024, "MIB": 1024**2}
_MOST_CELLS = 1 << 20

_HALVINGS = 8
_CLOSE = 0.01  # of the size: not worth another measurement

Options = Mapping[int, tuple[int, float]]
"""Bits -> (size in any whole unit, damage)."""

By = Literal["AP", "noise"]
"""What a choice goes by."""

_TIE = 1e-6  # AP that all of the signal's strength in noise counts, where nothing else differs


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a choice may cost.

    Attributes:
      kind: "bytes" of the packed model, or "AP", a loss against the float model by calibration
        alone, before any training.
      value: at most.
    """

    kind: Literal["bytes", "AP"]
    value: float


def parse_budget(text: str) -> Budget:
    """A budget as it is written: ``900KiB``, ``1.5MB``, ``921600`` (bytes) or ``0.02AP``.

    Raises:
      ValueError: the text is none.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if match and unit == "AP" and 0 < float(match[1]) < 1:
        return Budget("AP", float(match[1]))
    if match and unit in _UNITS and float(match[1]) > 0:
        return Budget("bytes", int(float(match[1]) * _UNITS[unit]))
    raise ValueError(
        f"a budget of {text!r} is none: write bytes (921600, 900KiB, 1.5MB) or an AP that may be "
        "lost (0.02AP)"
    )


def damages(
    rows: Mapping[int, Mapping[str, float]], policy: Mapping[str, float], own: int | None, by: By
) -> dict[int, float]:
    """What other bits of a group do to the policy's model; of less than nothing, they mend it.

    More bits never lose AP and fewer never gain any: what seems so is chance. Where AP says
    nothing, noise does.

    Args:
      rows: bits -> "AP" and "noise" of the policy's model with this group at these bits.
      policy: "AP" and "noise" of the policy's model as it is.
      own: the group's bits in it, if they are one number of ``rows``.
      by: what counts.
    """
    if by == "noise":
        return {bits: row["noise"] - policy["noise"] for bits, row in rows.items()}
    found, worst = {}, -math.inf
    for bits, row in sorted(rows.items(), reverse=True):
        loss = policy["AP"] - row["AP"]
        if own is not None:
            loss = min(loss, 0.0) if bits >= own else max(loss, 0.0)
        worst = max(worst, loss)
        found[bits] = worst + _TIE * row["noise"]
    return found


def choose(options: Sequence[Options], capacity: int) -> list[int] | None:
    """The bits of every group with the least sum of damages whose sizes fit together.

    Of equal damage the fewer bits. Exact, unless the capacity has more than a million units (after
    their greatest common divisor is taken out): then sizes are rounded up to a millionth of it.

    Args:
      options: of every group.
      capacity: largest sum of sizes.

    Returns:
      Bits in the order of ``options``; None if not even the smallest sizes fit.
    """
    if capacity < 0 or sum(min(size for size, _ in o.values()) for o in options) > capacity:
        return None
    grain = math.gcd(*(size for o in options for size, _ in o.values())) or 1
    grain *= max(1, math.ceil(capacity // grain / _MOST_CELLS))
    cells = capacity // grain
    least = np.zeros(cells + 1)  # of the groups so far, by what they may take
    taken = []
    for group in options:
        best = np.full(cells + 1, np.inf)
        bits_of = np.zeros(cells + 1, np.int8)
        for bits, (size, damage) in sorted(group.items()):
            need = -(-size // grain)
            if need > cells:
                continue
            total = least[: cells + 1 - need] + damage
            better = total < best[need:]
            best[need:][better] = total[better]
            bits_of[need:][better] = bits
        least = best
        taken.append(bits_of)
    if not np.isfinite(least[cells]):  # rounded up, not even the smallest sizes fit
        return [min(group, key=lambda bits: group[bits][0]) for group in options]
    chosen, left = [], cells
    for group, bits_of in zip(reversed(options), reversed(taken), strict=True):
        bits = int(bits_of[left])
        chosen.append(bits)
        left -= -(-group[bits][0] // grain)
    return chosen[::-1]


def smallest_within(
    options: Sequence[Options], lost: Callable[[list[int]], float], allowed: float
) -> list[int]:
    """The smallest of the choices of least damage that loses no more AP than is allowed.

    A search by halves between all groups at the fewest and all at the most bits. It takes the loss
    to fall as sizes grow; each choice that it looks at is measured, the one it returns too.

    Args:
      options: of every group.
      lost: measures the loss of AP of a choice.
      allowed: largest loss.

    Raises:
      ValueError: all groups at the most bits lose more.
    """

    def size(bits: Sequence[int]) -> int:
        return sum(option[b][0] for option, b in zip(options, bits, strict=True))

    least, good = ([pick(option) for option in options] for pick in (min, max))
    if (loss := lost(good)) > allowed:
        raise ValueError(
            f"a budget of {allowed:g} AP cannot be kept by calibration alone: with every group at "
            f"its most bits {loss:.4f} is lost already"
        )
    if lost(least) <= allowed:
        return least
    low = size(least)
    for _ in range(_HALVINGS):
        middle = (low + size(good)) // 2
        bits = choose(options, middle)
        # What is no larger than ``low`` is known to lose too much.
        if bits is not None and size(bits) > low and lost(bits) <= allowed:
            good = bits
        else:
            low = middle
        if size(good) - low < _CLOSE * size(good):
            break
    return good
