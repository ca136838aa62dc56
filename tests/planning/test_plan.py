"""A plan from end to end with a compiler that only counts, its table, and bad input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
import tiny

from aqdetr_jax.cli import main
from aqdetr_jax.planning import resolve as resolving
from aqdetr_jax.planning.ahead import Case, Compiled
from aqdetr_jax.planning.chips import GIB, KINDS, known_slices, parse_slice
from aqdetr_jax.planning.memory import Memory
from aqdetr_jax.planning.plan import as_json, make_plan, remedies
from aqdetr_jax.planning.resolve import Sizes, read_facts, replicas_on
from aqdetr_jax.planning.table import format_plan
from aqdetr_jax.planning.traffic import Collective, Program
from aqdetr_jax.planning.work import image_flops
from aqdetr_jax.training.config import MeshConfig
from aqdetr_jax.training.experiment import load_experiment

V5E = parse_slice("v5e:2x2")


class Counting:
    """A compiler whose programs need 1 GiB and 3 GiB an image, and move 8.19 GB an image."""

    def __init__(self):
        self.cases: list[tuple[str, tuple[int, int], int, bool]] = []
        self.base = GIB

    def __call__(self, case: Case, *, fast: bool) -> Compiled:
        train = case.config.train
        rows = train.batch_size if case.kind == "train" else train.eval_batch_size
        each = rows // replicas_on(case.config, case.place)
        self.cases.append((case.kind, case.bucket, each, fast))
        found = Collective("all-reduce", 10**8, 4, 8, "while.1", 3, "jit(step)/while")
        program = Program(10, 12, each * 819 * 10**7, {"fusion": 1}, [], [], [found])
        memory = Memory(
            parameters=self.base, temporaries=3 * each * GIB, code=None if fast else 100
        )
        return Compiled(program, memory, case.place.kind.hbm, 61.0, complete=not fast)


@pytest.fixture
def counting(monkeypatch):
    """Puts a counting compiler, and 100 useful GFLOPs an image, in place of the real ones."""
    compiler = Counting()
    monkeypatch.setattr("aqdetr_jax.planning.plan.check_libtpu", lambda: None)
    monkeypatch.setattr("aqdetr_jax.planning.plan.compile_ahead", compiler)
    monkeypatch.setattr("aqdetr_jax.planning.plan.image_flops", lambda *_: 10**11)
    return compiler


PINNED = ("train.batch_per_chip=0", "train.eval_batch_per_chip=0")
"""Batches over all chips, in place of the configuration's a chip."""


def coco(*overrides: str):
    return load_experiment("coco:r50,w4a4", ("model.encoder_layers=1", *overrides))


def resolve(config, place, *, per_chip=None, images=None) -> Sizes:
    return resolving.resolve(read_facts(config, place, images), place, per_chip)


def floating():
    return dataclasses.replace(
        tiny.FLOAT, train=dataclasses.replace(tiny.FLOAT.train, batch_size=8, eval_batch_size=6)
    )


# --- slices --------------------------------------------------------------------------------------


def test_slices():
    found = parse_slice("v5e:16x16")
    assert (found.chips, found.devices, found.hosts) == (256, 256, 64)
    assert parse_slice("tpu7x:2x2x1").devices == 8
    assert parse_slice("v4:2x2x1").options == {"chip_config_name": "megacore"}
    assert parse_slice("v5e:1x1").options == {"chips_per_host_bounds": (1, 1, 1)}
    assert parse_slice("v5e:2x2").options == {}
    for kind in KINDS.values():
        for shape in kind.slices:
            assert parse_slice(f"{kind.name}:{shape}").name == f"{kind.name}:{shape}"


