"""Pascal VOC folders: coordinates, difficult objects, faults; and the BCCD set."""

import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.data.config import DataConfig
from aqdetr_jax.data.dataset import DatasetError, ImageReadError
from aqdetr_jax.data.eval_batches import EvalBatches
from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.data.pipeline import PipelineConfig, make_train_pipeline
from aqdetr_jax.data.transforms import AugmentConfig
from aqdetr_jax.data.voc import VocFolder, parse_xml

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def obj(*corners, name="cat", difficult=0):
    return OBJECT.format(*corners, name=name, difficult=difficult)


def write(root, objects, size="<size><width>60</width><height>40</height></size>", head=""):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (60, 40)).save(root / "JPEGImages" / "a.jpg")
    Image.new("RGB", (60, 40)).save(root / "JPEGImages" / "b.png")
    xml = f"<annotation>{size}{''.join(objects)}</annotation>"
    (root / "Annotations" / "a.xml").write_text(head + xml)
    plain = f"<annotation>{size}{obj(1, 1, 9, 9, name='ant')}</annotation>"
    (root / "Annotations" / "b.xml").write_text(plain)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\n\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("b 1\n")
    return root


def test_coordinates_count_from_one_and_include_both_ends(tmp_path):
    folder = VocFolder(write(tmp_path, [obj(1, 1, 60, 40), obj(11, 5, 20, 8, difficult=1)]))
    example = folder[0]
    assert example.boxes.tolist() == [[0, 0, 60, 40], [10, 4, 20, 8]]
    assert example.iscrowd.tolist() == [False, True]
    assert example.file_name == "a.jpg"
    # Names of every split, sorted: train and val agree though train has no ant.
    assert folder.class_names == VocFolder(tmp_path, "val").class_names == ("ant", "cat")
    assert example.labels.tolist() == [1, 1]
    truth = folder.coco_ground_truth()
    assert [a["area"] for a in truth["annotations"]] == [2400, 40]
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 1]
    assert VocFolder(tmp_path, "val")[0].file_name == "b.png"
    assert folder.max_boxes_per_image() == 1


def test_boxes_without_area_are_dropped(tmp_path):
    objects = [obj(5, 5, 5, 9), obj(9, 9, 5, 12), obj("nan", 1, 5, 5), obj(0, 0, 5, 5)]
    folder = VocFolder(write(tmp_path, objects))
    assert folder.drops == {"zero_area": 1, "negative": 1, "non_finite": 1}
    assert folder.drop_examples[0] == "zero_area: a.xml, object 1: box (5, 5, 5, 9)"
    assert folder[0].boxes.tolist() == [[0, 0, 5, 5]]
    assert folder.clipped == 1


@pytest.mark.parametrize(
    "head",
    [
        '<!DOCTYPE a [<!ENTITY x "y">]>',
        '<?xml version="1.0"?>\n<!doctype annotation SYSTEM "http://example.invalid/a.dtd">',
        '<!ENTITY x "y">',
    ],
)
def test_document_types_and_entities_are_refused(tmp_path, head):
    with pytest.raises(DatasetError, match=r"a\.xml: document type and entity"):
        VocFolder(write(tmp_path, [], head=head), class_names=["cat"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "gbk", "utf-8-sig"])
def test_other_encodings_cannot_hide_a_document_type(tmp_path, encoding):
    path = tmp_path / "x.xml"
    hidden = '<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'
    head = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>'
    path.write_bytes((head + hidden).encode(encoding))
    with pytest.raises(DatasetError, match="document type and entity declarations are refused"):
        parse_xml(path)


def test_encodings_that_write_ascii_otherwise_are_refused(tmp_path):
    path = tmp_path / "x.xml"
    hidden = '<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'.encode("utf-7").replace(b"<!", b"+ADwAIQ-")
    path.write_bytes(b'<?xml version="1.0" encoding="utf-7"?>' + hidden)
    with pytest.raises(DatasetError, match=r"x\.xml: declares the encoding 'utf-7', which is not"):
        parse_xml(path)


@pytest.mark.parametrize(
    ("declared", "written", "name"),
    [
        ("UTF-8", "utf-8", "Käfer"),
        ("utf-8", "utf-8-sig", "Käfer"),
        ("UTF-16", "utf-16", "甲虫"),
        ("utf-16", "utf-16-be", "甲虫"),
        ("ISO-8859-1", "latin-1", "Käfer"),
        ("windows-1252", "cp1252", "Käfer…"),
        ("gb2312", "gb2312", "甲虫"),
        ("GBK", "gbk", "甲虫"),
        ("GB18030", "gb18030", "甲虫"),
        ("Shift_JIS", "shift_jis", "カブト"),
        ("EUC-KR", "euc_kr", "벌레"),
        ("Big5", "big5", "甲蟲"),
    ],
)
def test_declared_encodings_are_read(tmp_path, declared, written, name):
    path = tmp_path / "x.xml"
    head = f"<?xml version='1.0' encoding='{declared}'?>\n"
    path.write_bytes((head + obj(1, 1, 5, 5, name=name)).encode(written))
    assert parse_xml(path).findtext("name") == name


