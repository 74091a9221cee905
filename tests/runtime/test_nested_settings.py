"""Configs with parts: names with dots, aliases, nested values, and messages that name the part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest

from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunConfig
from pipeline.runtime.settings import (
    Range,
    Settings,
    aliases_of,
    configure,
    describe_settings,
    field_types,
    flatten,
    name_settings,
    short_name,
)


@dataclass(frozen=True, kw_only=True)
class Part(Settings):
    """A part with a rule between fields."""

    low: Annotated[int, Range(0), "smallest"] = 1
    high: Annotated[int, Range(0), "largest"] = 9
    kind: Annotated[Literal["a", "b"], "which"] = "a"

    def __post_init__(self) -> None:
        super().__post_init__()
        Range(self.low).check("high", self.high)


@dataclass(frozen=True, kw_only=True)
class Whole(Settings):
    """A config with two parts, of which one has another default."""

    one: Part = field(default_factory=Part)
    two: Part = field(default_factory=lambda: Part(high=5))
    speed: Annotated[float, Range(0), "how fast"] = 1.0

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {"low": ("one.low",), "kind": ("one.kind", "two.kind")}


# MARNet's settings as config.json of an earlier version has them, none of them the default
OLD = {
    "ce_min_step": 0.25, "draws": 8, "dropout_cdr": 0.3, "dropout_ema": 0.1, "eta": 0.5, "fusion": "hm", "hidden": 512,
    "label_loss": "bce", "learn_tau": True, "mse_reduction": "sum_dim", "num_steps": 900, "regime": "joint", "sample_steps": 20,
    "sampler": "ancestral", "scale": "global", "schedule": "cosine", "tau": 0.2, "train_min_step": 0.8, "w_ce_cdr": 2.0,
    "w_ce_ema": 0.5, "w_ita": 0.1, "w_mse": 0.3, "width": 384, "zero_start": True,
}  # fmt: skip
BOTH = {"scale": "global", "label_loss": "bce"}
NEW: dict[str, Any] = {
    "fusion": "hm",
    "regime": "joint",
    "crossfit": 0,
    "ema": {"width": 384, "w_ce": 0.5, "w_ita": 0.1, "tau": 0.2, "learn_tau": True, "dropout": 0.1, **BOTH},
    "cdr": {
        "num_steps": 900, "sampler": "ancestral", "sample_steps": 20, "eta": 0.5, "draws": 8, "zero_start": True,
        "denoiser": "mlp", "hidden": 512, "schedule": "cosine", "w_ce": 2.0, "w_mse": 0.3, "mse_reduction": "sum_dim",
        "ce_min_step": 0.25, "train_min_step": 0.8, "dropout": 0.3, "adapter": "none", "width": 512, **BOTH,
    },
}  # fmt: skip


def test_the_settings_of_parts_have_dots_and_the_defaults_of_the_whole() -> None:
    assert [(each.name, each.default) for each in describe_settings(Whole)] == [
        ("one.low", 1),
        ("one.high", 9),
        ("one.kind", "a"),
        ("two.low", 1),
        ("two.high", 5),
        ("two.kind", "a"),
        ("speed", 1.0),
    ]
    assert field_types(Whole)["two.kind"] == Literal["a", "b"]
    assert configure(Whole, {}) == Whole()
    assert configure(Whole, {"two.low": "2"}) == Whole(two=Part(low=2, high=5))


@pytest.mark.parametrize(
    "given",
    [{"one.low": 3, "one.kind": "b", "two.kind": "b"}, {"one": {"low": 3}, "kind": "b"}, {"low": "3", "kind": "b"}],
)
def test_names_nested_values_and_aliases_mean_the_same(given: dict[str, Any]) -> None:
    assert configure(Whole, given) == Whole(one=Part(low=3, kind="b"), two=Part(high=5, kind="b"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"low": 1, "one.low": 2}, "setting 'one.low' is given twice"),
        ({"one.low": 1, "low": 2}, "setting 'one.low' is given twice; 'low' names it, too"),
        ({"one": {"low": 1}, "L": 2}, "setting 'one.low' is given twice; 'L' names it, too"),
        ({"two.kind": "a", "kind": "a"}, "setting 'two.kind' is given twice; 'kind' names it, too"),
        ({"two.hihg": 1}, "unknown setting 'two.hihg'; choose one of: one.low, .*did you mean 'two.high'?"),
        ({"knd": 1}, r"unknown setting 'knd'; choose one of: one.low, .*, L \(= one.low\); did you mean 'kind'?"),
        ({"one": 1}, "unknown setting 'one'; choose one of: one.low"),
        ({"two.low": "x"}, "setting 'two.low' is 'x'; it takes a finite int"),
        ({"two.kind": "c"}, "setting 'two.kind' is 'c'; choose one of: a, b"),
        ({"two.low": -1}, "two: low must be at least 0, not -1"),
        ({"two.low": 6}, "two: high must be at least 6, not 5"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        configure(Whole, given, {"L": "one.low"})


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_a_config_survives_json_and_the_command_line(method: str) -> None:
    plugin = plugins.get("methods", method)
    config = configure(plugin.Config, plugin.small())
    stored = asdict(config)
    assert configure(plugin.Config, stored) == config
    assert configure(plugin.Config, {name: str(value) for name, value in flatten(stored).items()}) == config


def test_an_old_config_of_marnet_is_read() -> None:
    config = configure(plugins.get("methods", "marnet").Config, OLD)
    assert asdict(config) == {**NEW, "cdr": {**NEW["cdr"], "chain_steps": "trained"}}


def test_every_old_name_of_marnet_is_an_alias() -> None:
    config_type = plugins.get("methods", "marnet").Config
    assert set(OLD) == set(aliases_of(config_type)) | {"fusion", "regime"}
    for name, value in OLD.items():
        old, new = asdict(configure(config_type, {name: value})), asdict(config_type())
        changed = {key for key, each in flatten(old).items() if each != flatten(new)[key]}
        assert changed == set(name_settings(config_type, {name: value}))
        assert all(short_name(config_type, key) == name for key in changed if len(changed) == 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ema.label_loss": "bce"}, "the branches and their fusion have one label loss: set label_loss"),
        ({"cdr.adapter": "pca"}, "cdr.adapter must be none"),
        ({"cdr.sample_steps": 30, "T": 20}, r"cdr: sample_steps must be in 1\.\.20, not 30"),
        ({"tau": 0.001, "learn_tau": True}, r"ema: tau must be at least 0\.01, not 0\.001"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(given: dict[str, Any], message: str) -> None:
    plugin = plugins.get("methods", "marnet")
    with pytest.raises(UserError, match=f"^{message}"):
        configure(plugin.Config, given, plugin.symbols)


def test_a_setting_of_a_run_is_found_in_old_and_new_configs() -> None:
    facts: dict[str, Any] = {"training": {}, "caches": {}, "shapes": {}, "text_aggregate": "mean", "manifest": "m"}
    for settings in (OLD, NEW):
        config = RunConfig(dataset="d", method="marnet", settings=settings, **facts)
        assert [config.setting(name) for name in ("draws", "num_steps", "label_loss", "fusion")] == [8, 900, "bce", "hm"]
        assert config.setting("stages") is None
