"""Opening files named by untrusted annotations: only what lies inside the dataset's folder."""

from __future__ import annotations

import pathlib
import reprlib

from aqdetr_jax.data.dataset import DatasetError, ImageReadError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Of files that are taken for images, where no annotation names them; in any case."""


def check_relative(name: object, where: str) -> str:
    """Refuses a file name that could point outside its folder, by its text alone.

    Args:
      name: the file name as annotated.
      where: who names it, for the message.

    Returns:
      The name.

    Raises:
      DatasetError: not a string, empty, absolute, with a ``..`` part or with a NUL.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise DatasetError(
            f"{where}: file name must be a non-empty string, got {reprlib.repr(name)}"
        )
    for path in (pathlib.PurePosixPath(name), pathlib.PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise DatasetError(
                f"{where}: file name {reprlib.repr(name)} points outside the image folder; "
                "use a name relative to it"
            )
    return name


def resolve_inside(folder: pathlib.Path, name: str, *, follow_links: bool = False) -> pathlib.Path:
    """The path of ``name`` in ``folder``, with links followed.

    Args:
      folder: the image folder.
      name: a relative name that passed :func:`check_relative`.
      follow_links: links may lead outside the folder: whoever opens the set trusts it.

    Raises:
      ImageReadError: a link leads in a circle, or outside the folder and may not.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError) as error:
        raise ImageReadError(f"{folder / name}: cannot be followed ({error})") from error
    if not follow_links and not path.is_relative_to(folder.resolve()):
        raise ImageReadError(
            f"{folder / name}: a link leads outside {folder}; if you trust this data set, "
            "--config.data.follow_links=true follows it"
        )
    return path
