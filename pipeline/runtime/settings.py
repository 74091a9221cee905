"""Settings: a config declares each field once, with its range and its meaning; both are checked and printed from there.

@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    hidden: Annotated[int, Range(1, 65_536), "width of the MLP"] = 1024
    pooling: Annotated[Literal["cls", "mean"], "which tokens are the feature"] = "cls"

A config may have parts, fields that are configs themselves. A setting of a part has a name with a dot: `ema.tau`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError

ConfigT = TypeVar("ConfigT")
NO_LETTERS: Mapping[str, str] = {}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: finite, from `low` to `high`; an end belongs to the range unless it is open."""

    low: float
    high: float = math.inf
    _: KW_ONLY
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and abs(value) < math.inf

    def __str__(self) -> str:
        """Return the range as tables show it: "1..65536", ">= 0", "> 0, <= 1"."""
        if not (self.open_low or self.open_high or self.high == math.inf):
            return f"{self.low}..{self.high}"
        lower = f"{'>' if self.open_low else '>='} {self.low}"
        return lower if self.high == math.inf else f"{lower}, {'<' if self.open_high else '<='} {self.high}"

    def in_words(self) -> str:
        """Return the range as messages say it, after "must be": "in 1..65536", "positive", "above 0 and at most 1"."""
        if not (self.open_low or self.open_high or self.high == math.inf):
            return f"in {self.low}..{self.high}"
        if self == POSITIVE:
            return "positive"
        lower = f"{'above' if self.open_low else 'at least'} {self.low}"
        return lower if self.high == math.inf else f"{lower} and {'below' if self.open_high else 'at most'} {self.high}"

    def check(self, label: str, value: float) -> None:
        """Check that a value is in the range.

        Args:
            label: how the message calls the setting.
            value: its value.

        Raises:
            UserError: it is outside.
        """
        if value not in self:
            raise UserError(f"{label} must be {self.in_words()}, not {value}")


POSITIVE = Range(0, open_low=True)


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
        letters: the papers' letters, each with the name of its setting.
    """
    if key in field_types(config_type):
        return (key,)
    return (letters[key],) if key in letters else aliases_of(config_type).get(key, ())


def check_setting_name(config_type: type[Any], key: str, letters: Mapping[str, str] = NO_LETTERS) -> None:
    """Check that a spelling means a setting; see `find_settings`.

    Raises:
        UserError: it means none; the message lists the choices.
    """
    if not find_settings(config_type, key, letters):
        listed = [f"{letter} (= {name})" for letter, name in letters.items()]
        raise unknown_choice(key, f"unknown setting {key!r}", field_types(config_type), listed, also=aliases_of(config_type))


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
    named: dict[str, Any] = {}
    for key, value in flatten(settings).items():
        check_setting_name(config_type, key, letters)
        for name in find_settings(config_type, key, letters):
            if name in named:
                raise UserError(f"setting {name!r} is given twice{'' if key == name else f'; {key!r} names it, too'}")
            named[name] = value
    return named


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
    named = name_settings(config_type, settings, letters)
    return _build(config_type, {name: parse_setting(config_type, name, value) for name, value in named.items()})


def _build(config_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make a config from parsed values by name."""
    own = {name: value for name, value in values.items() if "." not in name}
    defaults = {setting.name: setting.default for setting in describe_settings(config_type)}
    for part, kind in _parts(config_type).items():
        inside = {name: value for name, value in {**defaults, **values}.items() if name.startswith(f"{part}.")}
        try:
            own[part] = _build(kind, {name.removeprefix(f"{part}."): value for name, value in inside.items()})
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
