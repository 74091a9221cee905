"""What the tests of faults share: a dataset of texts, the bytes of a cache, and children that can be killed."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.cache import layout
from pipeline.commands import app as cli
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.types import Sample

FORK = multiprocessing.get_context("fork")  # children that need not import torch again
SHARD_ROWS = 512
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000  # of unshare(2)
TEXT = {"modality": "text", "width": "8"}


def write_texts(home: Path, num_samples: int) -> Manifest:
    """The prepared dataset `texts`: samples with 0, 24, 48, 0, 24 ... texts of one length, a row of features each."""
    samples = tuple(
        Sample(f"s{row:03d}", "train", Path(f"{row}.png"), tuple(f"{row:03d}: {n:02d}" for n in range(row % 3 * 24)), (0,), "")
        for row in range(num_samples)
    )
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}, "licence": "generated"}
    manifest = Manifest("texts", "single", ("only",), samples, meta, home)
    manifests.write_manifest(manifest, home)
    return manifest


def fill(manifest: Manifest, home: Path, workers: int = 0, **settings: str) -> Path:
    """Extract the texts of a manifest in shards of 512 rows; returns the cache."""
    effort = ExtractOptions(workers=workers, shard_rows=SHARD_ROWS, progress=False)
    return extract(manifest, "random_projection", {**TEXT, **settings}, home, effort=effort)


def content(path: Path) -> dict[str, bytes]:
    """Every file of a cache, without the seconds in its commit records."""
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name.startswith("commits/0"):
            commit = layout.read_commit(path, int(file.stem))
            files[name] = repr(dataclasses.replace(commit, seconds=0)).encode()
        elif file.is_file() and name != ".lock":
            files[name] = file.read_bytes()
    return files


def num_commits(path: Path) -> int:
    """How many shards of a cache have a record."""
    return len(list((path / "commits").glob("0*.json")))


def good_shards(path: Path, expected: dict[str, bytes]) -> int:
    """How many shards of a cache are committed and as expected."""
    return sum(
        layout.commit_path(path, shard).is_file() and (path / "features" / "c" / str(shard) / "0").read_bytes() == data
        for shard, data in enumerate(data for name, data in expected.items() if name.startswith("features/c/"))
        if (path / "features" / "c" / str(shard) / "0").is_file()
    )


def command(home: Path, *options: str, **settings: str) -> list[str]:
    """The command line that does what `fill` does."""
    given = [part for key, value in {**TEXT, **settings}.items() for part in ("--set", f"{key}={value}")]
    place = ["--shard-rows", str(SHARD_ROWS), "--home", str(home)]
    return ["extract", "texts", "--encoder", "random_projection", *given, *place, *options]


def run_command(arguments: list[str], errors: Path) -> None:
    """Be `diffalign` with these arguments, standard error in a file; for a child, whose exit code is that of the command."""
    sys.argv = ["diffalign", *arguments]
    sys.stdout = sys.stderr = errors.open("w")
    try:
        cli.main()
    finally:
        sys.stderr.flush()


def complaint(errors: Path) -> str:
    """The one line a failed command has left behind its progress bar."""
    written = errors.read_text()
    assert "Traceback" not in written, written
    (line,) = [line for line in written.replace("\r", "\n").splitlines() if line.startswith("diffalign: ")]
    assert written.endswith(f"{line}\n")
    return line


def start(action: Callable[..., object], *arguments: Any) -> Any:
    """A child of this process, at work."""
    child = FORK.Process(target=_begin, args=(action, *arguments))
    child.start()
    return child


def _begin(action: Callable[..., object], *arguments: Any) -> None:
    gc.freeze()  # leave the parent's objects alone: to look through them costs more than the work
    torch.set_num_threads(1)  # a fork has none of the parent's threads
    action(*arguments)


def end(child: Any) -> int:
    """Its exit code, when it has ended by itself."""
    child.join(60)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def killed(action: Callable[[], object], progress: Callable[[], int], wanted: int, delay: float) -> bool:
    """Have a child do something, and kill it some seconds after it has got so far; False when it had ended before."""
    child = start(action)
    while child.is_alive() and progress() < wanted:
        time.sleep(0.001)
    child.join(delay)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def mount_tmpfs(folder: Path, num_bytes: int) -> None:
    """Mount a disk in memory that only this process sees, which must have one thread; `OSError` where that is not allowed."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()

    def call(function: str, *arguments: Any) -> None:
        if getattr(libc, function)(*arguments):
            raise OSError(ctypes.get_errno(), function)

    call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode())
