"""Settings: a config declares each field once, with its range and its meaning; both are checked and printed from there.

@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    hidden: Annotated[int, Range(1, 65_536), "width of the MLP"] = 1024
    pooling: Annotated[Literal["cls", "mean"], "which tokens are the feature"] = "cls"

A config may have parts, fields that are configs themselves. A setting of a part has a name with a dot: `ema.tau`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.ranges import POSITIVE as POSITIVE  # part of this module's interface
from pipeline.runtime.ranges import Range as Range
from pipeline.runtime.ranges import SettingError, setting_error

ConfigT = TypeVar("ConfigT")
NO_LETTERS: Mapping[str, str] = {}
# the papers' letters, as configs name them
GREEK = str.maketrans({"α": "alpha", "β": "beta", "γ": "gamma", "τ": "tau", "₁": "1", "₂": "2"})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the declaration of one field says."""

    name: str  # with a dot if it is a field of a part
    type: Any  # the annotated type without the facts about it: a `Literal`, str, bool, int or float
    default: Any  # `dataclasses.MISSING` if it must be given
    range: Range | None  # of numbers
    choices: tuple[Any, ...]  # of a `Literal`; else empty
    meaning: str

    @property
    def values(self) -> str:
        """Which values the setting takes, for people: "int 1..65536", "cls | mean", "true | false"."""
        if self.choices:
            return " | ".join(map(str, self.choices))
        if self.type is bool:
            return "true | false"
        name = "text" if self.type is str else self.type.__name__
        return f"{name} {self.range}" if self.range else name

    def check(self, label: str, value: Any) -> None:
        """Check that a value is in the range or among the choices.

        Args:
            label: how the message calls the setting.
            value: its value.

        Raises:
            UserError: it is not.
        """
        if self.range:
            self.range.check(label, value)
        if self.choices:
            _check_choice(self.name, value, self.choices)


