"""``python -m aqdetr_jax`` is the command, and says what it takes before it loads anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aqdetr_jax.training.experiment import load_experiment


def test_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "aqdetr_jax", "config", "--config=shapes_teacher"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.json").write_text(done.stdout)
    printed = load_experiment(str(tmp_path / "printed.json"))
    assert printed == load_experiment("shapes_teacher")


ARGUMENTS_ALONE = """
import os, sys
sys.argv[0] = "aqdetr"
from aqdetr_jax.cli import entry_point
try:
    entry_point()
except SystemExit as end:
    heavy = {"jax", "jaxlib", "numpy", "ml_collections", "flax", "PIL"} & set(sys.modules)
    print("ended", end.code, sorted(heavy), os.environ.get("GLIBC_TUNABLES"))
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--help",), 0, "Low-bit detection transformers"),
        (("train", "--help"), 0, "--workdir DIR"),
        ((), 2, "required: VERB"),
        (("trian",), 2, "invalid choice: 'trian'"),
        (("train", "--config=x", "--wrokdir=y"), 2, "required: --workdir"),
        (("predict", "x.png", "--threshold=high"), 2, "invalid float value: 'high'"),
    ],
)
def test_help_and_bad_arguments_load_nothing_and_restart_nothing(words, status, said):
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", ARGUMENTS_ALONE, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"ended {status} [] None"
