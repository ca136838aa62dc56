"""The table of parity with the official models."""

from __future__ import annotations

from typing import Any

from results_files import commits_in, load

PARITY_MODELS = {
    "tiny models": ("transformers", ""),
    "DETR-R50, DC5": ("transformers", "detr_r50"),
    "DETR-R101, DC5": ("transformers", "detr_r101"),
    "Deformable DETR, official models": ("transformers", "deformable_full"),
    "DETR-R50": ("facebookresearch/detr", "detr_r50"),
    "Deformable DETR, refinement and two stages": (
        "fundamentalvision/Deformable-DETR",
        "deformable_full",
    ),
}
PARITY_STAGES = {
    "backbone": ("backbone_", "position"),
    "encoder, decoder": ("encoder_", "decoder_", "decoded", "cross_weights_", "self_weights_"),
    "logits, boxes": ("logits", "boxes", "proposal_"),
    "losses": ("loss/",),
    "gradients": ("gradients",),
    "exported": ("exported/",),
    "fake-quantized": ("fake_quantized/",),
}


def exceeded(row: dict[str, Any]) -> str:
    """A row of the parity table that is over its tolerance, in words."""
    text = (
        f"`{row['stage']}` of `{row['model']}` against {row['source']}: {row['max_abs_diff']:.1e} "
        f"of {row['tolerance']:g}"
    )
    single = row["theirs_single"]
    return text if single is None else f"{text}, theirs in single {single:.1e}"


def parity_table() -> str:
    """Greatest differences of each group of models and of stages, and what exceeds its bound."""
    result = load("parity.json")
    if result is None:
        return "Not run."
    full = tuple(prefix for _, prefix in PARITY_MODELS.values() if prefix)
    lines = [
        f"Greatest differences, torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}; in brackets those of their own single precision:",
        "",
        f"| model | against | {' | '.join(PARITY_STAGES)} |",
        "|---|---|" + "---|" * len(PARITY_STAGES),
    ]
    for title, (source, prefix) in PARITY_MODELS.items():
        rows = [
            row
            for row in result["rows"]
            if row["source"].startswith(source)
            and (row["model"].startswith(prefix) if prefix else not row["model"].startswith(full))
        ]
        cells = []
        for stages in PARITY_STAGES.values():
            found = [row for row in rows if row["stage"].startswith(stages)]
            ours = max((row["max_abs_diff"] for row in found), default=None)
            theirs = max((row["theirs_single"] or 0.0 for row in found), default=0.0)
            text = "–" if ours is None else f"{ours:.1e}"
            cells.append(f"{text} ({theirs:.1e})" if theirs else text)
        lines.append(f"| {title} | {source} | {' | '.join(cells)} |")
    over = [exceeded(row) for row in result["rows"] if not row["max_abs_diff"] <= row["tolerance"]]
    lines += ["", f"Over their tolerance: {'; '.join(over) or 'none'}."]
    commits = commits_in(result["rows"])
    return "\n".join([*lines, "", f"`experiments/results/parity.json`, commits {commits}."])
