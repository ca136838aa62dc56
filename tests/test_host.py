"""One virtual CPU device a core, unless the user says otherwise; output; what is compiled."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import jax
import pytest

from aqdetr_jax import host

PROGRAM = """
from aqdetr_jax.host import use_every_core
{before}
use_every_core()
import jax
print(jax.device_count())
"""


def devices(before: str = "", **environment: str) -> int:
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(child.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no such call on this system")
@pytest.mark.parametrize(("cores", "wanted"), [(1, 1), (2, 2), (3, 2), (7, 4), (64, 8)])
def test_a_power_of_two_and_never_more_than_eight(cores, wanted):
    assert devices(f"import os; os.sched_getaffinity = lambda _: set(range({cores}))") == wanted


def test_what_the_user_set_wins():
    assert devices(XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices(JAX_NUM_CPU_DEVICES="5") == 5


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_any_name_can_be_printed(encoding):
    program = "import aqdetr_jax.host as h; h.print_any_name(); print('a\u732b\\udcff')"
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    cat = "\u732b" if encoding == "utf-8" else "\\u732b"
    assert child.stdout.decode(encoding).strip() == f"a{cat}\\udcff"


@pytest.fixture
def cache(monkeypatch):
    """What ``use_compilation_cache`` would set, where nothing is set yet; nothing is changed."""
    name, set_to = "jax_compilation_cache_dir", {}
    before = jax.config.values[name]
    jax.config.update(name, None)
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", set_to.__setitem__)
        yield set_to
    jax.config.update(name, before)


def test_what_is_compiled_is_kept_in_a_folder_of_the_users_own(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    host.use_compilation_cache()
    folder = tmp_path / "aqdetr_jax" / "compiled"
    assert cache["jax_compilation_cache_dir"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_that_others_may_write_to_is_not_used(cache, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "aqdetr_jax" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    host.use_compilation_cache()
    assert not cache
    assert f"{folder} can be written by others" in caplog.text
    assert "JAX_COMPILATION_CACHE_DIR" in caplog.text


@pytest.mark.parametrize("given", ["gs://bucket/cache", "relative", ""])
def test_no_path_of_this_machine_is_no_cache_home(given, cache, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    host.use_compilation_cache()
    wanted = tmp_path / "home" / ".cache" / "aqdetr_jax" / "compiled"
    assert cache["jax_compilation_cache_dir"] == str(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_the_users_own_choice_of_a_folder_stays(monkeypatch):
    assert jax.config.values["jax_compilation_cache_dir"]  # of these tests
    monkeypatch.setattr(jax.config, "update", None)
    host.use_compilation_cache()
