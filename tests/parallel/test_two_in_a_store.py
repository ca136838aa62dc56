"""Two processes that have nothing but an object store in common."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import numpy as np
import tiny

from aqdetr_jax.checkpoint.steps import Checkpoints

PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from aqdetr_jax.cli import _run
from aqdetr_jax.parallel.hosts import initialize_distributed
from aqdetr_jax.parallel.mesh import make_mesh
from aqdetr_jax.training.workdir import prepare_workdir
from aqdetr_jax.checkpoint.steps import Checkpoints

port, index, case, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
initialize_distributed("localhost:" + port, 2, index)

def saved(*_):
    with prepare_workdir(folder, {"seed": 1}) as place, Checkpoints(place.path / "c") as kept:
        sharding = NamedSharding(make_mesh(2, 1), PartitionSpec("data"))
        mine = np.full((1, 3), index, np.float32)
        array = jax.make_array_from_process_local_data(sharding, mine)
        kept.save(1, {"x": array}, wait=True)
        shape = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        tree, step = kept.restore({"x": shape})
        assert step == 1
        assert (np.asarray(tree["x"].addressable_data(0)) == index).all()

class Arguments:
    traceback = False
    run = staticmethod(globals()[case])

sys.exit(_run(Arguments, ()))
"""


def run(case, folder):
    """Exit status and standard error of both."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(i), case, str(folder)],
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [child.communicate(timeout=tiny.HUNG_SECONDS)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    lines = [[line for line in text.splitlines() if line.startswith("aqdetr: ")] for text in said]
    return [child.returncode for child in children], lines, said


def test_two_processes_save_to_a_store(bucket):
    codes, _, said = run("saved", bucket / "run")
    assert codes == [0, 0], said
    with Checkpoints(bucket / "run" / "c") as checkpoints:
        tree, step = checkpoints.restore()
    assert step == 1
    np.testing.assert_array_equal(tree["x"], [[0, 0, 0], [1, 1, 1]])
    assert not list((bucket / "run").glob(".shared-*"))
