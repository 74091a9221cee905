"""`diffalign methods NAME` and `encoders NAME`: every fact about a setting is printed, and the old keys of --json stay."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
from helpers.command_line import run

from pipeline.commands.plugin_table import settings_table
from pipeline.runtime import plugins
from pipeline.runtime.settings import aliases_of, describe_settings, flatten
from pipeline.training.config import TrainConfig
from pipeline.training.heads import resolve_head_settings

NAMED = [(kind, name) for kind in ("methods", "encoders") for name in plugins.names(kind)]


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_json_has_the_defaults_and_the_facts(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([kind, name, "--json"], monkeypatch) == 0
    described = json.loads(capsys.readouterr().out)
    plugin = plugins.get(kind, name)
    defaults = flatten(asdict(plugin.Config()))
    assert {key: described[key] for key in defaults} == defaults
    assert set(described) == {"about", "fields", "aliases", *defaults} | ({"letters", "grid"} if kind == "methods" else set())
    assert {each["name"]: each["default"] for each in described["fields"]} == defaults
    assert all(each["meaning"] for each in described["fields"])
    if kind == "methods":
        assert {each["letter"]: each["name"] for each in described["fields"] if each["letter"]} == dict(plugin.symbols)
    assert described["aliases"] == {alias: list(names) for alias, names in aliases_of(plugin.Config).items()}


@pytest.mark.parametrize(("kind", "name"), NAMED)
def test_the_page_shows_every_fact(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert run([kind, name], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    plugin = plugins.get(kind, name)
    for setting in describe_settings(plugin.Config):
        row = next(line for line in lines if line.startswith(f"{setting.name} "))
        assert row.endswith(f"  {setting.meaning}")
        if setting.range:
            assert f"  {setting.type.__name__} {setting.range}  " in row
    for alias, names in aliases_of(plugin.Config).items():
        assert f"{alias} = {', '.join(names)}" in "; ".join(line.strip(" ;") for line in lines).split("; ")
    for field, values in plugin.grid.items() if kind == "methods" else ():
        assert f"  {field}: {', '.join(map(str, values))}" in lines
    if kind == "methods":
        _, training = resolve_head_settings("openmoji", name, "paper", {}, {})
        changed = plugin.paper | dict(asdict(training).items() - asdict(TrainConfig()).items())
        listed = next(line for line in lines if line.startswith("as in the paper")).rpartition(": ")[2]
        assert sorted(listed.split(", ")) == sorted(f"{key}={value}" for key, value in changed.items())


def test_a_page_of_a_method() -> None:
    described = {each.name: each for each in describe_settings(plugins.get("methods", "seda").Config)}
    chosen = [described[name] for name in ("num_steps", "residual", "interaction")]
    assert settings_table(chosen, {"T": "num_steps"}, 100) == [
        "setting      letter  default          values                       meaning",
        "num_steps    T       1500             int 1..100000                T, steps of the diffusion",
        "residual             visual           visual | text | both | none  added to PFIN's attention:",
        "                                                                   visual: a linear map of the",
        "                                                                   image, text: the noisy text; eq.",
        "                                                                   2 has none",
        "interaction          cross_attention  concat | self_attention |    of image and text in PFIN (Table",
        "                                      multimodal_transformer |     3)",
        "                                      cross_attention",
    ]


def test_settings_of_training_are_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "--training"], monkeypatch) == 0
    printed = capsys.readouterr().out
    assert run(["methods", "--training", "--json"], monkeypatch) == 0
    described = json.loads(capsys.readouterr().out)["fields"]
    assert [each["name"] for each in described] == [field.name for field in fields(TrainConfig)]
    assert all(each["meaning"] and each["name"] in printed for each in described)