def test_text_of_another_encoding_than_declared(tmp_path):
    path = tmp_path / "x.xml"
    for head in ("", "<?xml version='1.0' encoding='utf-8'?>"):
        path.write_bytes((head + "<name>Käfer</name>").encode("latin-1"))
        with pytest.raises(
            DatasetError, match=r"x\.xml: is no utf-8 text, save it as UTF-8 or dec"
        ):
            parse_xml(path)


FILENAME = "<filename>{}</filename>"


def pictures(root, *names):
    """Grey pictures, each of its own shade: the first 10, the second 20, and so on."""
    for number, name in enumerate(names, start=1):
        path = root / "JPEGImages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (10 * number,) * 3).save(path)


@pytest.mark.parametrize(
    ("names", "filename", "shade"),
    [
        (("a.jpg", "a.png"), "a.png", 20),
        (("a.jpg", "a.png"), "a.jpg", 10),
        (("a.jpg", "x.png"), "gone.png", 10),  # Renamed since.
        (("a.jpg", "x.png"), "a", 10),
        (("a.jpg", "x.png"), "../a.jpg", 10),
        (("x.png", "y.png"), "x.png", 10),
        (("a.PNG",), "", 10),
        (("a.bmp",), "", 10),
        (("a.gif",), "./a.gif", 10),  # No suffix that is looked for: the file names it.
    ],
)
def test_which_image_is_meant(tmp_path, names, filename, shade):
    root = write(tmp_path, [FILENAME.format(filename), obj(1, 1, 5, 5)])
    (root / "JPEGImages" / "a.jpg").unlink()
    pictures(root, *names)
    image = VocFolder(root)[0].image
    assert np.abs(image.astype(int) - shade).max() <= 2  # JPEG.


def test_file_names_count_from_the_sub_folder_too(tmp_path):
    root = write(tmp_path, [])
    (root / "ImageSets" / "Main" / "train.txt").write_text("cam1/p\ncam2/p\n")
    pictures(root, "p.png", "cam1/p.png", "cam1/p.jpg", "cam2/p.png")
    for folder, filename in (("cam1", "p.png"), ("cam2", "cam2/p.png")):
        path = root / "Annotations" / folder / "p.xml"
        path.parent.mkdir()
        xml = (root / "Annotations" / "b.xml").read_text().replace("ant", folder)
        path.write_text(xml.replace("<size>", FILENAME.format(filename) + "<size>"))
        (path.parent / "._p.xml").write_bytes(b"\0\5\x16\7")  # macOS leaves such files.
    folder = VocFolder(root)
    assert [folder.file_name(i) for i in range(2)] == ["cam1/p.png", "cam2/p.png"]
    assert folder.class_names == ("ant", "cam1", "cam2")


@pytest.mark.parametrize(
    ("names", "filename", "message"),
    [
        (
            ("a.jpg", "a.png"),
            "",
            r"a\.xml: 'a\.jpg' and 'a\.png' have its name, and its <filename>",
        ),
        (("a.jpg", "a.JPG"), "gone.png", r"'a\.JPG' and 'a\.jpg' have its name"),
        (
            ("a.jpg", "x.png"),
            "x.png",
            r"its <filename> is 'x\.png', but 'a\.jpg' is named as it is",
        ),
    ],
)
def test_two_images_may_be_meant(tmp_path, names, filename, message):
    root = write(tmp_path, [FILENAME.format(filename), obj(1, 1, 5, 5)])
    pictures(root, *names)
    with pytest.raises(DatasetError, match=message):
        VocFolder(root)


def test_one_image_for_two_annotation_files(tmp_path):
    root = write(tmp_path, [FILENAME.format("b.png"), obj(1, 1, 5, 5)])
    (root / "JPEGImages" / "a.jpg").unlink()
    (root / "ImageSets" / "Main" / "train.txt").write_text("b\na\n")
    with pytest.raises(
        DatasetError, match=r"a\.xml: its image is 'b\.png', which is also .* b\.xml"
    ):
        VocFolder(root)


