"""What data_manifests/<dataset>.yaml says: read as plain values, and passed on to the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.lists import LINE_LIMIT, fault
from pipeline.types import Split

PROFILES = ("official", "fixture")


def parse_spec(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file; tags, anchors, aliases and directives are refused, with the line."""
    if path.stat().st_size > LINE_LIMIT:
        raise ValueError(f"{path} is larger than {LINE_LIMIT} bytes")
    text = path.read_text(encoding="utf-8")
    refused = (yaml.TagToken, yaml.AnchorToken, yaml.AliasToken, yaml.DirectiveToken)
    try:
        for token in yaml.scan(text):
            if isinstance(token, refused):
                raise fault(path, token.start_mark.line + 1, "YAML tags, anchors, aliases and directives are not read")
        spec = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise fault(path, line, f"not YAML: {error.problem}") from error
    if not isinstance(spec, dict):
        raise fault(path, 1, "not a mapping of keys to values")
    return spec


def describe(spec: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """A manifest's meta: what the spec says about its meaning, and the builder's facts."""
    kept = ("media_type", "text", "metrics", "licence", "attribution")
    options = ("variant", "filter", "val_percent", "train_splits", "dedup_captions", "ingredients")
    return {
        **{key: spec[key] for key in kept},
        "texts_recur": spec.get("texts_recur", False),
        "options": {key: spec[key] for key in options if key in spec},
        **facts,
    }


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
