"""The command line from end to end, and its one-line errors."""

from __future__ import annotations

import dataclasses
import errno
import json

import numpy as np
import pytest
import tiny
from PIL import Image

from aqdetr_jax.cli import main
from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.evaluation.coco import validate_results_block
from aqdetr_jax.training.experiment import load_experiment

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_teacher, quick_compile):
    """(work directory, configuration file) after ``aqdetr train``."""
    folder = tmp_path_factory.mktemp("cli")
    config = tiny.student(tiny_teacher)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    file = tiny.write_config(config, folder / "tiny.json")
    assert main(["train", f"--config={file}", f"--workdir={folder / 'run'}"]) == 0
    return folder / "run", file


def error_line(capsys, *argv: str) -> str:
    """Runs a command that must fail with status 1: one line says why, one how to see more."""
    capsys.readouterr()
    assert main(list(argv)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2, lines
    assert lines[1] == "(--traceback shows where this came from)"
    assert lines[0].startswith("aqdetr: ")
    return lines[0]


# --- verbs ---------------------------------------------------------------------------------------


def test_train_leaves_everything(trained):
    folder, _ = trained
    for name in (
        "config.json",
        "manifest.json",
        "metrics.jsonl",
        "results.json",
        "detections.json",
        "images.json",
        "bit_report.json",
        "bit_report.txt",
        "report.html",
    ):
        assert (folder / name).stat().st_size > 0, name
    for name in ("checkpoints", "model", "tb"):
        assert any((folder / name).iterdir()), name
    names = {path.name for path in (folder / "pictures").iterdir()}
    assert {"detections.png", "attention_0.png"} <= names
    block = validate_results_block(json.loads((folder / "results.json").read_text()))
    assert (block["images"], block["config"]) == (6, "tiny_student")
    detections = json.loads((folder / "detections.json").read_text())
    assert len(detections) == 6 * 12
    images = json.loads((folder / "images.json").read_text())
    data = open_dataset(load_experiment(str(folder / "config.json")).data, train=False)
    assert images == {str(data.image_id(i)): data.file_name(i) for i in range(6)}
    assert {str(d["image_id"]) for d in detections} == set(images)
    assert "4x4" in (folder / "bit_report.txt").read_text()
    assert load_experiment(str(folder / "config.json")).name == "tiny_student"


def test_train_again_does_nothing(trained, capsys):
    folder, file = trained
    before = (folder / "results.json").read_bytes()
    assert main(["train", f"--config={file}", f"--workdir={folder}"]) == 0
    assert "this run is finished" in capsys.readouterr().out
    assert (folder / "results.json").read_bytes() == before


def test_a_report_that_fails_leaves_a_finished_run(trained, monkeypatch, capsys):
    folder, file = trained
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aqdetr_jax.reporting.write_report", full)
    assert main(["train", f"--config={file}", f"--workdir={folder}"]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("aqdetr: the report could not be made (OSError: [Errno 28] No space")
    assert "report:" not in said.out
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert after["results.json"] == before["results.json"]
    assert after.keys() == before.keys()

    def lost(config):
        raise FileNotFoundError("the teacher was moved away")

    monkeypatch.setattr("aqdetr_jax.reporting.setup.load_teacher", lost)
    assert main(["train", f"--config={file}", f"--workdir={folder}"]) == 0
    assert "moved away" in capsys.readouterr().err


def test_eval_gives_the_numbers_of_the_run(trained, tmp_path, capsys):
    folder, file = trained
    command = ["eval", f"--config={file}", f"--model={folder}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 0
    assert "AP50" in capsys.readouterr().out
    block = validate_results_block(json.loads((tmp_path / "out" / "results.json").read_text()))
    of_run = json.loads((folder / "results.json").read_text())
    assert {k: v for k, v in block.items() if k.startswith("A")} == {
        k: v for k, v in of_run.items() if k.startswith("A")
    }
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert found == json.loads((folder / "detections.json").read_text())
    images = [(d / "images.json").read_text() for d in (folder, tmp_path / "out")]
    assert images[0] == images[1]


def test_predict_writes_a_picture_and_a_file_for_each_image(trained, tmp_path, capsys):
    folder, _ = trained
    paths = []
    for name in ("a", "b"):  # two files of the same name
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "image.png")
        Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(paths[-1])
    out = tmp_path / "out"
    command = ["predict", *map(str, paths), f"--model={folder}", f"--out={out}", "--threshold=0"]
    assert main(command) == 0
    assert capsys.readouterr().out.count("12 objects") == 2
    assert {p.name for p in out.iterdir()} == {
        "image.detections.png",
        "image.detections.json",
        "image_2.detections.png",
        "image_2.detections.json",
    }
    content = json.loads((out / "image.detections.json").read_text())
    assert content["image"] == str(paths[0])
    assert content["size"] == [40, 60]
    assert len(content["detections"]) == 12


def test_config_prints_json_that_loads_back(trained, tmp_path, capsys):
    _, file = trained
    assert main(["config", f"--config={file}", "optimizer.lr=0.5"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "printed.json").write_text(text)
    wanted = load_experiment(str(file), ("optimizer.lr=0.5",))
    assert load_experiment(str(tmp_path / "printed.json")) == wanted


@pytest.mark.parametrize("format_", ["coco", "tfds"])
def test_prepared_data_are_the_same_data(trained, tmp_path, format_, capsys):
    _, file = trained
    out = tmp_path / "data"
    assert main(["prepare-data", f"--config={file}", f"--format={format_}", f"--out={out}"]) == 0
    assert str(out) in capsys.readouterr().out
    config = load_experiment(str(file))
    for train in (True, False):
        source = open_dataset(config.data, train=train)
        data = DataConfig(kind=format_, root=str(out))
        data = dataclasses.replace(
            data, train_split=config.data.train_split, eval_split=config.data.eval_split
        )
        copy = open_dataset(data, train=train)
        assert copy.class_names == source.class_names
        assert len(copy) == len(source)
        for i in range(len(source)):
            np.testing.assert_array_equal(copy[i].image, source[i].image)
            np.testing.assert_allclose(copy[i].boxes, source[i].boxes, atol=1e-4)
            np.testing.assert_array_equal(copy[i].labels, source[i].labels)


def test_inspect_data(trained, capsys):
    _, file = trained
    assert main(["inspect-data", f"--config={file}"]) == 0
    assert "shapes/train" in capsys.readouterr().out


def test_inspect_data_ends_with_the_reasons_why_training_would_stop(coco, tmp_path, capsys):
    (_, config, _), target = coco(), tmp_path / "sheets" / "all.png"
    command = ["inspect-data", config, f"--pictures={target}"]
    assert main(command) == 0
    assert f"written to {target}" in capsys.readouterr().out
    with Image.open(target) as picture:
        assert picture.width > 300
    (tmp_path / "images" / "one.png").write_bytes(b"no image")
    assert main(command) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("training would stop: coco/eval: unreadable images: 1 (first:")
    assert "one.png" in lines[-1]
    # What that line advises is of no use to a set without any other image.
    assert main([*command, "--config.data.on_error=skip"]) == 1
    assert "none of its images can be used" in capsys.readouterr().out.splitlines()[-1]


# --- errors --------------------------------------------------------------------------------------


def test_misspelt_key(trained, capsys):
    _, file = trained
    line = error_line(capsys, "config", f"--config={file}", "--config.optimizer.lr_backbon=1")
    assert "'lr_backbon'" in line
    assert "lr_backbone" in line


def test_missing_configuration(capsys):
    line = error_line(capsys, "config", "--config=shapes_techer")
    assert "no configuration 'shapes_techer'" in line
    assert "shapes_teacher" in line


def test_missing_model(trained, tmp_path, capsys):
    _, file = trained
    line = error_line(capsys, "eval", f"--config={file}", f"--model={tmp_path / 'nothing'}")
    assert f"no such folder: {tmp_path / 'nothing'}" in line


@pytest.mark.parametrize("form", ["trian.steps=3", "--config.trian.steps=3"])
def test_misspelt_group(trained, capsys, form):
    line = error_line(capsys, "config", f"--config={trained[1]}", form)
    assert "did you mean 'train'?" in line


def test_a_picture_may_be_called_like_an_override(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save("train.steps=2.png")
    assert main(["predict", "train.steps=2.png", "--model", str(trained[0]), "--out", "a=b"]) == 0
    assert (tmp_path / "a=b" / "train.steps=2.detections.json").is_file()


def test_predict_does_what_it_can(trained, tmp_path, capsys):
    """Status 1, a line for the image that failed, and the results of the other."""
    broken, good = tmp_path / "broken.jpg", tmp_path / "good.png"
    broken.write_bytes(b"no image")
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(good)
    command = ["predict", str(broken), str(good), f"--model={trained[0]}"]
    assert main([*command, f"--out={tmp_path / 'out'}"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"aqdetr: {broken}: not an image file that Pillow can read"
    assert lines[1].startswith("aqdetr: PredictError: 1 of 2 images failed")
    made = {"good.detections.json", "good.detections.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == made
    assert main([*command[:1], str(broken), command[3], f"--out={tmp_path / 'none'}"]) == 1
    assert not (tmp_path / "none").exists()


def test_predict_has_the_remedy_that_it_names(trained, tmp_path, capsys):
    path = tmp_path / "large.png"
    Image.fromarray(np.full((40, 60, 3), 128, np.uint8)).save(path)
    command = ["predict", str(path), f"--model={trained[0]}", f"--out={tmp_path / 'out'}"]
    assert main([*command, "--max-pixels=2399"]) == 1
    text = capsys.readouterr().err
    assert "large.png: 60x40 pixels are over the budget of 2399; " in text
    assert "predict's --max-pixels" in text
    assert main([*command, "--max-pixels=2400"]) == 0


def test_other_configuration_on_the_same_folder(trained, capsys):
    folder, file = trained
    command = ["train", f"--config={file}", f"--workdir={folder}", "optimizer.lr=0.5"]
    assert main(command) == 1
    text = capsys.readouterr().err
    assert text.startswith("aqdetr: WorkdirError:")
    assert "optimizer.lr: 0.001 -> 0.5" in text


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["config", "--config=nothing", "--traceback"])


@pytest.fixture
def coco(trained, tmp_path):
    """Writes a small COCO folder, changed by a function, and gives the arguments that name it."""

    def write(change=lambda content: None) -> list[str]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(images / "one.png")
        names = load_experiment(str(trained[1]))
        dataset_names = open_dataset(names.data, train=False).class_names
        content = {
            "images": [{"id": 1, "file_name": "one.png", "width": 64, "height": 64}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 20, 20], "area": 400}
            ],
            "categories": [{"id": i, "name": n} for i, n in enumerate(dataset_names, 1)],
        }
        change(content)
        (tmp_path / "instances.json").write_text(json.dumps(content))
        data = DataConfig(
            kind="coco",
            train_images=str(images),
            train_annotations=str(tmp_path / "instances.json"),
            eval_images=str(images),
            eval_annotations=str(tmp_path / "instances.json"),
            buckets=((64, 64),),
        )
        file = tiny.write_config(
            dataclasses.replace(load_experiment(str(trained[1])), data=data),
            tmp_path / "coco.json",
        )
        return ["eval", f"--config={file}", f"--model={trained[0]}"]

    return write


def test_missing_annotations(coco, tmp_path, capsys):
    command = coco()
    (tmp_path / "instances.json").unlink()
    line = error_line(capsys, *command)
    assert "instances.json" in line
    assert "does not exist" in line


def test_unknown_category(coco, capsys):
    line = error_line(
        capsys, *coco(lambda content: content["annotations"][0].update(category_id=77))
    )
    assert "77" in line
    assert "instances.json" in line


def test_unreadable_image(coco, tmp_path, capsys):
    command = coco()
    (tmp_path / "images" / "one.png").write_bytes(b"no image")
    assert "one.png" in error_line(capsys, *command)
    train = ["train", command[1], f"--workdir={tmp_path / 'run'}"]
    assert "one.png" in error_line(capsys, *train)


def test_other_classes(coco, capsys):
    line = error_line(
        capsys, *coco(lambda content: content["categories"][0].update(name="aardvark"))
    )
    assert "aardvark" in line


@pytest.mark.parametrize("verb", ["eval", "train"])
def test_empty_set(coco, tmp_path, capsys, verb):
    def emptied(content):
        content["images"].clear()
        content["annotations"].clear()

    command = coco(emptied)
    if verb == "train":
        command = ["train", command[1], f"--workdir={tmp_path / 'run'}"]
    line = error_line(capsys, *command)
    assert "instances.json" in line or "coco" in line
    assert "no images" in line or "empty" in line


def test_names_that_end_in_a_line_break(coco, capsys):
    """They are the same classes to a model that was trained on the clean names."""

    def broken(content):
        for category in content["categories"]:
            category["name"] += "\r\n"

    assert main(coco(broken)) == 0
    assert "AP50" in capsys.readouterr().out


def test_normalised_boxes(coco, capsys):
    command = coco(lambda content: content["annotations"][0].update(bbox=[0.1, 0.1, 0.3, 0.3]))
    assert "all 1 boxes lie within [0, 1]" in error_line(capsys, *command)


def test_set_without_a_single_box(coco, tmp_path, capsys):
    """All boxes are left out, which is said; there is nothing to find: COCO's numbers are -1.

    And there is nothing to learn: training is refused, and the inspection says so.
    """
    command = coco(lambda content: content["annotations"][0].update(bbox=[8, 8, 0, 20]))
    assert main([*command, f"--out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert "1 zero_area" in said.out + said.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["AP"] == -1
    line = error_line(capsys, "train", command[1], f"--workdir={tmp_path / 'run'}")
    reason = "not one box to train on in 1 images; looked in "
    assert f"{reason}{tmp_path / 'instances.json'}; left out: 1 zero_area" in line
    assert main(["inspect-data", command[1]]) == 1
    assert f"training would stop: coco/train: {reason}" in capsys.readouterr().out
