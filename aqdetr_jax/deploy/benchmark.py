"""How fast, how large: several models side by side, in one run on one machine.

Models take turns (A B A B ...), so that whatever else a machine does meets all of them alike; each
runs in a process of its own, kept on as many cores as it has threads.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aqdetr_jax.data.images import as_array
from aqdetr_jax.data.resampling import resize_exact
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.deploy import operators
from aqdetr_jax.deploy.contestant import BenchmarkError, Contestant, Entry
from aqdetr_jax.deploy.cpu import can_limit_cores, cpu_facts
from aqdetr_jax.host import cores
from aqdetr_jax.io import read_json
from aqdetr_jax.paths import as_path, printable
from aqdetr_jax.provenance import git_commit, package_versions

TURN_SECONDS = 0.25
"""How long a model runs before it is the next one's turn; at least once."""

FEWEST_ROUNDS = 5
PROFILED_RUNS = 10

Progress = Callable[[str], None]


def benchmark(
    models: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    threads: Sequence[int] = (),
    seconds: float = 10.0,
    runs: int | None = None,
    image: str | None = None,
    openvino: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Times models.

    Args:
      models: paths of trained models, packed models, ONNX files, or folders with ONNX files.
      size: (height, width) of the images; None = each model's own.
      threads: numbers of threads, one after the other; () = one a core.
      seconds: how long each model runs, all in all, with each number of threads.
      runs: that many timed runs of each model instead.
      image: picture that is looked at; None = one of the embedded set.
      openvino: run ONNX files in OpenVINO too.
      progress: called with a line about what is being done.

    Returns:
      Plain JSON values: ``rows``, see ``_row``; ``raw``, times of single runs by turn, and more;
      ``operators``, where the time of ONNX files goes; ``notes``, one sentence each; ``cpu``,
      ``image``, ``versions``, ``commit``.

    Raises:
      ValueError: there is nothing to time, or not with so many threads.
      BenchmarkError: a model cannot be used; names it.
    """
    counts = _checked_threads(threads)
    if not seconds > 0 or (runs is not None and runs < 1):
        raise ValueError("--seconds and --runs must be positive")
    paths = [found for model in models for found in _expanded(model)]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{printable(twice)} is given twice")
    picture = _picture(image)
    show = progress or (lambda _: None)
    result: dict[str, Any] = {
        "rows": [],
        "raw": [],
        "operators": [],
        "notes": [],
        "cpu": cpu_facts(),
        "image": printable(image) if image else "of the embedded set",
        "commit": git_commit(),
        "versions": package_versions() | _versions(("onnxruntime", "openvino")),
    }
    for count in counts:
        entries = [
            Entry(path, runtime, count) for path in paths for runtime in _runtimes(path, openvino)
        ]
        with contextlib.ExitStack() as stack:
            group = list(_started(entries, size, stack, show, result["notes"]))
            _times(group, picture, seconds, runs, show, result)
            if count == counts[0]:
                _profiles(group, show, result)
    return result


def parse_threads(text: str) -> list[int]:
    """Numbers of threads of "1,2"; "" has none.

    Raises:
      ValueError: it is no list of numbers.
    """
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--threads={printable(text)} should be numbers, as in 1,2") from None


def _checked_threads(threads: Sequence[int]) -> list[int]:
    most = cores()
    counts = list(dict.fromkeys(threads)) or [most]
    for count in counts:
        if not 1 <= count <= most:
            raise ValueError(f"--threads={count}: this process has {most} cores")
        if count < most and not can_limit_cores():
            raise ValueError(f"--threads={count}: this system cannot keep a process on some cores")
    return counts


def _expanded(model: str) -> list[str]:
    """A path, or the ONNX files of a folder."""
    path = as_path(model)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else []
    return [str(file) for file in files] or [model]


def _runtimes(path: str, openvino: bool) -> tuple[str, ...]:
    if not path.endswith(".onnx"):
        return ("jax",)
    return ("onnxruntime", "openvino") if openvino else ("onnxruntime",)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# --- input --------------------------------------------------------------------------------------


def _picture(image: str | None) -> np.ndarray:
    """uint8 [h, w, 3]."""
    if image is not None:
        return as_array(image)
    return ShapesDataset("validation", size=256, num_images=1)[0].image


def canvas(picture: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture as large as it fits.

    Args:
      picture: uint8 [h, w, 3].
      height: of the canvas.
      width: of the canvas.

    Returns:
      (uint8 [height, width, 3], zeros at the bottom or right; int32 [2], (height, width) of the
      picture on it).
    """
    factor = min(height / picture.shape[0], width / picture.shape[1])
    sides = zip(picture.shape[:2], (height, width), strict=True)
    h, w = (min(max(round(side * factor), 1), limit) for side, limit in sides)
    image = np.zeros((height, width, 3), np.uint8)
    image[:h, :w] = resize_exact(picture, (h, w))
    return image, np.array([h, w], np.int32)


# --- processes ----------------------------------------------------------------------------------


def _started(
    entries: Sequence[Entry],
    size: tuple[int, int] | None,
    stack: contextlib.ExitStack,
    show: Progress,
    notes: list[str],
) -> Iterator[Contestant]:
    for entry in entries:
        show(f"loads {entry}")
        try:
            yield stack.enter_context(Contestant(entry, size))
        except BenchmarkError as error:
            if entry.runtime != "openvino":
                raise
            # The others can be compared without it; nothing of it is in the table.
            if str(error) not in notes:
                notes.append(str(error))


def _times(
    group: Sequence[Contestant],
    picture: np.ndarray,
    seconds: float,
    runs: int | None,
    show: Progress,
    result: dict[str, Any],
) -> None:
    """Rows and raw figures of one number of threads."""
    first = []
    with tempfile.TemporaryDirectory() as folder:
        for one in group:
            batch, height, width = (one.facts[key] for key in ("batch", "height", "width"))
            image, sides = canvas(picture, height, width)
            file = Path(folder) / "input.npz"
            np.savez(file, images=np.stack([image] * batch), sizes=np.stack([sides] * batch))
            show(f"first runs of {one.entry}")
            first.append(one.ask("image", file=str(file)))
    turns = _turns(group, [f["seconds"] for f in first], seconds, runs, show)
    for one, start, times in zip(group, first, turns, strict=True):
        result["rows"].append(_row(one, group, turns, times))
        result["raw"].append(
            {
                "model": one.entry.path,
                "runtime": one.entry.runtime,
                "threads": one.entry.threads,
                "load_seconds": round(one.facts["load_seconds"], 3),
                "first_run_seconds": round(start["first_seconds"], 4),
                **one.ask("memory"),
                "turns_ms": [[round(1e3 * t, 4) for t in turn] for turn in times],
            }
        )
        result["rows"][-1]["peak_bytes"] = result["raw"][-1]["peak_bytes"]


def _turns(
    group: Sequence[Contestant],
    usual: Sequence[float],
    seconds: float,
    runs: int | None,
    show: Progress,
) -> list[list[list[float]]]:
    """Seconds of runs by turn, of each contestant.

    A fast model's first run of a turn finds other models' data in the caches and is not timed.
    """
    untimed = [1 if runs is not None or once < TURN_SECONDS else 0 for once in usual]
    each = [math.ceil(seconds / max(once, TURN_SECONDS)) for once in usual]
    rounds = runs if runs is not None else max(FEWEST_ROUNDS, *each)
    turns: list[list[list[float]]] = [[] for _ in group]
    for number in range(rounds):
        show(f"round {number + 1} of {rounds}")
        for one, skipped, found in zip(group, untimed, turns, strict=True):
            most = 1 if runs is not None else 10_000
            answer = one.ask("turn", untimed=skipped, seconds=TURN_SECONDS, most=most)
            found.append(answer["seconds"])
    return turns


# --- results --------------------------------------------------------------------------------------


def _reference(one: Contestant, group: Sequence[Contestant]) -> Contestant | None:
    """The float model that a model is compared with: of its runtime, family and size."""

    def kind(other: Contestant) -> tuple[Any, ...]:
        keys = ("family", "height", "width", "batch")
        return (other.entry.runtime, *(_known(other, group, key) for key in keys))

    fitting = (o for o in group if _known(o, group, "bits") == 32 and kind(o) == kind(one))
    return next(fitting, None)


def _known(one: Contestant, group: Sequence[Contestant], key: str) -> Any:
    """What a model says of itself, in whatever runtime."""
    if key in one.facts:
        return one.facts[key]
    return next(o.facts[key] for o in group if o.entry.path == one.entry.path and key in o.facts)


def _row(
    one: Contestant,
    group: Sequence[Contestant],
    turns: Sequence[list[list[float]]],
    times: list[list[float]],
) -> dict[str, Any]:
    """One model with one number of threads.

    ``ratio_to_float``: how many times as fast as the float model of the same runtime, family and
    size, the median of the ratios of all rounds; None where there is none in this run.
    """
    flat = [1e3 * t for turn in times for t in turn]
    reference, ratio = _reference(one, group), None
    if reference is not None:
        theirs = turns[list(group).index(reference)]
        pairs = zip(theirs, times, strict=True)
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)
    median = statistics.median(flat)
    return {
        "model": one.entry.path,
        "runtime": one.entry.runtime,
        "bits": _known(one, group, "bits"),
        "threads": one.entry.threads,
        "height": one.facts["height"],
        "width": one.facts["width"],
        "batch": one.facts["batch"],
        "median_ms": round(median, 3),
        "p95_ms": round(float(np.percentile(flat, 95)), 3),
        "images_per_second": round(1e3 * one.facts["batch"] / median, 3),
        "ratio_to_float": None if ratio is None else round(ratio, 3),
        "file_bytes": _known(one, group, "file_bytes"),
        "ap": _ap(one.entry.path),
        "commit": git_commit(),
    }


