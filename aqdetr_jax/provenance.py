"""Where results come from: the commit of the package's sources, versions of what it runs on."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

_PACKAGES = (
    *("aqdetr-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("pillow", "cykooz-resizer"),  # what resizes images
)

GIT_SECONDS = 20
"""How long a run waits for an answer of git."""


@functools.cache
def git_commit() -> str:
    """Commit of the package's own sources: ``<sha>``, ``<sha>-dirty``, or ``unknown``.

    Read once in a process: a run belongs to the code it started with, not to what is edited or
    committed while it runs.

    ``unknown`` where the package is not run from a git checkout of its own repository, so that
    an installed copy inside someone else's checkout does not report that one's commit.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=GIT_SECONDS,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return "unknown"
        commit = git("rev-parse", "--verify", "HEAD")
        # What the drivers of tables write is output: it does not change what runs.
        outputs = (f":(exclude)experiments/{name}" for name in ("results", "manifests"))
        changed = git("status", "--porcelain", "--", ".", *outputs)
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions
