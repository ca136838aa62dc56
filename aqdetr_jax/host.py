"""What the host's operating system should be told before JAX starts, and what it asks for.

Importing this file is cheap: the command line reads its arguments before anything else is loaded.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

_MAX_CPU_DEVICES = 8
_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = {"hugetlb": 1}
_KEPT = {
    "mmap_max": 0,  # nothing is mapped for itself, and so unmapped when it is given back;
    "arena_max": 1,  # all is in the one heap that can hold a block of any size,
    "trim_threshold": 1 << 40,  # which never shrinks
}
_MOST_THREADS_A_HEAP = 16
"""Cores of a host whose threads can share a heap; those of larger ones would wait for each other.
(They feed accelerators.)"""


EXIT_LOST = 76
"""Exit status where another process ended, or nothing moved: the same command goes on."""


class StoppedError(RuntimeError):
    """A run was asked to stop (SIGTERM or SIGINT); its state is saved."""


class ElsewhereError(RuntimeError):
    """This process stops for a reason that another process of the run prints."""


class LostError(RuntimeError):
    """Another process of the run ended or hangs; the same command goes on from what is saved."""


def prepare(*, compilation_cache: bool = True) -> None:
    """Everything below; called by programs before they use JAX (it may restart the program).

    Args:
      compilation_cache: False in benchmarks that state compile times.
    """
    keep_memory()
    print_any_name()
    use_every_core()
    if compilation_cache:
        use_compilation_cache()


def print_any_name() -> None:
    """Lets output show what the terminal cannot as escapes, as Python does for errors.

    A file name need not be text, and a terminal need not know a class's script; neither is a reason
    to stop.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def use_every_core() -> None:
    """Gives JAX one virtual CPU device a core (a power of two, at most 8), unless told otherwise.

    XLA's CPU backend spreads single operations over the cores, and most operations of a small model
    are too small for that; a batch split over one device a core keeps all of them busy (1.4 times
    as fast on two cores). ``XLA_FLAGS`` or ``JAX_NUM_CPU_DEVICES`` set by the user win.
    """
    import jax

    if (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or "JAX_NUM_CPU_DEVICES" in os.environ
    ):
        return
    count = min(cores(), _MAX_CPU_DEVICES)
    jax.config.update("jax_num_cpu_devices", 1 << (count.bit_length() - 1))


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_cpu() -> None:
    """Keeps JAX off accelerators, for programs that only describe what will run on others."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def keep_memory() -> None:
    """Starts this program again with an allocator that keeps what it has, in huge pages, on Linux.

    XLA's CPU backend takes the temporaries of a training step (a GB for a full-size model) and the
    work space of single products from the allocator and gives them back, every step. Mapped anew,
    their pages are faults and zeros: a fifth of a small model's time in pages of 4 KiB, and even in
    pages of 2 MiB a fourth of a full-size one's. Kept, they are nothing; the program then holds its
    peak of memory to its end. glibc (2.35 and later) reads the settings at program start only,
    hence the restart. Hosts of many cores get huge pages only. Elsewhere nothing happens, and a
    ``GLIBC_TUNABLES`` that the user has set is left alone.
    """
    if not sys.platform.startswith("linux") or _TUNABLES in os.environ or not sys.orig_argv:
        return
    wanted = _HUGE_PAGES | (_KEPT if cores() <= _MOST_THREADS_A_HEAP else {})
    os.environ[_TUNABLES] = ":".join(f"glibc.malloc.{name}={n}" for name, n in wanted.items())
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:
        return  # no restart, no gain; the run itself is unaffected


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs in the user's cache folder, on every kind of device.

    A training step takes the better part of a minute to compile on a small CPU and minutes for an
    accelerator; a run that goes on after an interruption should not pay for it again.
    ``JAX_COMPILATION_CACHE_DIR`` chooses another folder. The folder holds executable code: one that
    others may write to is not used.

    Of the processes of a pod only the first writes (JAX's rule) and every process reads: hosts with
    home folders of their own need a folder that they share to gain from it.
    """
    import jax

    if jax.config.values.get("jax_compilation_cache_dir"):
        return
    folder = cache_folder("compiled")
    reason = _not_mine(folder)
    if reason:
        logger.warning(
            "nothing compiled is kept between runs: %s %s; JAX_COMPILATION_CACHE_DIR chooses "
            "another folder",
            folder,
            reason,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def cache_folder(name: str) -> Path:
    """A folder of this user's cache, which need not be there yet."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The standard has relative paths ignored, and so what is no path of this machine ("gs://...").
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return base / "aqdetr_jax" / name


def _not_mine(folder: Path) -> str:
    """Makes a folder for this user alone; says why it cannot be one, "" if it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if hasattr(os, "getuid"):
        if found.st_uid != os.getuid():
            return "belongs to another user"
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "can be written by others (chmod go-w)"
    return "" if os.access(folder, os.W_OK) else "cannot be written"
