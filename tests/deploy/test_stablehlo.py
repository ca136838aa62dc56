import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.checkpoint.checksums import read_manifest, write_manifest
from aqdetr_jax.deploy.archive import MANIFEST, WEIGHTS
from aqdetr_jax.deploy.carriers import integer_product
from aqdetr_jax.deploy.stablehlo import (
    CONSTANTS,
    FILES,
    PROGRAM,
    StableHloError,
    export_stablehlo,
    load_stablehlo,
)
from aqdetr_jax.quant.contractions import Conv, Dense, Scores

CHANNELS = 64
ARGUMENTS = {"images": ("b, 6, 8, 3", np.uint8), "sizes": ("b, 2", np.int32)}


def network(tpu):
    """A small function of a deployed network's kind: products of codes, floats between them."""
    rng = np.random.default_rng(0)
    stem = rng.integers(-8, 8, (3, 3, 3, CHANNELS)).astype(np.int8)
    kernel = rng.integers(-8, 8, (CHANNELS, CHANNELS)).astype(np.int8)
    scale = rng.uniform(0.001, 0.002, CHANNELS).astype(np.float32)
    bias = rng.integers(-1000, 1000, CHANNELS).astype(np.int32)

    def function(images, sizes):
        inside = jnp.arange(6)[:, None, None] < sizes[:, 0, None, None, None]
        codes = jnp.where(inside, images >> 4, 0)
        conv = Conv(padding=((1, 1), (1, 1)))
        sums = integer_product(conv, codes, stem, (0, 15), (-8, 7), tpu) + bias
        codes = jnp.clip(jnp.round(sums.astype(jnp.float32) * scale), 0, 15).astype(jnp.int8)
        tokens = codes.reshape(codes.shape[0], -1, CHANNELS)
        dense = integer_product(Dense(), tokens, kernel, (0, 15), (-8, 7), tpu)
        rows = jnp.clip(dense >> 5, -8, 7).astype(jnp.int8)[:, None]
        scores = integer_product(Scores(), rows, rows, (-8, 7), (-8, 7), tpu)
        return jnp.exp(scores[:, 0] * jnp.float32(-0.01)), dense

    return function


def inputs(batch):
    rng = np.random.default_rng(batch)
    images = rng.integers(0, 256, (batch, 6, 8, 3)).astype(np.uint8)
    return images, np.stack([np.full(batch, 5), np.full(batch, 8)], 1).astype(np.int32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "program"
    export_stablehlo(folder, network("v5e"), ARGUMENTS, tpu="v5e", facts={"name": "x"})
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_it_equals_in_a_process_that_knows_nothing_of_the_network(whole, tmp_path, run_python):
    # Products with int4 are in the program, in the branches of other platforms than this one's.
    for batch in (1, 3):
        want = jax.jit(network("tpu"))(*inputs(batch))
        arrays = dict(
            zip(("images", "sizes", "exp", "dense"), (*inputs(batch), *want), strict=True)
        )
        np.savez(tmp_path / f"{batch}.npz", **arrays)
    run_python(
        f"""
        import numpy as np
        from aqdetr_jax.deploy.stablehlo import load_stablehlo

        program = load_stablehlo({str(whole)!r})
        assert program.manifest["facts"] == {{"name": "x"}}
        for batch in (1, 3):
            case = np.load({str(tmp_path)!r} + f"/{{batch}}.npz")
            exp, dense = program(case["images"], case["sizes"])
            np.testing.assert_array_equal(dense, case["dense"])
            np.testing.assert_array_equal(exp, case["exp"])
        """,
        devices=1,
    )


def test_every_platform_has_its_own_carriers(whole):
    exported = load_stablehlo(whole).exported
    assert exported.platforms == ("tpu", "cpu", "cuda")
    text = exported.mlir_module()
    for kind in ("i4", "i8"):
        assert f"x{kind}>, tensor<{CHANNELS}x{CHANNELS}x{kind}>" in text
    for kind in ("i4", "f32"):  # of a CPU's convolutions
        assert f"x{kind}>, tensor<3x3x3x{CHANNELS}x{kind}>" in text


def test_codes_take_their_bits_and_the_program_none(whole):
    codes = 3 * 3 * 3 * CHANNELS + CHANNELS * CHANNELS
    weights = (whole / CONSTANTS / WEIGHTS).stat().st_size
    assert codes / 2 < weights < codes / 2 + CHANNELS * (4 + 4) + 1500
    larger = load_stablehlo(whole)
    assert sum(x.size for x in larger.constants.values() if x.dtype == jnp.int8) >= codes
    assert not {path.name for path in whole.rglob("*")} - {
        *(name.split("/")[-1] for name in FILES),
        MANIFEST,
        CONSTANTS,
    }


def test_damage_is_found_before_the_program_is_read(folder, monkeypatch):
    def read(data):
        raise AssertionError("read")

    monkeypatch.setattr(jax.export, "deserialize", read)
    for name in sorted(FILES):
        path = folder / name
        content = path.read_bytes()
        for bad in (content[:-1], content[:9] + bytes([content[9] ^ 1]) + content[10:]):
            path.write_bytes(bad)
            with pytest.raises(StableHloError, match=f"{path.name}.*export the model again"):
                load_stablehlo(folder)
        path.write_bytes(content)
    (folder / CONSTANTS / WEIGHTS).unlink()
    with pytest.raises(StableHloError, match=f"{WEIGHTS} is missing"):
        load_stablehlo(folder)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "aqdetr-packed"}, "something else than a StableHLO export"),
        ({"version": 2}, "version 2 of the format, and this program reads version 1"),
    ],
)
def test_another_manifest(folder, changes, text):
    manifest = folder / MANIFEST
    content = read_manifest(manifest)
    del content["files"]
    write_manifest(manifest, folder, content | changes)
    with pytest.raises(StableHloError, match=text):
        load_stablehlo(folder)


def test_files_beside_those_of_the_format(folder):
    manifest = folder / MANIFEST
    content = read_manifest(manifest)
    del content["files"]
    (folder / "more.bin").write_bytes(b"")
    write_manifest(manifest, folder, content)
    with pytest.raises(StableHloError, match="and nothing else"):
        load_stablehlo(folder)
    text = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**text, "files": {}}))
    with pytest.raises(StableHloError, match="checksum"):
        load_stablehlo(folder)


def test_a_program_of_another_version(folder):
    (folder / PROGRAM).write_bytes(b"no program")
    content = read_manifest(folder / MANIFEST)
    del content["files"]
    write_manifest(folder / MANIFEST, folder, content)
    with pytest.raises(StableHloError, match=rf"{PROGRAM} cannot be read by jax {jax.__version__}"):
        load_stablehlo(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no StableHLO export"):
        load_stablehlo(tmp_path)


def test_a_failure_leaves_the_earlier_program(folder):
    def broken(images, sizes):
        return images.astype(jnp.float32) + np.array([1.0, np.inf, 2.0], np.float32), sizes

    with pytest.raises(ValueError, match="NaN or infinity"):
        export_stablehlo(folder, broken, ARGUMENTS)
    assert load_stablehlo(folder).manifest["facts"] == {"name": "x"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
