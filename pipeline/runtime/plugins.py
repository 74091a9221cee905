"""A plug-in is a file: its name is the file's stem, and there is no registry to keep."""

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
    """Sorted names of the plug-ins of a kind; nothing is imported but the (empty) package, and `_helper` files are none."""
    package = importlib.import_module(PACKAGES[kind])
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def get(kind: str, name: str) -> ModuleType:
    """The plug-in's module; `ValueError` with the choices when there is none."""
    choices = names(kind)
    if name not in choices:
        raise ValueError(f"unknown {kind[:-1]} {name!r}; choose one of: {', '.join(choices)}")
    return importlib.import_module(f"{PACKAGES[kind]}.{name}")


def first_line(kind: str, name: str) -> str:
    """The first line of the plug-in's documentation, read without importing what it imports."""
    return (ast.get_docstring(ast.parse(source(kind, name))) or "").splitlines()[0]


def source(kind: str, name: str) -> str:
    """The source code of a plug-in, read without importing what it imports."""
    return (resources.files(PACKAGES[kind]) / f"{name}.py").read_text(encoding="utf-8")


@cache
def field_types(config_type: type[Any]) -> Mapping[str, Any]:
    """The annotated types of a config's fields, resolved once."""
    return get_type_hints(config_type)


def configure(config_type: type[Any], settings: Mapping[str, Any], symbols: Mapping[str, str] | None = None) -> Any:
    """A config from settings given by field name or by the papers' letters; `ValueError` names the key and the choices.

    Values may be strings from a command line: they are read as the field's annotated type.
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
    """A setting's value as its annotated type, also from a string; `ValueError` names what it takes."""
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
