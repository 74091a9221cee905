"""Full, broken or forbidden disks: one line with the remedy, only whole shards, and the same bytes once there is room."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import sys
from pathlib import Path

import pytest
from helpers import joint_home
from helpers.fault_cases import (
    cache_content,
    error_line,
    extract_command,
    extract_texts,
    mount_tmpfs,
    num_commits,
    num_good_shards,
    run_command,
    start_child,
    wait_for_exit,
    write_texts,
)

from pipeline.commands import app as cli
from pipeline.data.manifest import Manifest

NUM_SHARDS = 8
ITEM_BYTES = 24 * 3 * 160 * 160  # of the prepared pictures of the training split of `tiny`


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], str]:
    """A home with a smaller `texts` prepared, and the content and the relative path of its finished cache."""
    home = tmp_path_factory.mktemp("two_shards")
    manifest = write_texts(home, 30)
    path = extract_texts(manifest, tmp_path_factory.mktemp("whole"))
    return home, cache_content(path), f"caches/texts/{path.name}"


def try_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the command line in this process, and return its exit code and the last line of standard error."""
    monkeypatch.setattr(sys, "argv", ["diffalign", *arguments])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    assert isinstance(raised.value.code, int)
    return raised.value.code, capsys.readouterr().err.replace("\r", "\n").rstrip().rpartition("\n")[2]


