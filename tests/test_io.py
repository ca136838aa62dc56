from contextlib import nullcontext

import jax.numpy as jnp
import numpy as np
import pytest

from aqdetr_jax.io import read_json, whole_folder, write_json_atomic


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    path = write_json_atomic(tmp_path / "r.json", {"a": np.float32(0.5), "b": jnp.arange(3)})
    assert read_json(path) == {"a": 0.5, "b": [0, 1, 2]}
    with pytest.raises(ValueError, match=r"r\.json: \$\.a\[1\]\.b is nan"):
        write_json_atomic(path, {"a": [1, {"b": np.float32("nan")}]})
    with pytest.raises(TypeError, match=r"\$\.f"):
        write_json_atomic(path, {"f": print})
    assert read_json(path) == {"a": 0.5, "b": [0, 1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fill(text):
        with whole_folder(tmp_path / "out", "mark") as folder:
            (folder / "mark").write_text(text)
            assert text != "bad", "bad"

    (tmp_path / ".out.partial").mkdir()  # of a run that was killed
    (tmp_path / ".out.partial" / "leftover").touch()
    for text, stays in (("1", "1"), ("bad", "1"), ("2", "2")):
        with pytest.raises(AssertionError, match="bad") if text == "bad" else nullcontext():
            fill(text)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mark"]
        assert (tmp_path / "out" / "mark").read_text() == stays
    (tmp_path / "out" / "mark").rename(tmp_path / "out" / "other")
    with pytest.raises(FileExistsError, match="holds no mark"):
        fill("3")
    (tmp_path / "out" / "other").unlink()
    fill("4")  # what is empty is nobody's
    assert (tmp_path / "out" / "mark").read_text() == "4"


def test_a_folder_that_fails_leaves_none_around_it(tmp_path):
    for kept, path in ((tmp_path, "a/b/out"), (tmp_path / "c", "c/d/out")):
        kept.mkdir(exist_ok=True)
        with pytest.raises(RuntimeError), whole_folder(tmp_path / path, "mark"):
            raise RuntimeError
        assert not list(kept.iterdir())


def test_json_reading_names_the_fault(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read_json(tmp_path / "none.json")
    for text, message in [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1', "line 1"),
        (b"\xff", "UTF-8"),
        ("[1, 2, 3, 4]", "above the limit"),
    ]:
        path = tmp_path / "bad.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=message):
            read_json(path, max_bytes=11)
