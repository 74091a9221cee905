"""The heads written by hand compute what ours compute, and the page on the training step says what its script prints."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import plain_heads
import pytest
import torch
import training_step
from torch import Tensor

from pipeline.runtime.device import use_precision

WIDTH, CLASSES, ROWS = 64, 7, 32
LABEL_KINDS = {"single": False, "multi": True}
CASES = [("seda", "learner"), ("seda", "translator"), ("ema", ""), ("baseline", "")]


def plain_name_of(name: str) -> str:
    """The name of one of our parameters in the head written by hand."""
    for ours, plain in (
        ("denoiser.interaction.out", "attended"),
        ("denoiser.interaction.", ""),
        ("denoiser.visual", "visual"),
        ("denoiser.embed.layers", "time"),
        ("denoiser.first.weights.0", "hidden.weight"),
        ("denoiser.first", "hidden"),
        ("denoiser.", ""),
        ("image_projector", "image"),
        ("text_projector", "text"),
    ):
        if name.startswith(ours):
            return plain + name.removeprefix(ours)
    return name


def as_plain(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of ours under the names and in the shapes of the head written by hand."""
    parts = dict(ours)
    if "denoiser.first.weights.1" in parts:  # ours has a weight for each part of the concatenated input
        step = parts.pop("denoiser.first.weights.1")
        parts["denoiser.first.weights.0"] = torch.cat([parts["denoiser.first.weights.0"], step], dim=1)
    named = {plain_name_of(name): value for name, value in parts.items()}
    return {name: value.unsqueeze(1) if name in ("query.bias", "key_value.bias") else value for name, value in named.items()}


def draws_of_ours(method: str, stage: str, head: Any, batch: dict[str, Tensor]) -> tuple[int, tuple[Any, ...]]:
    """A seed with which ours draws the wanted stage, and the numbers that it draws, for the head written by hand."""
    for seed in range(200):
        torch.manual_seed(seed)
        if method != "seda":
            return seed, ()
        n, is_dsl = head.draw_steps(batch["text"])
        if bool(is_dsl) == (stage == "learner"):
            return seed, (stage == "learner", n, torch.randn_like(batch["text"]))
    raise AssertionError


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("labels", LABEL_KINDS)
@pytest.mark.parametrize(("method", "stage"), CASES)
def test_losses_and_gradients_are_those_of_ours(method: str, stage: str, labels: str, precision: Any) -> None:
    raw = training_step.make_raw_columns(ROWS, WIDTH, CLASSES, LABEL_KINDS[labels], torch.device("cpu"))
    raw["image"], raw["text"] = 3.0 * raw["image"] + 1.0, 2.0 * raw["text"] - 1.0
    raw["paired"][::8] = 0.0
    ours = training_step.OurTraining(method, raw, CLASSES, precision, ROWS, **plain_heads.AS_BY_HAND.get(method, {}))
    plain = plain_heads.plain_training(method, raw, CLASSES, precision, ROWS).head
    plain.load_state_dict(as_plain(dict(ours.head.named_parameters())), strict=False)
    batch = next(ours.batches(0))
    columns = plain_heads.make_columns({**raw, "key": training_step.sample_keys(f"{row:07d}" for row in range(ROWS))})
    rows = [columns["key"].tolist().index(key) for key in batch["key"].tolist()]
    seed, draws = draws_of_ours(method, stage, ours.head, batch)
    torch.manual_seed(seed)
    with use_precision(precision, torch.device("cpu")):
        expected = ours.head.train().loss(batch, "head")
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed"):
        found = plain.loss({name: column[rows] for name, column in columns.items()}, *draws)
    tolerance = 1e-3 if precision == "float32" else 2e-2  # bfloat16 has 8 bits
    for name in expected:
        torch.testing.assert_close(found[name].float(), expected[name].float(), rtol=tolerance, atol=tolerance, msg=name)
    assert found.keys() == expected.keys()
    expected["loss"].backward()
    found["loss"].backward()
    gradients = as_plain({name: weight.grad for name, weight in ours.head.named_parameters() if weight.grad is not None})
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, weight in plain.named_parameters():
        assert weight.grad is not None
        difference = torch.linalg.vector_norm(weight.grad - gradients[name]) / torch.linalg.vector_norm(gradients[name])
        assert difference <= (1e-3 if precision == "float32" else 5e-2), (name, float(difference))


