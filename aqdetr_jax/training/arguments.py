"""The words of a command line: options, arguments, and overrides of the configuration."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

OVERRIDE_PREFIX = re.compile(r"^--?config\.")
"""How an override may begin."""


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, tuple[str, ...]]:
    """Parses a command line; what no option and no argument takes may be an override.

    Options and arguments take their words first, whatever these look like: the value of
    ``--workdir lr=1e-3`` is a value. Of the words that are left, ``a.b=value``,
    ``--config.a.b=value`` and ``--config.a.b value`` are overrides, which are read if the parsed
    arguments have ``overrides=True`` (``set_defaults``); any other word ends the program with the
    parser's usual error and status 2. After ``--`` no word is an option.

    Args:
      parser: of everything but the overrides.
      argv: arguments without the program name.

    Returns:
      ``(arguments, overrides)``, overrides in the form ``a.b=value`` (or ``a.b`` without a value,
      for ``apply_overrides`` to refuse).
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    arguments, left = parser.parse_known_args([*_joined(argv[:end]), *argv[end:]])
    if "--" in left:  # which some versions of argparse leave there
        left.remove("--")
    takes = getattr(arguments, "overrides", False)
    unknown = [
        word
        for word in left
        if not takes or not (OVERRIDE_PREFIX.match(word) or ("=" in word and word[:1] != "-"))
    ]
    if unknown:
        hint = " (an override is written KEY=VALUE)" if takes else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments, tuple(OVERRIDE_PREFIX.sub("", word) for word in left)


def _joined(argv: Sequence[str]) -> list[str]:
    """The words with ``--config.a.b value`` as one."""
    words: list[str] = []
    for word in argv:
        open_key = words and OVERRIDE_PREFIX.match(words[-1]) and "=" not in words[-1]
        if open_key and not word.startswith("--"):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words
