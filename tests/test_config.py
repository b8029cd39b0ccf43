"""Configuration: presets, JSON round trips, overrides, every refusal, and that no field is dead."""

import ast
import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dreamer4_jax import config as configs
from dreamer4_jax.config import Config, ConfigError, UserError, complete, from_dict, override, preset, to_dict
from dreamer4_jax.presets import PRESETS

ROOT = Path(__file__).parent.parent


def refused(field: str, value: object, *more: str) -> None:
    """The override must be refused with a message that names the field and holds every text of `more`."""
    with pytest.raises(ConfigError) as error:
        preset("tiny", **{field: value})
    for part in (field, *more):
        assert part in str(error.value), str(error.value)


def fields_of(cls: type, at: str = "") -> Iterator[tuple[str, typing.Any]]:
    """Dotted name and type of every field that holds a value, of each item's fields for a tuple of groups."""
    for name, hint in typing.get_type_hints(cls).items():
        dotted = f"{at}.{name}".lstrip(".")
        inner = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if dataclasses.is_dataclass(inner):
            yield from fields_of(typing.cast(type, inner), dotted)
        else:
            yield dotted, hint


# Presets and round trips


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trips_through_json(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert hash(config) == hash(preset(name)), "a config can be a static argument of jit"


def test_paper_preset_has_the_sizes_of_the_paper() -> None:
    config = preset("paper")
    assert config.tokenizer.tokens == 256 and config.tokenizer.token_channels == 32
    assert config.tokenizer.patches == 24 * 40
    spatial, action, tau_d, agent = config.tokenizer.tokens, 1, 1, config.dynamics.agent_tokens
    assert spatial + action + tau_d + agent + config.dynamics.registers == 288


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("tiny").seed = 1  # type: ignore[misc]


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'tinny'; did you mean 'tiny'.*small.*base.*paper"):
        preset("tinny")


def test_config_error_is_a_user_error() -> None:
    assert issubclass(ConfigError, UserError)


# Overrides


@pytest.mark.parametrize(
    ("field", "given_value", "want"),
    [
        ("seed", "3", 3),
        ("data.frames", "1_000", 1000),
        ("train.dynamics.steps", 7.0, 7),
        ("train.agent.lr", "3e-4", 3e-4),
        ("agent.gamma", 1, 1.0),
        ("tokenizer.encoder.scan", "false", False),
        ("tokenizer.encoder.scan", "1", True),
        ("dynamics.transformer.qk_norm", False, False),
        ("dynamics.objective", "diffusion", "diffusion"),
        ("env.levels", "A-v0,B-v0", ("A-v0", "B-v0")),
        ("env.levels", '["A-v0"]', ("A-v0",)),
        ("env.levels", ["A-v0", "B-v0"], ("A-v0", "B-v0")),
        ("name", "mine", "mine"),
    ],
)
def test_override_of_each_type(field: str, given_value: object, want: object) -> None:
    got: typing.Any = preset("tiny", **{field: given_value})
    for part in field.split("."):
        got = getattr(got, part)
    assert got == want and type(got) is type(want)


def test_override_of_a_list_of_groups() -> None:
    text = '[{"name": "keys", "kind": "binary", "size": 23}, {"name": "mouse", "kind": "mouse", "size": 121}]'
    assert preset("tiny", actions=text).actions == preset("paper").actions


def test_override_leaves_the_rest_and_the_original() -> None:
    before = preset("tiny")
    after = override(before, {"dynamics.k_max": 8, "seed": 1})
    assert before == preset("tiny")
    assert override(after, {"dynamics.k_max": before.dynamics.k_max, "seed": 0}) == before


def test_overrides_are_checked_together() -> None:
    """Each alone would be refused: the order in which a person types them must not matter."""
    values = {"tokenizer.height": 128, "tokenizer.width": 128, "tokenizer.latents": 256}
    refused("tokenizer.latents", 256)
    assert preset("tiny", **values) == preset("tiny", **dict(reversed(values.items())))


def test_parse_overrides() -> None:
    assert configs.parse_overrides(["--dynamics.k-max=8", "env.levels=a=b"]) == {
        "dynamics.k_max": "8",
        "env.levels": "a=b",
    }
    with pytest.raises(ConfigError, match="'seed'.*field=value"):
        configs.parse_overrides(["seed"])


@given(st.sampled_from([f for f, hint in fields_of(Config) if hint in (int, float) and "actions" not in f]), st.data())
def test_any_accepted_number_round_trips(field: str, data: st.DataObject) -> None:
    """Whatever the number: either a config that survives JSON, or a ConfigError that names a field; nothing else."""
    value = data.draw(st.one_of(st.integers(-2, 300), st.floats(), st.text(max_size=3), st.none(), st.booleans()))
    try:
        config = preset("tiny", **{field: value})
    except ConfigError as error:
        assert " = " in str(error)
    else:
        assert from_dict(Config, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


# Refusals


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("dynamic", ["did you mean 'dynamics'"]),
        ("dynamics.kmax", ["did you mean 'k_max'"]),
        ("dynamics.transformer.head", ["did you mean 'heads'"]),
        ("sead", ["did you mean 'seed'", "tokenizer"]),
        ("dynamics.k_max.x", ["'dynamics.k_max' has no fields"]),
        ("actions.size", ["'actions' has no fields"]),
    ],
)
def test_unknown_field(field: str, more: list[str]) -> None:
    refused(field, 1, "unknown config field", *more)


