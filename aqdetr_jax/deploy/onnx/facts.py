"""What an exported ONNX file says of itself, for readers that need nothing else of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FORMAT, VERSION = "aqdetr-onnx", 1

FACTS = "aqdetr"
"""Key of the facts, JSON, in the file's metadata."""


class OnnxModelError(ValueError):
    """An ONNX file that cannot be used; the message names the file and the reason."""


def read_facts(stored: Mapping[str, str], path: object = "") -> dict[str, Any]:
    """The facts of a file.

    Args:
      stored: its metadata.
      path: for messages.

    Raises:
      OnnxModelError: it is none of ours, or of another version.
    """
    if FACTS not in stored:
        raise OnnxModelError(f"{path} was not written by aqdetr export --format=onnx")
    try:
        facts = json.loads(stored[FACTS])
        known = facts["format"] == FORMAT and facts["version"] == VERSION
    except (ValueError, TypeError, KeyError):
        raise OnnxModelError(f"{path}: what it says of itself cannot be read") from None
    if not known:
        raise OnnxModelError(
            f"{path} is of version {facts['version']!r} of {facts['format']!r}, and this program "
            f"reads version {VERSION} of {FORMAT!r}: export the model again"
        )
    return facts
