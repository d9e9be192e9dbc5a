"""Configs: what is refused, how it is said, and that every file in cfgs/ loads."""

from pathlib import Path
from typing import Any

import pytest

from nano4m_cli.config import Config, apply_overrides, build, dump_yaml, load_config, load_yaml, parse_yaml
from nano4m_cli.errors import ConfigError
from nano4m_cli.train.config import RunConfig, TokenizerRunConfig, load_run_config, parse_run_config

CFGS = Path(__file__).parents[1] / "cfgs"


class Inner(Config):
    rate: float = 0.1
    steps: int = 3


class Outer(Config):
    name: str
    inner: Inner = Inner()
    many: list[Inner] = []
    free: dict[str, Any] = {}


# -- YAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, key, line, first",
    [
        ("a: 1\nb: 2\na: 3\n", "a", 3, 1),
        ("top:\n  x: 1\n  y: 2\n  x: 1\n", "x", 4, 2),
        ("list:\n  - {k: 1, k: 2}\n", "k", 2, 2),
        ("1: a\n1: b\n", "1", 2, 1),
    ],
)
def test_duplicate_keys_are_errors_with_both_lines(text, key, line, first):
    with pytest.raises(ConfigError, match=f"f.yaml:{line}: key '{key}' stands twice \\(first on line {first}\\)"):
        parse_yaml(text, "f.yaml")


def test_the_same_key_in_two_mappings_is_fine():
    assert parse_yaml("a: {k: 1}\nb: {k: 2}\nc: &x {k: 3}\nd: *x\n") == {
        "a": {"k": 1},
        "b": {"k": 2},
        "c": {"k": 3},
        "d": {"k": 3},
    }


@pytest.mark.parametrize(
    "text", ["a: [1", "a: 'x", "\ta: 1", "a: b: c", "--- 1\n--- 2\n", "a: !!python/object:os.system x", "x: *nowhere"]
)
def test_what_is_no_yaml_is_a_config_error_that_names_the_file(text):
    with pytest.raises(ConfigError, match="f.yaml"):
        parse_yaml(text, "f.yaml")


@pytest.mark.parametrize("text", ["? [a, b]\n: 1\n", "{[1]: 2}", "when: 2024-13-45"])
def test_odd_yaml_is_a_config_error_as_well(text):
    with pytest.raises(ConfigError, match="f.yaml"):
        parse_yaml(text, "f.yaml")


def test_load_yaml(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(ConfigError, match="list.yaml must hold a mapping at its top, not list"):
        load_yaml(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match="no config file") as caught:
        load_yaml(tmp_path / "emty.yaml")
    assert caught.value.hint == f"did you mean '{tmp_path / 'empty.yaml'}'?"
    with pytest.raises(ConfigError, match="no config file"):
        load_yaml(tmp_path / "none" / "x.yaml")


def test_a_file_that_is_no_text_is_a_config_error(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="b.yaml"):
        load_yaml(tmp_path / "b.yaml")


# -- building -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, place, hint",
    [
        ({"name": "x", "inne": {}}, "unknown key 'inne'", "did you mean 'inner'?"),
        ({"name": "x", "inner": {"stepz": 1}}, "unknown key 'inner.stepz'", "did you mean 'steps'?"),
        pytest.param(
            {"name": "x", "many": [{}, {"rat": 1}]},
            "unknown key 'many.1.rat'",
            "did you mean 'rate'?"),
        ({"name": "x", "inner": {"zzz": 1}}, "unknown key 'inner.zzz'", "known: rate, steps"),
    ],
)
def test_unknown_keys_name_the_place_and_the_nearest_key(data, place, hint):
    with pytest.raises(ConfigError) as caught:
        build(Outer, data, "f.yaml")
    assert caught.value.message == f"f.yaml: {place}" and caught.value.hint == hint


def test_the_real_config_gives_the_nearest_key_at_depth():
    with pytest.raises(ConfigError) as caught:
        parse_run_config({"name": "x", "train": {"batchsize": 3}}, "f")
    assert "unknown key 'train.batchsize'" in caught.value.message and caught.value.hint == "did you mean 'batch'?"


def test_every_problem_is_one_line():
    with pytest.raises(ConfigError) as caught:
        build(Outer, {"inner": {"steps": "many", "rate": None}, "extra": 1}, "f")
    lines = caught.value.message.split("\n")
    assert len(lines) == 4 and all(line.startswith("f: ") for line in lines)
    said = "\n".join(lines)
    assert (
        "name: Field required" in said
        and "inner.steps" in said
        and "(got 'many')" in said
        and "unknown key 'extra'" in said
    )


def test_numbers_written_as_text_are_coerced():
    """PyYAML reads 3e-4 as a string."""
    assert parse_yaml("3e-4") == "3e-4"
    config = build(Outer, parse_yaml("{name: x, inner: {rate: 3e-4, steps: '12'}}"))
    assert config.inner.rate == 3e-4 and config.inner.steps == 12
    run = parse_run_config(
        parse_yaml("{name: x, train: {lr: 1e-3, betas: [9e-1, 95e-2]}, loss_weights: {a: 2e0}}"), "f"
    )
    assert run.train.lr == 1e-3 and run.train.betas == (0.9, 0.95) and run.loss_weights == {"a": 2.0}


