"""A dataset's metadata for others: Croissant JSON-LD, and a dataset card in the layout of the Hugging Face Hub.

Croissant 1.0: https://docs.mlcommons.org/croissant/docs/croissant-spec.html. The folder holds the manifest's table, no media.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.manifest import Manifest, split_counts
from pipeline.data.manifest_files import manifest_path
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256, write_atomic

CROISSANT = "http://mlcommons.org/croissant/1.0"
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
SPLIT_TYPES = {"train": "cr:TrainingSplit", "val": "cr:ValidationSplit", "test": "cr:TestSplit"}
FIELDS = (  # column of the manifest, its type, whether it is a list, what it is
    ("sample_id", "sc:Text", False, "Name of the sample."),
    ("split", "sc:Text", False, "train, val or test."),
    ("media_path", "sc:Text", False, "Path of the picture or clip below the folder of the media."),
    ("label_ids", "sc:Integer", True, "Classes of the sample, counted from 0."),
    ("texts", "sc:Text", True, "Texts of the sample; those of val and test are not for prediction."),
    ("group_id", "sc:Text", False, "Samples of one group are in one split; empty where each sample is its own group."),
)


def write_card(manifest: Manifest, home: Path, folder: Path) -> list[Path]:
    """Write `croissant.json`, `README.md` (the dataset card) and the manifest's table into a folder.

    Args:
        manifest: the manifest, as it was read from `home`.
        home: the folder of all artifacts.
        folder: where to write; it is created.

    Returns:
        The three files.

    Raises:
        UserError: the folder has a README.md that is no card of this program, or is that of the manifests.
    """
    card = folder / "README.md"
    if card.is_file() and "diffalign" not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{card} is there already and was written by somebody else: give another folder")
    table, source = folder / f"{manifest.dataset}.parquet", manifest_path(home, manifest.dataset, "parquet")
    if table.exists() and table.samefile(source):
        raise UserError(f"{folder} is the folder of the manifests: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, table)
    croissant = folder / "croissant.json"
    write_atomic(croissant, json.dumps(describe_as_croissant(manifest, table), indent=2, ensure_ascii=False) + "\n")
    write_atomic(card, write_dataset_card(manifest))
    return [croissant, card, table]


def describe_as_croissant(manifest: Manifest, table: Path) -> dict[str, Any]:
    """Return the Croissant description of a manifest, as JSON-LD.

    Args:
        manifest: the manifest.
        table: its Parquet file, which lies beside the description.
    """
    return {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": CROISSANT,
        "name": manifest.dataset,
        "description": describe_dataset(manifest),
        "license": str(manifest.meta.get("licence") or "unknown"),
        "citeAs": str(manifest.meta.get("attribution") or "unknown"),
        "version": f"0.0.0+{manifest.fingerprint()[:12]}",
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "manifest",
                "name": table.name,
                "description": "One row per sample.",
                "contentUrl": table.name,
                "encodingFormat": "application/x-parquet",
                "sha256": file_sha256(table),
            }
        ],
        "recordSet": [
            _enumeration("splits", {"name": list(SPLIT_TYPES), "url": list(SPLIT_TYPES.values())}, "sc:Text"),
            _enumeration("classes", {"name": list(manifest.class_names)}, "sc:Text"),
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "description": "The samples in the order of the manifest.",
                "key": {"@id": "samples/sample_id"},
                "field": [_field(*each) for each in FIELDS],
            },
        ],
    }


def _field(column: str, data_type: str, is_list: bool, description: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"samples/{column}",
        "name": column,
        "description": description,
        "dataType": data_type,
        **({"repeated": True} if is_list else {}),
        **({"references": {"field": {"@id": "splits/name"}}} if column == "split" else {}),
        "source": {"fileObject": {"@id": "manifest"}, "extract": {"column": column}},
    }


def _enumeration(name: str, columns: Mapping[str, Sequence[str]], data_type: str) -> dict[str, Any]:
    """Return a record set whose rows stand in the description itself; its key is the field "name"."""
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "name": column,
            "dataType": "sc:URL" if column == "url" else data_type,
        }
        for column in columns
    ]
    rows = [
        {f"{name}/{column}": value for column, value in zip(columns, values, strict=True)}
        for values in zip(*columns.values(), strict=True)
    ]
    kind = "cr:Split" if name == "splits" else "sc:Enumeration"
    key = {"@id": f"{name}/name"}
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "dataType": kind, "key": key, "field": fields, "data": rows}


def describe_dataset(manifest: Manifest) -> str:
    """Return what a dataset is: what its owner or its plug-in says of it (`table` knows only its own rules), and its counts."""
    said = "" if manifest.plugin == "table" else plugins.documentation("datasets", manifest.plugin)
    about = " ".join(str(manifest.meta.get("description", said)).split())
    counts = ", ".join(f"{count:,} {split}" for split, count in split_counts(manifest).items())
    labels = "one label" if manifest.label_kind == "single" else "several labels"
    media = "clips" if manifest.meta.get("media_type") == "video" else "pictures"
    return f"{about}{' ' if about else ''}{len(manifest.class_names)} classes, {labels} per sample; {media}: {counts}."


def write_dataset_card(manifest: Manifest) -> str:
    """Return a dataset card: YAML facts that the Hub reads, then Markdown; text of the dataset is in code blocks."""
    kind = "image" if manifest.meta.get("media_type") == "image" else "video"
    total = len(manifest.samples)
    facts = {
        "pretty_name": manifest.dataset,
        "license": "other",
        "license_name": str(manifest.meta.get("licence") or "unknown"),
        "task_categories": [f"{kind}-classification"],
        "size_categories": [_size_category(total)],
        "tags": ["croissant", "diffalign"],
        "configs": [{"config_name": "default", "data_files": f"{manifest.dataset}.parquet"}],
    }
    sources = manifest.meta.get("sources", {})
    options = {"text": manifest.meta.get("text", {}), "options": manifest.meta.get("options", {}), "sources": sources}
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---",
        f"# {manifest.dataset}",
        "The manifest of a dataset, as `diffalign prepare` has built it: one row per sample, without the media. "
        "`croissant.json` describes its columns.",
        _block(describe_dataset(manifest)),
        "## Licence and attribution",
        _block(f"{manifest.meta.get('licence') or 'unknown'}\n{manifest.meta.get('attribution') or ''}".strip()),
        "## Splits",
        "\n".join(["| split | samples |", "|---|---|", *(f"| {k} | {n} |" for k, n in split_counts(manifest).items())]),
        "Text of val and test samples must not reach a prediction: it is privileged information of training.",
        "## Classes",
        _block("\n".join(manifest.class_names)),
        "## How it was built",
        _block(json.dumps(options, indent=1, ensure_ascii=False, sort_keys=True)),
        f"Fingerprint of the manifest: `{manifest.fingerprint()}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """Return text as an indented code block of Markdown, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _size_category(count: int) -> str:
    """Return the Hub's category of a number of rows."""
    limits = (
        (1_000, "n<1K"),
        (10_000, "1K<n<10K"),
        (100_000, "10K<n<100K"),
        (1_000_000, "100K<n<1M"),
        (10_000_000, "1M<n<10M"),
    )
    return next((name for limit, name in limits if count < limit), "n>10M")
