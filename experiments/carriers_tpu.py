"""What a TPU's compiler makes of the carriers of integer products; no TPU is needed.

python experiments/carriers_tpu.py [--chip=v5e] [--product=dense]

Compiles every product of ``PRODUCTS`` in every carrier that holds its codes, for every chip, looks
into the optimised programs for the operands of the matrix products, and writes a row each:
``ok`` says whether all of them are as narrow as they were meant to be. ``cycles`` is the compiler's
own estimate of the whole program, the move of the codes to their carrier included. Needs libtpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tpu_step import rows_of, same

from aqdetr_jax import host
from aqdetr_jax.deploy.carriers import (
    BF16,
    CHIPS,
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
from aqdetr_jax.quant.product import Contraction, Conv, Dense, Mix, Scores

CHIP_NAMES = ("v4", "v5e", "v5p", "v6e", "tpu7x")
CARRIERS = (S4, S8, F8, BF16)
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
    "dense 850x2048x256": Product(Dense(), (1, 850, 2048), (2048, 256)),
    "conv small": Product(Conv(padding=_SAME), (1, 8, 8, 64), (3, 3, 64, 64)),
    "conv 3x3 256": Product(Conv(padding=_SAME), (1, 50, 67, 256), (3, 3, 256, 256)),
    "conv 1x1 256 to 1024": Product(Conv(), (1, 50, 67, 256), (1, 1, 256, 1024)),
    "conv 3x3 128 stride 2": Product(
        Conv(strides=(2, 2), padding=_SAME), (1, 200, 267, 128), (3, 3, 128, 128)
    ),
    "scores": Product(Scores(), (1, 8, 850, 32), (1, 8, 850, 32)),
    "mix": Product(Mix(), (1, 8, 850, 850), (1, 8, 850, 32)),
}


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


def cycles(text: str) -> int:
    """The compiler's estimate for a program without loops."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def _kind(shape: str) -> str:
    return shape.split("[")[0]


def compile_product(chip: str, product: Product, choice: Choice) -> str:
    """The optimised program of a product for a chip; in a process with libtpu's environment."""
    from jax.experimental import topologies

    kind = KINDS[chip]
    place = parse_slice(f"{chip}:{kind.slices[0]}")
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=place.name, **place.options
    )
    sharding = jax.sharding.SingleDeviceSharding(found.devices[0])
    a, b = (
        jax.ShapeDtypeStruct(shape, jnp.uint8 if unsigned else jnp.int8, sharding=sharding)
        for shape, unsigned in ((product.a_shape, True), (product.b_shape, False))
    )

    def function(a: jax.Array, b: jax.Array) -> jax.Array:
        return carried(product.contraction, choice, a, b)

    return jax.jit(function).lower(a, b).compile().as_text()


def look(chip: str, name: str, bits: str, carrier: Carrier) -> dict[str, Any] | None:
    """A row, without the commit; None where the carrier does not hold the codes."""
    product, ranges = PRODUCTS[name], BITS[bits]
    shapes = product.a_shape, product.b_shape
    choice = choice_of(carrier, product.contraction, *shapes, *ranges)
    if choice is None:
        return None
    chosen = choose(chip, product.contraction, *shapes, *ranges).carrier == carrier
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
        text = compile_product(chip, product, choice)
    except jax.errors.JaxRuntimeError as error:
        return {**row, "found": [], "ok": False, "error": str(error)[:300]}
    found = operands_found(text.splitlines())
    ok = found == [(carrier.name, carrier.name)]
    return {**row, "found": [" x ".join(pair) for pair in found], "ok": ok, "cycles": cycles(text)}


def rows_of_chip(chip: str, product: str) -> Iterator[dict[str, Any]]:
    """Rows of the products that have ``product`` in their names, compiled in a child process."""
    child = subprocess.Popen(
        [sys.executable, __file__, f"--child={chip}", f"--product={product}"],
        env={**os.environ, **LIBTPU},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, log = child.communicate()
    if child.returncode:
        raise RuntimeError(f"compiling for {chip} failed:\n{last_words(log)}")
    return map(json.loads, out.splitlines())


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
