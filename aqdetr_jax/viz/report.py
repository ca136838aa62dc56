"""One HTML file that says what was run and what came out, with every picture inside."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aqdetr_jax.evaluation.coco import METRIC_NAMES, UNDEFINED, validate_results_block
from aqdetr_jax.io import write_text_atomic
from aqdetr_jax.paths import as_path
from aqdetr_jax.viz import curves, html, palette
from aqdetr_jax.viz.bits_table import bits_section
from aqdetr_jax.viz.html import MISSING, Markup, element, join
from aqdetr_jax.viz.records import read_metrics
from aqdetr_jax.viz.sensitivity import sensitivity_section

CONTEXT_KEYS = (
    "title",
    "subtitle",
    "summary",
    "run",
    "results",
    "metrics",
    "detections",
    "attention",
    "query_capacity",
    "sensitivity",
    "bit_report",
    "notes",
)
"""What ``write_report`` understands; every key is optional."""

REFERENCE, RESULT = "teacher", "student"


def write_report(workdir: str | os.PathLike[str], context: Mapping[str, Any]) -> Path:
    """Writes ``report.html`` into a run's folder: one file, no scripts, no links to elsewhere.

    Keys of ``context``, all optional; a section without content is left out:

    - title, subtitle: text. summary: text, or a list of paragraphs.
    - run: name to value, shown in order (config, seed, commit, device, seconds, ...); "seconds" is
      written as a duration; "versions" may be a dict from package to version.
    - results: run name to results block (see ``evaluation.coco.results_block``) in display order.
      "teacher" is the reference of the kept fraction, "student" the headline.
    - metrics: path of a metrics.jsonl, its records, or run name to either.
    - detections, attention: lists of pictures; each a PIL image, a path, or a dict with "image" and
      optional "title" and "caption".
    - query_capacity: rows for ``curves.capacity_curves``; other columns appear in the table only.
    - sensitivity: see ``sensitivity.sensitivity_section``.
    - bit_report: {"rows": [...], "packed_bytes": int, "float_bytes": int, "measured": bool}, the
      sizes optional ("measured": they are a file's). A
      row has "path", "kind", "weight_bits", "activation_bits", "attention_bits" (an integer;
      "float" or 32 for float; None where the operation has no such operand), "parameters" and
      "note".
    - notes: list of remarks and limits.

    Args:
      workdir: the run's folder; made when missing.
      context: see above. All text is escaped.

    Returns:
      The path of the report.

    Raises:
      ValueError: an unknown key, an invalid results block, or a picture that cannot be read.
      FileNotFoundError: a metrics file is missing.
    """
    unknown = sorted(set(context) - set(CONTEXT_KEYS))
    if unknown:
        raise ValueError(f"report: unknown keys {unknown}; known are {', '.join(CONTEXT_KEYS)}")
    return write_text_atomic(as_path(workdir) / "report.html", render_report(context))


def render_report(context: Mapping[str, Any]) -> str:
    """Builds the report's HTML; see ``write_report``."""
    builders: list[tuple[str, str, Callable[[Any], Markup], str]] = [
        ("results", "Results", _results, "results"),
        ("classes", "Per class", _classes, "results"),
        ("training", "Training", _training, "metrics"),
        ("detections", "Detections", _pictures, "detections"),
        ("attention", "Encoder attention", _attention, "attention"),
        ("queries", "Query capacity", _capacity, "query_capacity"),
        ("sensitivity", "Sensitivity", sensitivity_section, "sensitivity"),
        ("bits", "Bits", bits_section, "bit_report"),
        ("run", "How it was run", lambda _: _run(context), ""),
        ("notes", "Notes and limits", _notes, "notes"),
    ]
    for name, block in (context.get("results") or {}).items():
        try:
            validate_results_block(block)
        except ValueError as error:
            raise ValueError(f"report, results[{name!r}]: {error}") from error
    sections, links = [], []
    for anchor, heading, build, key in builders:
        content = build(context.get(key)) if not key or context.get(key) else Markup("")
        if content:
            links.append(element("a", heading, href=f"#{anchor}"))
            sections.append(element("section", element("h2", heading), content, id=anchor))
    title = str(context.get("title") or "Low-bit detection transformer: run report")
    header = [element("h1", title)]
    if context.get("subtitle"):
        header.append(element("div", context["subtitle"], class_="sub"))
    header += [element("p", paragraph) for paragraph in _paragraphs(context.get("summary"))]
    if len(links) > 1:
        header.append(element("nav", *links, aria_label="Sections"))
    body = element(
        "main",
        element("header", *header),
        _tiles(context),
        *sections,
        element("footer", "Made by aqdetr_jax. One file, no scripts, nothing loaded from outside."),
    )
    style = importlib.resources.files("aqdetr_jax.viz").joinpath("assets/report.css").read_text()
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser enforces what the docstring promises.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"{element('title', title)}<style>{style}</style></head>\n<body>{body}</body></html>\n"
    )