@pytest.mark.parametrize("name", ["v5e:3x3", "v9:2x2", "v5e", "v5e:2x2x1", "", "v5e:16x16 "])
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown topology") as caught:
        parse_slice(name)
    assert known_slices() in str(caught.value)
    assert "v5e: 1x1, 2x2" in known_slices()


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_without_data_are_coco_s_and_said():
    sizes = resolve(coco(), parse_slice("v5e:4x4"), per_chip=4)
    config = sizes.config
    assert (sizes.rows, sizes.replicas, config.train.batch_size) == (4, 16, 64)
    assert config.model.num_classes == 91
    assert config.train.steps == -(-50 * 118_287 // 64)
    assert ["91" in sizes.notes[0], "118,287" in sizes.notes[1]] == [True, True]
    given = resolve(coco("model.num_classes=20"), V5E, per_chip=4, images=1000)
    assert (given.config.model.num_classes, given.notes) == (20, ())
    assert given.config.train.steps == 50 * 1000 // 16


def test_sizes_of_data_that_are_there():
    sizes = resolve(floating(), V5E)
    assert (sizes.images, sizes.eval_images, sizes.notes) == (16, 6, ())
    assert sizes.config.model.num_classes == 10
    # As the evaluator does: 6 images a batch become 8, two for each device.
    assert sizes.config.train.eval_batch_size == 8
    # The configuration's own batch of 8 need not suit 16 devices.
    assert resolve(floating(), parse_slice("v5e:4x4"), per_chip=2).config.train.batch_size == 32


def test_dtype_is_a_tpu_s():
    auto = dataclasses.replace(floating().model, dtype="auto")
    sizes = resolve(dataclasses.replace(floating(), model=auto), V5E)
    assert sizes.config.model.dtype == "bfloat16"


def test_a_data_set_of_unknown_length():
    config = load_experiment("custom", ("data.kind=coco", "data.fit=0"))
    with pytest.raises(ValueError, match=r"set data.root, or .*model.num_queries"):
        resolve(config, V5E)


@pytest.mark.parametrize(
    ("batch", "text"),
    [(2, "too few for 4 devices"), (6, "cannot be shared evenly by 4 devices")],
)
def test_a_batch_that_the_slice_cannot_share(batch, text):
    with pytest.raises(ValueError, match=text) as caught:
        resolve(coco(*PINNED, f"train.batch_size={batch}"), V5E)
    assert "use a multiple of 4" in str(caught.value)


def test_a_mesh_that_does_not_divide_the_slice():
    config = dataclasses.replace(floating(), mesh=MeshConfig(model=3))
    with pytest.raises(ValueError, match=r"mesh.model=3 does not divide the 4 .* 1, 2, 4$"):
        resolve(config, V5E)
    config = dataclasses.replace(floating(), mesh=MeshConfig(data=3, model=2))
    with pytest.raises(ValueError, match=r"needs 6 devices, there are 4: config.mesh.data=-1"):
        resolve(config, V5E)
    # A slice is no lone CPU, whatever plans for it: no chip is left idle.
    with pytest.raises(ValueError, match="needs 2 devices, there are 4"):
        resolve(dataclasses.replace(floating(), mesh=MeshConfig(data=2)), V5E)
    with pytest.raises(ValueError, match="cannot be shared evenly by 8 devices"):
        resolve(coco(*PINNED, "train.batch_size=12"), parse_slice("v5e:2x4"))
    halves = dataclasses.replace(floating(), mesh=MeshConfig(model=2))
    assert resolve(halves, V5E).replicas == 2


# --- useful work ---------------------------------------------------------------------------------


def test_useful_work_of_the_official_model():
    """DETR-R50 is 86 GFLOPs by its authors' count: multiply-adds, mean of 100 COCO images."""
    config = resolve(load_experiment("coco:r50,float"), V5E).config
    assert image_flops(config, (800, 1184), "eval") / 2 == pytest.approx(86e9, rel=0.06)


def test_useful_work_counts_auxiliary_queries_and_teacher():
    student = tiny.resolved(tiny.student("unused"))
    bucket = student.data.buckets[0]
    model = dataclasses.replace(student.model, num_auxiliary=0)
    alone = dataclasses.replace(student, distill=tiny.FLOAT.distill, model=model)
    forward = image_flops(alone, bucket, "eval")
    assert image_flops(alone, bucket, "train") == 3 * forward
    optimizer = dataclasses.replace(alone.optimizer, frozen=("backbone/",))
    frozen = image_flops(dataclasses.replace(alone, optimizer=optimizer), bucket, "train")
    assert forward < frozen < 3 * forward
    assert image_flops(student, bucket, "train") > 4 * forward


# --- the plan ------------------------------------------------------------------------------------


def test_every_program_is_compiled(counting):
    config = coco(*PINNED, "train.batch_size=16", "train.eval_batch_size=5")
    plan = make_plan(config, "v5e:2x2")
    buckets = [(800, 1344), (1344, 800), (1088, 1088)]
    assert counting.cases == [
        *(("train", bucket, 4, False) for bucket in buckets),
        *(("eval", bucket, 2, False) for bucket in buckets),
    ]
    assert plan.fits
    step = plan.steps[0]
    assert step.times.memory == pytest.approx(0.04)
    assert plan.schedule is not None
    assert plan.schedule.steps == plan.sizes.config.train.steps
    # 4 images in 40 ms, or what the interconnect allows: 8 all-reduces of 100 MB, 150 MB each way.
    assert step.times.interconnect == pytest.approx(8 * 1.5e8 / 200e9)
    block = as_json(plan)["steps"][0]
    assert block["estimate"]["images_per_second_a_chip_at_most"] == pytest.approx(100.0)
    assert block["estimate"]["bound_by"] == "memory"
    assert block["collectives_in_loops"] == 1


def test_one_program_and_its_table(counting):
    plan = make_plan(coco(), "v5e:2x2", per_chip=4, bucket="320x320", kinds=("train",), fast=True)
    text = format_plan(plan)
    for part in (
        "4 chips (197 TFLOP/s, 819 GB/s, 15.75 GiB a device)",
        "assumed: model.num_classes=91",
        "train 320x320",
        "13.00",
        "IN A LOOP (8 times)",
        "a lower bound on time",
        "at most 100 images/s a chip, 400 in all",
        "chip-hours",
    ):
        assert part in text, part
    assert "DOES NOT FIT" not in text


def test_what_does_not_fit_says_what_to_do(counting):
    config = coco("model.dtype=float32")
    plan = make_plan(config, "v5e:2x2", per_chip=8, bucket="320x320")
    assert not plan.fits
    assert plan.schedule is None
    text = format_plan(plan)
    assert "DOES NOT FIT: train 320x320 needs 25.00 GiB, a device of v5e:2x2 has 15.75" in text
    assert "--per_chip=4, or --search" in text
    assert "train.accumulate=2" in text
    assert "model.dtype=bfloat16" in text
    assert "model.remat" not in text  # it is on already


def test_remedies_apply():
    sizes = resolve(coco("model.dtype=bfloat16"), V5E, per_chip=6)
    assert remedies(sizes, "train", 1) == ["a kind of chip with more HBM: --topology=v5p:2x2x1"]
    parts, smaller = remedies(sizes, "train", 6)
    assert smaller == "a smaller batch: --per_chip=3, or --search"
    assert parts == "the same batch in parts: --per_chip=3 train.accumulate=2"
    assert remedies(sizes, "eval", 6) == [smaller]
    whole = resolve(coco("model.dtype=float32"), V5E, per_chip=6)
    assert remedies(whole, "eval", 6)[0].endswith("model.dtype=bfloat16")
    config = sizes.config
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))
    whole_sizes = dataclasses.replace(sizes, config=whole)
    assert remedies(whole_sizes, "train", 1) == ["layers computed again: model.remat=True"]
    assert "remat" not in "".join(remedies(whole_sizes, "eval", 1))


