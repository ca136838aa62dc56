"""What a folder of a store holds, from one listing, for readers that ask file by file."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from aqdetr_jax.stores.requests import call


class _Snapshot:
    """What is in a folder, by one listing."""

    def __init__(self, root: Any):
        self.root = str(root)
        name = root._name()
        listed = call(root, "list", lambda fs: fs.find(name, detail=True))
        prefix = f"{root.parts[1]}://"
        self._files = {
            prefix + found: info
            for found, info in listed.items()
            if not found.endswith("/") and found != name
        }
        self._folders: dict[str, set[str]] = {self.root: set()}
        for path in self._files:
            while path != self.root:
                path, _, last = path.rpartition("/")
                self._folders.setdefault(path, set()).add(last)

    def info(self, path: Any) -> dict[str, Any] | None:
        text = str(path)
        return self._files.get(text) or ({"type": "directory"} if self.inside(path) else None)

    def inside(self, path: Any) -> list[str]:
        return sorted(self._folders.get(str(path), ()))

    def files(self, path: Any) -> list[Any]:
        within = f"{path}/"
        return [type(path)(name) for name in self._files if name.startswith(within)]


_CURRENT: contextvars.ContextVar[_Snapshot | None] = contextvars.ContextVar(
    "snapshot", default=None
)


@contextlib.contextmanager
def snapshot_of(folder: Any) -> Iterator[None]:
    """See ``io.snapshot``."""
    token = _CURRENT.set(_Snapshot(folder))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def snapshot_with(path: Any) -> _Snapshot | None:
    """The snapshot that a path is in."""
    known = _CURRENT.get()
    if known is None:
        return None
    text = str(path)
    return known if text == known.root or text.startswith(f"{known.root}/") else None
