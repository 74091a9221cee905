"""Manifests: which samples a dataset has, with their media, texts, labels and splits; and the checks of a manifest.

A manifest is built once from the official files of a dataset. After that it is only read (see `manifest_files`).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.columns import Columns, compute, index_array, numpy_array
from pipeline.data.keys import contains, first_positions, hash_keys, run_starts
from pipeline.data.media_copies import single_copy
from pipeline.data.readers import LINE_LIMIT, UNPRINTABLE, media_file
from pipeline.data.sample_columns import SampleColumns, json_rows, list_sizes, unusual_rows
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json
from pipeline.runtime.places import Address, Place
from pipeline.types import SPLITS, Sample

SCHEMA_VERSION = 1
_PLAIN_TEXT = r"^[!-~]+( [!-~]+)*$"  # which no Unicode form changes
DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
HALF_CHARACTER = "a text holds a lone surrogate, half of a character that UTF-8 cannot spell"
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NO_COUNTS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Manifest:
    """The samples of a dataset in the order of its official files, and the meaning of their labels."""

    dataset: str
    label_kind: Literal["single", "multi"]
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...] | SampleColumns  # the latter where they are many
    meta: Mapping[str, Any]  # JSON values: media_type, text, licence, attribution, sources (versions, sha256); no machine facts
    media_root: Place  # folder of the media on this machine, or of their tar files in an object store; not part of the identity
    rows: Sequence[int] = ()  # row of each sample in meta["lists"], counted through all lists; (): every row is a sample
    extra: Mapping[str, str] = field(default_factory=dict)  # sample id -> JSON object of facts that no stage needs
    media_ok: Mapping[str, bool] = field(default_factory=dict)  # sample id -> whether its file can be decoded, if tried
    media_stamps: Mapping[str, str] = field(default_factory=dict)  # tar in an object store, below the root -> its stamp
    left_out: Columns | None = None  # samples that the builder could not use, with the reasons; not read from files again

    def fingerprint(self) -> str:
        """Return the SHA-256 of the label kind, the class names and every row.

        Paths of the machine and facts about the origin do not change it.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        """The hash of the JSON [version, kind, names, rows], fed batch by batch: the text of millions of rows is never held."""
        digest = hashlib.sha256(canonical_json([SCHEMA_VERSION, self.label_kind, self.class_names])[:-1].encode() + b",[")
        skipped = 1  # the comma before the first row
        for block in self.columns.select(self.file_order()).blocks():
            digest.update(memoryview(json_rows(block))[skipped:])
            skipped = 0
        digest.update(b"]]")
        return digest.hexdigest()

    @cached_property
    def columns(self) -> SampleColumns:
        """The samples as columns."""
        return SampleColumns.of(self.samples)

    @property
    def plugin(self) -> str:
        """The plug-in that built the manifest: the dataset itself, unless `prepare` gave it another name."""
        return self.meta.get("plugin", self.dataset)

    @property
    def features_of(self) -> tuple[str, str]:
        """The dataset, and the fingerprint of its manifest, whose caches hold the features; a fold has those of the whole."""
        dataset, fingerprint = self.meta.get("features_of", (self.dataset, self.fingerprint()))
        return dataset, fingerprint

    @property
    def prepare_command(self) -> str:
        """The command that builds the manifest again, without its options."""
        return prepare_command(self.dataset, self.plugin)

    def file_order(self) -> NDArray[np.int64]:
        """Return the positions of the samples, sorted by split and then by source row."""
        source = np.asarray(self.rows, np.int64)
        order = np.argsort(source, kind="stable") if (source[1:] < source[:-1]).any() else np.arange(len(self.samples))
        return order[np.argsort(self.columns.split_codes[order], kind="stable")]

    def in_file_order(self) -> Iterator[tuple[int, Sample]]:
        """Yield (source row, sample), sorted by split and then by source row."""
        order = self.file_order()
        for position, sample in zip(order.tolist(), self.columns.select(order), strict=True):
            yield self.rows[position] if self.rows else position, sample

    def split(self, name: str) -> SampleColumns:
        """Return the samples of a split.

        Raises:
            UserError: there is no such split; the message lists the splits.
        """
        return self.columns.select(self.split_positions(name))

    def split_positions(self, name: str) -> NDArray[np.int64]:
        """Return the positions of the samples of a split; errors as in `split`."""
        if name not in SPLITS:
            raise UserError(f"unknown split {name!r}; choose one of: {', '.join(SPLITS)}")
        return np.flatnonzero(self.columns.split_codes == SPLITS.index(name))

    def select(self, positions: NDArray[np.int64], **changes: Any) -> Manifest:
        """Return a manifest of the samples at these positions, and with other fields changed; rows still tell their lines."""
        rows = array("q", np.asarray(self.rows, np.int64)[positions] if self.rows else np.asarray(positions, np.int64))
        return replace(self, **{"samples": self.columns.select(positions), "rows": rows, **changes})

    def media_path(self, sample: Sample) -> Path:
        """Return the path of the sample's media file; one whose name is the same in another Unicode form is found, too.

        Of a medium in an object store it is that of a copy, see `single_copy`.

        Raises:
            UserError: the path leads out of the media root, or a symbolic link on it does in a folder that is not the user's;
                or as in `single_copy`.
        """
        if isinstance(self.media_root, Address):
            return single_copy(self, sample.media)
        path = media_file(self.media_root, sample.media)
        if self.meta.get("follows_links", False) and not {"..", "/"} & set(sample.media.parts):
            return path
        path = path.resolve()
        if not path.is_relative_to(self.media_root.resolve()):
            raise UserError(f"{sample.media.as_posix()} of sample {sample.id!r} leads out of the media folder")
        return path

    def media_stamp(self, tar: str) -> str:
        """Return the stamp that a tar in an object store had when it was prepared; "": it was not."""
        return self.media_stamps.get(tar.removeprefix(f"{str(self.media_root).rstrip('/')}/"), "")

    def source_location(self, position: int) -> str:
        """Return the official list and the line of the sample at a position, or its row if the dataset has no lists."""
        row = self.rows[position] if self.rows else position
        for entry in self.meta.get("lists", ()):
            if row < entry["rows"]:
                return f"{entry['file']}, {entry['unit']} {entry['first'] + row}"
            row -= entry["rows"]
        return f"row {row}"


