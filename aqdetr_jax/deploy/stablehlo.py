"""A network as a StableHLO program that later versions of JAX run without this package's models.

A folder: ``program.bin`` (``jax.export``: one program for several platforms and any batch),
``weights`` (an ``archive``: the network's constants, codes as packed bytes) and ``manifest.json``.
The constants are arguments of the program and not in it, because a program's text has a byte for
every code at least, however few its bits are, and four for a float of which it has two copies.

JAX reads such programs for six months after they are written at the least.
**A serialised program is code.** Checksums find damage, not malice: load what you trust.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.typing import DTypeLike

from aqdetr_jax.checkpoint.checksums import find_damage, read_manifest, write_manifest
from aqdetr_jax.deploy.archive import MANIFEST, WEIGHTS, read_archive, write_archive
from aqdetr_jax.deploy.bits import Codes
from aqdetr_jax.deploy.carriers import UNKNOWN_TPU, chip_of
from aqdetr_jax.io import whole_folder
from aqdetr_jax.paths import as_path
from aqdetr_jax.provenance import package_versions
from aqdetr_jax.quant.spec import SUPPORTED_BITS

logger = logging.getLogger(__name__)

FORMAT = "aqdetr-stablehlo"
VERSION = 1
"""Raised when a folder of this version could be misread by what reads that one."""

PROGRAM, CONSTANTS = "program.bin", "weights"
FILES = {PROGRAM, f"{CONSTANTS}/{MANIFEST}", f"{CONSTANTS}/{WEIGHTS}"}

PLATFORMS = ("tpu", "cpu", "cuda")

# Names of layouts, which XLA itself knows on every platform.
_ALLOWED = (export.DisabledSafetyCheck.custom_call("LayoutConstraint"),)


class StableHloError(ValueError):
    """A folder that cannot be used; the message names the file and the reason."""


def export_stablehlo(
    folder: str | Path,
    function: Callable[..., Any],
    arguments: Mapping[str, tuple[str, DTypeLike]],
    *,
    platforms: Sequence[str] = PLATFORMS,
    tpu: str = UNKNOWN_TPU,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a function as a program; the folder appears whole or not at all.

    Args:
      folder: an earlier program of that name is replaced, nothing else is.
      function: of arrays, to a tuple or dict of arrays; its constants are NumPy or JAX arrays.
      arguments: in order, (shape, dtype) by name; a shape is text such as "b, 800, 1344, 3", where
        a letter stands for any size, the same one everywhere.
      platforms: for which it is compiled when it is run: of "tpu", "cpu", "cuda", "rocm".
      tpu: the kind of TPU that the function's carriers were chosen for.
      facts: what the manifest says beside, plain JSON values.

    Raises:
      FileExistsError: something of another kind is there.
      ValueError: the function cannot be exported, or a constant is no part of a model.
    """
    scope = export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in arguments.values()
    ]
    closed, out = jax.make_jaxpr(function, return_shape=True)(*specs)
    tree = jax.tree.structure(out)
    constants = [np.asarray(constant) for constant in closed.consts]
    stored = {f"{i:04}": _narrow(constant) for i, constant in enumerate(constants)}

    def program(given: dict[str, jax.Array], *arrays: jax.Array) -> Any:
        # As the function knew them: a code may be stored in fewer bytes.
        own = [given[name].astype(c.dtype) for name, c in zip(stored, constants, strict=True)]
        return jax.tree.unflatten(tree, jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, own))(*arrays))

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _plain(stored).items()}
    exported = export.export(jax.jit(program), platforms=platforms, disabled_checks=_ALLOWED)(
        shapes, *specs
    )
    with whole_folder(folder, PROGRAM) as partial:
        (partial / PROGRAM).write_bytes(exported.serialize())
        write_archive(partial / CONSTANTS, stored, {"format": FORMAT})
        extra = {
            "format": FORMAT,
            "version": VERSION,
            "platforms": list(platforms),
            "tpu": tpu,
            "arguments": {
                name: {"shape": shape, "dtype": np.dtype(dtype).name}
                for name, (shape, dtype) in arguments.items()
            },
            "versions": package_versions(),
            "facts": dict(facts or {}),
        }
        write_manifest(partial / MANIFEST, partial, extra)


