"""The door to files: the same on a disk and in an object store, and a store's bad days."""

from __future__ import annotations

import io
import pickle
import posixpath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from object_store import Fault

from aqdetr_jax import io as files
from aqdetr_jax.paths import (
    as_path,
    each,
    exists,
    files_of,
    is_file,
    is_local,
    local_file,
    local_folder,
    snapshot,
)
from aqdetr_jax.stores.paths import ObjectPath
from aqdetr_jax.stores.requests import StoreError
from aqdetr_jax.stores.streams import Upload


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path):
    """An empty folder of either kind."""
    if request.param == "disk":
        return tmp_path
    return request.getfixturevalue("bucket") / "some" / "where"


# --- paths --------------------------------------------------------------------------------------

NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
        lambda text: text not in (".", "..")
    ),
    min_size=1,
    max_size=4,
)


@given(NAMES)
def test_the_algebra_of_paths_is_that_of_addresses(parts):
    text = "gs://bucket/" + "/".join(parts)
    path = as_path(text)
    assert str(path) == text == path.__fspath__()
    assert as_path("gs://bucket").joinpath(*parts) == path == ObjectPath("gs://bucket", *parts)
    assert path.name == parts[-1]
    assert str(path.parent) == posixpath.dirname(text)
    assert str(path.with_name("x")) == posixpath.dirname(text) + "/x"
    assert str(path.relative_to(as_path("gs://bucket"))) == "/".join(parts)
    assert path.is_relative_to(as_path("gs://bucket"))
    assert not path.is_relative_to("/gs/other")
    assert path.absolute() == path
    assert as_path(path) == path
    assert pickle.loads(pickle.dumps(path)) == path
    assert hash(path) == hash(as_path(text))
    assert (path.bucket, path.key) == ("bucket", "/".join(parts))


def test_a_bucket_is_the_top():
    top = as_path("gs://bucket")
    assert top.parent == top
    assert top.key == ""
    assert str(as_path("gs://bucket/a/../b").resolve()) == "gs://bucket/b"


@pytest.mark.parametrize("text", ["http://host/file.jpg", "hdfs://a/b", "file:///etc"])
def test_other_addresses_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"cannot be opened.*gs://, s3://"):
        as_path(text)


def test_an_address_without_a_bucket_is_refused():
    with pytest.raises(ValueError, match="names no bucket"):
        as_path("gs://")


# --- what both can -------------------------------------------------------------------------------


def test_files_and_folders(folder):
    assert not folder.exists() or not list(folder.iterdir())
    files.write_text_atomic(folder / "a.txt", "one\n")
    files.write_json_atomic(folder / "in" / "deep" / "b.json", {"x": 1.5})
    (folder / "in" / "c.txt").write_bytes(b"\xff")
    assert folder.is_dir()
    assert (folder / "a.txt").is_file()
    assert not (folder / "a.txt").is_dir()
    assert (folder / "in" / "deep").is_dir()
    assert not (folder / "in" / "deep").is_file()
    assert not (folder / "no").exists()
    assert not is_file(folder / "no")
    assert exists(folder / "in")
    assert sorted(p.name for p in folder.iterdir()) == ["a.txt", "in"]
    assert sorted(p.name for p in folder.glob("*.txt")) == ["a.txt"]
    assert [p.name for p in folder.glob("*/c.txt")] == ["c.txt"]
    assert [p.name for p in folder.glob("in/deep/*.json")] == ["b.json"]
    found = [p.relative_to(folder).as_posix() for p in files_of(folder)]
    assert sorted(found) == ["a.txt", "in/c.txt", "in/deep/b.json"]
    assert files.read_json(folder / "in" / "deep" / "b.json") == {"x": 1.5}
    assert (folder / "a.txt").read_text() == "one\n"
    assert (folder / "a.txt").stat().st_size == 4
    assert files.folder_bytes(folder) == sum(p.stat().st_size for p in files_of(folder))
    (folder / "a.txt").unlink()
    (folder / "a.txt").unlink(missing_ok=True)
    assert not (folder / "a.txt").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").unlink()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").read_bytes()
    with pytest.raises(FileNotFoundError):
        list((folder / "no").iterdir())
    with pytest.raises(NotADirectoryError):
        list((folder / "in" / "c.txt").iterdir())
    files.remove_folder(folder / "in")
    assert not (folder / "in").exists()


