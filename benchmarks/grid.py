"""Measure what the fast grid saves, as ratios measured in one run; results are in RESULTS.md.

    python benchmarks/grid.py [--parts cells,loop,flops,profile] [--rows 121962]
    python benchmarks/grid.py --parts sampling,whole --home DIR     # DIR: a home in which `diffalign demo` has run

cells     SeDA cells per second with the tool's own strategy, over those of a plain float32 loop, one cell after another
loop      steps per second of one head, over those of the usual TensorDataset and DataLoader(shuffle=True)
sampling  time of SeDA's prediction with all T = 1500 steps over that with 20 steps, and the accuracies of both
whole     wall time of the 48 cells of SeDA's Fig. 3 with three seeds, on openmoji
flops     FLOP/s of SeDA's training step over the best that a matrix product reaches on this machine
profile   the operators that take most of the time of a step
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cache import Writer, layout
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.data.spec import load_spec
from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, reproducible, resolve_dtype, use_precision
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunFolder
from pipeline.studies.grid import Grid, plan_grid, read_axes
from pipeline.studies.search import run_grid
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.heads import plan_head_on, resolve_head_settings, train_head
from pipeline.types import SPLITS, Sample

WIDTH = 768
CLASSES = {"nuswide": 81, "vireo172": 172}
PAPER_ROWS = {"nuswide": 121_962, "vireo172": 66_071}  # training rows
AXES = ["T=900,1800", "gamma=0.5,2"]  # four of the 48 cells; the cost of a cell does not depend on T and gamma
BATCH_SIZE = 64


def generate_home(home: Path, dataset: str, rows: int) -> None:
    """Write a manifest with `rows` training samples, and caches of random features as wide as those of a ViT and a BERT."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES[dataset], (rows + 512, 2))
    multi = dataset == "nuswide"
    samples = tuple(
        Sample(
            f"{row:07d}",
            "train" if row < rows else "val",
            Path(f"{row}.jpg"),
            ("text",),
            tuple(sorted({int(label) for label in labels[row][: 2 if multi else 1]})),
            "",
        )
        for row in range(rows + 512)
    )
    meta = {"media_type": "image", "text": {"kind": "caption", "aggregate": "mean", "sep": " "}, "licence": "generated"}
    classes = tuple(f"class {number}" for number in range(CLASSES[dataset]))
    manifest = Manifest(dataset, "multi" if multi else "single", classes, samples, meta, home)
    write_manifest(manifest, home)
    for name in ("image", "text"):
        write_cache(home, manifest, name, rng)


def write_cache(home: Path, manifest: Manifest, name: str, rng: np.random.Generator) -> None:
    """Write a cache of random features."""
    encoder = {"name": name, "modality": name}
    identity = {"dataset": manifest.dataset, "manifest": manifest.fingerprint(), "encoder": encoder, "store_dtype": "float16"}
    path = layout.cache_path(home, manifest.dataset, name, identity)
    ids = [sample.id for sample in manifest.samples]
    writer = Writer.open(path, ids, np.zeros(0, np.int64), (WIDTH,), identity, {"command": "none"})
    commits = {}
    for shard in range(writer.num_shards):
        block = rng.standard_normal((len(writer.rows(shard)), WIDTH), dtype=np.float32)
        commits[shard] = writer.commit(shard, block, [], seconds=0, batch_size=0, device="cpu")
    writer.finish(commits)


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall time of a call, until the device has finished."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plan_one_epoch(home: Path, dataset: str, axes: list[str], method: str = "seda") -> Grid:
    """Plan a grid whose cells train for one epoch."""
    return plan_grid(
        home, dataset, method, read_axes(method, axes), [0], settings={}, training={"epochs": "1"}, image="image", text="text"
    )


def build_method(features: FeatureSet, method: str, settings: dict[str, str]) -> Any:
    """Build a method on the device and compute its statistics, so that it is ready to train."""
    config, _ = resolve_head_settings(features.manifest.dataset, method, "head", settings, {})
    torch.manual_seed(0)
    model = plugins.get("methods", method).build(config, features.shapes).to(default_device())
    with torch.no_grad():
        model.begin(model.phases[-1].name, lambda: iter([features.train.columns]))
    return model.train()


