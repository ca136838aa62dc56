"""What a message tells the user to do can be done: keys, options and verbs are there."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import aqdetr_jax
from aqdetr_jax import cli
from aqdetr_jax.training.config import ExperimentConfig

ROOT = Path(aqdetr_jax.__file__).parent


def keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration, groups included."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from keys(part, f"{prefix}{name}.")


def options(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """The options of each verb."""
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        verb: {option for action in sub._actions for option in action.option_strings}
        for verb, sub in verbs.choices.items()
    }


KEYS = frozenset(keys(ExperimentConfig))
GROUPS = sorted({key.split(".")[0] for key in KEYS if "." in key})
VERBS = options(cli._parser())

OTHERS = frozenset(
    (
        *("--verify", "--porcelain", "--show-toplevel"),
        *("--xla_dump_to", "--xla_dump_hlo_as_text", "--logdir"),
        *("--run", "--run-dark"),
    )
)
"""Options of git, of XLA and of xprof, and variables of style sheets."""

FILES = ("json", "yaml", "yml", "pkl", "pth", "safetensors")
"""What follows the dot in the names of files: "data.yaml" is no key."""


def texts() -> list[tuple[str, str]]:
    """(place, text) of every string of the package that is no docstring.

    What a formatted string puts in becomes "{}": a name that runs into it is not looked at.
    """
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        parts = {id(part) for n in nodes if isinstance(n, ast.JoinedStr) for part in n.values}
        parts |= {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
        for node in nodes:
            text = ""
            if isinstance(node, ast.JoinedStr):
                values = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
                text = "".join(map(str, values))
            elif isinstance(node, ast.Constant) and id(node) not in parts:
                text = node.value if isinstance(node.value, str) else ""
            if text:
                found.append((f"{file.relative_to(ROOT)}:{node.lineno}", text))
    return found


TEXTS = texts()


def wrong_keys(text: str) -> list[str]:
    """What a text calls a key of the configuration and is none."""
    name = r"((?:\.[a-z][a-z0-9_]*)+)(?![\w{*])"
    named = [key[1:] for key in re.findall(rf"(?<![\w./])(?:--)?config{name}", text)]
    groups = "|".join(GROUPS)
    if " " in text.strip():  # else it may be a name of another library
        named += [g + key for g, key in re.findall(rf"(?<![\w./'\"])({groups}){name}", text)]
    return [k for k in named if k not in KEYS | {"a.b"} and k.split(".")[-1] not in FILES]


def wrong_commands(text: str) -> list[str]:
    """What a text calls an option or a verb and is none, or is no option of the verb before it."""
    every = set().union(*VERBS.values()) | OTHERS
    wrong = [
        option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if option not in every
    ]
    for verb, rest in re.findall(r"\baqdetr ([a-z]+(?:-[a-z]+)*)((?: --\S+)*)", text):
        if verb not in VERBS:
            wrong.append(f"aqdetr {verb}")
        else:
            given = re.findall(r"--[a-z][a-z-]*", rest)
            wrong += [f"aqdetr {verb} {option}" for option in given if option not in VERBS[verb]]
    return wrong


def test_keys_that_are_named_exist():
    wrong = [(place, key) for place, text in TEXTS for key in wrong_keys(text)]
    assert not wrong


def test_options_and_verbs_that_are_named_exist():
    wrong = [(place, word) for place, text in TEXTS for word in wrong_commands(text)]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "keys_", "commands"),
    [
        ("set config.optimizer.lr, config.model, train.steps or data.root", [], []),
        ("set config.optimiser.lr", ["optimiser.lr"], []),
        ("give --config.init_form=DIR", ["init_form"], []),
        ("lower optimizer.lr_all, please", ["optimizer.lr_all"], []),
        ("config.json of config.data.{} and data.yaml", [], []),
        ("aqdetr convert --classes=FILE makes it", [], []),
        ("aqdetr convert --config=FILE", [], ["aqdetr convert --config"]),
        ("aqdetr evaluate it, with --modell=DIR", [], ["--modell", "aqdetr evaluate"]),
    ],
)
def test_what_is_not_there_is_found(text, keys_, commands):
    assert wrong_keys(text) == keys_
    assert wrong_commands(text) == commands


def test_there_is_something_to_look_at():
    assert sum("config." in text for _, text in TEXTS) > 40
    assert sum("--" in text for _, text in TEXTS) > 40
