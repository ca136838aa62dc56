"""Names of classes that a checkpoint does not carry: COCO's, or those that the user gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aqdetr_jax.data.class_names import class_name
from aqdetr_jax.data.coco import CocoParser, read_json
from aqdetr_jax.interop.source import shown
from aqdetr_jax.paths import as_path, is_file

GAP = "N/A"
"""Name of an output that stands for no category."""

MAX_LABEL = 200
"""Characters of a class's name."""

COCO_OUTPUTS = 91
"""Classes of the official heads: COCO's ids 0 to 90, of which 80 are categories."""

_COCO = """
1 person, 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat,
10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench, 16 bird, 17 cat,
18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe, 27 backpack,
28 umbrella, 31 handbag, 32 tie, 33 suitcase, 34 frisbee, 35 skis, 36 snowboard, 37 sports ball,
38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, 42 surfboard, 43 tennis racket,
44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl, 52 banana, 53 apple,
54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake, 62 chair,
63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet, 72 tv, 73 laptop, 74 mouse,
75 remote, 76 keyboard, 77 cell phone, 78 microwave, 79 oven, 80 toaster, 81 sink,
82 refrigerator, 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier,
90 toothbrush
"""

COCO_NAMES: Mapping[int, str] = {
    int(number): name
    for number, name in (entry.split(maxsplit=1) for entry in _COCO.replace("\n", " ").split(","))
}
"""The 80 categories of COCO's instances files by id."""


def coco_outputs() -> tuple[str, ...]:
    """Names of the official heads' classes, with gaps."""
    return tuple(COCO_NAMES.get(number, GAP) for number in range(COCO_OUTPUTS))


def placeholders(count: int) -> tuple[str, ...]:
    """Names of classes whose names are not known."""
    return tuple(f"class {number}" for number in range(count))


def class_names(settings: Mapping[str, Any], count: int, where: str) -> tuple[str, ...] | None:
    """The names that transformers' ``config.json`` gives the classes.

    Args:
      settings: its content.
      count: classes of the head.
      where: the source, for messages.

    Returns:
      Names in the order of the outputs, or None if there are none.

    Raises:
      ValueError: ``id2label`` does not name exactly the head's classes, each by a short line.
    """
    labels = settings.get("id2label")
    if not labels:
        return None
    try:
        names = {int(number): name for number, name in labels.items()}
    except (AttributeError, ValueError):
        raise ValueError(
            f"{where}: id2label in config.json maps no numbers to names: correct or remove it"
        ) from None
    for number, name in names.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > MAX_LABEL:
            raise ValueError(
                f"{where}: id2label in config.json names class {number} {shown(repr(name), 80)}; a "
                f"name is a line of up to {MAX_LABEL} characters: correct or remove it"
            )
    if sorted(names) != list(range(count)):
        raise ValueError(
            f"{where}: its parameters have {count} classes, but id2label in config.json names "
            f"{len(names)}, {min(names)} to {max(names)}: correct it, remove it, or give --classes"
        )
    return tuple(names[number] for number in range(count))


def given(text: str, outputs: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names that the user gives, one for each output of a class head.

    Args:
      text: a file, or names with commas between. A ``.json`` file holds a list of names, or is a
        COCO annotation file, whose categories count; any other file has one name a line. The n-th
        name is that of output n. COCO's categories are those of the outputs whose numbers are their
        ids, as the official training code has it, and outputs without a category are GAP; where
        there is an id too large for that and as many categories as outputs, they are in the order
        of their ids.
      outputs: classes of the head, "no object" not counted.

    Returns:
      (names, category ids), each [outputs].

    Raises:
      FileNotFoundError: what looks like a file is none.
      ValueError: other names than outputs, a name twice, or one that is no line of text.
    """
    file = as_path(text)
    ids: tuple[int, ...] | None = None
    if is_file(file):
        names, ids = _names_of(file)
    elif "," not in text and (file.suffix in (".json", ".txt", ".names") or file.name != text):
        raise FileNotFoundError(f"--classes={shown(text)}: no such file")
    else:
        names = [class_name(name, "--classes") for name in text.split(",")]
    where = f"--classes={shown(text)}"
    twice = [name for name, times in Counter(names).items() if times > 1 and name != GAP]
    if twice:
        raise ValueError(f"{where}: the name {twice[0]!r} is there twice")
    if ids is not None and min(ids) >= 0 and max(ids) < outputs:
        found = dict(zip(ids, names, strict=True))
        return tuple(found.get(n, GAP) for n in range(outputs)), tuple(range(outputs))
    if len(names) != outputs:
        by_id = f" with ids {min(ids)} to {max(ids)}" if ids else ""
        raise ValueError(
            f"{where} has {len(names)} names{by_id}, but the class head has {outputs} outputs: "
            f"give one name for each, {GAP!r} for an output that is no class"
        )
    return tuple(names), ids or tuple(range(outputs))


def _names_of(file: Path) -> tuple[list[str], tuple[int, ...] | None]:
    """The names in a file; with their ids if it is COCO's."""
    if file.suffix == ".json":
        content = read_json(file)
        if isinstance(content, dict):
            parsed = CocoParser(content, str(file))
            return list(parsed.class_names), parsed.category_ids
        if not isinstance(content, list):
            raise ValueError(f"{file}: is neither a list of names nor a COCO annotation file")
        return [class_name(name, f"{file}: name {n}") for n, name in enumerate(content, 1)], None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: is no UTF-8 text, one name a line") from error
    lines = text.rstrip().split("\n")
    return [class_name(line, f"{file}: line {n}") for n, line in enumerate(lines, 1)], None