def test_what_a_remedy_says_is_the_same_batch():
    """Nine images in three parts of three; the product of both numbers is what was asked for."""
    sizes = resolve(coco("model.dtype=bfloat16"), V5E, per_chip=9)
    words = remedies(sizes, "train", 9)[0].split()
    count, parts = (int(word.partition("=")[2]) for word in words[-2:])
    again = resolve(coco("model.dtype=bfloat16", f"train.accumulate={parts}"), V5E, per_chip=count)
    assert (again.rows, again.config.train.batch_size) == (3, sizes.config.train.batch_size)


def test_norms_that_learn_leave_no_parts():
    backbone = dataclasses.replace(tiny.BACKBONE, norm="batch")
    model = dataclasses.replace(tiny.MODEL, backbone=backbone, dtype="bfloat16", remat=True)
    sizes = resolve(dataclasses.replace(floating(), model=model), V5E, per_chip=4)
    assert remedies(sizes, "train", 4) == ["a smaller batch: --per_chip=2, or --search"]


def test_micro_batches_are_one_step(counting):
    plan = make_plan(coco("train.accumulate=3"), "v5e:2x2", per_chip=2, bucket="320x320")
    train, evaluation = plan.steps
    assert (train.rows, evaluation.rows, plan.sizes.config.train.batch_size) == (6, 2, 24)
    assert train.flops == 6 * 10**11
    assert "3 times 2 images a replica, 24 a step" in format_plan(plan)


