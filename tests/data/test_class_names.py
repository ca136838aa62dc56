from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.data.class_names import class_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat\n", "cat"),
        ("\ufeff traffic light\r\n", "traffic light"),
        ("\u3000猫\u2028", "猫"),
        ("\x00cat", None),
        ("می‌روم", "می‌روم"),  # a joiner inside a word is a letter's form, no control
        ("a\nb", None),
        ("a\tb", None),
        ("a\x1b[31m", None),
        ("\ud800", None),
        (" \n", None),
        ("", None),
        (3, None),
        (b"cat", None),
    ],
)
def test_names(text, name):
    if name is not None:
        assert class_name(text, "f.json: category 3") == name
        return
    with pytest.raises(ValueError, match=r"^f\.json: category 3: ") as caught:
        class_name(text, "f.json: category 3")
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@given(st.text())
def test_a_name_is_one_line_that_every_file_can_hold(text):
    refusal = ""
    try:
        name = class_name(text, "here")
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.isprintable()
        return
    assert name in text
    assert name == name.strip()
    assert name.splitlines() == [name]
    name.encode()
    assert class_name(name, "here") == name
