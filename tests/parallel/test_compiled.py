"""Programs that are compiled once for each known batch, and for no other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.parallel import compiled
from aqdetr_jax.parallel.compiled import DoesNotFitError, Programs
from aqdetr_jax.parallel.mesh import batch_sharding, make_mesh, replicated

GIB = 2**30


@pytest.fixture
def compilations():
    """The names of the events of compilation, as they come."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


class Small:
    """A sum of images as a step, with a state that is donated."""

    def __init__(self, **options):
        self.mesh = make_mesh()
        split, whole = batch_sharding(self.mesh), replicated(self.mesh)

        def step(state, batch):
            return state + jnp.sum(batch["images"]), jnp.max(batch["images"])

        self.jitted = jax.jit(step, in_shardings=(whole, split), donate_argnums=0)
        self.programs = Programs(
            self.jitted,
            [
                ({"images": jax.ShapeDtypeStruct((2, *b, 3), np.uint8, sharding=split)},)
                for b in ((4, 6), (8, 6))
            ],
            name="training step",
            **{"remedies": "make it smaller", **options},
        )
        self.state = jax.device_put(jnp.float32(0), whole)

    def run(self, height, width=6, rows=2):
        batch = {"images": np.ones((rows, height, width, 3), np.uint8)}
        batch = jax.device_put(batch, batch_sharding(self.mesh))
        before = self.state
        self.state, most = self.programs((self.state,), (batch,))(self.state, batch)
        assert before.is_deleted()
        return int(most)


def test_one_compilation_for_each_shape_when_it_is_needed(compilations):
    small = Small()
    compilations.clear()
    for height, wanted in ((4, 1), (4, 1), (8, 2), (4, 2), (8, 2)):
        assert small.run(height) == 1
        assert len(compilations) == wanted
    assert float(small.state) == (3 * 4 + 2 * 8) * 6 * 3 * 2


def test_all_at_once_and_then_never_again(compilations):
    small = Small()
    compilations.clear()
    small.programs.compile_all(small.state)
    assert len(compilations) == 2
    small.programs.compile_all(small.state)
    for height in (8, 4):
        small.run(height)
    assert len(compilations) == 2


def test_what_a_plain_call_has_compiled_is_read_back():
    """The run's program is the one that the estimate before it has timed, and compiled."""
    found, threshold = [], "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[threshold]
    jax.config.update(threshold, 0.0)
    try:
        first = Small()
        batch = {"images": np.ones((2, 4, 6, 3), np.uint8)}
        batch = jax.device_put(batch, batch_sharding(first.mesh))
        first.jitted(first.state, batch)
        second = Small()

        def listen(event, **_):
            found.append(event.rpartition("/")[2])

        jax.monitoring.register_event_listener(listen)
        second.run(4)
        jax.monitoring.unregister_event_listener(listen)
    finally:
        jax.config.update(threshold, before)
    assert found.count("cache_hits") == 1
    assert "cache_misses" not in found


@pytest.mark.parametrize("shape", [(5, 6, 2), (6, 4, 2), (4, 6, 3)])
def test_another_shape_is_named_and_not_compiled(shape, compilations):
    small = Small()
    compilations.clear()
    height, width, rows = shape
    message = rf"training step: a batch of {rows} images of {width}x{height} \(uint8\["
    with pytest.raises(ValueError, match=message) as caught:
        small.run(*shape)
    assert "2 images of 6x4 (uint8[2, 4, 6, 3]); 2 images of 6x8" in str(caught.value)
    assert not compilations


@pytest.fixture
def device(monkeypatch):
    """Devices of 16 GiB whose programs take as much as the test says."""
    takes = [1.0]
    monkeypatch.setattr(compiled, "device_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(compiled, "needed_bytes", lambda program: int(takes[0] * GIB))
    return takes


def test_what_is_compiled_is_said_with_its_memory(device, capsys):
    small = Small()
    small.programs.compile_all(small.state)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": compiled in ")[0] for line in lines] == [
        "training step of 2 images of 6x4",
        "training step of 2 images of 6x8",
    ]
    assert all(line.endswith(" s, 1.0 of 16.0 GiB a device") for line in lines)


@pytest.mark.parametrize(
    ("takes", "reserved", "fits"), [(17, 0, False), (9, 8, False), (9, 7, True)]
)
def test_a_program_that_does_not_fit_is_found_before_it_runs(device, takes, reserved, fits):
    device[0] = takes
    small = Small(reserved=reserved * GIB)
    if fits:
        small.programs.compile_all(small.state)
        return
    with pytest.raises(DoesNotFitError) as caught:
        small.programs.compile_all(small.state)
    text = str(caught.value)
    assert text.startswith("the training step of 2 images of 6x4 does not fit the devices' memory")
    assert f"it takes {takes:.1f} GiB" in text
    assert ("beside 8.0 GiB" in text) == bool(reserved)
    assert text.endswith("of 16.0 GiB: make it smaller")


VMEM = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 25.61M of 16.00M vmem."
"""What libtpu says of a kernel that asks for more vector memory than a chip has."""


@pytest.mark.parametrize(
    "reason", ["RESOURCE_EXHAUSTED: Ran out of memory\n in hbm", "INTERNAL", VMEM]
)
def test_a_compiler_that_runs_out_of_memory_is_understood(reason):
    class Function:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(reason)

    small = Small()
    small.programs._function = Function()
    exhausted = "hbm" in reason
    with pytest.raises(DoesNotFitError if exhausted else jax.errors.JaxRuntimeError) as caught:
        small.programs.compile_all(small.state)
    if exhausted:
        assert "2 images of 6x4 does not fit" in str(caught.value)
        assert "make it smaller (RESOURCE_EXHAUSTED: Ran out of memory in hbm)" in str(caught.value)


def test_a_programs_memory_is_known():
    """Arguments, temporaries and results; what is donated counts once."""
    split = batch_sharding(make_mesh())
    jitted = jax.jit(lambda x: x * 2, donate_argnums=0, in_shardings=split, out_shardings=split)
    program = jitted.lower(jax.ShapeDtypeStruct((1024,), np.float32, sharding=split)).compile()
    assert 4096 <= compiled.needed_bytes(program) < 8192