def test_configs_are_frozen_and_validate_their_defaults():
    config = build(Outer, {"name": "x"})
    with pytest.raises(Exception, match="frozen"):
        config.name = "y"

    class Bad(Config):
        n: int = "three"

    with pytest.raises(ConfigError, match="n: "):
        build(Bad, {})


@pytest.mark.parametrize("data", [None, [], 3, "x"])
def test_what_is_no_mapping_is_an_error(data):
    with pytest.raises(ConfigError, match="f: "):
        build(Outer, data, "f")


# -- overrides ----------------------------------------------------------------------------------------------------


def test_overrides_set_values_and_make_sections():
    data = {"a": {"b": 1, "c": 2}, "d": 3}
    out = apply_overrides(data, ["a.b=5", "x.y.z=[1, 2]", "d=3e-4", "e=", "f=k=v", "a.n=null"])
    assert out == {"a": {"b": 5, "c": 2, "n": None}, "d": "3e-4", "x": {"y": {"z": [1, 2]}}, "e": None, "f": "k=v"}
    assert data == {"a": {"b": 1, "c": 2}, "d": 3}, "the given mapping is not changed"


def test_later_overrides_win_and_an_empty_section_can_be_filled():
    assert apply_overrides({"a": None}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_overrides_reach_into_lists_by_number():
    data = {"parts": [{"w": 1}, {"w": 2, "deep": [1, 2]}]}
    out = apply_overrides(data, ["parts.1.w=5", "parts.0.more=yes", "parts.1.deep.0=7"])
    assert out == {"parts": [{"w": 1, "more": True}, {"w": 5, "deep": [7, 2]}]}
    assert data == {"parts": [{"w": 1}, {"w": 2, "deep": [1, 2]}]}, "the given mapping is not changed"


@pytest.mark.parametrize(
    "item, said",
    [
        ("l.2=3", "'2' is not an entry of this list"),
        ("l.last.x=3", "'last' is not an entry of this list"),
        ("nonsense", "is not of the form key.sub=value"),
        ("=3", "is not of the form"),
        ("a..b=3", "is not of the form"),
        (".a=3", "is not of the form"),
        ("d.sub=3", "'d' is a value, not a section"),
        ("a.b.c=3", "'a.b' is a value, not a section"),
        ("a.b=[1", "is not valid YAML"),
        ("a={x: 1, x: 2}", "stands twice"),
    ],
)
def test_override_errors(item, said):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": 1}, "d": 3, "l": [1, 2]}, [item])
    assert said in caught.value.message and caught.value.exit_code == 2
    assert item in caught.value.message


def test_overrides_do_not_reach_into_what_an_alias_shares():
    data = parse_yaml("a: &x {k: 1}\nb: *x\n")
    assert apply_overrides(data, ["a.k=2"]) == {"a": {"k": 2}, "b": {"k": 1}}


def test_load_config_applies_overrides_before_it_checks(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: x\ninner: {steps: many}\n")
    with pytest.raises(ConfigError, match="c.yaml: inner.steps"):
        load_config(Outer, path)
    assert load_config(Outer, path, ["inner.steps=4"]).inner.steps == 4


# -- runs ---------------------------------------------------------------------------------------------------------


def test_there_are_config_files():
    assert len(list(CFGS.rglob("*.yaml"))) >= 2


@pytest.mark.parametrize("path", sorted(CFGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CFGS)))
def test_every_file_in_cfgs_loads(path):
    config = load_run_config(path, [])
    assert isinstance(config, (RunConfig, TokenizerRunConfig)) and config.name
    again = parse_run_config(parse_yaml(dump_yaml(config)), "dumped")
    assert again == config, "what a run writes as config.yaml reads back the same"


def test_the_name_is_the_file_s_unless_given(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 5}\n")
    assert load_run_config(path, []).name == "mine"
    assert load_run_config(path, ["name=other", "train.lr=2e-4"]).train.lr == 2e-4
    with pytest.raises(ConfigError, match="'a/b' cannot be the name"):
        load_run_config(path, ["name=a/b"])


@pytest.mark.parametrize(
    "override, said",
    [
        ("task=forum", "unknown task 'forum'"),
        ("train.batch=0", "train.batch: "),
        ("train.accumulate=3", "does not divide into 3 parts"),
        ("train.lr=-1", "train.lr: "),
        ("train.lr=.nan", "train.lr: "),
        ("model.size=d3w128", "model.size: a size reads"),
        ("loss_weights.rgb=-1", "not negative"),
        ("masking.components=[]", "at least one masking component"),
        ("masking.slots.rgb=diagonal", "masking.slots.rgb"),
    ],
)
def test_bad_values_of_a_run_say_where(tmp_path, override, said):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 5}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, [override])
    assert said in caught.value.message
