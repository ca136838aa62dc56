from __future__ import annotations

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_bit_equal, make_state

from aqdetr_jax.checkpoint import steps as checkpoint_module
from aqdetr_jax.checkpoint.steps import Checkpoints
from aqdetr_jax.checkpoint.store import CheckpointError
from aqdetr_jax.trees import ParameterMismatchError, check_parameters, nest


def data_file(directory: Path, step: int) -> Path:
    """The largest file of a step: it holds array data."""
    files = [p for p in (directory / f"step_{step:08d}").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def saved_three(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), metadata={"note": f"s{step}"})
    return directory


@pytest.fixture
def three(saved_three, tmp_path) -> Path:
    return Path(shutil.copytree(saved_three, tmp_path / "checkpoints"))


# --- training checkpoints ------------------------------------------------------------------------


def test_round_trip_is_bit_equal(three):
    with Checkpoints(three) as checkpoints:
        assert checkpoints.latest_step() == 3
        state, step = checkpoints.restore(make_state(0))
        assert step == 3
        assert_bit_equal(state, make_state(3))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
            make_state(0),
        )
        state, step = checkpoints.restore(abstract, step=1)
        assert step == 1
        assert_bit_equal(state, make_state(1))
        assert checkpoints.metadata(2) == {"note": "s2"}


def test_restore_without_a_tree_gives_numpy(three):
    tree, step = Checkpoints(three).restore()
    assert step == 3
    assert tree["params"]["dense"]["half"].dtype == jnp.bfloat16
    assert isinstance(tree["params"]["dense"]["half"], np.ndarray)
    expected = make_state(3)
    assert tree["params"]["packed"].tobytes() == np.asarray(expected.params["packed"]).tobytes()
    assert tree["step"] == 3


def test_arrays_may_be_donated_and_overwritten_after_save(tmp_path):
    tree = {"a": jnp.full((500_000,), 1.0), "n": np.full(500_000, 2.0)}
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree)
        tree["n"][:] = -1
        moved = tree["a"]
        for _ in range(5):
            moved = increment(moved)
        moved.block_until_ready()
        restored, _ = checkpoints.restore()
    assert (restored["a"] == 1).all()
    assert (restored["n"] == 2).all()


def test_no_checkpoint_at_all_is_none(tmp_path):
    assert Checkpoints(tmp_path / "none").restore(make_state()) is None
    assert Checkpoints(tmp_path / "none").latest_step() is None
    assert not (tmp_path / "none").exists()


def truncate(directory):
    file = data_file(directory, 3)
    file.write_bytes(file.read_bytes()[:-20])
    return "bytes, expected"


def flip_a_byte(directory):
    file = data_file(directory, 3)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))
    return "is damaged: its SHA-256"


def delete_a_file(directory):
    data_file(directory, 3).unlink()
    return "is missing"


def delete_the_folder(directory):
    shutil.rmtree(directory / "step_00000003")
    return "is missing"


def truncate_the_manifest(directory):
    manifest = directory / "step_00000003.manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    return "not valid JSON"


def alter_the_manifest(directory):
    manifest = directory / "step_00000003.manifest.json"
    manifest.write_text(manifest.read_text().replace('"s3"', '"s9"'))
    return "its checksum does not match"


@pytest.mark.parametrize(
    "harm",
    [
        truncate,
        flip_a_byte,
        delete_a_file,
        delete_the_folder,
        truncate_the_manifest,
        alter_the_manifest,
    ],
)
def test_damaged_newest_step_is_named_and_the_one_before_is_used(three, harm, caplog):
    expected = harm(three)
    with caplog.at_level(logging.WARNING), Checkpoints(three) as checkpoints:
        state, step = checkpoints.restore(make_state())
        assert step == 2
        assert_bit_equal(state, make_state(2))
        assert "step 3 is damaged and is not used" in caplog.text
        assert expected in caplog.text
        with pytest.raises(CheckpointError, match="step 3: "):
            checkpoints.restore(make_state(), step=3)
        # Training goes on and saves the same step again: it is whole afterwards.
        checkpoints.save(3, make_state(7), wait=True)
        assert_bit_equal(checkpoints.restore(make_state())[0], make_state(7))


