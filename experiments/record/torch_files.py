"""Writes the files of tests/fixtures/torch with torch itself, and what torch reads from them.

python -m experiments.record.torch_files [--out=tests/fixtures/torch]

Needs torch, which the package and its tests do not. Beside each NAME.pth stands NAME.json: the
value that ``torch.load`` gives back, containers tagged with their type and tensors as
[dtype, shape, strides in elements, hexadecimal bytes in C order]. Every run writes the same values
with the same torch.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.serialization import config as torch_config

OUT = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "torch"

DTYPES = (
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
)


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` is float32."""
    return str(dtype).removeprefix("torch.")


def dtypes() -> dict:
    """A tensor of every type that is read, one without dimensions, and odd values."""
    made = {name_of(t): torch.tensor([[0, 1, 2], [3, 100, 5]]).to(t) for t in DTYPES}
    made["scalar"] = torch.tensor(2.5)
    made["odd"] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-42])
    made["odd_bfloat16"] = made["odd"].to(torch.bfloat16)
    made["negative"] = torch.tensor([-1, -(2**62), 2**62])
    return made


def views() -> dict:
    """Tensors that share storages, lie in parts of them, or have no elements."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return {
        "base": base,
        "transposed": base.T,
        "rows": base[1:3],
        "columns": base[:, ::2],
        "window": base[1:, 2:4].T,
        "expanded": base[0, :1].expand(3, 5),
        "diagonal": base.diagonal(),
        "element": base[3, 5],
        "channels_last": torch.arange(12.0)
        .reshape(1, 3, 2, 2)
        .to(memory_format=torch.channels_last),
        "empty": torch.zeros(0),
        "empty_matrix": torch.zeros(3, 0, 2),
        "empty_slice": base[:, 6:],
        "tied": [tied, tied, tied.data],
        "parameter": torch.nn.Parameter(base[2], requires_grad=False),
    }


def training() -> dict:
    """What a training script of the DETR family saves."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))
    optimizer = torch.optim.AdamW([{"params": [p], "lr": 0.1} for p in model.parameters()])
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 200)
    milestones = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5, 5])
    model(torch.ones(1, 1, 3, 3)).square().sum().backward()
    optimizer.step()
    args = argparse.Namespace(
        lr=1e-4,
        masks=False,
        frozen_weights=None,
        device="cuda",
        where=torch.device("cuda", 1),
        here=torch.device("cpu"),
        precision=torch.bfloat16,
        lr_names=["backbone.0", "sampling_offsets"],
        betas=(0.9, 0.999),
        seed=42,
        big=1 << 70,
        small=-(1 << 40),
        nested=argparse.Namespace(words={"a", "b"}, frozen=frozenset([1, 2])),
        unicode="Größe 大",
        raw=b"\x00\xff\n",
        none=b"",
        shape=torch.Size([2, 3]),
    )
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": steps.state_dict(),
        "milestones": milestones.state_dict(),
        "epoch": 49,
        "args": args,
        "rng": torch.arange(16, dtype=torch.uint8),
        "ordered": collections.OrderedDict([("z", 1), ("a", [1, [2, [3]]])]),
        "numbers": [0, 255, 256, 65535, 65536, -1, 2**31, -(2**31), 0.5, float("inf"), True],
        "long": "x" * 300,
        "many": list(range(1010)),
    }


def extras() -> dict:
    """What else training scripts leave in their files: paths, numbers of NumPy, attributes."""
    marked = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    marked.note = "hung on by a library"
    return {
        "model": {"marked": marked},
        "best": np.float64(0.42),
        "numbers": [
            *(np.float32(-0.1), np.float16(2), np.float64("inf"), np.bool_(True), np.bool_(False)),
            *(np.int8(-3), np.int16(-300), np.int32(7), np.int64(-(2**62)), np.uint8(200)),
            *(np.uint16(60_000), np.uint32(2**32 - 1), np.uint64(2**64 - 1)),
            np.arange(3, dtype=">f8")[1],
        ],
        "args": argparse.Namespace(
            output_dir=pathlib.PurePosixPath("/runs/first one"),
            resume=pathlib.PurePosixPath("runs/a.pth"),
            here=pathlib.PurePosixPath("."),
            root=pathlib.PurePosixPath("/"),
            share=pathlib.PureWindowsPath("C:/runs/a"),
            best=np.int64(3),
        ),
        "types": [torch.complex64, torch.float8_e4m3fn, torch.uint16],
    }


