"""Plug-ins from outside of the repository: files, entry points, names that exist twice, and rules that are checked at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from helpers.command_line import run
from helpers.planted_methods import planted
from helpers.tiny_heads import caches_by_key
from PIL import Image

from pipeline import Dataset, Encoder
from pipeline.cache import open_cache
from pipeline.data.prepare import prepare
from pipeline.data.spec import load_spec
from pipeline.encoders._factory import build_encoder
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.nn.method import Method
from pipeline.runtime import executor, plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import file_sha256
from pipeline.runtime.plugin_rules import check_dataset, check_encoder
from pipeline.workspace import Workspace

ROOT = Path(__file__).parents[2]


def test_a_loaded_file_is_a_plugin_like_others(tmp_path: Path) -> None:
    path = planted(tmp_path, "copied")
    assert plugins.load_file(path) == "methods"
    assert plugins.load_file(path) == "methods"
    assert plugins.loaded_files()[-1] == path
    assert "copied" in plugins.names("methods")
    found = plugins.get("methods", "copied")
    assert issubclass(found, Method)
    assert found is plugins.get("methods", "copied")
    assert plugins.first_line("methods", "copied").startswith("Imitation: ")
    assert plugins.source("methods", "copied") == path.read_text(encoding="utf-8")
    assert plugins.is_external("methods", "copied")
    assert not plugins.is_external("methods", "ema")
    plugins.forget_file(path)
    assert "copied" not in plugins.names("methods")


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "nothing",
            "from pipeline import Dataset, Encoder, Method\n",
            r"nothing\.py must define one subclass of pipeline\.Method or pipeline\.Encoder or pipeline\.Dataset; found: none",
        ),
        ("broken", "def (\n", "cannot be loaded: SyntaxError"),
        ("missing", "import no_such_library\n", "cannot be loaded: ModuleNotFoundError"),
        ("two", "from pipeline.nn.method import Method\nclass A(Method): ...\nclass B(Method): ...\n", "found: A, B"),
        ("kinds", "from pipeline import Dataset, Encoder\nclass A(Dataset): ...\nclass B(Encoder): ...\n", "found: B, A"),
        ("bare", "from pipeline.nn.method import Method\nclass A(Method): ...\n", "breaks the rule 'settings are a frozen"),
    ],
)
def test_a_bad_file_is_named_with_what_it_needs(name: str, code: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(code)
    with pytest.raises(UserError, match=message):
        plugins.load_file(path)
    assert f"diffalign_plugin_{name}" not in sys.modules


def test_a_missing_file_is_a_mistake(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match="is no plug-in: give a Python file"):
            plugins.load_file(path)


def test_a_bug_in_a_file_keeps_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "bug.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        plugins.load_file(path)


def test_a_name_that_exists_twice_names_both_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two methods are named 'ema': pipeline\.methods\.ema and .*/ema\.py"):
        plugins.load_file(planted(tmp_path, "ema"))
    first, second = planted(tmp_path, "copied"), planted(tmp_path / "b", "copied")
    plugins.load_file(first)
    with pytest.raises(UserError, match=f"two plug-ins are named 'copied': {first} and {second}"):
        plugins.load_file(second)


def install(folder: Path, name: str, group: str, module: str) -> None:
    """Write what an installed distribution with one entry point leaves."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}\n")


def test_entry_points_are_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(tmp_path, "installed_module")
    install(tmp_path, "installed", "diffalign.methods", "installed_module")
    assert "installed" not in plugins.names("methods")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "installed" in plugins.names("methods")
    assert plugins.first_line("methods", "installed").startswith("Imitation: ")
    assert "installed_module" not in sys.modules
    assert issubclass(plugins.get("methods", "installed"), Method)
    with pytest.raises(UserError, match=r"are named 'installed': installed_module of installed and .*installed\.py"):
        plugins.load_file(planted(tmp_path, "installed"))
    (tmp_path / "twice").mkdir()
    install(tmp_path / "twice", "ema", "diffalign.methods", "installed_module")
    monkeypatch.syspath_prepend(str(tmp_path / "twice"))
    with pytest.raises(UserError, match=r"two methods are named 'ema': pipeline\.methods\.ema and installed_module of ema"):
        plugins.names("methods")


