"""Detection on many image files: what is done stays done, whatever happens to the next one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

from aqdetr_jax.checkpoint.model_folder import TEACHERS
from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.data.images import MAX_PIXELS, as_array
from aqdetr_jax.deploy.load import load
from aqdetr_jax.evaluation.predict import Detector, Prediction, check_threshold
from aqdetr_jax.io import write_json_atomic
from aqdetr_jax.paths import as_path, is_local, printable
from aqdetr_jax.viz.detections import draw_boxes
from aqdetr_jax.viz.fonts import note_of_numbers
from aqdetr_jax.viz.png import save_png

_ENDING = ".detections"
_LONGEST = len(f"{_ENDING}.json")
_USUAL_LIMIT = 255  # bytes of a name, on nearly every file system
_LISTED = 5


class PredictError(RuntimeError):
    """Not all images were done; those that were are in the output folder."""


def predict_files(
    images: Sequence[str],
    out: str | os.PathLike[str],
    *,
    model: str | Path | None = None,
    threshold: float = 0.5,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Writes ``NAME.detections.json`` and ``NAME.detections.png`` for every image.

    An image that fails is one line on stderr; the others are done all the same.

    Args:
      images: paths.
      out: folder for the results, made when missing.
      model: a run or its model folder; None takes the float teacher that comes with the package.
      threshold: smallest score.
      max_pixels: refuse larger images.

    Raises:
      PredictError: some images failed, or Ctrl-C stopped the rest; says how many and which.
      ValueError, OSError: nothing can be done: the model, the threshold or the folder is unusable.
    """
    check_threshold(threshold)
    out = as_path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{printable(out)} is not a folder: name another with --out")
    detector = load(model or TEACHERS["detr"])
    if not model:
        names = ", ".join(detector.class_names)
        print(f"no --model given: {TEACHERS['detr']}, which knows {names}")
    done, failed, seen = 0, 0, set[int]()
    first: Exception | None = None  # of the others only the line is kept: they hold their images
    try:
        for path, name in zip(images, target_names(images, out), strict=True):
            try:
                found = _predict(detector, path, out / name, threshold, max_pixels)
            except Exception as error:  # one image is no reason to give up the others
                failed, first = failed + 1, first or error
                print(f"aqdetr: {_line(path, error)}", file=sys.stderr, flush=True)
                continue
            done += 1
            seen.update(int(label) for label in found.labels)
            print(f"{printable(path)}: {len(found)} objects -> {printable(out / name)}.png, .json")
    except KeyboardInterrupt:
        raise PredictError(_stopped(images, done, failed, out)) from None
    note = note_of_numbers(detector.class_names, seen)
    if note:
        print(f"note: {note}")
    if failed:
        raise PredictError(
            f"{failed} of {len(images)} images failed, for the reasons above; "
            f"{done} are in {printable(out)}"
        ) from first


def target_names(images: Sequence[str], out: Path) -> list[str]:
    """The name under which each image's results are written, without what follows ".detections".

    Never the name of an image: predicting in place must not overwrite what it reads. Images of one
    name in several folders are numbered in the order given, also where one of them fails, so that
    the same command writes the same files. A name that would become too long is cut.

    Args:
      images: paths.
      out: the folder; its file system says how long a name may be.
    """
    limit = _name_limit(out) - _LONGEST
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    names = []
    for path in images:
        stem = PurePath(path).stem
        number = numbers.get(stem, 1)
        while True:
            suffix = f"_{number}" if number > 1 else ""
            name = _cut(stem, limit - len(suffix)) + suffix
            if name.casefold() not in taken:  # some file systems do not tell a.png from A.png
                break
            number += 1
        taken.add(name.casefold())
        numbers[stem] = number + 1
        names.append(name + _ENDING)
    return names


def _name_limit(folder: Path) -> int:
    """The longest name of a file in a folder, in bytes, also if the folder is yet to be made."""
    if not is_local(folder):
        return _USUAL_LIMIT
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # not of this system or file system
        return _USUAL_LIMIT


def _cut(text: str, most: int) -> str:
    while len(text.encode("utf-8", "surrogatepass")) > most:
        text = text[:-1]
    return text


def _predict(
    detector: Detector, path: str, target: Path, threshold: float, max_pixels: int
) -> Prediction:
    array = as_array(path, max_pixels=max_pixels)
    found = detector.predict(array, threshold=threshold)
    write_json_atomic(f"{target}.json", {"image": str(path), **found.to_dict()})
    try:
        picture = draw_boxes(
            array, found.boxes, found.labels, found.scores, detector.class_names, min_score=0.0
        )
        save_png(picture, f"{target}.png")
    except Exception as error:
        # An earlier command's picture beside these detections would be a wrong one.
        as_path(f"{target}.png").unlink(missing_ok=True)
        raise RuntimeError(
            f"the picture could not be made ({_reason(error)}); the detections are in "
            f"{printable(target)}.json"
        ) from error
    return found


def _line(path: str, error: Exception) -> str:
    if isinstance(error, ImageReadError):
        return str(error)  # names the file
    return f"{printable(path)}: {_reason(error)}"


def _reason(error: Exception) -> str:
    return printable(str(error) or type(error).__name__, most=500)


def _stopped(images: Sequence[str], done: int, failed: int, out: Path) -> str:
    left = images[done + failed :]
    listed = ", ".join(printable(path) for path in left[:_LISTED])
    more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
    return (
        f"stopped by Ctrl-C: {done} of {len(images)} images are in {printable(out)}, "
        f"{failed} failed; not done: {listed}{more}"
    )