def storages() -> dict:
    """Storages themselves, with and without a type."""
    return {
        "typed": torch.arange(3, dtype=torch.int16).storage(),
        "untyped": torch.arange(3, dtype=torch.int16).untyped_storage(),
    }


def described(value: object) -> object:
    """A value as JSON, with the types that JSON does not have as tags."""
    if isinstance(value, torch.UntypedStorage | torch.storage.TypedStorage):
        dtype = getattr(value, "dtype", torch.uint8)
        value = torch.empty(0, dtype=dtype).set_(value)
    if isinstance(value, torch.Tensor):
        flat = value.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
        strides = list(value.stride())
        return {"array": [name_of(value.dtype), list(value.shape), strides, data.hex()]}
    if isinstance(value, argparse.Namespace):
        return {"namespace": described(vars(value))}
    if isinstance(value, dict):
        return {"dict": [[described(key), described(item)] for key, item in value.items()]}
    if isinstance(value, set | frozenset):
        return {type(value).__name__: [described(item) for item in sorted(value)]}
    if isinstance(value, list):
        return {"list": [described(item) for item in value]}
    if isinstance(value, tuple):
        return {"tuple": [described(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, torch.device | torch.dtype | pathlib.PurePath):
        return str(value)
    if isinstance(value, np.generic):
        return described(value.item())
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{type(value)} is not described")


def record(path: Path) -> None:
    """Writes beside a file what torch reads from it."""
    value = torch.load(path, map_location="cpu", weights_only=False)
    text = json.dumps(described(value), separators=(",", ":"), ensure_ascii=False)
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def big_endian(source: Path, target: Path, sizes: dict[str, int]) -> None:
    """Copies a zip file as a big-endian machine would have written it.

    Args:
      source: the file to copy.
      target: the copy.
      sizes: bytes of the elements of each storage by its key.
    """
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            key = name.rpartition("/data/")[2]
            if name.endswith("/byteorder"):
                data = b"big"
            elif key in sizes:
                size = sizes[key]
                data = b"".join(data[k : k + size][::-1] for k in range(0, len(data), size))
            new.writestr(zipfile.ZipInfo(name), data)


def deflated(source: Path, target: Path) -> None:
    """Copies a zip file with compressed members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), old.read(name), zipfile.ZIP_DEFLATED)


def main() -> None:
    """Writes all files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    made = (("dtypes", dtypes), ("views", views), ("training", training), ("extras", extras))
    for name, value in ((name, make()) for name, make in made):
        torch.save(value, out / f"{name}_zip.pth")
        torch.save(value, out / f"{name}_stream.pth", _use_new_zipfile_serialization=False)
    torch.save(storages(), out / "storages_zip.pth")
    torch.save(
        {"typed": storages()["typed"]},
        out / "storages_stream.pth",
        _use_new_zipfile_serialization=False,
    )
    torch.save(training(), out / "protocol5_zip.pth", pickle_protocol=5)
    torch.save(
        training(),
        out / "protocol4_stream.pth",
        pickle_protocol=4,
        _use_new_zipfile_serialization=False,
    )
    torch.save(training()["model"], out / "state_zip.pth")
    torch.serialization.set_crc32_options(False)
    torch.save(training()["model"], out / "unchecked_zip.pth")
    torch.serialization.set_crc32_options(True)
    before = torch_config.save.storage_alignment
    torch_config.save.storage_alignment = 4096
    torch.save({"a": torch.arange(3.0), "b": torch.arange(4)}, out / "aligned_zip.pth")
    torch_config.save.storage_alignment = before
    deflated(out / "training_zip.pth", out / "deflated_zip.pth")
    # The storages are numbered in the order of the tensors.
    sizes = {str(k): tensor.element_size() for k, tensor in enumerate(dtypes().values())}
    big_endian(out / "dtypes_zip.pth", out / "big_endian_zip.pth", sizes)
    for path in sorted(out.glob("*.pth")):
        record(path)
        print(path.name, path.stat().st_size, path.with_suffix(".json").stat().st_size)


if __name__ == "__main__":
    main()
