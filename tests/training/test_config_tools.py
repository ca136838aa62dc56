from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Literal

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_dict

from aqdetr_jax.training import config_tools
from aqdetr_jax.training.config_tools import (
    ConfigError,
    changed_keys,
    config_diff,
    flatten_config,
    from_dataclass,
    load_config_file,
    to_dataclass,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    pattern: str
    bits: int | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    num_queries: int = 100
    dropout: float = 0.1
    backbone: Literal["resnet18", "resnet50"] = "resnet50"
    rules: tuple[Rule, ...] = ()


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 10
    warmup: int = 1
    buckets: tuple[tuple[int, int], ...] = ((64, 64),)
    names: tuple[str, ...] = ()
    clip: float | None = None
    ema: bool = False

    def __post_init__(self):
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is longer than steps {self.steps}")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0
    note: str = ""
    model: Model = dataclasses.field(default_factory=Model)
    train: Train = dataclasses.field(default_factory=Train)


CONFIG_FILE = """
import ml_collections
def get_config(size="small"):
    c = ml_collections.ConfigDict()
    c.seed = 3
    c.model = ml_collections.ConfigDict(dict(num_queries=20 if size == "small" else 300))
    c.train = ml_collections.ConfigDict(dict(steps=8, buckets=((32, 48),), clip=None))
    c.train.warmup = c.train.get_ref("steps") // 4
    return c
"""


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG_FILE)
    return str(path)


# --- to_dataclass / from_dataclass ---------------------------------------------------------------


def test_values_of_every_kind_and_defaults():
    given_config = ml_collections.ConfigDict(
        {
            "model": {"dropout": 1, "rules": [{"pattern": "a", "bits": 4}, {"pattern": "b"}]},
            "train": {"buckets": [[1, 2], [3, 4]], "clip": 0.5, "ema": True},
        }
    )
    config = to_dataclass(Config, given_config)
    assert config.model.dropout == 1.0
    assert isinstance(config.model.dropout, float)
    assert config.model.rules == (Rule("a", 4), Rule("b", None))
    assert config.train.buckets == ((1, 2), (3, 4))
    assert config.train.clip == 0.5
    assert config.train.steps == 10
    hash(config)  # usable as a static argument


@settings(max_examples=30)
@given(
    st.builds(
        Config,
        seed=st.integers(),
        note=st.text(),
        model=st.builds(
            Model,
            num_queries=st.integers(1, 900),
            dropout=st.floats(0, 1),
            rules=st.lists(st.builds(Rule, st.text(), st.none() | st.integers(2, 8))).map(tuple),
        ),
        train=st.builds(Train, clip=st.none() | st.floats(0, 10), names=st.just(("a", "b"))),
    )
)
def test_round_trip_through_json_is_equal(config):
    text = json.dumps(from_dataclass(config))
    assert to_dataclass(Config, json.loads(text)) == config
    assert to_dataclass(Config, ml_collections.ConfigDict(from_dataclass(config))) == config


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"modle": {}}, "config has no key 'modle'; did you mean 'model'?"),
        ({"model": {"num_querys": 3}}, "config.model has no key 'num_querys'; did you mean 'num_q"),
        ({"train": {"zzz": 3}}, "config.train has no key 'zzz'; known keys: buckets, clip, ema"),
        ({"seed": "3"}, "config.seed: expected int, found str '3'"),
        ({"seed": True}, "config.seed: expected int, found bool True"),
        ({"train": {"steps": 1e5}}, "config.train.steps: expected int, found float 100000.0; wri"),
        ({"train": {"ema": 1}}, "config.train.ema: expected bool, found int 1"),
        ({"train": {"clip": "no"}}, "config.train.clip: expected float, found str 'no'"),
        ({"model": {"dropout": True}}, "config.model.dropout: expected float, found bool"),
        ({"model": {"backbone": "resnet5"}}, "'resnet50', found 'resnet5'; did you mean 'resnet50"),
        ({"model": 3}, "config.model: expected a group of keys (Model), found int 3"),
        ({"model": {"rules": [{"bits": 2}]}}, "config.model.rules[0].pattern is missing"),
        ({"model": {"rules": [{"pattern": "a", "bits": 2.5}]}}, "config.model.rules[0].bits: expe"),
        ({"train": {"buckets": [[1, 2, 3]]}}, "config.train.buckets[0]: expected 2 values, found"),
        ({"train": {"steps": 1, "warmup": 5}}, "config.train: warmup 5 is longer than steps 1"),
    ],
)
def test_bad_configurations_name_the_path(bad, message):
    with pytest.raises(ConfigError) as caught:
        to_dataclass(Config, ml_collections.ConfigDict(bad))
    assert message in str(caught.value)


