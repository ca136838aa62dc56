"""Opening files named by untrusted annotations: only what lies inside the dataset's folder."""

from __future__ import annotations

import pathlib

from aqdetr_jax.data.dataset import DatasetError, ImageReadError


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
        raise DatasetError(f"{where}: file name must be a non-empty string, got {name!r}")
    for path in (pathlib.PurePosixPath(name), pathlib.PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise DatasetError(
                f"{where}: file name {name!r} points outside the image folder; "
                "use a name relative to it"
            )
    return name


def resolve_inside(folder: pathlib.Path, name: str, *, follow_links: bool = False) -> pathlib.Path:
    """The path of ``name`` in ``folder``, with links followed.

    Args:
      folder: the image folder.
      name: a relative name that passed :func:`check_relative`.
      follow_links: a link may lead outside the folder.

    Raises:
      ImageReadError: a link leads outside the folder.
    """
    path = (folder / name).resolve()
    if not follow_links and not path.is_relative_to(folder.resolve()):
        raise ImageReadError(
            f"{folder / name}: a link leads outside {folder}; "
            "--config.data.follow_links=true reads it"
        )
    return path
