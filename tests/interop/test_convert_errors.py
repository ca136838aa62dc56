"""What cannot be converted is refused in one line that names it, and leaves nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from foreign import ARGS, fixture, torch_file, write_folder, write_shards
from safetensors.numpy import save, save_file

from aqdetr_jax.checkpoint.model_folder import load_model
from aqdetr_jax.cli import main
from aqdetr_jax.interop.convert import convert

pytestmark = pytest.mark.usefixtures("quick_compile")

NAME = "deformable_plain"
STATE = fixture(NAME)["state"]
FIRST = next(iter(STATE))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 166618694\n"
OF_ONE_KIND = ("damaged", "cut short", "without its list of members: fetch it again")
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.fixture
def refuse(tmp_path, capsys):
    """Runs the command on a source and checks its one line, and that nothing is written."""

    def refuse(source, *reasons, options=()):
        target = tmp_path / "target" / "model"
        assert main(["convert", str(source), "--to", str(target), *options]) == 1
        message, hint, *rest = capsys.readouterr().err.splitlines()
        assert hint.startswith("(--traceback")
        assert not rest
        for reason in (*reasons, str(source)):
            assert reason in message, message
        assert len(message) < 700 + len(str(source))
        assert not target.parent.exists()

    return refuse


def changed(**arrays):
    """The fixture's state with arrays replaced, or left out where None."""
    state = {**STATE, **arrays}
    return {name: array for name, array in state.items() if array is not None}


# --- files that are none --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty: fetch it again"),
        (PAGE, "is a web page, not the file"),
        (LFS, "is a Git LFS pointer, not the file"),
        (save(STATE)[:-100], "damaged"),
        (torch_file({"a": np.ones(3, np.float32)})[:-30], "cut short"),
        (torch_file(STATE)[:9000], "without its list of members: fetch it again"),
        (b"\x00" * 64, ""),
    ],
)
def test_files_that_are_no_checkpoints(refuse, tmp_path, suffix, data, reason):
    source = tmp_path / f"weights{suffix}"
    source.write_bytes(data)
    of_the_other_kind = (reason == "damaged") != (suffix == ".safetensors")
    refuse(source, "" if of_the_other_kind and reason in OF_ONE_KIND else reason)


def test_other_sources(refuse, tmp_path):
    refuse(tmp_path / "absent.pth", "no such file or folder")
    text = tmp_path / "weights.onnx"
    text.write_bytes(b"something")
    refuse(text, "unknown kind of file; known are .pth, .pt, .bin, .ckpt, .safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    refuse(folder, "holds no config.json")
    (folder / "config.json").write_text("{}")
    (folder / "flax_model.msgpack").write_bytes(b"x")
    refuse(folder, "neither model.safetensors nor pytorch_model.bin", "flax_model.msgpack")
    (folder / "config.json").write_text("[1]")
    refuse(folder, "config.json: holds no JSON object")


def test_folders_of_ours(refuse, tmp_path, tiny_teacher):
    refuse(tiny_teacher, "is a run or a model folder of ours already")
    source = write_folder(tmp_path / "theirs", NAME)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("text")
    with pytest.raises(FileExistsError, match="is not a model folder"):
        convert(source, occupied)
    assert [file.name for file in occupied.iterdir()] == ["thesis.tex"]


def test_an_earlier_model_stays_when_a_conversion_fails(tmp_path):
    source = write_folder(tmp_path / "theirs", NAME)
    convert(source, tmp_path / "model", name="first")
    write_folder(source, NAME, state=changed(**{"model.level_embed": None}))
    with pytest.raises(ValueError, match="level_embed"):
        convert(source, tmp_path / "model", name="second")
    assert load_model(tmp_path / "model").info["name"] == "first"
    write_folder(source, NAME)
    convert(source, tmp_path / "model", name="third")
    assert load_model(tmp_path / "model").info["name"] == "third"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "theirs"]


