"""The search spaces of `diffalign tune`: a YAML file with the values to try, such as data_manifests/spaces/heads.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.spec import SPEC_FOLDER, parse_spec
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.settings import field_types
from pipeline.studies.grid import Axes, read_axes

DEFAULT_SPACE = SPEC_FOLDER / "spaces" / "heads.yaml"
_PARTS = ("training", "newcomers", "methods")


@dataclass(frozen=True, kw_only=True)
class TuningSpace:
    """Values to try, by setting."""

    file: Path
    training: Mapping[str, Any]  # settings of training, of every method
    newcomers: Mapping[str, Any]  # settings of methods without an entry, where they have them
    methods: Mapping[str, Mapping[str, Any]]  # method -> settings of its own, or of training in place of the above

    def axes(self, method: str) -> Axes:
        """Return the values to try for a method: its entry, else its `grid` and `newcomers`; and the settings of training.

        Raises:
            UserError: a setting or a value is unknown; the message names the file and the method.
        """
        module = plugins.get("methods", method)
        own = self.methods.get(method)
        if own is None:
            known = field_types(module.Config)
            own = {**{field: values for field, values in self.newcomers.items() if field in known}, **module.grid}
        try:
            return read_axes(method, {**self.training, **own})
        except UserError as error:
            raise UserError(f"{self.file}, {method}: {error}") from error


def read_space(file: Path) -> TuningSpace:
    """Return the spaces in a file.

    Raises:
        UserError: the file has another form, or the methods would not be trained for the same number of epochs.
    """
    content = parse_spec(file)
    for key in content:
        if key not in _PARTS:
            raise unknown_choice(key, f"{file}: unknown part {key!r}", _PARTS)
    parts = {key: content.get(key) or {} for key in _PARTS}
    for name, part in {**parts, **(parts["methods"] if isinstance(parts["methods"], dict) else {})}.items():
        if not isinstance(part, dict):
            raise UserError(f"{file}: {name} must be a mapping SETTING: [VALUE, VALUE], not {part!r}")
    epochs = parts["training"].get("epochs")
    if (isinstance(epochs, list) and len(epochs) != 1) or any("epochs" in own for own in parts["methods"].values()):
        raise UserError(f"{file}: give one number of epochs, under training: all trials of all methods have equal budgets")
    return TuningSpace(file=file, **parts)
