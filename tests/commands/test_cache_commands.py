"""Tests of the cache commands: results on stdout, errors in one line with exit code 2, and `rm` removes only caches."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run

from pipeline.cache import find_caches, info, verify
from pipeline.cache.housekeeping import ls, rm
from pipeline.data.manifest import Manifest
from pipeline.runtime.files import lock


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


@pytest.fixture
def caches(home: Path) -> dict[str, Path]:
    """Return the caches of the tiny home by modality."""
    return {info(path)["identity"]["encoder"]["modality"]: path for path in find_caches(home, "tiny")}


def run_and_read(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must succeed, and return what it prints on stdout."""
    assert run(arguments, monkeypatch) == 0
    return capsys.readouterr().out


def run_and_read_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail, and return its line on stderr."""
    assert run(arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_ls_shows_complete_incomplete_and_damaged_caches(
    home: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = json.loads(run_and_read(["cache", "ls", "--home", str(home), "--json"], monkeypatch, capsys))
    assert sorted(line["name"] for line in lines) == sorted(path.name for path in caches.values())
    for line in lines:
        assert (line["dataset"], line["encoder"], line["complete"]) == ("tiny", "random_projection", True)
        assert line["command"].startswith("diffalign extract tiny --encoder random_projection")
        assert (line["samples"], line["store_dtype"], line["rows"]) == (40, "float16", 40)
        assert line["bytes"] == sum(
            file.stat().st_size for file in (home / "caches/tiny" / line["name"]).rglob("features/c/*/0")
        )
    (caches["image"] / "commits" / "00000.json").unlink()
    (caches["text"] / "zarr.json").write_text("{")
    incomplete, damaged = (next(line for line in ls(home) if line["name"] == caches[key].name) for key in ("image", "text"))
    assert (incomplete["complete"], incomplete["problem"]) == (False, "")
    assert damaged["complete"] is False
    assert "zarr.json is damaged" in damaged["problem"]
    table = run_and_read(["cache", "ls", "--home", str(home)], monkeypatch, capsys)
    assert len(table.splitlines()) == 3
    assert "no caches in" in run_and_read(["cache", "ls", "--home", str(home / "none")], monkeypatch, capsys)


def test_stats_and_drift_print_their_results(
    home: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(
        run_and_read(["cache", "stats", str(caches["image"]), "--threshold", "0.5", "--json"], monkeypatch, capsys)
    )
    assert found["rows"] == 40
    assert found["near_duplicates"]["threshold"] == 0.5
    lines = run_and_read(["cache", "stats", str(caches["image"])], monkeypatch, capsys)
    assert f"norms.max: {found['norms']['max']}" in lines.splitlines()
    found = json.loads(
        run_and_read(["cache", "drift", *[str(caches["text"])] * 2, "--top", "2", "--json"], monkeypatch, capsys)
    )
    assert found["min"] == pytest.approx(1.0, abs=1e-12)
    assert len(found["moved"]) == 2
    assert "percentiles.50: " in run_and_read(["cache", "drift", *[str(caches["text"])] * 2], monkeypatch, capsys)


def test_export_and_import_reproduce_a_cache(
    home: Path, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".h5", ".npy", ".parquet", ".safetensors"):
        for path in caches.values():
            file = tmp_path / f"{path.name}{suffix}"
            assert run_and_read(["cache", "export", str(path), str(file)], monkeypatch, capsys) == f"file: {file}\n"
            arguments = ["cache", "import", str(file), "--home", str(tmp_path / suffix), "--json"]
            done = json.loads(run_and_read(arguments, monkeypatch, capsys))
            assert Path(done["path"]) == tmp_path / suffix / path.relative_to(home)
            assert (done["samples"], done["failed"], done["unknown"]) == (40, 0, 0)
            shard = Path("features", "c", "0", "0")
            assert (Path(done["path"]) / shard).read_bytes() == (path / shard).read_bytes()
            assert "every shard agrees" in run_and_read(["cache", "verify", done["path"]], monkeypatch, capsys)


def test_a_head_trains_on_features_computed_elsewhere(
    home: Path,
    tiny_manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = np.random.default_rng(0)
    ids = [sample.id for sample in tiny_manifest.samples]
    features = np.eye(4)[[sample.labels[0] for sample in tiny_manifest.samples]] + 0.1 * rng.normal(size=(40, 4))
    np.save(tmp_path / "theirs.npy", features)
    (tmp_path / "theirs.txt").write_text("\n".join(ids))
    arguments = ["cache", "import", str(tmp_path / "theirs.npy"), "--dataset", "tiny", "--name", "theirs", "--home", str(home)]
    printed = run_and_read(arguments, monkeypatch, capsys)
    assert [line.partition(":")[0] for line in printed.splitlines()] == ["path", "samples", "failed", "next"]
    assert "next: diffalign train-head --dataset tiny --method baseline --image theirs --home" in printed
    train = ["train-head", "--dataset", "tiny", "--method", "baseline", "--image", "theirs", "--home", str(home), "--json"]
    printed = run_and_read([*train, "--text", "random_projection", "--train=epochs=30", "--train=lr=0.1"], monkeypatch, capsys)
    assert json.loads(printed)[0]["acc1"] == 100.0


def test_verify_checks_all_caches_of_a_home_and_names_a_wrong_path_once(
    home: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run_and_read(["cache", "verify", "--home", str(home)], monkeypatch, capsys)
    assert sorted(line.partition(": ")[0] for line in printed.splitlines()) == sorted(map(str, caches.values()))
    error = run_and_read_error(["cache", "verify", "nowhere"], monkeypatch, capsys)
    assert (
        error == "diffalign: nowhere is not a feature cache; `diffalign cache ls` shows them, `diffalign extract` makes one\n"
    )
    empty = run_and_read(["cache", "verify", "--home", str(home / "nothing")], monkeypatch, capsys)
    assert empty.startswith("no caches in ")


def test_rm_removes_a_cache_only_with_yes(
    home: Path, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = caches["image"]
    files = [file for file in path.rglob("*") if file.is_file()]
    planned = json.loads(run_and_read(["cache", "rm", str(path), "--json"], monkeypatch, capsys))
    size = sum(file.stat().st_size for file in files)
    assert planned == {"path": str(path), "files": len(files), "bytes": size, "removed": False}
    assert "would remove" in run_and_read(["cache", "rm", str(path)], monkeypatch, capsys)
    assert path.is_dir()
    assert run_and_read(["cache", "rm", str(path), "--yes"], monkeypatch, capsys).startswith(
        f"removed {path}: {len(files)} files"
    )
    assert find_caches(home, "tiny") == [caches["text"]]
    assert list(path.parent.iterdir()) == [caches["text"]]
    caches["text"].rename(caches["text"].with_name(f"{caches['text'].name}.removed"))  # by a command that was killed
    monkeypatch.chdir(home / "caches")
    assert "removed" in run_and_read(["cache", "rm", f"tiny/{caches['text'].name}", "--yes"], monkeypatch, capsys)
    assert list(path.parent.iterdir()) == []
    assert "is not a feature cache; `diffalign cache ls`" in run_and_read_error(
        ["cache", "rm", str(path), "--yes"], monkeypatch, capsys
    )


def test_rm_finds_a_cache_in_another_folder(
    home: Path, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(caches["image"], tmp_path / "fast" / "tiny" / caches["image"].name))
    assert "for one in another folder, add --caches FOLDER" in run_and_read_error(
        ["cache", "rm", str(copy)], monkeypatch, capsys
    )
    monkeypatch.chdir(tmp_path / "fast")
    around = ["--home", str(home), "--caches", "../fast"]
    assert "would remove" in run_and_read(["cache", "rm", f"tiny/{copy.name}", *around], monkeypatch, capsys)


def test_rm_removes_only_caches(home: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    path = caches["image"]
    before = sorted(home.rglob("*"))
    (home / "link").symlink_to(home / "caches")
    inside = path.with_name("other-0123456789ab")
    inside.symlink_to(path)
    (home / "caches" / "linked").symlink_to(path.parent)
    elsewhere = Path(shutil.copytree(path, tmp_path / "elsewhere" / "tiny" / path.name))
    for wrong, message in (
        (inside, "is reached by a symbolic link; give the folder itself"),
        (home / "caches" / "linked" / path.name, "is reached by a symbolic link"),
        (elsewhere, "is not in <home>/caches/<dataset>/"),
        (path.parent, "is not in <home>/caches/<dataset>/"),
        (home, "is not in <home>/caches/<dataset>/"),
        (home / "manifests", "is not in"),
        (path / "features", "is not in"),
        (path.parent / "..", "is not"),
        (path.with_name("none-0123456789ab"), "is not a feature cache"),
        (Path("/"), "is not"),
    ):
        with pytest.raises(ValueError, match=message):
            rm(wrong)
    with lock(path), pytest.raises(ValueError, match="another process is writing"):
        rm(path)
    kept = {inside, home / "link", home / "caches" / "linked", path / ".lock"}
    assert sorted(set(home.rglob("*")) - kept) == sorted(set(before) - kept)
    assert (elsewhere / "zarr.json").is_file()


def test_rm_from_inside_and_of_a_damaged_cache(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(caches["image"].parent)
    (caches["image"] / "zarr.json").write_text("{")
    rm(Path(caches["image"].name))
    rm(caches["text"].parent / "." / caches["text"].name)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("moment", [1, 2, 7])
def test_a_kill_during_rm_leaves_a_complete_cache_or_none(home: Path, caches: dict[str, Path], moment: int) -> None:
    path = caches["image"]
    script = f"""
