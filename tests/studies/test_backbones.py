"""Every backbone of the papers' tables can be built, its features extracted, and it can be fine-tuned; with random weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import joint_home
from helpers.command_line import run

from pipeline.cache import open_cache
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.settings import configure
from pipeline.studies.backbones import BACKBONES
from pipeline.training.joint.plan import JointConfig

FEATURES = {"resnet18": 512, "vgg19": 4096, "repvgg": 1408, "repmlpnet": 512, "vanillanet": 4096, "swin_t": 768}
FEATURES |= dict.fromkeys(("resnet50", "wrn", "wiser"), 2048) | dict.fromkeys(("vit_b16", "vit_b32"), 768)
MILLIONS = {"resnet18": 11.7, "resnet50": 25.6, "vgg19": 143.7, "wrn": 68.9, "repvgg": 28.2}  # with 1,000 classes
MILLIONS |= {"vit_b16": 86.6, "vit_b32": 88.2, "swin_t": 28.3}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied after the test: weights are large."""
    yield tmp_path / "home"
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


def extract_and_finetune(manifest: Manifest, home: Path, encoder: str, settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Extract the features of two samples per split, fine-tune the encoder for an epoch, and return the features' shape."""
    pairs = {split: [sample for sample in manifest.split(split) if sample.labels in ((0,), (1,))] for split in ("train", "val")}
    train = {sample.labels: sample for sample in pairs["train"]}
    manifest = replace(manifest, samples=(*train.values(), *pairs["val"]))
    write_manifest(manifest, home)
    given = {**settings, "weights": "random", "compute_dtype": "float32"}
    options = ExtractOptions(progress=False, workers=0)
    cache = open_cache(extract(manifest, encoder, given, home, store_dtype="float32", options=options))
    features = cache.read(cache.ids)
    assert np.isfinite(features).all()
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    joint_home.finetune_briefly(home, init, JointConfig(train="image", encoder_lr=1e-3), epochs="1")
    (history,) = (home / "joint").rglob("history.csv")
    assert pd.read_csv(history)["cosine_image"].iloc[-1] < 0.9999
    return features.shape[1:]


@pytest.mark.parametrize("name", ["repmlpnet", "vanillanet", "wiser"])
def test_small_networks_of_our_own_are_extracted_and_tuned(name: str, tiny_manifest: Manifest, home: Path) -> None:
    encoder = plugins.get("encoders", name)
    shape = extract_and_finetune(tiny_manifest, home, name, encoder.small())
    assert shape == encoder(configure(encoder.Config, encoder.small())).feature_shape


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_extracted_and_tuned(name: str, tiny_manifest: Manifest, home: Path) -> None:
    backbone = BACKBONES[name]
    assert extract_and_finetune(tiny_manifest, home, backbone.encoder, backbone.settings) == (FEATURES[name],)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_an_encoder_that_knows_its_settings(name: str) -> None:
    """Those of timm have published weights and the published number of parameters; tests/encoders/ has the others."""
    backbone = BACKBONES[name]
    config = configure(plugins.get("encoders", backbone.encoder).Config, backbone.settings)
    if backbone.encoder == "timm":
        assert timm.list_pretrained(f"{config.model}.*")
        with torch.device("meta"):
            network = timm.create_model(config.model, num_classes=1000)
        assert sum(each.numel() for each in network.parameters()) / 1e6 == pytest.approx(MILLIONS[name], abs=0.051)


def test_the_list_of_encoders_shows_the_backbones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["encoders"], monkeypatch) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for title, encoder, settings in BACKBONES.values():
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        assert [*title.split(), encoder, *options] in lines
