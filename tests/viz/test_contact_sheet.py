"""Contact sheets: which images, and that boxes, blanks and names are on them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.data.dataset import ImageReadError
from aqdetr_jax.data.inspect import inspect_dataset
from aqdetr_jax.data.shapes.dataset import ShapesDataset
from aqdetr_jax.viz import palette
from aqdetr_jax.viz.contact_sheet import choose_images, contact_sheet, write_contact_sheets


@given(st.data(), st.integers(0, 60), st.integers(1, 24), st.integers(0, 5))
def test_problems_come_first_and_the_rest_is_a_function_of_the_seed(data, total, count, seed):
    problems = data.draw(st.lists(st.integers(0, total - 1), max_size=30)) if total else []
    chosen = choose_images(problems, total, count, seed)
    assert len(chosen) == len(set(chosen)) == min(count, total)
    assert set(chosen) <= set(range(total))
    first = list(dict.fromkeys(problems))[:count]
    assert chosen[: len(first)] == first
    assert chosen[len(first) :] == sorted(chosen[len(first) :])
    assert chosen == choose_images(problems, total, count, seed)


def test_seeds_choose_other_images():
    assert len({tuple(choose_images([], 1000, 24, seed)) for seed in range(5)}) == 5


def pixels(picture, colour):
    return int((np.asarray(picture) == colour).all(-1).sum())


class Broken(ShapesDataset):
    """The last image cannot be read."""

    def __getitem__(self, index):
        if index == len(self) - 1:
            raise ImageReadError("cut off")
        return super().__getitem__(index)


def test_a_sheet_shows_boxes_and_blanks():
    whole, broken = (kind("train", num_images=3) for kind in (ShapesDataset, Broken))
    sheet, with_blank = contact_sheet(whole), contact_sheet(broken)
    (label, *_), *_ = (whole[i].labels for i in range(2) if len(whole[i].labels))
    assert pixels(sheet, palette.class_color(int(label))) > 200
    assert pixels(sheet, (225, 228, 233)) < pixels(with_blank, (225, 228, 233)) - 300 * 300
    assert pixels(sheet, (190, 40, 40)) < pixels(with_blank, (190, 40, 40))  # The reason below.
    # Nothing changes what is shown of one image but its boxes.
    assert contact_sheet(whole, count=1).width < sheet.width


def test_a_set_without_images_has_an_empty_sheet():
    dataset = ShapesDataset("train", num_images=1)
    dataset._num_images = 0
    assert contact_sheet(dataset).width >= 300


def test_a_file_or_a_folder(tmp_path):
    sets = [ShapesDataset(split, num_images=2) for split in ("train", "validation")]
    both = [(d, inspect_dataset(d, num_queries=0)) for d in sets]
    (file,) = write_contact_sheets(tmp_path / "new" / "all.png", both)
    first, second = write_contact_sheets(tmp_path / "sheets", both)
    assert (first.name, second.name) == ("1_shapes_train.png", "2_shapes_validation.png")
    with Image.open(file) as a, Image.open(first) as b, Image.open(second) as c:
        assert a.height == b.height + c.height
        assert a.width == max(b.width, c.width)