import os, signal, sys
from pathlib import Path
from pipeline.cache.housekeeping import rm
steps = []
def count(event, arguments):
    if event in ("os.rename", "os.remove", "os.rmdir"):
        steps.append(event)
        if len(steps) == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
rm(Path({str(path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    leftover = path.with_name(f"{path.name}.removed")
    if moment == 1:
        assert verify(path) == []
    else:
        assert find_caches(home, "tiny") == [caches["text"]]
        with pytest.raises(ValueError, match=r"does not fit its identity|is not a feature cache"):
            info(leftover)
    assert leftover.is_dir() == (moment > 1)
    assert rm(path).files > 0
    assert list(path.parent.iterdir()) == [caches["text"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere"], "nowhere is not a feature cache"),
        (["drift", "nowhere", "nowhere"], "nowhere is not a feature cache"),
        (["export", "nowhere", "out.h5"], "nowhere is not a feature cache"),
        (["export", "nowhere", "out.csv"], "choose one of: .h5, .hdf5, .npy, .parquet, .safetensors"),
        (["import", "nowhere.npy"], "nowhere.npy is no file"),
        (["import", "nowhere"], "choose one of: .h5"),
        (["rm", "nowhere"], "is not in <home>/caches/<dataset>/"),
        (["stats", "x", "--threshold", "2"], "Invalid value for '--threshold'"),
    ],
)
def test_an_error_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run_and_read_error(["cache", *arguments], monkeypatch, capsys)
