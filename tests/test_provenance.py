from __future__ import annotations

import subprocess

import pytest
import tiny

from aqdetr_jax import provenance
from aqdetr_jax.provenance import git_commit


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(provenance, "GIT_SECONDS", tiny.HUNG_SECONDS)


def git(folder, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_git_commit(tmp_path, monkeypatch):
    # A copy of the module in a repository of its own.
    source = tmp_path / "aqdetr_jax" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert git_commit.__wrapped__() == "unknown"
    git(tmp_path, "init", "-q")
    assert git_commit.__wrapped__() == "unknown"  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = git_commit.__wrapped__()
    assert len(clean) == 40
    for output in ("results/table.json", "manifests/table/row.json"):
        written = tmp_path / "experiments" / output
        written.parent.mkdir(parents=True)
        written.write_text("{}")
    assert git_commit.__wrapped__() == clean
    source.write_text("x = 2\n")
    assert git_commit.__wrapped__() == clean + "-dirty"
    # Inside somebody else's repository, as when installed into a virtual environment there.
    nested = tmp_path / "venv" / "site" / "aqdetr_jax" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(nested))
    nested.parent.mkdir(parents=True)
    assert git_commit.__wrapped__() == "unknown"
    monkeypatch.setenv("PATH", "")
    assert git_commit.__wrapped__() == "unknown"


def test_git_commit_is_that_of_the_start(tmp_path, monkeypatch):
    """Results are of the code that was loaded, whatever is edited while it runs."""
    source = tmp_path / "aqdetr_jax" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "one")):
        git(tmp_path, *arguments)
    monkeypatch.setattr(provenance, "__file__", str(source))
    git_commit.cache_clear()
    try:
        first = git_commit()
        source.write_text("x = 2\n")
        assert git_commit() == first
        assert git_commit.__wrapped__() == first + "-dirty"
    finally:
        git_commit.cache_clear()
