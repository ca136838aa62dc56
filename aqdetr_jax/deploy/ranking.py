"""What a sensitivity study says, in order: which group loses most, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NO_NOISE = "exact"


def ranking(
    groups: Sequence[str], rows: Sequence[Mapping[str, Any]], bits: int, reference: float
) -> dict[str, Any]:
    """Groups from the most to the least sensitive, each quantized alone.

    Args:
      groups: names.
      rows: of the ledger.
      bits: at which they are compared.
      reference: AP of the float model.

    Returns:
      ``{"bits", "by_ap_loss": [names], "by_snr": [names], "agreement"}``; the last is Spearman's
      rank correlation of the two, -1 to 1, None for fewer than two groups or equal losses only.
    """
    alone = {r["group"]: r for r in rows if r["kind"] == "alone" and r["bits"] == bits}
    loss = np.array([reference - alone[name]["AP"] for name in groups])
    noise = np.array([alone[name]["noise"] for name in groups])

    def ordered(values: np.ndarray) -> list[str]:
        return [groups[i] for i in np.argsort(-values, kind="stable")]

    first, second = _ranks(loss), _ranks(noise)
    spread = min(np.std(first), np.std(second))
    return {
        "bits": bits,
        "by_ap_loss": ordered(loss),
        "by_snr": ordered(noise),
        "agreement": float(np.corrcoef(first, second)[0, 1]) if spread else None,
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    below = (values[None] < values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    return below + (equal - 1) / 2


def bits_text(bits: Sequence[int]) -> str:
    """Bits of a group in a policy: "4", "4/8" of several, "float" of none."""
    return "/".join(map(str, bits)) or "float"


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a group a row, the noisiest first.

    Args:
      result: content of ``sensitivity.json``.
    """
    rows = {(r["kind"], r["group"], str(r["bits"])): r for r in result["rows"]}
    float_ap, policy_ap = (rows[kind, "", "None"]["AP"] for kind in ("float", "policy"))
    candidates = result["candidates"]
    headings = ["group", "weights", "policy", "chosen"]
    headings += [f"AP loss, {bits} bits" for bits in candidates]
    headings += [f"dB, {bits} bits" for bits in candidates]
    headings.append("AP gained if float")
    groups = {group["name"]: group for group in result["groups"]}
    cells = []
    for name in result["ranking"]["by_snr"]:
        group = groups[name]
        alone = [rows["alone", name, str(bits)] for bits in candidates]
        rest = rows.get(("all but", name, "None"))
        cells.append(
            [
                name,
                f"{group['weights']:,}",
                bits_text(group["policy_bits"]),
                str(group["chosen_bits"] or "–"),
                *(f"{float_ap - row['AP']:+.4f}" for row in alone),
                *(NO_NOISE if row["snr_db"] is None else f"{row['snr_db']:.1f}" for row in alone),
                "–" if rest is None else f"{rest['AP'] - policy_ap:+.4f}",
            ]
        )
    return headings, cells


def summary(result: Mapping[str, Any]) -> list[str]:
    """The outcome in sentences."""
    rows = {(r["kind"], r["group"]): r for r in result["rows"] if r["kind"] in ("float", "policy")}
    first, policy = rows["float", ""], rows["policy", ""]
    choice, measured = result["choice"], result["measured"]
    name = measured["quant"]["policy"]
    budget = choice["budget"]
    kept = f"{budget['value']:,} bytes" if budget["kind"] == "bytes" else f"{budget['value']:g} AP"
    by_ap, by_snr = (result["ranking"][key][:3] for key in ("by_ap_loss", "by_snr"))
    if choice["kept_policy"]:
        outcome = (
            f"Under a budget of {kept} no bits chosen by {choice['by']} were better than the "
            "policy's: it is kept."
        )
    else:
        outcome = (
            f"Under a budget of {kept} the bits chosen by {choice['by']} have AP "
            f"{choice['AP']:.4f} after calibration and take {choice['bytes']:,} bytes."
        )
    return [
        f"On {measured['images']} images the float model has AP {first['AP']:.4f}; calibrated at "
        f"{name}, without training, {policy['AP']:.4f} ({choice['policy_bytes']:,} bytes packed, "
        f"{choice['float_bytes']:,} in float32).",
        f"Alone at {result['ranking']['bits']} bits, most AP is lost by {', '.join(by_ap)}; the "
        f"outputs are noisiest by {', '.join(by_snr)}.",
        outcome,
    ]


def as_text(result: Mapping[str, Any]) -> str:
    """Table and summary for a terminal."""
    headings, cells = table(result)
    count = len(result["candidates"])
    brief = {"AP loss, ": "-AP@", "dB, ": "dB@", " bits": "", "AP gained if float": "+AP float"}
    short = list(headings)
    for long, text in brief.items():
        short = [heading.replace(long, text) for heading in short]
    lines = [
        f"{row[0]:34s} {row[1]:>10s} {row[2]:>7s} {row[3]:>7s} "
        + " ".join(f"{cell:>8s}" for cell in row[4 : 4 + 2 * count])
        + f" {row[-1]:>9s}"
        for row in (short, *cells)
    ]
    return "\n".join([*lines, "", *summary(result)])
