"""Manifests and the readers of official files refuse faulty and hostile input with an error that names file and line."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.make_fixtures import write_text

from pipeline.data.json_reader import json_records
from pipeline.data.manifest import Manifest, check_manifest, recurring_texts
from pipeline.data.manifest_files import read_manifest, write_manifest
from pipeline.data.readers import (
    LINE_LIMIT,
    binary_column,
    binary_rows,
    csv_rows,
    find_missing_media,
    guard_cell,
    locate,
    looks_like_formula,
    parse_media_path,
    stripped_lines,
    unguard_cell,
)
from pipeline.data.spec import parse_spec
from pipeline.types import Sample

HUGE = "x" * 10_000_000


def manifest_of(tmp_path: Path, *samples: Sample, **meta: Any) -> Manifest:
    """Return a manifest of two classes whose samples are the lines of one list."""
    lists = [{"file": "list.txt", "rows": len(samples), "first": 1, "unit": "line"}]
    text = {"kind": "caption", "aggregate": "join", "sep": " "}
    return Manifest(
        "mine", "multi", ("a", "b"), samples, {"media_type": "image", "text": text, "lists": lists, **meta}, tmp_path
    )


GOOD = Sample("one", "train", Path("one.jpg"), ("a red cat", "sleeping"), (0,), "g")


@pytest.mark.parametrize(
    ("second", "fault"),
    [
        (Sample("one", "train", Path("2.jpg"), (), (0,), ""), "repeats the id of list.txt, line 1"),
        (Sample("one", "test", Path("2.jpg"), (), (0,), ""), "repeats the id of list.txt, line 1"),
        (Sample("two", "dev", Path("2.jpg"), (), (0,), ""), "unknown split 'dev'; choose one of: train, val, test"),
        (Sample("two", "test", Path("2.jpg"), (), (2,), ""), "label 2 is outside 0..1"),
        (Sample("two", "test", Path("2.jpg"), (), (-1,), ""), "label -1 is outside 0..1"),
        (Sample("two", "test", Path("2.jpg"), ("A red  cat", "Sleeping "), (0,), ""), "test texts leak into training"),
        (Sample("two", "test", Path("2.jpg"), (), (0,), "g"), "group 'g' is in test, but sample 'one' of it is in train"),
        (Sample("two", "val", Path("one.jpg"), (), (0,), ""), "media file 'one.jpg' is in val, but sample 'one' of it"),
        (Sample("two", "test", Path("../2.jpg"), (), (0,), ""), "media path '../2.jpg' must be relative"),
        (Sample("two", "test", Path("/2.jpg"), (), (0,), ""), "media path '/2.jpg' must be relative"),
        (Sample("two\n", "test", Path("2.jpg"), (), (0,), ""), "control characters"),
        (Sample("two", "test", Path("2.jpg"), (HUGE,), (0,), ""), f"a field has more than {LINE_LIMIT} characters"),
        (Sample(HUGE, "test", Path("2.jpg"), (), (0,), ""), f"a field has more than {LINE_LIMIT} characters"),
        (Sample("two", "test", Path("2.jpg"), ("\ud800",), (0,), ""), "a lone surrogate"),
        (Sample("two\udfff", "test", Path("2.jpg"), (), (0,), ""), "control characters"),
        (Sample("two", "test", Path("2.jpg"), ("sleeping", "a red cat"), (0,), ""), "test texts leak into training"),
        (Sample("two", "test", Path("2.jpg"), ("a\u00a0ｒｅｄ cat", "", "SLEEPING", "sleeping"), (0,), ""), "test texts leak"),
    ],
)
def test_refused_rows_have_file_and_line(tmp_path: Path, second: Sample, fault: str) -> None:
    with pytest.raises(ValueError, match=r"dataset 'mine', list\.txt, line 2, sample") as raised:
        write_manifest(manifest_of(tmp_path, GOOD, second), tmp_path)
    assert fault in str(raised.value)
    assert len(str(raised.value)) < 500
    assert not (tmp_path / "manifests").exists()


def test_facts_and_class_names_are_checked_too(tmp_path: Path) -> None:
    for facts, fault in ((HUGE, "a field has more than"), ("\ud800", "a text holds a lone surrogate")):
        with pytest.raises(ValueError, match=rf"list\.txt, line 1, sample 'one': {fault}"):
            check_manifest(dataclasses.replace(manifest_of(tmp_path, GOOD), extra={"one": facts}))
    for name in ("", "a\nb", "\ud800"):
        with pytest.raises(ValueError, match="which is empty or unprintable"):
            check_manifest(dataclasses.replace(manifest_of(tmp_path, GOOD), class_names=("a", name)))


@pytest.mark.parametrize("line", [0, 1, 2])
def test_a_leak_is_named_at_any_position_of_the_test_sample(tmp_path: Path, line: int) -> None:
    samples = [Sample(f"t{i}", "train", Path(f"t{i}"), GOOD.texts, (0,), "") for i in range(2)]
    samples.insert(line, Sample("x", "test", Path("x"), GOOD.texts, (0,), ""))
    with pytest.raises(
        ValueError, match=rf"list\.txt, line {line + 1}, sample 'x': has the texts of list\.txt, line {1 + (line == 0)}:"
    ):
        check_manifest(manifest_of(tmp_path, *samples))


def test_recurring_texts_are_those_found_by_hand(tmp_path: Path) -> None:
    texts = {"train": ["a b", "c", "", "d"], "val": ["e"], "test": ["A  B", "a b", "e", "", "f", "C"]}
    samples = [
        Sample(f"{split}{i}", split, Path(f"{split}{i}"), (text,), (0,), "")
        for split, own in texts.items()
        for i, text in enumerate(own)
    ]
    found = [samples[position].id for position in recurring_texts(manifest_of(tmp_path, *samples))]
    assert found == ["test0", "test1", "test5"]


def test_a_faulty_manifest_is_refused_when_it_is_read_even_if_its_fingerprint_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak = Sample("two", "test", Path("2.jpg"), GOOD.texts, (0,), "")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.manifest_files.check_manifest", lambda manifest: None)
        write_manifest(manifest_of(tmp_path, GOOD, leak), tmp_path)
    with pytest.raises(ValueError, match=r"list\.txt, line 2, sample 'two': has the texts of list\.txt, line 1"):
        read_manifest(tmp_path, "mine")


def test_counts_are_checked_after_the_schema_and_before_leaks(tmp_path: Path) -> None:
    leak = Sample("two", "test", Path("2.jpg"), (), (0,), "g")
    with pytest.raises(ValueError, match="unexpected counts: all 2"):
        check_manifest(manifest_of(tmp_path, GOOD, leak), {"all": 3})
    with pytest.raises(ValueError, match="unknown split"):
        check_manifest(manifest_of(tmp_path, GOOD, Sample("two", "dev", Path("2.jpg"), (), (0,), "")), {"all": 3})
    with pytest.raises(ValueError, match="group"):
        check_manifest(manifest_of(tmp_path, GOOD, leak), {"all": 2})


def test_a_leak_is_found_although_a_validation_sample_has_the_same_texts(tmp_path: Path) -> None:
    same = [Sample(split, split, Path(split), GOOD.texts, (0,), "") for split in ("val", "train", "test")]
    check_manifest(manifest_of(tmp_path, *same[:2]))
    with pytest.raises(ValueError, match=r"line 3, sample 'test': has the texts of list\.txt, line 2: test texts leak"):
        check_manifest(manifest_of(tmp_path, *same))


def test_texts_that_recur_by_nature_can_be_allowed(tmp_path: Path) -> None:
    same = Sample("two", "test", Path("2.jpg"), GOOD.texts, (0,), "")
    check_manifest(manifest_of(tmp_path, GOOD, same, texts_recur=True))
    check_manifest(manifest_of(tmp_path, GOOD, Sample("two", "train", Path("2.jpg"), GOOD.texts, (0,), "")))
    check_manifest(manifest_of(tmp_path, GOOD, Sample("two", "test", Path("2.jpg"), GOOD.texts[:1], (0,), "")))


def test_a_manifest_changed_by_hand_is_refused(tmp_path: Path) -> None:
    path = write_manifest(manifest_of(tmp_path, GOOD, Sample("two", "test", Path("2.jpg"), (), (0,), "")), tmp_path)
    sidecar = path.with_suffix(".meta.json")
    sidecar.write_text(sidecar.read_text().replace('"a",', '"c",'))
    with pytest.raises(ValueError, match="does not fit"):
        read_manifest(tmp_path, "mine")


def test_the_csv_holds_no_formula(tmp_path: Path) -> None:
    texts = ("=1+1", "@home", "-2", "\tx", '"quoted", yes')
    sample = Sample("=a", "train", Path("@a.jpg"), texts, (0,), "-g")
    path = write_manifest(manifest_of(tmp_path, sample), tmp_path)
    assert read_manifest(tmp_path, "mine").samples == (sample,)
    cells = [cell for _, line in csv_rows(path.with_suffix(".csv")) for cell in line]
    assert not any(map(looks_like_formula, cells))


@pytest.mark.parametrize("text", ["../x", "a/../../x", "..\\x", "/x", "C:\\x", "c:/x", "", ".", "a\x00b", "x" * 1025])
def test_refused_media_paths(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"list\.txt, line 7: the path"):
        parse_media_path(text, tmp_path / "list.txt", 7)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name: !!python/object/apply:os.system [id]\n", "line 1"),
        ("a: 1\nb: !!str 2\n", "line 2"),
        ("a: &x [1]\nb: *x\n", "line 1"),
        ("%YAML 1.1\n---\na: 1\n", "line 1"),
        ("a: 1\nb: [1, 2\n", "line 3: not YAML"),
        ("- a\n", "line 1: not a mapping"),
        ("a: 1\nb: " + "{a: " * 30 + "1" + "}" * 30, "line 2: YAML tags, anchors, aliases, directives and deep nesting"),
        ("a: 1\nb: \x07\n", "line 2: not YAML: special characters are not allowed"),
        ("a: 1\n" + "x" * 2**20, "line 2: the line is longer|is larger than 1048576 bytes"),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as raised:
        parse_spec(path)
    assert re.search(f"mine.yaml,? ({fault})", str(raised.value))


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 100_000, "a: " + "1" * 5000, "a: 2001-02-30"])
def test_yaml_that_breaks_readers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml.*YAML"):
        parse_spec(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ValueError, match=r"mine\.yaml, line 2: not UTF-8"):
        parse_spec(tmp_path / "mine.yaml")


def test_huge_lines_and_fields_are_refused_with_the_line(tmp_path: Path) -> None:
    write_text(tmp_path / "list.txt", ["a", HUGE])
    with pytest.raises(ValueError, match=r"list\.txt, line 2: the line is longer than 1048576 bytes"):
        list(stripped_lines(tmp_path / "list.txt"))
    write_text(tmp_path / "table.csv", ["a,b", 'c,"' + ("x" * 80 + "\n") * 125_000])
    with pytest.raises(ValueError, match=r"table\.csv, line \d+: field larger than field limit"):
        list(csv_rows(tmp_path / "table.csv"))
    write_text(tmp_path / "tags.dat", ["0 1", "0" * 10_000_000])
    with pytest.raises(ValueError, match=r"tags\.dat, line 2: the line is longer"):
        list(binary_rows(tmp_path / "tags.dat", 2))
    write_text(tmp_path / "labels.txt", [HUGE])
    with pytest.raises(ValueError, match=r"labels\.txt has more than 16 bytes for each of the 12 images"):
        binary_column(tmp_path / "labels.txt", 12)


@pytest.mark.parametrize("cell", ["=1", "@x", "+x", "-x", "\tx", "\rx", "=1+1", "'=1", "''=1", "'a", "'-1", "-1"])
def test_formulas_are_read_as_they_are_and_written_so_that_no_spreadsheet_runs_them(tmp_path: Path, cell: str) -> None:
    (tmp_path / "table.csv").write_bytes(f'a,b\n1,"{cell}"\n'.encode())
    assert list(csv_rows(tmp_path / "table.csv")) == [(1, ["a", "b"]), (2, ["1", cell])]
    assert not looks_like_formula(guard_cell(cell))
    assert unguard_cell(guard_cell(cell)) == cell
    assert [looks_like_formula(number) for number in ("-1", "+2.5", "-.5e3", "a=1")] == [False] * 4


def test_text_that_is_not_utf8_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: not UTF-8 text"):
        list(stripped_lines(tmp_path / "list.txt"))


def test_only_line_feeds_end_lines_and_marks_at_the_start_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\ufeffa\u0085b\u2028c\r\nnext\n\n\n".encode())
    assert list(stripped_lines(tmp_path / "list.txt")) == [(1, "a\u0085b\u2028c"), (2, "next")]


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ('{"x": 1' + "0" * 5000 + "}", "broken JSON: Exceeds the limit"),
        ('{"x": NaN}', "broken JSON: NaN is no number"),
        ('{"x": -Infinity}', "broken JSON: -Infinity is no number"),
        ('{"x": ["' + HUGE + '"]}', f"the entry has more than {LINE_LIMIT} characters"),
        ('{"x": "' + HUGE + '"}', f"the field 'x' has more than {LINE_LIMIT} characters"),
        ('{"' + HUGE + '": 1}', f"the entry has more than {LINE_LIMIT} characters"),
        ("[" * 100_000, "the JSON is nested too deeply"),
    ],
)
def test_hostile_json_is_refused_with_the_line(tmp_path: Path, entry: str, fault: str) -> None:
    (tmp_path / "a.json").write_text('{"info": {"y": 1},\n"rows": [\n{"x": 1},\n' + entry + "]}")
    with pytest.raises(ValueError, match=r"a\.json, line 4: ") as raised:
        list(json_records(tmp_path / "a.json", "rows"))
    assert fault in str(raised.value)
    assert len(str(raised.value)) < 500


def test_binary_files_against_numpy(tmp_path: Path) -> None:
    marks = np.random.default_rng(0).random((40, 30)) < 0.1
    np.savetxt(tmp_path / "tags.dat", marks, fmt="%d", delimiter="\t", newline="\t\n")
    assert [found.tolist() for found in binary_rows(tmp_path / "tags.dat", 30)] == [
        np.flatnonzero(row).tolist() for row in marks
    ]
    np.savetxt(tmp_path / "column.txt", marks[:, 3], fmt="%d")
    assert binary_column(tmp_path / "column.txt", 40).tolist() == np.flatnonzero(marks[:, 3]).tolist()


def test_pipes_are_not_read_as_lists_or_media(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="the list is missing: looked for"):
        locate(tmp_path, ["list.txt"], "the list")
    assert find_missing_media(tmp_path, ["list.txt"], str) == [0]


def test_media_that_cannot_be_there_are_missing_and_loops_are_named(tmp_path: Path) -> None:
    assert find_missing_media(tmp_path, ["x" * 300, "none/x.jpg"], str) == [0, 1]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"line 1: loop/x\.jpg (cannot be looked at|is a symbolic link that leads out)"):
        find_missing_media(tmp_path, ["loop/x.jpg"], lambda position: f"line {position + 1}")
