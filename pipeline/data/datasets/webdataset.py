"""Tar files of samples, as the library webdataset writes and reads them: the members 000123.jpg, .txt and .cls are one sample.

`shards` names the tar files below `root` by a pattern (**, *, ?), a range {000000..000009}, or both. Members that follow each
other and whose names are the same up to the first dot of the file name are the parts of a sample; the rest of the name, in
small letters, says which part. A sample needs a picture or clip, and a label: the content of `label_part`, or a value of the
JSON file. Texts are the content of `text_part`, or values of the JSON file; a sample may have none. Labels are names, or ids
from 0, as in a table. The id of a sample is the path of its shard without ".tar", and its key. Where a split is a folder of the
shards or a word in their names, such as train-000000.tar, it is the split of their samples; otherwise it follows from the
SHA-256 of the id.

A sample that misses a part, has a broken one, or comes twice is left out, and so is what follows a damaged place of a tar: a
warning counts them, `left_out_counts` in the manifest's meta says why, and the file manifests/left_out/NAME.parquet has every
one. Links, devices, sparse files, huge members and paths that lead out are not read. Extraction reads the members where they
lie, in the order of the tar, and nothing is unpacked. `root` may be an address in an object store: the manifest is that of
the same tar files on a disk.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.data import readers, splits
from pipeline.data.cells import SPLIT_ALIASES, nfc, parse_labels, parse_texts
from pipeline.data.class_folders import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from pipeline.data.columns import BATCH_ROWS, Columns, ColumnWriter, numpy_array
from pipeline.data.dataset import Dataset
from pipeline.data.manifest import HALF_CHARACTER, Manifest, check_manifest, is_half
from pipeline.data.sample_columns import SAMPLE_SCHEMA, SampleColumns
from pipeline.data.spec import manifest_meta, official_root, required_counts
from pipeline.data.table_rows import TableRow, TableRows, label_ids, warn_about_classes
from pipeline.data.tar_members import TarEntry, member_path, scan_tar
from pipeline.data.tar_shards import TarShards
from pipeline.runtime.errors import UserError
from pipeline.runtime.places import Address, Place
from pipeline.runtime.stores import store_of

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # of the name of a member: its sample, and its part
_MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
_MAX_REASONS = 1000  # that the manifest keeps; a file has all
_MAX_KINDS = 50
_SHOWN_KINDS = 5
_MAX_PARTS = 1000  # of a sample
_SHOWN_PARTS = 5
_LEFT_OUT = pa.schema([(name, pa.string()) for name in ("id", "stage", "error", "shard", "key")])
_FOUND = pa.schema(
    [
        *(("id", pa.string()), ("split", pa.string()), ("media", pa.string())),
        *(("texts", pa.list_(pa.string())), ("labels", pa.list_(pa.string())), ("row", pa.int64())),
    ]
)
_CHOICES = {"labels": ("auto", "single", "multi"), "media": ("auto", "image", "video"), "numbers": ("auto", "ids", "names")}


_Row = tuple[str, str, tuple[str, ...], tuple[str, ...], int]


class WebDataset(Dataset):
    """Tar files whose members are pictures or clips, texts and labels."""

    reads_object_stores = True

    def build(self, spec: Mapping[str, Any], root: Place | None) -> Manifest:
        """Build the manifest from the shards below `root`; `UserError` names what is missing and the remedy."""
        for key, choices in _CHOICES.items():
            if spec[key] not in choices:
                raise UserError(f"{key} is {spec[key]!r}; choose one of: {', '.join(choices)}")
        root = root if isinstance(root, Address) else official_root(spec, root)
        shards = TarShards.find(root, spec["shards"])
        names, sources = _read_class_names(spec["class_names"], root)
        found = _read_shards(spec, shards)
        rows = TableRows.of(TableRow(Path(place), 1, "", labels, (), "", "", "") for labels, place in found.labels.items())
        label_kind, classes, ids = label_ids(rows, spec["labels"], names, spec["numbers"])
        samples = _label(found.columns, dict(zip(rows.labels, ids.tolist(), strict=True)))
        media_types = {"video" if suffix in VIDEO_SUFFIXES else "image" for suffix in found.suffixes}
        if len(media_types) > 1 and spec["media"] == "auto":
            raise UserError(f"the shards below {root} hold images and videos; --set media says which they are")
        meta = manifest_meta(
            {
                **spec,
                "media_type": media_types.pop() if spec["media"] == "auto" else spec["media"],
                "metrics": {"task": f"{label_kind}label", "topk": [1, 5]},
            },
            sources=sources,
            lists=found.lists,
            left_out=found.reasons,
            left_out_counts=dict(found.counts),
            split_rule="as given" if found.is_split else "by the SHA-256 of the id",
            warnings=[*found.warnings(), *warn_about_classes(classes, samples)],
        )
        row_numbers = np.concatenate([numpy_array(block.column(0)) for block in found.columns.blocks(names=["row"])])
        source_rows = array("q", row_numbers)
        manifest = Manifest(spec["name"], label_kind, classes, samples, meta, root, source_rows)
        found.list_left_out()
        manifest = replace(manifest, media_stamps=shards.stamps, left_out=found.left_out.finish())
        check_manifest(manifest, required_counts(spec))
        return manifest


@dataclass
class _Found:
    """What the shards hold; labels are not numbered yet."""

    is_split: bool  # whether names of shards say the splits
    writer: ColumnWriter = field(default_factory=lambda: ColumnWriter(_FOUND))
    labels: dict[tuple[str, ...], str] = field(default_factory=dict)  # every list of labels that occurs, and where first
    suffixes: set[str] = field(default_factory=set)  # of the media
    lists: list[dict[str, Any]] = field(default_factory=list)
    left_out: ColumnWriter = field(default_factory=lambda: ColumnWriter(_LEFT_OUT))
    last: list[tuple[str, ...]] = field(default_factory=list)  # rows that are not yet in it
    reasons: list[str] = field(default_factory=list)  # the first ones
    counts: Counter[str] = field(default_factory=Counter)  # of what was left out, by the kind of the reason
    columns: Columns = field(init=False)

    def leave_out(self, shard: str, key: str, reason: str) -> None:
        """Note a sample that cannot be used; "" as its key: the end of the shard."""
        kind = _kind(reason)
        self.counts[kind if kind in self.counts or len(self.counts) < _MAX_KINDS else "for other reasons"] += 1
        name = f"{shard}, {key[:80]!r}" if key else shard
        self.reasons += [f"{name}: {reason}"] if len(self.reasons) < _MAX_REASONS else []
        id = f"{shard.removesuffix('.tar')}/{key}" if key else ""
        self.last.append(tuple(map(_printable, (id, "prepare", reason, shard, key))))
        if len(self.last) == BATCH_ROWS:
            self.list_left_out()

    def list_left_out(self) -> None:
        """Add the last rows to the table."""
        if self.last:
            self.left_out.add_lists(*zip(*self.last, strict=True))
            self.last.clear()

    def warnings(self) -> list[str]:
        """Return a warning if something was left out."""
        kinds = "; ".join(f"{count}: {kind}" for kind, count in self.counts.most_common(_SHOWN_KINDS))
        first = f", the first: {self.reasons[0]}" if self.reasons else ""
        return [f"{self.counts.total()} samples or ends of shards are left out ({kinds}){first}"] if first else []


def _split_of(shard: str) -> str:
    """Return the split that a folder or a word in the name of a shard says; "": none."""
    *folders, name = shard.lower().removesuffix(".tar").split("/")
    words = [*folders, *re.split(r"[^a-z]+", name)]
    return next((SPLIT_ALIASES[word] for word in reversed(words) if word in SPLIT_ALIASES), "")


def _kind(reason: str) -> str:
    """Return a reason without what differs from sample to sample."""
    head, _, rest = reason.replace(", line 1", "").partition(": ")
    kind = f"{head}: {rest}" if rest and " " not in head else head  # the first word may be the part
    return re.sub(r"'.*?'|(?<![\w-])\d+", "…", re.sub(r" \(.*|;.*", "", kind, flags=re.DOTALL))


def _printable(text: str) -> str:
    """Return a text without halves of characters, which names in a tar may have."""
    return text.encode(errors="backslashreplace").decode()


def _read_class_names(file: str, root: Place) -> tuple[list[str], dict[str, str]]:
    """Return the names in a file of the user's below the root, and its SHA-256 as `readers.source_hashes` has it; "": none."""
    if not file:
        return [], {}
    with tempfile.TemporaryDirectory(prefix="diffalign-") as folder:
        if isinstance(root, Address) and not Path(file).is_absolute():
            place, copy = root / readers.parse_media_path(file, Path("class_names"), 1), Path(folder) / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(store_of(place).get(place))
        base = Path(folder) if isinstance(root, Address) else root
        path = readers.locate(base, [file], "the list of class names")
        return [nfc(name) for name in readers.read_names(path)], readers.source_hashes([path], base)