def prepare_command(dataset: str, plugin: str) -> str:
    """Return the command that prepares a dataset: the one of a plug-in, or, under another name, what a plug-in builds."""
    return f"diffalign prepare {plugin}" + (f" --name {dataset}" if dataset != plugin else "")


def check_manifest(manifest: Manifest, counts: Mapping[str, int] = _NO_COUNTS) -> None:
    """Check the schema, then the counts, then that nothing leaks from one split into another.

    Columns of samples that have passed are not looked at again with the same meaning of labels: it takes long.

    Args:
        manifest: the manifest to check.
        counts: expected counts, see `check_counts`.

    Raises:
        UserError: names the first faulty row by its list and line.
    """
    texts_recur = manifest.meta.get("texts_recur", False)
    passed = (manifest.label_kind, len(manifest.class_names), texts_recur)
    columns = manifest.samples if isinstance(manifest.samples, SampleColumns) else None
    is_new = columns is None or columns.passed != passed or bool(manifest.extra)
    _check_names(manifest)
    if is_new:
        _check_samples(manifest)
    check_counts(manifest, counts)
    if is_new:
        _check_leaks(manifest, "group", "group")
        _check_leaks(manifest, "media", "media file")
    if is_new and not texts_recur:
        _check_texts(manifest)
    if columns is not None:
        columns.passed = passed


def _check_names(manifest: Manifest) -> None:
    if not DATASET_NAME.fullmatch(manifest.dataset):
        raise UserError(f"dataset name {manifest.dataset!r} may hold only letters, digits, '_', '-' and '.'")
    if not manifest.samples:
        raise UserError(f"dataset {manifest.dataset!r} has no samples")
    for name, count in Counter(manifest.class_names).items():
        if count > 1 or not name or UNPRINTABLE.search(name):
            what = "more than once" if count > 1 else "which is empty or unprintable"
            raise UserError(f"dataset {manifest.dataset!r} names the class {name[:80]!r} {what}")


def _check_samples(manifest: Manifest) -> None:
    for position in _rows_to_check(manifest):
        if problem := _row_problem(manifest.samples[position], manifest):
            raise _row_error(manifest, position, problem)
    first = first_positions(manifest.columns.ids)
    for again in np.flatnonzero(first < np.arange(len(first)))[:1].tolist():
        raise _row_error(manifest, again, f"repeats the id of {manifest.source_location(int(first[again]))}")


