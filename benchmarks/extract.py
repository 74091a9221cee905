"""Compare the speed of extraction with what the machine can do, as ratios measured in one run; results are in RESULTS.md.

    python benchmarks/extract.py [--parts bound,decoding,loop,store,opening,overhead,identity,memory] [--images 384]
    python benchmarks/extract.py --parts peer --peer PYTHON     # PYTHON of an environment with clip-retrieval and setuptools<70

bound     wall time over the lower bound max(decode alone, forward alone, core-seconds / cores)
decoding  images per second that worker processes decode and hand over, over those of as many threads of one process
loop      images per second over those of the loop in timm's documentation: float32, one image at a time, DataLoader(workers=0)
store     MB/s of writing a cache, and of reading all of it over numpy.fromfile on the same bytes, from the disk and from memory
opening   seconds of opening a cache of ten million rows
overhead  share of an extraction's time that sha256 and fsync take
identity  processor time of an extraction with the digests of its media over that without, in turns
memory    peak memory with ten times as many rows over that with the smaller number
peer      images per second over those of `clip-retrieval inference`, with the same pictures and the same weights
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.utils.data
from dask.system import CPU_COUNT
from PIL import Image
from stores import in_turns, opening, spread, store
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from pipeline.cache import layout
from pipeline.cache.shard_media import ShardMedia
from pipeline.data.manifest import Manifest
from pipeline.encoders.efficientnet_lite import load_weights
from pipeline.extraction.extract import ExtractOptions, extract, plan_extraction
from pipeline.extraction.throughput import ThroughputMeter
from pipeline.extraction.workers import encode_batches, prepare_batches
from pipeline.runtime.device import default_device
from pipeline.runtime.files import file_sha256
from pipeline.types import Sample

SIDE = 500  # pixels of the shorter side
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "efficientnet_lite": ("efficientnet_lite", {}),
    "ViT-B/16": ("timm", {"model": "vit_base_patch16_224", "weights": "random"}),
}
DECODING_ROUNDS = 5
PICTURES = 384  # at most; a larger manifest has them several times
PEER_MODEL = "ViT-B-32"
QUIET = ExtractOptions(progress=False)


def write_pictures(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 667 pixels with the spectrum of photographs: noise whose amplitude falls with its frequency."""
    folder.mkdir()
    with get_context("fork").Pool(CPU_COUNT) as pool:
        pool.map(partial(write_picture, folder), range(count))


def write_picture(folder: Path, number: int) -> None:
    """Write one picture; see `write_pictures`."""
    shape, rng = (SIDE, SIDE * 4 // 3), np.random.default_rng(number)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1]), indexing="ij")) + 1e-3
    channels = [np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) / frequency, s=shape) for _ in range(3)]
    image = np.stack(channels, axis=-1)
    scaled = 128 + 50 * (image - image.mean()) / image.std()
    Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)


def make_manifest(folder: Path, count: int) -> Manifest:
    """Return a manifest of `count` samples that use the pictures of a folder in turn."""
    files = sorted(path.name for path in folder.iterdir())
    samples = (Sample(f"{row:07d}", "train", Path(files[row % len(files)]), (), (0,), "") for row in range(count))
    meta = {"media_type": "image", "text": {"kind": "", "aggregate": "mean", "sep": ""}}
    return Manifest("bench", "single", ("only",), tuple(samples), meta, folder)


