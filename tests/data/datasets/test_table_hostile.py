"""Your own data: faulty tables, imagefolders and folder trees are refused, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tables import WRITERS, Writer, build, make_empty_files, write_csv, write_jsonl

GOOD = {"file_name": "x.jpg", "label": "a", "text": "t"}
HOSTILE = {
    "a path upwards": ({"file_name": "../x.jpg"}, "holds '..'"),
    "an absolute path": ({"file_name": "/etc/passwd"}, "absolute"),
    "a drive": ({"file_name": "C:\\x.jpg"}, "absolute"),
    "an empty path": ({"file_name": ""}, "is empty"),
    "a control character": ({"label": "a\u0007"}, "control characters"),
    "no label": ({"label": ""}, "0 labels where one is due"),
    "an unknown split": ({"split": "holdout"}, "unknown split 'holdout'; choose one of: train"),
    "a broken list": ({"label": "[1, 2"}, "no JSON list"),
    "a huge path": ({"file_name": "x" * 2000}, "longer than 1024"),
    "a huge text": ({"text": "x" * 10_000_000}, "longer than|more than"),
    "a path upwards in a folder": ({"file_name": "a/../../x.jpg"}, "holds '..'"),
}
NO_UTF8 = {
    "label": r"m\.jsonl, line 2: .*half of one",
    "file_name": r"m\.jsonl, line 2: .*half of one",
    "text": r"m\.jsonl, line 2, sample 'y': a text holds a lone surrogate",
}


@pytest.mark.parametrize("column", NO_UTF8)
def test_half_characters_are_refused_with_file_and_line(tmp_path: Path, column: str) -> None:
    write_jsonl(tmp_path / "m.jsonl", [GOOD, {**GOOD, "file_name": "y.jpg", column: "\ud800"}])
    with pytest.raises(ValueError, match=NO_UTF8[column]):
        build(tmp_path, file="m.jsonl")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(("file", "writer"), WRITERS.items())
def test_hostile_rows_are_refused_with_file_and_line(tmp_path: Path, name: str, file: str, writer: Writer) -> None:
    change, reason = HOSTILE[name]
    good = {**GOOD, "split": "train"}
    writer(tmp_path / file, [good, {**good, "file_name": "y.jpg", **change}])
    line = {"data.csv": "line 3", "data.jsonl": "line 2", "data.parquet": "row 2"}[file]
    with pytest.raises(ValueError, match=rf"{file}, {line}: .*({reason})"):
        build(tmp_path, file=file, labels="single")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("m.csv", "file_name,label\nx.jpg,a\ny.jpg\n", r"line 3: 1 cells where the header has 2"),
        ("m.csv", "file_name,file_name\nx.jpg,a\n", r"line 1: two columns have the same name, 'file_name'"),
        ("m.csv", 'file_name,label\n"x.jpg,a\n', r"line 2: unexpected end of data"),
        ("m.csv", "name,label\nx.jpg,a\n", r"no column media_path.*choose one of: name, label, with --media-column NAME"),
        ("m.csv", "file_name\nx.jpg\n", r"line 2: there is neither a label column nor a class folder.* columns are: file_name"),
        ("m.csv", ",name,label\n0,x.jpg,a\n", r"choose one of: '', name, label, with"),
        ("m.csv", ",file_name,kind\n0,x.jpg,a\n", r"columns are: '', file_name, kind"),
        ("m.csv", "file_name,kind,\nx.jpg,a,t\n", r"columns are: file_name, kind, ''"),
        ("m.csv", "file_name;label;text, in English\nx.jpg;a;t\n", r"line 2: 1 cells .* has 2; is ';' between the cells\?"),
        (
            "m.csv",
            "file_name|label\nx.jpg|a\n",
            r"no column media_path.*; is '\|' between the cells\? .* by semicolons or tabs",
        ),
        ("m.tsv", "file_name\tlabel\n", r"is none of: .*; one with tabs between the cells is read as \.csv"),
        ("m.csv", 'file_name,label,text\nx.jpg,a,t\n,a,"t\nt"\n', r"line 3: the cell is empty \(column 'file_name'\)"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": "a", "sample_id": null}\n', r"is empty \(column 'sample_id'\)"),
        ("m.csv", "file_name,label,split\nx.jpg,a,\n", r"line 2: unknown split ''.* \(column 'split'\)"),
        ("m.csv", "file_name,label\nx.jpg,\n", r"line 2: 0 labels where one is due, as in all rows; .* --label-column"),
        ("m.csv", 'file_name,label\nx.jpg,a\n"y.jpg,a\nz.jpg,a\n', r"line 3: unexpected end of data"),
        ("m.csv", "file_name,label\n", r"has no rows"),
        ("m.csv", "file_name,label\nx.jpg,a\ny.jpg,\n", r"line 3: 0 labels where one is due; .* --set labels=multi"),
        (
            "m.jsonl",
            '{"file_name": "x.jpg", "label": "a"}\n{"file_name": "y.jpg", "label": "a", "text": "t"}\n',
            "line 2: .*'text'",
        ),
        ("m.jsonl", '{"file_name": "x.jpg", "label": 1' + "0" * 5000 + "}\n", r"line 1: broken JSON"),
        ("m.csv", 'file_name,label,text\nx.jpg,a,"t\nt"\n\nx.jpg,a,\n', r"m\.csv, line 5.*repeats the id of m\.csv, line 2"),
        ("m.csv", "file_name,label\nx.jpg,99999999\n", r"above 99999"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": true}\n', r"line 1: True is no text"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": 1.5}\n', r"line 1: 1\.5 is no text"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": -1}\n', r"line 1: '-1' is negative"),
        ("m.jsonl", '{"file_name": "x.jpg", "label": "a", "text": 7}\n', r"line 1: a text is no text"),
        ("m.jsonl", '\n["x.jpg"]\n', r"line 2: it is no JSON object"),
        ("m.jsonl", "[" * 100_000, r"line 1: broken JSON"),
        ("m.parquet", "PAR1", r"damaged or no Parquet file"),
        ("m.xlsx", "", r"none of: \.csv, \.jsonl, \.parquet"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, file: str, content: str, reason: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=reason):
        build(tmp_path, file=file)


def test_latin_1_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("file_name,label\nx.jpg,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"m\.csv, line 2: not UTF-8"):
        build(tmp_path, file="m.csv")


def test_options_are_checked(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [GOOD])
    (tmp_path / "names.txt").write_text("b\n")
    cases = {
        ("labels", "both"): "choose one of: auto, single, multi",
        ("media", "audio"): "choose one of: auto, image, video",
        ("label_column", "kind"): "no column kind; choose one of: file_name, label, text",
        ("class_names", "names.txt"): "line 2: the label 'a' is none of the 1 class names",
        ("class_names", "absent.txt"): "the list of class names is missing",
    }
    for (key, value), reason in cases.items():
        with pytest.raises(ValueError, match=reason):
            build(tmp_path, file="m.csv", **{key: value})
    with pytest.raises(ValueError, match="is no folder; --root"):
        build(tmp_path / "nothing")


def test_rows_outside_the_split_folders_are_refused(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "metadata.csv", [{"file_name": "train/1.png", "label": "a"}, {"file_name": "more/1.png", "label": "a"}]
    )
    with pytest.raises(ValueError, match=r"metadata\.csv, line 3: 'more/1\.png' is in no split folder, unlike the first row"):
        build(tmp_path)


def test_images_and_videos_in_one_table_need_the_media_setting(tmp_path: Path) -> None:
    write_csv(tmp_path / "m.csv", [{"file_name": "x.webp", "label": "a"}, {"file_name": "y.mp4", "label": "a"}])
    with pytest.raises(ValueError, match=r"m\.csv, line 3: 'y\.mp4' makes images and videos in one table; --set media"):
        build(tmp_path, file="m.csv")
    assert build(tmp_path, file="m.csv", media="video").meta["media_type"] == "video"


def test_stray_files_are_refused(tmp_path: Path) -> None:
    make_empty_files(tmp_path / "root", "cat/1.jpg", "stray.jpg")
    with pytest.raises(ValueError, match=r"stray\.jpg is in no class folder"):
        build(tmp_path / "root")