def test_the_draws_of_seda_s_steps_are_those_of_the_paper() -> None:
    """The learner is drawn with probability (t + 1) / T, with steps 0..t; the translator has the steps above."""
    head = plain_heads.PlainSeDA(WIDTH, CLASSES, num_steps=10, stage_step=3)
    batch = {"text": torch.zeros(ROWS, WIDTH)}
    drawn = [head.draw(batch) for _ in range(400)]
    assert {int(step) for learner, n, _ in drawn if learner for step in n} == set(range(4))
    assert {int(step) for learner, n, _ in drawn if not learner for step in n} == set(range(4, 10))
    assert sum(learner for learner, _, _ in drawn) == pytest.approx(160, abs=50)  # five standard deviations


@pytest.mark.parametrize("method", plain_heads.PLAIN_HEADS)
def test_the_loop_by_hand_learns(method: str) -> None:
    raw = training_step.make_raw_columns(8 * ROWS, WIDTH, CLASSES, False, torch.device("cpu"))
    raw["image"][torch.arange(len(raw["label"])), raw["label"]] += 6.0
    if method == "baseline":  # as a cache gives it
        raw = {name: raw[name] for name in ("image", "label")}
    columns = plain_heads.make_columns(raw)
    training = plain_heads.plain_training(method, raw, CLASSES, "float32", ROWS)
    losses = [training.epoch(columns)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_heads_by_hand_use_nothing_of_this_package() -> None:
    """Before the line that begins the comparison, no name of ours is used."""
    source = Path(plain_heads.__file__).read_text(encoding="utf-8")
    tree, border = ast.parse(source), source[: source.index("# ---- the comparison with ours")].count("\n")
    imported = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    ours = {
        alias.name for node in imported if str(node.module).startswith(("pipeline", "training_step")) for alias in node.names
    }
    assert not any(str(node.module).startswith(("pipeline.nn", "pipeline.methods")) for node in imported)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node.lineno <= border}
    assert len(ours) >= 4
    assert used & ours == set()
    assert "pipeline" not in used


def test_the_operators_are_counted_over_the_whole_step() -> None:
    """y = W x, loss = y·y: a product and a sum forward, their gradients, and the kinds sum up to all operators."""
    weight = torch.ones(3, requires_grad=True)
    counted = training_step.count_operators(lambda: (weight * 2.0).sum().backward())
    with training_step.OperatorCounter() as bare:  # without the lines that are kept for the backward pass
        (torch.ones(3, requires_grad=True) * 2.0).sum().backward()
    assert sum(counted.values()) == sum(bare.counts.values()) - 1  # torch.ones is inside the second
    optimizer = torch.optim.Adam([weight], fused=True)
    assert training_step.count_operators(optimizer.step)["optimiser"] > 0


@pytest.mark.parametrize(
    ("method", "precision", "limit"), [("seda", "float32", 250), ("seda", "mixed", 300), ("baseline", "float32", 45)]
)
def test_a_step_dispatches_few_operators_and_enters_few_functions(method: str, precision: Any, limit: int) -> None:
    raw = training_step.make_raw_columns(512, 768, 172, False, torch.device("cpu"))
    training = training_step.OurTraining(method, raw, 172, precision)
    assert sum(training.operators().values()) <= limit
    assert len(training.functions()) <= 8


def test_a_single_head_never_enters_the_file_of_ensembles_and_the_loop_fits_on_a_screen() -> None:
    raw = training_step.make_raw_columns(512, 768, 172, False, torch.device("cpu"))
    entered = {name.split()[0] for name, _ in training_step.OurTraining("seda", raw, 172, "float32").functions()}
    assert entered == {"training/loop.py", "training/optim.py", "cache/table.py", "runtime/rng.py"}
    folder = training_step.PACKAGE / "training"
    lines = {name: len((folder / f"{name}.py").read_text().splitlines()) for name in ("loop", "ensemble")}
    assert lines["loop"] <= 150
    assert sum(lines.values()) <= 400


def test_the_page_shows_the_tables_of_today() -> None:
    text = training_step.PAGE.read_text(encoding="utf-8")
    assert training_step.tables() in text, "the step has changed; run: python benchmarks/training_step.py --write"
