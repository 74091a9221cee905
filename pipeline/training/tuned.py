"""Tuned settings, which were chosen on validation: those that a home has found itself, else those that ship with the dataset.

Both stand in a YAML file under the key `tuned`, by method:

    tuned:
      ema:
        settings: {tau: 0.2}      # of the method
        training: {lr: 0.003}     # of `TrainConfig`
        selection: {score: 58.9}  # how they were chosen, see `diffalign tune`; for people, and to choose them again
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.manifest_files import read_plugin
from pipeline.data.spec import load_spec, parse_spec
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock, write_atomic

_HEADER = "# Written by `diffalign tune {dataset}`; `--preset tuned` reads it before data_manifests/{plugin}.yaml.\n"


def tuned_path(home: Path, dataset: str) -> Path:
    """Return the file with a home's own tuned settings of a dataset."""
    return home / "tuned" / f"{dataset}.yaml"


def read_tuned(dataset: str, method: str, home: Path | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the tuned settings of a method and of its training; see `read_tuned_entry`."""
    entry = read_tuned_entry(dataset, method, home)
    return entry.get("settings", {}), entry.get("training", {})


def has_tuned(dataset: str, method: str, home: Path) -> bool:
    """Whether the home, or else the dataset's own yaml, has tuned settings of a method.

    Raises:
        UserError: a file is damaged.
    """
    return method in read_tuned_file(home, dataset) or method in load_spec(read_plugin(home, dataset)).get("tuned", {})


def read_tuned_entry(dataset: str, method: str, home: Path | None) -> Mapping[str, Any]:
    """Return the tuned entry of a method.

    Args:
        dataset: The name of a dataset.
        method: The name of a method.
        home: Its file `<home>/tuned/<dataset>.yaml` counts before the dataset's own yaml; None: only the latter is read.

    Raises:
        UserError: neither file has settings of the method, or a file is damaged.
    """
    own = read_tuned_file(home, dataset) if home else {}
    if method in own:
        return own[method]
    plugin = read_plugin(home, dataset) if home else dataset
    shipped = load_spec(plugin).get("tuned", {})
    if method not in shipped:
        raise UserError(
            f"data_manifests/{plugin}.yaml has no tuned settings for {method!r}; use --preset head or paper, "
            f"or find some with: diffalign tune {dataset} --methods {method}"
        )
    return shipped[method]


def read_tuned_file(home: Path, dataset: str) -> dict[str, Mapping[str, Any]]:
    """Return a home's own tuned entries of a dataset by method; empty when it has none.

    Raises:
        UserError: the file is not of the form that this module describes.
    """
    path = tuned_path(home, dataset)
    entries = parse_spec(path).get("tuned") if path.is_file() else {}
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        raise UserError(f"{path} is no file of tuned settings; delete it and run: diffalign tune {dataset}")
    return entries


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key, {}), dict) for key in ("settings", "training"))


def write_tuned(home: Path, dataset: str, entries: Mapping[str, Mapping[str, Any]]) -> Path:
    """Add entries by method to a home's own tuned settings of a dataset, in place of earlier ones, and return the file."""
    path = tuned_path(home, dataset)
    with lock(path.parent, wait=True):
        header = _HEADER.format(dataset=dataset, plugin=read_plugin(home, dataset))
        write_atomic(path, header + format_tuned({**read_tuned_file(home, dataset), **entries}))
    return path


def format_tuned(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return entries by method as YAML, in the form that data_manifests/<dataset>.yaml holds."""
    content = {"tuned": dict(entries)}
    return yaml.dump(content, Dumper=_Dumper, default_flow_style=None, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes a value again where it occurs again: `parse_spec` refuses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
