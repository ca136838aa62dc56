"""Reading a file that may be cut short or hostile: sizes are checked before memory is taken."""

from __future__ import annotations

from typing import BinaryIO, NoReturn

MAX_NAME = 256
"""Bytes of each line of a global's name."""


class Malformed(ValueError):
    """What is wrong with a file, in words that do not name it: its reader adds the name."""


def shown(text: str, most: int = 120) -> str:
    """``text`` made fit for a one-line message: cut to ``most``, odd characters escaped."""
    cut = text if len(text) <= most else text[: most - 3] + "..."
    return cut if cut.isprintable() else ascii(cut)


class Source:
    """A stream of known size, read from where it stands, never past its end."""

    def __init__(self, stream: BinaryIO, size: int, what: str):
        """Args: the stream; how many bytes may be read of it; its name in messages."""
        self.stream = stream
        self.size = size
        self.what = what
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes; Malformed if there are fewer (checked before reading)."""
        if not 0 <= count <= self.size - self.position:
            self.cut()
        data = self.stream.read(count)
        self.position += len(data)
        if len(data) != count:
            self.cut()
        return data

    def line(self) -> str:
        """The next line without its end, at most MAX_NAME bytes of printable ASCII."""
        data = self.stream.readline(min(MAX_NAME + 1, self.size - self.position))
        self.position += len(data)
        if not data.endswith(b"\n"):
            raise Malformed(f"{self.what} holds a name that does not end")
        try:
            return data[:-1].decode("ascii")
        except UnicodeDecodeError:
            raise Malformed(f"{self.what} holds a name that is not ASCII") from None

    def skip(self, count: int) -> None:
        """Passes over ``count`` bytes; Malformed if there are fewer."""
        if not 0 <= count <= self.size - self.position:
            self.cut()
        self.stream.seek(count, 1)
        self.position += count

    def cut(self) -> NoReturn:
        """Raises the error of a file that is too short."""
        raise Malformed(f"{self.what} is cut short or corrupt: it ends inside a value")