def _rows_to_check(manifest: Manifest) -> Iterator[int]:
    """Yield the positions of the samples that may break the schema; of samples that are no columns, all."""
    facts = manifest.extra.values()
    if not isinstance(manifest.samples, SampleColumns) or any(
        len(text) > LINE_LIMIT // 2 or _LONE_SURROGATE.search(text) for text in facts
    ):
        yield from range(len(manifest.samples))
        return
    start = 0
    for block in manifest.samples.blocks():
        yield from (start + unusual_rows(block, manifest.label_kind, len(manifest.class_names), LINE_LIMIT)).tolist()
        start += len(block)


def _row_error(manifest: Manifest, position: int, what: str) -> UserError:
    shown = manifest.samples[position].id[:80]
    return UserError(f"dataset {manifest.dataset!r}, {manifest.source_location(position)}, sample {shown!r}: {what}")


def _row_problem(sample: Sample, manifest: Manifest) -> str:
    """Return how one row breaks the schema, or ""."""
    media = sample.media.as_posix()
    if not sample.id:
        return "the id is empty"
    cells = (sample.id, media, sample.group)
    if any(map(UNPRINTABLE.search, cells)):
        return "id, media path or group hold control characters"
    free_texts = (*sample.texts, manifest.extra.get(sample.id, ""))
    if max(*map(len, cells), sum(map(len, free_texts)) + 4 * len(free_texts)) > LINE_LIMIT:  # all texts share one CSV cell
        return f"a field has more than {LINE_LIMIT} characters"
    if is_half(free_texts):
        return HALF_CHARACTER
    if sample.split not in SPLITS:
        return f"unknown split {sample.split!r}; choose one of: {', '.join(SPLITS)}"
    if media.startswith("/") or ".." in media.split("/") or media in ("", ".") or "\\" in media:
        return f"media path {media[:80]!r} must be relative, with '/' and without '..'"
    return _label_problem(sample, manifest)


def is_half(texts: Iterable[str]) -> bool:
    """Whether one of these texts holds half of a character."""
    return any(map(_LONE_SURROGATE.search, texts))


def _label_problem(sample: Sample, manifest: Manifest) -> str:
    if manifest.label_kind == "single" and len(sample.labels) != 1:
        return f"a single-label dataset needs exactly one label, found {len(sample.labels)}"
    if list(sample.labels) != sorted(set(sample.labels)):
        return f"labels {list(sample.labels)} must be sorted and unique"
    outside = [label for label in sample.labels if not 0 <= label < len(manifest.class_names)]
    if outside:
        return f"label {outside[0]} is outside 0..{len(manifest.class_names) - 1}"
    return ""


def _check_leaks(manifest: Manifest, column: str, what: str) -> None:
    """Check that samples with the same key in a column are in one split; samples with the key "" are not checked."""
    keys, codes = manifest.columns.strings(column), manifest.columns.split_codes
    heads = run_starts(keys.blocks())  # of rows that follow each other, as those of one picture often do, the first is enough
    if len(heads) == 1 and not keys[0]:
        return
    is_head = np.append(True, codes[1:] != codes[:-1])
    is_head[heads] = True
    heads = np.flatnonzero(is_head)
    hashes = hash_keys(keys.at(heads))
    order = np.argsort(hashes, kind="stable")
    hashes, codes = hashes[order], codes[heads[order]]
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    is_mixed = (np.minimum.reduceat(codes, starts) < np.maximum.reduceat(codes, starts)) & (hashes[starts] != hash(""))
    first: dict[str, int] = {}
    for position in np.sort(heads[order[np.repeat(is_mixed, np.diff(np.append(starts, len(order))))]]).tolist():
        key = keys[position]
        sample, other = (manifest.samples[each] for each in (position, first.setdefault(key, position)))
        if other.split != sample.split:
            there = f"sample {other.id[:80]!r} of it is in {other.split} ({manifest.source_location(first[key])})"
            raise _row_error(manifest, position, f"{what} {key[:80]!r} is in {sample.split}, but {there}")


