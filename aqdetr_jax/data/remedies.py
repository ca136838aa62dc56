"""Options of the command line as messages name them, so that they can be copied as they are."""

from __future__ import annotations

import shlex


def option(key: str, value: object) -> str:
    """``--config.data.KEY=VALUE``, quoted for a shell."""
    return f"--config.data.{key}={shlex.quote(str(value))}"


def both_splits(train: str, evaluation: str) -> str:
    """What asks for two splits that share images."""
    return (
        "to judge on what was trained all the same, set both "
        f"{option('train_split', train)} {option('eval_split', evaluation)}"
    )


def smaller_images(key: str) -> str:
    """What helps where already one image is too large for the memory of a device.

    Args:
      key: of the data's configuration, that says the images' size.
    """
    return (
        f"one image a device is too large already: use smaller config.data.{key}, or devices of "
        "more memory"
    )
