"""Models that transformers has not, and what else cannot be exported to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from foreign import parity_cases

from aqdetr_jax.checkpoint.model_folder import load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.interop.export import export
from aqdetr_jax.models.resnet import resnet_config

pytestmark = pytest.mark.usefixtures("quick_compile")


def backbone(**changes):
    return lambda config: dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, **changes)
    )


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda c: dataclasses.replace(c, pre_norm=True), ["model.pre_norm=True"]),
        (
            backbone(stem_kernel=3, stem_stride=4, stem_pool=False),
            ["backbone.stem_kernel=3", "backbone.stem_stride=4", "backbone.stem_pool=False"],
        ),
        (backbone(strides=(1, 2, 1, 1)), ["model.backbone.strides=(1, 2, 1, 1)"]),
        (backbone(dilations=(1, 1, 1, 2)), ["model.backbone.dilations=(1, 1, 1, 2) (only"]),
        (
            backbone(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2)),
            ["dilations=(1, 1, 1, 2) (it dilates only timm's backbones: resnet50, resnet101"],
        ),
        (
            lambda c: dataclasses.replace(
                parity_cases.TINY["deformable_plain"],
                deformable=dataclasses.replace(
                    parity_cases.TINY["deformable_plain"].deformable, norm_groups=8
                ),
            ),
            ["model.deformable.norm_groups=8 (it has 32)"],
        ),
        (
            lambda c: dataclasses.replace(
                parity_cases.TINY["deformable_plain"],
                backbone=resnet_config("resnet50", dc5=True),
                deformable=dataclasses.replace(
                    parity_cases.TINY["deformable_plain"].deformable, levels=2
                ),
            ),
            ["model.deformable.stages=2 (of a dilated backbone it uses three)"],
        ),
        (
            lambda c: dataclasses.replace(c, num_queries=8),
            ["parameters are not those of its configuration: 1 are", "query_embed"],
        ),
    ],
)
def test_models_that_transformers_has_not(converted, tmp_path, capsys, change, reasons):
    bundle = load_model(converted)
    source = tmp_path / "model"
    save_model(source, dataclasses.replace(bundle, config=change(bundle.config)))
    assert (
        main(
            [
                "export",
                "--format=huggingface",
                f"--model={source}",
                f"--to={tmp_path / 'out' / 'x'}",
            ]
        )
        == 1
    )
    message, hint = capsys.readouterr().err.splitlines()
    assert hint.startswith("(--traceback")
    for reason in (str(source), *reasons):
        assert reason in message
    assert not (tmp_path / "out").exists()


def test_other_things_that_cannot_be_exported(converted, tiny_teacher, tmp_path, capsys):
    def refuse(model, *options, reason):
        assert (
            main(
                [
                    "export",
                    "--format=huggingface",
                    f"--model={model}",
                    f"--to={tmp_path / 'out'}",
                    *options,
                ]
            )
            == 1
        )
        assert reason in capsys.readouterr().err.splitlines()[0]
        assert not (tmp_path / "out").exists()

    refuse(converted, "--fake-quantized", reason="is a float model: leave out --fake-quantized")
    refuse(tmp_path / "absent", reason="no such folder")
    refuse("packaged:shapes_teacher", reason="model.pre_norm=True")
    refuse(tiny_teacher, reason="model.backbone.stem_kernel=3")
    bundle = load_model(converted)
    params = dict(bundle.variables["params"])
    trunk = {"backbone": params["backbone"]}
    save_model(
        tmp_path / "backbone",
        dataclasses.replace(bundle, variables={**bundle.variables, "params": trunk}),
    )
    refuse(tmp_path / "backbone", reason="this model is a backbone")
    params["query_embed"] = np.full_like(params["query_embed"], np.nan)
    save_model(
        tmp_path / "broken",
        dataclasses.replace(bundle, variables={**bundle.variables, "params": params}),
    )
    refuse(tmp_path / "broken", reason="query_position_embeddings.weight holds NaN or infinity")


def test_what_is_there_already(converted, tmp_path, monkeypatch):
    """An earlier export is replaced, and stays if the new one fails; nothing else is touched."""
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.tex").write_text("text")
    with pytest.raises(FileExistsError, match=r"holds no export_report\.json"):
        export(converted, occupied)
    with pytest.raises(FileExistsError):
        export(converted, converted)
    assert [file.name for file in occupied.iterdir()] == ["thesis.tex"]
    export(converted, tmp_path / "out")
    (tmp_path / "out" / "note.txt").write_text("of the first")
    bundle = load_model(converted)
    params = {**bundle.variables["params"]}
    params["query_embed"] = np.full_like(params["query_embed"], np.inf)
    save_model(
        tmp_path / "broken",
        dataclasses.replace(bundle, variables={**bundle.variables, "params": params}),
    )
    with pytest.raises(ValueError, match="NaN or infinity"):
        export(tmp_path / "broken", tmp_path / "out")
    assert (tmp_path / "out" / "note.txt").exists()
    export(converted, tmp_path / "out")
    assert not (tmp_path / "out" / "note.txt").exists()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["broken", "occupied", "out"]
