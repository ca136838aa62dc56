import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from aqdetr_jax.evaluation.coco import METRIC_NAMES
from aqdetr_jax.viz import html, report

pytestmark = pytest.mark.usefixtures("quick_compile")


def _block(ap, **changes):
    block = dict.fromkeys(METRIC_NAMES, ap)
    block |= {"APl": -1.0, "per_class": {"circle": {"AP": ap, "AP50": ap}}}
    block |= {"images": 64, "config": "shapes", "seed": 0, "commit": "abc", "seconds": 2.0}
    return block | changes


def _context(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 1.0 / (s + 1), "eval/AP": 0.1}) for s in range(5)]
    metrics.write_text("\n".join(lines))
    picture = tmp_path / "p.png"
    Image.new("RGB", (20, 10), "red").save(picture)
    return {
        "title": "Shapes at 4 bits",
        "subtitle": "a subtitle",
        "summary": ["First.", "Second."],
        "run": {"config": "shapes", "seed": 2024, "seconds": 75.0, "versions": {"jax": "0.10.2"}},
        "results": {
            "teacher": _block(0.5),
            "calibrated": _block(0.1),
            "baseline": _block(0.4),
            "student": _block(0.45),
        },
        "metrics": {"student": metrics},
        "detections": [{"image": picture, "title": "T", "caption": "C"}],
        "attention": [Image.new("RGB", (20, 10), "blue")],
        "query_capacity": [
            {"model": "student", "set": "object", "layer": i, "effective_rank": 3.0 * i}
            for i in (1, 2)
        ],
        "bit_report": {
            "rows": [
                {
                    "path": "encoder/layer0/q",
                    "kind": "dense",
                    "weight_bits": 4,
                    "activation_bits": 4,
                    "attention_bits": None,
                    "parameters": 750,
                    "note": "",
                },
                {
                    "path": "head/class",
                    "kind": "dense",
                    "weight_bits": "float",
                    "activation_bits": 32,
                    "attention_bits": None,
                    "parameters": 250,
                    "note": "stays float",
                },
            ],
            "packed_bytes": 2 * 1024**2,
            "float_bytes": 16 * 1024**2,
        },
        "sensitivity": {
            "result": {
                "candidates": [8, 4],
                "groups": [
                    {"name": "stem", "chosen_bits": 8},
                    {"name": "heads", "chosen_bits": None},
                ],
                "rows": [
                    {"kind": "float", "group": "", "bits": None, "AP": 0.5, "snr_db": None},
                    *(
                        {"kind": "alone", "group": g, "bits": b, "AP": 0.4, "snr_db": snr}
                        for g, b, snr in (
                            ("stem", 8, 30.0),
                            ("stem", 4, 9.5),
                            ("heads", 8, None),
                            ("heads", 4, 12.0),
                        )
                    ),
                ],
                "ranking": {"by_snr": ["stem", "heads"], "agreement": 0.5},
            },
            "headings": ["group", "AP"],
            "cells": [["stem", "40.0"], ["heads", "40.0"]],
        },
        "notes": "One seed.",
    }


class _Checker(HTMLParser):
    """Collects text and attributes, and checks that every element is closed in order."""

    VOID = ("meta", "img", "source")

    def __init__(self, document):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_whole_report(tmp_path):
    path = report.write_report(tmp_path / "run", _context(tmp_path))
    assert path == tmp_path / "run" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    read = _Checker(path.read_text(encoding="utf-8"))
    text = " ".join(read.text)
    for word in ("Results", "Per class", "Training", "Detections", "Encoder attention",
                 "Query capacity", "Sensitivity", "Bits", "How it was run",
                 "Notes and limits"):  # fmt: skip
        assert word in text
    # Kept: .45 / .5; gain over the baseline; size; seed without a thousands separator; duration.
    for word in ("90.0", "−5.0 points of AP", "+5.0", "8.0× below float32", "2024", "1 min 15 s"):
        assert word in text
    assert "75.0 % of the parameters" in text
    assert read.tags.count("picture") == 4
    assert read.tags.count("img") == 6


