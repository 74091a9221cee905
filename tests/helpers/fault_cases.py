"""Shared by the fault tests: a dataset of texts, the bytes of a cache, and child processes that can be killed."""

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
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.types import Sample

FORK = multiprocessing.get_context("fork")  # child processes need not import torch again
SHARD_ROWS = 512
CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000  # flags of unshare(2)
TEXT_SETTINGS = {"modality": "text", "width": "8"}


def write_texts(home: Path, num_samples: int) -> Manifest:
    """Write and return the manifest of the dataset `texts`: its samples have 0, 24, 48, 0, 24 ... texts of equal length."""
    samples = tuple(
        Sample(f"s{row:03d}", "train", Path(f"{row}.png"), tuple(f"{row:03d}: {n:02d}" for n in range(row % 3 * 24)), (0,), "")
        for row in range(num_samples)
    )
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}, "licence": "generated"}
    manifest = Manifest("texts", "single", ("only",), samples, meta, home)
    write_manifest(manifest, home)
    return manifest


def extract_texts(manifest: Manifest, home: Path, workers: int = 0, **settings: str) -> Path:
    """Extract the texts of a manifest in shards of 512 rows, and return the cache's folder."""
    options = ExtractOptions(workers=workers, shard_rows=SHARD_ROWS, progress=False)
    return extract(manifest, "random_projection", {**TEXT_SETTINGS, **settings}, home, options=options)


def cache_content(path: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a cache by name; of commit records everything but the seconds."""
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
    """Return how many shards of a cache have a commit record."""
    return len(list((path / "commits").glob("0*.json")))


def num_good_shards(path: Path, expected: dict[str, bytes]) -> int:
    """Return how many shards of a cache are committed and have the expected bytes."""
    return sum(
        layout.commit_path(path, shard).is_file() and (path / "features" / "c" / str(shard) / "0").read_bytes() == data
        for shard, data in enumerate(data for name, data in expected.items() if name.startswith("features/c/"))
        if (path / "features" / "c" / str(shard) / "0").is_file()
    )


def extract_command(home: Path, *options: str, **settings: str) -> list[str]:
    """Return the arguments of `diffalign` that do what `extract_texts` does."""
    pairs = [part for key, value in {**TEXT_SETTINGS, **settings}.items() for part in ("--set", f"{key}={value}")]
    location = ["--shard-rows", str(SHARD_ROWS), "--home", str(home)]
    return ["extract", "texts", "--encoder", "random_projection", *pairs, *location, *options]


def run_command(arguments: list[str], errors: Path) -> None:
    """Run `diffalign` in a child process, with its output in a file; the exit code is that of the command."""
    sys.argv = ["diffalign", *arguments]
    sys.stdout = sys.stderr = errors.open("w")
    try:
        cli.main()
    finally:
        sys.stderr.flush()


def error_line(errors: Path) -> str:
    """Return the one line that a failed command has printed after its progress bar."""
    written = errors.read_text()
    assert "Traceback" not in written, written
    (line,) = [line for line in written.replace("\r", "\n").splitlines() if line.startswith("diffalign: ")]
    assert written.endswith(f"{line}\n")
    return line


def start_child(action: Callable[..., object], *arguments: Any) -> Any:
    """Start a child process that runs the action."""
    child = FORK.Process(target=_run_in_child, args=(action, *arguments))
    child.start()
    return child


def _run_in_child(action: Callable[..., object], *arguments: Any) -> None:
    gc.freeze()  # keep the garbage collector from the parent's objects: scanning them takes longer than the test
    torch.set_num_threads(1)  # a forked child has none of the parent's threads
    action(*arguments)


def wait_for_exit(child: Any) -> int:
    """Return the exit code of a child that ends by itself."""
    child.join(60)
    assert child.exitcode is not None, "it hangs"
    return child.exitcode


def kill_after_progress(action: Callable[[], object], progress: Callable[[], int], wanted: int, delay: float) -> bool:
    """Run an action in a child process, and kill it when it has made some progress.

    Args:
        action: what the child does.
        progress: returns how far it is.
        wanted: the progress after which it is killed.
        delay: seconds between this progress and the kill.

    Returns:
        False when the child had ended before.
    """
    child = start_child(action)
    while child.is_alive() and progress() < wanted:
        time.sleep(0.001)
    child.join(delay)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def mount_tmpfs(folder: Path, num_bytes: int) -> None:
    """Mount a disk in memory that only this process sees; it must have a single thread.

    Raises:
        OSError: the system does not allow it.
    """
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()

    def call(function: str, *arguments: Any) -> None:
        if getattr(libc, function)(*arguments):
            raise OSError(ctypes.get_errno(), function)

    call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={num_bytes}".encode())
