"""One virtual CPU device a core, unless the user says otherwise; output on any terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
from aqdetr_jax.host import use_every_core
{before}
use_every_core()
import jax
print(jax.device_count())
"""


def devices(before: str = "", **environment: str) -> int:
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(child.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no such call on this system")
@pytest.mark.parametrize(("cores", "wanted"), [(1, 1), (2, 2), (3, 2), (7, 4), (64, 8)])
def test_a_power_of_two_and_never_more_than_eight(cores, wanted):
    assert devices(f"import os; os.sched_getaffinity = lambda _: set(range({cores}))") == wanted


def test_what_the_user_set_wins():
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices(JAX_NUM_CPU_DEVICES="5") == 5


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_name_can_be_printed(encoding):
    program = "import aqdetr_jax.host as h; h.print_any_name(); print('a\u732b\\udcff')"
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    cat = "\u732b" if encoding == "utf-8" else "\\u732b"
    assert child.stdout.decode(encoding).strip() == f"a{cat}\\udcff"