def test_all_damaged_is_an_error_not_a_fresh_start(three):
    for step in (1, 2, 3):
        data_file(three, step).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(three).restore(make_state())
    text = str(caught.value)
    assert "no intact checkpoint in" in text
    assert all(f"step {step}: " in text for step in (1, 2, 3))


@pytest.mark.parametrize("name", ["step_00000004", "step_00000004.orbax-checkpoint-tmp"])
def test_unfinished_save_is_ignored_named_and_cleaned_up(three, name, caplog):
    # What a kill leaves: the folder, final name or not, and no manifest.
    shutil.copytree(three / "step_00000003", three / name)
    with caplog.at_level(logging.WARNING), Checkpoints(three) as checkpoints:
        assert checkpoints.latest_step() == 3
        _, step = checkpoints.restore(make_state())
        assert step == 3
        assert f"ignoring unfinished {name}" in caplog.text
        checkpoints.save(4, make_state(4), wait=True)
        assert checkpoints.restore(make_state())[1] == 4
    assert not (three / "step_00000004.orbax-checkpoint-tmp").exists()


def test_only_an_unfinished_first_save_starts_again(tmp_path, caplog):
    (tmp_path / "step_00000005").mkdir()
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(tmp_path).restore(make_state()) is None
    assert "ignoring unfinished step_00000005" in caplog.text


def test_kill_during_save_leaves_a_usable_folder(tmp_path, run_python):
    # A real SIGKILL between Orbax's commit and the manifest, and one before the commit.
    source = """
        import os, signal, sys
        import numpy as np
        from aqdetr_jax.checkpoint import steps as checkpoint
        checkpoints = checkpoint.Checkpoints({directory!r})
        checkpoints.save(1, {{"a": np.arange(3)}}, wait=True)
        die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        {where} = die
        checkpoints.save(2, {{"a": np.arange(3) + 10}}, wait=True)
    """
    for index, where in enumerate(("checkpoint.write_manifest", "checkpoints._finish")):
        directory = str(tmp_path / f"{index}")
        run_python(source.format(directory=directory, where=where), devices=1, expect=-9)
        with Checkpoints(directory) as checkpoints:
            tree, step = checkpoints.restore()
            assert step == 1
            assert tree["a"].tolist() == [0, 1, 2]
            checkpoints.save(2, {"a": np.arange(3) + 20}, wait=True)
            assert checkpoints.restore()[0]["a"].tolist() == [20, 21, 22]


def test_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, metric in enumerate([None, 0.1, 0.5, float("nan"), 0.2, None]):
            checkpoints.save(step, {"a": np.full(3, step)}, metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2
        assert checkpoints.restore(step=2)[0]["a"].tolist() == [2, 2, 2]
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"step_00000002", "step_00000004", "step_00000005"}
    with pytest.raises(ValueError, match="keep must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_failed_save_is_reported_and_keeps_older_steps(three, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with Checkpoints(three, keep=1) as checkpoints:
        monkeypatch.setattr(checkpoint_module, "write_manifest", full)
        checkpoints.save(4, make_state(4))
        with pytest.raises(CheckpointError, match=r"saving step 4 .*No space left.*newest: 3"):
            checkpoints.wait()
        monkeypatch.undo()
        assert checkpoints.restore(make_state())[1] == 3
        assert checkpoints.steps() == [1, 2, 3]


def test_full_disk_is_reported_and_the_next_save_works(tmp_path, run_python):
    # A file size limit makes the real write fail in Orbax's own threads.
    run_python(
        f"""
        import resource, signal
        import numpy as np
        from aqdetr_jax.checkpoint.steps import CheckpointError, Checkpoints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with Checkpoints({str(tmp_path)!r}, keep=1) as checkpoints:
            checkpoints.save(1, {{"a": np.arange(3)}}, wait=True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
            checkpoints.save(2, {{"a": np.random.default_rng(0).random(1_000_000)}})
            try:
                checkpoints.wait()
            except CheckpointError as error:
                assert "saving step 2" in str(error) and "newest: 1" in str(error), error
            else:
                raise SystemExit("no error")
            assert checkpoints.restore()[1] == 1
            checkpoints.save(2, {{"a": np.arange(3)}}, wait=True)
            assert checkpoints.restore()[1] == 2
        """,
        devices=1,
    )


def test_unknown_step_lists_the_known_ones(three):
    with pytest.raises(CheckpointError, match="has no step 9; its steps: 1, 2, 3"):
        Checkpoints(three).restore(make_state(), step=9)
    with pytest.raises(CheckpointError, match="step 9"):
        Checkpoints(three).metadata(9)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ("text", "a/x is a str"),
        (jnp.zeros((0, 4)), r"a/x is empty \(shape \(0, 4\)\)"),
        (jax.random.key(0), "a/x is a typed PRNG key"),
        (np.array(["a"]), "a/x has dtype <U1"),
    ],
)
def test_leaves_that_cannot_be_saved_are_named(tmp_path, leaf, message):
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.save(0, {"a": {"x": leaf}})
    assert not (tmp_path / "c").exists()


