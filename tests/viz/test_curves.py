import math

import matplotlib
import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.viz import curves, palette, records


def _log(steps=200, **extra):
    lines = [
        {
            "step": s,
            "loss": 5 / (s + 1),
            "loss_ce": 2.0,
            "loss_aux_3": 1.0,
            "grad_norm": 1.0,
            **extra,
        }
        for s in range(0, steps, 2)
    ]
    lines += [{"step": s, "eval/AP": s / steps, "eval/APs": -1.0} for s in range(0, steps, 50)]
    return lines


def _titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    found = records.read_metrics(path)
    assert [r["step"] for r in found] == [1, 2]
    assert math.isnan(found[1]["loss"])
    path.write_text("")
    assert records.read_metrics(path) == []


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1}', '{"step": 1.5}'])
def test_reading_names_a_bad_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        records.read_metrics(path)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        records.read_metrics(tmp_path / "elsewhere")


def test_series_sorts_and_keeps_the_later_value():
    log = [{"step": 3, "a": 1.0}, {"step": 1, "a": None}, {"step": 3, "a": 2}, {"step": 2, "b": 0}]
    steps, values = records.series(log, "a")
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(values, [np.nan, 2.0])


def test_smooth_is_a_trailing_mean_that_skips_nan():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    # Windows of 3: [1], [1 3], -, [3 5], [5 7].
    np.testing.assert_allclose(records.smooth(values, 3), [1.0, 2.0, np.nan, 4.0, 6.0])


def test_one_run_shows_its_panels(tmp_path):
    figure = curves.training_curves(_log(learning_rate=1e-4, images_per_second=9.0), title="t")
    assert _titles(figure) == [
        "loss",
        "loss terms",
        "average precision (%)",
        "learning rate",
        "gradient norm",
        "images per second",
    ]
    precision = figure.axes[2].lines
    # APs is -1 everywhere: no ground truth, no line. AP is in percent.
    assert [line.get_label() for line in precision] == ["AP"]
    np.testing.assert_allclose(precision[0].get_ydata(), [0, 25, 50, 75])
    path = curves.save_figure(figure, tmp_path / "new" / "curves.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_prefixes_make_panels_and_per_class_numbers_do_not():
    line = {
        "step": 0,
        "time": 1.7e9,
        "train/loss": 3.0,
        "train/loss_ce": 1.0,
        "train/aux_layers/loss_ce": 2.0,
        "auxiliary/aux_layers/loss_ce": 4.0,
        "gradient_norm": 1.0,
        "nonfinite": ["x"],
        "eval/AP": 0.2,
        "eval/per_class/circle/AP": 0.1,
    }
    figure = curves.training_curves([line, {**line, "step": 1}])
    assert _titles(figure) == [
        "loss",
        "loss terms",
        "average precision (%)",
        "gradient norm",
        "aux layers",
        "auxiliary / aux layers",
    ]
    assert [len(axes.lines) for axes in figure.axes] == [1] * 6


def test_several_runs_keep_their_colours():
    figure = curves.training_curves({"student": _log(), "mine": _log(100)}, theme="dark")
    colors = palette.run_colors(["student", "mine"], "dark")
    assert {line.get_color() for axes in figure.axes for line in axes.lines} == set(colors.values())


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "loss": math.nan}],
        [{"step": 1, "eval/AP": -1.0}],
        [{"step": 1, "loss": "high"}],
    ],
)
def test_nothing_to_draw_is_none(log):
    assert curves.training_curves(log) is None
    assert curves.training_curves({"a": log, "b": []}) is None


def test_gaps_do_not_stop_a_curve(tmp_path):
    log = _log()
    for record in log[10:20]:
        record["loss"] = math.inf
    assert curves.save_figure(curves.training_curves(log), tmp_path / "c.png").stat().st_size > 0


def test_bars_are_the_numbers():
    blocks = {
        "teacher": {"AP": 0.5, "AP50": 0.75, "APl": -1.0},
        "student": {"AP": 0.4, "AP50": -1.0, "APl": -1.0},
    }
    figure = curves.ap_bars(blocks, metrics=("AP", "AP50", "APl"))
    bars = {
        (round(bar.get_x() + bar.get_width() / 2), bar.get_facecolor()): bar.get_height()
        for bar in figure.axes[0].patches
        if bar.get_height() > 0
    }
    colors = palette.run_colors(list(blocks))
    rgba = {name: matplotlib.colors.to_rgba(colors[name]) for name in blocks}
    assert bars == {
        (0, rgba["teacher"]): 50.0,
        (0, rgba["student"]): 40.0,
        (1, rgba["teacher"]): 75.0,
    }
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["AP", "AP50"]
    assert curves.ap_bars({"a": {"AP": -1.0}}) is None
    assert curves.ap_bars({}) is None


def test_capacity_draws_a_line_per_model_and_set():
    rows = [
        {"model": m, "set": s, "layer": layer, "effective_rank": 10.0 + layer, "note": "x"}
        for m in ("teacher", "student")
        for s in ("object", "auxiliary")
        for layer in (1, 2, 3)
    ]
    figure = curves.capacity_curves(rows)
    assert _titles(figure) == ["effective rank"]
    assert len(figure.axes[0].lines) == 4
    assert curves.capacity_curves(rows[:1]) is None


def test_no_global_state_is_touched():
    before = dict(matplotlib.rcParams)
    figures = matplotlib._pylab_helpers.Gcf.get_num_fig_managers()
    curves.training_curves(_log())
    assert dict(matplotlib.rcParams) == before
    assert matplotlib._pylab_helpers.Gcf.get_num_fig_managers() == figures


def test_stock_runs_have_fixed_colours():
    alone = palette.run_colors(["student"])["student"]
    assert palette.run_colors(["x", "teacher", "student"])["student"] == alone
    many = palette.run_colors(["teacher", "calibrated", "baseline", "student", "a", "b"])
    assert len(set(many.values())) == 6
    assert len({palette.class_color(i) for i in range(80)}) == 80
    with pytest.raises(ValueError, match="theme"):
        palette.run_colors([], "sepia")