def _read_shards(spec: Mapping[str, Any], shards: TarShards) -> _Found:
    given = {shard: _split_of(shard) for shard in shards.names}
    unknown = next((shard for shard, split in given.items() if not split), "")
    if unknown and any(given.values()):
        raise UserError(
            f"{unknown} is named like no split, unlike other shards; put train, val or test into all names, or none"
        )
    found = _Found(is_split=not unknown)
    row = 0
    for shard in shards.names:
        first = row
        with shards.open(shard) as file:
            for batch in _batches(_samples(spec, file, shard, found)):
                ids, media, texts, labels, numbers = zip(*batch, strict=True)
                own = splits.choose_splits(ids, [given[shard]] * len(ids) if found.is_split else None, spec)
                found.writer.add_lists(ids, own, media, texts, labels, [first + number for number in numbers])
                row = first + numbers[-1] + 1
        found.lists.append(readers.list_entry(Path(shard), Path(), row - first, unit="sample"))
    found.columns = found.writer.finish()
    if not len(found.columns):
        why = "".join(f" ({warning})" for warning in found.warnings())
        raise UserError(f"the {len(shards.names)} shards below {shards.root} hold no sample{why}")
    return found


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    return iter(lambda: list(itertools.islice(rows, BATCH_ROWS)), [])