def _ap(path: str) -> float | None:
    """What the report beside an exported model says of it."""
    folder = as_path(path) if as_path(path).is_dir() else as_path(path).parent
    file = folder / "report.json"
    if not file.is_file():
        return None
    report = read_json(file)
    found = report.get("ap", {}) if isinstance(report, dict) else {}
    last = list(found.values())[-1:]  # trained, deployed, then what computes the file
    return last[0].get("AP") if last else None


def _profiles(group: Sequence[Contestant], show: Progress, result: dict[str, Any]) -> None:
    found: dict[int, dict[str, Any]] = {}
    for number, one in enumerate(group):
        if one.entry.runtime != "onnxruntime":
            continue
        show(f"operators of {one.entry}")
        nodes = one.ask("profile", runs=PROFILED_RUNS)["operators"]
        found[number] = operators.summary(nodes)
        result["operators"].append(
            {"model": one.entry.path, "threads": one.entry.threads, **found[number]}
        )
    for number, summary in found.items():
        reference = _reference(group[number], group)
        if reference is None or reference is group[number]:
            continue
        sentence = operators.losses(summary, found[list(group).index(reference)])
        if sentence:
            result["notes"].append(f"{printable(group[number].entry.path)}: {sentence}")


def format_benchmark(result: dict[str, Any]) -> str:
    """The rows as a table, then where the time goes."""
    cpu = result["cpu"]
    flags = ", ".join(cpu["flags"]) or "no instructions for bytes"
    load = f", load {cpu['load'][0]}" if cpu["load"] else ""
    lines = [f"{cpu['model']}, {cpu['cores']} cores ({flags}){load}"]
    wide = max([len(row["model"]) for row in result["rows"]] + [5])
    lines.append(
        f"{'model':{wide}} {'runtime':11} {'bits':>4} {'thr.':>4} {'size':>10} {'median ms':>10} "
        f"{'p95':>9} {'images/s':>8} {'x float':>7} {'file KiB':>9} {'peak MiB':>8} {'AP':>6}"
    )
    for row in result["rows"]:
        ratio = "" if row["ratio_to_float"] is None else f"{row['ratio_to_float']:.2f}"
        ap = "" if row["ap"] is None else f"{row['ap']:.3f}"
        size = f"{row['height']}x{row['width']}"
        lines.append(
            f"{row['model']:{wide}} {row['runtime']:11} {row['bits']:>4} {row['threads']:>4} "
            f"{size:>10} {row['median_ms']:>10.2f} {row['p95_ms']:>9.2f} "
            f"{row['images_per_second']:>8.1f} {ratio:>7} {row['file_bytes'] / 1024:>9.0f} "
            f"{row['peak_bytes'] / 2**20:>8.0f} {ap:>6}"
        )
    for found in result["operators"]:
        lines.append(
            f"{found['model']}, {found['threads']} thread{'s' if found['threads'] > 1 else ''}: "
            f"{found['milliseconds']:.2f} ms in operators"
        )
        lines += operators.format_summary(found)
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join(lines)