def _tiles(context: Mapping[str, Any]) -> Markup:
    results = context.get("results") or {}
    bits = context.get("bit_report") or {}
    tiles = []
    for name in (REFERENCE, RESULT):
        if name in results:
            block = results[name]
            hint = f"AP50 {_percent(block['AP50'])}, {block['images']:,} images"
            tiles.append((f"{name} AP", _percent(block["AP"]), "%", hint))
    kept = _kept(results.get(RESULT), results.get(REFERENCE))
    if kept is not None:
        gap = _points(results[RESULT]["AP"] - results[REFERENCE]["AP"])
        tiles.append(("kept by the student", f"{100 * kept:.1f}", "%", f"{gap} points of AP"))
    others = [n for n in ("baseline", "calibrated") if n in results]
    if RESULT in results and others and results[RESULT]["AP"] >= 0 <= results[others[0]]["AP"]:
        gain = _points(results[RESULT]["AP"] - results[others[0]]["AP"])
        hint = f"{others[0]}: {_percent(results[others[0]]['AP'])}"
        tiles.append((f"over the {others[0]}", gain, "AP", hint))
    if bits.get("packed_bytes"):
        hint = "as written" if bits.get("measured") else "weights as stored"
        if bits.get("float_bytes"):
            ratio = bits["float_bytes"] / bits["packed_bytes"]
            hint = f"{hint}, {ratio:.1f}× below float32"
        number, unit = html.size(bits["packed_bytes"]).split()
        tiles.append(("model size", number, unit, hint))
    if not tiles:
        return Markup("")
    return element(
        "div",
        *(
            element(
                "div",
                element("div", name, class_="name"),
                element("div", value, " ", element("small", unit), class_="value"),
                element("div", hint, class_="hint"),
                class_="tile",
            )
            for name, value, unit, hint in tiles
        ),
        class_="tiles",
    )


def _results(results: Mapping[str, Any]) -> Markup:
    images = {block["images"] for block in results.values()}
    lead = "COCO protocol, percent; a dash: no ground truth of that kind."
    parts = [element("p", lead, class_="lead")]
    if len(images) > 1:
        counts = ", ".join(f"{n}: {b['images']:,}" for n, b in results.items())
        warning = f"These results were not measured on the same images ({counts})."
        parts.append(element("p", warning, class_="warn"))
    light, dark = (curves.ap_bars(results, theme=t) for t in ("light", "dark"))
    if light is not None and dark is not None:
        alt = "; ".join(f"{n}: AP {_percent(b['AP'])}" for n, b in results.items())
        parts.append(html.chart(light, dark, alt=alt))
    columns = [("run", "text"), *((name, "") for name in METRIC_NAMES)]
    reference = results.get(REFERENCE)
    if reference is not None and len(results) > 1:
        columns.append(("kept %", ""))
    rows = []
    for name, block in results.items():
        row = [_run_name(name, results), *(_percent(block[m]) for m in METRIC_NAMES)]
        if len(columns) > len(row):
            kept = _kept(block, reference)
            row.append(MISSING if kept is None else f"{100 * kept:.1f}")
        rows.append(row)
    parts.append(element("h3", "All twelve numbers"))
    values = [[block[m] for m in METRIC_NAMES] for block in results.values()]
    names = list(results)
    parts.append(html.table(columns, rows, best=_best(names, values)))
    if reference is not None and len(results) > 1:
        words = "Kept: AP in percent of the teacher's. Bold: the best besides the teacher."
        parts.append(element("p", words, class_="under"))
    return join(parts)


def _classes(results: Mapping[str, Any]) -> Markup:
    names = dict.fromkeys(c for block in results.values() for c in block["per_class"])
    if not names:
        return Markup("")
    columns = [("class", "text")]
    columns += [(run, "") for _ in ("AP", "AP50") for run in results]
    groups = [("", 1), ("AP", len(results)), ("AP50", len(results))]
    both = REFERENCE in results and RESULT in results
    if both:
        columns.append(("AP − teacher's", ""))
        groups.append((RESULT, 1))
    rows = []
    for name in names:
        found = {run: block["per_class"].get(name, {}) for run, block in results.items()}
        row: list[Any] = [name]
        for metric in ("AP", "AP50"):
            row += [_percent(found[run].get(metric, UNDEFINED)) for run in results]
        if both:
            pair = [found[run].get("AP", UNDEFINED) for run in (RESULT, REFERENCE)]
            row.append(_points(pair[0] - pair[1]) if min(pair) >= 0 else MISSING)
        rows.append(row)
    return join([element("p", "Percent.", class_="lead"), html.table(columns, rows, groups=groups)])