def test_a_disk_that_is_full_from_any_write_on(
    two_shards: tuple[Path, dict[str, bytes], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, expected, cache_path = two_shards
    steps = 0
    while True:
        own = tmp_path / str(steps)
        shutil.copytree(home, own)
        with monkeypatch.context() as patch:
            fail_from(patch, steps, errno.ENOSPC)
            code, line = try_command(extract_command(own, "--workers", "0"), monkeypatch, capsys)
        if code == 0:
            break
        steps += 1
        assert code == 2
        assert line.startswith(f"diffalign: {own / cache_path}: No space left on device; free some space")
        assert not list(own.rglob("*.tmp"))
        assert num_good_shards(own / cache_path, expected) == num_commits(own / cache_path)
        assert try_command(extract_command(own, "--workers", "0"), monkeypatch, capsys)[0] == 0
        assert cache_content(own / cache_path) == expected
    with capsys.disabled():
        print(
            f"\na disk that is full from any of {steps} writes on: {steps} times one line, whole shards, the same bytes after"
        )
    assert steps == 2 * len(expected)  # a file and its folder


def fail_from(patch: pytest.MonkeyPatch, step: int, code: int) -> None:
    """Make every fsync from this step on fail: a real full disk reports the error there at the latest."""
    fsync, steps = os.fsync, iter(range(1_000_000))

    def refuse(descriptor: int) -> None:
        if next(steps) >= step:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    patch.setattr(os, "fsync", refuse)


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.EDQUOT, "free some of your quota, or take another disk with --home; the same command goes on from here"),
        (errno.EROFS, "make the disk writable, or take another one with --home"),
        (errno.EACCES, "get permission, or take a folder of yours with --home"),
        (errno.EFBIG, "raise the limit of file sizes (ulimit -f), or, for a cache, take smaller --shard-rows"),
        (errno.EIO, "give a readable file, or a writable folder with --home"),
    ],
)
def test_every_disk_error_has_its_remedy(
    code: int,
    remedy: str,
    two_shards: tuple[Path, dict[str, bytes], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = tmp_path / "home"
    shutil.copytree(two_shards[0], own)
    fail_from(monkeypatch, 15, code)
    line = f"diffalign: {own / two_shards[2]}: {os.strerror(code)}; {remedy}"
    assert try_command(extract_command(own, "--workers", "0"), monkeypatch, capsys) == (2, line)


def test_homes_that_cannot_be_written_are_one_line(
    two_shards: tuple[Path, dict[str, bytes], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, blocked in enumerate(("caches", "caches/texts", two_shards[2], f"{two_shards[2]}/features")):
        own = tmp_path / str(number)
        shutil.copytree(two_shards[0], own)
        (own / blocked).parent.mkdir(parents=True, exist_ok=True)
        (own / blocked).touch()
        code, line = try_command(extract_command(own), monkeypatch, capsys)
        assert code == 2
        assert re.match(rf"diffalign: {own / blocked}.*; give a readable file, or a writable folder with --home", line)


def test_a_small_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mounted disk where the kernel allows it, else a limit on file sizes that is smaller than a shard."""
    home = tmp_path / "home"
    texts = write_texts(home, 170)
    expected = cache_content(extract_texts(texts, tmp_path / "whole", width="128"))
    small_disk, errors = tmp_path / "small_disk", tmp_path / "errors"
    small_disk.mkdir()
    code = wait_for_exit(start_child(extract_on_small_disk, home, small_disk, errors))
    line = error_line(errors)
    assert code == 2
    kind = "No space left on device" if "No space" in line else "File too large"
    (path,) = (tmp_path / "after" / "caches" / "texts").iterdir()
    committed = num_commits(path)
    assert re.match(rf"diffalign: {small_disk}/home/caches/texts/{path.name}: {kind}; (free some space|raise the limit)", line)
    assert committed in (range(1, NUM_SHARDS) if kind.startswith("No") else [0])
    assert num_good_shards(path, expected) == committed
    assert not list(path.rglob("*.tmp"))
    assert cache_content(extract_texts(texts, tmp_path / "after", width="128")) == expected
    with capsys.disabled():
        print(f"\na small disk said {kind!r} after {committed} of {NUM_SHARDS} shards, which stay")


def test_a_small_disk_for_prepared_items(tiny_manifest: Manifest, tmp_path: Path) -> None:
    """Writing to a memory-mapped file on a full disk would end the process by SIGBUS, without a message."""
    home = joint_home.make_home(tiny_manifest, tmp_path / "home")
    init = joint_home.train_small_head(home, "baseline", epochs=1).path.relative_to(home)
    small_disk, errors = tmp_path / "small_disk", tmp_path / "errors"
    small_disk.mkdir()
    assert wait_for_exit(start_child(finetune_on_small_disk, home, small_disk, init, errors)) == 2
    line = error_line(errors)
    (joint,) = (tmp_path / "after" / "joint" / "tiny").glob("*/seed0")
    run_path = rf"{small_disk}/home/joint/tiny/{joint.parent.name}/seed0"
    assert re.match(rf"diffalign: {run_path}: (No space left on device; free some space|File too large; raise)", line)
    assert not list(joint.glob("items/*.npy"))
    assert not list(joint.glob("items/.*.tmp"))
    assert wait_for_exit(start_child(run_command, finetune_command(tmp_path / "after", init), tmp_path / "later")) == 0
    assert (joint / "done").is_file()


def finetune_on_small_disk(home: Path, small_disk: Path, init: Path, errors: Path) -> None:
    """Finetune on a disk that is too small for the pixels, then copy the disk to the folder `after` beside it."""
    size = sum(file.stat().st_size + 8192 for file in home.rglob("*"))
    try:
        mount_tmpfs(small_disk, size + ITEM_BYTES // 2)
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ITEM_BYTES // 2, ITEM_BYTES // 2))
    shutil.copytree(home, small_disk / "home")
    try:
        run_command(finetune_command(small_disk / "home", init), errors)
    finally:
        shutil.copytree(small_disk / "home", small_disk.parent / "after")


def finetune_command(home: Path, init: Path) -> list[str]:
    """Return the arguments of `diffalign` that train an image encoder for one epoch."""
    return ["finetune", "--init", str(home / init), "--train", "epochs=1", "--workers", "0", "--home", str(home)]


def extract_on_small_disk(home: Path, small_disk: Path, errors: Path) -> None:
    """Extract on a disk that is too small, then copy the disk to the folder `after` beside it."""
    try:
        mount_tmpfs(small_disk, 600_000)
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    shutil.copytree(home, small_disk / "home")
    try:
        run_command(extract_command(small_disk / "home", "--workers", "0", width="128"), errors)
    finally:
        shutil.copytree(small_disk / "home", small_disk.parent / "after")
