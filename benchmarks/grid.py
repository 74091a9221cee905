"""Measure what the fast grid saves, as ratios measured in one run; results are in RESULTS.md.

    python benchmarks/grid.py [--parts cells,loop,flops,profile] [--rows 121962] [--precision mixed]
    python benchmarks/grid.py --parts sampling,whole --home DIR     # DIR: a home in which `diffalign demo` has run

cells     SeDA cells per second with the tool's own strategy, over those of plain_heads.py, one cell after another
loop      time of training one head with plain_heads.py over that with the tool
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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from plain_heads import Rounds, make_columns, plain_training, wait_seconds
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.cache import Writer, layout
from pipeline.cache.table import shuffled_batches
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.data.spec import load_spec
from pipeline.evaluation.evaluate import evaluate, predict
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device, reproducible, use_precision
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
NUM_CELLS = 4  # of the axes
BATCH_SIZE = 64
ROUNDS = 3
PASSES = 4  # of `loop`


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


def plan_one_epoch(home: Path, dataset: str, seed: int, precision: str) -> Grid:
    """Plan a grid of SeDA whose cells train for one epoch."""
    training = {"epochs": "1", "precision": precision}
    axes = read_axes("seda", AXES)
    return plan_grid(home, dataset, "seda", axes, [seed], settings={}, training=training, image="image", text="text")


def build_method(features: FeatureSet, method: str, settings: dict[str, str]) -> Any:
    """Build a method on the device and compute its statistics, so that it is ready to train."""
    config, _ = resolve_head_settings(features.manifest.dataset, method, "head", settings, {})
    torch.manual_seed(0)
    model = plugins.get("methods", method)(config, features.shapes).to(default_device())
    with torch.no_grad():
        model.begin(model.phases[-1].name, lambda: iter([features.train.columns]))
    return model.train()


def plain_cell(
    features: FeatureSet,
    method: str,
    settings: dict[str, Any],
    precision: str,
    passes: int = 1,
    after_pass: Callable[[], Any] = int,
) -> None:
    """Train a head as plain_heads.py does it by hand; its features are standardised first."""
    raw = features.train.columns
    training = plain_training(method, raw, features.shapes["classes"][0], precision, BATCH_SIZE, **settings)
    columns = make_columns(raw)
    for _ in range(passes):
        training.epoch(columns)
        after_pass()


def cells(home: Path, rows: int, precision: str) -> None:
    """Print cells per second of the tool over those of the loop by hand, one cell after another on one thread."""
    for dataset in CLASSES:
        used = min(rows, PAPER_ROWS[dataset])
        generate_home(home, dataset, used)
        rounds = Rounds()
        for seed in range(ROUNDS):
            grid = plan_one_epoch(home, dataset, seed, precision)
            assert len(grid.cells) == NUM_CELLS
            point = grid.cells[seed % NUM_CELLS].point  # its cost does not depend on the cell
            settings = {"num_steps": point["num_steps"], "gamma": point["w_ce_dst"]}
            assert len(grid.features.train)  # load this table before the time is measured
            plain = partial(plain_cell, grid.features, "seda", settings, precision)
            rounds.measure(partial(_run, grid), partial(on_one_thread, plain))
        print(
            f"cells {dataset} {precision}: {used:,} rows x {WIDTH}, one pass of {used // BATCH_SIZE} steps, start and "
            f"validation included: ratio {rounds.ratio(NUM_CELLS)} "
            f"(wanted >= {'10' if default_device().type == 'cuda' else '1.8'})",
            flush=True,
        )


def _run(grid: Grid) -> None:
    assert not run_grid(grid, read_test=False).failed


def on_one_thread(function: Callable[[], Any]) -> None:
    """Call a function on one thread, as the tool trains every cell."""
    with reproducible(default_device()):
        function()


def loop(home: Path, rows: int, precision: str) -> None:
    """Print the time of training one head by hand over that with the tool; features are in memory.

    Both train PASSES epochs and predict the validation split after each, the loop by hand with the tool's `predict`.
    """
    dataset = "nuswide"
    generate_home(home, dataset, rows)
    for method in ("seda", "baseline"):
        features = open_features(home, dataset, method, {"image": "image", "text": "text"})
        config, training = resolve_head_settings(dataset, method, "head", {}, {"epochs": str(PASSES), "precision": precision})
        assert len(features.train)  # load the tables before the time is measured
        validation = partial(predict, build_method(features, method, {}), features.val, 0, precision=training.precision)
        plain_pass = partial(plain_cell, features, method, {}, precision)
        share = wait_seconds(partial(on_one_thread, validation)) / wait_seconds(partial(on_one_thread, plain_pass))

        def by_hand(features: FeatureSet = features, method: str = method, validation: Any = validation) -> None:
            plain_cell(features, method, {}, precision, passes=PASSES, after_pass=validation)

        rounds = Rounds()
        for seed in range(ROUNDS):
            head = plan_head_on(features, method, config, training, seed)
            rounds.measure(partial(train_head, head, progress=False), partial(on_one_thread, by_hand))
        print(
            f"loop {method} {precision}: {rows:,} rows, {PASSES} passes, each with a validation ({share:.2f} of a pass), the "
            f"tool's statistics, measures and checkpoint included: ratio {rounds.ratio()} (wanted >= 1.0)",
            flush=True,
        )


def sampling(home: Path, rows: int, precision: str) -> None:
    """Compare SeDA's prediction with S = 20 steps and with all T = 1500 steps.

    Three seeds, on the 602 images of openmoji that it was not trained on; nothing is chosen by the result on the test split.
    """
    features = open_features(home, "openmoji", "seda", load_spec("openmoji")["encoders"])
    config, training = resolve_head_settings("openmoji", "seda", "head", {"T": "1500"}, {"precision": precision})
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


def whole(home: Path, rows: int, precision: str) -> None:
    """Run the grid of SeDA's Fig. 3, 48 cells, with three seeds on openmoji."""
    axes = read_axes("seda", ["papers"])
    grid = plan_grid(home, "openmoji", "seda", axes, [0, 1, 2], settings={}, training={"precision": precision})
    left = sum(not head.run.is_done for head in grid.heads.values())
    took = wait_seconds(partial(_run, grid))
    alone = [json.loads((RunFolder.at(head.run.path).path / "done").read_text())["seconds"] for head in grid.heads.values()]
    print(
        f"whole: {left} of {len(grid.heads)} runs in {took / 60:.1f} minutes; "
        f"the seconds of training of all runs add up to {sum(alone) / 60:.1f} minutes",
        flush=True,
    )


