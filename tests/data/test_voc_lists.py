"""Split lists of Pascal VOC: which files a line names, whatever else stands in the list."""

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.voc import VocFolder

XML = (
    "<annotation>{}<size><width>8</width><height>6</height></size><object><name>cat</name><bndbox>"
    "<xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object></annotation>"
)


def make(root, names):
    """A VOC folder with an image and an annotation file of each name."""
    for name in names:
        for part, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            path = root / part / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if suffix == ".jpg":
                Image.new("RGB", (8, 6)).save(path)
            else:
                path.write_text(XML.format(""))
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    return root


def reads(root, data):
    """As ``read``; None where there is one error that names the list."""
    try:
        return read(root, data)
    except (DatasetError, FileNotFoundError) as error:
        return None if "train.txt" in str(error) else str(error)


def read(root, data):
    """File names of the images that a list of these bytes (or text) names."""
    data = data if isinstance(data, bytes) else data.encode()
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(data)
    folder = VocFolder(root)
    return [folder.file_name(i) for i in range(len(folder))]


NAMES = ("p0", "p1", "p0 (2)", "p1 copy", "cam1/p0", "cam 2/p 3", "ä…", "p\x0bq")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("voc") / "VOC2007", NAMES)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("p0 (2)\np1 copy\n", ["p0 (2).jpg", "p1 copy.jpg"]),
        ("p0\r\np1\r\n", ["p0.jpg", "p1.jpg"]),
        ("p0\rp1", ["p0.jpg", "p1.jpg"]),
        ("\n  p0 \n\t\np1\t\n", ["p0.jpg", "p1.jpg"]),
        ("p0  1\np1 -1\np0 (2)  0\n", ["p0.jpg", "p1.jpg", "p0 (2).jpg"]),
        ("cam1/p0\ncam 2/p 3\n", ["cam1/p0.jpg", "cam 2/p 3.jpg"]),
        ("p0.jpg\ncam1/p0.jpg\n", ["p0.jpg", "cam1/p0.jpg"]),
        (
            "VOC2007/JPEGImages/cam 2/p 3.jpg VOC2007/Annotations/cam 2/p 3.xml\n"
            "VOC2007/JPEGImages/p1.jpg VOC2007/Annotations/p1.xml\n",
            ["cam 2/p 3.jpg", "p1.jpg"],
        ),
        ("JPEGImages/p0.jpg\tAnnotations/p0.xml", ["p0.jpg"]),
        ("p0.jpg p1.xml", ["p0.jpg"]),  # The list itself decides.
        ("\ufeffp0\np1", ["p0.jpg", "p1.jpg"]),
        ("p0\np1 copy\n".encode("utf-16"), ["p0.jpg", "p1 copy.jpg"]),
        ("\ufeffp0\n".encode("utf-16-be"), ["p0.jpg"]),
        ("p0\n".encode("utf-32"), ["p0.jpg"]),
        ("ä…\np\x0bq", ["ä….jpg", "p\x0bq.jpg"]),  # Not the end of a line: a character of a name.
        ("./p1\ncam1//p0", ["p1.jpg", "cam1/p0.jpg"]),
    ],
)
def test_lists_that_people_have(root, data, expected):
    assert read(root, data) == expected


def test_latin_1_is_read_where_its_names_exist(tmp_path):
    make(tmp_path, ["müller", "p0"])
    assert read(tmp_path, "p0\nmüller\n".encode("latin-1")) == ["p0.jpg", "müller.jpg"]
    with pytest.raises(FileNotFoundError, match=r"train\.txt: line 2, .*Latin-1: save it as UTF-8"):
        read(tmp_path, "p0\n张三\n".encode("gbk"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("p0\np9\n", r"line 2, 'p9', names no file"),
        ("p0\np1 1\n", r"line 2, 'p1 1', names no file"),  # A column in every line, or in none.
        ("p0 1\np9 1\np1 -1", r"line 2, 'p9 1', names no file"),
        ("VOC2012/JPEGImages/p0.jpg VOC2012/Annotations/p0.xml", "line 1, .* names no file"),
        ("p0\np1\n./p0", "'p0' is listed twice, in lines 1 and 3"),
        ("../p0", "line 1: file name '../p0' points outside"),
        ("/p0", "outside"),
        ("p0\0", "NUL characters"),
        ("p0\n".encode("utf-16-le"), "NUL characters"),
        (b"\xff\xfep", "begins as utf-16 text but is none"),
        ("p0/", "names no file"),
    ],
)
def test_one_error_names_list_and_line(root, data, message):
    with pytest.raises((DatasetError, FileNotFoundError), match=message) as caught:
        read(root, data)
    assert "train.txt" in str(caught.value)


def test_two_readings_are_an_error(tmp_path):
    make(tmp_path, ["p0", "p0 1", "p1"])
    with pytest.raises(DatasetError, match=r"line 1, 'p0 1', names p0\.xml or p0 1\.xml"):
        read(tmp_path, "p0 1\n")
    # Other lines tell: these are all names, and those all have a column.
    assert read(tmp_path, "p0 1\np1\n") == ["p0 1.jpg", "p1.jpg"]
    assert read(tmp_path, "p0 1\np1 -1\n") == ["p0.jpg", "p1.jpg"]


LINES = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NAMES).map(lambda name: f" {name} -1"),
    st.sampled_from(NAMES).map(lambda name: f"{name}.jpg"),
    st.sampled_from(
        ["", " ", "..", "../p0", "/etc/passwd", "p0.xml", "x" * 5000, "p0/", "\ufeffp1"]
    ),
    st.text(max_size=20),
)
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "utf-32"])


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(["p0\x85p1"], "\n", "latin-1")
@given(st.lists(LINES, max_size=4), ENDS, ENCODINGS)
def test_any_text_gives_the_named_files_or_one_error(root, lines, end, encoding):
    data = end.join(lines).encode(encoding, errors="replace")
    found = reads(root, data)
    if found is None:
        return
    assert isinstance(found, list), found
    text = data.decode(encoding).removeprefix("\ufeff")
    listed = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    assert len(found) == len(listed) == len(set(found))
    for name, line in zip(found, listed, strict=True):
        stem = name.removesuffix(".jpg")
        assert stem in NAMES
        # The name itself, alone or with what a list may have beside it; as paths, not as text.
        assert re.sub(r"/(\./|/)*|^\./", "/", line).lstrip("/") in (stem, name) or re.fullmatch(
            rf"{re.escape(stem)}\s+(-1|0|\+?1)", line
        )


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=60))
def test_any_bytes_give_one_error_or_nothing(root, data):
    found = reads(root, data)
    assert found is None or {name.removesuffix(".jpg") for name in found} <= set(NAMES)
