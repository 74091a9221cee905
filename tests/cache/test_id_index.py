"""The index of ids: a list's own `index` is the oracle, in this process and in one that hashes texts otherwise."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

from pipeline.cache.id_index import IdIndex
from pipeline.data.columns import Strings

_FIND = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).find(sys.argv[2:]).tolist())"


def test_ids_are_found_in_another_process(tmp_path: Path) -> None:
    """Each process has hashes of texts of its own."""
    ids = [f"sample {number}" for number in range(50)]
    wanted = ["sample 31", "none", "sample 0", "sample 49"]
    index = IdIndex(Strings.collect([ids]))
    expected = [ids.index(each) if each in ids else -1 for each in wanted]
    assert index.find(wanted).tolist() == expected
    (tmp_path / "index").write_bytes(pickle.dumps(index))
    command = [sys.executable, "-c", _FIND, str(tmp_path / "index"), *wanted]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == str(expected)
