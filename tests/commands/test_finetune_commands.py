"""Tests of the commands of stage 3 on the tiny dataset: what they print, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import joint_home
from typer.testing import CliRunner

from pipeline.commands.app import app
from pipeline.data.manifest import Manifest
from pipeline.runtime.runs import RunFolder
from pipeline.studies.ablation import compare_strategies
from pipeline.training.joint import trainer
from pipeline.training.joint.plan import JointOptions


@pytest.fixture(scope="module")
def prepared(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("commands") / "home")


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "home"))


def run(*arguments: str) -> str:
    """Run a command that must succeed, and return what it prints on stdout."""
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_finetune_prints_the_better_run_and_the_weights(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    options = ["--train", "image", "--train", "epochs=4", "--train", "batch_size=8", "--train", "lr=1e-3"]
    common = ["--dataset", "tiny", "--method", "baseline", "--init", str(init.path), "--home", str(home), "--workers", "0"]
    shown = json.loads(run("finetune", *common, *options, "--encoder-lr", "1e-3", "--json"))
    assert "after joint training" in shown["verdict"]
    assert Path(shown["run"]).parent != init.path.parent
    assert Path(shown["image weights"]).is_file()
    shown = run("finetune", *common, "--train", "epochs=1", "--train", "batch_size=8", "--encoder-lr", "3")
    assert "the head of stage 2 stays the result" in shown
    assert f"run: {init.path}" in shown


def test_the_head_alone_is_trained_on(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    options = ["--unfreeze", "none", "--train", "epochs=8", "--train", "batch_size=8", "--train", "lr=1e-2", "--json"]
    shown = json.loads(run("finetune", "--init", str(init.path), "--home", str(home), *options))
    assert "after training the head on alone" in shown["verdict"]
    assert shown.keys() == {"verdict", "run"}
    assert json.loads((Path(shown["run"]) / "config.json").read_text())["training"]["train"] == "none"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "seda"], "--method is seda, but .* is a run of baseline"),
        (["--dataset", "openmoji"], "--dataset is openmoji, but .* is a run of tiny"),
        (["--train", "image", "--train", "text"], "takes one of image, text, both and last:K"),
        (["--train", "everything"], "takes image, text, both or last:K"),
        (["--train", "steps=3"], "unknown setting 'steps'"),
        (["--train", "compiled=true"], "leave --train compiled out; --compile compiles the encoders"),
        (["--compile", "--unfreeze", "none"], "--compile takes whole encoders: --unfreeze image, text or both, not none"),
        (["--compile", "--unfreeze", "last:1"], "--compile takes whole encoders: --unfreeze image, text or both, not last:1"),
    ],
)
def test_options_that_contradict_the_run_are_refused(options: list[str], message: str, home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    with pytest.raises(ValueError, match=message):
        run("finetune", "--init", str(init.path), "--home", str(home), *options)
    assert not (home / "joint").exists()  # nothing was begun


@pytest.mark.parametrize("options", [[], ["--fast"]])
def test_a_run_tells_which_kernels_it_was_trained_with(options: list[str], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not change which run it is; and only a GPU gets images in its own memory format."""
    init, formats, move = joint_home.train_small_head(home, "baseline", epochs=1), set[bool](), trainer.to_device
    monkeypatch.setattr(trainer, "to_device", lambda items, device, last=False: formats.add(last) or move(items, device, last))
    common = ["--home", str(home), "--workers", "0", "--train", "epochs=1", "--train", "batch_size=8"]
    shown = json.loads(run("finetune", "--init", str(init.path), *common, "--encoder-lr", "1e-6", "--json", *options))
    (done,) = (home / "joint").glob("*/*/seed0/done")
    runs = [RunFolder.at(done.parent)]
    if shown["run"] != str(init.path):
        runs.append(RunFolder.at(Path(shown["run"])))
    assert [each.read_done().get("kernels", []) for each in runs] == [["fast"] if options else []] * len(runs)
    assert "fast" not in (done.parent / "config.json").read_text()
    assert formats == {False}


def test_strategies_are_compared_over_seeds(home: Path) -> None:
    joint, training = {"encoder_lr": 1e-3}, {"epochs": 2, "batch_size": 8}
    options = JointOptions(workers=0, progress=False)
    table = compare_strategies(home, "tiny", "ema", "head", [0, 1], joint_home.caches(home), joint, training, options)
    assert table["strategy"].tolist() == ["freeze both", "train visual", "train both"]
    assert table["acc1"].str.contains(" ± ").all()
    assert table["verdict"].tolist() == ["freeze both", "2 of 5 seeds", "2 of 5 seeds"]
    means = [float(cell.split()[0]) for cell in table["acc1"]]
    differences = [float(cell) for cell in table["Acc-1 vs freeze both"][1:]]
    assert differences == pytest.approx([mean - means[0] for mean in means[1:]], abs=0.011)
    assert table["kept"].iloc[0] == ""
    assert table["kept"].iloc[1:].str.fullmatch("[012]/2").all()
    assert len(list((home / "joint" / "tiny").glob("*/seed[01]/done"))) == 4
