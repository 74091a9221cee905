"""Settings of encoders mean the same everywhere: left-padding tokenizers, relative paths, lengths out of range."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import encoder_cases
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import Image
from timm.models import save_for_hf
from tokenizers.normalizers import Replace
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder
from pipeline.encoders.openclip import tokenizer_digest

TEXTS = encoder_cases.TEXTS


def build(name: str, **settings: object) -> Encoder:
    return build_encoder(name, {"compute_dtype": "float32", **settings})


def encode(encoder: Encoder, *raw: Path | str) -> Tensor:
    with torch.inference_mode():
        return encoder(torch.stack([encoder.prepare(item) for item in raw])).cpu()


@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [("bert", {"padding_side": "left", "pad_token": "[PAD]"}), ("gpt2", {"padding_side": "left"}), ("gpt2", {})],
)
def test_texts_of_any_length_equal_the_unpadded_model(model: str, tokenizer: dict[str, str], tmp_path: Path) -> None:
    """On whichever side the tokenizer pads, and also if it cannot pad."""
    folder = encoder_cases.text_folder(tmp_path, model, **tokenizer)
    network, words = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    settings = {"model": folder, "max_tokens": 8}
    found = encode(build("transformers_text", **settings), *TEXTS)
    of_words = build("transformers_text", **settings, tokens="true")
    assert of_words.feature_shape == (8, 32)
    assert of_words.identity()["pooling"] == "none"
    for text, vector, tokens in zip(TEXTS, found, encode(of_words, *TEXTS), strict=True):
        with torch.inference_mode():
            hidden = network(input_ids=torch.tensor([words(text)["input_ids"][:8]])).last_hidden_state[0]
        torch.testing.assert_close(vector, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens[: len(hidden)], hidden, rtol=1e-4, atol=1e-5)
        assert tokens[: len(hidden)].any(dim=1).all()  # no word is zeros alone, which mark the padding
        assert not tokens[len(hidden) :].any()


@pytest.mark.parametrize("model", ["bert", "gpt2"])
@pytest.mark.parametrize("layer", [-1, 1])
def test_the_words_that_are_kept_are_those_attended_to_most(model: str, layer: int, tmp_path: Path) -> None:
    """By the first token or, where no token sees those after it, by the last, which themselves are not kept."""
    folder = encoder_cases.text_folder(tmp_path, model)
    network, words = (
        AutoModel.from_pretrained(folder, attn_implementation="eager").eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    encoder = build("transformers_text", model=folder, max_tokens=8, tokens="true", keep=0.4, layer=layer)
    assert encoder.feature_shape == (3, 32)
    assert encoder.identity()["keep"] == 0.4
    texts = (*TEXTS, "fox")
    for text, found in zip(texts, encode(encoder, *texts), strict=True):
        ids = words(text)["input_ids"][:8]
        with torch.inference_mode():
            output = network(input_ids=torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        summary = len(ids) - 1 if model == "gpt2" else 0
        attention = output.attentions[layer if layer == -1 else 0][0].mean(0)[summary].numpy()
        others = [row for row in range(len(ids)) if row != summary] or [summary]
        count = max(1, round(0.4 * (len(ids) - 1)))
        kept = sorted(sorted(others, key=lambda row: -attention[row])[:count])
        hidden = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        torch.testing.assert_close(found[:count], hidden[0, kept], rtol=1e-4, atol=1e-5)
        assert not found[count:].any()


def test_the_side_that_is_cut_is_the_tokenizers_own(tmp_path: Path) -> None:
    folder = encoder_cases.text_folder(tmp_path, "bert", truncation_side="left", pad_token="[PAD]")
    encoder = build("transformers_text", model=folder, max_tokens=3)
    assert torch.equal(encoder.prepare(TEXTS[1]), encoder.prepare("the lazy dog"))


def test_a_text_without_tokens_is_a_value_error(tmp_path: Path) -> None:
    encoder: Any = build("transformers_text", model=encoder_cases.text_folder(tmp_path, "bert"), max_tokens=8)
    encoder.tokenizer.backend_tokenizer.normalizer = Replace("?", "")
    with pytest.raises(ValueError, match="the tokenizer finds no token in the text"):
        encoder.prepare("??")


@pytest.mark.parametrize(("model", "most"), [("bert", 8), ("roberta", 8), ("siglip", 8), ("gpt2", 16)])
def test_texts_are_as_long_as_the_model_has_positions(model: str, most: int, tmp_path: Path) -> None:
    folder = encoder_cases.text_folder(tmp_path, model)
    network: Any = AutoModel.from_pretrained(folder)
    network = getattr(network, "text_model", network)
    assert network(torch.full((1, most), 5)).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        network(torch.full((1, most + 1), 5))
    text = " ".join(["fox"] * 2 * most)
    assert encode(build("transformers_text", model=folder, max_tokens=most), text).isfinite().all()
    with pytest.raises(ValueError, match=f"reads {most} tokens at most, max_tokens is {most + 1}"):
        build("transformers_text", model=folder, max_tokens=most + 1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("transformers_text", {"max_tokens": 10**9}),
        ("transformers_text", {"max_tokens": 513}),
        ("random_projection", {"width": 10**9}),
        ("efficientnet_lite", {"crop": 1e-6}),
        ("frames", {"num_frames": 10**9}),
    ],
)
def test_absurd_settings_are_refused_at_once(name: str, settings: dict[str, object]) -> None:
    (field,) = settings
    with pytest.raises(ValueError, match=field):
        build_encoder(name, settings)


def test_the_arguments_of_a_timm_folder_are_in_its_identity(tmp_path: Path) -> None:
    """The same weights with another pooling give other features."""
    Image.effect_noise((90, 120), 80).convert("RGB").save(tmp_path / "noise.png")
    encoders = []
    for pool in ("avg", "max"):
        save_for_hf(timm.create_model("test_resnet"), str(tmp_path / pool), safe_serialization=True)
        settings = json.loads((tmp_path / pool / "config.json").read_text())
        settings["model_args"] = {"num_classes": 7, "global_pool": pool}
        (tmp_path / pool / "config.json").write_text(json.dumps(settings))
        encoders.append(build("timm", model=tmp_path / pool, weights=tmp_path / "avg"))
    features = [encode(encoder, tmp_path / "noise.png") for encoder in encoders]
    assert not torch.allclose(features[0], features[1])
    average, greatest = (encoder.identity() for encoder in encoders)
    assert average["weights_sha256"] == greatest["weights_sha256"]
    assert (average["arguments"], greatest["arguments"]) == ({"global_pool": "avg"}, {"global_pool": "max"})
    assert "arguments" not in build("timm", model="test_resnet", weights="random").identity()
    (tmp_path / "avg" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json; give a folder that timm saved"):
        build("timm", model=tmp_path / "avg")


def test_relative_paths_mean_the_same_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Configs hold absolute paths, so another process, in another folder, builds the same encoder from them."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "random").mkdir()  # "random" means random weights, even if a folder has this name
    monkeypatch.chdir(tmp_path / "here")
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save(state, "own.pth")
    encoder_cases.image_folder(Path("vit"), "vit")
    frames = {"encoder": "timm", "settings": "model=test_vit,weights=own.pth,compute_dtype=float32", "num_frames": "2"}
    cases = {
        "timm": {"model": "test_vit", "weights": "own.pth"},
        "transformers_image": {"model": "vit", "weights": "random"},
        "frames": frames,
    }
    built = {name: build_encoder(name, settings) for name, settings in cases.items()}
    assert built["timm"].config.model == "test_vit"
    assert built["transformers_image"].config.weights == "random"
    assert build_encoder("frames", {**frames, "weights": "own.pth"}).config.weights == str(tmp_path / "here" / "own.pth")
    monkeypatch.chdir(tmp_path)
    for name, encoder in built.items():
        other = build_encoder(name, asdict(encoder.config))
        assert other.config == encoder.config
        assert other.identity() == encoder.identity()
        assert str(tmp_path) not in json.dumps(encoder.identity())


def openclip_with(folder: Path, **tokenizer: str) -> Path:
    """Write an OpenCLIP folder that reads texts with a tokenizer of transformers."""
    encoder_cases.text_folder(folder, "bert", pad_token="[PAD]", **tokenizer)
    encoder_cases.openclip_folder(folder)
    settings = json.loads((folder / "open_clip_config.json").read_text())
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


def test_the_tokenizer_of_openclip_is_in_its_identity(tmp_path: Path) -> None:
    """With two words swapped, or with padding on the other side, the same weights give other features."""
    folders = [openclip_with(tmp_path / "a"), openclip_with(tmp_path / "b"), openclip_with(tmp_path / "c", padding_side="left")]
    vocabulary = (folders[1] / "tokenizer.json").read_text()
    swapped = vocabulary.replace('"cat"', '"CAT"').replace('"dog"', '"cat"').replace('"CAT"', '"dog"')
    (folders[1] / "tokenizer.json").write_text(swapped)
    encoders = [build("openclip", model=folder, modality="text", weights="random") for folder in folders]
    first, *others = [encoder.identity() for encoder in encoders]
    for encoder, other in zip(encoders[1:], others, strict=True):
        assert not torch.allclose(encode(encoder, "a cat"), encode(encoders[0], "a cat"))
        assert other["weights_sha256"] == first["weights_sha256"]
        assert other != first
    encoders[0].prepare("the quick brown fox")
    assert encoders[0].identity() == first
    assert build("openclip", model=folders[0], modality="text", weights="random").identity() == first


def test_the_vocabulary_of_openclip_itself_is_digested(tmp_path: Path) -> None:
    """Another order of merges leaves the vocabulary as it is, but makes another tokenizer."""
    merges = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")
    assert merges[1:3] == ["i n", "t h"]
    own = []
    for number, lines in enumerate((merges, [merges[0], merges[2], merges[1], *merges[3:]])):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        own.append(tokenizer_digest(SimpleTokenizer(bpe_path=str(path))))
    assert own[0] == tokenizer_digest(SimpleTokenizer()) != own[1]
