from __future__ import annotations

import dataclasses
import logging
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, PartitionSpec

from aqdetr_jax.models.config import DeformableConfig
from aqdetr_jax.models.detector import build_detector
from aqdetr_jax.parallel import hosts, placement
from aqdetr_jax.parallel import mesh as meshes
from aqdetr_jax.quant.policy import stock_policy


def test_one_device_is_a_mesh_of_one():
    mesh = meshes.make_mesh()
    assert dict(mesh.shape) == {"data": 1, "model": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    batch = meshes.put_batch({"x": np.ones((3, 2))}, mesh)
    assert batch["x"].shape == (3, 2)
    with pytest.raises(ValueError, match="needs 2 devices, there are 1"):
        meshes.make_mesh(data=2)
    with pytest.raises(ValueError, match="at least 1"):
        meshes.make_mesh(model=0)


class Device:
    """As much of a device as a mesh's shape depends on."""

    def __init__(self, platform: str):
        self.platform = platform


@pytest.mark.parametrize(
    ("count", "platform", "options", "wanted"),
    [
        (8, "tpu", {"batch_size": 16}, (8, 1)),
        (8, "tpu", {"model": 2}, (4, 2)),
        (8, "tpu", {"data": 2, "model": 4}, (2, 4)),
        (8, "cpu", {"batch_size": 12}, (6, 1)),  # cores may be left idle
        (8, "cpu", {"batch_size": 4, "model": 3}, (2, 3)),
    ],
)
def test_shapes_of_meshes(count, platform, options, wanted):
    assert meshes.mesh_shape(devices=[Device(platform)] * count, **options) == wanted


@pytest.mark.parametrize(
    ("count", "platform", "options", "message"),
    [
        (8, "tpu", {"model": 3}, r"config.mesh.model=3 does not divide the 8 dev.* 1, 2, 4, 8$"),
        (4, "tpu", {"model": 8}, r"config.mesh.model=8 does not divide the 4 devices: .* 1, 2, 4$"),
        (4, "cpu", {"model": 8}, r"config.mesh.model=8 does not divide the 4 devices: .* 1, 2, 4$"),
        (8, "tpu", {"data": 3, "model": 2}, "mesh data=3 x model=2 needs 6 devices, there are 8"),
        (8, "tpu", {"data": 0}, "at least 1"),
    ],
)
def test_meshes_that_cannot_be_say_what_to_set(count, platform, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        meshes.mesh_shape(devices=[Device(platform)] * count, **options)
    assert "\n" not in str(caught.value)


def test_unused_rule_is_reported(caplog):
    mesh = meshes.make_mesh()
    with caplog.at_level(logging.WARNING):
        placed = placement.parameter_shardings(
            {"a": {"kernel": np.ones((2, 2))}},
            mesh,
            [("kernel$", PartitionSpec(None, "model")), ("kernal", PartitionSpec())],
        )
    assert placed["a"]["kernel"].spec == PartitionSpec(None, "model")
    assert "sharding rule 'kernal' places no parameter" in caplog.text
    assert "'kernel$'" not in caplog.text


@pytest.mark.parametrize("family", ["detr", "deformable"])
def test_all_projections_of_both_families_are_shared_out(family, caplog):
    """Nothing of the attentions and feed-forward networks lies whole on every device."""
    deformable = DeformableConfig(levels=2, points=2, norm_groups=4)
    config = dataclasses.replace(tiny.MODEL, num_classes=3, family=family, deformable=deformable)
    module = build_detector(config, stock_policy("w4a4"))
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    mask = jax.ShapeDtypeStruct((1, 32, 32), bool)
    params = jax.eval_shape(module.init, jax.random.key(0), image, mask)["params"]
    mesh = jax.sharding.AbstractMesh((1, 2), meshes.AXES)
    with caplog.at_level(logging.WARNING):
        placed = placement.parameter_shardings(params, mesh, placement.MODEL_PARALLEL)
    assert not caplog.text
    split = {path: x.spec for path, x in flatten_dict(placed, sep="/").items() if x.spec}
    kernels = {p for p in flatten_dict(params, sep="/") if re.search("_attention/.*/kernel$", p)}
    kernels |= {p for p in flatten_dict(params, sep="/") if re.search("forward/.*/kernel$", p)}
    assert kernels <= set(split)
    assert len(kernels) == (1 + 2 + 2) * 4 + (1 + 2) * 2
    for path in kernels:
        rows_are_split = path.endswith(("out_proj/kernel", "output_proj/kernel", "linear2/kernel"))
        wanted = ("model", None) if rows_are_split else (None, "model")
        assert split[path] == PartitionSpec(*wanted), path
        # A step and a bias for each column lie where the column lies.
        assert (path.removesuffix("kernel") + "bias" in split) != rows_are_split
        assert (f"{path}_step" in split) != rows_are_split


def test_single_process_does_not_initialize(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert hosts.initialize_distributed() is False
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("SLURM_NTASKS", "8")  # an allocation without srun
    assert hosts.initialize_distributed() is False
    assert not jax.distributed.is_initialized()


def test_eight_devices(run_python):
    run_python(
        """
        import jax, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import PartitionSpec as P
        from aqdetr_jax.parallel.mesh import *
        from aqdetr_jax.parallel.placement import *

        assert dict(make_mesh().shape) == {"data": 8, "model": 1}
        # The cores of a lone CPU: as many as share the batch, or as many as are wanted.
        assert dict(make_mesh(batch_size=12).shape) == {"data": 6, "model": 1}
        assert dict(make_mesh(batch_size=12, model=2).shape) == {"data": 4, "model": 2}
        assert dict(make_mesh(batch_size=7).shape) == {"data": 7, "model": 1}
        few = make_mesh(2)
        assert dict(few.shape) == {"data": 2, "model": 1}
        assert put_batch({"x": np.ones((6, 2))}, few)["x"].sharding.device_set == set(
            jax.devices()[:2])
        mesh = make_mesh(model=2)
        assert dict(mesh.shape) == {"data": 4, "model": 2}
        params = {"ffn": {"kernel": np.ones((6, 4)), "bias": np.ones(4)}, "head": np.ones((3, 4))}
        state = {"params": params, "opt": optax.adam(1e-3).init(params)}
        rules = [("ffn/kernel$", P(None, "model")), ("ffn/bias$", P("model")), ("kernel", P("x"))]
        shardings = parameter_shardings(state, mesh, rules)
        assert shardings["params"]["ffn"]["kernel"].spec == P(None, "model")  # the first wins
        assert shardings["opt"][0].mu["ffn"]["kernel"].spec == P(None, "model")
        assert shardings["params"]["head"].spec == P()
        placed = jax.device_put(state, shardings)
        assert placed["params"]["ffn"]["kernel"].addressable_shards[0].data.shape == (6, 2)

        def message(rules):
            try:
                parameter_shardings(params, mesh, rules)
            except ValueError as error:
                return str(error)
        assert "dimension 0 of head (shape (3, 4)) is not divisible by the 2 dev" in message(
            [("head", P("model"))])
        assert "not divisible by the 8 devices along data/model" in message(
            [("head", P(None, ("data", "model")))])
        assert "no mesh axis 'expert' (has: data, model)" in message([("head", P("expert"))])
        assert "has 2 dimensions, but ffn/bias has shape (4,)" in message([("ffn", P(None, None))])

        batch = put_batch({"x": np.arange(16.0).reshape(8, 2), "valid": np.ones(8, bool)}, mesh)
        assert batch["x"].sharding.spec == P("data")
        assert batch["x"].addressable_shards[0].data.shape == (2, 2)
        with jax.set_mesh(mesh):
            total = jax.jit(jnp.sum, out_shardings=replicated(mesh))(batch["x"])
        assert float(total) == 120.0
        try:
            put_batch({"x": np.ones((6, 2))}, mesh)
        except ValueError as error:
            assert "batch['x'] has 6 rows over all processes, which 4 devices" in str(error)
        else:
            raise SystemExit("no error")
        """
    )


PROCESS = """
import sys, jax, jax.numpy as jnp, numpy as np
from aqdetr_jax.checkpoint.params import load_params, save_params
from aqdetr_jax.checkpoint.steps import CheckpointError, Checkpoints
from aqdetr_jax.parallel import hosts, mesh as meshes
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
assert hosts.initialize_distributed("localhost:" + port, 2, index)
assert hosts.initialize_distributed()
mesh = meshes.make_mesh()
assert dict(mesh.shape) == {"data": 2, "model": 1}
batch = meshes.put_batch({"x": np.arange(4.0).reshape(2, 2) + 10 * index}, mesh)
assert batch["x"].shape == (4, 2)
total = jax.jit(jnp.sum, out_shardings=meshes.replicated(mesh))(batch["x"])
assert float(total) == 52.0, total
with Checkpoints(folder + "/steps") as checkpoints:
    assert checkpoints.restore(batch) is None
    for step in (1, 2):
        checkpoints.save(step, batch, wait=True)
    restored, step = checkpoints.restore(batch)
    assert step == 2
    same = jax.jit(lambda a, b: (a == b).all(), out_shardings=meshes.replicated(mesh))
    assert bool(same(restored["x"], batch["x"]))
    try:
        checkpoints.restore(batch, step=7)
    except CheckpointError:
        pass
    else:
        raise SystemExit("no error")
save_params(folder + "/final", batch, {"a": 1})
assert load_params(folder + "/final")[0]["x"].shape == (4, 2)
"""


def test_two_processes_share_a_batch_and_a_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=tiny.HUNG_SECONDS)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
