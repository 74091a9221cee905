"""Settings as people type them: KEY=VALUE."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.runtime.errors import UserError


def parse_assignments(pairs: Iterable[str], option: str = "--set") -> dict[str, str]:
    """Return the values of KEY=VALUE pairs by key: {"lr": "1e-3"} from ["lr=1e-3"].

    Args:
        pairs: the values of the option.
        option: its name, for the error.

    Raises:
        UserError: a pair has another form, or a key is given twice.
    """
    result: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UserError(f"{option} takes KEY=VALUE, not {pair!r}")
        if key in result:
            raise UserError(f"{key!r} is given twice: {result[key]!r} and {value!r}")
        result[key] = value
    return result


def merge_settings(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of both mappings.

    Raises:
        UserError: a setting is in both.
    """
    for key in settings:
        if key in more:
            raise UserError(f"setting {key!r} is given twice: {settings[key]!r} and {more[key]!r}")
    return {**settings, **more}


def setting_text(value: Any) -> str:
    """Return a setting of a dataset or an encoder as the command line takes it: "true", "80,10,10", "0.5".

    Raises:
        UserError: it is a mapping, whose order would decide what it means.
    """
    if isinstance(value, Mapping):
        raise UserError(f"a setting is text, a number or a list, not {value!r}: give its values in the order of the setting")
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
