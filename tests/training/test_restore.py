"""A checkpoint of eight devices on four and on two: the same state, placed anew."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("quick_compile")

PROGRAM = """
    import dataclasses, sys
    sys.path.insert(0, "tests")
    import jax
    import numpy as np
    import tiny
    from aqdetr_jax import trees
    from aqdetr_jax.checkpoint.steps import Checkpoints
    from aqdetr_jax.parallel.mesh import make_mesh
    from aqdetr_jax.training import optimizer as optim
    from aqdetr_jax.training import setup
    from aqdetr_jax.training.assemble import assemble, restore, variables_of
    from aqdetr_jax.training.packing import Packing

    student = tiny.student("")
    config = tiny.resolved(dataclasses.replace(student, distill=tiny.FLOAT.distill))
    module = setup.build_module(config)
    shapes = variables_of(module, (64, 64))


    def assembled(data, model):
        devices = jax.devices()[: data * model]
        mesh = make_mesh(data, model, devices=devices)
        split = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, model=model))
        return mesh, assemble(split, shapes, mesh)


    def moments(assembly, state):
        # What Adam knows of every parameter, however it is packed.
        leaves = dict(trees.flatten(jax.device_get(state.opt_state)))
        groups = optim.parameter_groups(shapes["params"], config.optimizer, frozen_norms=True)
        single = Packing(shapes["params"], groups, ((".", None),))
        found = assembly.optimizer.packing.repacked(leaves, single)
        assert not [path for path in found if "packed" in path]
        return trees.digest(trees.nest(found))


    folder = {folder!r}
    mesh, assembly = assembled(4, 2)
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        start = assembly.start(tiny.random_like(shapes))
        rng = np.random.default_rng(0)
        moved = jax.tree.map(
            lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding),
            start.opt_state,
        )
        start = start.replace(opt_state=moved)
        kernel = start.params["encoder"]["layer_0"]["feed_forward"]["linear1"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 2
        checkpoints.save(1, start, wait=True)
    wanted = trees.digest((start.params, start.ema)), moments(assembly, start)
    for data, model in ((2, 2), (2, 1)):
        mesh, assembly = assembled(data, model)
        with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
            state, step = restore(checkpoints, assembly, shapes)
        assert step == 1
        # The optimizer's vectors are packed otherwise where layers are split.
        assert trees.digest((state.params, state.ema)) == wanted[0], (data, model)
        assert moments(assembly, state) == wanted[1], (data, model)
        for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(assembly.state)):
            assert leaf.sharding == shape.sharding
        kernel = state.params["encoder"]["layer_0"]["feed_forward"]["linear1"]["kernel"]
        assert len(kernel.sharding.device_set) == data * model
        assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // model
"""


def test_a_checkpoint_of_eight_devices_on_fewer(tmp_path, run_python):
    run_python(PROGRAM.replace("{folder!r}", repr(str(tmp_path / "c"))), devices=8)