@dataclasses.dataclass(frozen=True)
class Program:
    """A loaded program; call it with the arrays that its manifest names.

    Attributes:
      manifest: what the folder says of itself.
      exported: JAX's object; its ``mlir_module()`` is the text of the StableHLO.
      constants: the first argument of ``exported.call``.
    """

    manifest: dict[str, Any]
    exported: export.Exported
    constants: dict[str, jax.Array]

    def __call__(self, *arrays: Any) -> Any:
        """The function of these arrays; compiled for this machine's device once a batch size."""
        return self._compiled(self.constants, *arrays)

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(self.exported.call)


def load_stablehlo(folder: str | Path) -> Program:
    """Reads what ``export_stablehlo`` wrote; checksums first, then the program.

    The folder must come from somewhere you trust, see the module.

    Raises:
      FileNotFoundError: no such folder, or no program in it.
      StableHloError: it is damaged, of another version, or this JAX cannot read it.
    """
    folder = as_path(folder)
    manifest = folder / MANIFEST
    if not (folder / PROGRAM).is_file() or not manifest.is_file():
        raise FileNotFoundError(f"{folder} holds no {PROGRAM} and {MANIFEST}: no StableHLO export")
    try:
        content = read_manifest(manifest)
    except ValueError as error:
        raise StableHloError(str(error)) from None
    if content.get("format") != FORMAT:
        raise StableHloError(f"{manifest} is of something else than a StableHLO export")
    if content.get("version") != VERSION:
        raise StableHloError(
            f"{manifest} is of version {content.get('version')!r} of the format, and this program "
            f"reads version {VERSION}: export the model again"
        )
    files = content.get("files")
    if not isinstance(files, dict) or set(files) != FILES:  # a path elsewhere among them
        raise StableHloError(f"{manifest} must list {', '.join(sorted(FILES))} and nothing else")
    damage = find_damage(manifest, folder)
    if damage is not None:
        raise StableHloError(f"{damage}: export the model again, or copy it again")
    arrays, _ = read_archive(folder / CONSTANTS)
    try:
        exported = export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    except Exception as error:  # of JAX's reader any kind
        reason = " ".join(str(error).split())[:300]
        raise StableHloError(
            f"{folder / PROGRAM} cannot be read by jax {jax.__version__} (it was written by "
            f"{content.get('versions', {}).get('jax', 'an unknown version')}): {reason}"
        ) from error
    device = jax.devices()[0]
    if device.platform == "tpu" and chip_of(device) != content["tpu"]:
        logger.warning(
            "%s was made for a TPU %s and runs on %s: its products are the same, and may be "
            "slower than another export's",
            folder,
            content["tpu"],
            device.device_kind,
        )
    constants = {name: jax.device_put(x) for name, x in _plain(arrays).items()}
    return Program(content, exported, constants)


def _narrow(constant: np.ndarray) -> np.ndarray | Codes:
    """Whole numbers as codes of as few bits as hold them; else the array itself."""
    if constant.dtype.kind not in "iub" or not constant.size:
        return constant
    low, high = int(constant.min()), int(constant.max())
    for bits in SUPPORTED_BITS:
        half = 1 << bits - 1
        if -half <= low and high < half:
            return Codes(constant.astype(np.int8), bits)
        if low >= 0 and high < 2 * half:
            return Codes(constant.astype(np.uint8), bits)
    return constant


def _plain(arrays: Mapping[str, np.ndarray | Codes]) -> dict[str, np.ndarray]:
    """Codes as int8 or uint8, as the program takes them."""
    return {name: x.values if isinstance(x, Codes) else x for name, x in arrays.items()}