def test_report_is_self_contained(tmp_path):
    document = report.render_report(_context(tmp_path))
    read = _Checker(document)
    assert "script" not in read.tags
    for name, value in read.attributes:
        if name in ("src", "srcset"):
            assert value.startswith("data:image/")
        if name == "href":
            assert value.startswith("#")
    assert "http" not in document.replace("http-equiv", "")
    anchors = {v for n, v in read.attributes if n == "id"}
    assert {v[1:] for n, v in read.attributes if n == "href"} == anchors


@pytest.mark.parametrize("key", report.CONTEXT_KEYS)
def test_every_section_is_optional(tmp_path, key):
    context = _context(tmp_path)
    alone = report.render_report({key: context.pop(key)})
    without = report.render_report(context)
    _Checker(alone)
    _Checker(without)


def test_empty_values_leave_sections_out():
    empty = {"results": {}, "metrics": [], "detections": [], "bit_report": {}, "notes": []}
    assert "<section" not in report.render_report(empty)
    assert "<section" not in report.render_report({})


def test_all_text_is_escaped(tmp_path):
    evil = "<img src=x onerror='alert(1)'>&\""

    def poison(value):
        if isinstance(value, str):
            return evil
        if isinstance(value, dict):
            return {k: poison(v) for k, v in value.items()}
        return [poison(v) for v in value] if isinstance(value, list) else value

    context = _context(tmp_path)
    for key in ("title", "subtitle", "summary", "run", "notes"):
        context[key] = poison(context[key])
    context["run"][evil] = evil
    context["results"] = {evil: _block(0.5, config=evil, commit=evil)}
    context["results"][evil]["per_class"] = {evil: {"AP": 0.5, "AP50": 0.5}}
    context["detections"] = [{"image": Image.new("RGB", (2, 2)), "title": evil, "caption": evil}]
    context["query_capacity"] = [{evil: evil, "layer": 1}]
    for row in context["bit_report"]["rows"]:
        row.update(path=evil, kind=evil, note=evil)
    document = report.render_report(context)
    read = _Checker(document)
    assert not any(name.startswith("on") for name, _ in read.attributes)
    assert "<img src=x" not in document
    assert evil in "".join(read.text)


def test_different_image_counts_are_said(tmp_path):
    results = {"teacher": _block(0.5), "student": _block(0.4, images=32)}
    assert "not measured on the same images" in report.render_report({"results": results})


def test_undefined_results_do_not_crash():
    blank = dict.fromkeys(METRIC_NAMES, -1.0)
    document = report.render_report(
        {"results": {"teacher": _block(0.5) | blank, "student": _block(0.0)}}
    )
    assert "kept by the student" not in document


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        ({"result": {}}, ValueError, r"unknown keys \['result'\]"),
        ({"results": {"student": {"AP": 1}}}, ValueError, r"results\['student'\].*missing"),
        ({"detections": ["nowhere.png"]}, ValueError, "nowhere.png"),
        ({"metrics": "nowhere.jsonl"}, FileNotFoundError, "nowhere.jsonl"),
    ],
)
def test_bad_context_is_named_and_writes_nothing(tmp_path, context, error, message):
    with pytest.raises(error, match=message):
        report.write_report(tmp_path / "run", context)
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_picture_is_named(tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: not an image file"):
        html.picture(path)


def test_large_pictures_become_jpeg():
    from numpy.random import default_rng

    noise = Image.fromarray(default_rng(0).integers(0, 256, (800, 900, 3), "uint8"))
    figure = html.picture(noise, title="noise")
    assert "data:image/jpeg" in figure
    assert "data:image/png" in html.picture(Image.new("RGB", (50, 50)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, "0.5 s"), (59.97, "60.0 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_durations(value, expected):
    assert html.duration(value) == expected


def test_sizes_and_numbers():
    assert [html.size(v) for v in (12, 2048, 41.5 * 2**20, 3 * 2**30)] == [
        "12 B",
        "2.0 KiB",
        "41.5 MiB",
        "3.00 GiB",
    ]
    assert [html.text(v) for v in (None, float("nan"), 12345, 1e-4, True, [1, "a"])] == [
        "–",
        "–",
        "12,345",
        "0.0001",
        True,
        "1, a",
    ]
    assert re.fullmatch(r"<td class=\"a\">&lt;</td>", html.element("td", "<", class_="a"))
