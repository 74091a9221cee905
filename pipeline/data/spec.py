"""What data_manifests/<dataset>.yaml says: read as plain values, and passed on to the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.readers import LINE_LIMIT, fault, text_lines
from pipeline.types import Split

PROFILES = ("official", "fixture")
AGGREGATES = ("join", "mean", "first", "random")  # how the texts of a sample become one vector
OPTIONS = (  # those that a manifest says it was built with
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
)
REFUSED = (yaml.TagToken, yaml.AnchorToken, yaml.AliasToken, yaml.DirectiveToken)
OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
MAX_DEPTH = 20  # of lists and mappings inside each other: the time to scan grows with its square


def parse_spec(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; tags, anchors, aliases, directives and deep nesting are refused, with the line."""
    if path.stat().st_size > LINE_LIMIT:
        raise ValueError(f"{path} is larger than {LINE_LIMIT} bytes")
    text = "".join(text_lines(path))
    try:
        refused = _refused(text)
        spec = None if refused else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise fault(path, line, f"not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        raise fault(path, text.count("\n", 0, error.position) + 1, f"not YAML: {error.reason}") from error
    except ValueError as error:  # a number or a date that is none
        raise ValueError(f"{path}: not YAML that can be read: {str(error)[:80]}") from error
    if refused:
        raise fault(path, refused.start_mark.line + 1, "YAML tags, anchors, aliases, directives and deep nesting are not read")
    if not isinstance(spec, dict):
        raise fault(path, 1, "not a mapping of keys to values")
    return spec


def _refused(text: str) -> yaml.Token | None:
    """The first token that is not read."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if isinstance(token, REFUSED) or depth > MAX_DEPTH:
            return token
    return None


def describe_spec(spec: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """A manifest's meta: what the spec says about its meaning, the options it was built with, and the builder's facts.

    `ValueError` when the spec asks for an aggregation of texts that does not exist.
    """
    if spec["text"]["aggregate"] not in AGGREGATES:
        raise ValueError(f"aggregate is {spec['text']['aggregate']!r}; choose one of: {', '.join(AGGREGATES)}")
    kept = ("media_type", "text", "metrics", "licence", "attribution", "texts_recur")
    return {
        **{key: spec[key] for key in kept},
        "options": {key: spec[key] for key in OPTIONS if key in spec},
        "val_remedy": validation_remedy(spec),
        **facts,
    }


def validation_remedy(spec: Mapping[str, Any]) -> str:
    """What to add to `diffalign prepare` for a validation split, or ""."""
    if "val_percent" in spec:
        return "--set val_percent=10"
    return f"--set train_splits={spec['train_splits'][0]}" if len(spec.get("train_splits", ())) > 1 else ""


def held_out_percent(spec: Mapping[str, Any]) -> int:
    """The share of the training samples that is to become the validation split; `ValueError` outside 0..99."""
    if not 0 <= spec["val_percent"] < 100:
        raise ValueError(f"val_percent is {spec['val_percent']}; it takes a whole number from 0 to 99")
    return spec["val_percent"]


def target_splits(spec: Mapping[str, Any], source_splits: Sequence[str]) -> dict[str, Split]:
    """The manifest's split of every official one, of which the second is for validation, by `spec["train_splits"]`."""
    train, validation, test = source_splits
    chosen = spec["train_splits"]
    if train not in chosen or not {train, validation}.issuperset(chosen):
        raise ValueError(f"train_splits is {chosen}; choose [{train}] or [{train}, {validation}]")
    return {train: "train", validation: "train" if validation in chosen else "val", test: "test"}


def official_root(spec: Mapping[str, Any], root: Path | None) -> Path:
    """The folder of official files, absolute; `ValueError` when none is given or it is none."""
    if root is None or not root.is_dir():
        raise ValueError(f"{spec['name']} is built from its official files: give their folder, --root DIR (found {root})")
    return root.resolve()


def enforced_counts(spec: Mapping[str, Any]) -> Mapping[str, int]:
    """The counts that the official files must have; none of a miniature."""
    if spec["counts_profile"] not in PROFILES:
        raise ValueError(f"unknown counts_profile {spec['counts_profile']!r}; choose one of: {', '.join(PROFILES)}")
    return spec["counts"] if spec["counts_profile"] == "official" else {}
