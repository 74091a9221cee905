"""Columns of many rows: lists of Python are the oracle, however few bytes a batch may have."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data import columns
from pipeline.data.columns import ColumnWriter, Strings
from pipeline.data.sample_columns import SampleColumns
from pipeline.types import Sample

TEXTS = [f"{number:03d} " + "word " * (number % 7) for number in range(300)]


@pytest.mark.parametrize("most_bytes", [1, 500, 2**28])
def test_no_row_is_lost_when_a_batch_would_be_too_large(monkeypatch: pytest.MonkeyPatch, most_bytes: int) -> None:
    monkeypatch.setattr(columns, "MAX_BATCH_BYTES", most_bytes)
    strings = Strings.collect([TEXTS[:100], TEXTS[100:250], TEXTS[250:]])
    order = np.random.default_rng(0).integers(0, len(TEXTS), 500)
    assert strings.take(order) == [TEXTS[each] for each in order]
    assert list(strings) == TEXTS
    parts = list(strings.parts(200))
    assert [text for part in parts for text in part] == TEXTS
    assert all(len(part) == 1 or sum(map(len, part)) <= most_bytes for part in parts)


def test_texts_that_arrow_keeps_in_chunks_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts of more than 2 GiB, `pa.array` makes several arrays, each for other rows; here it does so of four rows."""
    array = pa.array

    def in_chunks(values: Any, kind: pa.DataType) -> pa.ChunkedArray:
        cut = 1 if pa.types.is_string(kind) else 3
        return pa.chunked_array([array(values[:cut], kind), array(values[cut:], kind)])

    monkeypatch.setattr(pa, "array", in_chunks)
    writer = ColumnWriter(pa.schema([("id", pa.string()), ("texts", pa.list_(pa.string()))]))
    rows = (["a", "b", "c", "d"], [["one"], [], ["two", "three"], ["four"]])
    writer.add_lists(*rows)
    table = writer.finish()
    assert [table.row(number) for number in range(len(table))] == [list(row) for row in zip(*rows, strict=True)]
    (block,) = table.blocks()
    assert [column.to_pylist() for column in block.columns] == list(rows)


def test_a_pickled_slice_takes_no_other_rows_along() -> None:
    samples = [Sample(f"{number}", "train", Path(f"{number}.png"), (text,), (0,), "") for number, text in enumerate(TEXTS)]
    table = SampleColumns.of(samples)
    whole = len(pickle.dumps(table))
    for part, expected in ((table[3:9], samples[3:9]), (table[::-100], samples[::-100]), (table[:0], [])):
        assert len(pickle.dumps(part)) < whole / 5
        assert list(pickle.loads(pickle.dumps(part))) == expected
        assert list(pickle.loads(pickle.dumps(part.ids))) == [each.id for each in expected]
        assert len(pickle.dumps(part.ids)) < whole / 5
    assert pickle.loads(pickle.dumps(table)) == samples


def test_slices_are_joined_as_those_of_a_list() -> None:
    samples = [Sample(f"{number}", "val", Path(f"{number}.png"), (), (number, 7), "") for number in range(5)]
    table = SampleColumns.of(samples)
    assert list(table[:1] + table[3:]) == samples[:1] + samples[3:]
    assert list(table[:0] + samples[1:2]) == samples[1:2]
