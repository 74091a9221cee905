"""Tests of tuned settings: those of the home count before those of the dataset, and a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.data.spec import load_spec
from pipeline.runtime.errors import UserError
from pipeline.training.heads import resolve_head_settings
from pipeline.training.tuned import format_tuned, read_tuned, read_tuned_file, tuned_path, write_tuned

OWN = {"settings": {"dropout": 0.125}, "training": {"lr": 0.0625}, "selection": {"score": 12.5}}


def test_the_home_s_own_settings_count_before_those_that_ship(tmp_path: Path) -> None:
    shipped = load_spec("openmoji")["tuned"]
    write_tuned(tmp_path, "openmoji", {"baseline": OWN})
    config, training = resolve_head_settings("openmoji", "baseline", "tuned", {}, {}, tmp_path)
    assert (config.dropout, training.lr, training.epochs) == (0.125, 0.0625, 20)
    config, training = resolve_head_settings("openmoji", "baseline", "tuned", {"dropout": 0.25}, {"epochs": 3}, tmp_path)
    assert (config.dropout, training.lr, training.epochs) == (0.25, 0.0625, 3)  # what is given counts before both
    assert read_tuned("openmoji", "ema", tmp_path) == (shipped["ema"]["settings"], shipped["ema"]["training"])
    assert read_tuned("openmoji", "baseline", None) == (shipped["baseline"]["settings"], shipped["baseline"]["training"])


def test_writing_replaces_entries_and_keeps_the_others(tmp_path: Path) -> None:
    write_tuned(tmp_path, "openmoji", {"baseline": OWN, "ema": OWN})
    newer = {**OWN, "selection": {"score": 0.1 + 0.2}}
    path = write_tuned(tmp_path, "openmoji", {"ema": newer})
    assert path == tuned_path(tmp_path, "openmoji")
    assert read_tuned_file(tmp_path, "openmoji") == {"baseline": OWN, "ema": newer}
    assert yaml.safe_load(format_tuned({"ema": newer})) == {"tuned": {"ema": newer}}


@pytest.mark.parametrize("text", ["tuned: 3", "tuned: {ema: 3}", "tuned: {ema: {settings: 3}}", "[]", "{"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    path = tuned_path(tmp_path, "openmoji")
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=str(path)):
        read_tuned("openmoji", "ema", tmp_path)


def test_without_tuned_settings_the_message_says_how_to_find_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tuned settings for 'own_method'.*diffalign tune openmoji --methods own_method"):
        read_tuned("openmoji", "own_method", tmp_path)
