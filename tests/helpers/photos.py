"""A home with a dataset of the user's own, made through the public API: coloured squares in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.workspace import Workspace

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 210)}
NUM_OF_EACH = 20
BROKEN, TEXTLESS, TWO_TEXTS = "green-3", "red-5", "blue-7"  # ids of samples that are not like the others
TRAINING: dict[str, Any] = {"epochs": 2, "batch_size": 8}


class PhotoHome(NamedTuple):
    workspace: Workspace
    caches: dict[str, Any]  # "image" [32] and "text" [24] -> folder name of the cache


def write_photos(root: Path) -> None:
    """Write sixty pictures with a table of labels and texts; one cannot be decoded, one has no text, one has two."""
    rng = np.random.default_rng(0)
    lines = []
    for label, colour in COLOURS.items():
        for number in range(NUM_OF_EACH):
            name = f"{label}-{number}"
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{name}.png")
            texts: list[str] = {TEXTLESS: [], TWO_TEXTS: ["a blue square", "number seven"]}.get(
                name, [f"a {label} square {number}"]
            )
            lines.append({"file_name": f"{name}.png", "label": label, "text": texts, "split": split_of(number)})
    (root / f"{BROKEN}.png").write_bytes(b"no picture")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def split_of(number: int) -> str:
    return "train" if number < 12 else "val" if number < 15 else "test"


def make_photo_home(folder: Path) -> PhotoHome:
    """Prepare the pictures under the name "photos", and extract both modalities with `random_projection`."""
    root = folder / "pictures"
    root.mkdir()
    write_photos(root)
    workspace = Workspace(folder / "home")
    workspace.prepare("table", root, name="photos", texts_recur=True)
    widths = {"image": 32, "text": 24}
    caches: dict[str, Any] = {}
    for modality, width in widths.items():
        done = workspace.extract("photos", "random_projection", modality=modality, width=width, workers=0, max_failures=0.1)
        caches[modality] = done["random_projection"].path.name
    return PhotoHome(workspace, caches)
