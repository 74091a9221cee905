"""Compare what `diffalign plan` says with the extraction that follows, which it has not seen; results are in RESULTS.md.

    python benchmarks/plan.py [--pictures 20000] [--seconds 20] [--encoder efficientnet_lite] [--set side=96 …] [--folder DIR]

The pictures are JPEGs whose sides grow from 64 to 448 pixels along the data set: the first ones tell nothing about the others.
Both commands are processes of their own. It prints the ratio of the hours that were said to those that were taken, by the clock
and of the processor, which says how much of a difference is that of the machine's other work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from dask.system import CPU_COUNT
from PIL import Image

SMALLEST, LARGEST = 64, 448  # pixels of a side
COPIES = 20  # files of one picture
WANTED = "0.7 to 1.3"


def write_pictures(folder: Path, count: int) -> None:
    """Write pictures in ascending size, and the table that names them."""
    folder.mkdir(parents=True)
    numbers = range(0, count, COPIES)
    with get_context("fork").Pool(CPU_COUNT) as pool:
        pool.map(partial(write_copies, folder, count), numbers)
    lines = [f"p{row},{row}.jpg,kind{row % 10},picture number {row},g{row // COPIES}" for row in range(count)]
    (folder / "pictures.csv").write_text("\n".join(["sample_id,media_path,label,text,group_id", *lines]) + "\n")


def write_copies(folder: Path, count: int, first: int) -> None:
    """Write one picture of coloured clouds and grain under some names."""
    rng = np.random.default_rng(first)
    sides = (SMALLEST + (LARGEST - SMALLEST) * first / count) * rng.uniform(0.8, 1.2, 2)
    width, height = int(sides[0]), int(sides[1])
    clouds = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(clouds, np.int16) + rng.integers(-12, 13, (height, width, 1))
    name = folder / f"{first}.jpg"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(name, quality=88)
    for copy in range(first + 1, min(first + COPIES, count)):
        (folder / f"{copy}.jpg").write_bytes(name.read_bytes())


def run(*words: str) -> tuple[str, float, float]:
    """Run `diffalign`, and return what it prints, its seconds, and those of the processor in it and its children."""
    before, started = os.times(), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], check=True, stdout=subprocess.PIPE, text=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout, time.perf_counter() - started, spent


def compare(folder: Path, count: int, seconds: float, encoder: str, settings: list[str]) -> dict[str, Any]:
    """Plan an extraction, run it, and return both."""
    write_pictures(folder / "pictures", count)
    home, chosen = ["--home", str(folder / "home")], ["--encoder", encoder, *(f"--set={each}" for each in settings)]
    run("prepare", "table", "--name", "pictures", "--root", str(folder / "pictures"), "--set", "file=pictures.csv", *home)
    said, plan_wall, _ = run("plan", "pictures", *chosen, *home, "--seconds", str(seconds), "--json")
    (facts,) = json.loads(said)["encoders"]
    _, wall, processor = run("extract", "pictures", *chosen, *home)
    return {
        "said": facts["seconds"]["total"],
        "taken": wall,
        "said_processor": facts["processor_hours"] * 3600,
        "taken_processor": processor,
        "plan_seconds": plan_wall,
        "bound": facts["bound"],
        "facts": facts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--encoder", default="efficientnet_lite")
    parser.add_argument("--set", nargs="*", default=[], dest="settings")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = compare(Path(name), options.pictures, options.seconds, options.encoder, options.settings)
    print(f"plan of {options.pictures:,} pictures, after {found['plan_seconds']:.0f} s: {found['bound']}")
    for what, of in (("by the clock", ""), ("of the processor", "_processor")):
        said, taken = found[f"said{of}"], found[f"taken{of}"]
        print(f"seconds {what}: said {said:.0f}, taken {taken:.0f}: ratio {said / taken:.2f} (wanted {WANTED})")
    print(json.dumps(found["facts"]["seconds"]))


if __name__ == "__main__":
    main()
