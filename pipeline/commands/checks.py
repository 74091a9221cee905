"""Checks of names that a command was given, before it imports torch: no function here imports a stage.

What a setting of a plug-in may be is known to the plug-in alone, so these are checked when torch is there, before a stage is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import (
    NO_LETTERS,
    Settings,
    describe_settings,
    find_settings,
    in_the_user_s_words,
    parse_setting,
    spellings,
)

if TYPE_CHECKING:
    from pipeline.types import Split


def check_method(method: str, preset: str = "head") -> None:
    """Check the names of a method and a preset.

    Raises:
        UserError: there is no such method or preset; the message lists the choices.
    """
    from pipeline.training.config import TRAINING_PRESETS

    plugins.check_name("methods", method)
    presets = [*TRAINING_PRESETS, "tuned"]
    if preset not in presets:
        raise unknown_choice(preset, f"unknown preset {preset!r}", presets)


def check_dataset(dataset: str, home: Path) -> None:
    """Check the name of a dataset: it has a builder, or `home` has its manifest or its runs.

    Raises:
        UserError: neither; the message lists the choices.
    """
    choices = sorted({*plugins.names("datasets"), *_datasets_in(home)})
    if dataset not in choices:
        there = _datasets_in(home)
        hint = f"in {home}: {', '.join(there)}" if there else f"nothing is prepared in {home}"
        hint = hint if home.is_dir() else f"there is no folder {home}: --home says where yours are"
        raise unknown_choice(dataset, f"unknown dataset {dataset!r}", choices, hint=hint)


def check_reported_dataset(dataset: str, home: Path) -> None:
    """Check the name of a dataset of which something is in `home`: its manifest or its runs.

    Raises:
        UserError: there is nothing of it; the message lists those that have runs, or says what comes first.
    """
    if dataset in _datasets_in(home):
        return
    choices = _datasets_with_runs(home)
    if choices:
        raise unknown_choice(dataset, f"{home} has no runs of {dataset!r}", choices)
    check_dataset(dataset, home)
    there = f"{home} has no runs" if home.is_dir() else f"there is no folder {home} (--home says where yours is)"
    raise UserError(f"{there}; to train heads on {dataset}, begin with: diffalign prepare {dataset}")


def _datasets_in(home: Path) -> list[str]:
    return sorted({*(path.stem for path in (home / "manifests").glob("*.parquet")), *_datasets_with_runs(home)})


def _datasets_with_runs(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob("runs/*"))


def check_split(split: str) -> Split:
    """Check and return the name of a split.

    Raises:
        UserError: it is none of train, val and test.
    """
    from pipeline.types import SPLITS

    for known in SPLITS:
        if split == known:
            return known
    raise unknown_choice(split, f"unknown split {split!r}", SPLITS)


def check_file(path: Path | None, option: str) -> None:
    """Check that a file is there; None is an option that was not given.

    Raises:
        UserError: there is no such file.
    """
    if path is not None and not path.is_file():
        raise UserError(f"{option}: {path} is no file")


def check_unused(given: Mapping[str, bool], reason: str) -> None:
    """Refuse options that would change nothing.

    Args:
        given: Whether an option was given, by its name.
        reason: What the option belongs to, and the remedy.

    Raises:
        UserError: one of them was given; the message names it.
    """
    for option in (option for option, is_given in given.items() if is_given):
        raise UserError(f"{option} {reason}")


def check_given_settings(config_type: type[Any], given: Mapping[str, str], letters: Mapping[str, str] = NO_LETTERS) -> None:
    """Check the names and the values of settings that were given; rules between settings are checked with the config.

    Args:
        config_type: The dataclass of the config.
        given: Values as text, by name, alias or letter.
        letters: The papers' letters, each with the name of its setting.

    Raises:
        UserError: there is no such setting, and the message lists the choices; or it does not take this value.
    """
    declared = {setting.name: setting for setting in describe_settings(config_type)}
    for name, word in spellings(config_type, given, letters).items():
        said = in_the_user_s_words(name, word)
        label = config_type.label_of(said) if issubclass(config_type, Settings) else said
        declared[name].check(label, parse_setting(config_type, name, given[word], word))


def check_method_settings(method: str, settings: Mapping[str, str]) -> None:
    """Check what --set gives to a method, see `check_given_settings`.

    Raises:
        UserError: there is no such setting, it is one of training, or it does not take this value.
    """
    from pipeline.training.config import TrainConfig

    plugin = plugins.get("methods", method)
    for name, value in settings.items():
        if not find_settings(plugin.Config, name, plugin.symbols) and find_settings(TrainConfig, name):
            raise UserError(f"{name!r} is a setting of training, not of {method}: say --train {name}={value}")
    check_given_settings(plugin.Config, settings, plugin.symbols)