def check_settings(config: Any, label_of: Callable[[str], str] = str) -> None:
    """Check every field of a config against its range or choices.

    Args:
        config: the config.
        label_of: returns how messages about ranges call a field.

    Raises:
        UserError: a field has another value.
    """
    for setting in describe_settings(type(config)):
        if "." not in setting.name:  # a part checks itself
            setting.check(label_of(setting.name), getattr(config, setting.name))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of configs: when one is built, every field is checked against its range or choices.

    A config is a frozen keyword-only dataclass. The type of a field is `Annotated[type, Range(…), "meaning"]`; a `Literal`, and
    a field that takes every value of its type, have no range. Rules between fields go to `__post_init__`, after
    `super().__post_init__()`. A part is a field whose type is a config, with a default factory; it checks itself.
    """

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # other spellings, each with the settings that it names
    old_values: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # setting -> lower-case earlier values, with those of today
    old_defaults: ClassVar[Mapping[str, Any]] = {}  # setting -> what runs of earlier versions did, which may not name it

    def __post_init__(self) -> None:
        check_settings(self, self.label_of)

    @staticmethod
    def label_of(field: str) -> str:
        """Return how messages about ranges call a field: its name, unless a config says otherwise."""
        return field

    def recorded(self) -> dict[str, Any]:
        """Return the settings as the config of a run names them; what changes nothing may be left out."""
        return {field.name: recorded_settings(getattr(self, field.name)) for field in fields(self)}


def recorded_settings(config: Any) -> Any:
    """Return `Settings.recorded` of a config, all fields of a dataclass that is no `Settings`, and any other value as it is."""
    if isinstance(config, Settings):
        return config.recorded()
    return asdict(config) if is_dataclass(config) and not isinstance(config, type) else config


@cache
def describe_settings(config_type: type[Any]) -> tuple[Setting, ...]:
    """Return what the fields of a config and of its parts declare, in their order.

    A type alias may carry facts, and a field may add to them: of several ranges or meanings, the last one counts.
    """
    hints = get_type_hints(config_type, include_extras=True)
    settings: list[Setting] = []
    for field in fields(config_type):
        kind, _ = _split(hints[field.name])
        if is_dataclass(kind):
            assert callable(field.default_factory), f"{field.name} of {config_type} needs a default factory"
            defaults = flatten(asdict(field.default_factory()))
            settings += [
                replace(each, name=f"{field.name}.{each.name}", default=defaults[each.name]) for each in describe_settings(kind)
            ]
        else:
            settings.append(_describe(field.name, field.default, hints[field.name]))
    return tuple(settings)


@cache
def _parts(config_type: type[Any]) -> dict[str, type[Any]]:
    """Return the fields of a config that are configs themselves, each with its type."""
    return {name: kind for name, kind in get_type_hints(config_type).items() if isinstance(kind, type) and is_dataclass(kind)}


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without nesting: {"ema": {"tau": 0.1}} becomes {"ema.tau": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inside = flatten(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inside is None else {f"{name}.{each}": inside[each] for each in inside}
    return flat


def _describe(name: str, default: Any, hint: Any) -> Setting:
    kind, facts = _split(hint)
    ranges = [fact for fact in facts if isinstance(fact, Range)]
    meanings = [fact for fact in facts if isinstance(fact, str)]
    return Setting(
        name=name,
        type=kind,
        default=default,
        range=ranges[-1] if ranges else None,
        choices=get_args(kind) if get_origin(kind) is Literal else (),
        meaning=meanings[-1] if meanings else "",
    )


def _split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a type and the facts that `Annotated` adds to it."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def field_types(config_type: type[Any]) -> Mapping[str, Any]:
    """Return the types of the settings of a config, by name, without ranges and meanings."""
    return {setting.name: setting.type for setting in describe_settings(config_type)}


def find_settings(config_type: type[Any], key: str, letters: Mapping[str, str] = NO_LETTERS) -> tuple[str, ...]:
    """Return the names of the settings that a spelling means: an alias may mean several, an unknown word means none.

    Args:
        config_type: the dataclass of the config.
        key: a name, an alias of the config, or one of the papers' letters.
        letters: the papers' letters, each with the name of its setting; Greek ones may be typed as such.
    """
    if key in field_types(config_type):
        return (key,)
    letter = key.translate(GREEK)
    return (letters[letter],) if letter in letters else aliases_of(config_type).get(key, ())


def check_setting_name(config_type: type[Any], key: str, letters: Mapping[str, str] = NO_LETTERS) -> None:
    """Check that a spelling means a setting; see `find_settings`.

    Raises:
        UserError: it means none; the message lists the choices.
    """
    if not find_settings(config_type, key, letters):
        listed = [f"{letter} (= {name})" for letter, name in letters.items()]
        also = [*aliases_of(config_type), *letters]
        raise unknown_choice(key, f"unknown setting {key!r}", field_types(config_type), listed, also=also)


def aliases_of(config_type: type[Any]) -> Mapping[str, tuple[str, ...]]:
    """Return the aliases of a config; one that is no `Settings` has none."""
    return getattr(config_type, "aliases", {})


def old_defaults_of(config_type: type[Any]) -> dict[str, Any]:
    """Return the old defaults of a config and of its parts, by the names of the settings."""
    inside = {
        f"{part}.{name}": value for part, kind in _parts(config_type).items() for name, value in old_defaults_of(kind).items()
    }
    return {**inside, **getattr(config_type, "old_defaults", {})}


def configure_run(config_type: type[ConfigT], settings: Mapping[str, Any], changes: Mapping[str, Any] = NO_LETTERS) -> ConfigT:
    """Make the config of a run from the settings in its folder; those that it was trained without have their old defaults.

    Args:
        config_type: the dataclass of the config.
        settings: the run's settings, as `name_settings` takes them.
        changes: values by name that replace them.

    Raises:
        UserError: as in `configure`.
    """
    return configure(config_type, {**old_defaults_of(config_type), **name_settings(config_type, settings), **changes})


def short_name(config_type: type[Any], name: str) -> str:
    """Return the alias of a setting that means nothing else, or the name where there is none."""
    return next((alias for alias, names in aliases_of(config_type).items() if names == (name,)), name)


def name_settings(
    config_type: type[Any], settings: Mapping[str, Any], letters: Mapping[str, str] = NO_LETTERS
) -> dict[str, Any]:
    """Return settings by their names, with their values as they are.

    Args:
        config_type: the dataclass of the config.
        settings: values by name, alias or letter; the settings of a part may be a mapping.
        letters: the papers' letters, each with the name of its setting.

    Raises:
        UserError: a setting is unknown, or is given twice.
    """
    values = flatten(settings)
    return {name: values[key] for name, key in spellings(config_type, values, letters).items()}


def spellings(config_type: type[Any], keys: Iterable[str], letters: Mapping[str, str] = NO_LETTERS) -> dict[str, str]:
    """Return the settings that spellings mean, by name, each with its spelling; see `name_settings` for the errors."""
    typed: dict[str, str] = {}
    for key in keys:
        check_setting_name(config_type, key, letters)
        for name in find_settings(config_type, key, letters):
            if name in typed:
                other = typed[name] if key == name else key
                raise UserError(f"setting {name!r} is given twice; {other!r} names it, too")
            typed[name] = key
    return typed


def in_the_user_s_words(name: str, word: str) -> str:
    """Return what messages call a setting that was typed as `word`: that word, or the name if it ends in it ("ema.tau")."""
    return name if name.rpartition(".")[2] == word else word


def configure(config_type: type[ConfigT], settings: Mapping[str, Any], letters: Mapping[str, str] = NO_LETTERS) -> ConfigT:
    """Make a config from settings.

    Args:
        config_type: the dataclass of the config.
        settings: values as `name_settings` takes them. A value may be a string from the command line; it is parsed as the
            annotated type of the field.
        letters: the papers' letters, each with the name of its setting.

    Raises:
        UserError: a setting is unknown (the message lists the choices), is given twice, has a value of the wrong type, or one
            that the config refuses.
    """
    values = flatten(settings)
    typed = spellings(config_type, values, letters)
    try:
        return _build(config_type, {name: parse_setting(config_type, name, values[key], key) for name, key in typed.items()})
    except SettingError as error:
        if error.name in typed:
            word = in_the_user_s_words(error.name, typed[error.name])
            raise UserError(str(error) if word == error.name else f"{word} {error.fault}") from error
        is_default = error.name in field_types(config_type)
        raise UserError(f"{error}, its default: set it, too" if is_default else str(error)) from error


def _build(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make a config from parsed values by name."""
    own = {name: value for name, value in values.items() if "." not in name}
    defaults = {setting.name: setting.default for setting in describe_settings(config_type)}
    for part, kind in _parts(config_type).items():
        inside = {name: value for name, value in {**defaults, **values}.items() if name.startswith(f"{part}.")}
        try:
            own[part] = _build(kind, {name.removeprefix(f"{part}."): value for name, value in inside.items()})
        except SettingError as error:
            raise setting_error(f"{part}.{error.name}", error.fault, f"{part}: {error}") from error
        except UserError as error:
            raise UserError(f"{part}: {error}") from error
    config = config_type(**own)
    if not isinstance(config, Settings):  # a plain dataclass of a plug-in does not check itself
        check_settings(config)
    return config


