"""Measurements that are kept as they are made, so that a command can go on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aqdetr_jax.io import read_json, write_json_atomic

FORMAT = 1


class Ledger:
    """A JSON file of rows, written anew with every row.

    Args:
      path: the file; rows in it are taken over.
      measured: what the rows are of; a file of something else is refused.

    Raises:
      ValueError: the file is no such ledger, or of something else.
    """

    def __init__(self, path: Path, measured: dict[str, Any]):
        self._path, self._measured = path, measured
        self._rows: list[dict[str, Any]] = []
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(f"{path.parent} is not a folder: name another with --out")
        if not path.exists():
            return
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} holds no measurements of this version: choose another --out")
        found = content["measured"]
        differing = [key for key in measured if found.get(key) != measured[key]]
        if differing:
            raise ValueError(
                f"{path} holds measurements with another {', '.join(differing)}: choose another "
                "--out, or remove it"
            )
        self._rows = list(content["rows"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which they were measured."""
        return self._rows

    def find(self, kind: str, group: str, bits: Any) -> dict[str, Any] | None:
        """The row of a measurement, None if it was not made."""
        for row in self._rows:
            if (row["kind"], row["group"], row["bits"]) == (kind, group, bits):
                return row
        return None

    def add(
        self, kind: str, group: str, bits: Any, values: dict[str, Any], seconds: float
    ) -> dict[str, Any]:
        """Keeps a row; it is on the disk when this returns."""
        row = {"kind": kind, "group": group, "bits": bits, **values, "seconds": round(seconds, 2)}
        self._rows.append(row)
        write_json_atomic(self._path, self._content({}))
        return row

    def close(self, more: dict[str, Any]) -> dict[str, Any]:
        """Writes the rows with what follows from them; returns the whole content."""
        content = self._content(more)
        write_json_atomic(self._path, content)
        return content

    def _content(self, more: dict[str, Any]) -> dict[str, Any]:
        return {"format": FORMAT, "measured": self._measured, **more, "rows": self._rows}
