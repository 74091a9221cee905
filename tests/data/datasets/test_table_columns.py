"""Tables are read by column; the oracle reads them row by row, by the rules in the docstring of the plug-in."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import itertools
import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tables import WRITERS, build

from pipeline.data import keys, table_files, table_rows
from pipeline.data.columns import Columns, Strings
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.data.readers import csv_rows, looks_like_formula, unguard_cell
from pipeline.data.sample_columns import SampleColumns
from pipeline.runtime.errors import UserError

NFD = unicodedata.normalize("NFD", "café")
SPLITS = {"train": "train", "dev": "val", "val": "val", "testing": "test"}
PLAIN = {
    "file_name": "a/{}.jpg",
    "label": "cat{2}",
    "text": "photo {}",
    "split": "{split}",
    "sample_id": "s{}",
    "group_id": "g{7}",
}
ODD = {
    "file_name": [
        ".\\a\\{}.jpg",
        "a//{}.jpg",
        "./{}.png",
        f"{NFD}/{{}}.jpg",
        "é,{}.jpg",
        "-{}.jpg",
        " {}.jpg",
        "a/{}",
        "a/.{}",
    ],
    "label": [NFD, "café", " cat1 ", '["cat1"]', "['cat0']", "cat0,cat1", "[]", '["cat1", "cat0", "cat1"]'],
    "text": [
        "",
        " ",
        "[applause]",
        '["a", "b{}"]',
        "['a', 'b']",
        "('a', 'b')",
        "[2020]",
        ' ["x"] ',
        '"q"',
        "a\nb",
        "日本 {}",
        "'{}",
    ],
    "split": [" {split}", "{SPLIT}", " dev ", "Testing"],
    "sample_id": ["=s{}", NFD + "{}", "'s{}", "s {}", "a,b{}"],
    "group_id": ["", NFD, "café", " "],
}
FAULTY = {
    "file_name": ["", "/x", "C:x", "a/../x", "x\x07", "x" * 1025],
    "label": ["-1", "[cat", "x\x7f"],
    "text": ["['a', 'b"],
    "split": ["holdout", ""],
    "sample_id": ["", "s\x1f"],
    "group_id": ["g\x01"],
}


def make_table(random_: random.Random, same: int) -> list[dict[str, str]]:
    """Return a table of ordinary cells, of which some are odd, or even faulty; so many rows in a row are the `same` sample."""
    names = ["file_name", "label", *random_.sample(["text", "split", "sample_id", "group_id"], random_.randrange(5))]
    odd, faulty = random_.choice([0, 0.05, 0.6]), random_.choice([0, 0, 0.03])
    table: list[dict[str, str]] = []
    for row in range(random_.choice([1, 8, 60])):
        record = dict(table[-1]) if row % same else {}
        for name in ["text"] if record else names:
            cell = random_.choice(ODD[name]) if random_.random() < odd else PLAIN[name]
            cell = random_.choice(FAULTY[name]) if random_.random() < faulty else cell
            split = ("train", "val")[row // same % 7 % 2]
            places = {
                "{}": row,
                "{-1}": row - 1,
                "{2}": row % 2,
                "{7}": row // same % 7,
                "{split}": split,
                "{SPLIT}": split.upper(),
            }
            for place, value in places.items():
                cell = cell.replace(place, str(value))
            record |= {name: cell} if name in names else {}
        table.append(record)
    return table


def name_of(cell: str) -> str:
    if not cell or len(cell) > 1024:
        raise ValueError("is longer" if cell else "is empty")
    if any(ord(character) < 32 or ord(character) == 127 for character in cell):
        raise ValueError("control characters")
    return cell


def path_of(cell: str) -> str:
    path = name_of(cell).replace("\\", "/")
    if path[0] == "/" or path[1:2] == ":":
        raise ValueError("is absolute")
    if ".." in path.split("/"):
        raise ValueError("holds '..'")
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def list_of(cell: str) -> list[str] | None:
    """Return the texts of a list; None: it is an ordinary text."""
    try:
        found = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError):
        if cell[:2] in ("['", '["'):
            raise ValueError("cannot be read") from None
        return None
    return list(found) if isinstance(found, list | tuple) and all(isinstance(each, str) for each in found) else None


def labels_of(cell: str) -> list[str]:
    if cell[:1] == "[" and cell[-1:] != "]":
        raise ValueError("no JSON list")
    labels = [
        unicodedata.normalize("NFC", name_of(each)) for each in (list_of(cell) if cell[:1] == "[" else [cell.strip()]) or []
    ]
    if "-1" in labels:
        raise ValueError("is negative")
    return labels


def split_of(cell: str) -> str:
    if cell.strip().lower() not in SPLITS:
        raise ValueError("unknown split")
    return SPLITS[cell.strip().lower()]


def texts_of(cell: str) -> list[str]:
    found = list_of(cell)
    return [text for text in ([cell] if found is None else found) if text]


def group_of(cell: str) -> str:
    return unicodedata.normalize("NFC", name_of(cell)) if cell else ""


READ = {
    "file_name": path_of,
    "label": labels_of,
    "split": split_of,
    "sample_id": name_of,
    "group_id": group_of,
    "text": texts_of,
}


class Refused(Exception):
    """A table is refused: the number of the row, and what the message says."""


def expected(table: list[dict[str, str]], merges: bool) -> list[tuple[Any, ...]]:
    """Return the samples of a table; `Refused` if it is refused."""
    rows: list[dict[str, Any]] = []
    for number, record in enumerate(table):
        try:
            rows.append({name: read(record[name]) for name, read in READ.items() if name in record})
        except ValueError as error:
            raise Refused(number, str(error)) from None
    media = [row["file_name"] for row in rows]
    ids = [row.get("sample_id") or os.path.splitext(row["file_name"])[0] for row in rows]
    while True:
        files: dict[str, set[str]] = {}
        for id, file in zip(ids, media, strict=True):
            files.setdefault(id, set()).add(file)
        longer = [
            file if len(files[id]) > 1 and "sample_id" not in rows[0] else id for id, file in zip(ids, media, strict=True)
        ]
        if longer == ids:
            break
        ids = longer
    samples: dict[str, dict[str, Any]] = {}
    for number, (id, row) in enumerate(zip(ids, rows, strict=True)):
        first = samples.setdefault(id, {"texts": row.get("text", []), "number": number, **row})
        if first["number"] == number:
            continue
        if not merges:
            raise Refused(number, "repeats the id")
        for name in ("file_name", "split", "group_id", "label"):
            if row.get(name) != first.get(name):
                raise Refused(number, "of the same sample, has")
        first["texts"] = list(dict.fromkeys([*first["texts"], *row.get("text", [])]))
    is_multi = any(len({*sample["label"]}) > 1 for sample in samples.values())
    found: list[tuple[Any, ...]] = []
    for sample in samples.values():
        if not is_multi and not sample["label"]:
            raise Refused(sample["number"], "0 labels where one is due")
    splits: dict[str, str] = {}
    for id, sample in samples.items():
        group = sample.get("group_id", "")
        share = int(hashlib.sha256((group or id).encode()).hexdigest()[:16], 16) / 2**64 * 100
        split = sample.get("split") or ("train" if share < 60 else "val" if share < 70 else "test")
        if splits.setdefault(group or f"file {sample['file_name']}", split) != split:
            raise Refused(sample["number"], f"group {group!r} is in {split}")
        found.append((id, split, sample["file_name"], sample["texts"], sorted({*sample["label"]}), group))
    return found


def samples_of(manifest: Manifest) -> list[tuple[Any, ...]]:
    names = manifest.class_names
    return [(s.id, s.split, s.media.as_posix(), list(s.texts), [names[i] for i in s.labels], s.group) for s in manifest.samples]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tables of a few rows go through several batches."""
    monkeypatch.setattr(table_files, "TABLE_BLOCK_BYTES", 200)
    for module in (keys, table_files, table_rows):
        monkeypatch.setattr(module, "BATCH_ROWS", 7)
    for function, defaults in ((Columns.blocks, (None, (), 7)), (SampleColumns.blocks, ((), 7)), (Strings.blocks, (7,))):
        monkeypatch.setattr(function, "__defaults__", defaults)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("seed", range(10))
