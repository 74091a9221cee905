"""Disks that are full, broken, or not ours: one line with the remedy, whole shards, and the same bytes once there is room."""

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
    command,
    complaint,
    content,
    end,
    fill,
    good_shards,
    mount_tmpfs,
    num_commits,
    run_command,
    start,
    write_texts,
)

from pipeline.commands import app as cli
from pipeline.data.manifest import Manifest

NUM_SHARDS = 8
ITEM_BYTES = 24 * 3 * 160 * 160  # of the pictures that the tiny dataset has for training


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], str]:
    """A home with a smaller `texts` prepared, and the content and the place of its cache."""
    home = tmp_path_factory.mktemp("two_shards")
    manifest = write_texts(home, 30)
    path = fill(manifest, tmp_path_factory.mktemp("whole"))
    return home, content(path), f"caches/texts/{path.name}"


def try_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of the command line, in this process."""
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
    home, expected, place = two_shards
    steps = 0
    while True:
        own = tmp_path / str(steps)
        shutil.copytree(home, own)
        with monkeypatch.context() as patch:
            fail_from(patch, steps, errno.ENOSPC)
            code, line = try_command(command(own, "--workers", "0"), monkeypatch, capsys)
        if code == 0:
            break
        steps += 1
        assert code == 2
        assert line.startswith(f"diffalign: {own / place}: No space left on device; free some space")
        assert not list(own.rglob("*.tmp"))
        assert good_shards(own / place, expected) == num_commits(own / place)
        assert try_command(command(own, "--workers", "0"), monkeypatch, capsys)[0] == 0
        assert content(own / place) == expected
    with capsys.disabled():
        print(
            f"\na disk that is full from any of {steps} writes on: {steps} times one line, whole shards, the same bytes after"
        )
    assert steps == 2 * len(expected)  # a file and its folder


def fail_from(patch: pytest.MonkeyPatch, step: int, code: int) -> None:
    """Let the disk refuse to keep what is written, from a step on: where a real one says that it is full, at the latest."""
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
        (errno.EFBIG, "raise the limit of file sizes (ulimit -f), or take smaller --shard-rows"),
        (errno.EIO, "give a readable file, or a writable folder with --home"),
    ],
)
def test_every_refusal_has_its_remedy(
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
    assert try_command(command(own, "--workers", "0"), monkeypatch, capsys) == (2, line)


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
        code, line = try_command(command(own), monkeypatch, capsys)
        assert code == 2
        assert re.match(rf"diffalign: {own / blocked}.*; give a readable file, or a writable folder with --home", line)


def test_a_small_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one where the kernel lets us mount it, else one that takes no file as large as a shard."""
    home = tmp_path / "home"
    texts = write_texts(home, 170)
    expected = content(fill(texts, tmp_path / "whole", width="128"))
    room, errors = tmp_path / "room", tmp_path / "errors"
    room.mkdir()
    code = end(start(extract_in_small_room, home, room, errors))
    line = complaint(errors)
    assert code == 2
    kind = "No space left on device" if "No space" in line else "File too large"
    (path,) = (tmp_path / "after" / "caches" / "texts").iterdir()
    committed = num_commits(path)
    assert re.match(rf"diffalign: {room}/home/caches/texts/{path.name}: {kind}; (free some space|raise the limit)", line)
    assert committed in (range(1, NUM_SHARDS) if kind.startswith("No") else [0])
    assert good_shards(path, expected) == committed
    assert not list(path.rglob("*.tmp"))
    assert content(fill(texts, tmp_path / "after", width="128")) == expected
    with capsys.disabled():
        print(f"\na small disk said {kind!r} after {committed} of {NUM_SHARDS} shards, which stay")


def test_a_small_disk_for_prepared_items(tiny_manifest: Manifest, tmp_path: Path) -> None:
    """A file that is written through a mapping would end the process by SIGBUS, with no word."""
    home = joint_home.make_home(tiny_manifest, tmp_path / "home")
    init = joint_home.head(home, "baseline", epochs=1).path.relative_to(home)
    room, errors = tmp_path / "room", tmp_path / "errors"
    room.mkdir()
    assert end(start(finetune_in_small_room, home, room, init, errors)) == 2
    line = complaint(errors)
    (joint,) = (tmp_path / "after" / "joint" / "tiny").glob("*/seed0")
    place = rf"{room}/home/joint/tiny/{joint.parent.name}/seed0"
    assert re.match(rf"diffalign: {place}: (No space left on device; free some space|File too large; raise)", line)
    assert not list(joint.glob("items/*.npy"))
    assert not list(joint.glob("items/.*.tmp"))
    assert end(start(run_command, finetuning(tmp_path / "after", init), tmp_path / "later")) == 0
    assert (joint / "done").is_file()


def finetune_in_small_room(home: Path, room: Path, init: Path, errors: Path) -> None:
    """Finetune where there is no room for the pixels, and leave what is there then in `after`, beside the room."""
    size = sum(file.stat().st_size + 8192 for file in home.rglob("*"))
    try:
        mount_tmpfs(room, size + ITEM_BYTES // 2)
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ITEM_BYTES // 2, ITEM_BYTES // 2))
    shutil.copytree(home, room / "home")
    try:
        run_command(finetuning(room / "home", init), errors)
    finally:
        shutil.copytree(room / "home", room.parent / "after")


def finetuning(home: Path, init: Path) -> list[str]:
    """The command line that trains an image encoder for an epoch."""
    return ["finetune", "--init", str(home / init), "--train", "epochs=1", "--workers", "0", "--home", str(home)]


def extract_in_small_room(home: Path, room: Path, errors: Path) -> None:
    """Extract where there is no room for all of it, and leave what is there then in `after`, beside the room."""
    try:
        mount_tmpfs(room, 600_000)
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    shutil.copytree(home, room / "home")
    try:
        run_command(command(room / "home", "--workers", "0", width="128"), errors)
    finally:
        shutil.copytree(room / "home", room.parent / "after")
