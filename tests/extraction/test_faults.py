"""An extraction that is killed at any moment, or loses its workers, is resumed by the same command to the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fault_cases import (
    cache_content,
    error_line,
    extract_command,
    extract_texts,
    kill_after_progress,
    num_commits,
    num_good_shards,
    run_command,
    start_child,
    wait_for_exit,
    write_texts,
)
from torch import Tensor

from pipeline.commands import app as cli
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.extract import ExtractOptions
from pipeline.extraction.repair import repair
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import lock

NUM_SHARDS = 8
NUM_KILLS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with `texts` prepared and nothing extracted; tests work on a copy."""
    home = tmp_path_factory.mktemp("texts")
    write_texts(home, 170)
    return home


@pytest.fixture(scope="module")
def texts(home: Path) -> Manifest:
    return read_manifest(home, "texts")


@pytest.fixture(scope="module")
def whole(texts: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an undisturbed command, at <home>/caches/texts/random_projection-*; tests never write to it."""
    home = tmp_path_factory.mktemp("whole")
    shutil.copytree(texts.media_root, home, dirs_exist_ok=True)
    # In this process, so that its forked children find everything imported.
    cli.app(extract_command(home, "--workers", "0"), standalone_mode=False)
    return extract_texts(texts, home)


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, bytes]:
    return cache_content(whole)


def repair_here(path: Path) -> list[str]:
    return repair(path, ExtractOptions(workers=0, progress=False))


def copy_with_damage(whole: Path, home: Path) -> None:
    """Copy the home of a cache, and damage every shard of the copy."""
    shutil.copytree(whole.parents[2], home)
    for file in (home / whole.relative_to(whole.parents[2]) / "features" / "c").glob("*/0"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["extract", "repair"])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    task: str, texts: Manifest, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The moments cover the whole extraction: the i-th kill comes a random time after i/20 of the shards are committed."""
    rng = random.Random(task)
    home = tmp_path / "home"
    path = home / whole.relative_to(whole.parents[2])
    run_task: Callable[[], Any] = (lambda: repair_here(path)) if task == "repair" else (lambda: extract_texts(texts, home))
    committed: list[int] = []
    while len(committed) < NUM_KILLS:
        if task == "repair":
            copy_with_damage(whole, home)
        wanted = len(committed) * NUM_SHARDS // NUM_KILLS
        if kill_after_progress(run_task, lambda: num_good_shards(path, expected), wanted, rng.uniform(0, 0.08)):
            committed.append(num_good_shards(path, expected))
        run_task()
        assert cache_content(path) == expected
        shutil.rmtree(home)
    with capsys.disabled():
        print(f"\n{len(committed)} killed runs of {task} resumed to the same bytes; committed shards when killed:", *committed)
    assert len(set(committed)) >= NUM_SHARDS // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_five_times_in_a_row(
    workers: int, texts: Manifest, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers end with the process that is killed, so that the next one finds the cache unlocked."""
    path = tmp_path / whole.relative_to(whole.parents[2])
    committed: list[int] = []
    while len(committed) < 5:
        if kill_after_progress(
            lambda: extract_texts(texts, tmp_path, workers), lambda: num_good_shards(path, expected), len(committed) + 1, 0.0
        ):
            committed.append(num_good_shards(path, expected))
            wait_until_free(path)
        else:  # it ended before the kill: start again
            committed.clear()
            shutil.rmtree(path)
    assert committed == sorted(committed)
    assert cache_content(extract_texts(texts, tmp_path, workers)) == expected
    with capsys.disabled():
        print(f"\none run with {workers} workers, interrupted five times; committed shards each time:", *committed)


def wait_until_free(path: Path) -> None:
    """Wait: the kernel needs a moment to end the workers of a killed process."""
    deadline = time.monotonic() + 2
    while True:
        try:
            with lock(path):
                return
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_extractions_at_once_lose_nothing(
    texts: Manifest, home: Path, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = 0
    for trial in range(5):
        own = tmp_path / str(trial)
        shutil.copytree(home, own)
        logs = [tmp_path / f"{trial}-{number}" for number in range(2)]
        codes = [
            wait_for_exit(child)
            for child in [start_child(run_command, extract_command(own, "--workers", "0"), log) for log in logs]
        ]
        assert sorted(codes) in ([0, 0], [0, 2])
        refused += 2 in codes
        if 2 in codes:
            assert re.search(r"another process is writing to .*; wait until it has ended$", error_line(logs[codes.index(2)]))
        assert cache_content(own / whole.relative_to(whole.parents[2])) == expected
    with capsys.disabled():
        print(f"\n5 pairs of extractions at once: {refused} times one refused, nothing was lost")
    assert refused


@pytest.mark.slow
def test_killed_workers_are_one_line(
    home: Path, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(7)
    sample_ids: list[str] = []
    trial = 0
    while len(sample_ids) < 8:
        own, errors = tmp_path / str(trial), tmp_path / f"{trial}.txt"
        trial += 1
        shutil.copytree(home, own)
        path = own / whole.relative_to(whole.parents[2])
        code = wait_for_exit(
            start_child(run_command_and_kill_worker, rng.uniform(0, 0.15), extract_command(own, "--workers", "2"), errors)
        )
        if code == 2:
            line = error_line(errors)
            match = re.search(r"a worker process was killed \(SIGKILL\) at sample '(s\d{3})' or a little later: ", line)
            assert match, line
            sample_ids.append(match[1])
        assert num_good_shards(path, expected) == num_commits(path)
        run = start_child(run_command, extract_command(own, "--workers", "0"), errors)
        assert wait_for_exit(run) == 0, errors.read_text()
        assert cache_content(path) == expected
    with capsys.disabled():
        print("\n8 killed workers of the loader, at samples", *sample_ids)


def run_command_and_kill_worker(delay: float, arguments: list[str], errors: Path) -> None:
    """Run a command, and kill one of its workers `delay` seconds after they have started."""

    def kill() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.001)
        time.sleep(delay)
        for child in multiprocessing.active_children()[:1]:
            child.kill()

    threading.Thread(target=kill, daemon=True).start()
    run_command(arguments, errors)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (UserError("nothing fits"), UserError, "^nothing fits$"),
        (ValueError("a mistake"), RuntimeError, "a worker process failed; what it said is above"),
        (ZeroDivisionError("a mistake"), RuntimeError, "a worker process failed; what it said is above"),
    ],
)
def test_an_error_in_a_worker_is_reported(
    error: Exception,
    kind: type[Exception],
    message: str,
    texts: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(self: RandomProjection, prepared: Tensor) -> Tensor:
        raise error

    monkeypatch.setattr(RandomProjection, "forward", fail)
    with pytest.raises(kind, match=message) as raised:
        extract_texts(texts, tmp_path, workers=2)
    is_bug, shown = kind is RuntimeError, f"{type(error).__name__}: a mistake"
    assert (shown in capfd.readouterr().err) == is_bug
    assert (shown in "".join(traceback.format_exception(raised.value))) == is_bug
    assert not multiprocessing.active_children()