def test_tables_give_the_samples_that_reading_row_by_row_gives(tmp_path: Path, seed: int) -> None:
    random_, num_read = random.Random(seed), 0
    for _ in range(12):
        same = random_.choice([1, 1, 3])
        table, merges = make_table(random_, same), random_.random() < 0.7
        starts = 2 + np.cumsum([0, *(1 + "".join(record.values()).count("\n") for record in table)])
        for file, writer in WRITERS.items():
            writer(tmp_path / file, list(table))
            try:
                wanted = expected(table, merges)
            except Refused as refused:
                number, what = refused.args
                line = int(starts[number]) if file == "data.csv" else 1 + number
                with pytest.raises(
                    UserError, match=rf"(?s){file}, {'row' if file == 'data.parquet' else 'line'} {line}\b.*{re.escape(what)}"
                ):
                    build(tmp_path, file=file, media="image", merge_rows=merges)
            else:
                assert samples_of(build(tmp_path, file=file, media="image", merge_rows=merges)) == wanted
                num_read += 1
    assert 6 <= num_read <= 32  # of 36: both kinds are tried


@pytest.mark.usefixtures("small_batches")
def test_csv_is_read_as_the_csv_module_reads_it(tmp_path: Path) -> None:
    random_, path = random.Random(0), tmp_path / "soup.csv"
    plain = ["a,b\n", "é, \r\n", '"a","b"\n', 'c,"x""y"\n', '"b,c","d"\r\n', ",\n"]
    lawful = ["\n", "\r\n", '"a\nb",c\n', 'd,"e\r\n\n"\n', 'a"b,c\n', "\ufeffd,e\n", '\ufeff"f",g\n', "a,\0\n", "b,\u2028\n"]
    unlawful = ['"a"b,c\n', "a,b\rc,d\n\n", "a,b,c\n", "a\n", ',"\n', '"a""\n', 'x,"a\r"\n', "x,\r", "b,c"]
    for number in range(500):
        rows = random_.choices(plain + lawful * (number % 3 > 0), k=random_.randrange(1, 40))
        if number % 2:
            rows.insert(random_.randrange(len(rows)), random_.choice(unlawful))
        path.write_bytes(b"one,two\n" + "".join(rows).encode() + (b"\xff,x\n" if number % 9 == 1 else b""))
        assert _rows_or_fault(read_columns, path) == _rows_or_fault(read_lines, path)