def _samples(spec: Mapping[str, Any], file: BinaryIO, shard: str, found: _Found) -> Iterator[_Row]:
    """Yield the samples of a shard that can be used: id, path of the medium, texts, labels, number in the shard."""
    keys: set[str] = set()
    for number, (key, entries) in enumerate(_groups(spec, file, shard, found)):
        if key in keys:
            found.leave_out(shard, key, "its key comes again in the shard")
            continue
        keys.add(key)
        try:
            media, texts, labels = _read_parts(spec, entries)
            path = member_path(shard, media)
        except UserError as error:
            found.leave_out(shard, key, str(error))
            continue
        found.suffixes.add(os.path.splitext(media.name)[1].lower())
        found.labels.setdefault(labels, f"{shard}, {key!r}")
        yield f"{shard.removesuffix('.tar')}/{key}", path, texts, labels, number


def _groups(spec: Mapping[str, Any], file: BinaryIO, shard: str, found: _Found) -> Iterator[tuple[str, dict[str, TarEntry]]]:
    """Yield (key, members by part) of every sample of a shard; members whose names have no key are no parts of samples.

    Texts and labels are read as they are found: to go back behind a picture would fetch it from an object store, twice.
    """
    key, parts = "", dict[str, TarEntry]()
    read_parts = {spec[f"{role}_part"] for role in ("json", "text", "label")}
    try:
        for entry in scan_tar(file):
            match = _KEY.fullmatch(entry.name.removeprefix("./"))
            if match and match[1] != key:
                if parts:
                    yield key, parts
                key, parts = match[1], {}
            if match:
                part = match[2].lower()
                if part in parts:
                    entry = entry._replace(problem=f"it has two parts {part}")
                elif part in read_parts and not entry.problem and entry.size <= readers.LINE_LIMIT:
                    file.seek(entry.offset)
                    entry = entry._replace(content=file.read(entry.size))
                if part in parts or len(parts) < _MAX_PARTS:
                    parts[part] = entry
    except UserError as error:
        found.leave_out(shard, "", str(error))
    if parts:
        yield key, parts


