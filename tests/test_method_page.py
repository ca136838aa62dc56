"""The page of the method names functions that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "method.md"


def named() -> list[str]:
    """The dotted names in the last column of the equations' table."""
    section = PAGE.read_text().split("## The equations")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    names = [re.findall(r"`([a-z_.A-Z]+)`", row.rsplit("|", 2)[1]) for row in rows]
    assert all(names)
    return [name for row in names for name in row]


@pytest.mark.parametrize("name", named())
def test_an_equation_leads_to_its_function(name):
    module, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(f"aqdetr_jax.{module}"), function)
    assert found.__doc__
    assert found.__module__ == f"aqdetr_jax.{module}"  # where it is written, not passed on
