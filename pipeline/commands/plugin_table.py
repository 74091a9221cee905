"""What `diffalign methods`, `encoders` and `datasets` print about plug-ins: their names, or the settings of one as a table."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from pipeline.commands.options import show
from pipeline.runtime import plugins
from pipeline.runtime.settings import Setting, aliases_of, describe_settings
from pipeline.training.config import TrainConfig, paper_training

MAX_VALUES_WIDTH = 34  # characters of the column of values; what is longer is wrapped
MIN_MEANING_WIDTH = 30
NO_BREAK = "\N{NO-BREAK SPACE}"
DEFAULT_TERMINAL = (120, 24)  # columns and rows, where the output is no terminal


def describe_plugin(kind: str, name: str) -> dict[str, Any]:
    """Return a description of one plug-in or of all plug-ins of a kind, as plain JSON values.

    Args:
        kind: "methods", "encoders" or "datasets".
        name: The name of a method or an encoder, or "".

    Returns:
        Without a name, the first line of the documentation of each plug-in, by name. With a name, "about", the default of each
        setting by name, "fields", a list with the facts about each setting, and "aliases", other names, each with the settings
        that it means; for a method, "letters" and "grid", too.
    """
    if not name:
        return {found: plugins.first_line(kind, found) for found in plugins.names(kind)}
    plugin = plugins.get(kind, name)
    settings = describe_settings(plugin.Config)
    symbols = plugin.symbols if kind == "methods" else {}
    described: dict[str, Any] = {"about": " ".join(plugins.documentation(kind, name).split())}
    described |= {setting.name: setting.default for setting in settings}
    described["fields"] = [_facts(setting, symbols) for setting in settings]
    described["aliases"] = {alias: list(names) for alias, names in aliases_of(plugin.Config).items()}
    if kind == "methods":
        described |= {
            "letters": dict(symbols),
            "grid": {key: list(values) for key, values in plugin.grid.items()},
        }
    return described


def _facts(setting: Setting, symbols: Mapping[str, str]) -> dict[str, Any]:
    return {
        "name": setting.name,
        "letter": _letter(setting.name, symbols),
        "type": "choice" if setting.choices else setting.type.__name__,
        "default": setting.default,
        "range": str(setting.range or ""),
        "choices": list(setting.choices),
        "meaning": setting.meaning,
    }


def _letter(field: str, symbols: Mapping[str, str]) -> str:
    """Return the papers' letter for a setting, or ""."""
    return next((letter for letter, name in symbols.items() if name == field), "")


def show_plugin(kind: str, name: str, as_json: bool) -> None:
    """Print what `describe_plugin` returns, as JSON or for people."""
    if as_json or not name:
        show(describe_plugin(kind, name), as_json)
    else:
        print("\n".join(_page(kind, name, shutil.get_terminal_size(DEFAULT_TERMINAL).columns)))


def show_settings(config_type: type[Any], as_json: bool) -> None:
    """Print the settings of a config, as JSON or as a table."""
    settings = describe_settings(config_type)
    if as_json:
        show({"fields": [_facts(setting, {}) for setting in settings]}, as_json)
    else:
        print("\n".join(settings_table(settings, {}, shutil.get_terminal_size(DEFAULT_TERMINAL).columns)))


def _page(kind: str, name: str, width: int) -> list[str]:
    """Return the lines about a plug-in: its documentation, the table of its settings, their aliases, and the paper's grid."""
    plugin = plugins.get(kind, name)
    symbols = plugin.symbols if kind == "methods" else {}
    paragraphs = plugins.documentation(kind, name).split("\n\n")
    lines = [line for text in paragraphs for line in [*textwrap.wrap(" ".join(text.split()), width), ""]]
    lines += settings_table(describe_settings(plugin.Config), symbols, width)
    aliases = [f"{alias} = {', '.join(names)}".replace(" ", NO_BREAK) for alias, names in aliases_of(plugin.Config).items()]
    if aliases:
        wrapped = textwrap.wrap("; ".join(aliases), width, initial_indent="  ", subsequent_indent="  ")
        lines += ["", "other names of these settings:", *(line.replace(NO_BREAK, " ") for line in wrapped)]
    if kind == "methods":
        training, default = paper_training(plugin), asdict(TrainConfig())
        of_paper = {**plugin.paper, **{key: value for key, value in training.items() if value != default[key]}}
        listed = ", ".join(f"{key}={value}" for key, value in of_paper.items())
        lines += ["", f"as in the paper, where the default is another (--preset paper): {listed}"]
    if kind == "methods" and plugin.grid:
        lines += ["", "the papers' grid (diffalign grid --grid papers):"]
        lines += [f"  {field}: {', '.join(map(str, values))}" for field, values in plugin.grid.items()]
    return lines


def settings_table(settings: Sequence[Setting], symbols: Mapping[str, str], width: int) -> list[str]:
    """Return a table of settings as lines: name, the papers' letter if there is any, default, values, meaning.

    Args:
        settings: The settings, one row each.
        symbols: The papers' letters, each with the name of its setting.
        width: Characters of a line; the last column is wrapped to it.
    """
    rows = [("setting", "letter", "default", "values", "meaning")]
    rows += [(each.name, _letter(each.name, symbols), _as_typed(each.default), each.values, each.meaning) for each in settings]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    widths[3] = max(len(line) for row in rows for line in _wrap(row[3], MAX_VALUES_WIDTH))
    shown = [0, 1, 2, 3, 4] if symbols else [0, 2, 3, 4]
    widths[4] = max(width - sum(widths[column] + 2 for column in shown[:-1]), MIN_MEANING_WIDTH)
    lines = []
    for row in rows:
        cells = [_wrap(row[column], widths[column]) for column in shown]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = [part.ljust(widths[column]) for part, column in zip(parts, shown, strict=True)]
            lines.append("  ".join(padded).rstrip())
    return lines


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a cell, at least one; words stay whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _as_typed(value: Any) -> str:
    """Return a value as users type it: "true" for True."""
    return str(value).lower() if isinstance(value, bool) else str(value) or '""'
