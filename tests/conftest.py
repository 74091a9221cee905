"""Fixtures for all tests: a tiny dataset of images and texts, and a home folder with its manifest and feature caches."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.logs import set_up_logging
from pipeline.types import Sample

plugins.load_file(Path(__file__).parents[1] / "examples" / "own_method.py")  # a method from outside obeys every contract too
set_up_logging()  # as the command line does, because tests read the messages
torch.set_num_threads(1)  # the tensors of tests are so small that threads would only wait for each other

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 50, 210), "grey": (128, 128, 128)}
SPLIT_OF = ("train",) * 6 + ("val",) * 1 + ("test",) * 3  # split of each of the ten images of a class


@pytest.fixture(scope="session")
def tiny_manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Forty PNG images of 24 x 24 pixels in four classes, with one text each: 24 train, 4 val, 12 test."""
    root = tmp_path_factory.mktemp("tiny_media")
    rng = np.random.default_rng(0)
    samples = []
    for label, (name, colour) in enumerate(COLOURS.items()):
        for number in range(10):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
            sample_id = f"{name}-{number}"
            Image.fromarray(pixels).save(root / f"{sample_id}.png")
            text = f"a {name} square number {number}"
            samples.append(Sample(sample_id, SPLIT_OF[number], Path(f"{sample_id}.png"), (text,), (label,), ""))
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}, "licence": "generated"}
    return Manifest("tiny", "single", tuple(COLOURS), tuple(samples), meta, root)


@pytest.fixture(scope="session")
def tiny_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the manifest of `tiny` and its features by random_projection: image [32], text [24]. Tests only read it."""
    home = tmp_path_factory.mktemp("tiny_home")
    write_manifest(tiny_manifest, home)
    extract(
        tiny_manifest, "random_projection", {"modality": "image", "width": 32}, home, options=ExtractOptions(progress=False)
    )
    extract(tiny_manifest, "random_projection", {"modality": "text", "width": 24}, home, options=ExtractOptions(progress=False))
    return home


@pytest.fixture(autouse=True)
def usual_messages() -> None:
    """Let each test see the messages that a user sees by default, whatever the test before has asked a command for."""
    logging.getLogger("pipeline").setLevel(logging.INFO)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from all tests but those that need it, which are run by themselves: the others say what a processor does."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files with long tests first, so that all processes end together; leave out what was not asked for or cannot run."""
    long_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long_files)
    absent = [*([] if config.option.markexpr else ["exhaustive"]), *([] if torch.cuda.is_available() else ["gpu"])]
    left_out = [item for item in items if any(item.get_closest_marker(mark) for mark in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