def test_unknown_field_in_a_file() -> None:
    tree = to_dict(preset("tiny"))
    tree["train"]["agent"]["stepz"] = 3
    with pytest.raises(ConfigError, match=r"train\.agent\.stepz.*did you mean 'steps'"):
        from_dict(Config, tree)


@pytest.mark.parametrize("tree", [None, 3, [1], {"actions": 5}, {"actions": None}, {"tokenizer": None}, {"seed": {}}])
def test_file_of_the_wrong_form(tree: typing.Any) -> None:
    with pytest.raises(ConfigError):
        from_dict(Config, tree)


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("seed", "x", ["'x'", "int"]),
        ("seed", 1.5, ["1.5", "int"]),
        ("seed", True, ["True", "int"]),
        ("seed", None, ["None", "int"]),
        ("seed", float("inf"), ["inf", "int"]),
        ("name", 3, ["3", "str"]),
        ("train.agent.lr", "fast", ["'fast'", "float"]),
        ("train.agent.lr", [1], ["[1]", "float"]),
        ("tokenizer.encoder.scan", "maybe", ["'maybe'", "bool"]),
        ("dynamics.objective", "flow", ["'flow'", "'shortcut'", "'diffusion'"]),
        ("dynamics.transformer.dtype", "float16", ["'float16'", "'bfloat16'"]),
        ("train.agent.optimizer", "sgd", ["'sgd'", "'adamw'", "'laprop'", "'muon'"]),
        ("env.levels", 3, ["3", "list"]),
        ("env.levels", "[A", ["'[A'", "JSON"]),
        ("dynamics", 3, ["group of fields"]),
        ("actions", "move", ["actions[0]", "group of fields"]),
        ("actions", '[{"name": "a", "knd": "binary"}]', ["actions[0].knd", "did you mean 'kind'"]),
        ("actions", '[{"name": "a", "kind": "text"}]', ["actions[0].kind", "'text'", "'binary'"]),
    ],
)
def test_wrong_type(field: str, value: object, more: list[str]) -> None:
    refused(field, value, *more)


@pytest.mark.parametrize(
    ("field", "value", "more"),
    [
        ("dynamics.transformer.layers", 6, ["6", "multiple", "time_every = 4"]),
        ("dynamics.transformer.heads", 6, ["6", "multiple", "kv_heads = 4"]),
        ("dynamics.transformer.head_dim", 30, ["30", "multiple of 4"]),
        ("dynamics.transformer.width", 127, ["127", "even"]),
        ("tokenizer.height", 60, ["60", "tokenizer.patch = 8"]),
        ("tokenizer.width", 100, ["100", "tokenizer.patch = 8"]),
        ("tokenizer.latents", 32, ["32", "patches, 64", "latent_grid"]),
        ("tokenizer.decoder.width", 32, ["32", "tokenizer.encoder.width = 64"]),
        ("dynamics.k_max", 12, ["12", "power of two"]),
        ("dynamics.k_max", 1, ["1", "at least 2"]),
        ("agent.sample_steps", 3, ["3", "power of two"]),
        ("agent.sample_steps", 32, ["32", "dynamics.k_max = 16"]),
        ("agent.bins", 254, ["254", "odd"]),
        ("agent.bins", 1, ["1", "at least 3"]),
        ("actions", [], ["()", "at least one"]),
        ("actions", '[{"name": "a", "kind": "mouse", "size": 120}]', ["actions[0].size", "120", "121"]),
        ("actions", '[{"name": "a"}, {"name": "a"}]', ["'a'", "name of its own"]),
        ("env.levels", "", ["()", "at least one"]),
        ("train.dynamics.length", 9999, ["9999", "data.chunk = "]),
        ("train.dynamics.long_length", 9999, ["9999", "data.chunk = "]),
        ("agent.context", 9999, ["9999", "data.chunk = "]),
        ("evaluate.frames", 9999, ["9999", "data.chunk = "]),
        ("agent.relevant_fraction", 1.0, ["1.0", "train.agent.batch = 16", "at least one"]),
        ("agent.relevant_fraction", 0.3, ["0.3", "whole number"]),
        ("train.dynamics.batch", 1, ["1", "fewer than two rows"]),
        ("dynamics.transformer.time_every", 0, ["0", "at least 1"]),
        ("train.imagination.length", 4, ["4", "agent.context = 8"]),
    ],
)
def test_values_that_do_not_fit_together(field: str, value: object, more: list[str]) -> None:
    refused(field, value, *more)


