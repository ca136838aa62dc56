"""What a TPU's compiler makes of the carriers of integer products; no TPU is needed.

python experiments/carriers_tpu.py [--chip=v5e] [--product=dense]

Compiles products for every kind of chip, from codes in bytes to codes in bytes (sums, bias, the
next grid), looks into the optimised programs for the operands of the matrix products, and writes a
row each. ``ok`` says whether none of them is wider than the carrier. (A conversion that the matrix
unit does itself disappears: bfloat16 carriers may be found as bytes.) ``cycles`` is the compiler's
own estimate, the move of the codes to their carrier included. Real shapes are compiled in the
carrier that is chosen and in those of ``BESIDE``, small ones in all. Needs libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tpu_step import rows_of, same

from aqdetr_jax import host
from aqdetr_jax.deploy.carriers import (
    BF16,
    F8,
    S4,
    S8,
    Carrier,
    Choice,
    Range,
    carried,
    choice_of,
    choose,
)
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.planning.ahead import LIBTPU, check_libtpu, last_words, versions
from aqdetr_jax.planning.chips import KINDS, parse_slice
from aqdetr_jax.planning.hlo import parse_instruction
from aqdetr_jax.provenance import git_commit
from aqdetr_jax.quant.contractions import Contraction, Conv, Dense, Mix, Scores

CHIP_NAMES = ("v4", "v5e", "v5p", "v6e", "tpu7x")
CARRIERS = (S4, S8, F8, BF16)
BESIDE = {"v5e": (S8, BF16), "tpu7x": (BF16,)}
"""Carriers for comparison: of integers, and of a chip without them."""

WIDTHS = {"s4": 4, "u4": 4, "s8": 8, "u8": 8, "f8e4m3fn": 8, "bf16": 16, "f32": 32, "s32": 32}

BITS: dict[str, tuple[Range, Range]] = {
    "u4 x s4": ((0, 15), (-8, 7)),
    "s4 x s4": ((-8, 7), (-8, 7)),
    "u8 x s4": ((0, 255), (-8, 7)),
    "u8 x s8": ((0, 255), (-128, 127)),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of the deployed networks, at 800 x 1066 or small."""

    contraction: Contraction
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


_SAME = ((1, 1), (1, 1))
PRODUCTS = {
    "dense small": Product(Dense(), (1, 48, 64), (64, 64)),
    "dense 850x256x2048": Product(Dense(), (1, 850, 256), (256, 2048)),
    "conv small": Product(Conv(padding=_SAME), (1, 8, 8, 64), (3, 3, 64, 64)),
    "conv 3x3 256": Product(Conv(padding=_SAME), (1, 50, 67, 256), (3, 3, 256, 256)),
    "conv 3x3 256, 8 images": Product(Conv(padding=_SAME), (8, 50, 67, 256), (3, 3, 256, 256)),
    "conv 1x1 256 to 1024": Product(Conv(), (1, 50, 67, 256), (1, 1, 256, 1024)),
    "conv 3x3 128 stride 2": Product(
        Conv(strides=(2, 2), padding=_SAME), (1, 200, 267, 128), (3, 3, 128, 128)
    ),
    "scores": Product(Scores(), (1, 8, 850, 32), (1, 8, 850, 32)),
    "mix": Product(Mix(), (1, 8, 850, 850), (1, 8, 850, 32)),
}


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def operands_found(text: Iterable[str]) -> list[tuple[str, str]]:
    """The operands' types of every matrix product and convolution in a program.

    Args:
      text: lines of an optimised program.

    Returns:
      XLA's names, such as [("s4", "s4")], sorted, each pair once.
    """
    instructions = {x.name: x for x in map(parse_instruction, text) if x is not None}
    pairs = set()
    for instruction in instructions.values():
        if instruction.opcode in ("dot", "convolution"):
            left, right = (_kind(instructions[name].shape) for name in instruction.operands[:2])
            pairs.add((left, right))
    return sorted(pairs)


def cycles(text: Iterable[str]) -> int:
    """The compiler's estimate for a program without loops, but for copies at its borders."""
    found = [
        _CYCLES.search(x.text)
        for x in map(parse_instruction, text)
        if x is not None and x.opcode != "copy"
    ]
    return sum(int(x[1]) for x in found if x)


def _kind(shape: str) -> str:
    return shape.split("[")[0]


