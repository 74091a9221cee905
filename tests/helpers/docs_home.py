"""The folder in which the commands of the pages run: a small openmoji with features and heads, and folders of pictures."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from PIL import Image

from helpers.command_line import run
from helpers.photos import write_photos
from pipeline.data.spec import SPEC_FOLDER
from pipeline.runtime import plugins

ALL_BUT_ONE = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Objects",
    "Symbols",
)
# Defaults of settings that cost time and change no command: pictures of 64 pixels instead of 224, short chains, narrow layers.
SMALL: dict[tuple[Literal["encoders", "methods"], str], dict[str, Any]] = {
    ("encoders", "efficientnet_lite"): {"side": 64},
    ("methods", "ema"): {"width": 32},
    ("methods", "cdr"): {"sample_steps": 2, "hidden": 64},
    ("methods", "seda"): {"sample_steps": 2, "width": 32, "num_tokens": 4, "token_width": 8, "num_heads": 2},
}
HEADS = ("baseline", "ema", "seda")


def run_shortly(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run `diffalign` with options that change nothing but the time: one epoch, one process, one seed, small pictures."""
    words = [*arguments]
    if words[0] in ("train-head", "grid", "finetune", "ablate", "reproduce") and "--list" not in words:
        words += ["--train", "epochs=1"]
    if words[0] in ("grid", "tune", "extract", "finetune", "reproduce") or "--corrupt" in words:
        words += [] if "--list" in words else ["--workers", "0"]
    words += ["--seconds", "1"] if words[0] == "plan" else []
    if words[0] == "reproduce" and "--list" not in words and "--plan" not in words:
        words += ["--seeds", "0"]
    return run(words, monkeypatch)


def use_small_openmoji(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `openmoji` be its 72 drawings of sports, games and events, seen with 64 pixels: the packages stay the real ones."""
    folder.mkdir()
    for path in SPEC_FOLDER.iterdir():
        if path.name != "openmoji.yaml":
            (folder / path.name).symlink_to(path)
    spec = yaml.safe_load((SPEC_FOLDER / "openmoji.yaml").read_text(encoding="utf-8"))
    spec["select"] |= {"skip_groups": [*spec["select"]["skip_groups"], *ALL_BUT_ONE], "min_class_size": 20}
    (folder / "openmoji.yaml").write_text(yaml.safe_dump(spec | {"counts_profile": "fixture"}, sort_keys=False))
    monkeypatch.setattr("pipeline.data.spec.SPEC_FOLDER", folder)
    for (kind, name), changes in SMALL.items():
        initialise = plugins.get(kind, name).Config.__init__
        monkeypatch.setattr(initialise, "__kwdefaults__", {**(initialise.__kwdefaults__ or {}), **changes})


def write_captioned_photos(folder: Path) -> None:
    """Write forty plain images of two classes, and a table with their paths, classes and captions."""
    folder.mkdir()
    lines = ["path,kind,caption"]
    for number in range(40):
        kind = ("light", "dark")[number % 2]
        Image.new("RGB", (32, 32), (200 - 150 * (number % 2), number, 90)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{kind},a {kind} picture number {number}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n")


def write_shards(photos: Path, folder: Path) -> None:
    """Write the captioned pictures as two tar files of samples."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"photos-{shard:06d}.tar", "w") as tar:
            for line in (photos / "photos.csv").read_text().splitlines()[1 + shard :: 2]:
                path, kind, caption = line.split(",")
                tar.add(photos / path, path)
                for part, text in (("cls", kind), ("txt", caption)):
                    info = tarfile.TarInfo(f"{Path(path).stem}.{part}")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text.encode()))


def write_listed_photos(folder: Path) -> None:
    """Write pictures of two classes in the layout that examples/own_dataset.py reads."""
    lines = []
    for number in range(20):
        kind, split = ("robin", "wren")[number % 2], ("train", "train", "train", "val", "test")[number % 5]
        path = folder / "pictures" / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (250 - 200 * (number % 2), 12 * number, 90)).save(path)
        lines.append(f"{split} | {kind}/{number}.png | {kind} | a {kind}, number {number}")
    (folder / "list.txt").write_text("\n".join(lines) + "\n")


def make_docs_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the pictures, and a home with the features of openmoji and three heads."""
    write_captioned_photos(folder / "my_photos")
    write_shards(folder / "my_photos", folder / "my_shards")
    write_listed_photos(folder / "my_birds")
    (folder / "photos").mkdir()
    write_photos(folder / "photos")
    monkeypatch.chdir(folder)
    assert run_shortly(["prepare", "openmoji"], monkeypatch) == 0
    assert run_shortly(["extract", "openmoji"], monkeypatch) == 0
    for method in HEADS:
        assert run_shortly(["train-head", "--dataset", "openmoji", "--method", method], monkeypatch) == 0