def test_open_required_value_is_named():
    config = ml_collections.ConfigDict({"model": {}})
    config.model.num_queries = config_dict.required_placeholder(int)
    with pytest.raises(ConfigError, match=r"add --config\.model\.num_queries=VALUE"):
        to_dataclass(Config, config)


# --- files and overrides -------------------------------------------------------------------------


def test_python_file_with_argument_is_locked(config_file):
    assert load_config_file(config_file).model.num_queries == 20
    config = load_config_file(config_file + ":big")
    assert config.model.num_queries == 300
    with pytest.raises((AttributeError, KeyError)):
        config.new_key = 1


def test_overrides_are_read_by_type_and_references_follow(config_file):
    overrides = [
        "--config.train.steps=40",
        "train.clip=1e-1",
        "train.buckets=((8,16),(16,8))",
        "--config.model.backbone=resnet18",
        "model.rules=[{'pattern': 'x', 'bits': 2}]",
        "train.names=a, b",
        "train.ema=true",
        "note=1.5=x",
        "model.dropout=1",
    ]
    loaded = load_config_file(config_file, overrides, schema=Config)
    config = to_dataclass(Config, loaded)
    assert config.train == Train(40, 10, ((8, 16), (16, 8)), ("a", "b"), 0.1, True)
    assert config.model == Model(20, 1.0, "resnet18", (Rule("x", 2),))
    assert config.note == "1.5=x"
    # The resolved form survives the work directory's config.json.
    assert to_dataclass(Config, json.loads(json.dumps(from_dataclass(config)))) == config


