from __future__ import annotations

import argparse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aqdetr_jax import cli
from aqdetr_jax.training.arguments import parse_arguments

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
KEYS = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,2}", fullmatch=True)


def parsed(*argv: str) -> tuple[argparse.Namespace, tuple[str, ...]]:
    return parse_arguments(cli._parser(), argv)


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_every_form_of_an_override_wherever_it_stands():
    argv = "train a=0 --config=a.py --config.x.y=1 --config.z -2 seed=3 --workdir d -config.w=(1,2)"
    arguments, overrides = parsed(*argv.split(), "--", "name=a b", "--config.u=--v")
    assert overrides == ("a=0", "x.y=1", "z=-2", "seed=3", "w=(1,2)", "name=a b", "u=--v")
    assert (arguments.config, arguments.workdir) == ("a.py", "d")
    assert parsed("quickstart", "train.steps=3")[1] == ("train.steps=3",)


def test_a_key_without_a_value_takes_no_option_for_one():
    _, overrides = parsed("config", "--config.a", "--config.b", "--config=c", "d=1", "--config.e")
    assert overrides == ("a", "b", "d=1", "e")


def test_words_with_an_equals_sign_that_are_no_overrides():
    source = "epoch=49-step=1200.pth"
    arguments, overrides = parsed("convert", source, "--to", "lr=1e-3")
    assert (arguments.source, arguments.to, overrides) == (source, "lr=1e-3", ())
    arguments, overrides = parsed("predict", "a=b.jpg", "train.steps=2", "--out", "x=y")
    assert (arguments.images, arguments.out) == (["a=b.jpg", "train.steps=2"], "x=y")
    arguments, overrides = parsed("predict", "--", "--config.a", "b.jpg", "--config.c=d")
    assert (arguments.images, overrides) == (["--config.a", "b.jpg", "--config.c=d"], ())
    words = ("--config", "a=1.py", "--workdir", "lr=1e-3", "seed=1")
    arguments, overrides = parsed("train", *words)
    assert (arguments.config, arguments.workdir) == ("a=1.py", "lr=1e-3")
    assert overrides == ("seed=1",)


def test_other_words_are_refused(capsys):
    train = ("train", "--config=a", "--workdir=d")
    assert "unrecognized arguments: seed" in refused(capsys, *train, "seed")
    assert "unrecognized arguments: --sed=3 (an override is" in refused(capsys, *train, "--sed=3")
    for argv in (("convert", "a.pth", "--to=d"), ("predict", "a.png", "--out=d")):
        for word in ("train.steps=2", "--config.train.steps=2"):
            assert refused(capsys, *argv, word).strip().endswith(f"arguments: {word}")


def plain(word: str) -> bool:
    """Whether argparse takes a word for no option."""
    return not word.startswith("-")


@given(WORDS, WORDS.filter(plain))
@example("--config.a=b", "a=b")
def test_options_take_any_text_first(given_with_sign, given_apart):
    words = (f"--workdir={given_with_sign}", "--config", given_apart)
    arguments, overrides = parsed("train", *words)
    assert (arguments.workdir, arguments.config) == (given_with_sign, given_apart)
    assert overrides == ()


@given(st.lists(WORDS.filter(lambda word: word != "--"), min_size=1), WORDS.filter(plain))
@example(["--config.a", "b=c"], "a=b")
def test_arguments_take_any_text(images, source):
    arguments, overrides = parsed("predict", "--", *images)
    assert (arguments.images, overrides) == (images, ())
    arguments, overrides = parsed("convert", source, "--to=d")
    assert (arguments.source, overrides) == (source, ())


@given(st.lists(st.tuples(KEYS, WORDS)), st.data())
def test_overrides_take_any_value(pairs, data):
    words = []
    for key, value in pairs:
        forms = [[f"{key}={value}"], [f"--config.{key}={value}"]]
        if not value.startswith("--"):
            forms.append([f"--config.{key}", value])
        words += data.draw(st.sampled_from(forms))
    _, overrides = parsed("config", "--config=c", *words)
    assert overrides == tuple(f"{key}={value}" for key, value in pairs)