def _read_parts(spec: Mapping[str, Any], parts: Mapping[str, TarEntry]) -> tuple[TarEntry, tuple[str, ...], tuple[str, ...]]:
    """Return the medium, the texts and the labels of a sample; `UserError` says what it misses, or which part is broken."""
    fault = next((f"{part}: {entry.problem}" for part, entry in parts.items() if entry.problem), "")
    if fault:
        raise UserError(fault)
    names = [spec["media_part"]] if spec["media_part"] else [part for part in parts if f".{part}" in _MEDIA_SUFFIXES]
    if len(names) != 1 or names[0] not in parts:
        shown = ", ".join(itertools.islice(names if len(names) > 1 else parts, _SHOWN_PARTS))
        several = f"several pictures or clips, {shown}; --set media_part says which"
        key = "; the key of a sample ends at the first dot" if len(parts) > _SHOWN_PARTS else ""
        raise UserError(several if len(names) > 1 else f"no picture or clip among its parts ({shown:.200}{key})")
    facts = _read_json(parts[spec["json_part"]]) if spec["json_part"] in parts else {}
    text = _read_text(parts[spec["text_part"]]).strip() if spec["text_part"] in parts else None
    texts = (text,) if text else parse_texts(_first(facts, spec["text_key"]), Path("json"), 1) if text is None else ()
    if is_half(texts):
        raise UserError(HALF_CHARACTER)
    label = _read_text(parts[spec["label_part"]]).strip() if spec["label_part"] in parts else None
    labels = parse_labels(_first(facts, spec["label_key"]) if label is None else label, "", Path(spec["label_part"]), 1)
    if not labels and spec["labels"] != "multi":
        raise UserError(f"no label, neither in a part {spec['label_part']} nor in its JSON (--set labels=multi allows none)")
    if spec["labels"] == "single" and len(set(labels)) != 1:
        raise UserError(f"{len(labels)} labels where one is due")
    return parts[names[0]], texts, labels


def _first(facts: Mapping[str, Any], keys: str) -> Any:
    return next((facts[key] for key in map(str.strip, keys.split(",")) if key in facts), None)


def _read_json(entry: TarEntry) -> Mapping[str, Any]:
    try:
        facts = json.loads(_read_text(entry))
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON: {error}") from error
    if not isinstance(facts, dict):
        raise UserError("its JSON is no object")
    return facts


def _read_text(entry: TarEntry) -> str:
    if entry.size > readers.LINE_LIMIT:
        raise UserError(f"a text has more than {readers.LINE_LIMIT} bytes")
    try:
        return entry.content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"a text is not UTF-8 ({error.reason} at byte {error.start})") from error


def _label(found: Columns, ids: Mapping[str, int]) -> SampleColumns:
    """Return the samples with the numbers of their labels."""
    writer = ColumnWriter(SAMPLE_SCHEMA)
    for block in found.blocks(names=["id", "split", "media", "texts", "labels"]):
        own = block.column("labels").to_pylist()
        labels = pa.array([sorted({ids[label] for label in labels}) for labels in own], pa.list_(pa.int32()))
        columns = [*block.columns[:4], labels, pa.repeat("", len(block))]
        writer.add(pa.RecordBatch.from_arrays(columns, schema=SAMPLE_SCHEMA))
    return SampleColumns(writer.finish())
