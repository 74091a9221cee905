"""The simulation of 10⁹ rows runs with forty shards, and the comparison of a plan with its extraction with few pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scale


@pytest.mark.parametrize("with_media", [False, True])
def test_every_look_at_a_cache_is_timed(with_media: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.measure_cache(tmp_path, 40, with_media)
    lines = capsys.readouterr().out.splitlines()
    timed = [line for line in lines if re.search(r", (40 shards|1 claims): [\d.]+ s, of the processor [\d.]+ s \(.*peak", line)]
    assert len(timed) == 6
    (size,) = [int(found[1].replace(",", "")) for line in lines if (found := re.search(r"bytes ([\d,]+) per record", line))]
    assert size > 8192 * 8 if with_media else size < 1000


@pytest.mark.exhaustive
def test_a_plan_is_right_within_a_third(tmp_path: Path) -> None:
    import plan

    found = plan.compare(tmp_path, 3000, 10, "efficientnet_lite", ["side=64"])
    assert 0.7 < found["said"] / found["taken"] < 1.3
    assert 0.7 < found["said_processor"] / found["taken_processor"] < 1.3