def test_links_are_followed_on_request(tmp_path):
    root = write(tmp_path / "voc", [obj(1, 1, 5, 5)])
    (root / "JPEGImages" / "a.jpg").rename(tmp_path / "elsewhere.jpg")
    (root / "JPEGImages" / "a.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(ImageReadError, match=r"a\.jpg.*--config\.data\.follow_links=true"):
        VocFolder(root)[0]
    assert VocFolder(root, follow_links=True)[0].image.shape == (40, 60, 3)
    data = DataConfig(kind="voc", root=str(root), follow_links=True)
    assert open_dataset(data, train=True)[0].image.shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("objects", "kwargs", "message"),
    [
        ([obj(1, 1, 5, 5, name="dog")], {"class_names": ["cat"]}, "object 1 is a 'dog'"),
        ([obj("x", 1, 5, 5)], {}, r"<xmin> is no number: 'x'"),
        (["<object><name>cat</name></object>"], {}, "object 1 has no <bndbox>"),
        (["<object></object>"], {}, "<object> has no <name>"),
        (["<object>"], {}, r"a\.xml: malformed XML"),
        ([obj(1, 1, 5, 5, name="a\x85b")], {}, r"a\.xml: <object>: .* has a line break"),
        ([], {"class_names": ["cat", "cat"]}, "has a name twice"),
    ],
)
def test_errors_name_the_file(tmp_path, objects, kwargs, message):
    with pytest.raises(DatasetError, match=message):
        VocFolder(write(tmp_path, objects), **kwargs)


def test_sizes_and_lists(tmp_path):
    root = write(tmp_path, [obj(1, 1, 5, 5)], size="")
    with pytest.raises(DatasetError, match=r"a\.xml: no <size>"):
        VocFolder(root)
    write(tmp_path, [], size="<size><width>0</width><height>40</height></size>")
    with pytest.raises(DatasetError, match="must be 1 to 2147483647 pixels each way, got 0x40"):
        VocFolder(root)
    long = "9" * 400
    write(tmp_path, [], size=f"<size><width>{long}</width><height>40</height></size>")
    with pytest.raises(DatasetError, match=r"must be 1 to .* each way, got infx40"):
        VocFolder(root)
    write(tmp_path, [obj(1, 1, long, 5), obj(1, 1, 5, 5)])
    assert VocFolder(root).drops == {"non_finite": 1}
    (root / "Annotations" / "a.xml").write_text("<annotation/>")
    (root / "Annotations" / "b.xml").write_text("<annotation/>")
    with pytest.raises(DatasetError, match="no annotated object in any file, so that there are no"):
        VocFolder(root)
    write(tmp_path, [])
    with pytest.raises(
        FileNotFoundError, match=r"dev\.txt does not exist \(there are: train, val; config"
    ):
        VocFolder(root, "dev")
    with pytest.raises(DatasetError, match="outside"):
        VocFolder(root, "../train")
    lists = root / "ImageSets" / "Main" / "train.txt"
    lists.write_text("a\na\n")
    with pytest.raises(DatasetError, match="'a' is listed twice"):
        VocFolder(root)
    lists.write_text("../../etc/passwd\n")
    with pytest.raises(DatasetError, match="outside the image folder"):
        VocFolder(root)
    lists.write_text("c\n")
    with pytest.raises(FileNotFoundError, match=r"train\.txt: line 1, 'c', names no file"):
        VocFolder(root)
    (root / "Annotations" / "c.xml").write_text("<annotation/>")
    with pytest.raises(FileNotFoundError, match=r"no image .*c with one of \.jpg"):
        VocFolder(root)
    with pytest.raises(FileNotFoundError, match="JPEGImages does not exist"):
        VocFolder(tmp_path / "nowhere")


def test_bccd_counts(bccd_root):
    """Numbers from the set's own description; its two zero-area boxes are dropped and named."""
    expected = {
        "train": (205, 2805 - 1, "BloodImage_00343.xml"),
        "val": (87, 1138 - 1, "BloodImage_00338.xml"),
        "test": (72, 945, None),
    }
    for split, (images, boxes, offender) in expected.items():
        folder = VocFolder(bccd_root, split)
        assert folder.class_names == ("Platelets", "RBC", "WBC")
        assert len(folder) == images
        assert len(folder.coco_ground_truth()["annotations"]) == boxes
        assert folder.drops == ({"zero_area": 1} if offender else {})
        assert offender is None or offender in folder.drop_examples[0]
    assert VocFolder(bccd_root, "val").max_boxes_per_image() == 30


def test_bccd_goes_through_the_pipeline(bccd_root):
    folder = VocFolder(bccd_root, "train")
    config = PipelineConfig(
        4,
        ((240, 320),),
        max_boxes=30,
        augment=AugmentConfig(scales=(200, 240), crop_probability=0.5, crop_size=(240, 480)),
    )
    iterator = make_train_pipeline(folder, config)
    for _ in range(2):
        batch = next(iterator)
        sides = batch["boxes"][batch["valid"]][:, 2:]
        assert len(sides)
        assert (sides > 0).all()
        assert np.isfinite(batch["boxes"]).all()
    iterator.close()
    first = next(iter(EvalBatches(folder, config)))
    assert first["size"].tolist() == [[240, 320]] * 4
    assert first["original_size"].tolist() == [[480, 640]] * 4