def compile_product(chip: str, product: Product, choice: Choice, unsigned: bool) -> str:
    """The optimised program of a product for a chip; in a process with libtpu's environment."""
    from jax.experimental import topologies

    kind = KINDS[chip]
    place = parse_slice(f"{chip}:{kind.slices[0]}")
    found = topologies.get_topology_desc(platform="tpu", topology_name=place.name, **place.options)
    device = jax.sharding.SingleDeviceSharding(found.devices[0])

    def codes(shape: tuple[int, ...], dtype: Any = jnp.int8) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    def next_codes(a: jax.Array, b: jax.Array | np.ndarray, sums: Any = None) -> jax.Array:
        total = carried(product.contraction, choice, a, b, b_sums=sums)
        codes = jnp.round((total + 7).astype(jnp.float32) * jnp.float32(1e-3))
        return jnp.clip(codes, -8, 7).astype(jnp.int8)

    left = codes(product.a_shape, jnp.uint8 if unsigned else jnp.int8)
    if isinstance(product.contraction, Scores | Mix):
        lowered = jax.jit(next_codes).lower(left, codes(product.b_shape))
    else:  # weights are constants
        weights = np.random.default_rng(0).integers(-8, 8, product.b_shape).astype(np.int8)
        sums = weights.sum(axis=tuple(range(weights.ndim - 1)), dtype=np.int32)
        lowered = jax.jit(lambda a: next_codes(a, weights, sums)).lower(left)
    return lowered.compile().as_text()


def look(chip: str, name: str, bits: str, carrier: Carrier) -> dict[str, Any] | None:
    """A row; None where the carrier does not hold the codes, or is not for comparison."""
    product, ranges = PRODUCTS[name], BITS[bits]
    shapes = product.a_shape, product.b_shape
    choice = choice_of(carrier, product.contraction, *shapes, *ranges)
    if choice is None:
        return None
    chosen = choose(chip, product.contraction, *shapes, *ranges).carrier == carrier
    if not chosen and "small" not in name and carrier not in BESIDE.get(chip, ()):
        return None
    row = {
        "chip": chip,
        "product": name,
        "bits": bits,
        "carrier": carrier.name,
        "chosen": chosen,
        "moved": bool(choice.a_shift or choice.b_shift),
        "parts": -(-product.a_shape[-1] // choice.part),
    }
    try:
        text = compile_product(chip, product, choice, ranges[0][0] == 0)
    except jax.errors.JaxRuntimeError as error:
        return {**row, "found": [], "ok": False, "error": str(error)[:300]}
    found = operands_found(text.splitlines())
    ok = bool(found) and all(WIDTHS[x] <= WIDTHS[carrier.name] for pair in found for x in pair)
    words = [" x ".join(pair) for pair in found]
    return {**row, "found": words, "ok": ok, "cycles": cycles(text.splitlines())}


def rows_of_chip(chip: str, product: str) -> Iterator[dict[str, Any]]:
    """Rows of the products that have ``product`` in their names, compiled in a child process."""
    command = [sys.executable, __file__, f"--child={chip}", f"--product={product}"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command,
            env={**os.environ, **LIBTPU},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as running,
    ):
        assert running.stdout is not None
        yield from map(json.loads, running.stdout)
        if running.wait():
            log.seek(0)
            raise RuntimeError(f"compiling for {chip} failed:\n{last_words(log.read())}")


def child(chip: str, product: str) -> None:
    """Prints a row a line."""
    for name in PRODUCTS:
        for bits in BITS:
            for carrier in CARRIERS:
                row = look(chip, name, bits, carrier) if product in name else None
                if row is not None:
                    print(json.dumps(row), flush=True)


def main() -> None:
    """Compiles and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIP_NAMES, help="one chip alone")
    parser.add_argument("--product", default="", help="products with this in their name")
    parser.add_argument("--child", choices=CHIP_NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default="experiments/results/carriers.json")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.product)
        return
    check_libtpu()
    for chip in (options.chip,) if options.chip else CHIP_NAMES:
        for row in rows_of_chip(chip, options.product):
            print(row, flush=True)
            key = {name: row[name] for name in ("chip", "product", "bits", "carrier")}
            kept = [other for other in rows_of(options.out) if not same(other, key)]
            made = {**row, "commit": git_commit(), "libtpu": versions()["libtpu"]}
            write_json_atomic(options.out, [*kept, made])


if __name__ == "__main__":
    host.use_cpu()
    main()