def test_overrides_without_schema_use_the_existing_type(config_file):
    config = load_config_file(config_file, ["train.steps=12", "train.clip=0.5", "seed=9"])
    assert (config.train.steps, config.train.warmup, config.train.clip) == (12, 3, 0.5)
    assert load_config_file(config_file, ["train.clip=None"]).train.clip is None
    derived = load_config_file(config_file, ["train.warmup=1", "train.steps=80"]).train
    assert (derived.steps, derived.warmup) == (80, 1)  # a derived value can be pinned
    with pytest.raises(ConfigError, match=r"config\.seed: expected int, found float 1\.5"):
        load_config_file(config_file, ["seed=1.5"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=1", "config.train has no key 'step'; did you mean 'steps'?"),
        ("trian.steps=1", "config has no key 'trian'; did you mean 'train'?"),
        ("--config.model=1", "config.model is a group; set one of its keys: "),
        ("seed.x=1", "config.seed is a value, not a group"),
        ("seed", "has no value: write seed=VALUE"),
        ("train.steps=abc", "config.train.steps: cannot read 'abc' as int"),
        ("train.ema=maybe", "config.train.ema: cannot read 'maybe' as bool"),
        ("train.buckets=(1,2)", "config.train.buckets[0]: expected tuple[int, int], found int"),
        ("model.backbone=vgg", "config.model.backbone: expected one of 'resnet18', 'resnet50'"),
    ],
)
def test_bad_overrides(config_file, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config_file(config_file, [override], schema=Config)
    assert message in str(caught.value)


def test_required_placeholder_is_filled_by_an_override(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "import ml_collections as m\nfrom ml_collections import config_dict as d\n"
        "def get_config():\n"
        "    return m.ConfigDict(dict(a=dict(b=d.required_placeholder(int))))\n"
    )
    with pytest.raises(ConfigError, match=r"config\.a\.b must be given: add --config\.a\.b=VALUE"):
        load_config_file(str(path))
    assert load_config_file(str(path), ["a.b=4"]).a.b == 4
    with pytest.raises(ConfigError, match=r"config\.a\.b: expected int"):
        load_config_file(str(path), ["a.b=4.5"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(): return {}", "must return an ml_collections.ConfigDict, found dict"),
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(:", "SyntaxError"),
    ],
)
def test_bad_python_files(tmp_path, source, message):
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_config_file(str(path))


def test_argument_that_a_file_does_not_take(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("import ml_collections as m\ndef get_config(): return m.ConfigDict()")
    with pytest.raises(ConfigError, match="takes no argument; drop ':x'"):
        load_config_file(f"{path}:x")


def test_json_file_is_data_only(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(from_dataclass(Config(model=Model(rules=(Rule("a", 3),))))))
    loaded = load_config_file(str(path), ["seed=5"], schema=Config)
    assert to_dataclass(Config, loaded) == Config(seed=5, model=Model(rules=(Rule("a", 3),)))
    path.write_text('{"seed": NaN}')
    with pytest.raises(ConfigError, match="NaN is not a JSON number"):
        load_config_file(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config_file(str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        load_config_file(str(path))


def test_bare_names_and_misses(monkeypatch, tmp_path):
    monkeypatch.setattr(config_tools, "packaged_config_dir", lambda: tmp_path)
    (tmp_path / "shapes_detr.py").write_text(CONFIG_FILE)
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.chdir("/")
    assert load_config_file("shapes_detr").seed == 3
    assert load_config_file("shapes_detr:big").model.num_queries == 300
    assert load_config_file("configs/shapes_detr.py").seed == 3
    with pytest.raises(FileNotFoundError) as caught:
        load_config_file("shape_detr")
    assert "did you mean 'shapes_detr'? Shipped configurations: shapes_detr" in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"no configuration 'other/none.py'"):
        load_config_file("other/none.py")
    with pytest.raises(ConfigError, match=r"a \.py file, a \.json file or a bare name"):
        load_config_file("configs/shapes.yaml")


def test_packaged_configs_lie_beside_the_package():
    assert config_tools.packaged_config_dir().parent == Path(__file__).resolve().parents[2]


# --- differences ---------------------------------------------------------------------------------


def test_config_diff_names_changed_dotted_keys():
    old = from_dataclass(Config())
    new = Config(seed=1, train=Train(clip=2.0, buckets=((64, 64), (8, 8))))
    assert config_diff(old, new) == [
        "seed: 0 -> 1",
        "train.buckets: [[64, 64]] -> [[64, 64], [8, 8]]",
        "train.clip: None -> 2.0",
    ]
    assert changed_keys(old, Config()) == []


def test_config_diff_of_absent_keys_and_equal_spellings():
    old = {"a": {"b": 1, "t": (1, 2), "gone": 0}, "empty": {}}
    new = ml_collections.ConfigDict({"a": {"b": 1.0, "t": (1.0, 2), "new": "x"}, "empty": {}})
    assert config_diff(old, new) == ["a.gone: 0 -> (absent)", "a.new: (absent) -> 'x'"]
    assert changed_keys({"a": True}, {"a": 1}) == ["a"]
    assert flatten_config(new)["empty"] == {}


def test_schema_with_an_unsupported_type_is_a_programming_error():
    @dataclasses.dataclass(frozen=True)
    class Bad:
        table: typing.Any
        other: set

    with pytest.raises(TypeError, match=r"config\.other"):
        to_dataclass(Bad, {"table": {}, "other": set()})
