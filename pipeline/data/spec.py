"""Specs: the files data_manifests/<dataset>.yaml, and what the builders of manifests take from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.readers import LINE_LIMIT, line_error, text_lines
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.types import Split

_PACKAGE = Path(str(resources.files("pipeline")))
_INSTALLED_SPECS, _CHECKOUT_SPECS = _PACKAGE / "data_manifests", _PACKAGE.parent / "data_manifests"
SPEC_FOLDER = _INSTALLED_SPECS if _INSTALLED_SPECS.is_dir() else _CHECKOUT_SPECS
COUNTS_PROFILES = ("official", "fixture")
TEXT_AGGREGATES = ("join", "mean", "first", "random")  # how the texts of a sample become one vector
RECORDED_OPTIONS = (  # keys of a spec that are recorded in the manifest, because they decide how it was built
    "variant",
    "filter",
    "val_percent",
    "train_splits",
    "dedup_captions",
    "ingredients",
    "languages",
    "select",
    "splits",
    "split_seed",
    "numbers",
    "folder_labels",
    "merge_rows",
)
_REFUSED_TOKENS = (yaml.TagToken, yaml.AnchorToken, yaml.AliasToken, yaml.DirectiveToken)
_OPENING_TOKENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSING_TOKENS = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
MAX_YAML_DEPTH = 20  # nesting of lists and mappings; the time to scan a file grows with the square of it


def load_spec(dataset: str) -> dict[str, Any]:
    """Return the content of `data_manifests/<dataset>.yaml`; the file of a plug-in from outside stands beside its code.

    Raises:
        UserError: there is no such dataset; the message lists the datasets.
    """
    if plugins.is_external("datasets", dataset):
        plugins.get("datasets", dataset)  # refuses one without its yaml
        return parse_spec(plugins.source_file("datasets", dataset).with_suffix(".yaml"))
    choices = sorted(path.stem for path in SPEC_FOLDER.glob("*.yaml"))
    if dataset not in choices:
        raise unknown_choice(dataset, f"unknown dataset {dataset!r}", choices)
    return parse_spec(SPEC_FOLDER / f"{dataset}.yaml")


def parse_spec(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: with file and line, for anything but a mapping of plain values. Tags, anchors, aliases, directives and
            deep nesting are refused.
    """
    if path.stat().st_size > LINE_LIMIT:
        raise UserError(f"{path} is larger than {LINE_LIMIT} bytes")
    text = "".join(text_lines(path))
    try:
        refused, spec = _read_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise line_error(path, line, f"not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise line_error(path, text.count("\n", 0, error.position) + 1, f"not YAML: {error.reason}") from error
    except ValueError as error:  # a number with too many digits, or a date that does not exist
        raise UserError(f"{path}: not YAML that can be read: {str(error)[:80]}") from error
    if refused:
        message = "YAML tags, anchors, aliases, directives and deep nesting are not read"
        raise line_error(path, refused.start_mark.line + 1, message)
    if not isinstance(spec, dict):
        raise line_error(path, 1, "not a mapping of keys to values")
    return deepcopy(spec)


@lru_cache(maxsize=64)
def _read_yaml(text: str) -> tuple[yaml.Token | None, Any]:
    """Return the first refused token, or None, and the value; kept, because a command may ask a hundred times."""
    refused = _first_refused_token(text)
    return refused, None if refused else yaml.safe_load(text)


def _first_refused_token(text: str) -> yaml.Token | None:
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, _OPENING_TOKENS) - isinstance(token, _CLOSING_TOKENS)
        if isinstance(token, _REFUSED_TOKENS) or depth > MAX_YAML_DEPTH:
            return token
    return None


def manifest_meta(spec: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return the `meta` of a manifest.

    Args:
        spec: the spec of the dataset; its meaning and the options that the manifest is built with are taken from it.
        facts: more entries, found by the builder.

    Raises:
        UserError: the spec asks for a way to aggregate texts that does not exist.
    """
    if spec["text"]["aggregate"] not in TEXT_AGGREGATES:
        raise UserError(f"aggregate is {spec['text']['aggregate']!r}; choose one of: {', '.join(TEXT_AGGREGATES)}")
    kept = ["media_type", "text", "metrics", "licence", "attribution", *(["description"] if "description" in spec else [])]
    return {
        **{key: spec[key] for key in kept},
        "texts_recur": spec.get("texts_recur", True),  # refused only where the spec says so
        "options": {key: spec[key] for key in RECORDED_OPTIONS if key in spec},
        "val_remedy": validation_remedy(spec),
        **facts,
    }


def validation_remedy(spec: Mapping[str, Any]) -> str:
    """Return the option of `diffalign prepare` that makes a validation split, or "" if there is none."""
    if "val_percent" in spec:
        return "--set val_percent=10"
    return f"--set train_splits={spec['train_splits'][0]}" if len(spec.get("train_splits", ())) > 1 else ""


def held_out_percent(spec: Mapping[str, Any]) -> int:
    """Return the percentage of the training samples that becomes the validation split.

    Raises:
        UserError: it is not in 0..99.
    """
    if not 0 <= spec["val_percent"] < 100:
        raise UserError(f"val_percent is {spec['val_percent']}; it takes a whole number from 0 to 99")
    return spec["val_percent"]


def target_splits(spec: Mapping[str, Any], source_splits: Sequence[str]) -> dict[str, Split]:
    """Map every official split to a split of the manifest, as `spec["train_splits"]` says.

    Args:
        spec: the spec of the dataset.
        source_splits: the official names of the training, validation and test split, in this order.

    Raises:
        UserError: `train_splits` is neither the training split nor the training and the validation split.
    """
    train, validation, test = source_splits
    chosen = spec["train_splits"]
    if train not in chosen or not {train, validation}.issuperset(chosen):
        raise UserError(f"train_splits is {chosen}; choose [{train}] or [{train}, {validation}]")
    return {train: "train", validation: "train" if validation in chosen else "val", test: "test"}


def official_root(spec: Mapping[str, Any], root: Path | None) -> Path:
    """Return the absolute path of the folder of official files.

    Raises:
        UserError: no folder is given, or it is not a folder.
    """
    if root is None or not root.is_dir():
        raise UserError(f"{spec['name']} is built from its official files: give their folder, --root DIR (found {root})")
    return root.resolve()


def required_counts(spec: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the counts that the official files must have; a fixture (a small imitation for tests) has none.

    Raises:
        UserError: `counts_profile` is unknown.
    """
    if spec["counts_profile"] not in COUNTS_PROFILES:
        raise UserError(f"unknown counts_profile {spec['counts_profile']!r}; choose one of: {', '.join(COUNTS_PROFILES)}")
    return spec["counts"] if spec["counts_profile"] == "official" else {}
