"""Writes the result tables of README.md and of docs from experiments/results/*.json.

python experiments/render_results.py

Numbers in the documents come from here only; a missing file leaves "not run".
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import balance_shapes
import compared
import effects
import long_shapes
import main_bccd
import main_deeppcb
import main_shapes
import render_bfloat16
import render_complexity
import render_deploy
import render_input
import render_ledger
import render_parity
import render_reliability
import render_sensitivity
import render_speed
import render_study
import render_summary
import render_tpu
import study_pictures
from results_files import ROOT, commits_in, load, short

from aqdetr_jax.io import write_text_atomic
from aqdetr_jax.viz.curves import save_figure

VARIANTS = {
    "lsq": "LSQ alone",
    "auxiliary": "+ auxiliary queries",
    "distill": "+ distillation",
    "aqdetr": "both (AQ-DETR)",
}


def planned(study: ModuleType) -> list[dict[str, Any]]:
    """The rows of a study, run or not, as its results have them."""
    return [{"facts": dict(row.facts)} for row in study.rows()]


def blocks_table(name: str, command: str, images: str = "embedded validation set") -> str:
    """The blocks of a quickstart or a finetune; ``images``: what they were judged on."""
    result = load(name)
    if result is None:
        return f"`{command}`: not run."
    lines = [
        f"| {images} | AP | AP50 | APs | APm | APl | of the teacher |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {
        "teacher": "float teacher",
        "calibrated": "4-bit, calibration only",
        "baseline": "4-bit LSQ, trained as long",
        "student": "4-bit AQ-DETR",
    }
    reference = result["teacher"]["AP"]
    for key, text in names.items():
        if key in result:
            block = result[key]
            cells = " | ".join(f"{block[k]:.3f}" for k in ("AP", "AP50", "APs", "APm", "APl"))
            lines.append(f"| {text} | {cells} | {block['AP'] / reference:.1%} |")
    block = result["student"]
    lines.append("")
    lines.append(
        f"`{command}{' --baseline' if 'baseline' in result else ''}`, config "
        f"`{block['config']}`, seed {block['seed']}, {block['images']} images, commit "
        f"`{short(block['commit'])}`, from `experiments/results/{name}`."
    )
    return "\n".join(lines)


def residual_table() -> str:
    """AP of calibrated models by the bits of their residual sums."""
    result = load("residual_grids.json")
    if result is None:
        return "Not run."
    rows = result["rows"]
    widths = sorted({row["residual"] for row in rows}, key=lambda bits: -bits or -99)
    names = [f"{bits} bits" if bits else "float" for bits in widths]
    lines = [
        f"| calibrated, AP on {rows[0]['images']} images | {' | '.join(names)} |",
        "|---|" + "---|" * len(widths),
    ]
    for config in dict.fromkeys(row["config"] for row in rows):
        found = {row["residual"]: row for row in rows if row["config"] == config}
        policy = next(iter(found.values()))["policy"]
        cells = " | ".join(f"{found[b]['AP']:.4f}" if b in found else "not run" for b in widths)
        lines.append(f"| `{config}`, {policy} | {cells} |")
    commits = commits_in(rows)
    return "\n".join([*lines, "", f"`{result['command']}`; commit {commits}."])


def results_of_readme() -> str:
    """Both families' quickstarts, and DETR's students that were trained to the end."""
    text = blocks_table("quickstart.json", "aqdetr quickstart")
    rows = (load("long_shapes.json") or {"rows": []})["rows"]
    whole = compared.of(rows, steps="whole", bits=4, seed=0)
    teacher = load("quickstart.json")
    if whole and teacher is not None:
        found = {row["facts"]["method"]: row["own_AP"] for row in whole}
        said = "; ".join(
            f"{compared.NAMES[method]} {found[method]:.3f}, "
            f"{found[method] / teacher['teacher']['AP']:.1%} of the teacher"
            for method in ("lsq", "aqdetr")
            if method in found
        )
        text += (
            " By the whole schedule (`configs/shapes_w4a4.py`, 8000 steps, an hour and more): "
            f"{said} (`experiments/results/long_shapes.json`)."
        )
    command = "aqdetr quickstart --model deformable"
    other = blocks_table("quickstart_deformable.json", command)
    return f"{text}\n\nDeformable DETR:\n\n{other}"


def ablation_table(name: str, title: str, bits: int = 4, family: str = "") -> str:
    """The variants of one data set at one number of bits; ``family``: "" or "deformable-"."""
    result = load(name)
    if result is None or not result.get("teacher"):
        return f"**{title}**: not run."
    reference = result["teacher"]["AP"]
    runs = {key.removeprefix(family): block for key, block in result["runs"].items()}
    rows = [key for key in VARIANTS if any(run.startswith(f"{key}_seed") for run in runs)]
    seeds = sorted({int(key.rsplit("seed", 1)[1]) for key in runs})
    head = " | ".join(f"seed {s}" for s in seeds)
    lines = [
        f"**{title}**: AP; float teacher {reference:.4f} (AP50 {result['teacher']['AP50']:.4f}), "
        f"{bits}-bit by calibration only {result['calibrated']['AP']:.4f}.",
        "",
        f"| {bits}-bit ({bits}-{bits}-{bits}) | {head} | mean | of the teacher |",
        "|---|" + "---|" * (len(seeds) + 2),
    ]
    for key in rows:
        found = [runs.get(f"{key}_seed{s}", {}).get("AP") for s in seeds]
        done = [x for x in found if x is not None]
        cells = " | ".join("not run" if x is None else f"{x:.4f}" for x in found)
        mean = statistics.mean(done) if done else None
        tail = f"{mean:.4f} | {mean / reference:.1%}" if mean is not None else "not run | "
        lines.append(f"| {VARIANTS[key]} | {cells} | {tail} |")
    commits = commits_in(runs.values())
    lines += [
        "",
        f"`{result['command']}`; commits {commits}; `experiments/results/{name}`.",
    ]
    return "\n".join(lines)


def replace(path: Path, name: str, text: str) -> None:
    """Puts ``text`` between the markers of a document."""
    content = path.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
    new, count = re.subn(pattern, lambda m: f"{m[1]}{text}\n{m[2]}", content, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path}: expected one block {name}:begin ... {name}:end, found {count}")
    write_text_atomic(path, new)


def main() -> None:
    """Renders every table."""
    replace(ROOT / "README.md", "results", results_of_readme())
    command = "aqdetr finetune BCCD data.train_split=trainval data.eval_split=test"
    replace(
        ROOT / "README.md",
        "finetune",
        blocks_table("finetune_bccd.json", command, "BCCD (292 photographs of blood cells), test"),
    )
    parts = [
        ablation_table(
            "ablation_shapes.json", "Embedded set, the quickstart's schedule (1200 steps)"
        ),
        *(
            ablation_table(
                f"w{bits}a{bits}_shapes.json",
                f"Embedded set, the quickstart's schedule at {bits} bits",
                bits,
            )
            for bits in (3, 2)
        ),
        ablation_table("ablation_bccd.json", "BCCD test split"),
        ablation_table(
            "deformable_shapes.json",
            "Deformable DETR, embedded set, the quickstart's schedule (900 steps)",
            family="deformable-",
        ),
        ablation_table(
            "deformable_bccd.json", "Deformable DETR, BCCD test split", family="deformable-"
        ),
        render_speed.per_minute_table(),
        render_speed.step_time_table(),
        render_speed.sampling_table(),
        render_speed.matcher_table(),
        render_speed.full_size_table("full_size_step.json"),
        render_speed.full_size_table("deformable_full_size_step.json"),
    ]
    replace(ROOT / "docs" / "parity.md", "parity", render_parity.parity_table())
    replace(ROOT / "docs" / "quantization.md", "residual", residual_table())
    pictured = (load(f"{name}_shapes.json") for name in ("main", "long", "cost"))
    study_pictures.write_pictures(ROOT / "docs", *pictured)
    half = load("bfloat16_shapes.json")
    replace(ROOT / "docs" / "quantization.md", "bfloat16", render_bfloat16.bfloat16_text(half))
    render_bfloat16.write_picture(half, ROOT / "docs" / "bfloat16.png")
    text = render_reliability.kill_points_text(load("kill_points.json"), load("stop_points.json"))
    replace(ROOT / "docs" / "reliability.md", "kill-points", text)
    text = render_reliability.rerun_text(load("rerun.json"))
    replace(ROOT / "docs" / "results.md", "rerun", text)
    text = render_input.input_text(load("input_pipeline.json"), load("plan.json"))
    replace(ROOT / "docs" / "data.md", "input", text)
    plan = ROOT / "docs" / "plan.md"
    replace(plan, "tpu-step", render_tpu.step_table(load("tpu_step.json")))
    replace(plan, "tpu-plan", render_tpu.plan_table(load("plan.json")))
    replace(plan, "tpu-whole", render_tpu.whole_text(load("whole_compile.json")))
    sampling = render_tpu.sampling_table(load("deformable_tpu.json"))
    replace(ROOT / "docs" / "deformable.md", "tpu-sampling", sampling)
    costs, document = load("complexity.json"), ROOT / "docs" / "complexity.md"
    replace(document, "complexity-models", render_complexity.models_table(costs))
    groups = render_complexity.groups_table(costs, "coco:r50,w4a4")
    replace(document, "complexity-groups", groups)
    replace(document, "complexity-papers", render_complexity.papers_table(costs))
    document = ROOT / "docs" / "deploy.md"
    replace(document, "exports", render_deploy.exports_table(load("exports.json")))
    replace(document, "packed-size", render_deploy.sizes_table(load("packed_size.json")))
    replace(document, "speed", render_deploy.speed_table(load("deploy.json")))
    study = "aqdetr sensitivity --config=configs/shapes_w4a4.py"
    text = render_sensitivity.sensitivity_text(
        {
            "DETR": (
                f"{study} --model=packaged:shapes_teacher --out=DIR",
                load("sensitivity.json"),
            ),
            "Deformable DETR": (
                f"{study}:deformable-aqdetr --model=packaged:shapes_deformable_teacher --out=DIR",
                load("sensitivity_deformable.json"),
            ),
        }
    )
    replace(ROOT / "docs" / "sensitivity.md", "sensitivity", text)
    render_sensitivity.write_picture(load("sensitivity.json"), ROOT / "docs" / "sensitivity.png")
    document = ROOT / "docs" / "results.md"
    replace(document, "ledger", render_ledger.ledger_table())
    main_study = load("main_shapes.json")
    long = load("long_shapes.json")
    table = render_summary.summary_table(
        (
            ("embedded set, the quickstart's schedule", main_study, {}),
            ("embedded set, three times as long", long, {"steps": "three times"}),
            ("embedded set, 8000 steps", long, {"steps": "whole"}),
            ("embedded set, 100 queries", load("balance_shapes.json"), {}),
            ("DeepPCB", load("main_deeppcb.json"), {}),
            ("BCCD, EfficientNet-Lite0", load("main_bccd.json"), {}),
        )
    )
    replace(ROOT / "README.md", "evidence", table)
    choices = {
        "ablation": ("AQ-DETR's parts, embedded set, 4 bits", effects.ablation(main_study)),
        "positives": (
            "AP against positives: DETR, embedded set",
            effects.positives(load("positives_shapes.json")),
        ),
        "distill": (
            "Where to distil, what, and from whom: embedded set, 4 bits",
            effects.distillation(load("distill_shapes.json"), main_study),
        ),
        "operands": (
            "What few bits cost where: LSQ, embedded set",
            effects.operands(load("operands_shapes.json")),
        ),
        "choices": (
            "Choices of ours undone, DETR, embedded set, one seed",
            effects.choices(load("choices_shapes.json")),
        ),
        "schedules": (
            "Schedules, DETR, embedded set, one seed",
            effects.schedules(load("schedules_shapes.json")),
        ),
    }
    for name, (title, found) in choices.items():
        replace(document, name, effects.effects_table(title, found))
        figure = effects.effects_figure(found)
        if figure is not None:
            save_figure(figure, ROOT / "docs" / f"{name}_shapes.png")
    mains = {
        "main": (main_shapes, "Embedded set, the quickstart's schedule"),
        "balance": (balance_shapes, "100 object queries, 300 auxiliary ones, K = 3"),
        "deeppcb": (main_deeppcb, "DeepPCB, test split"),
        "bccd": (main_bccd, "BCCD on EfficientNet-Lite0, test split"),
    }
    for name, (driver, title) in mains.items():
        table = render_study.main_table(title, load(f"{driver.__name__}.json"), planned(driver))
        replace(document, name, table)
    text = render_study.long_tables("Embedded set", long, planned(long_shapes))
    replace(document, "long", text)
    title = "Query capacity, embedded set"
    replace(document, "capacity", render_study.capacity_tables(title, load("capacity_shapes.json")))
    title = "Cost of a training step, embedded set"
    replace(document, "cost", render_study.cost_tables(title, load("cost_shapes.json")))
    render_study.write_capacity_pictures(load("capacity_shapes.json"), ROOT / "docs")
    replace(document, "others", "\n\n".join(parts))


if __name__ == "__main__":
    main()
