"""What joint training costs beside the encoder itself, as ratios of one run: see RESULTS.md.

    python benchmarks/joint.py [--encoder efficientnet_lite] [--set side=224] [--images 256] [--batch 32] [--last 2]

step    images/s of joint training (decoded items, gathering, head, clipping, Adam) over those of the encoder's bare forward and
        backward passes on ready tensors; and the time of the statistics before a validation, in such epochs
memory  peak memory of one step: plain, with --checkpointing, with --accumulate 4
last    seconds of an epoch of the whole encoder over those of its last K blocks from stored states, and what storing takes
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.data import manifest as manifests
from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import load_method
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime import plugins
from pipeline.runtime.device import default_device
from pipeline.training.heads import plan_head, resolve_settings, train_head
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.trainer import (
    JointConfig,
    JointOptions,
    Together,
    TrainableEncoder,
    assemble,
    open_live,
    repeatable,
    source_of,
    validate,
)
from pipeline.training.loop import _pass
from pipeline.training.optim import EnsembleOptimizer
from pipeline.training.state import TrainState
from pipeline.types import Sample

ALONE = DistributedContext()
PICTURES = 32  # files; samples share them
REPEATS = 3  # the fastest counts


def make_plan(home: Path, encoder: str, settings: dict[str, str], images: int, batch: int) -> Together:
    """A home with a head of one epoch on random pictures, and the joint training that starts from it."""
    folder = home / "pictures"
    folder.mkdir(parents=True)
    for number in range(PICTURES + 1):
        noise = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    samples = [Sample(f"{row:06d}", "train", Path(f"{row % PICTURES}.png"), (), (row % 10,), "") for row in range(images)]
    samples.append(Sample("val", "val", Path(f"{PICTURES}.png"), (), (0,), ""))
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}, "licence": "generated"}
    manifest = Manifest("bench", "single", tuple(map(str, range(10))), tuple(samples), meta, folder)
    manifests.write_manifest(manifest, home)
    cache = extract(manifest, encoder, settings, home, effort=ExtractOptions(progress=False)).name
    config, training = resolve_settings("bench", "baseline", "head", {}, {"epochs": 1, "batch_size": batch})
    head = plan_head(home, "bench", "baseline", config, training, 0, {"image": cache})
    init = train_head(head, progress=False)
    loaded = load_method(init, head.config, plugins.configure(type(config), head.config.settings))
    run = replace(init, path=home / "joint" / "bench" / "x-0" / "seed0")
    joint = JointConfig()
    return Together(config=head.config, joint=joint, training=training, head=loaded, init=init, run=run, features=head.features)


def joint_epoch(together: Together, work: JointOptions) -> tuple[Callable[[], object], Callable[[], object], TrainableEncoder]:
    """An epoch of joint training, its statistics with one validation image, and the encoder that it trains."""
    live = {"image": open_live(together, "image", work, ALONE)}
    model = assemble(together, live, ALONE)
    source = source_of(together, model, live, ALONE, progress=False)
    learner = EnsembleOptimizer([TrainState(method=model, run=together.run, config=together.training)])
    return lambda: _pass(learner, source), lambda: validate(together, live, ALONE, model), live["image"]


def bare_epoch(live: TrainableEncoder, steps: int, batch: int) -> Callable[[], object]:
    """As many forward and backward passes of the encoder, on one batch that is there already."""
    items = live.items["train"][:batch].to(default_device())

    def epoch() -> None:
        for _ in range(steps):
            live.encoder.zero_grad(set_to_none=True)
            live.encoder(items).sum().backward()

    return epoch


def fastest(*epochs: Callable[[], object]) -> list[float]:
    """Wall time of each, measured in turns, so that what else the machine does meets all of them."""
    rounds = [[timed(epoch) for epoch in epochs] for _ in range(REPEATS)]
    return [min(column) for column in zip(*rounds, strict=True)]


def timed(work: Callable[[], object]) -> float:
    """Wall time, with the device's work done."""
    started = time.perf_counter()
    work()
    if default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(together: Together, work: JointOptions) -> int:
    """Peak memory of a process that trains one epoch."""
    epoch, _, _ = joint_epoch(together, work)
    if default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    epoch()
    if default_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # not ru_maxrss, which a process inherits from the one that started it
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="efficientnet_lite")
    parser.add_argument("--set", action="append", default=["weights=random"], dest="settings")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--last", type=int, default=2)
    parser.add_argument("--peak", default="", help="one measurement of memory, for this program's own use")
    options = parser.parse_args()
    settings = dict(pair.split("=", 1) for pair in options.settings)
    with tempfile.TemporaryDirectory() as folder:
        images = options.batch if options.peak else options.images
        together = make_plan(Path(folder) / "home", options.encoder, settings, images, options.batch)
        if options.peak:
            works = {"plain": JointOptions(progress=False), "checkpointing": JointOptions(progress=False, checkpointing=True)}
            works["accumulate"] = JointOptions(progress=False, accumulate=4)
            with repeatable(default_device()):
                print(peak_bytes(together, works[options.peak]))
            return
        steps = options.images // options.batch
        with repeatable(default_device()):
            epoch, statistics, live = joint_epoch(together, JointOptions(progress=False))
            whole, bare, following = fastest(epoch, bare_epoch(live, steps, options.batch), statistics)
            last = replace(together, joint=JointConfig(train=f"last:{options.last}"))
            started = time.perf_counter()
            epoch, _, _ = joint_epoch(last, JointOptions(progress=False))
            storing = time.perf_counter() - started
            (bridged,) = fastest(epoch)
    figures = {
        "device": torch.cuda.get_device_name() if default_device().type == "cuda" else f"{platform.machine()} cpu",
        "encoder": {options.encoder: settings},
        "joint images/s": round(steps * options.batch / whole, 1),
        "bare images/s": round(steps * options.batch / bare, 1),
        "step ratio": round(bare / whole, 3),
        "statistics, in epochs": round(following / whole, 2),
        f"last:{options.last} speed-up of an epoch": round(whole / bridged, 2),
        f"last:{options.last} storing, in epochs of the whole encoder": round(storing / whole, 2),
    }
    for kind in ("plain", "checkpointing", "accumulate"):
        command = [sys.executable, __file__, "--encoder", options.encoder, "--batch", str(options.batch), "--peak", kind]
        command += [part for pair in options.settings[1:] for part in ("--set", pair)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures[f"peak MiB, {kind}"] = round(int(done.stdout) / 2**20)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