def _check_texts(manifest: Manifest) -> None:
    """Check that no test sample has the texts of a training sample, which the head has seen in training."""
    for test in recurring_texts(manifest)[:1].tolist():
        key = _text_key(manifest.samples[test].texts)
        train = next(i for i in manifest.split_positions("train").tolist() if _text_key(manifest.samples[i].texts) == key)
        leak = f"has the texts of {manifest.source_location(train)}: test texts leak into training"
        raise _row_error(manifest, test, f"{leak}; where they recur by nature, prepare with --set texts_recur=true")


def recurring_texts(manifest: Manifest) -> NDArray[np.int64]:
    """Return the ascending positions of the test samples that have the same texts as a training sample.

    All texts of the two samples must be the same, in any order. Case, blanks and Unicode's compatibility forms are ignored.
    Samples without text are left out. Texts are compared by 64-bit hashes, so that millions of them need not be held.
    """
    hashes = np.concatenate(
        [_text_hashes(block.column(0)) for block in manifest.columns.blocks(["texts"])] or [np.zeros(0, np.int64)]
    )
    train, test = (own[hashes[own] != hash("")] for own in map(manifest.split_positions, ("train", "test")))
    return test[contains(hashes[train], hashes[test])]


def _text_hashes(texts: pa.Array) -> NDArray[np.int64]:
    """Return the hash of the key of each row of texts; fast for rows of one plain English text."""
    sizes, flat = list_sizes(texts), texts.flatten()
    is_plain = sizes == 1
    starts = (np.cumsum(sizes) - sizes)[is_plain]
    fits = numpy_array(compute.match_substring_regex(flat.take(index_array(starts)), _PLAIN_TEXT)).astype(np.bool_)
    is_plain[np.flatnonzero(is_plain)[~fits]] = False
    hashes = np.empty(len(texts), np.int64)
    hashes[is_plain] = _hashes(compute.ascii_lower(flat.take(index_array(starts[fits]))).to_pylist())
    hashes[~is_plain] = _hashes(map(_text_key, texts.take(index_array(np.flatnonzero(~is_plain))).to_pylist()))
    return hashes


def _hashes(keys: Iterable[str]) -> NDArray[np.int64]:
    return np.fromiter(map(hash, keys), np.int64)


def _text_key(texts: Iterable[str]) -> str:
    normalised = {" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts}
    return "\n".join(sorted(normalised - {""}))


def check_counts(manifest: Manifest, expected: Mapping[str, int]) -> None:
    """Check numbers of samples and classes.

    Args:
        manifest: the manifest to check.
        expected: numbers by name: "all", "train", "val", "test", "classes", or a count of the builder's own.

    Raises:
        UserError: a number is not the expected one.
    """
    found = found_counts(manifest)
    wrong = [f"{name} {found[name]} (expected {count})" for name, count in expected.items() if found[name] != count]
    if wrong:
        files = ", ".join(entry["file"] for entry in manifest.meta.get("lists", ())) or "the files"
        raise UserError(f"dataset {manifest.dataset!r} has unexpected counts: {', '.join(wrong)}; are {files} complete?")


def found_counts(manifest: Manifest) -> dict[str, int]:
    """Return the numbers of samples ("all" and by split), of "classes", and those that the builder counted in the files."""
    own_counts = {"all": len(manifest.samples), **split_counts(manifest), "classes": len(manifest.class_names)}
    return {**own_counts, **manifest.meta.get("counts", {})}


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but white space and characters without width, such as U+200B."""
    return all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text)


def has_text(sample: Sample) -> bool:
    """Whether a sample has a text that is not blank."""
    return not all(map(is_blank, sample.texts))


def split_counts(manifest: Manifest) -> dict[str, int]:
    """Return the number of samples of each split."""
    codes = manifest.columns.split_codes
    return {split: int(np.count_nonzero(codes == code)) for code, split in enumerate(SPLITS)}


def text_counts(samples: SampleColumns) -> NDArray[np.int64]:
    """Return how many texts each sample has that are not blank."""
    counts = [np.zeros(0, np.int64)]
    for block in samples.blocks(["texts"]):
        flat, sizes = block.column(0).flatten(), list_sizes(block.column(0))
        has_words = numpy_array(compute.match_substring_regex(flat, "[!-~]")).astype(np.bool_)
        for position in np.flatnonzero(~has_words).tolist():
            has_words[position] = not is_blank(flat[position].as_py())
        counts.append(np.bincount(np.repeat(np.arange(len(sizes)), sizes)[has_words], minlength=len(sizes)))
    return np.concatenate(counts)
