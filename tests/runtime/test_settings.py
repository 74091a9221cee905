"""Settings: ranges and meanings stand in the annotations of configs, are checked when a config is built, and change no hash."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, replace
from typing import Annotated, Any, Literal

import pytest

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import fingerprint
from pipeline.runtime.runs import RunConfig
from pipeline.runtime.settings import (
    POSITIVE,
    Range,
    Settings,
    configure,
    describe_settings,
    field_types,
    flatten,
    parse_value,
    recorded_settings,
)
from pipeline.training.config import TrainConfig
from pipeline.training.heads import resolve_head_settings
from pipeline.training.joint.plan import JointConfig

Share = Annotated[float, Range(0, 1), "a share"]


@dataclass(frozen=True, kw_only=True)
class Toy(Settings):
    """A config with every kind of field."""

    width: Annotated[int, Range(1, 65_536), "width of the MLP"] = 4
    rate: Annotated[float, POSITIVE, "learning rate"] = 0.1
    share: Share = 0.5
    other: Annotated[Share, Range(0, 1, open_high=True), "another share"] = 0.5
    kind: Annotated[Literal["cls", "mean"], "which tokens"] = "cls"
    fast: Annotated[bool, "be fast"] = False
    name: Annotated[str, "what it is called"] = ""
    layer: int = -1


def all_configs() -> Iterator[Any]:
    yield pytest.param(TrainConfig, id="TrainConfig")
    yield pytest.param(JointConfig, id="JointConfig")
    for kind in ("methods", "encoders"):
        for name in plugins.names(kind):
            yield pytest.param(plugins.get(kind, name).Config, id=f"{kind}-{name}")


for_all_configs = pytest.mark.parametrize("config_type", list(all_configs()))


@pytest.mark.parametrize(
    ("values", "inside", "outside", "shown", "words"),
    [
        (Range(1, 65_536), (1, 2, 65_536), (0, 65_537, -1), "1..65536", "in 1..65536"),
        (Range(0, 0.99), (0, 0.5, 0.99), (-1e-9, 0.991), "0..0.99", "in 0..0.99"),
        (Range(0), (0, 1e300, 10**400), (-1e-9, math.inf, math.nan), ">= 0", "at least 0"),
        (POSITIVE, (1e-300, 1), (0, -1, math.inf, math.nan), "> 0", "positive"),
        (Range(3, open_low=True), (4,), (3,), "> 3", "above 3"),
        (Range(0, 1, open_high=True), (0, 0.999), (1, -0.1), ">= 0, < 1", "at least 0 and below 1"),
        (Range(0, 1, open_low=True), (0.001, 1), (0, 1.001), "> 0, <= 1", "above 0 and at most 1"),
    ],
)
def test_a_range(values: Range, inside: tuple[float, ...], outside: tuple[float, ...], shown: str, words: str) -> None:
    assert str(values) == shown
    for value in inside:
        values.check("x", value)
    for value in outside:
        with pytest.raises(UserError) as caught:
            values.check("x", value)
        assert str(caught.value) == f"x must be {words}, not {value}"


def test_a_field_is_described_by_its_annotation() -> None:
    facts = [(each.name, each.default, each.values, each.meaning) for each in describe_settings(Toy)]
    assert facts == [
        ("width", 4, "int 1..65536", "width of the MLP"),
        ("rate", 0.1, "float > 0", "learning rate"),
        ("share", 0.5, "float 0..1", "a share"),
        ("other", 0.5, "float >= 0, < 1", "another share"),
        ("kind", "cls", "cls | mean", "which tokens"),
        ("fast", False, "true | false", "be fast"),
        ("name", "", "text", "what it is called"),
        ("layer", -1, "int", ""),
    ]
    assert field_types(Toy) == {
        "width": int,
        "rate": float,
        "share": float,
        "other": float,
        "kind": Literal["cls", "mean"],
        "fast": bool,
        "name": str,
        "layer": int,
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0}, "width must be in 1..65536, not 0"),
        ({"rate": math.inf}, "rate must be positive, not inf"),
        ({"share": math.nan}, "share must be in 0..1, not nan"),
        ({"other": 1}, "other must be at least 0 and below 1, not 1"),
        ({"kind": "max"}, "setting 'kind' is 'max'; choose one of: cls, mean"),
    ],
)
def test_a_config_is_checked_when_it_is_built(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Toy(**wrong)
    assert str(caught.value).startswith(message)


def test_strings_of_the_command_line_are_parsed_by_the_bare_type() -> None:
    hint = Annotated[int, Range(1, 8), "a number"]
    assert parse_value("width", "3", hint) == parse_value("width", "3", int) == 3
    assert parse_value("kind", "cls", Annotated[Literal["cls"], "which"]) == "cls"
    with pytest.raises(UserError, match=r"setting 'width' is '1\.5'; it takes a finite int"):
        parse_value("width", "1.5", hint)
    with pytest.raises(UserError, match=r"width must be in 1\.\.65536, not 0"):
        configure(Toy, {"width": "0"})


@for_all_configs
def test_every_setting_has_a_meaning_and_a_default_in_its_range(config_type: type[Any]) -> None:
    assert issubclass(config_type, Settings)
    described = describe_settings(config_type)
    assert [each.name for each in described] == list(flatten(asdict(config_type())))
    for setting in described:
        assert setting.meaning, setting.name
        assert setting.default is not MISSING, setting.name
        assert setting.range is None or setting.type in (int, float), setting.name
        setting.check(setting.name, setting.default)
        assert parse_value(setting.name, str(setting.default), setting.type) == setting.default


def built_with(config_type: type[Any], name: str, value: Any) -> Any:
    """Build a config, or the part of it that has the setting, as a program does: without parsing."""
    part, _, name = name.rpartition(".")
    return (type(getattr(config_type(), part)) if part else config_type)(**{name: value})


@for_all_configs
def test_every_range_is_enforced(config_type: type[Any]) -> None:
    """A config whose `__post_init__` forgets `super().__post_init__()` would accept everything."""
    for setting in describe_settings(config_type):
        if setting.choices:
            with pytest.raises(UserError, match=f"setting '{setting.name.rpartition('.')[2]}' is 'planted'; choose one of"):
                built_with(config_type, setting.name, "planted")
        if setting.range:
            step = 1 if setting.type is int else 1e-6
            below = setting.range.low - (0 if setting.range.open_low else step)
            above = setting.range.high + (0 if setting.range.open_high else step)
            for value in (below, above):
                with pytest.raises(UserError, match="must be"):
                    built_with(config_type, setting.name, value)


def test_messages_call_a_setting_as_users_do() -> None:
    with pytest.raises(UserError, match=r"^training setting 'lr' must be positive, not 0$"):
        TrainConfig(lr=0)
    with pytest.raises(UserError, match=r"^training setting 'weight_average' must be at least 0 and below 1, not 1$"):
        TrainConfig(weight_average=1)
    with pytest.raises(UserError, match=r"^--encoder-lr must be positive, not 0$"):
        JointConfig(encoder_lr=0)
    with pytest.raises(UserError, match=r"^--layer-decay must be above 0 and at most 1, not 2$"):
        JointConfig(layer_decay=2)


@pytest.mark.parametrize(
    ("method", "given", "expected"),
    [
        ("seda", {"T": "900", "t": "0", "gamma": "0.5", "beta": "2"}, {"num_steps": 900, "stage_step": 0, "w_ce_dst": 0.5}),
        ("marnet", {"tau": "0.1", "w_ce_ema": "0.5", "alpha2": "3"}, {"ema.tau": 0.1, "ema.w_ce": 0.5, "cdr.w_ce": 3.0}),
        ("seda", {"residual": "True"}, {"residual": "text"}),
        ("seda", {"residual": "false"}, {"residual": "none"}),
        ("ema", {"d": "8", "tau": "0.2"}, {"width": 8, "tau": 0.2}),
        ("cdr", {"T": "50", "gamma": "0.5"}, {"num_steps": 50, "w_mse": 0.5}),
    ],
)
def test_letters_and_old_names_are_read(method: str, given: dict[str, str], expected: dict[str, Any]) -> None:
    plugin = plugins.get("methods", method)
    config = configure(plugin.Config, given, plugin.symbols)
    values = flatten(asdict(config))
    assert {name: values[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("seda", {"T": 30, "t": 30}, "t must be in 0..29, not 30"),
        ("seda", {"num_steps": 30, "stage_step": 30}, "stage_step must be in 0..29, not 30"),
        ("seda", {"T": 10}, "sample_steps must be in 1..10, not 20, its default: set it, too"),
        ("seda", {"T": "x"}, "setting 'T' is 'x'; it takes a finite int"),
        ("seda", {"γ": -1}, "γ must be at least 0, not -1.0"),
        ("seda", {"α₁": -1}, "α₁ must be at least 0, not -1.0"),
        ("seda", {"T": 30, "num_steps": 40}, "setting 'num_steps' is given twice; 'T' names it, too"),
        ("marnet", {"T": 0}, "T must be in 1..100000, not 0"),
        ("marnet", {"cdr.num_steps": 0}, "cdr: num_steps must be in 1..100000, not 0"),
        ("marnet", {"alpha2": -1}, "alpha2 must be at least 0, not -1.0"),
        ("logreg", {"C": 0}, "C must be positive, not 0.0"),
    ],
)
def test_messages_repeat_what_was_typed(method: str, given: dict[str, Any], message: str) -> None:
    plugin = plugins.get("methods", method)
    with pytest.raises(UserError) as caught:
        configure(plugin.Config, given, plugin.symbols)
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:  # as `train-head` reads them
        resolve_head_settings("openmoji", method, "head", given, {})
    assert str(caught.value) == message
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # a worker process sends it back


@pytest.mark.parametrize("value", [1, None, ["text"]])
def test_a_value_of_no_version_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="setting 'residual' is"):
        configure(plugins.get("methods", "seda").Config, {"residual": value})


def test_the_methods_that_sample_declare_their_sampler_once() -> None:
    names = ("sampler", "eta", "draws", "zero_start")
    facts = []
    for method in ("cdr", "marnet", "seda"):
        settings = describe_settings(plugins.get("methods", method).Config)
        described = {each.name.rpartition(".")[2]: replace(each, name="") for each in settings}
        facts.append([described[name] for name in names])
    assert facts[0] == facts[1] == facts[2]


# The hashes of the default settings: a change would rename every run. All but those of MARNet, whose settings had no parts,
# and of SeDA, which has other defaults now, are those from before ranges and meanings stood in the annotations.
RUNS = {
    "baseline": "8ef0e595d67865f864d2be054256596ef7ed2196e82e1b3ad2b4edbaec0dcd29",
    "cdr": "724bc4fe91c2c4d4f81ae4907828f14f559178c9fc4cd0d6c5f9c70abc9a7271",
    "ema": "670e38831df57f2c5b3b7981d5229bf4cca87078c8c0456ff480d8613a1d334f",
    "marnet": "c8d63144b2ab575350e4dba175fbba998bf17418d6749b3d640306ce1a397000",
    "seda": "422de10f3246d195e375666b810bc1a6f744f62241a15a28358831669cc23924",
}
# The identity of a cache leaves out settings that are not used: `keep` and `tokens` of the transformers came later.
ENCODERS = {
    "efficientnet_lite": "e147c7877f8fbc43fa7b3e38ed31a3fa985bb319dc50a5f9d0f22ddbccc913be",
    "frames": "ff60cb03689c52efd2867aa6a4c1d37e8489242fb0704667dfd9d05a08c47a41",
    "openclip": "272119a550e8293ced5bc9488ef80885394f22b2a7ef22849d67b0ac8bf342cc",
    "random_projection": "2f42f3590fe387d5550c8b479701be1692f0714fb5d73353b95b246cba0f960e",
    "repmlpnet": "e2ed9f19c683705ac687c7f667f6d69fbf08b486d12ef43b0ca6c9ff3c833728",
    "timm": "420d5ca554c5b9a9654a810a58343a472593da1785b52249cd647874b252bb13",
    "transformers_image": "616fe6a1564830819ce3a2f6ac571d3006f4774a4c9d1ffaa9a2fff2b47f7d0d",
    "transformers_text": "ce529c13dc30dd7e8a452f0e9a43fe318511e59234aa528f11a04fadd2baa91b",
    "transformers_video": "f613c157669603e8aca0479a367679d3ed0a75f52a68ecd0da03bdd2044a361a",
    "vanillanet": "95d56695a3f2c2f9fcf08213997de8dad14406f47305518c8aa4eb3ddcd5eee6",
    "wiser": "50b2cfd50af5040deda71a3fb9e20715058a40a3148e5bf43b9a3482f7c4c399",
}


@pytest.mark.parametrize("method", RUNS)
def test_the_default_settings_of_a_method_hash_as_before(method: str) -> None:
    config = RunConfig(
        dataset="d",
        method=method,
        settings=recorded_settings(plugins.get("methods", method).Config()),
        training=asdict(TrainConfig()),
        caches={"image": "i"},
        shapes={"image": [4]},
        text_aggregate="mean",
        manifest="m",
    )
    assert config.fingerprint() == RUNS[method]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_default_settings_of_an_encoder_hash_as_before(encoder: str) -> None:
    assert fingerprint(asdict(plugins.get("encoders", encoder).Config())) == ENCODERS[encoder]


def test_the_default_settings_of_joint_training_hash_as_before() -> None:
    assert fingerprint(asdict(JointConfig())) == "9aee3d23e58f2ab94c3417892545582b59e8ce71eadbd4467e52dee3c6b8be7d"


def test_a_plain_dataclass_and_choices_of_numbers_are_read_like_others() -> None:
    assert parse_value("layer", "2", Literal[1, 2]) == 2
    assert configure(Plain, {"width": "8"}).width == 8
    with pytest.raises(UserError, match=r"width must be in 1\.\.8, not 9"):
        configure(Plain, {"width": "9"})
    with pytest.raises(UserError, match="setting 'fast' is 'yes'; it takes true or false"):
        configure(Plain, {"fast": "yes"})


@dataclass(frozen=True)
class Plain:
    """The settings of a plug-in that does not inherit from `Settings`."""

    width: Annotated[int, Range(1, 8), "columns"] = 4
    fast: bool = False
