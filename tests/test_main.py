"""``python -m aqdetr_jax`` is the command."""

from __future__ import annotations

import subprocess
import sys

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
