"""Kinds of TPU chips, and the slices that the compiler knows by name.

Peak arithmetic, HBM and interconnect are the makers' figures for one chip
(https://docs.cloud.google.com/tpu/docs/v5e, v6e, v5p, v4, tpu7x): "bidirectional" interconnect
counts both directions, here is one. What a program may use of the HBM is what the compiler says
when it refuses one ("Used 20.0G of 15.75G hbm").
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ChipKind:
    """One kind of chip.

    Attributes:
      name: as in the name of a slice, "v5e".
      peak: multiply-adds in bfloat16 counted as two operations, FLOP/s of a chip.
      bandwidth: bytes/s of a chip's HBM.
      interconnect: bytes/s that a chip can send over all its links together.
      hbm: bytes of HBM that a program can use on one device.
      host: chips of one host, in slices of more than one.
      devices: JAX devices a chip.
      slices: shapes of the slices that the compiler knows.
      options: further arguments of ``get_topology_desc``.
    """

    name: str
    peak: float
    bandwidth: float
    interconnect: float
    hbm: int
    host: int
    devices: int
    slices: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

KINDS = {
    kind.name: kind
    for kind in (
        ChipKind("v5e", 197e12, 819e9, 200e9, int(15.75 * GIB), 4, 1, _FLAT),
        ChipKind("v6e", 918e12, 1638e9, 400e9, int(31.25 * GIB), 4, 1, _FLAT),
        ChipKind("v5p", 459e12, 2765e9, 600e9, int(95.74 * GIB), 4, 1, _CUBES),
        # Without "megacore" a v4 chip is two devices, which a mesh over its torus cannot place.
        ChipKind(
            "v4",
            275e12,
            1228e9,
            300e9,
            int(30.75 * GIB),
            4,
            1,
            _CUBES,
            (("chip_config_name", "megacore"),),
        ),
        ChipKind("tpu7x", 2307e12, 7380e9, 600e9, int(94.75 * GIB), 4, 2, _CUBES),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined to each other.

    Attributes:
      kind: of all of them.
      shape: "16x16".
    """

    kind: ChipKind
    shape: str

    @property
    def platform(self) -> str:
        """As JAX names it."""
        return "tpu"

    @property
    def name(self) -> str:
        """The compiler's name, "v5e:16x16"."""
        return f"{self.kind.name}:{self.shape}"

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        """Machines that the chips are in."""
        return -(-self.chips // self.kind.host)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.kind.devices

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of ``get_topology_desc`` beside the name."""
        options = dict(self.kind.options)
        if self.chips == 1:  # a host of several is taken for granted otherwise
            options["chips_per_host_bounds"] = (1, 1, 1)
        return options


def known_slices() -> str:
    """All of them in one line."""
    return "; ".join(f"{kind.name}: {', '.join(kind.slices)}" for kind in KINDS.values())


def parse_slice(name: str) -> Slice:
    """A slice by its name, such as "v5e:16x16".

    Raises:
      ValueError: there is none of that name; the message lists those there are.
    """
    found = re.fullmatch(r"(\w+):([\dx]+)", name)
    kind = KINDS.get(found[1]) if found else None
    if found is None or kind is None or found[2] not in kind.slices:
        raise ValueError(f"unknown topology {name!r}; known ones are {known_slices()}")
    return Slice(kind, found[2])
