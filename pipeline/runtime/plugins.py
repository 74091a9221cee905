"""Find and configure plug-ins: data sets, encoders and methods.

A plug-in is one file in the folder of its kind. Its name is the file's name without ".py". There is no registry.
"""

from __future__ import annotations

import ast
import importlib
import math
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

PACKAGES = {"datasets": "pipeline.data.datasets", "encoders": "pipeline.encoders", "methods": "pipeline.methods"}


def names(kind: str) -> list[str]:
    """Return the sorted names of the plug-ins of a kind.

    Files whose names begin with "_" are helpers and are left out. Only the (empty) package is imported, no plug-in.
    """
    package = importlib.import_module(PACKAGES[kind])
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def get(kind: str, name: str) -> ModuleType:
    """Import and return the module of a plug-in.

    Raises:
        ValueError: there is no such plug-in; the message lists the choices.
    """
    choices = names(kind)
    if name not in choices:
        raise ValueError(f"unknown {kind[:-1]} {name!r}; choose one of: {', '.join(choices)}")
    return importlib.import_module(f"{PACKAGES[kind]}.{name}")


def first_line(kind: str, name: str) -> str:
    """Return the first line of a plug-in's docstring without importing the plug-in."""
    return (ast.get_docstring(ast.parse(source(kind, name))) or "").splitlines()[0]


def source(kind: str, name: str) -> str:
    """Return the source code of a plug-in without importing it."""
    return (resources.files(PACKAGES[kind]) / f"{name}.py").read_text(encoding="utf-8")


@cache
def field_types(config_type: type[Any]) -> Mapping[str, Any]:
    """Return the annotated types of the fields of a config, by name."""
    return get_type_hints(config_type)


def configure(config_type: type[Any], settings: Mapping[str, Any], symbols: Mapping[str, str] | None = None) -> Any:
    """Make a config from settings.

    Args:
        config_type: the dataclass of the config.
        settings: values by field name or by the papers' letters. A value may be a string from the command line; it is
            parsed as the annotated type of the field.
        symbols: the papers' letters, each with the name of its field.

    Raises:
        ValueError: a setting is unknown (the message lists the choices), is given twice, or has a value of the wrong type.
    """
    symbols = symbols or {}
    hints = field_types(config_type)
    values: dict[str, Any] = {}
    for key, value in settings.items():
        field = symbols.get(key, key)
        if field not in hints:
            letters = [f"{letter} (= {name})" for letter, name in symbols.items()]
            raise ValueError(f"unknown setting {key!r}; choose one of: {', '.join([*hints, *letters])}")
        if field in values:
            raise ValueError(f"setting {field!r} is given twice")
        values[field] = parse_value(field, value, hints[field])
    return config_type(**values)


def parse_value(field: str, value: Any, hint: Any) -> Any:
    """Convert the value of a setting, possibly a string, to the annotated type of its field.

    Args:
        field: name of the setting, for messages.
        value: the value to convert.
        hint: the annotated type: a `Literal`, str, bool, int or float.

    Raises:
        ValueError: the value does not fit the type; the message says what the setting takes.
    """
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ValueError(f"setting {field!r} is {value!r}; choose one of: {', '.join(map(str, choices))}")
        return value
    if hint is str:
        return str(value)
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if hint in (int, float) and _is_number(value, whole=hint is int):
        return hint(float(value))
    raise ValueError(f"setting {field!r} is {value!r}; it takes a finite {hint.__name__}")


def _is_number(value: Any, whole: bool) -> bool:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return not isinstance(value, bool) and math.isfinite(number) and (not whole or number.is_integer())