def test_a_file_that_was_not_finished_is_not_there(folder):
    def fill():
        with files.whole_folder(folder / "it", "mark") as partial:
            (partial / "a").write_bytes(b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert not (folder / "it").exists()
    assert not list(files_of(folder))


def test_folders_are_replaced_whole(folder):
    for content in (b"one", b"two"):
        with files.whole_folder(folder / "it", "mark") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / content.decode()).write_bytes(content)
            (partial / "mark").write_bytes(content)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files_of(folder)}
    assert found == {"it/mark": b"two", "it/sub/two": b"two"}
    (folder / "other").mkdir()
    (folder / "other" / "thing").write_bytes(b"1")
    with pytest.raises(FileExistsError, match="not replaced"):
        files.check_folder(folder / "other", "mark")


def test_a_snapshot_answers_as_the_folder_does(folder):
    for name in ("a/b.txt", "a/c/d.txt", "e.txt"):
        files.write_text_atomic(folder / name, name)

    def seen():
        paths = [folder, *(folder / n for n in ("a", "a/c", "a/b.txt", "no", "e.txt", "e"))]
        return (
            [(p.exists(), p.is_dir(), p.is_file()) for p in paths],
            sorted(map(str, files_of(folder))),
            sorted(map(str, (folder / "a").iterdir())),
            sorted(map(str, folder.glob("*/*.txt"))),
            (folder / "e.txt").stat().st_size,
            list(each(lambda path: path.read_text(), [folder / "e.txt", folder / "a/b.txt"])),
            list(each(is_file, [folder / "a/c/d.txt", folder / "x"])),
        )

    before = seen()
    with snapshot(folder):
        assert seen() == before


def test_what_needs_a_disk_gets_one(folder):
    files.write_text_atomic(folder / "in.txt", "text")
    with local_file(folder / "in.txt") as here:
        assert is_local(here)
        assert here.name == "in.txt"
        assert here.read_text() == "text"
    with local_folder(folder / "out") as here:
        (here / "sub").mkdir(parents=True)
        (here / "sub" / "x").write_bytes(b"1")
    assert (folder / "out" / "sub" / "x").read_bytes() == b"1"


# --- a store alone -------------------------------------------------------------------------------


def test_a_killed_replacement_is_no_folder_and_may_be_replaced(bucket, store):
    with files.whole_folder(bucket / "it", "mark") as partial:
        (partial / "mark").write_bytes(b"1")
    copies = []

    def killed(method, path):
        if "rewriteTo" in path or "copyTo" in path:
            copies.append(path)
            return Fault(403)
        return None

    def replace():
        with files.whole_folder(bucket / "it", "mark") as partial:
            (partial / "a").write_bytes(b"2")
            (partial / "mark").write_bytes(b"2")

    with pytest.raises(StoreError), store.failing(killed):
        replace()
    assert copies
    assert not (bucket / "it" / "mark").exists()
    with files.whole_folder(bucket / "it", "mark") as partial:
        (partial / "mark").write_bytes(b"3")
    assert [p.name for p in files_of(bucket / "it")] == ["mark"]


def test_file_objects(bucket, monkeypatch):
    monkeypatch.setattr("aqdetr_jax.stores.paths.CHUNK", 10)
    data = bytes(range(256))
    with (bucket / "x").open("wb") as file:
        file.write(data)
        assert not (bucket / "x").exists()
    with (bucket / "x").open("rb") as file:  # in ranges
        assert file.read(300) == data
        assert file.seek(-5, io.SEEK_END) == 251
        assert file.read() == data[-5:]
        assert file.seek(3) == 3
        assert file.read(4) == data[3:7]

    def fail(mode, half):
        with (bucket / "y").open(mode) as file:
            file.write(half)
            raise RuntimeError

    for mode, half in (("wb", b"half"), ("w", "half")):
        with pytest.raises(RuntimeError):
            fail(mode, half)
    forgotten = Upload(bucket / "y")
    forgotten.write(b"half")
    del forgotten
    assert not (bucket / "y").exists()
    with (bucket / "t").open("w") as text:
        text.write("ä\n")
    with (bucket / "t").open() as text:
        assert text.read() == "ä\n"
    with pytest.raises(io.UnsupportedOperation):
        (bucket / "t").open("a")


