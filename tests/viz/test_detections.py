import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aqdetr_jax.viz import attention, detections, palette

NAMES = ["circle", "square"]


def _grey(height=128, width=128):
    return np.full((height, width, 3), 128, np.uint8)


def _pixels(image):
    return np.asarray(image, np.int32)


def test_small_images_grow_and_large_ones_shrink():
    assert detections.draw_boxes(_grey(), [], []).size == (384, 384)
    assert detections.draw_boxes(_grey(64, 128), [], []).size == (384, 192)
    assert max(detections.draw_boxes(_grey(900, 1600), [], []).size) == detections.MAX_PANEL


def test_box_is_drawn_where_it_is_in_its_colour():
    drawn = _pixels(detections.draw_boxes(_grey(), [[32, 64, 96, 120]], [1], None, NAMES))
    color = palette.class_color(1)
    # Scale 3: the left edge is at x = 96, the lower edge at y = 360.
    np.testing.assert_array_equal(drawn[300, 96], color)
    np.testing.assert_array_equal(drawn[360, 200], color)
    np.testing.assert_array_equal(drawn[300, 200], (128, 128, 128))
    np.testing.assert_array_equal(drawn[20, 20], (128, 128, 128))


def test_low_scores_and_broken_boxes_are_left_out():
    plain = detections.draw_boxes(_grey(), [], [])
    low = detections.draw_boxes(_grey(), [[10, 10, 50, 50]], [0], [0.29], NAMES)
    broken = detections.draw_boxes(_grey(), [[np.nan, 10, 50, 50]], [0], [0.9], NAMES)
    assert low.tobytes() == broken.tobytes() == plain.tobytes()
    shown = detections.draw_boxes(_grey(), [[10, 10, 50, 50]], [0], [0.3], NAMES)
    assert shown.tobytes() != plain.tobytes()


@settings(max_examples=15)
@given(
    boxes=st.lists(
        st.tuples(*[st.floats(-300, 300, allow_nan=False, width=32)] * 4), min_size=0, max_size=25
    ),
    labels=st.integers(-1, 90),
)
def test_any_box_can_be_drawn(boxes, labels):
    array = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.linspace(0, 1, len(array))
    picture = detections.draw_boxes(
        _grey(40, 60), array, np.full(len(array), labels), scores, NAMES, min_score=0.0
    )
    assert picture.size == (384, 256)


def test_grid_has_a_column_per_panel_and_a_legend():
    panels = [
        ("ground truth", [[10, 10, 50, 50]], [0], None),
        ("student", np.zeros((0, 4)), [], []),
    ]
    one = detections.side_by_side(_grey(), panels, NAMES)
    assert one.width == 2 * 384 + 3 * 12
    two = detections.detection_grid([(_grey(), panels), (_grey(64, 128), panels)], NAMES)
    assert two.width == one.width
    assert two.height == one.height + 192 + 12
    with pytest.raises(ValueError, match="same panels"):
        detections.detection_grid([(_grey(), panels), (_grey(), panels[:1])], NAMES)
    with pytest.raises(ValueError, match="at least one"):
        detections.side_by_side(_grey(), [], NAMES)


def test_arrays_must_fit_together():
    with pytest.raises(ValueError, match="2 boxes, 1 labels and no scores"):
        detections.draw_boxes(_grey(), np.zeros((2, 4)), [0])
    with pytest.raises(ValueError, match="3 scores"):
        detections.draw_boxes(_grey(), np.zeros((2, 4)), [0, 1], [0.1, 0.2, 0.3])


def test_images_of_every_kind():
    expected = _pixels(Image.fromarray(_grey(4, 6)))
    for image in (
        _grey(4, 6)[:, :, 0],
        _grey(4, 6)[:, :, :1],
        _grey(4, 6).astype(np.float32) / 255,
        Image.new("L", (6, 4), 128),
        Image.new("RGBA", (6, 4), (128, 128, 128, 255)),
    ):
        np.testing.assert_array_equal(_pixels(detections.to_image(image)), expected)
    with pytest.raises(ValueError, match="int64"):
        detections.to_image(np.zeros((4, 4, 3), np.int64))


def _softmax_map(rng, heads, cells):
    logits = rng.normal(0, 2, (heads, cells, cells))
    e = np.exp(logits)
    return e / e.sum(-1, keepdims=True)


