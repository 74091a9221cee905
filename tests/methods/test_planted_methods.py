"""The contract fails for a method that breaks a rule: each rule has a method here that breaks nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_method_contract as contract
from helpers.planted_methods import BATCH_STATISTICS, DERIVED_NUMBER, HIDDEN_READ, PLAIN_NUMBER, UNWEIGHTED_TEXT, planted

from pipeline.runtime import plugins

NAME = "planted"
VARIANT: tuple[str, dict[str, Any]] = (NAME, {})
CONTRACT: dict[str, Callable[[], None]] = {
    "numbers are tensors": lambda: contract.test_numbers_are_tensors(NAME),
    "text is weighted by paired": lambda: contract.test_text_is_weighted_by_paired(NAME),
    "a sample is predicted by itself": lambda: contract.test_a_prediction_depends_on_its_own_sample_only(VARIANT),
    "no number is read back": lambda: contract.test_an_ensemble_computes_the_same_as_each_of_its_models(VARIANT),
}
BROKEN = [
    ("numbers are tensors", PLAIN_NUMBER),
    ("numbers are tensors", DERIVED_NUMBER),
    ("text is weighted by paired", UNWEIGHTED_TEXT),
    ("a sample is predicted by itself", BATCH_STATISTICS),
    ("no number is read back", HIDDEN_READ),
]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., None]]:
    path = tmp_path / f"{NAME}.py"

    def load_planted(*changes: tuple[str, str]) -> None:
        plugins.load_file(planted(tmp_path, NAME, *changes))

    yield load_planted
    plugins.forget_file(path)


@pytest.mark.parametrize("rule", CONTRACT)
def test_the_example_obeys(rule: str, load: Callable[..., None]) -> None:
    load()
    CONTRACT[rule]()


@pytest.mark.parametrize(("rule", "change"), BROKEN)
def test_a_planted_method_that_breaks_a_rule_fails(rule: str, change: tuple[str, str], load: Callable[..., None]) -> None:
    load(change)
    with pytest.raises((AssertionError, RuntimeError)):
        CONTRACT[rule]()