def test_search_takes_the_largest_batch_that_fits(counting):
    """1 GiB and 3 GiB an image: 4 images in 15.75 GiB."""
    plan = make_plan(coco(), "v5e:2x2", search=True, kinds=("train",))
    assert plan.sizes.rows == 4
    assert plan.fits
    searched = {case[1] for case in counting.cases if case[3]}
    assert searched == {(1088, 1088)}  # the largest of the buckets
    assert [case[2:] for case in counting.cases if not case[3]] == [(4, False)] * 3


def test_search_where_not_even_one_image_fits(counting):
    counting.base = 20 * GIB
    plan = make_plan(coco(), "v5e:2x2", search=True, bucket="320x320")
    assert plan.sizes.rows == 1
    assert not plan.fits


# --- the command ---------------------------------------------------------------------------------


def test_command_writes_what_it_prints(counting, tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["--topology=v5e:4x4", "--per_chip=4", "--bucket=320x320", "--fast", f"--out={out}"]
    assert main(["plan", "--config=coco:r50,w4a4", *words, "model.encoder_layers=1"]) == 0
    block = json.loads(out.read_text())
    assert (block["topology"], block["chips"], block["per_chip"]) == ("v5e:4x4", 16, 4)
    assert [step["kind"] for step in block["steps"]] == ["train", "eval"]
    assert block["steps"][0]["hbm_parts_bytes"]["temporaries"] == 12 * GIB
    assert "coco_r50_w4a4 on v5e:4x4" in capsys.readouterr().out


def test_command_fails_where_a_step_does_not_fit(counting, capsys):
    words = ["--topology=v5e:2x2", "--per_chip=8", "--bucket=320x320", "--kind=train"]
    assert main(["plan", "--config=coco:r50,w4a4", *words, "model.encoder_layers=1"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--topology=v5e:3x3"], "known ones are v5e: 1x1"),
        (["--topology=v5e:2x2", "--bucket=800"], "write HEIGHTxWIDTH"),
        (["--topology=v5e:2x2", "--bucket=0x800"], "write HEIGHTxWIDTH"),
        (["--topology=v5e:2x2", "--per_chip=0"], "--per_chip=0 must be at least 1"),
        (["--topology=v5e:2x2", "--images=0"], "--images=0 must be at least 1"),
        (["--topology=v5e:2x2", "--per_chip=4", "--search"], "--per_chip has no effect"),
        (["--topology=v5e:16x16", *PINNED, "train.batch_size=64"], "too few for 256 devices"),
        (["--topology=v5e:2x2", "mesh.model=3"], "does not divide"),
    ],
)
def test_bad_words(words, text, counting, capsys):
    assert main(["plan", "--config=coco:r50,w4a4", *words]) == 1
    assert text in capsys.readouterr().err
    assert not counting.cases


def test_a_missing_compiler_says_how_to_install_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    assert main(["plan", "--config=coco:r50,w4a4", "--topology=v5e:2x2", "--per_chip=1"]) == 1
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err