def test_attention_grid_shape_and_difference():
    rng = np.random.default_rng(0)
    teacher, student = _softmax_map(rng, 4, 48), _softmax_map(rng, 4, 48)
    queries = [(1, 1), (4, 6)]
    grid = attention.attention_grid(
        _grey(96, 128), teacher, student, grid_size=(6, 8), queries=queries
    )
    assert grid.width == 4 * 320 + 5 * 12
    # The same map twice: the last column has no colour besides the marker's.
    same = attention.attention_grid(
        _grey(96, 128), teacher, teacher, grid_size=(6, 8), queries=queries[:1]
    )
    last = _pixels(same)[60:280, 1010:1320]
    colored = (last.max(-1) - last.min(-1) > 2).mean()
    assert colored < 0.01


def test_attention_peak_is_drawn_at_its_cell():
    # Everything looks at cell (1, 6) of a 4 x 8 grid, whose lower half is padding.
    maps = np.zeros((32, 32))
    maps[:, 1 * 8 + 6] = 1.0
    grid = _pixels(
        attention.attention_grid(
            _grey(64, 256), maps, maps, grid_size=(4, 8), queries=[(0, 0)], real=(0.5, 1.0)
        )
    )
    panel = grid[50 : 50 + 80, 344 : 344 + 320]
    brightest = np.unravel_index(panel[..., 0].argmax(), panel.shape[:2])
    # The cell's centre: y = 1.5 / 2 of 80, x = 6.5 / 8 of 320.
    assert abs(brightest[0] - 60) <= 20
    assert abs(brightest[1] - 260) <= 20


def test_focused_queries_prefer_low_entropy():
    cells = 64
    maps = np.full((cells, cells), 1 / cells)
    maps[3 * 8 + 5] = np.eye(cells)[0]
    assert attention.focused_queries(maps, (8, 8), (8, 8))[0] == (3, 5)
    assert len(attention.focused_queries(maps, (8, 8), (8, 8))) == 3
    assert attention.focused_queries(np.ones((1, 1)), (1, 1), (1, 1)) == [(0, 0)]


def test_kl_of_the_caption_against_scipy():
    from scipy.special import rel_entr

    rng = np.random.default_rng(1)
    teacher, student = _softmax_map(rng, 3, 10)[:, 0], _softmax_map(rng, 3, 10)[:, 0]
    expected = rel_entr(teacher, student).sum(-1).mean()
    assert attention._kl(teacher, student) == pytest.approx(expected, rel=1e-9)
    # What a deformable attention takes from outside the grid is a cell of its own: never negative.
    teacher, student = 0.5 * teacher, 0.9 * student
    expected = rel_entr(teacher, student).sum(-1).mean() + rel_entr(0.5, 0.1)
    assert attention._kl(teacher, student) == pytest.approx(expected, rel=1e-9)
    assert attention._kl(student, student) == 0


def test_kl_of_the_caption_counts_what_lies_outside_as_the_loss_does():
    from aqdetr_jax.losses.distillation import map_kl

    rng = np.random.default_rng(2)
    teacher, student = (
        _softmax_map(rng, 3, 10)[:, 0] * rng.uniform(0.3, 0.9, (3, 1)) for _ in range(2)
    )
    wanted = map_kl(teacher[None, :, None], student[None, :, None])
    assert attention._kl(teacher, student) == pytest.approx(float(wanted), rel=1e-4)


def test_rows_of_chosen_positions_are_the_same_picture():
    rng = np.random.default_rng(3)
    teacher, student = _softmax_map(rng, 4, 48), _softmax_map(rng, 4, 48)
    queries = [(1, 1), (4, 6)]
    whole = attention.attention_grid(
        _grey(96, 128), teacher, student, grid_size=(6, 8), queries=queries
    )
    rows = [m[:, [9, 38]] for m in (teacher, student)]
    few = attention.attention_rows(_grey(96, 128), *rows, queries, grid_size=(6, 8))
    np.testing.assert_array_equal(_pixels(few), _pixels(whole))
    with pytest.raises(ValueError, match=r"student: attention rows of 2 positions"):
        attention.attention_rows(_grey(), rows[0], rows[1][:, :1], queries, grid_size=(6, 8))
    rows[0][0, 1, 5] = np.inf
    with pytest.raises(ValueError, match="teacher: the attention rows hold NaN or infinity"):
        attention.attention_rows(_grey(), *rows, queries, grid_size=(6, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid_size": (3, 3)}, r"over \(3, 3\) cells"),
        ({"queries": [(0, 4)]}, "queries"),
        ({"real": (0.0, 1.0)}, "real"),
        ({"student_map": np.full((16, 16), np.nan)}, "student.*NaN"),
    ],
)
def test_attention_grid_refuses_what_does_not_fit(change, message):
    maps = np.full((16, 16), 1 / 16)
    arguments = {"teacher_map": maps, "student_map": maps, "grid_size": (4, 4), **change}
    with pytest.raises(ValueError, match=message):
        attention.attention_grid(_grey(), **arguments)
