"""Heads are found by the words that people use for them."""

from __future__ import annotations

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock
from pipeline.runtime.head_names import HeadFolder, check_name_is_free, find_head, find_head_runs, find_run, list_heads
from pipeline.runtime.runs import RunConfig, RunFolder, remove_runs

CONFIG = RunConfig(
    dataset="birds", method="seda", settings={}, training={}, caches={}, shapes={}, text_aggregate="mean", manifest="0" * 64
)
ONE, TWO = CONFIG, replace(CONFIG, settings={"width": 8})
OTHER = replace(CONFIG, dataset="fish", method="ema")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Three heads with two seeds each; `TWO` has finished last, and the second seed of `ONE` has not."""
    for moment, config in enumerate((ONE, OTHER, TWO)):
        for seed in (0, 1):
            run = RunFolder.of(tmp_path, config, seed)
            run.create(config)
            if (config, seed) != (ONE, 1):
                run.write_done({"seconds": 1.0, "checkpoint_sha256": ""})
                os.utime(run.path / "done", (moment, moment))
    return tmp_path


def head_of(home: Path, config: RunConfig) -> HeadFolder:
    return HeadFolder(RunFolder.of(home, config, 0).path.parent)


def test_a_head_is_found_by_each_of_its_words(home: Path) -> None:
    two = head_of(home, TWO)
    two.change_tags(add=["best", "for-the-paper"])
    for word in ("latest", "best", two.name, two.name[:-3], f"birds/{two.name}", "birds/best", "birds/latest"):
        assert find_head(home, word) == two, word
    assert find_head(home, "ema") == head_of(home, OTHER)  # the only head of this method
    assert find_head(home, "latest", "fish") == head_of(home, OTHER)
    assert [run.seed for run in find_head_runs(home, "best")] == [0, 1]
    assert find_run(home, "best/seed1") == RunFolder.of(home, TWO, 1) == find_run(home, str(two.path / "seed1"))
    assert find_head_runs(home, str(two.path)) == two.runs


def test_a_word_that_fits_no_head_or_several_lists_the_choices(home: Path) -> None:
    with pytest.raises(UserError, match=r"several heads are called 'seda'; choose one of: birds/seda-\w+, birds/seda-"):
        find_head(home, "seda")
    head_of(home, OTHER).change_tags(add=["best"])
    with pytest.raises(UserError, match=r"no head that is called 'bset'; choose one of: birds/seda.*did you mean 'best'"):
        find_head(home, "bset")
    with pytest.raises(UserError, match=r"cats/latest is not a run, and .* has no head of cats: train one"):
        find_head(home, "cats/latest")
    with pytest.raises(UserError, match="is called ''"):
        find_head(home, "")
    with pytest.raises(UserError, match=r"ema has several seeds; choose one of: ema/seed0, ema/seed1"):
        find_run(home, "ema")
    with pytest.raises(UserError, match="has no seed7; it has: seed0, seed1"):
        find_head_runs(home, "ema/seed7")
    with pytest.raises(UserError, match="train one with"):
        find_head(home / "nothing", "latest")


@pytest.mark.parametrize("word", ["latest", "seed0", "a b", "../up", "-x", "", "ä" * 65, "\x1b[31m", "ema-aaaaaaaaaaaa"])
def test_words_that_could_be_mistaken_are_no_tags(home: Path, word: str) -> None:
    with pytest.raises(UserError):
        head_of(home, ONE).change_tags(add=[word])
    assert head_of(home, ONE).tags == ()


def test_tags_come_and_go_and_a_name_belongs_to_one_head(home: Path) -> None:
    one, two = head_of(home, ONE), head_of(home, TWO)
    assert one.change_tags(add=["paper", "Größe_1"]) == ("Größe_1", "paper")
    assert one.change_tags(remove=["paper"]) == ("Größe_1",)
    with pytest.raises(UserError, match="has no tag 'paper'"):
        one.change_tags(remove=["paper"])
    check_name_is_free(home, "Größe_1", one)
    with pytest.raises(UserError, match=rf"has the name 'Größe_1' already.*runs tag birds/{one.name} Größe_1 --remove"):
        check_name_is_free(home, "Größe_1", two)
    (one.path / "tags.json").write_text("[")
    with pytest.raises(UserError, match="is damaged; delete it"):
        find_head(home, "anything")


def test_removing_takes_whole_runs_and_empty_heads(home: Path) -> None:
    one, two = head_of(home, ONE), head_of(home, TWO)
    two.change_tags(add=["gone"])
    with lock(one.path / "seed1"), pytest.raises(UserError, match="another process is writing"):
        remove_runs(home, [one.path / "seed0", one.path / "seed1"])
    assert len(one.runs) == 2
    remove_runs(home, [one.path / "seed0"])
    assert [run.seed for run in one.runs] == [1]
    (two.path / ".seed9.removed").mkdir()  # left by a removal that was killed
    remove_runs(home, [run.path for run in two.runs])
    assert not two.path.exists()
    assert list_heads(home) == [one, head_of(home, OTHER)]
    assert json.loads((RunFolder.of(home, ONE, 1).path / "config.json").read_text())["method"] == "seda"


def test_nothing_outside_of_the_home_is_removed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    one = head_of(home, ONE)
    (one.path / "notes.txt").write_text("mine")
    elsewhere = tmp_path_factory.mktemp("documents")
    copy = Path(shutil.copytree(one.path / "seed0", elsewhere / "seed0"))
    (one.path / "seed7").symlink_to(copy)
    for folder in (copy, one.path / "seed7", one.path / ".." / one.name / ".." / "seed0"):
        with pytest.raises(UserError, match="is no run in"):
            remove_runs(home, [one.path / "seed0", folder])
    assert sorted(path.name for path in elsewhere.rglob("*")) == ["config.json", "done", "seed0"]
    (one.path / "seed7").unlink()
    remove_runs(home, [run.path for run in one.runs])
    assert [path.name for path in one.path.iterdir()] == ["notes.txt"]


def test_a_lock_is_not_taken_in_a_folder_that_has_been_removed(home: Path) -> None:
    """Who waits for a run that is removed meanwhile starts in a new folder, and is alone there."""
    folder = head_of(home, ONE).path / "seed0"
    entered = Event()

    def wait_for_it() -> None:
        with lock(folder, wait=True):
            entered.set()
            with pytest.raises(UserError, match="another process is writing"), lock(folder):
                pass

    with ThreadPoolExecutor(1) as thread:
        with lock(folder):
            waiting = thread.submit(wait_for_it)
            time.sleep(0.2)
            assert not entered.is_set()
            shutil.move(folder, folder.with_name("gone"))
        waiting.result(timeout=20)
