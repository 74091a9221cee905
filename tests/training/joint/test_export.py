"""Encoders of caches: they are rebuilt exactly, refused if they have changed, and found by name among several caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encoder_cases
from safetensors.torch import save, save_file

from pipeline.cache import Cache, open_cache
from pipeline.cache.reader import find_cache
from pipeline.cache.transfer import import_features
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder
from pipeline.training.joint.export import export_encoder, load_joint_weights, rebuild_encoder

QUICK = ExtractOptions(progress=False, workers=0)


def cache_of(manifest: Manifest, home: Path, name: str, settings: dict[str, str]) -> Cache:
    return open_cache(extract(manifest, name, settings, home, options=QUICK))


def animated(manifest: Manifest, folder: Path) -> Manifest:
    """The dataset with a video clip instead of each image."""
    for sample in manifest.samples:
        encoder_cases.write_animation(folder / f"{sample.id}.webp", [10, 200, 90])
    samples = tuple(replace(sample, media=Path(f"{sample.id}.webp")) for sample in manifest.samples)
    return replace(manifest, samples=samples, meta={**manifest.meta, "media_type": "video"}, media_root=folder)


@pytest.mark.parametrize(("stored", "trained"), [("float32", "float32"), ("bfloat16", "mixed"), ("mixed", "mixed")])
def test_parameters_are_float32_and_products_have_the_format_of_stage_1(
    stored: str, trained: str, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    settings = {"model": "test_vit", "weights": "random", "compute_dtype": stored}
    rebuilt = rebuild_encoder(cache_of(tiny_manifest, tmp_path, "timm", settings))
    assert rebuilt.name == "timm"
    assert rebuilt.encoder.compute_dtype == trained
    assert {str(parameter.dtype) for parameter in rebuilt.encoder.parameters()} == {"torch.float32"}


def test_the_encoder_inside_frames_is_rebuilt_too(tiny_manifest: Manifest, tmp_path: Path) -> None:
    clips = animated(tiny_manifest, tmp_path)
    inner = "model=test_vit,compute_dtype=bfloat16"
    settings = {"encoder": "timm", "settings": inner, "weights": "random", "num_frames": "2"}
    rebuilt = rebuild_encoder(cache_of(clips, tmp_path / "home", "frames", settings))
    assert rebuilt.encoder.image.compute_dtype == "mixed"
    assert rebuilt.settings["weights"] == "random"


def test_encoders_that_cannot_be_tuned_or_have_changed_are_refused(tiny_manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="random_projection takes no weights"):
        rebuild_encoder(cache_of(tiny_manifest, tmp_path, "random_projection", {}))
    settings = {"model": "test_vit", "weights": "random", "compute_dtype": "float32"}
    state = rebuild_encoder(cache_of(tiny_manifest, tmp_path, "timm", settings)).encoder.state_dict()
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    cache = cache_of(tiny_manifest, tmp_path / "other", "timm", {**settings, "weights": str(path)})
    rebuild_encoder(cache)
    save_file({name: tensor * 2 for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match=r"was made with encoder\.weights_sha256 = .* by now; extract it again"):
        rebuild_encoder(cache)


def test_caches_without_an_encoder_to_tune_are_refused(tiny_manifest: Manifest, tmp_path: Path) -> None:
    ids = [sample.id for sample in tiny_manifest.samples]
    source = tmp_path / "theirs.npy"
    np.save(source, np.ones((len(ids), 4), dtype=np.float32))
    source.with_suffix(".json").write_text(json.dumps(ids))
    write_manifest(tiny_manifest, tmp_path / "home")
    imported = import_features(source, tmp_path / "home", dataset="tiny", name="elsewhere")
    with pytest.raises(ValueError, match=r"elsewhere-\w+ was computed elsewhere, .*extract features with an encoder$"):
        rebuild_encoder(open_cache(imported.path))
    settings = {"encoder": "random_projection", "settings": "width=8", "num_frames": "2"}
    clips = animated(tiny_manifest, tmp_path)
    with pytest.raises(ValueError, match="random_projection takes no weights"):
        rebuild_encoder(cache_of(clips, tmp_path / "clips", "frames", settings))


@pytest.mark.parametrize("content", [b"", b"no tensors", None])
def test_a_damaged_joint_checkpoint_is_named_with_the_remedy(content: bytes | None, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "baseline-0" / "seed0", 0)
    path = run.path / "checkpoint.safetensors"
    weights = save({"head.bias": torch.zeros(2), "image.bias": torch.ones(2)})
    write_atomic(path, weights)
    write_atomic(run.path / "done", json.dumps({"seconds": 1.0, "checkpoint_sha256": hashlib.sha256(weights).hexdigest()}))
    assert load_joint_weights(run, "head")["bias"].tolist() == [0, 0]
    path.write_bytes(save({"image.bias": torch.zeros(2)}) if content is None else content)
    for key in ("head", "image"):
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged .*; delete .*seed0 and run the same command"):
            load_joint_weights(run, key)
    with pytest.raises(ValueError, match="damaged"):
        export_encoder(run, "image")
    assert not (run.path / "image.safetensors").exists()


def test_an_encoder_name_means_the_cache_with_default_settings(tiny_manifest: Manifest, tmp_path: Path) -> None:
    wide = cache_of(tiny_manifest, tmp_path, "random_projection", {"width": "16"})
    assert find_cache(tmp_path, tiny_manifest, "random_projection").fingerprint == wide.fingerprint
    default = cache_of(tiny_manifest, tmp_path, "random_projection", {})
    assert find_cache(tmp_path, tiny_manifest, "random_projection").fingerprint == default.fingerprint
    assert find_cache(tmp_path, tiny_manifest, wide.path.name).fingerprint == wide.fingerprint
    cache_of(tiny_manifest, tmp_path / "two", "random_projection", {"width": "16"})
    cache_of(tiny_manifest, tmp_path / "two", "random_projection", {"width": "8"})
    with pytest.raises(ValueError, match="several caches"):
        find_cache(tmp_path / "two", tiny_manifest, "random_projection")