@pytest.mark.parametrize(
    ("index", "reasons"),
    [
        ({}, ["holds no weight_map"]),
        (
            {"weight_map": {"a": "../elsewhere.safetensors"}},
            ["is not the name of a weights file beside"],
        ),
        ({"weight_map": {"a": ".."}}, ["is not the name of a weights file beside"]),
        ({"weight_map": {"a": 7}}, ["is not the name of a weights file beside"]),
        ({"weight_map": {"a": "config.json"}}, ["is not the name of a weights file beside"]),
        ({"weight_map": {"a": "x\ny.safetensors"}}, [r"x\ny.safetensors' is not the name of a w"]),
        ({"weight_map": {"a": "x" * 10_000 + ".bin"}}, ["is not the name of a weights file"]),
    ],
)
def test_indexes(refuse, tmp_path, index, reasons):
    source = write_shards(tmp_path / "theirs", NAME)
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(source, *reasons)


def test_shards(refuse, tmp_path):
    source = write_shards(tmp_path / "theirs", NAME)
    second = source / "model-00002-of-00002.safetensors"
    kept = second.read_bytes()
    second.unlink()
    refuse(source, "names model-00002-of-00002.safetensors, which is not there")
    names = list(STATE)[1::2]
    save_file({name: STATE[name] for name in names[1:]}, second)
    refuse(source, second.name, f"lacks {names[0]}")
    save_file({name: STATE[name] for name in (*names, FIRST)}, second)
    refuse(source, second.name, f"holds {FIRST}, as another file")
    second.write_bytes(kept[:1000])
    refuse(source, second.name, "is no safetensors file, or is damaged")


# --- models that are none of ours -----------------------------------------------------------------


def test_almost_nothing_matches(refuse, tmp_path):
    state = {f"stages.{i}.blocks.weight": np.ones(3, np.float32) for i in range(9)}
    state["model.level_embed"] = STATE["model.level_embed"]
    save_file(state, tmp_path / "alien.safetensors")
    refuse(
        tmp_path / "alien.safetensors",
        "almost nothing matches",
        "only 1 of its 10 names",
        "stages.0.blocks.weight",
    )
    del state["model.level_embed"]
    save_file(state, tmp_path / "alien.safetensors")
    refuse(tmp_path / "alien.safetensors", "none of its 9 names (first: stages.0.blocks.weight")


@pytest.mark.parametrize(
    ("state", "reasons"),
    [
        (
            {"model.mask_head.weight": np.ones(3, np.float32)},
            ["1 of its", "model.mask_head.weight"],
        ),
        ({"model.encoder.layers.1.self_attn.value_proj.weight": None}, ["1 missing", "layer_1"]),
        ({"model.level_embed": None}, ["lacks what is our 'level_embed'"]),
        ({"model.level_embed": np.ones(4, np.float32)}, ["2 axes", "has the shape [4]"]),
        ({"model.level_embed": np.ones((4, 32), np.int8)}, ["holds int8", "or quantized"]),
        ({"model.level_embed": np.ones((4, 32), np.complex64)}, ["type C64, which is not read"]),
        ({"model.level_embed": np.full((4, 32), 1e300)}, ["NaN or infinity as float32"]),
        ({"two\nlines": np.ones(1, np.float32)}, [r"of the name 'two\nlines'"]),
        ({"\x1b[31m": np.ones(1, np.float32)}, [r"of the name '\x1b[31m'"]),
        ({"x" * 10_000: np.ones(1, np.float32)}, ["up to 200 printable characters"]),
        (
            {"model.encoder.layers.1.mlp.fc1.bias": np.ones(13, np.float32)},
            ["linear1/bias has shape [13], not [12]"],
        ),
        (
            {"model.encoder.layers.1.mlp.fc1.weight": np.ones(13, np.float32)},
            ["fc1.weight of shape [13] should have 2 axes"],
        ),
        (
            {"model.backbone.model.embedder.embedder.normalization.running_var": None},
            ["1 missing (backbone/stem_norm/var)"],
        ),
        (
            {"model.input_proj.4.0.bias": np.ones(32, np.float32)},
            ["1 too many (input_proj_4/bias)"],
        ),
        (
            {"model.level_embed": np.full((4, 32), np.nan, np.float32)},
            ["model.level_embed holds NaN or infinity"],
        ),
        ({"bbox_embed.1.layers.0.weight": np.ones((32, 32), np.float32)}, ["box_refine=True"]),
        (
            {f"class_embed.{i}.{part}": None for i in range(2) for part in ("weight", "bias")},
            ["has no class head; --num-classes makes a new one"],
        ),
    ],
)
def test_parameters_that_do_not_fit(refuse, tmp_path, state, reasons):
    refuse(write_folder(tmp_path / "theirs", NAME, state=changed(**state)), *reasons)


