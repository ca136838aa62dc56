"""Objects of a store as file objects."""

from __future__ import annotations

import io
import os
from typing import Any

from aqdetr_jax.stores.requests import call


class Reader(io.RawIOBase):
    """A large object, read in ranges."""

    def __init__(self, path: Any, size: int):
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position, bytes."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Sets the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads the next bytes."""
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        name, start = self._path._name(), self._at
        data = call(self._path, "read", lambda fs: fs.cat_file(name, start, end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class Upload(io.BytesIO):
    """Sent when it is closed; not if the ``with`` block around it failed, and not unclosed."""

    def __init__(self, path: Any):
        super().__init__()
        self._path: Any = path

    def abandon(self) -> None:
        """Nothing will be sent."""
        self._path = None

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self.abandon()
        self.close()

    def close(self) -> None:
        """Sends what was written."""
        if not self.closed and self._path is not None:
            path, self._path = self._path, None
            path.write_bytes(self.getvalue())
        super().close()

    def __del__(self) -> None:
        self.abandon()


class Text(io.TextIOWrapper):
    """Text over either of them."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None and isinstance(self.buffer, Upload):
            self.buffer.abandon()
        self.close()