def make_step(home: Path, rows: int, precision: Any) -> Callable[[], None]:
    """Return one training step of SeDA, as the tool does it on one core or on the GPU."""
    generate_home(home, "nuswide", min(rows, 8192))
    features = open_features(home, "nuswide", "seda", {"image": "image", "text": "text"})
    model, batch = build_method(features, "seda", {}), next(shuffled_batches(features.train, BATCH_SIZE, 0)(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=True)

    def step() -> None:
        with use_precision(precision, default_device()):
            value = model.loss(batch, model.phases[-1].name)["loss"]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def flops(home: Path, rows: int, precision: str) -> None:
    """Print FLOP/s of the step over those of a large matrix product in the same format, on one thread."""
    step = make_step(home, rows, precision)
    with FlopCounterMode(display=False) as counter:
        step()
    device = default_device()
    dtype = torch.bfloat16 if precision == "mixed" else torch.float32
    left = torch.randn(2048, 2048, device=device, dtype=dtype)
    with reproducible(device):  # on one thread, as in the training of a cell
        step_seconds = statistics.median(wait_seconds(step) for _ in range(30))
        peak = 2 * 2048**3 / min(wait_seconds(lambda: left @ left) for _ in range(10))
    reached = counter.get_total_flops() / step_seconds
    print(
        f"flops: a step of {counter.get_total_flops() / 1e9:.1f} GFLOP takes {step_seconds * 1e3:.1f} ms in {precision}: "
        f"{reached / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s, ratio {reached / peak:.2f}",
        flush=True,
    )


def profile_step(home: Path, rows: int, precision: str) -> None:
    """Print the operators of the step that take most of the time themselves."""
    step = make_step(home, rows, precision)
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


PARTS: dict[str, Callable[[Path, int, str], None]] = {
    "cells": cells, "loop": loop, "sampling": sampling, "whole": whole, "flops": flops, "profile": profile_step
}  # fmt: skip


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="cells,loop,flops,profile")
    parser.add_argument("--rows", type=int, default=PAPER_ROWS["nuswide"], help="training rows, at most")
    parser.add_argument("--home", type=Path, help="where the demo has run, for sampling and whole")
    parser.add_argument("--precision", choices=["float32", "mixed"], default="float32", help="of both sides")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CPU_COUNT} cores, {platform.machine()}"
    print(f"torch {torch.__version__}, {device}", flush=True)
    for part in arguments.parts.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            home = arguments.home if part in ("sampling", "whole") else Path(scratch)
            PARTS[part](home, arguments.rows, arguments.precision)


if __name__ == "__main__":
    main()