def parse_setting(config_type: type[Any], name: str, value: Any, label: str = "") -> Any:
    """Convert the value of a setting of a config, as `parse_value` does; values of earlier versions become those of today.

    Messages call the setting `label`, or by its name.
    """
    today = getattr(config_type, "old_values", {}).get(name, {})
    return parse_value(label or name, today.get(str(value).lower(), value), field_types(config_type)[name])


def parse_value(field: str, value: Any, hint: Any) -> Any:
    """Convert the value of a setting, possibly a string, to the annotated type of its field.

    Args:
        field: name of the setting, for messages.
        value: the value to convert.
        hint: the annotated type: a `Literal`, str, bool, int or float, with or without facts about it.

    Raises:
        UserError: the value does not fit the type; the message says what the setting takes.
    """
    kind, _ = _split(hint)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        value = next((choice for choice in choices if value == str(choice)), value)  # 2 for "2" of the command line
        _check_choice(field, value, choices)
        return value
    if kind is str:
        return str(value)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float) and _is_number(value, whole=kind is int):
        return kind(float(value))
    takes = "true or false" if kind is bool else f"a finite {kind.__name__}"
    raise UserError(f"setting {field!r} is {value!r}; it takes {takes}")


def _check_choice(field: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise unknown_choice(value, f"setting {field!r} is {value!r}", choices)


def _is_number(value: Any, whole: bool) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool) and math.isfinite(number) and (not whole or number.is_integer())