def test_more_proposals_than_places(refuse, tmp_path):
    """The number of proposals is declared only: no parameter shows it."""
    source = write_folder(tmp_path / "theirs", "deformable_two_stage")
    config = json.loads((source / "config.json").read_text())
    config["two_stage_num_proposals"] = 100_000
    (source / "config.json").write_text(json.dumps(config))
    refuse(source, "100000 proposals wanted of 22223 tokens")


def test_a_class_head_of_nothing(refuse, tmp_path):
    state = dict(fixture("detr_bottleneck")["state"])
    for name in ("class_labels_classifier.weight", "class_labels_classifier.bias"):
        state[name] = state[name][:1]  # "no object" alone
    source = write_folder(tmp_path / "theirs", "detr_bottleneck", state=state, id2label=None)
    refuse(source, "has a class head of no class")


def test_a_missing_class_head_can_be_made(tmp_path):
    lost = {f"class_embed.{i}.{part}": None for i in range(2) for part in ("weight", "bias")}
    source = write_folder(tmp_path / "theirs", NAME, state=changed(**lost))
    made = convert(source, tmp_path / "out", num_classes=3)
    assert made.report.new == ["class_head/bias", "class_head/kernel"]
    assert made.bundle.variables["params"]["class_head"]["kernel"].shape == (32, 3)
    with pytest.raises(ValueError, match="--num-classes must be at least 1, got 0"):
        convert(source, tmp_path / "never", num_classes=0)


# --- sources that contradict themselves -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            {"encoder_layers": 3},
            ["have encoder_layers=2, but its config.json says"],
        ),
        ({"d_model": 64}, ["have dim=32, but its config.json says d_model=64"]),
        ({"num_queries": 300}, ["have num_queries=7", "num_queries=300"]),
        ({"with_box_refine": True}, ["have box_refine=False", "with_box_refine=True"]),
        ({"num_feature_levels": 1}, ["have levels=4", "num_feature_levels=1"]),
        (
            {"encoder_attention_heads": 8},
            ["says encoder_attention_heads=8 and decoder_attention_heads=4"],
        ),
        (
            {"encoder_attention_heads": 8, "decoder_attention_heads": 8},
            ["have 8 samples a level", "heads=8 (its config.json) x points=2"],
        ),
        ({"model_type": "detr"}, ["model_type='detr'", "those of a deformable model"]),
        ({"model_type": "conditional_detr"}, ["model_type='conditional_detr'"]),
        ({"position_embedding_type": "learned"}, ["position_embedding_type='learned'"]),
        ({"backbone_config": {"depths": [3, 4, 6, 3]}}, ["depths=(1, 1, 2, 1)", "(3, 4, 6, 3)"]),
        ({"backbone_config": {"downsample_in_bottleneck": True}}, ["downsample_in_bottleneck"]),
        ({"backbone_config": {"output_stride": 16}}, ["dilation=False and backbone_config.out"]),
        ({"id2label": {"0": "cell"}}, ["have 5 classes, but id2label", "names 1, 0 to 0"]),
        ({"id2label": {"one": "cell"}}, ["id2label in config.json maps no numbers to names"]),
        ({"id2label": ["cell"]}, ["id2label in config.json maps no numbers to names"]),
        ({"id2label": {str(k): "a\nb" for k in range(5)}}, [r"names class 0 'a\nb'"]),
        ({"id2label": {str(k): ["x"] for k in range(5)}}, ["names class 0 ['x']"]),
        ({"encoder_attention_heads": 0}, ["says encoder_attention_heads=0, which should be a w"]),
        ({"encoder_attention_heads": "8"}, ["says encoder_attention_heads='8', which should be"]),
        ({"encoder_n_points": 2.0}, ["says encoder_n_points=2.0, which should be a whole number"]),
        ({"dilation": "no"}, ["says dilation='no', which should be true or false"]),
        ({"d_model": "x" * 10_000}, ["says d_model='xxxx"]),
        ({"backbone_config": ["resnet"]}, ["says backbone_config=['resnet'], which is no object"]),
        ({"backbone_config": {"depths": 5}}, ["depths=(1, 1, 2, 1)", "depths=5"]),
        ({"backbone_config": {"output_stride": 8}}, ["output_stride=8: that variant is not read"]),
    ],
)
def test_contradictions_of_a_folder(refuse, tmp_path, change, reasons):
    refuse(write_folder(tmp_path / "theirs", NAME, **change), *reasons)


