"""Tests of the command line: results on stdout, one line with the remedy on stderr, exit codes 0 and 2."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.command_line import run
from helpers.tiny_heads import FAST_TRAINING, caches_by_key, small_settings

from pipeline.commands import app, doctor
from pipeline.data.manifest import Manifest
from pipeline.runtime import plugins
from pipeline.runtime.settings import configure


@pytest.fixture
def home(tiny_home: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny home that may be written to."""
    return Path(shutil.copytree(tiny_home, tmp_path / "home"))


def train_arguments(home: Path, method: str) -> list[str]:
    """Return the arguments of a small train-head command on the tiny dataset."""
    keys = caches_by_key(home)
    settings = [f"--set={key}={value}" for key, value in small_settings(method).items()]
    training = [f"--train={key}={value}" for key, value in FAST_TRAINING.items()]
    caches = ["--image", keys["image"], "--text", keys["text"]]
    return ["train-head", "--dataset", "tiny", "--method", method, "--home", str(home), *caches, *settings, *training]


def test_the_stages_follow_each_other(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*train_arguments(home, "ema"), "--seeds", "0,1", "--json"], monkeypatch) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row["run"]).name for row in rows] == ["seed0", "seed1"]
    assert all(0 <= row["acc1"] <= 100 for row in rows)
    assert (
        run(["evaluate", str(Path(rows[0]["run"]).parent), "--split", "test", "--home", str(home), "--json"], monkeypatch) == 0
    )
    assert [row["n"] for row in json.loads(capsys.readouterr().out)] == [12, 12]
    assert run([*train_arguments(home, "baseline")], monkeypatch) == 0
    assert run(["report", "tiny", "--home", str(home), "--json"], monkeypatch) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed[printed.index('{\n "html"') :])
    assert Path(report["html"]).is_file()
    assert Path(report["markdown"]).is_file()
    assert [row["method"] for row in report["results"]] == ["ema"]
    cache = next((home / "caches" / "tiny").iterdir())
    assert run(["cache", "info", str(cache), "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["complete"] is True
    assert run(["cache", "verify", str(cache)], monkeypatch) == 0


@pytest.mark.parametrize("kind", plugins.PACKAGES)
def test_every_plugin_is_listed(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([kind, "--json"], monkeypatch) == 0
    described = json.loads(capsys.readouterr().out)
    assert list(described) == plugins.names(kind)
    assert all(len(line) > 20 for line in described.values())


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_a_method_shows_its_settings(method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", method, "--json"], monkeypatch) == 0
    described = json.loads(capsys.readouterr().out)
    module = plugins.get("methods", method)
    assert set(described["letters"].values()) <= described.keys()
    assert set(described["grid"]) <= described.keys()
    for field, values in described["grid"].items():
        for value in values:
            configure(module.Config, {field: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "imagenet"], "unknown dataset 'imagenet'; choose one of: "),
        (["train-head", "--dataset", "tiny", "--method", "gan"], "unknown method 'gan'; choose one of: atnet, baseline, c2kd"),
        (["extract", "openmoji", "--encoder", "timm"], "diffalign prepare openmoji"),
        (["extract", "openmoji", "--encoder", "timm", "--encoder", "vgg"], "unknown encoder 'vgg'"),
        (["extract", "openmoji", "--encoder", "timm", "--set", "weights=a", "--weights", "b"], "'weights' is given twice"),
        (["extract", "openmoji", "--scheduler", "cluster"], "--scheduler takes local or tcp://host:port, not 'cluster'"),
        (["plan", "openmoji", "--encoder", "timm"], "run: diffalign prepare openmoji"),
        (["plan", "openmoji", "--encoder", "tim"], "did you mean 'timm'?"),
        (["plan", "openmoji", "--set", "side=64"], "--set and --weights belong to one encoder"),
        (["grid", "--scheduler", "cluster"], "--scheduler takes local or tcp://host:port, not 'cluster'"),
        (["train-head", "--method", "ema", "--set", "x=1"], "unknown setting 'x'; choose one of: width, "),
        (["train-head", "--method", "ema", "--set", "tau"], "--set takes KEY=VALUE, not 'tau'"),
        (["train-head", "--method", "ema", "--train", "lr"], "--train takes KEY=VALUE, not 'lr'"),
        (
            ["train-head", "--method", "ema", "--set", "lr=0.01"],
            "training, not of ema: say --train lr=0.01",
        ),
        (["prepare", "table"], "where are your media? Give their folder, --root DIR"),
        (["methods", "ema", "--training"], "leave out 'ema'"),
        (["train-head", "--method", "ema", "--set", "tau=warm"], "setting 'tau' is 'warm'; it takes a finite float"),
        (
            ["train-head", "--method", "seda", "--set", "T=10", "--set", "t=10", "--set", "sample_steps=5"],
            "t must be in 0..9, not 10",
        ),
        (["train-head", "--method", "seda", "--set", "T=10", "--set", "num_steps=12"], "'num_steps' is given twice"),
        (["train-head", "--method", "ema", "--train", "epochs=0"], "'epochs' must be positive"),
        (["train-head", "--method", "ema", "--seeds", "one"], "--seeds takes numbers such as 0,1,2"),
        (["train-head", "--method", "ema", "--preset", "best"], "unknown preset 'best'"),
        (["train-head", "--method", "ema"], "run: diffalign prepare openmoji"),
        (["train-head"], "Missing option '--method'"),
        (["evaluate", "nowhere"], "nowhere is not a run"),
        (["report", "openmoji"], "openmoji"),
        (["cache", "info", "nowhere"], "nowhere is not a feature cache"),
        (["cache", "verify", "nowhere"], "nowhere is not a feature cache"),
        (["conjure"], "No such command 'conjure'"),
        (["--home", "artifacts", "runs", "ls"], "no option --home here: options stand behind the command, "),
        (["runs", "--home", "artifacts", "ls"], "runs COMMAND --home …"),
        (["runs", "ls", "--hoem", "artifacts"], "No such option: --hoem (Possible options: "),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DIFFALIGN_HOME", str(tmp_path))
    assert run(arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_a_wrong_value_is_refused_before_a_stage_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pipeline.workspace", None)  # importing it would be an ImportError
    for words in (["train-head", "openmoji", "--set", "tau=-1"], ["ablate", "text", "openmoji", "--set", "width=0.5"]):
        assert run([*words, "--method", "ema", "--home", str(tmp_path)], monkeypatch) == 2


@pytest.mark.parametrize(
    ("command", "said", "not_said"),
    [
        ("predict", "with /seed<k> at the end, unless it has one seed alone", "all its seeds"),
        ("export", "with /seed<k> at the end, unless it has one seed alone", "all its seeds"),
        ("evaluate", "all its seeds, or with /seed<k> at the end that one", "unless it has"),
        ("card", "Default: HOME/reports/DATASET/card.", "[default: .]"),
        ("tune", "what is best after a few epochs often is not after all of them", "--train "),
    ],
)
def test_help_says_what_the_command_does(
    command: str, said: str, not_said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"], monkeypatch) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert said in printed
    assert not_said not in printed


def test_caches_are_found_by_name_or_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(home, "ema")
    arguments[arguments.index("--image") + 1] = "random_projection"
    assert run(arguments, monkeypatch) == 2
    assert "several caches of tiny named 'random_projection'" in capsys.readouterr().err
    arguments[arguments.index("--image") + 1] = "clip"
    assert run(arguments, monkeypatch) == 2
    assert "no cache of tiny named 'clip' (there are: random_projection-" in capsys.readouterr().err
    arguments = train_arguments(home, "ema")
    arguments[arguments.index("--text") + 1] = "shuffled-witin"
    assert run(arguments, monkeypatch) == 2
    assert capsys.readouterr().err.rstrip().endswith("did you mean the control 'shuffled-within'?")


def test_an_incomplete_cache_is_refused_with_the_command_that_completes_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = train_arguments(home, "ema")
    (home / "caches" / "tiny" / caches_by_key(home)["image"] / "commits" / "00000.json").unlink()
    assert run(arguments, monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "is incomplete" in printed
    assert "diffalign extract tiny --encoder random_projection" in printed


def test_an_unwritable_home_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prepare", "openmoji", "--home", "/proc/home"], monkeypatch) == 2
    printed = capsys.readouterr().err
    assert "/proc/home" in printed
    assert "--home" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("rank", ["", "0"])
def test_sigterm_ends_a_command_as_ctrl_c_does_and_is_as_before_afterwards(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not one of torchrun, which may wait for another process and hear no signal then."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)

    def be_asked_to_end() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(app, "_run_command", be_asked_to_end)
    earlier = signal.signal(signal.SIGTERM, hear)
    try:
        assert run([], monkeypatch) == (0 if rank else 130)
        assert ("interrupted; the same command goes on" in capsys.readouterr().err) == (not rank)
        assert heard == [signal.SIGTERM] * bool(rank)
        assert signal.getsignal(signal.SIGTERM) is hear
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_doctor_reports_a_disk_that_would_become_full(
    tiny_manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = doctor.check_encoder(tmp_path, tiny_manifest, "random_projection")
    assert enough.is_ok
    assert enough.subject == "encoder random_projection: a cache of 40 x (32,) takes 0 MiB"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=60))
    full = doctor.check_encoder(tmp_path, tiny_manifest, "random_projection")
    assert not full.is_ok
    assert full.remedy == "2,500 bytes are lacking: choose another disk with --home"
    unsuitable = doctor.check_encoder(tmp_path, tiny_manifest, "frames")
    assert not unsuitable.is_ok
    assert "has image media" in unsuitable.remedy


def test_doctor_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--home", str(tmp_path)], monkeypatch) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("BAD  openmoji is not prepared") and "diffalign prepare openmoji" in line for line in lines)
    assert any(line.startswith("ok   torch ") for line in lines)


def test_doctor_reports_an_old_package_and_skips_the_checks_that_need_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9" if name == "zarr" else version(name))
    lines = [str(finding) for finding in doctor.run_checks(tmp_path, "openmoji")]
    assert [line for line in lines if line.startswith("BAD")] == ["BAD  zarr 2.9: zarr>=3.1 is needed; run: make setup"]
    assert not any("device" in line for line in lines)


def test_doctor_checks_the_other_caches_after_a_damaged_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = sorted((home / "caches" / "tiny").iterdir())
    (caches[0] / "zarr.json").write_text("{")
    empty = SimpleNamespace(build=lambda spec, root: SimpleNamespace(samples=()))
    monkeypatch.setattr(plugins, "get", lambda kind, name: lambda: empty)
    monkeypatch.setattr("pipeline.data.spec.load_spec", lambda name: {"encoders": {}})
    lines = [str(finding) for finding in doctor.run_checks(home, "tiny")][-len(caches) :]
    assert lines[0].startswith(f"BAD  cache {caches[0].name} is damaged: ")
    assert all(line.startswith("ok   cache") for line in lines[1:])


def test_help_is_quick_and_imports_no_stage() -> None:
    program = (
        "import sys; from pipeline.commands import app as cli; sys.argv = ['diffalign', '--help']\n"
        "try: cli.main()\n"
        "finally: print(sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "train-head" in done.stdout
    for module in ("torch", "pandas", "zarr", "pipeline.cache", "pipeline.data.manifest", "pipeline.runtime.runs"):
        assert f"'{module}'" not in done.stderr


def test_verbose_and_quiet_change_what_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*train_arguments(home, "baseline"), "--json"]
    assert run([*command, "-q"], monkeypatch) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    assert run([*command, "-v"], monkeypatch) == 0
    verbose = capsys.readouterr()
    assert "is trained already" in verbose.err
    assert re.search(r"opened \S+: 40 samples in 1 shards", verbose.err)
    assert json.loads(verbose.out) == json.loads(quiet.out)
