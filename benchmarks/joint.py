"""Measure what joint training costs in addition to the encoder, as ratios measured in one run; results are in RESULTS.md.

    python benchmarks/joint.py [--encoder efficientnet_lite] [--set side=224] [--images 256] [--batch 32] [--last 2]

step    images/s of joint training (gathering prepared items, head, clipping, Adam) over those of the encoder's forward and
        backward passes alone, on tensors that are ready, also with --fast; and the time of the statistics before a
        validation, in epochs
memory  peak memory of one step: plain, with --checkpointing, with --accumulate 4
last    seconds of an epoch of the whole encoder over those of its last K blocks from stored states, and the time of storing
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

from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import write_manifest
from pipeline.evaluation.evaluate import load_method
from pipeline.extraction.extract import ExtractOptions, extract
from pipeline.runtime.device import default_device
from pipeline.runtime.settings import configure
from pipeline.training.heads import plan_head, resolve_head_settings, train_head
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.inputs import to_device
from pipeline.training.joint.plan import JointConfig, JointOptions, JointPlan
from pipeline.training.joint.trainable_encoder import TrainableEncoder, build_joint_method, open_trainable_encoder
from pipeline.training.joint.trainer import deterministic_algorithms, fast_algorithms, joint_source, validate_joint
from pipeline.training.loop import Trainer, train_epoch
from pipeline.training.state import TrainState
from pipeline.types import Sample

SINGLE_PROCESS = DistributedContext()
PICTURES = 32  # number of files; samples share them
REPEATS = 3  # the fastest of these is reported


def make_plan(home: Path, encoder: str, settings: dict[str, str], images: int, batch: int) -> JointPlan:
    """Make a home with a head trained for one epoch on random pictures, and plan the joint training that starts from it."""
    folder = home / "pictures"
    folder.mkdir(parents=True)
    for number in range(PICTURES + 1):
        noise = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    samples = [Sample(f"{row:06d}", "train", Path(f"{row % PICTURES}.png"), (), (row % 10,), "") for row in range(images)]
    samples.append(Sample("val", "val", Path(f"{PICTURES}.png"), (), (0,), ""))
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}, "licence": "generated"}
    manifest = Manifest("bench", "single", tuple(map(str, range(10))), tuple(samples), meta, folder)
    write_manifest(manifest, home)
    cache = extract(manifest, encoder, settings, home, options=ExtractOptions(progress=False)).name
    config, training = resolve_head_settings("bench", "baseline", "head", {}, {"epochs": 1, "batch_size": batch})
    head = plan_head(home, "bench", "baseline", config, training, 0, {"image": cache})
    init = train_head(head, progress=False)
    loaded = load_method(init, head.config, configure(type(config), head.config.settings))
    run = replace(init, path=home / "joint" / "bench" / "x-0" / "seed0")
    joint = JointConfig()
    return JointPlan(
        config=head.config, joint=joint, training=training, head=loaded, init=init, run=run, features=head.features
    )


def joint_epoch(plan: JointPlan, options: JointOptions) -> tuple[Callable[[], object], Callable[[], object], TrainableEncoder]:
    """Set up joint training.

    Returns:
        A function that trains one epoch, one that computes the statistics and validates one image, and the trained encoder.
    """
    encoders = {"image": open_trainable_encoder(plan, "image", options, SINGLE_PROCESS)}
    model = build_joint_method(plan, encoders, SINGLE_PROCESS)
    source = joint_source(plan, model, encoders, SINGLE_PROCESS, False, options.fast)
    trainer = Trainer([TrainState(method=model, run=plan.run, config=plan.training)])
    return (
        lambda: train_epoch(trainer, source),
        lambda: validate_joint(plan, encoders, SINGLE_PROCESS, model),
        encoders["image"],
    )


def bare_epoch(trained: TrainableEncoder, steps: int, batch: int, is_fast: bool = False) -> Callable[[], object]:
    """Return a function that runs `steps` forward and backward passes of the encoder alone, on one batch that is ready."""
    items = to_device(trained.items["train"][:batch], default_device(), channels_last=is_fast)

    def epoch() -> None:
        for _ in range(steps):
            trained.encoder.zero_grad(set_to_none=True)
            trained.encoder(items).sum().backward()

    return epoch


def fastest(*epochs: Callable[[], object]) -> list[float]:
    """Return the smallest wall time of each function.

    They run in turns, so that other work on the machine affects all of them.
    """
    rounds = [[seconds(epoch) for epoch in epochs] for _ in range(REPEATS)]
    return [min(column) for column in zip(*rounds, strict=True)]


def seconds(function: Callable[[], object]) -> float:
    """Return the wall time of a call, until the device has finished."""
    started = time.perf_counter()
    function()
    if default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(plan: JointPlan, options: JointOptions) -> int:
    """Return the peak memory of a process that trains one epoch."""
    epoch, _, _ = joint_epoch(plan, options)
    if default_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    epoch()
    if default_device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss is of no use: a process inherits it from its parent
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def main() -> None:
    """Print the results as JSON."""
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
        plan = make_plan(Path(folder) / "home", options.encoder, settings, images, options.batch)
        if options.peak:
            variants = {
                "plain": JointOptions(progress=False),
                "checkpointing": JointOptions(progress=False, checkpointing=True),
            }
            variants["accumulate"] = JointOptions(progress=False, accumulate=4)
            with deterministic_algorithms(default_device()):
                print(peak_bytes(plan, variants[options.peak]))
            return
        steps = options.images // options.batch
        with deterministic_algorithms(default_device()):
            epoch, statistics, trained = joint_epoch(plan, JointOptions(progress=False))
            whole, bare, statistics_time = fastest(epoch, bare_epoch(trained, steps, options.batch), statistics)
            print(f"joint step over the bare encoder: ratio {bare / whole:.3f} (wanted >= 0.9)", flush=True)
        with fast_algorithms(default_device()):
            epoch, _, trained = joint_epoch(plan, JointOptions(progress=False, fast=True))
            fast, bare_fast = fastest(epoch, bare_epoch(trained, steps, options.batch, is_fast=True))
            print(f"joint step with --fast over the bare encoder: ratio {bare_fast / fast:.3f} (wanted >= 0.9)", flush=True)
            print(f"joint step with --fast over the deterministic one: ratio {whole / fast:.3f}", flush=True)
        with deterministic_algorithms(default_device()):
            last = replace(plan, joint=JointConfig(train=f"last:{options.last}"))
            started = time.perf_counter()
            epoch, _, _ = joint_epoch(last, JointOptions(progress=False))
            storing = time.perf_counter() - started
            (partial,) = fastest(epoch)
    figures = {
        "device": torch.cuda.get_device_name() if default_device().type == "cuda" else f"{platform.machine()} cpu",
        "encoder": {options.encoder: settings},
        "joint images/s": round(steps * options.batch / whole, 1),
        "bare images/s": round(steps * options.batch / bare, 1),
        "step ratio": round(bare / whole, 3),
        "statistics, in epochs": round(statistics_time / whole, 2),
        f"last:{options.last} speed-up of an epoch": round(whole / partial, 2),
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