def test_a_changed_file_is_loaded_anew_under_any_spelling_of_its_path(tmp_path: Path) -> None:
    path = planted(tmp_path, "copied")
    (tmp_path / "sub").mkdir()
    plugins.load_file(path)
    before, digest = plugins.get("methods", "copied"), plugins.external_sha256("methods", "copied")
    plugins.load_file(tmp_path / "sub" / ".." / "copied.py")
    assert plugins.get("methods", "copied") is before
    path.write_text(path.read_text().replace("] = 512", "] = 256"))
    assert plugins.external_sha256("methods", "copied") == digest  # of what was run
    plugins.load_file(path)
    assert plugins.get("methods", "copied").Config().hidden == 256
    assert plugins.external_sha256("methods", "copied") == hashlib.sha256(path.read_bytes()).hexdigest() != digest
    assert plugins.external_sha256("methods", "ema") == ""


def test_another_version_of_a_file_makes_another_run_and_does_not_evaluate_the_old_one(tiny_home: Path, tmp_path: Path) -> None:
    home, path = Path(shutil.copytree(tiny_home, tmp_path / "home")), planted(tmp_path, "copied")
    ws = Workspace(home, plugins=path)
    options: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 8}, "hidden": 4, **caches_by_key(home)}
    first = ws.train_head("tiny", "copied", **options)
    assert json.loads((first.path / "config.json").read_text())["plugin_sha256"] == file_sha256(path)
    plain: dict[str, Any] = {key: value for key, value in options.items() if key != "hidden"}
    own = ws.train_head("tiny", "ema", **plain)
    assert "plugin_sha256" not in json.loads((own.path / "config.json").read_text())
    path.write_text(path.read_text() + "\n# another version\n")
    second = Workspace(home, plugins=[path]).train_head("tiny", "copied", **options)
    assert second.name != first.name
    assert first.evaluate("val") == second.evaluate("val")  # read from the folder
    with pytest.raises(UserError, match=r"was trained by another version of .*copied\.py \(sha256 .*train again"):
        first.evaluate("test")


def test_features_of_another_version_of_an_encoder_are_another_cache(tiny_manifest: Any, tmp_path: Path) -> None:
    path = tmp_path / "mean_colour.py"
    folders = set()
    for code in (ENCODER, ENCODER, ENCODER.replace("prepared * self", "2 * prepared * self")):
        path.write_text(code)
        plugins.load_file(path)
        options = ExtractOptions(progress=False, workers=0)
        folders.add(extract(tiny_manifest, "mean_colour", {}, tmp_path / "home", options=options))
    assert len(folders) == 2


def test_the_failure_of_a_plug_in_names_its_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bug.py"
    path.write_text("x = 0\n1 / x\n")
    assert run(["methods", "--plugin", str(path)], monkeypatch) == 1
    printed = capsys.readouterr().err
    assert f"more likely, in the plug-in {path}, line 2 (ZeroDivisionError: division by zero); its traceback" in printed
    assert "Traceback" in printed


DATASET = '''"""A dataset of one file: name, split, class."""
from pathlib import Path
from pipeline import Dataset, Manifest
from pipeline.data.spec import manifest_meta
from pipeline.types import Sample

class Letters(Dataset):
    def build(self, spec, root):
        samples = tuple(
            Sample(name, split, Path(f"{name}.png"), (f"a {name}",), (0,), "")
            for name, split in zip("abc", ("train", "val", "test"), strict=True)
        )
        return Manifest(spec["name"], "single", ("thing",), samples, manifest_meta(spec), root)
'''