def _training(metrics: Any) -> Markup:
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    read = {
        name: read_metrics(value) if isinstance(value, str | os.PathLike) else list(value)
        for name, value in runs.items()
    }
    read = {name: records for name, records in read.items() if records}
    light, dark = (curves.training_curves(read, theme=t) for t in ("light", "dark"))
    if light is None or dark is None:
        return Markup("")
    last = max(record["step"] for records in read.values() for record in records)
    lead = f"{last:,} steps. Faint: as logged; strong: running mean."
    return join(
        [element("p", lead, class_="lead"), html.chart(light, dark, alt=f"Training curves. {lead}")]
    )


def _pictures(pictures: Sequence[Any]) -> Markup:
    shown = []
    for item in pictures:
        if isinstance(item, Mapping):
            words = {k: str(item[k]) for k in ("title", "caption") if item.get(k)}
            shown.append(html.picture(item["image"], **words))
        else:
            shown.append(html.picture(item))
    return join(shown)


def _attention(pictures: Sequence[Any]) -> Markup:
    lead = (
        "Where marked positions of the encoder's self-attention look, the mean over the heads: "
        "teacher, student, and their difference. Of deformable models also where the best "
        "detections' queries sample."
    )
    return join([element("p", lead, class_="lead"), _pictures(pictures)])


def _capacity(rows: Sequence[Mapping[str, Any]]) -> Markup:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    words = {k for k in keys if any(isinstance(row.get(k), str) for row in rows)}
    columns = [(k.replace("_", " "), "text" if k in words else "") for k in keys]
    parts = []
    light, dark = (curves.capacity_curves(rows, theme=t) for t in ("light", "dark"))
    if light is not None and dark is not None:
        parts.append(html.chart(light, dark, alt="Query capacity by decoder layer"))
    parts.append(element("h3", "Numbers"))
    parts.append(html.table(columns, [[_number(row.get(k)) for k in keys] for row in rows]))
    return join(parts)


def _run(context: Mapping[str, Any]) -> Markup:
    run = dict(context.get("run") or {})
    versions = run.pop("versions", None)
    # A seed or a year is a name, not a quantity: no thousands separators here.
    shown = {
        k: html.duration(v)
        if k == "seconds" and isinstance(v, int | float)
        else (str(v) if isinstance(v, int) else v)
        for k, v in run.items()
    }
    parts = [html.definitions(shown)] if shown else []
    results = context.get("results") or {}
    if results:
        columns = [("result", "text"), ("config", "text"), ("commit", "text code"), ("seed", "")]
        columns += [("images", ""), ("evaluation", "")]
        rows = [
            [
                _run_name(name, results),
                block["config"],
                block["commit"],
                block["seed"],
                f"{block['images']:,}",
                html.duration(block["seconds"]),
            ]
            for name, block in results.items()
        ]
        parts += [element("h3", "Where each result comes from"), html.table(columns, rows)]
    if versions:
        parts.append(element("h3", "Versions"))
        parts.append(html.definitions({str(k): str(v) for k, v in versions.items()}))
    return join(parts)


def _notes(notes: Any) -> Markup:
    return element("ul", *(element("li", note) for note in _paragraphs(notes)))


def _paragraphs(value: Any) -> list[str]:
    if not value:
        return []
    return [value] if isinstance(value, str) else [str(v) for v in value]


def _number(value: Any) -> Any:
    """As ``html.text``, with three decimals so that a column lines up."""
    if isinstance(value, float) and 1e-3 <= abs(value) < 1e4:
        return f"{value:.3f}"
    return html.text(value)


def _percent(value: float) -> str:
    return MISSING if value < 0 else f"{100 * value:.1f}"


def _points(difference: float) -> str:
    """A difference of fractions in signed percentage points, with a real minus sign."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _kept(block: Mapping[str, Any] | None, reference: Mapping[str, Any] | None) -> float | None:
    if not block or not reference or block["AP"] < 0 or reference["AP"] <= 0:
        return None
    return block["AP"] / reference["AP"]


def _best(names: Sequence[str], values: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Positions of each column's best value besides the reference, if there is a contest."""
    rows = [r for r, name in enumerate(names) if name != REFERENCE]
    if len(rows) < 2:
        return []
    positions = []
    for column in range(len(METRIC_NAMES)):
        top = max(values[r][column] for r in rows)
        if top >= 0:
            positions += [(r, column + 1) for r in rows if values[r][column] == top]
    return positions


def _run_name(name: str, results: Mapping[str, Any]) -> Markup:
    light, dark = (palette.run_colors(list(results), theme)[name] for theme in ("light", "dark"))
    dot = element("span", class_="dot", style=f"--run:{light};--run-dark:{dark}")
    return join([dot, name])
