"""Tables of the studies, from results written by hand."""

from __future__ import annotations

import compared
import effects
import numpy as np
import pytest
import render_reliability
import render_study
import render_summary
from PIL import Image

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def trained(method, bits, ap, seed=0, spread=0.0, **facts):
    """A row of a study; ``spread``: of its AP over draws of images."""
    draws = ap + spread * np.linspace(-1, 1, 20)
    known = {"family": "detr", "method": method, "bits": bits, "seed": seed, **facts}
    return {"facts": known, "AP": ap, "AP_draws": list(draws), "commit": COMMIT}


def cells(table: str, label: str) -> list[str]:
    """The row of a table that begins with a label."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_study_of_one_family_has_one_table():
    rows = [trained("float", 32, 0.5)]
    rows += [trained("lsq", 4, 0.40 + 0.01 * s, s) for s in (0, 1)]
    rows += [trained("aqdetr", 4, 0.45 + 0.01 * s, s) for s in (0, 1)]
    table = render_study.main_table("Balance", {"rows": rows})
    assert "Deformable" not in table
    assert cells(table, "LSQ") == ["0.4050 ± 0.0071 (2)", "81.0%", "–"]
    found = cells(table, "AQ-DETR (both)")[2]
    assert found == "better: +0.0500, in 100% of the draws, on 2 of 2 seeds"


def test_what_is_planned_and_not_run_is_said():
    rows = [trained("float", 32, 0.5), trained("lsq", 4, 0.4)]
    planned = [*rows, trained("qdetr", 4, 0), trained("distill", 2, 0)]
    other = {"family": "deformable", "method": "lsq", "bits": 4, "seed": 0}
    table = render_study.main_table("Main", {"rows": rows}, [*planned, {"facts": other}])
    assert cells(table, "LSQ") == ["0.4000 (1)", "80.0%", "–", "", "", ""]
    assert cells(table, "Q-DETR") == ["not run", "", "", "", "", ""]
    assert cells(table, "LSQ + distillation") == ["", "", "", "not run", "", ""]
    assert "**Main, Deformable DETR**: not run." in table
    assert "LSQ+" not in table


def test_the_teacher_trained_on_stands_beside_it():
    rows = [trained("float", 32, 0.5), trained("float_longer", 32, 0.52, steps="whole")]
    rows += [trained(method, 4, 0.49, steps="whole") for method in ("lsq", "aqdetr")]
    table = render_study.long_tables("Long", {"rows": rows})
    assert "float 0.5000, trained on by the same schedule 0.5200." in table
    summary = render_summary.summary_table([("set", {"rows": rows}, {"steps": "whole"})])
    assert cells(summary, "set, DETR")[2] == "0.500; trained on 0.520"


def test_equals_are_no_worse():
    rows = [trained("lsq", 4, 0.4)]
    found = compared.verdict(compared.comparison(rows, rows))
    assert found == "no difference shown: +0.0000, in 50% of the draws, one seed"


def test_better_is_beyond_the_seeds_spread():
    theirs = [trained("lsq", 4, 0.40 + 0.02 * s, s) for s in (0, 1)]
    for more, word in ((0.01, "no difference shown"), (0.02, "better"), (-0.02, "worse")):
        mine = [trained("aqdetr", 4, 0.40 + 0.02 * s + more, s) for s in (0, 1)]
        found = compared.comparison(mine, theirs)
        assert found["spread"] == pytest.approx(0.02 / 2**0.5)
        assert compared.verdict(found).startswith(f"{word}: {more:+.4f}, in ")


def test_schedules_stand_against_the_plain_one():
    rows = [
        trained("lsq", 4, 0.40, schedule="plain"),
        trained("lsq", 4, 0.41, schedule="backbone_first"),
        trained("lsq", 4, 0.40, spread=0.1, schedule="raw"),
        trained("aqdetr", 2, 0.30, schedule="plain"),
    ]
    table = effects.effects_table("Schedules", effects.schedules({"rows": rows}))
    assert "| LSQ, 4 bits | against plain | AQ-DETR (both), 2 bits | against plain |" in table
    first = cells(table, effects.SCHEDULES["backbone_first"])
    assert first == [
        "0.4100 (1)",
        "ahead: +0.0100, in 100% of the draws, one seed",
        "not run",
        "",
    ]
    assert cells(table, effects.SCHEDULES["raw"])[1].startswith("no difference shown")
    assert cells(table, effects.SCHEDULES["plain"]) == ["0.4000 (1)", "–", "0.3000 (1)", "–"]


def measured(method, bits, entropy, seed=0, **more):
    layers = [
        {"entropy": entropy * layer, "effective_rank": 9.0, "cosine": 0.25, "distinct": 20.0}
        for layer in (1, 2)
    ]
    facts = {"family": "detr", "method": method, "bits": bits, "seed": seed}
    return {"facts": facts, "images": 400, "layers": layers, "commit": COMMIT, **more}


@pytest.fixture
def capacity():
    positives = {"object": 70.0, "auxiliary": 139.6}
    rows = [measured("float", 32, 1.0)]
    rows += [measured("lsq", 4, 0.5 + 0.1 * s, s, positives={"object": 70.0}) for s in (0, 1)]
    rows += [measured("aqdetr", bits, 0.8, positives=positives) for bits in (4, 2)]
    return {"command": "python experiments/capacity_shapes.py", "rows": rows}


def test_capacity_is_of_the_last_layer(capacity):
    table = render_study.capacity_tables("Capacity", capacity)
    assert "Deformable" not in table
    assert cells(table, "float") == ["32", "1", "2.00", "9.00", "0.25", "20.00", "–"]
    assert cells(table, "LSQ")[:3] == ["4", "2", "1.10 ± 0.14"]
    assert cells(table, "LSQ")[-1] == "70 object"
    assert table.count("| 70 object + 140 auxiliary |") == 2


def test_capacity_is_drawn_for_families_that_were_measured(capacity, tmp_path):
    render_study.write_capacity_pictures(capacity, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["capacity_detr.png"]
    with Image.open(tmp_path / "capacity_detr.png") as picture:
        assert picture.size[0] > 800
    render_study.write_capacity_pictures(None, tmp_path)


def test_cost_says_whether_the_exported_graphs_are_equal():
    def row(seconds, size, nodes):
        graph = {"nodes": nodes, "parameters": 1200, "bytes": 9000}
        return {
            "median_seconds": seconds,
            "time_of_float": seconds / 0.2,
            "step_bytes": size << 20,
            "memory_of_float": size / 100,
            "onnx": graph,
        }

    def result(equal):
        family = {
            "batch": 16,
            "methods": {"float": row(0.2, 100, 50), "aqdetr": row(0.5, 150, 60)},
            "same_graph": {"methods": ["lsq", "aqdetr"], "equal": equal},
        }
        known = {"command": "python experiments/cost_shapes.py", "device": "2 x cpu"}
        return {**known, "commit": COMMIT, "families": {"deformable": family}}

    table = render_study.cost_tables("Cost", result(True))
    wanted = ["500", "2.50", "150", "1.50", "60", "1,200", "9,000"]
    assert cells(table, "AQ-DETR (both)") == wanted
    assert "graphs of LSQ, AQ-DETR (both) are equal" in table
    assert "graphs of LSQ, AQ-DETR (both) DIFFER" in render_study.cost_tables("Cost", result(False))


@pytest.mark.parametrize(
    "table",
    [
        effects.effects_table,
        render_study.main_table,
        render_study.long_tables,
        render_study.capacity_tables,
        render_study.cost_tables,
    ],
)
def test_what_was_not_run_is_said(table):
    assert table("Title", None) == "**Title**: not run."


def test_a_picture_shows_each_difference_and_what_the_images_draw_of_it():
    rows = [trained("lsq", 4, 0.40), trained("aqdetr", 4, 0.42, spread=0.1)]
    rows += [trained("lsq", 4, 0.40, family="deformable")]
    figure = effects.effects_figure(effects.ablation({"rows": rows}))
    (axes,) = figure.axes  # one family has something to compare
    assert axes.get_title(loc="left") == "DETR"
    assert axes.get_xlabel() == "points of AP against LSQ"
    interval, dot = axes.lines[1:]
    assert list(dot.get_xdata()) == pytest.approx([2.0])
    assert list(dot.get_ydata()) == list(interval.get_ydata())[:1] == [0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["AQ-DETR (both)"]
    assert list(interval.get_xdata()) == pytest.approx([2.0 - 9.0, 2.0 + 9.0], abs=0.01)
    assert effects.effects_figure(effects.ablation({"rows": rows[:1]})) is None


def test_distillation_stands_against_the_main_studys_lsq_of_the_same_seeds():
    main = {"rows": [trained("lsq", 4, 0.40), trained("lsq", 4, 0.30, 1), trained("lsq", 2, 0.1)]}
    study = {"rows": [trained("both", 4, 0.42), trained("encoder", 4, 0.39)]}
    table = effects.effects_table("Distillation", effects.distillation(study, main))
    assert cells(table, "no distillation (LSQ)") == ["0.4000 (1)", "–"]
    assert cells(table, "both, probabilities")[1].startswith("ahead: +0.0200")
    assert cells(table, "encoder, probabilities")[1].startswith("behind: -0.0100")
    assert cells(table, "both, logits") == ["not run", ""]


def test_positives_stand_against_none_of_the_same_bits():
    rows = [
        trained("lsq", 4, 0.40, M=0, K=0),
        trained("auxiliary", 4, 0.41, M=50, K=2),
        trained("lsq", 32, 0.50, M=0, K=0),
        trained("auxiliary", 32, 0.49, M=50, K=2),
    ]
    table = effects.effects_table("Positives", effects.positives({"rows": rows}))
    found = cells(table, "M = 50, K = 2")
    assert found[1].startswith("ahead: +0.0100")
    assert found[3].startswith("behind: -0.0100")


def test_a_choice_stands_against_its_own_method():
    rows = [
        trained("lsq", 4, 0.40, choice="plain"),
        trained("lsq", 4, 0.38, choice="symmetric"),
        trained("auxiliary", 4, 0.43, choice="plain"),
        trained("auxiliary", 4, 0.44, choice="two_groups"),
    ]
    table = effects.effects_table("Choices", effects.choices({"rows": rows}))
    label = f"LSQ, 4 bits: {effects.CHOICES['symmetric']}"
    assert cells(table, label)[1].startswith("behind: -0.0200")
    label = f"LSQ + auxiliary queries, 4 bits: {effects.CHOICES['two_groups']}"
    assert cells(table, label)[1].startswith("ahead: +0.0100")
    assert cells(table, "LSQ, 4 bits: as it is") == ["0.4000 (1)", "–"]
    assert effects.choices(None) is None


def test_longer_schedules_have_a_table_each():
    rows = [trained("float", 32, 0.5)]
    rows += [trained("lsq", 4, 0.45, steps="three times"), trained("lsq", 2, 0.3, steps="whole")]
    tables = render_study.long_tables("Set", {"rows": rows}).split("**Set, ")[1:]
    assert [table.splitlines()[0].split("**")[0] for table in tables] == [
        "three times the quickstart's steps, DETR",
        "the whole schedule, 8000 steps, DETR",
    ]
    assert cells(tables[0], "LSQ") == ["0.4500 (1)", "90.0%", "–"]
    assert cells(tables[1], "LSQ") == ["0.3000 (1)", "60.0%", "–"]


def test_the_summary_has_a_line_where_lsq_and_aqdetr_were_trained():
    rows = [trained("float", 32, 0.5)]
    rows += [trained(m, 4, ap) for m, ap in (("lsq", 0.4), ("distill", 0.44), ("aqdetr", 0.45))]
    rows += [trained("lsq_longer", 4, 0.46)]
    rows += [trained("lsq", 2, 0.2), trained("lsq", 4, 0.2, family="deformable")]
    table = render_summary.summary_table((("Set", {"rows": rows}, {}), ("Other", None, {})))
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 3
    said = "Not run, or not both of LSQ and AQ-DETR: Set, Deformable DETR; Other."
    assert table.splitlines()[-1] == said
    found = cells(table, "Set, DETR")
    assert found[:7] == ["4", "1", "0.500", "0.400", "0.440", "0.450", "90.0%"]
    assert found[7].startswith("ahead: +0.0500")
    assert found[8].startswith("behind: -0.0100")
    assert found[9].startswith("ahead: +0.0100")


def test_a_row_done_again_is_said_with_what_differs():
    run = {"name": "n", "seed": 2, "manifest": "m.json", "starts": 2, "AP": 0.5, "commit": COMMIT}
    same = {"run": run, "model": True, "results": {}, "environment": {"commit": ["a", "b"]}}
    text = render_reliability.rerun_text(same)
    assert "AP 0.5000 by its own evaluation, in 2 starts" in text
    assert "equal to the last bit, all its results the same; another than then: commit." in text
    other = {**same, "model": False, "results": {"AP": [0.5, 0.4]}, "environment": {}}
    assert "is another, results differ: AP 0.5 -> 0.4." in render_reliability.rerun_text(other)