@pytest.mark.parametrize(
    ("change", "options", "reasons"),
    [
        ({"enc_layers": 6}, [], ["encoder_layers=2, but its args says enc_layers=6"]),
        ({"backbone": "resnet50"}, [], ["depths=(1, 1, 2, 1)", "backbone='resnet50'"]),
        ({"masks": True}, [], ["args says masks=True"]),
        ({}, ["--dilation"], ["--dilation was given, but its args says dilation=False"]),
    ],
)
def test_contradictions_of_a_file(refuse, tmp_path, change, options, reasons):
    source = tmp_path / "weights.pth"
    source.write_bytes(torch_file(STATE, {**ARGS, **change}))
    refuse(source, *reasons, options=options)


def test_heads_that_are_not_the_official_number_must_be_declared(refuse, tmp_path):
    """Eight heads of one sample fit the shapes of four heads of two: so a note says it."""
    source = tmp_path / "weights.pth"
    source.write_bytes(torch_file(STATE))
    notes = convert(source, tmp_path / "out").notes
    assert any("taken as 8, the official one" in note for note in notes)
    source.write_bytes(torch_file(STATE, {"nheads": 3}))
    refuse(source, "have 8 samples a level, which heads=3 (its args) x points=2 are not")


def test_a_number_of_a_name_is_no_number_of_layers(refuse, tmp_path):
    """A name of a thousand million layers is no reason to build them."""
    source = tmp_path / "weights.pth"
    for old, new, path in (
        ("model.encoder.layers.1.", "model.encoder.layers.999999999.", "encoder/layer_999999999"),
        ("model.decoder.layers.1.", "model.decoder.layers.999999999.", "decoder/layer_999999999"),
        ("stages.2.layers.1.", "stages.2.layers.999999999.", "backbone/layer3_999999999"),
        ("encoder.stages.3.", "encoder.stages.999999999.", "backbone/layer1000000000"),
    ):
        state = {name.replace(old, new): array for name, array in STATE.items()}
        source.write_bytes(torch_file(state))
        refuse(source, f"has what is our '{path}', but not all that come before it")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"do_normalize": False}, "says do_normalize=False; only True is read"),
        ({"do_rescale": 0}, "says do_rescale=0; only True is read"),
        ({"rescale_factor": 1.0}, "says rescale_factor=1.0; only 1/255 is read"),
        ({"resample": 3}, "says resample=3; only 2 is read"),
        ({"size": {"height": 480, "width": 480}}, "one of shortest_edge and longest_edge is read"),
        ({"size": "large"}, "says size='large'"),
        ({"size": {"shortest_edge": 10**9, "longest_edge": 10**9}}, "<= longest edge <= 16384"),
        ({"size": {"shortest_edge": 800, "longest_edge": 700}}, "shortest edge <= longest edge"),
        ({"size": 800, "max_size": "big"}, "shortest edge <= longest edge"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5]; a list of three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "deviations above 0"),
        ({"image_std": "\n" * 1000}, "a list of three numbers"),
    ],
)
def test_images_that_are_made_ready_otherwise(refuse, tmp_path, rule, reason):
    source = write_folder(tmp_path / "theirs", NAME)
    (source / "preprocessor_config.json").write_text(json.dumps(rule))
    refuse(source, "preprocessor_config.json", reason, "change or remove that file")


def test_json_that_is_none(refuse, tmp_path):
    source = write_folder(tmp_path / "theirs", NAME)
    for text, reason in (
        ("[" * 100_000, "config.json: nested too deeply to be read"),
        ('{"d_model": ' + "9" * 5000 + "}", "config.json: Exceeds the limit"),
        ('{"d_model": NaN}', "config.json: NaN is not a JSON number"),
    ):
        (source / "config.json").write_text(text)
        refuse(source, reason)
