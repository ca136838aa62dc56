"""Names in any script: a font that has them, or a number and a note."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from aqdetr_jax.viz import detections, fonts, palette

CAT, DOG = "\u732b", "\u72ac"


def write_font(path, characters: str, style: str = "Sans") -> str:
    """A font whose every character is a black square of its full height."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, glyph))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": style})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def machine(monkeypatch):
    """Sets the fonts of the machine."""
    return lambda *files: monkeypatch.setattr(fonts, "_system_fonts", lambda: files)


def test_a_font_of_the_machine_is_found(machine, tmp_path):
    bare = write_font(tmp_path / "bare.ttf", CAT)  # without the digits of a score
    whole = write_font(tmp_path / "whole.ttf", CAT + " .…0123456789")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    machine(str(broken), str(tmp_path / "gone.ttf"), bare, whole)
    assert fonts.can_draw(CAT)
    assert not fonts.can_draw(DOG)
    assert not fonts.can_draw(CAT + DOG)
    assert fonts.load_font(20, CAT).path == whole
    assert "DejaVu" in fonts.load_font(20, "cat").path
    assert fonts.class_text((CAT, DOG), 0) == CAT
    assert fonts.note_of_numbers((CAT,)) == ""
    canvas = Image.new("L", (20, 20), 255)
    ImageDraw.Draw(canvas).text((0, 0), CAT, font=fonts.load_font(20, CAT), fill=0)
    black = np.asarray(canvas)[2:14, 3:16]  # the square of the glyph, less its border
    assert black.max() == 0


def test_the_name_is_drawn_with_it(machine, tmp_path):
    machine(write_font(tmp_path / "squares.ttf", CAT + " .…0123456789"))
    picture = detections.draw_boxes(
        np.full((128, 128, 3), 128, np.uint8), [[32, 64, 96, 120]], [0], None, (CAT,)
    )
    ink = palette.readable_on(palette.class_color(0))
    rows, columns = np.nonzero((np.asarray(picture) == ink).all(-1))
    # One square of 0.8 em at 13 pixels (or what the picture's size asks for), and nothing else.
    assert len(rows) >= 60
    assert len(rows) >= 0.8 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_without_a_font_the_number_stands_and_a_note_says_whose(machine):
    machine()
    names = ("cat", CAT, "\u00e9t\u00e9", DOG)
    assert [fonts.class_text(names, k) for k in range(5)] == [
        "cat",
        "class 1",
        "\u00e9t\u00e9",
        "class 3",
        "class 4",
    ]
    note = fonts.note_of_numbers(names)
    assert note.endswith(f": class 1 = {CAT}, class 3 = {DOG}")
    assert fonts.note_of_numbers(names, [0, 3]).endswith(f": class 3 = {DOG}")
    assert fonts.note_of_numbers(names, [0, 2]) == fonts.note_of_numbers(("cat",)) == ""
    panels = [("t", [[10, 10, 50, 50]], [1], [0.75])]
    grey = np.full((64, 64, 3), 128, np.uint8)
    shown, wanted = (detections.side_by_side(grey, panels, n) for n in (names, ("cat", "class 1")))
    np.testing.assert_array_equal(np.asarray(shown), np.asarray(wanted))


def test_titles_keep_what_can_be_drawn(machine):
    machine()
    assert fonts.drawable(f"run {CAT}1") == "run ?1"
    assert fonts.drawable("two\nlines") == "two?lines"
    assert fonts.drawable("") == ""
    assert fonts.drawable(" ") == " "
    assert fonts.drawable("\n") == "?"


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(), max_size=12), st.sampled_from([True, False]))
@example("\n", True)
def test_any_name_can_be_drawn(name, scored):
    """Line breaks, halves of surrogates, any script: no name stops a report."""
    scores = [0.75] if scored else None
    panels = [(name, [[10, 10, 50, 50]], [0], scores)]
    picture = detections.side_by_side(np.zeros((64, 64, 3), np.uint8), panels, (name,))
    detections.note(picture, name)
    assert picture.width > 384


def test_the_machines_fonts_are_files():
    for file in fonts._system_fonts()[:5]:
        assert isinstance(fonts._characters(file), frozenset)
    assert {ord("a"), ord("é"), 0x416} <= fonts._characters(fonts._own())