def test_shares_of_the_data_must_not_exceed_one() -> None:
    with pytest.raises(ConfigError, match=r"data\.noisy_bot = 0\.9.*data\.bot = 0\.5"):
        preset("tiny", **{"data.bot": 0.5, "data.noisy_bot": 0.9})


def test_long_batches_keep_a_row_for_each_branch() -> None:
    """2 rows x 16 frames are 1 row x 32 frames, which would be bootstrap alone."""
    fields = {"train.dynamics.batch": 2, "train.dynamics.length": 16}
    preset("tiny", **fields)
    with pytest.raises(ConfigError, match=r"train\.dynamics\.batch = 2: .*batch of 1 rows"):
        preset("tiny", **fields, **{"train.dynamics.long_length": 32})
    preset("tiny", **fields, **{"train.dynamics.long_length": 32, "dynamics.mix": "frames"})


def test_pack_must_divide_the_latents() -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.latents = 64.*tokenizer\.pack = 5"):
        preset("tiny", **{"tokenizer.pack": 5})


@pytest.mark.parametrize("field", [f for f, hint in fields_of(Config) if hint in (int, float) and "actions" not in f])
def test_every_number_has_a_range(field: str) -> None:
    """No number may be negative or not-a-number, and the message names it before any rule divides by it."""
    refused(field, -1, "-1")
    hint = dict(fields_of(Config))[field]
    refused(field, "nan", "nan" if hint is float else "int")
    if hint is float:
        refused(field, "inf", "inf")


@pytest.mark.parametrize("size", [0, -1])
def test_action_size(size: int) -> None:
    refused("actions", [{"name": "a", "size": size}], "actions[0].size", str(size), "at least 1")


@pytest.mark.parametrize("field", ["tokenizer.patch", "tokenizer.pack", "dynamics.transformer.kv_heads"])
def test_zero_divisors_are_refused(field: str) -> None:
    refused(field, 0, "0", "at least 1")


# No dead options


def test_every_field_is_read() -> None:
    """Each field is read as an attribute outside config.py, or by a property of config.py that is itself read outside.

    Names are compared, not objects, so a field that shares its name with another attribute may slip through.
    """
    read: set[str] = set()
    for folder in ("dreamer4_jax", "experiments", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "config.py":
                read |= loaded(ast.parse(path.read_text()))
    for node in ast.walk(ast.parse((ROOT / "dreamer4_jax" / "config.py").read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in read:
            if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                read |= loaded(node)
    unread = sorted(dotted for dotted, _ in fields_of(Config) if dotted.rsplit(".", 1)[-1] not in read)
    assert not unread, f"never read outside config.py: {', '.join(unread)}"


def loaded(tree: ast.AST) -> set[str]:
    """Names of the attributes that the code reads; a method that is called, as `array.clip()`, is not a field."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called
    }


def test_a_config_of_an_earlier_version_gets_the_new_fields_at_their_defaults():
    recorded = to_dict(preset("tiny", **{"agent.alpha": 0.25}))
    del recorded["agent"]["objective"], recorded["evaluate"]
    assert from_dict(Config, complete(recorded)) == preset("tiny", **{"agent.alpha": 0.25})
    assert complete({"agent": {"gone": 1}})["agent"]["gone"] == 1  # what is no longer known stays, and is refused later


def test_only_phase_1b_treats_rows_as_images():
    assert override(preset("tiny"), {"train.dynamics.image_fraction": 0.5}).train.dynamics.image_fraction == 0.5
    for phase in ("tokenizer", "agent", "imagination"):
        with pytest.raises(ConfigError, match=rf"train.{phase}.image_fraction = 0.5: must be 0: only phase 1b"):
            override(preset("tiny"), {f"train.{phase}.image_fraction": 0.5})


def test_seeds_are_what_keys_take():
    assert override(preset("tiny"), {"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(ConfigError, match=r"seed = 4294967296: must be in \[0, 2\^32\)"):
        override(preset("tiny"), {"seed": 2**32})


def test_what_had_no_effect_does_not_make_old_runs_unreadable():
    tree = to_dict(preset("tiny"))
    tree["train"]["agent"]["image_fraction"] = 0.3  # as earlier versions recorded it for the preset `paper`
    assert from_dict(Config, complete(tree)) == preset("tiny")
