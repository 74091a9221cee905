"""The tables of RESULTS.md are written from the figures that programs print, and nothing else in that file is touched."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import results

LINES = [
    "store, write pooled: MB/s 612 (580 to 640, 9 rounds) (wanted >= 500); over write and fsync alone 0.6 (0.5 to 0.7)",
    "opening 10,000,000 rows: seconds 2.5 (2.1 to 3.0, 9 rounds) (wanted < 2); of the processor 0.8 (0.7 to 0.9, 9 rounds)",
    "store, read from disk by id as float32 over numpy.fromfile: ratio 0.3 (0.2 to 0.4, 9 rounds); 900 MB/s over 3000",
]


def test_medians_with_a_spread_become_rows() -> None:
    rows = gpu.rows_of("stores", LINES)
    assert [(row["what"], row["measured"], row["spread"], row["is_met"]) for row in rows] == [
        ("store, write pooled", 612.0, "580 to 640, 9 rounds", True),
        ("opening 10,000,000 rows", 2.5, "2.1 to 3.0, 9 rounds", False),
    ]


def test_tables_come_from_the_files_and_go_between_the_marks(tmp_path: Path) -> None:
    part = {"rows": gpu.rows_of("stores", LINES), "returned": 0, "seconds": 61.0, "lines": LINES}
    about = {"device": "a machine", "torch": "2", "python": "3.12", "command": "extract.py --parts store", "note": "quiet"}
    (tmp_path / "stores.json").write_text(json.dumps({**about, "parts": {"stores": part}}))
    written = results.put_between_marks(f"above\n{results.BEGIN}\nold\n{results.END}\nbelow\n", results.tables(tmp_path))
    assert written.startswith(f"above\n{results.BEGIN}\n\n### stores\n\n`extract.py --parts store`; quiet.\nDevice: a machine;")
    assert "| stores | opening 10,000,000 rows | < 2 | 2.5 (2.1 to 3.0, 9 rounds): **short** |" in written
    assert written.endswith(f"{results.END}\nbelow\n")
    assert "old" not in written
    with pytest.raises(SystemExit, match=r"RESULTS\.md has no lines"):
        results.put_between_marks("no marks", "table")


def test_every_part_is_a_program_and_the_file_has_the_marks() -> None:
    for command in results.PARTS.values():
        assert (results.HERE / command.split()[0]).is_file()
    assert results.put_between_marks(results.RESULTS.read_text(), "").count(results.BEGIN) == 1
