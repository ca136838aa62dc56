"""Pascal VOC folders: coordinates, difficult objects, faults; and the BCCD set."""

import numpy as np
import pytest
from PIL import Image

from aqdetr_jax.data.dataset import DatasetError
from aqdetr_jax.data.pipeline import PipelineConfig, make_eval_pipeline, make_train_pipeline
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


def test_other_encodings_cannot_hide_a_document_type(tmp_path):
    path = tmp_path / "x.xml"
    path.write_bytes('<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'.encode("utf-16"))
    with pytest.raises(DatasetError, match="not UTF-8"):
        parse_xml(path)
    hidden = '<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>'.encode("utf-7").replace(b"<!", b"+ADwAIQ-")
    path.write_bytes(b'<?xml version="1.0" encoding="utf-7"?>' + hidden)
    with pytest.raises(DatasetError, match="malformed XML"):
        parse_xml(path)


@pytest.mark.parametrize(
    ("objects", "kwargs", "message"),
    [
        ([obj(1, 1, 5, 5, name="dog")], {"class_names": ["cat"]}, "object 1 is a 'dog'"),
        ([obj("x", 1, 5, 5)], {}, r"<xmin> is no number: 'x'"),
        (["<object><name>cat</name></object>"], {}, "object 1 has no <bndbox>"),
        (["<object></object>"], {}, "<object> has no <name>"),
        (["<object>"], {}, r"a\.xml: malformed XML"),
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
    with pytest.raises(DatasetError, match="must be positive, got 0x40"):
        VocFolder(root)
    write(tmp_path, [])
    with pytest.raises(FileNotFoundError, match=r"dev\.txt does not exist \(there are: train, val"):
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
    first = next(iter(make_eval_pipeline(folder, config)))
    assert first["size"].tolist() == [[240, 320]] * 4
    assert first["original_size"].tolist() == [[480, 640]] * 4