def write_letters(folder: Path) -> Path:
    """Write the dataset and its pictures, but not its yaml."""
    for name in "abc":
        (folder / f"{name}.png").write_bytes(b"")
    path = folder / "letters.py"
    path.write_text(DATASET)
    return path


def write_letters_yaml(folder: Path) -> None:
    text = (ROOT / "data_manifests" / "openmoji.yaml").read_text(encoding="utf-8").replace("name: openmoji", "name: letters")
    (folder / "letters.yaml").write_text(text.replace("counts_profile: official", "counts_profile: fixture"))


def test_a_dataset_from_outside_has_its_yaml_beside_the_file(tmp_path: Path) -> None:
    path = write_letters(tmp_path)
    with pytest.raises(UserError, match=r"letters\.py needs letters\.yaml beside it"):
        plugins.load_file(path)
    write_letters_yaml(tmp_path)
    assert plugins.load_file(path) == "datasets"
    assert issubclass(plugins.get("datasets", "letters"), Dataset)
    assert load_spec("letters")["name"] == "letters"
    assert prepare("letters", tmp_path, tmp_path / "home", {}).path.is_file()


def test_a_dataset_of_an_installed_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_letters(tmp_path)
    install(tmp_path, "letters", "diffalign.datasets", "letters")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.first_line("datasets", "letters") == "A dataset of one file: name, split, class."
    with pytest.raises(UserError, match=r"letters\.py needs letters\.yaml beside it"):
        prepare("letters", tmp_path, tmp_path / "home", {})
    write_letters_yaml(tmp_path)
    assert prepare("letters", tmp_path, tmp_path / "home", {}).path.is_file()
    monkeypatch.delitem(sys.modules, "letters")


ENCODER = '''"""An encoder that returns the mean colour."""
from dataclasses import dataclass
import numpy as np
import torch
from pipeline import Encoder

@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing to set but the scale."""
    scale: float = 1.0

class MeanColour(Encoder):
    Config = Config
    modality = "image"
    feature_shape = (3,)
    drawing_side = 8

    def identity(self):
        return {"scale": self.config.scale}

    def prepare_image(self, image):
        return torch.from_numpy(np.asarray(image, dtype=np.float32).mean((0, 1)))

    def forward(self, prepared):
        return prepared * self.config.scale
'''