# --- mismatches ----------------------------------------------------------------------------------


def test_mismatch_names_parameters_and_both_shapes(three):
    state = make_state()
    dense = state.params["dense"]
    changed = {
        "dense": {"kernel": jnp.zeros((3, 6)), "halff": dense["half"]},
        "packed": state.params["packed"].astype(jnp.int32),
        "step_size": state.params["step_size"],
    }
    with pytest.raises(ParameterMismatchError) as caught:
        Checkpoints(three).restore(state._replace(params=changed))
    text = str(caught.value)
    assert "step_00000003 does not fit the model" in text
    assert "params/dense/kernel has shape (3, 5) in the checkpoint, (3, 6) in the model" in text
    assert "params/packed has dtype int8 in the checkpoint, int32 in the model" in text
    assert "missing from the checkpoint: params/dense/halff (nearest: params/dense/half)" in text
    assert "in the checkpoint but not in the model: params/dense/half (nearest" in text


def test_long_mismatch_lists_are_cut():
    with pytest.raises(ParameterMismatchError, match=r"\.\.\. and 15 more"):
        check_parameters({}, {f"p{i}": np.zeros(1) for i in range(25)}, source="x")


def test_nest_refuses_colliding_names():
    with pytest.raises(ValueError, match="'a' is both a leaf and a group"):
        nest({("a",): 1, ("a", "b"): 2})
    with pytest.raises(ValueError, match="two leaves are named"):
        nest({("a", "b"): 1, ("a",): 2})


# --- several devices -----------------------------------------------------------------------------


def test_sharded_save_restores_on_another_mesh_and_on_one_device(tmp_path, run_python):
    source = f"""
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from aqdetr_jax.checkpoint.params import load_params, save_params
        from aqdetr_jax.checkpoint.steps import Checkpoints
        value = np.arange(64, dtype=np.float32).reshape(8, 8)
        auto = (AxisType.Auto,) * 2
        wide = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)
        tall = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto, devices=jax.devices()[:4])
        tree = {{"w": jax.device_put(value, NamedSharding(wide, P("data", "model"))),
                 "b": jax.device_put(value[0], NamedSharding(wide, P()))}}
        with Checkpoints({str(tmp_path)!r}) as checkpoints:
            checkpoints.save(5, tree, wait=True)
            sharding = NamedSharding(tall, P(None, "model"))
            abstract = {{"w": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=sharding),
                         "b": jax.ShapeDtypeStruct((8,), np.float32, sharding=sharding.update(
                             spec=P()))}}
            (restored, step) = checkpoints.restore(abstract)
        assert step == 5 and restored["w"].sharding == sharding
        assert (np.asarray(restored["w"]) == value).all()
        save_params({str(tmp_path / "p")!r}, tree, {{}})
        assert (load_params({str(tmp_path / "p")!r})[0]["w"] == value).all()
    """
    run_python(source)
    tree, step = Checkpoints(tmp_path).restore(
        {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32), "b": np.zeros(8, np.float32)}
    )
    assert step == 5
    assert np.asarray(tree["w"]).tolist() == np.arange(64.0).reshape(8, 8).tolist()
