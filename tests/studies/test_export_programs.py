"""The programs of an export compute what the run computes: its number format, and numbers far from zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from pipeline.evaluation.inference_spec import InferenceSpec
from pipeline.runtime.device import Precision, use_precision
from pipeline.studies.export_folder import _format_of_run
from pipeline.studies.export_graph import ClassifierGraph, trace
from pipeline.studies.export_onnx import write_onnx
from pipeline.studies.model_card import number_format


def test_logits_far_from_zero_are_the_same_in_onnx(tmp_path: Path) -> None:
    """As heads have them that fuse logits, or average several chains of labels that each have a probability of their own."""

    class Fused(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits = torch.nn.functional.logsigmoid(torch.stack([pixel_values, pixel_values - 1]))
            return torch.logsumexp(torch.log_softmax(logits, dim=-1), dim=0)

    values = torch.tensor([[-300.0, -90.0, -20.0, 0.5, 90.0], [300.0, 1.0, -1.0, -1e-3, -150.0]])
    graph: Any = Fused()
    assert (write_onnx(trace(graph, (values,)), graph, (values,), tmp_path / "model.onnx") or 0.0) < 1e-4
    assert (tmp_path / "model.onnx").is_file()


class TinyEncoder(torch.nn.Module):
    """Convolutions, a normalisation and a product, computed as the encoders do; and a head that doubles the features."""

    def __init__(self, precision: Precision) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = torch.nn.Conv2d(3, 16, 3, 2), torch.nn.BatchNorm2d(16), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 1)
        self.network = torch.nn.Sequential(*parts, torch.nn.BatchNorm2d(16), torch.nn.Flatten(), torch.nn.Linear(784, 8))
        self.precision: Precision = precision
        self.input_dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.to(self.input_dtype).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with use_precision(self.precision, torch.device("cpu")):
            return self.network((pixels / 255).to(self.input_dtype)).float()

    def predict(self, features: torch.Tensor, rng: Any) -> torch.Tensor:
        return 2 * features


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_programs_keep_the_number_format_of_the_run(precision: Precision, tmp_path: Path) -> None:
    """The program of torch to the bit; ONNX up to the order of its sums, where float32 is much farther off."""
    pixels = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8))
    encoder, exact, head = (TinyEncoder(each) for each in (precision, "float32", "float32"))
    with torch.no_grad():
        expected, in_float32 = 2 * encoder(pixels), 2 * exact(pixels)
    parts: list[Any] = [encoder, head]
    graph = ClassifierGraph(parts[0], parts[1], "float32")
    program = trace(graph, (pixels[:2],))
    torch.export.save(program, tmp_path / "model.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(pixels), expected)
    assert write_onnx(program, graph, (pixels[:2],), tmp_path / "model.onnx") is not None
    session: Any = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels.numpy()})
    assert np.abs(found - expected.numpy()).mean() < 0.1 * (in_float32 - expected).abs().mean()


def test_the_format_of_the_run_is_taken_on_any_processor() -> None:
    spec = InferenceSpec(
        dataset="x",
        licence="",
        class_names=("a", "b"),
        label_kind="single",
        encoder="efficientnet_lite",
        encoder_settings={"side": "32"},
        encoder_identity={"name": "efficientnet_lite", "compute_dtype": "mixed"},
        store_dtype="float16",
    )
    assert _format_of_run(spec) == {"compute_dtype": "mixed"}
    image = {"name": "efficientnet_lite", "compute_dtype": "float32"}
    settings = {"settings": "side=32,compute_dtype=auto"}
    clips = replace(spec, encoder="frames", encoder_identity={"name": "frames", "image": image}, encoder_settings=settings)
    assert _format_of_run(clips) == {"settings": "side=32,compute_dtype=float32"}
    projected = {"name": "random_projection"}  # it has one format
    assert _format_of_run(replace(spec, encoder="random_projection", encoder_identity=projected)) == {}


@pytest.mark.parametrize("files", [["model.pt2"], ["model.pt2", "model.onnx"]])
def test_the_card_says_which_program_has_which_format(files: list[str]) -> None:
    assert number_format("float32", files) == "The encoder computes in float32, as for the run."
    line = number_format("mixed", files)
    assert "`model.pt2` multiplies in bfloat16, as for the run (`compute_dtype=mixed`)" in line
    assert ("In `model.onnx` it rounds to bfloat16 in the same places" in line) == ("model.onnx" in files)