def test_only_one_of_two_makes_an_object(bucket):
    assert (bucket / "lock").create(b"mine")
    assert not (bucket / "lock").create(b"yours")
    assert (bucket / "lock").create(b"mine")  # the answer to the first try was lost
    assert (bucket / "lock").read_bytes() == b"mine"


def first(count, fault):
    """The fault for the first requests only."""
    seen = []

    def choose(method, path):
        seen.append(path)
        return fault if len(seen) <= count else None

    return choose


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault(429), Fault(cut=2), Fault(500)], ids=["503", "429", "cut", "500"]
)
def test_what_passes_is_tried_again(bucket, store, impatient, fault):
    (bucket / "x").write_bytes(b"content")
    for use in (
        lambda: (bucket / "x").read_bytes(),
        lambda: (bucket / "x").write_bytes(b"content"),
        lambda: (bucket / "x").is_file(),
        lambda: [p.name for p in bucket.iterdir()],
    ):
        expected = use()
        with store.failing(first(2, fault)):
            assert use() == expected


def test_a_dead_connection_is_given_up_and_tried_again(bucket, store, impatient, monkeypatch):
    (bucket / "x").write_bytes(b"content")
    monkeypatch.setattr(impatient, "_STALL", 0.2)
    impatient._filesystem.cache_clear()
    try:
        with store.failing(first(1, Fault(sleep=2.0))):
            assert (bucket / "x").read_bytes() == b"content"
    finally:
        impatient._filesystem.cache_clear()


def test_what_stays_is_named(bucket, store, impatient, caplog):
    (bucket / "x").write_bytes(b"content")
    with store.failing(lambda method, path: Fault(503)):
        with pytest.raises(StoreError, match=rf"cannot read {bucket}/x: .* no answer .*injected"):
            (bucket / "x").read_bytes()
        # No answer is not "there is none".
        for ask in (
            lambda: (bucket / "x").exists(),
            lambda: (bucket / "x").is_dir(),
            lambda: list(bucket.glob("*")),
            lambda: list(files_of(bucket)),
            lambda: files.check_folder(bucket / "x", "mark"),
        ):
            with pytest.raises(StoreError, match="no answer"):
                ask()
    assert "is tried again" in caplog.text
    assert pickle.loads(pickle.dumps(StoreError(5, "text"))).errno == 5  # from a worker process


def test_refusals_say_what_to_do(bucket, store, impatient):
    missing = as_path("gs://no-such-bucket-here/x")
    with pytest.raises(StoreError, match="no bucket gs://no-such-bucket-here"):
        missing.write_bytes(b"1")
    with pytest.raises(FileNotFoundError):
        missing.read_bytes()
    body = b'{"error": {"code": 403, "message": "account may not storage.objects.create"}}'
    with (
        store.failing(lambda method, path: Fault(403, body=body)),
        pytest.raises(StoreError, match=rf"cannot write {bucket}/x: these credentials may not"),
    ):
        (bucket / "x").write_bytes(b"1")
    body = b'{"error": {"code": 401, "message": "Anonymous caller does not have access"}}'
    with (
        store.failing(lambda method, path: Fault(401, body=body)),
        pytest.raises(StoreError, match=r"no valid credentials.*gcloud auth application-default"),
    ):
        (bucket / "x").read_bytes()


def test_a_missing_package_is_named(bucket):
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(StoreError, match=r"needs the package s3fs.*pip install s3fs"):
            as_path("s3://bucket/x").read_bytes()
