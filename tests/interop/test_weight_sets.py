"""Which weights of a file are read, and what wrappers put into their names."""

from __future__ import annotations

import numpy as np
import pytest
from foreign import fixture
from hypothesis import given
from hypothesis import strategies as st

from aqdetr_jax.interop import recognise
from aqdetr_jax.interop.source import Malformed
from aqdetr_jax.interop.weight_sets import choose, unwrap

ONE, TWO = np.ones((2, 3), np.float32), np.full((2, 3), 2, np.float32)
STATES = {name: fixture(name)["state"] for name in ("detr_basic", "deformable_refine")}


def named(array: np.ndarray = ONE, *, prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": array for name in ("head.weight", "head.bias", "stem")}


# --- sets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_weights_at_the_top_or_under_a_usual_key(key):
    state = named()
    assert choose(state) == (state, [])
    assert choose({"epoch": 3, key: state, "lr": {"base": [0.1]}}) == (state, [])


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"ema": named(TWO)}, "ema"),
        ({"model_ema": named(TWO)}, "model_ema"),
        ({"ema_state_dict": named(TWO, prefix="module.")}, "ema_state_dict"),
        ({"ema": {"module": named(TWO), "updates": 7}}, "ema.module"),
        ({"callbacks": {"EMA": {"shadow": named(TWO, prefix="module.model.")}}}, None),
        ({"ema": {"n_averaged": np.array(3), **named(TWO, prefix="module.")}}, "ema"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_moving_average_beside_the_model(other, key, prefix):
    content = {"model": named(prefix=prefix), **other, "optimizer": {"state": {0: {"exp": TWO}}}}
    state, notes = choose(content)
    assert state is content["model"]
    key = key or "callbacks.EMA.shadow"
    (note,) = notes
    assert f"the file also holds some under {key!r}: --weights={key} takes those" in note
    for name in {key, key.split(".")[0]}:
        taken, notes = choose(content, name)
        assert any(array is TWO for array in taken.values())
        assert notes == [f"weights taken, as --weights says: those under {key!r}"]


def test_other_dicts_of_arrays_are_no_second_model():
    content = {"model": named(), "criterion": {"empty_weight": ONE}, "stats": {"mean": ONE}}
    assert choose(content) == (content["model"], [])


def test_unknown_weights_are_refused_with_those_that_are_there():
    content = {"model": named(), "ema": {"a": named(), "b": named()}}
    with pytest.raises(Malformed, match=r"in the file; there are: model, ema\.a, ema\.b$"):
        choose(content, "model_ema")
    with pytest.raises(Malformed, match=r"several sets; there are: ema\.a, ema\.b$"):
        choose(content, "ema")
    with pytest.raises(Malformed, match=r"there are: \(top level\)$"):
        choose(named(), "ema")
    with pytest.raises(Malformed, match="is no set"):
        choose(content, "x" * 500)


def test_a_file_without_weights_where_they_usually_are():
    with pytest.raises(Malformed, match=r"but under: ema\.module: give one.*--weights=ema.module$"):
        choose({"ema": {"module": named()}})
    with pytest.raises(Malformed, match=r"its keys are: 'ema', 'epoch', 'model'$"):
        choose({"ema": {"module": {}}, "epoch": 1, "model": []})
    with pytest.raises(Malformed, match="holds a list, not a dict"):
        choose([])
    with pytest.raises(Malformed, match="no dict of parameters"):
        choose({})
    with pytest.raises(Malformed, match=r"'k019', \.\.\.$"):
        choose({f"k{k:03}": None for k in range(200)})


def test_two_models_in_one_dict_are_told_apart_by_their_first_word():
    content = {"state_dict": named(ONE, prefix="model.") | named(TWO, prefix="ema.")}
    state, notes = choose(content, "ema")
    assert state == named(TWO, prefix="ema.")
    assert notes == ["weights taken, as --weights says: those whose names begin with 'ema'"]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STATES)
def test_names_that_are_known_stay(name):
    unwrapped = unwrap(STATES[name], recognise.is_known)
    assert unwrapped.state is STATES[name]
    assert (unwrapped.outside, unwrapped.notes) == ([], [])


PARTS = st.lists(
    st.sampled_from(["module", "model", "_orig_mod", "net", "_fsdp_wrapped_module", "detector-2"])
    | st.from_regex(r"[a-z_]{1,9}", fullmatch=True),
    min_size=1,
    max_size=4,
)


@given(st.sampled_from(sorted(STATES)), PARTS)
def test_any_prefixes_in_any_order_are_taken_off(name, parts):
    prefix = "".join(f"{part}." for part in parts)
    wrapped = {f"{prefix}{key}": array for key, array in STATES[name].items()}
    unwrapped = unwrap(wrapped, recognise.is_known)
    assert list(unwrapped.state) == list(STATES[name])
    assert all(array is wrapped[prefix + key] for key, array in unwrapped.state.items())
    assert unwrapped.given == {key: prefix + key for key in STATES[name]}
    (note,) = unwrapped.notes
    assert note.startswith("taken off the names: ")
    assert all(repr(f"{part}.")[1:-1] in note for part in parts)


def test_wrappers_of_parts_of_a_model_are_taken_out():
    """A compiled backbone, and layers split over devices, inside a class of the user's own."""
    state = STATES["detr_basic"]
    wrapped = {
        "net." + key.replace("model.backbone.", "model.backbone._orig_mod.module."): array
        for key, array in state.items()
    }
    unwrapped = unwrap(wrapped, recognise.is_known)
    assert list(unwrapped.state) == list(state)
    assert unwrapped.notes == ["taken off the names: '_orig_mod.' and 'module.' and 'net.'"]


def test_what_is_the_wrappers_own_is_left_out_and_named():
    state = STATES["detr_basic"]
    own = {"n_averaged": np.array(7), "criterion.empty_weight": np.ones(6, np.float32)}
    wrapped = {**own, **{f"module.model.{key}": array for key, array in state.items()}}
    unwrapped = unwrap(wrapped, recognise.is_known)
    assert list(unwrapped.state) == list(state)
    assert unwrapped.outside == list(own)
    assert unwrapped.notes[1] == (
        "left out, as none of the model's: n_averaged, criterion.empty_weight"
    )


def test_a_layer_outside_the_prefix_is_part_of_another_model():
    """As in a panoptic model, which is a detector with a mask head beside it."""
    wrapped = {f"detr.{key}": array for key, array in STATES["detr_basic"].items()}
    wrapped["mask_head.weight"] = np.ones((4, 4, 3, 3), np.float32)
    assert unwrap(wrapped, recognise.is_known).state is wrapped


def test_names_that_would_become_one_are_left_alone():
    state = {"a.weight": ONE, "module.a.weight": TWO}
    assert unwrap(state, lambda names: list(names) == ["a.weight"]).state is state