def seconds(function: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def bound(folder: Path, home: Path, count: int) -> None:
    """Print the wall time of an extraction over its lower bound."""
    manifest = make_manifest(folder, count)
    for label, (name, settings) in ENCODERS.items():
        task = plan_extraction(manifest, name, settings, home, "float16", False, QUIET)
        batches = task.batches(range(count))
        ready = [task.inputs.prepare(rows) for rows in batches]
        device = default_device().type

        def forward_all(task: Any = task, ready: Any = ready) -> None:
            with torch.inference_mode():
                for prepared in ready:
                    task.encoder(torch.from_numpy(prepared.items)).cpu()

        forward_all()  # warm-up
        decode_seconds = seconds(lambda task=task, batches=batches: decode_alone(task, batches))
        forward_seconds = seconds(forward_all)
        meter = ThroughputMeter(CPU_COUNT, device)

        def run(task: Any = task, batches: Any = batches, meter: Any = meter) -> None:
            for batch in encode_batches(task.inputs, batches, task.encoder, meter):
                meter.add(batch)

        wall = seconds(run)
        core_seconds = seconds_on_one_core(name, settings, folder, home, count)
        lower = max(decode_seconds, forward_seconds, core_seconds / CPU_COUNT)
        print(
            f"bound {label}: wall {wall:.1f} s, decode alone {decode_seconds:.1f}, forward alone {forward_seconds:.1f}, "
            f"core-seconds / cores {core_seconds / CPU_COUNT:.1f}: ratio {wall / lower:.2f} (wanted <= 1.15); "
            f"{meter.verdict()}",
            flush=True,
        )


def decode_alone(task: Any, batches: list[np.ndarray]) -> None:
    """Prepare every batch with one process per core, and encode none."""
    with get_context("fork").Pool(CPU_COUNT, torch.set_num_threads, (1,)) as pool:
        for _ in pool.imap(task.inputs.prepare, batches):
            pass


def decoding(folder: Path, home: Path, count: int) -> None:
    """Print the images per second of worker processes, which send what they decode, over those of as many threads."""
    manifest = make_manifest(folder, count)
    for label, (name, settings) in ENCODERS.items():
        task = plan_extraction(manifest, name, settings, home, "float16", False, QUIET)
        batches = task.batches(range(count))

        def processes(task: Any = task, batches: Any = batches) -> None:
            for _ in prepare_batches(task.inputs, batches, CPU_COUNT):
                pass

        def threads(task: Any = task, batches: Any = batches) -> None:
            with ThreadPoolExecutor(CPU_COUNT) as pool:
                for _ in pool.map(task.inputs.prepare, batches):
                    pass

        ours, theirs = in_turns(processes, threads, rounds=DECODING_ROUNDS)
        ratios = [thread_seconds / own for own, thread_seconds in zip(ours, theirs, strict=True)]
        print(
            f"decoding {label}: {CPU_COUNT} processes over {CPU_COUNT} threads: ratio {spread(ratios, '.2f')} "
            f"(wanted >= 0.95); {count / statistics.median(ours):.0f} images/s",
            flush=True,
        )


def seconds_on_one_core(name: str, settings: dict[str, str], folder: Path, home: Path, count: int) -> float:
    """Return the core-seconds of the whole extraction: the time of a quarter of it in one process on one thread, times four."""
    manifest = make_manifest(folder, count // 4)
    task = plan_extraction(manifest, name, settings, home, "float16", False, QUIET)
    meter = ThroughputMeter(0, "cpu")
    return 4 * seconds(lambda: list(encode_batches(task.inputs, task.batches(range(count // 4)), task.encoder, meter)))


def loop(folder: Path, home: Path, count: int) -> None:
    """Print images per second over those of the loop in timm's documentation, which takes one image at a time."""
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=1000).eval()
    network.load_state_dict(load_weights("package"))
    transform: Any = create_transform(**resolve_data_config({}, model=network))
    files = sorted(folder.iterdir())[: count // 4]

    class Pictures(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> torch.Tensor:
            return transform(Image.open(files[number]).convert("RGB"))

    def plain() -> None:
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(Pictures(), batch_size=1, num_workers=0):
                nn.Module.__call__(network, batch)

    plain_rate = len(files) / seconds(plain)
    ours = count / seconds(lambda: extract(make_manifest(folder, count), "efficientnet_lite", {}, home / "loop", options=QUIET))
    print(f"loop: {ours:.0f} images/s over {plain_rate:.0f}: ratio {ours / plain_rate:.2f} (wanted >= 3)", flush=True)


def overhead(folder: Path, home: Path, count: int) -> None:
    """Print the time of the checksum and the fsync of a full shard, over the time that encoding the rows of a shard takes."""
    encode_seconds = seconds(lambda: extract(make_manifest(folder, count), "efficientnet_lite", {}, home / "o", options=QUIET))
    data = os.urandom(layout.SHARD_ROWS * 1280 * 2)
    file = home / "shard.bin"
    plain_seconds = seconds(lambda: file.write_bytes(data))

    def careful() -> None:
        with (home / "careful.bin").open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        file_sha256(home / "careful.bin")

    extra = seconds(careful) - plain_seconds
    whole = encode_seconds / count * layout.SHARD_ROWS
    print(f"overhead: {extra:.2f} s of {whole:.0f} s a shard: {extra / whole:.2%} (wanted < 3 %)", flush=True)


def identity(folder: Path, home: Path, count: int) -> None:
    """Print the processor time of extractions in this process with digests of the media over that without, in turns."""
    options = ExtractOptions(progress=False, workers=0)
    digests = ShardMedia.digests

    def run(encoder: str, name: str) -> float:
        started = time.process_time()
        extract(make_manifest(folder, count), encoder, {}, home / f"{encoder}-{name}", options=options)
        return time.process_time() - started

    for encoder, rounds in (("random_projection", 9), ("efficientnet_lite", 5)):
        run(encoder, "warm-up")
        ratios = []
        for number in range(rounds):
            with_digests = run(encoder, f"with{number}")
            ShardMedia.digests = lambda self: ""
            ratios.append(with_digests / run(encoder, f"without{number}"))
            ShardMedia.digests = digests
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"identity {encoder}: ratio {middle:.4f} ({low:.4f} to {high:.4f}, {rounds} rounds) (wanted < 1.03)", flush=True)


def memory(folder: Path, home: Path, count: int) -> None:
    """Print the peak memory of extractions of 2,000 and 20,000 rows, each in its own process."""
    peaks = []
    for rows in (2_000, 20_000):
        script = (
            "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import extract as bench\n"
            "bench.extract(bench.make_manifest(Path(sys.argv[2]), int(sys.argv[4])), 'random_projection', {'width': '768'},"
            " Path(sys.argv[3]), options=bench.ExtractOptions(progress=False, workers=0, shard_rows=512))\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        arguments = [str(Path(__file__).parent), str(folder), str(home / f"m{rows}"), str(rows)]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    print(
        f"memory: {peaks[0] / 1024:.0f} MiB, {peaks[1] / 1024:.0f} MiB: ratio {peaks[1] / peaks[0]:.2f} (wanted <= 1.10)",
        flush=True,
    )


def peer(folder: Path, home: Path, count: int, python: Path) -> None:
    """Print images per second over those of `clip-retrieval inference` with a random OpenCLIP model.

    Both are timed from their first batch.
    """
    import open_clip

    torch.manual_seed(0)
    weights = home / "weights.pt"
    torch.save(open_clip.create_model(PEER_MODEL).state_dict(), weights)
    command = [
        *(str(python.parent / "clip-retrieval"), "inference"),
        *("--input_dataset", str(folder), "--output_folder", str(home / "peer"), "--enable_text", "False"),
        *("--clip_model", f"open_clip:{PEER_MODEL}/{weights}", "--use_jit", "False", "--batch_size", "64"),
        *("--num_prepro_workers", str(CPU_COUNT), "--enable_wandb", "False"),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    stats = [json.loads(file.read_text()) for file in sorted((home / "peer" / "stats").glob("*.json"))]
    span = max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)
    peer_rate = sum(each["sample_count"] for each in stats) / span
    settings = {"model": PEER_MODEL, "weights": str(weights)}
    task = plan_extraction(make_manifest(folder, count), "openclip", settings, home, "float16", False, QUIET)
    meter = ThroughputMeter(CPU_COUNT, default_device().type)
    ours = count / seconds(lambda: list(encode_batches(task.inputs, task.batches(range(count)), task.encoder, meter)))
    print(f"peer: {ours:.1f} images/s over {peer_rate:.1f}: ratio {ours / peer_rate:.2f} (wanted >= 2.5)", flush=True)
    print(f"peer's own account: {stats}", file=sys.stderr)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="bound,decoding,loop,store,opening,overhead,identity,memory")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--peer", type=Path, help="python of an environment with clip-retrieval")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[Path, Path, int], None]] = {
        **{part.__name__: part for part in (bound, decoding, loop, store, opening, overhead, identity, memory)},
        "peer": lambda folder, home, count: peer(folder, home, count, arguments.peer),
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{CPU_COUNT} cores, {platform.machine()}"
    print(f"torch {torch.__version__}, {device}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch) / "pictures", Path(scratch) / "home"
        write_pictures(folder, min(arguments.images, PICTURES))
        home.mkdir()
        for part in arguments.parts.split(","):
            parts[part](folder, home, arguments.images)


if __name__ == "__main__":
    main()