def batches_in_memory(features: FeatureSet, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled batches of data that is kept in memory."""
    columns = features.train.columns
    order = torch.randperm(len(features.train), generator=torch.Generator().manual_seed(seed)).to(columns["key"].device)
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        yield {key: column[order[start : start + BATCH_SIZE]] for key, column in columns.items()}


def batches_of_loader(features: FeatureSet, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches as the documentation of PyTorch shows it."""
    columns = {key: column.cpu() for key, column in features.train.columns.items()}
    torch.manual_seed(seed)
    for batch in DataLoader(TensorDataset(*columns.values()), batch_size=BATCH_SIZE, shuffle=True, drop_last=True):
        yield {key: part.to(default_device()) for key, part in zip(columns, batch, strict=True)}


def plain_steps(model: Any, batches: Iterator[dict[str, Tensor]]) -> int:
    """Train in the usual way: float32, Adam with its default settings, and the loss is read in each step.

    Returns:
        The number of steps.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    phase, steps, total = model.phases[-1].name, 0, 0.0
    for batch in batches:
        optimizer.zero_grad()
        parts = model.loss(batch, KeyedRNG.seeded(0, batch["key"]).at("train", phase, 0, steps), phase)
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += parts["loss"].item()
        steps += 1
    return steps


def plain_cell(features: FeatureSet, settings: dict[str, str]) -> int:
    """Train one cell of SeDA with the plain loop."""
    return plain_steps(build_method(features, "seda", settings), batches_in_memory(features, 0))


def cells(home: Path, rows: int) -> None:
    """Print cells per second of the tool over those of the plain loop."""
    for dataset in CLASSES:
        used = min(rows, PAPER_ROWS[dataset])
        generate_home(home, dataset, used)
        grid = plan_one_epoch(home, dataset, AXES)
        features = grid.features
        steps = len(features.train) // BATCH_SIZE
        plain = statistics.median(seconds(partial(plain_cell, features, _settings(cell.point))) for cell in grid.cells[:2])
        ours = seconds(partial(_run, grid)) / len(grid.cells)
        print(
            f"cells {dataset}: {used:,} rows x {WIDTH}, one pass of {steps} steps: {plain:.1f} s a cell one after another, "
            f"{ours:.1f} s by the tool, its start and validation included: ratio {plain / ours:.2f} "
            f"(wanted >= {'10' if default_device().type == 'cuda' else '3'})",
            flush=True,
        )


def _run(grid: Grid) -> None:
    assert not run_grid(grid, read_test=False).failed


def _settings(point: Any) -> dict[str, str]:
    return {field: str(value) for field, value in point.items()}


def loop(home: Path, rows: int) -> None:
    """Print the time of training one head with the usual DataLoader loop over that with the tool; features are in memory."""
    dataset = "nuswide"
    generate_home(home, dataset, rows)
    precision = resolve_dtype("auto", default_device(), "mixed")
    for method, wanted in (("seda", "1.2"), ("baseline", "3")):
        features = open_features(home, dataset, method, {"image": "image", "text": "text"})
        config, training = resolve_head_settings(dataset, method, "head", {}, {"epochs": "1", "precision": precision})
        head = plan_head_on(features, method, config, training, 0)
        model, batches = build_method(features, method, {}), batches_of_loader(features, 0)
        usual = seconds(partial(plain_steps, model, batches))
        assert len(features.val)  # load this table before the time is measured
        ours = seconds(partial(train_head, head, progress=False))
        print(
            f"loop {method}: {rows:,} rows, one pass: {usual:.1f} s by DataLoader, {ours:.1f} s by the tool ({precision}, its "
            f"statistics, a validation and the checkpoint included): ratio {usual / ours:.2f} (wanted >= {wanted})",
            flush=True,
        )


def sampling(home: Path, rows: int) -> None:
    """Compare SeDA's prediction with S = 20 steps and with all T = 1500 steps.

    Three seeds, on the 602 images of openmoji that it was not trained on; nothing is chosen by the result on the test split.
    """
    features = open_features(home, "openmoji", "seda", load_spec("openmoji")["encoders"])
    config, training = resolve_head_settings("openmoji", "seda", "head", {"T": "1500"}, {})
    ways: dict[str, dict[str, str]] = {"S=20": {"sampler": "ddim", "sample_steps": "20"}, "T=1500": {"sampler": "ancestral"}}
    right: dict[str, list[float]] = {way: [] for way in ways}  # by seed
    took: dict[str, list[float]] = {way: [] for way in ways}
    number = 0
    for seed in (0, 1, 2):
        run = train_head(plan_head_on(features, "seda", config, training, seed), progress=True)
        for way, changes in ways.items():
            records = [evaluate(home, run, split, {**changes, "draws": "1"}) for split in SPLITS[1:]]
            right[way].append(sum(record["metrics"]["acc1"] * record["n"] for record in records))
            took[way].append(sum(record["seconds"] for record in records))
            number = sum(record["n"] for record in records)
    accuracy = {way: statistics.mean(each) / number for way, each in right.items()}
    seconds_of = {way: statistics.median(each) for way, each in took.items()}
    print(
        f"sampling: {number} images, S=20 {accuracy['S=20']:.2f} %, T=1500 {accuracy['T=1500']:.2f} %: "
        f"|difference| {abs(accuracy['S=20'] - accuracy['T=1500']):.2f} points (wanted <= 0.3), "
        f"ratio of time {seconds_of['T=1500'] / seconds_of['S=20']:.0f} (wanted >= 50)",
        flush=True,
    )


def whole(home: Path, rows: int) -> None:
    """Run the grid of SeDA's Fig. 3, 48 cells, with three seeds on openmoji."""
    grid = plan_grid(home, "openmoji", "seda", read_axes("seda", ["papers"]), [0, 1, 2], settings={}, training={})
    left = sum(not head.run.is_done for head in grid.heads.values())
    took = seconds(partial(_run, grid))
    alone = [json.loads((RunFolder.at(head.run.path).path / "done").read_text())["seconds"] for head in grid.heads.values()]
    print(
        f"whole: {left} of {len(grid.heads)} runs in {took / 60:.1f} minutes; "
        f"the seconds of training of all runs add up to {sum(alone) / 60:.1f} minutes",
        flush=True,
    )


def make_step(home: Path, rows: int) -> Callable[[], None]:
    """Return one training step of SeDA, as the tool does it on one core or on the GPU."""
    generate_home(home, "nuswide", min(rows, 8192))
    features = open_features(home, "nuswide", "seda", {"image": "image", "text": "text"})
    model, batch = build_method(features, "seda", {}), next(batches_in_memory(features, 0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)
    precision = resolve_dtype("auto", default_device(), "mixed")
    rng = KeyedRNG.seeded(0, batch["key"]).at("train")

    def step() -> None:
        with use_precision(precision, default_device()):
            value = model.loss(batch, rng, model.phases[-1].name)["loss"]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def flops(home: Path, rows: int) -> None:
    """Print FLOP/s of the step over those of a large matrix product in the same format, on one thread."""
    step = make_step(home, rows)
    with FlopCounterMode(display=False) as counter:
        step()
    device = default_device()
    precision = resolve_dtype("auto", device, "mixed")
    dtype = torch.bfloat16 if precision == "mixed" else torch.float32
    left = torch.randn(2048, 2048, device=device, dtype=dtype)
    with reproducible(device):  # on one thread, as in the training of a cell
        step_seconds = statistics.median(seconds(step) for _ in range(30))
        peak = 2 * 2048**3 / min(seconds(lambda: left @ left) for _ in range(10))
    reached = counter.get_total_flops() / step_seconds
    print(
        f"flops: a step of {counter.get_total_flops() / 1e9:.1f} GFLOP takes {step_seconds * 1e3:.1f} ms in {precision}: "
        f"{reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, ratio {reached / peak:.2f}",
        flush=True,
    )


def profile_step(home: Path, rows: int) -> None:
    """Print the operators of the step that take most of the time themselves."""
    step = make_step(home, rows)
    with reproducible(default_device()):
        step()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        with profile(activities=activities) as recorded:
            for _ in range(10):
                step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    for event in events[:10]:
        print(f"profile: {event.key:40s} {event.self_cpu_time_total / total:6.1%} {event.count // 10:4d} calls a step")


PARTS: dict[str, Callable[[Path, int], None]] = {
    "cells": cells, "loop": loop, "sampling": sampling, "whole": whole, "flops": flops, "profile": profile_step
}  # fmt: skip


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="cells,loop,flops,profile")
    parser.add_argument("--rows", type=int, default=PAPER_ROWS["nuswide"], help="training rows, at most")
    parser.add_argument("--home", type=Path, help="where the demo has run, for sampling and whole")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CPU_COUNT} cores, {platform.machine()}"
    print(f"torch {torch.__version__}, {device}", flush=True)
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            home = arguments.home if part in ("sampling", "whole") else Path(scratch)
            PARTS[part](home, arguments.rows)


if __name__ == "__main__":
    main()
