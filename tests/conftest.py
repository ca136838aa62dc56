"""Shared test set-up: one CPU device, a persistent compilation cache, and the BCCD folder.

``AQDETR_TEST_PLATFORM=cuda pytest -m accelerator`` runs the tests that are marked so on another
device than a CPU; the others are for CPUs.

The main test process keeps a single device, so that a test cannot come to depend on a device count
by accident; tests of several devices start a child process that sets ``XLA_FLAGS`` before it
imports jax (see :func:`run_python`).
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Of what needs torch, which ``make test`` does not install.
collect_ignore_glob = [] if os.environ.get("AQDETR_PARITY") == "live" else ["*_live.py"]

REPO_ROOT = Path(__file__).resolve().parent.parent
CACHE_DIR = REPO_ROOT / ".jax_cache"

# The environment reaches child processes too; it must be set before jax is first imported.
PLATFORM = os.environ.get("AQDETR_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE_DIR)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402
from object_store import bucket, impatient, store  # noqa: E402, F401

# A pytest plug-in may have imported jax before this file set the environment.
jax.config.update("jax_platforms", PLATFORM)
jax.config.update("jax_compilation_cache_dir", str(CACHE_DIR))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


# A busy machine is no reason for a test to fail.
settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_speed")

# Tracing makes many small objects that live on: looking for garbage among them is a fifth of it.
gc.set_threshold(100_000, 10, 50)


@pytest.fixture(scope="session")
def bccd_root() -> Path:
    """Folder of the BCCD blood cell set (``Annotations``, ``ImageSets``, ``JPEGImages``).

    Taken from the environment variable ``AQDETR_BCCD``, else from ``../shared/data/bccd`` beside
    the repository. A test that needs it is skipped, with the reason, where it is absent.
    """
    named = os.environ.get("AQDETR_BCCD")
    root = Path(named) if named else REPO_ROOT.parent / "shared" / "data" / "bccd"
    if not (root / "JPEGImages").is_dir():
        if named:
            pytest.fail(f"AQDETR_BCCD={named} has no folder JPEGImages: not the BCCD set")
        pytest.skip("the BCCD set is not on this machine: set AQDETR_BCCD to its folder")
    return root


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """Compiles quickly to slower code: compiling takes most of the time of small tests.

    Not for tests of speed, of compiled programs or of the last bit; child processes inherit it.
    """
    import tiny

    with tiny.quick():
        yield


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random float model for the students of ``tests/tiny.py``."""
    import tiny

    with tiny.quick():
        return tiny.save_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs Python source in a child process with ``devices`` virtual CPU devices.

    Returns a function ``run(source, devices=8, expect=0) -> stdout``; the test fails with the
    child's output when its exit status is not ``expect``.
    """

    import tiny

    def run(source: str, *, devices: int = 8, expect: int = 0) -> str:
        environment = dict(os.environ)
        count = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = tiny.more_flags(count)
        child = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
            env=environment,
            cwd=REPO_ROOT,
            capture_output=True,
            text=True,
            timeout=tiny.HUNG_SECONDS,
            check=False,
        )
        if child.returncode != expect:
            pytest.fail(f"exit {child.returncode}, expected {expect}\n{child.stdout}{child.stderr}")
        return child.stdout

    return run
