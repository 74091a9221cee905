"""The cells of tables as pandas, NumPy, spreadsheets and people write them, against pandas and NumPy themselves."""

from __future__ import annotations

import io
import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.data.cells import looks_like_splits, nfc, parse_labels, parse_list, parse_name, parse_texts

TABLE = Path("m.csv")
LISTS = [
    ["a cat", "a sleeping cat"],
    ["one"],
    ["it's a cat", 'a "cat"', "both ' and \""],
    ["a, b", "c; d", "[e]", "f]', 'g"],
    ["tab\tnewline\nbackslash\\ end", "\\'", "trailing\\"],
    ["ünï çödé", "日本の猫", "👩‍👩‍👧", "\u00a0"],
    ["x" * 100, "y y " * 30, "z"],
    ["- dash", "= sign", "@user", "+1"],
    ["None", "nan", "...", "1"],
    [],
]


def csv_cell(value: Any) -> str:
    """The cell that pandas writes for a value, as a CSV reader returns it."""
    text = io.StringIO()
    pd.DataFrame({"texts": [value]}).to_csv(text, index=False)
    return pd.read_csv(io.StringIO(text.getvalue()), keep_default_na=False, dtype=str)["texts"][0]


@pytest.mark.parametrize("texts", LISTS, ids=range(len(LISTS)))
def test_lists_as_pandas_and_numpy_write_them(texts: list[str]) -> None:
    written = {
        "json": json.dumps(texts),
        "json, not escaped": json.dumps(texts, ensure_ascii=False),
        "python": csv_cell(texts),
        "numpy objects": csv_cell(np.array(texts, dtype=object)),
        "numpy strings": csv_cell(np.array(texts, dtype=str)),
        "numpy scalars": csv_cell(list(np.array(texts, dtype=str))),
        "repr of an array": repr(np.array(texts, dtype=object)),
        "blanks around": f" {texts} ",
        "trailing comma": f"[{', '.join(map(repr, texts))},]" if texts else "[]",
        "tuple": csv_cell(tuple(texts)) if texts else "[]",
    }
    for how, cell in written.items():
        assert parse_texts(cell, TABLE, 1) == tuple(texts), (how, cell)


def test_gaps_in_lists_and_cells_are_no_texts() -> None:
    for cell in (csv_cell(["a", math.nan, None]), '["a", null]', "['a' nan None]", json.loads('["a", NaN]')):
        assert parse_texts(cell, TABLE, 1) == ("a",), cell
    for cell in ("", None, math.nan, [], "[]", "[nan]", [None]):
        assert parse_texts(cell, TABLE, 1) == (), cell


@pytest.mark.parametrize(
    "text",
    [
        "[applause] bravo",
        "a cat [sic]",
        "[a cat]",
        "(left) a cat (right)",
        "('a cat') said she",
        "['60s] dance [remix]",
        "{b} notation {c}",
        "array(cat)",
        "[CLS]",
        "'quoted'",
        '"quoted", yes',
        "()",
        "(2019)",
        "@user look at this",
        "- a dog runs",
        "= sign",
        "+1",
        "None",
        "1,2",
    ],
)
def test_ordinary_texts_stay_one_text(text: str) -> None:
    assert parse_texts(text, TABLE, 1) == (text,)


@pytest.mark.parametrize(
    "cell",
    [
        str(np.array([f"caption {i}" for i in range(2000)])),  # NumPy leaves out the middle, "..."
        "['a' 'b', 'c']",
        "['a''b']",
        "['a', 'b', 'a text that is cut o",
        "['a', 'b]']; ['c']",
        "[['a', 'b'], ['c']]",
        "{'en': 'a cat', 'de': 'eine Katze'}",
        '{"en": "a cat"}',
        r"['C:\dir', 'b']",
        r"['\xg', 'b']",
        "['a', 'b', ...]",
        "('a cat')",
    ],
)
def test_what_looks_like_a_list_and_is_none_says_how_to_write_lists(cell: str) -> None:
    assert parse_list(cell) is None
    with pytest.raises(ValueError, match=r'm\.csv, line 7: the list .* write it as JSON, \["a cat", "a sleeping cat"\]'):
        parse_texts(cell, TABLE, 7)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("['sky', 'sea']", ("sky", "sea")),
        ("['sky' 'sea']", ("sky", "sea")),
        ('["sky", "sea"]', ("sky", "sea")),
        ("('sky', 'sea')", ("sky", "sea")),
        ("[3 17]", ("3", "17")),
        ("[3, 17]", ("3", "17")),
        ("[3. 17.]", ("3", "17")),
        (str([np.int64(3)]), ("3",)),
        (3.0, ("3",)),
        (math.nan, ()),
        ([1.0, None], ("1",)),
        (" cat ", ("cat",)),
        ("(other)", ("(other)",)),
        ("-ish", ("-ish",)),
        ("@home", ("@home",)),
        ("=", ("=",)),
        ("+1", ("+1",)),
    ],
)
def test_labels_in_cells(cell: Any, expected: tuple[str, ...]) -> None:
    assert parse_labels(cell, "", TABLE, 1) == expected


def test_labels_are_in_one_unicode_form_and_negative_ids_are_refused() -> None:
    for form in ("NFC", "NFD", "NFC"):
        assert parse_labels(unicodedata.normalize(form, "crème brûlée"), "", TABLE, 1) == ("crème brûlée",)
    assert nfc("한") == "한"
    for cell in ("-1", -1, "[1, -1]", -1.0):
        with pytest.raises(ValueError, match=r"m\.csv, line 1: '-1' is negative"):
            parse_labels(cell, "", TABLE, 1)
    with pytest.raises(ValueError, match=r"m\.csv, line 1: the label .* is no JSON list; write it as JSON"):
        parse_labels("['sky', 'sea'", "", TABLE, 1)


@pytest.mark.parametrize("name", ["-_hbPLsZvvo", "@home", "=1+1", "+49", "-1", "'quoted"])
def test_names_may_begin_with_any_sign(name: str) -> None:
    assert parse_name(name, TABLE, 1) == name


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"train2017", "val2017"}, True),
        ({"training_set", "test_set"}, True),
        ({"seg_train", "seg_test", "seg_pred"}, True),
        ({"Train", "Evaluation"}, True),
        ({"train"}, True),
        ({"bullet train", "test tube", "car"}, False),
        ({"train", "car"}, False),
        ({"trainer", "attest"}, False),
        (set(), False),
    ],
)
def test_folders_that_are_named_like_splits(folders: set[str], expected: bool) -> None:
    assert looks_like_splits(folders) == expected


@pytest.mark.parametrize("caption", ["[2020]", "(1)", "[1, 2]", "[0.5]"])
def test_numbers_in_brackets_are_a_caption(caption: str) -> None:
    assert parse_texts(caption, Path("t.csv"), 2) == (caption,)
