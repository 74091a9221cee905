"""The benchmark of millions of rows runs on twenty thousand; a manifest keeps few bytes of each, wherever its columns lie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rows

from pipeline.data import columns
from pipeline.data.manifest_files import read_manifest

NUM_ROWS = 20_000


def test_every_part_runs_and_columns_in_a_file_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows.write_rows(tmp_path / "home", NUM_ROWS)
    in_memory = read_manifest(tmp_path / "home", "rows")
    monkeypatch.setattr(columns, "MAX_BYTES_IN_MEMORY", 0)
    mapped = rows.run_manifest(tmp_path)
    assert mapped.fingerprint() == in_memory.fingerprint()
    for position in (0, 17, NUM_ROWS - 1, 16_384, 3):  # 16,384 is the first of the second batch
        assert mapped.samples[position] == in_memory.samples[position]
        assert mapped.samples[position].id == f"photo-{position:09d}"
    assert mapped.split("val").ids[5] == "photo-000000051"
    for part in (rows.run_resume, rows.run_join, rows.run_verify):
        part(tmp_path)


def test_the_peak_is_that_of_what_runs() -> None:
    """In a process of its own: one that has run other tests may take the memory from what they gave back."""
    script = """
import rows
with rows.peak_bytes() as peak:
    before = rows.own_bytes()
    held = bytearray(b"x") * 50_000_000
print(peak[0] - before)
"""
    folder = Path(rows.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert 45_000_000 < int(done.stdout) < 60_000_000
