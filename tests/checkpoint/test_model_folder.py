"""Model folders of low-bit models whose grids are not all there."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import tiny

from aqdetr_jax.checkpoint.model_folder import ModelBundle, load_model, save_model
from aqdetr_jax.cli import main
from aqdetr_jax.training import initial, setup

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory, quick_compile):
    """A student as it was saved before residual sums had grids."""
    config = dataclasses.replace(tiny.student(""), model=tiny.MODEL)
    bundle = tiny.bundle(config, drawn=False)
    params = {**bundle.variables["params"]}
    params["backbone"] = {
        name: {k: v for k, v in part.items() if k not in ("branch_step", "identity_step")}
        for name, part in params["backbone"].items()
    }
    folder = tmp_path_factory.mktemp("incomplete")
    save_model(
        folder / "model",
        dataclasses.replace(bundle, variables={**bundle.variables, "params": params}),
    )
    return folder


def test_it_is_one_line_and_no_search_in_a_trace(incomplete, capsys):
    picture = incomplete / "picture.png"
    picture.write_bytes(b"")
    command = ["predict", str(picture), f"--model={incomplete}", f"--out={incomplete / 'out'}"]
    assert main(command) == 1
    line, _hint = capsys.readouterr().err.splitlines()
    assert re.search(
        r"\(w4a4\) lacks 4 parameters of its grids \(backbone/layer1_0/(branch|identity)_step, "
        r"\.\.\.\): .* --config.init_from=",
        line,
    )


def test_the_remedy_can_be_carried_out(incomplete):
    """Its weights start a student whose steps, all of them, are calibrated."""
    config = tiny.resolved(dataclasses.replace(tiny.student(""), model=tiny.MODEL))
    source = load_model(incomplete)
    variables, report = initial.initial_variables(
        config, setup.build_module(config), source, tiny.batches(config, 1)
    )
    assert report is not None
    assert {path.rsplit("/", 1)[-1] for path in report.new} == {"branch_step", "identity_step"}
    params = tiny.flat(variables)
    for path, value in tiny.flat(source.variables).items():
        if path.endswith("/kernel"):
            np.testing.assert_array_equal(params[path], value)
    fitted = ModelBundle(config.model, config.quant, source.input, ("a",), (1,), variables)
    assert fitted.module() == setup.build_module(config)
