"""Where a run's files may go, and the lock of a disk.

The lock of an object store is in :mod:`aqdetr_jax.training.lease`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
from pathlib import Path

from aqdetr_jax.paths import as_path


class WorkdirError(RuntimeError):
    """A work directory that this run must not use; the message says why and what to do."""


def place_of(path: str | Path) -> Path:
    """Where a run's files go.

    Raises:
      WorkdirError: checkpoints cannot be written there.
    """
    found = as_path(path)
    if str(found).startswith("s3:"):
        raise WorkdirError(
            f"the work directory {found}: checkpoints are written to disks and to gs:// only; "
            "s3:// may hold data and models"
        )
    return found


class FileLock:
    """A locked file."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def check(self) -> None:
        """The system keeps it."""

    def close(self) -> None:
        """Unlocks it."""
        os.close(self._descriptor)


def lock_file(path: Path) -> FileLock:
    """Takes an exclusive lock that the operating system drops when the process ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock_descriptor(descriptor)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            os.close(descriptor)
            raise WorkdirError(
                f"cannot lock the work directory {path.parent} ({error.strerror}): its file system "
                "must support file locks; choose another --workdir"
            ) from error
        holder = ""
        with contextlib.suppress(OSError):
            holder = f" ({os.read(descriptor, 200).decode(errors='replace').strip()})"
        os.close(descriptor)
        raise WorkdirError(
            f"another process is using the work directory {path.parent}{holder}. "
            "Wait for it, stop it, or choose another --workdir."
        ) from error
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return FileLock(descriptor)


def _lock_descriptor(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        # A byte far behind the text, which stays readable for the message of the other process.
        os.lseek(descriptor, 1 << 20, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