@pytest.mark.parametrize(
    ("code", "old", "new", "message"),
    [
        (ENCODER, "    Config = Config\n", "", "encoder MeanColour breaks the rule 'settings are a frozen dataclass'"),
        (
            ENCODER,
            "scale: float = 1.0",
            "scale: float",
            "breaks the rule 'every setting has a default': scale",
        ),
        (ENCODER, "def forward", "def forwards", "'every function is there': it must define forward"),
        (ENCODER, "def identity", "def name", "'every function is there': it must define identity"),
        (ENCODER, "def prepare_image", "def open", "it must define prepare_image, or prepare if it does not read images"),
        (ENCODER, "prepare_image(self, image)", "prepare(self, raw)", ""),
        (ENCODER, "* self.config.scale\n", "* self.config.scale\n\nSameColour = MeanColour\n", ""),
        (DATASET, "def build", "def make", "dataset Letters breaks the rule 'every function is there': it must define build"),
    ],
)
def test_encoders_and_datasets_are_checked_too(code: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in code
    path = tmp_path / "planted.py"
    path.write_text(code.replace(old, new))
    with pytest.raises(UserError, match=message) if message else nullcontext():
        plugins.load_file(path)


@pytest.mark.parametrize(("kind", "base"), [("encoders", Encoder), ("datasets", Dataset)])
def test_a_plugin_of_the_package_is_a_class_that_can_be_built(kind: str, base: type[Any]) -> None:
    check = {"encoders": check_encoder, "datasets": check_dataset}[kind]
    for name in plugins.names(kind):
        plugin = plugins.get(kind, name)
        assert issubclass(plugin, base)
        check(plugin)


def test_frames_takes_an_encoder_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "mean_colour.py"
    path.write_text(ENCODER)
    plugins.load_file(path)
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "clip.webp", lossless=True)
    frames = build_encoder("frames", {"encoder": "mean_colour", "settings": "scale=2", "num_frames": "2"})
    assert frames.identity()["image"] == {"name": "mean_colour", "scale": 2.0}
    assert frames(frames.prepare(tmp_path / "clip.webp")[None]).tolist() == [[2, 4, 6]]


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_workers_of_extraction_know_an_encoder_from_outside(
    start_method: str, tiny_manifest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mean_colour.py"
    path.write_text(ENCODER)
    assert plugins.load_file(path) == "encoders"
    monkeypatch.setattr("pipeline.extraction.workers.START_METHOD", start_method)
    extracted = extract(
        tiny_manifest, "mean_colour", {"scale": "0.5"}, tmp_path / "home", options=ExtractOptions(progress=False, workers=2)
    )
    (cache,) = (tmp_path / "home" / "caches" / "tiny").iterdir()
    assert extracted is not None
    assert open_cache(cache).feature_shape == (3,)


def class_name(config: Any) -> str:
    return type(config).__module__


def test_processes_of_a_cluster_load_the_same_files(tmp_path: Path) -> None:
    plugins.load_file(planted(tmp_path, "copied"))
    configs = [plugins.get("methods", "copied").Config(hidden=size) for size in (4, 8)]
    with executor.open_executor("local", 1) as processes:
        results = [get() for _, get in processes.map(class_name, configs)]
    assert results == ["diffalign_plugin_copied"] * 2


@pytest.mark.slow
def test_the_example_goes_through_all_stages(tiny_home: Path, tmp_path: Path) -> None:
    """The commands run in processes of their own, where nothing but --plugin loads the file."""
    home, path = Path(shutil.copytree(tiny_home, tmp_path / "home")), planted(tmp_path, "my_own_method")
    keys = caches_by_key(home)

    def command(*arguments: str, plugin: Path | None = path) -> subprocess.CompletedProcess[str]:
        given = [*arguments, *(["--plugin", str(plugin)] if plugin else [])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DIFFALIGN_HOME": str(home)}
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *given], capture_output=True, text=True, env=environment, check=False
        )

    training = ["--train", "epochs=2", "--train", "batch_size=8", "--set", "hidden=8"]
    trained = command(
        "train-head", "--dataset", "tiny", "--method", "my_own_method", "--image", keys["image"], "--text", keys["text"],
        *training, "--set", "gamma=0.5", "--json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    (row,) = json.loads(trained.stdout)
    config = json.loads((Path(row["run"]) / "config.json").read_text())
    assert config["method"] == "my_own_method"
    assert config["settings"] == {"hidden": 8, "w_text": 0.5, "dropout": 0.0}
    evaluated = command("evaluate", row["run"], "--split", "test", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)[0]["n"] == 12
    grid = command(
        "grid", "--dataset", "tiny", "--method", "my_own_method", "--image", keys["image"], "--text", keys["text"],
        *training, "--grid", "gamma=0.5,1", "--workers", "1", "--strategy", "processes",
    )  # fmt: skip
    assert grid.returncode == 0, grid.stderr
    reported = command("report", "tiny", "--json")
    assert reported.returncode == 0, reported.stderr
    assert "my_own_method" in Path(json.loads(reported.stdout)["html"]).read_text()
    forgotten = command("evaluate", row["run"], plugin=None)
    assert forgotten.returncode == 2
    assert "unknown method 'my_own_method'; choose one of: " in forgotten.stderr
    assert "(a file of yours is given by --plugin FILE)" in forgotten.stderr


def test_help_says_that_code_is_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-head", "--help"], monkeypatch) == 0
    assert "its code is run" in " ".join(capsys.readouterr().out.split())