def read_columns(path: Path) -> Iterator[tuple[int, list[str]]]:
    for batch in table_files.read_batches(path):
        cells = zip(*(batch.cells(name) for name in ("one", "two")), strict=True)
        yield from ((line, [cell.as_py() for cell in row]) for line, row in zip(batch.lines.tolist(), cells, strict=True))


def read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    for line, row in itertools.islice(csv_rows(path), 1, None):
        if len(row) != 2:
            raise UserError(f"{path}, line {line}: {len(row)} cells where the header has 2")
        yield line, row


def _rows_or_fault(read: Callable[[Path], Iterator[Any]], path: Path) -> list[Any]:
    found: list[Any] = []
    try:
        for row in read(path):
            found.append(row)
    except UserError as error:
        found.append(str(error))
    return found


def test_types_without_functions_for_columns_are_read_one_by_one(tmp_path: Path) -> None:
    """Such as DuckDB's JSON."""
    texts = [f'{{"a":{row}}}' for row in range(6)]
    table = {
        "file_name": pa.array([f"{row}.jpg" for row in range(6)], pa.string_view()),
        "label": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["x", "y"] * 3)),
        "text": pa.array([[text] for text in texts], pa.list_(pa.string_view())),
    }
    pq.write_table(pa.table(table), tmp_path / "metadata.parquet")
    manifest = build(tmp_path)
    assert [sample.texts for sample in manifest.samples] == [(text,) for text in texts]
    assert [sample.labels for sample in manifest.samples] == [(0,), (1,)] * 3
    twice = pa.Table.from_arrays([table["file_name"], table["label"], table["label"]], ["file_name", "label", "label"])
    pq.write_table(twice, tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match="two columns have the same name"):
        build(tmp_path)


@pytest.mark.usefixtures("small_batches")
def test_rows_in_no_split_folder_are_refused_with_their_line(tmp_path: Path) -> None:
    table = [{"file_name": f"{'more' if row == 17 else 'train'}/{row}.jpg", "label": "x"} for row in range(20)]
    WRITERS["data.csv"](tmp_path / "metadata.csv", table)
    with pytest.raises(UserError, match=r"metadata\.csv, line 19: 'more/17\.jpg' is in no split folder, unlike the first row"):
        build(tmp_path)


@pytest.mark.usefixtures("small_batches")
def test_texts_that_come_again_are_found_even_if_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    random_ = random.Random(0)
    for hash_of in (hash, len):
        monkeypatch.setattr(keys, "hash", hash_of, raising=False)
        for num_texts, num_endings in ((0, 1), (1, 1), (60, 1), (60, 3), (300, 90)):
            texts = ["x" * random_.randrange(1, 4) + str(random_.randrange(num_endings)) for _ in range(num_texts)]
            strings = Strings.collect([texts])
            assert keys.first_positions(strings).tolist() == [texts.index(text) for text in texts]
            numbers = np.array([len(text) * random_.choice([-1, 1]) for text in texts], np.int64)
            for wanted in (numbers[:3], numbers[3:], np.arange(-5, 5)):
                assert keys.contains(numbers[2:], wanted).tolist() == [
                    number in numbers[2:].tolist() for number in wanted.tolist()
                ]
            assert keys.run_starts(strings.blocks()).tolist() == [
                i for i, text in enumerate(texts) if not i or text != texts[i - 1]
            ]


@pytest.mark.parametrize("sign", ["plain", 'quo"te', "a,b", "=1", "-x", "'@y", "é"])
def test_the_csv_of_a_manifest_is_written_as_the_csv_module_writes_it(tmp_path: Path, sign: str) -> None:
    table = [{"file_name": f"{sign}{i}", "label": f"c{i % 3}", "text": f"{sign} \n\\", "group_id": sign} for i in range(9)]
    WRITERS["data.csv"](tmp_path / "m.csv", table)
    path = write_manifest(build(tmp_path, file="m.csv", media="image"), tmp_path)
    written = path.with_suffix(".csv").read_bytes()
    rows = list(csv.reader(io.StringIO(written.decode(), newline="")))
    again = io.StringIO()
    csv.writer(again, lineterminator="\n").writerows(rows)
    assert written == again.getvalue().encode()
    samples = pq.read_table(path).to_pylist()
    assert [json.loads(row[6]) for row in rows[1:]] == [sample["texts"] for sample in samples]
    for column, name in ((1, "sample_id"), (4, "media_path"), (8, "group_id")):
        assert [unguard_cell(row[column]) for row in rows[1:]] == [sample[name] for sample in samples]
    assert not any(looks_like_formula(cell) for row in rows for cell in row)
