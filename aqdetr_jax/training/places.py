"""Where a run's files may go, whether all of its hosts see them there, and the lock of a disk.

The lock of an object store is in :mod:`aqdetr_jax.training.lease`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from aqdetr_jax.io import write_bytes_atomic
from aqdetr_jax.parallel.hosts import agreed
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


def check_shared(path: Path) -> None:
    """Whether all processes of a run see the same folder.

    Raises:
      WorkdirError: they do not; the message names those that see another one.
    """
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(1 << 31)))
    mark = path / f".shared-{int(token)}"
    with agreed():
        if jax.process_index() == 0:
            write_bytes_atomic(mark, b"")
    try:
        seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)
    blind = [str(process) for process in np.flatnonzero(np.asarray(seen) == 0)]
    with agreed():
        if blind:
            raise WorkdirError(
                f"the work directory {path} is not one folder for all hosts: process "
                f"{', '.join(blind)} of {jax.process_count()} does not see what process 0 writes "
                "there. Give a folder that all hosts share, or gs://BUCKET/NAME"
            )


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
