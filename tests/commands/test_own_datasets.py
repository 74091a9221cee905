"""Every command that names a dataset takes the name that `prepare table --name` gave it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.command_line import run
from helpers.docs_home import write_captioned_photos
from helpers.photos import PhotoHome, make_photo_home
from PIL import Image

from pipeline.data.spec import load_spec

TRAIN = ("--train=epochs=1", "--train=batch_size=8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoHome:
    return make_photo_home(tmp_path_factory.mktemp("own"))


def commands(folder: Path, caches: dict[str, str]) -> list[list[str]]:
    names = [f"--{key}={name}" for key, name in caches.items()]
    space = folder / "space.yaml"
    space.write_text(yaml.safe_dump({"training": {"lr": [0.001, 0.01], "epochs": [1]}, "methods": {"mlp": {}}}))
    return [
        ["prepare", "photos"],
        ["datasets", "photos"],
        ["extract", "photos", "--encoder=random_projection", "--set=width=32", "--workers=0", "--max-failures=0.1"],
        ["train-head", "--dataset=photos", "--method=mlp", *TRAIN, *names],
        ["train-head", "photos", "--method=baseline", *TRAIN, *names],
        ["grid", "photos", "--method=mlp", "--grid=lr=0.01,0.001", "--workers=0", *TRAIN, *names],
        ["tune", "photos", "--methods=mlp", "--points=2", "--folds=2", f"--space={space}", "--workers=0", *names],
        ["ablate", "text", "--dataset=photos", "--method=ema", "--set=width=16", "--seeds=0,1", *TRAIN, *names],
        ["ablate", "data", "--dataset=photos", "--method=ema", "--set=width=16", "--fractions=1", "--seeds=0", *TRAIN, *names],
        ["report", "photos"],
        ["cache", "ls"],
    ]


def test_all_commands_take_the_name(
    photos: PhotoHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--home", str(photos.workspace.home)]
    for command in commands(tmp_path, photos.caches):
        code, printed = run([*command, *home], monkeypatch), capsys.readouterr()
        assert code == 0, (command, printed.err)
        if command[0] == "tune":
            assert "# next: diffalign train-head --dataset photos --method mlp --preset tuned --home" in printed.out
        if command[:2] == ["ablate", "text"]:
            assert all(f"ablation of texts: {name}, 2 heads" in printed.err for name in ("real", "noise", "no text term"))
    assert "photos: Your own, of `table`." in _output(["datasets", *home], monkeypatch, capsys)
    assert run(["fetch", "photos", *home], monkeypatch) == 2
    assert "table cannot be fetched" in capsys.readouterr().err


def _output(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(command, monkeypatch) == 0
    return capsys.readouterr().out


def test_another_table_asks_for_a_name_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        for kind in ("cat", "dog"):
            (tmp_path / name / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / kind / f"{name}.png")
    home = ["--home", str(tmp_path / "home")]
    assert run(["prepare", "table", "--root", str(tmp_path / "one"), *home], monkeypatch) == 0
    other = ["prepare", "table", "--root", str(tmp_path / "two"), *home]
    capsys.readouterr()
    assert run(other, monkeypatch) == 2
    assert "--name NAME, or put it in the place of that one, --overwrite" in capsys.readouterr().err
    for option in (["--name", "two"], ["--overwrite"]):
        assert run([*other, *option], monkeypatch) == 0


def test_what_was_set_is_shown_and_the_owner_s_words_are_on_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, home = tmp_path / "photos", ["--home", str(tmp_path / "home")]
    write_captioned_photos(root)
    assert run(["prepare", "table", "--root", str(root), *home], monkeypatch) == 2
    assert "is in no class folder; if a table says the classes, name it: --set file=photos.csv" in capsys.readouterr().err
    options = ["--media-column=path", "--label-column=kind", "--set=file=photos.csv", "--set=licence=CC0-1.0"]
    words = ["--set=description=My photos, light and dark.", "--set=attribution=me, 2026"]
    assert run(["prepare", "table", "--name=mine", "--root", str(root), *options, *words, *home], monkeypatch) == 0
    shown = json.loads(_output(["datasets", "mine", "--json", *home], monkeypatch, capsys))
    assert shown["prepared from"] == str(root)
    expected = {"file": "photos.csv", "media_column": "path", "label_column": "kind", "text_column": "", "licence": "CC0-1.0"}
    assert {key: shown[key] for key in expected} == expected
    assert json.loads(_output(["datasets", "table", "--json", *home], monkeypatch, capsys))["file"] == ""
    assert run(["card", "mine", *home], monkeypatch) == 0
    folder = tmp_path / "home" / "reports" / "mine" / "card"
    croissant, card = json.loads((folder / "croissant.json").read_text()), (folder / "README.md").read_text()
    assert (croissant["license"], croissant["citeAs"]) == ("CC0-1.0", "me, 2026")
    assert croissant["description"].startswith("My photos, light and dark. 2 classes, one label per sample; pictures: ")
    assert "license_name: CC0-1.0" in card
    assert run(["prepare", "mine", "--set=description=", *home], monkeypatch) == 0
    assert run(["card", "mine", *home], monkeypatch) == 0
    assert json.loads((folder / "croissant.json").read_text())["description"].startswith("2 classes, one label per sample")
    assert json.loads((folder / "croissant.json").read_text())["license"] == "CC0-1.0"


def test_folders_of_pictures_without_texts_are_extracted_and_methods_of_texts_say_why_not(
    photos: PhotoHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One folder per class; the dataset's own encoders, of which that of the texts is left out."""
    manifest = photos.workspace.manifest("photos")
    for sample in manifest.split("train")[::4]:
        target = tmp_path / "tree" / manifest.class_names[sample.labels[0]] / sample.media.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest.media_path(sample), target)
    specs = tmp_path / "specs"
    specs.mkdir()
    small = {**load_spec("table"), "encoders": {"image": "random_projection", "text": "transformers_text"}}
    (specs / "table.yaml").write_text(json.dumps(small))
    monkeypatch.setattr("pipeline.data.spec.SPEC_FOLDER", specs)
    home = ["--home", str(tmp_path / "home")]
    prepare = ["prepare", "table", "--name", "tree", "--root", str(tmp_path / "tree"), "--set", "splits=60,40,0"]
    assert run([*prepare, *home], monkeypatch) == 0
    capsys.readouterr()
    assert run(["extract", "tree", "--workers=0", *home], monkeypatch) == 0
    output = capsys.readouterr()
    assert output.out.startswith("random_projection: ")
    assert "tree: this data set has no texts; transformers_text is left out, and no method that learns from texts" in output.err
    for method, code in {"baseline": 0, "mlp": 0, "ema": 2, "seda": 2}.items():
        assert run(["train-head", "--dataset", "tree", "--method", method, *TRAIN, *home], monkeypatch) == code
        said = capsys.readouterr().err
        assert (f"tree: this data set has no texts, and {method} learns from texts; choose a method" in said) == bool(code)
    assert run(["extract", "tree", "--encoder=transformers_text", "--workers=0", *home], monkeypatch) == 2
    assert "has no texts" in capsys.readouterr().err
