"""Killed at any moment, alone or with its workers, the same command goes on from there and ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.fault_cases import (
    command,
    complaint,
    content,
    end,
    fill,
    good_shards,
    killed,
    num_commits,
    run_command,
    start,
    write_texts,
)
from torch import Tensor

from pipeline.commands import app as cli
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.encoders.random_projection import RandomProjection
from pipeline.extraction.extract import ExtractOptions
from pipeline.extraction.repair import repair
from pipeline.runtime.files import lock

NUM_SHARDS = 8
NUM_KILLS = 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with `texts` prepared, and nothing extracted; copy it."""
    home = tmp_path_factory.mktemp("texts")
    write_texts(home, 170)
    return home


@pytest.fixture(scope="module")
def texts(home: Path) -> Manifest:
    return manifests.read_manifest(home, "texts")


@pytest.fixture(scope="module")
def whole(texts: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an undisturbed command, at <home>/caches/texts/random_projection-*; never write to it."""
    home = tmp_path_factory.mktemp("whole")
    shutil.copytree(texts.media_root, home, dirs_exist_ok=True)
    cli.app(command(home, "--workers", "0"), standalone_mode=False)  # here, so that children find everything imported
    return fill(texts, home)


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, bytes]:
    return content(whole)


def mend(path: Path) -> list[str]:
    return repair(path, ExtractOptions(workers=0, progress=False))


def spoil(whole: Path, home: Path) -> None:
    """Copy the home of a cache, with a fault in every shard of the copy."""
    shutil.copytree(whole.parents[2], home)
    for file in (home / whole.relative_to(whole.parents[2]) / "features" / "c").glob("*/0"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("task", ["extract", "repair"])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    task: str, texts: Manifest, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The moments are spread over the run: the i-th is a random while after i/20 of the shards are committed."""
    rng = random.Random(task)
    home = tmp_path / "home"
    path = home / whole.relative_to(whole.parents[2])
    work: Callable[[], Any] = (lambda: mend(path)) if task == "repair" else (lambda: fill(texts, home))
    committed: list[int] = []
    while len(committed) < NUM_KILLS:
        if task == "repair":
            spoil(whole, home)
        wanted = len(committed) * NUM_SHARDS // NUM_KILLS
        if killed(work, lambda: good_shards(path, expected), wanted, rng.uniform(0, 0.08)):
            committed.append(good_shards(path, expected))
        work()
        assert content(path) == expected
        shutil.rmtree(home)
    with capsys.disabled():
        print(f"\n{len(committed)} killed runs of {task} resumed to the same bytes; committed shards when killed:", *committed)
    assert len(set(committed)) >= NUM_SHARDS // 2


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_five_times_in_a_row(
    workers: int, texts: Manifest, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers end with the process that is killed: the next one finds the cache free."""
    path = tmp_path / whole.relative_to(whole.parents[2])
    committed: list[int] = []
    while len(committed) < 5:
        if killed(lambda: fill(texts, tmp_path, workers), lambda: good_shards(path, expected), len(committed) + 1, 0.0):
            committed.append(good_shards(path, expected))
            wait_until_free(path)
        else:  # it was too fast: again from the beginning
            committed.clear()
            shutil.rmtree(path)
    assert committed == sorted(committed)
    assert content(fill(texts, tmp_path, workers)) == expected
    with capsys.disabled():
        print(f"\none run with {workers} workers, interrupted five times; committed shards each time:", *committed)


def wait_until_free(path: Path) -> None:
    """The kernel needs a moment to end the workers of a process that was killed."""
    deadline = time.monotonic() + 2
    while True:
        try:
            with lock(path):
                return
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_two_at_once_lose_nothing(
    texts: Manifest, home: Path, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = 0
    for trial in range(5):
        own = tmp_path / str(trial)
        shutil.copytree(home, own)
        logs = [tmp_path / f"{trial}-{number}" for number in range(2)]
        codes = [end(child) for child in [start(run_command, command(own, "--workers", "0"), log) for log in logs]]
        assert sorted(codes) in ([0, 0], [0, 2])
        refused += 2 in codes
        if 2 in codes:
            assert re.search(r"another process is writing to .*; wait until it has ended$", complaint(logs[codes.index(2)]))
        assert content(own / whole.relative_to(whole.parents[2])) == expected
    with capsys.disabled():
        print(f"\n5 pairs of extractions at once: {refused} times one refused, nothing was lost")
    assert refused


def test_killed_workers_are_one_line(
    home: Path, whole: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(7)
    places: list[str] = []
    trial = 0
    while len(places) < 8:
        own, errors = tmp_path / str(trial), tmp_path / f"{trial}.txt"
        trial += 1
        shutil.copytree(home, own)
        path = own / whole.relative_to(whole.parents[2])
        code = end(start(lose_worker, rng.uniform(0, 0.15), command(own, "--workers", "2"), errors))
        if code == 2:
            line = complaint(errors)
            place = re.search(r"a worker process was killed \(SIGKILL\) at sample '(s\d{3})' or a little later: ", line)
            assert place, line
            places.append(place[1])
        assert good_shards(path, expected) == num_commits(path)
        run = start(run_command, command(own, "--workers", "0"), errors)
        assert end(run) == 0, errors.read_text()
        assert content(path) == expected
    with capsys.disabled():
        print("\n8 killed workers of the loader, at samples", *places)


def lose_worker(delay: float, arguments: list[str], errors: Path) -> None:
    """Extract with workers, one of which is killed some seconds after they have started."""

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
        (ValueError("nothing fits"), ValueError, "^nothing fits$"),
        (ZeroDivisionError("a mistake"), RuntimeError, "a worker process failed; what it said is above"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told(
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
    with pytest.raises(kind, match=message):
        fill(texts, tmp_path, workers=2)
    assert ("ZeroDivisionError: a mistake" in capfd.readouterr().err) == (kind is RuntimeError)
    assert not multiprocessing.active_children()
