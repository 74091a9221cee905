"""Measure time and memory of reading NUS-WIDE's tags, or of making its whole manifest, at full size or many times that.

    python benchmarks/nuswide_tags.py [--scale 1] [--manifest]

Generates files with the official numbers of photos, tags and labels, reads them in a separate process, and prints rows/s,
seconds and peak memory.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.data.manifest_files import write_manifest
from pipeline.data.readers import binary_rows
from pipeline.data.spec import load_spec

NUM_TRAIN, NUM_TEST, WIDTH = 161_789, 107_859, 1_000
TAG_SHARE = 1_559_464 / (269_648 * WIDTH)  # share of the marks that are 1
LABEL_SHARE = 503_848 / (269_648 * 81)
CHUNK = 4_096  # rows that are generated at a time


def generate_tags(path: Path, num_rows: int, rng: np.random.Generator) -> None:
    """Write rows of zeros and ones, each followed by a tab, as in the official .dat files."""
    with path.open("wb") as file:
        for start in range(0, num_rows, CHUNK):
            marks = rng.random((min(CHUNK, num_rows - start), WIDTH), np.float32) < TAG_SHARE
            cells = np.full((len(marks), 2 * WIDTH + 1), ord("\t"), np.uint8)
            cells[:, :-1:2] = marks + ord("0")
            cells[:, -1] = ord("\n")
            file.write(cells.tobytes())


def generate(root: Path, scale: int, whole: bool) -> None:
    """Write the two files of tags below `root`.

    With `whole`, also write every other official file that is read, except the images.
    """
    rng = np.random.default_rng(0)
    sizes = {"Train": NUM_TRAIN * scale, "Test": NUM_TEST * scale}
    for name in ("NUS_WID_Tags", "ImageList", "Groundtruth/AllLabels", "ConceptsList", "Flickr"):
        (root / name).mkdir(parents=True)
    for split, num_rows in sizes.items():
        generate_tags(root / "NUS_WID_Tags" / f"{split}_Tags1k.dat", num_rows, rng)
    if not whole:
        return
    concepts = load_spec("nuswide")["class_names"]
    (root / "NUS_WID_Tags" / "TagList1k.txt").write_text("".join(f"tag{number}\n" for number in range(WIDTH)))
    (root / "ConceptsList" / "Concepts81.txt").write_text("\n".join(concepts))
    num_rows = sum(sizes.values())
    for name in concepts:
        marks = np.full((num_rows, 2), ord("\n"), np.uint8)
        marks[:, 0] = (rng.random(num_rows, np.float32) < LABEL_SHARE) + ord("0")
        (root / "Groundtruth" / "AllLabels" / f"Labels_{name}.txt").write_bytes(marks.tobytes())
    train = sizes["Train"]
    for name, rows in (("Image", range(num_rows)), ("TrainImage", range(train)), ("TestImage", range(train, num_rows))):
        with (root / "ImageList" / f"{name}list.txt").open("w") as file:
            file.writelines(f"folder{row % 704}\\{row:04d}_{2_000_000_000 + row}.jpg\n" for row in rows)


def read_tags(root: Path) -> int:
    """Read both files as a stream, as the builder does, and return the number of rows."""
    num_rows = 0
    for split in ("Train", "Test"):
        num_rows += sum(1 for _ in binary_rows(root / "NUS_WID_Tags" / f"{split}_Tags1k.dat", WIDTH))
    return num_rows


def make_manifest(root: Path) -> int:
    """Build, check and write the manifest, and return the number of photos."""
    from pipeline.data.datasets.nuswide import NusWide

    manifest = NusWide().build({**load_spec("nuswide"), "counts_profile": "fixture", "filter": "none"}, root)
    write_manifest(manifest, root / "home")
    return len(manifest.samples)


def main() -> None:
    """Generate the files here, measure in a new process, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scale", type=int, default=1, help="times the official number of photos")
    parser.add_argument("--manifest", action="store_true", help="make the whole manifest instead of reading the tags alone")
    parser.add_argument("--measure", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure != Path():
        start = time.monotonic()
        num_rows = (make_manifest if arguments.manifest else read_tags)(arguments.measure)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        what = "manifest made" if arguments.manifest else "tags read"
        print(
            f"{what}: {num_rows:,} rows x {WIDTH:,} in {seconds:.1f} s, {num_rows / seconds:,.0f} rows/s, peak {peak:.2f} GiB"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder) / "root", arguments.scale, arguments.manifest)
        flags = ["--manifest"] if arguments.manifest else []
        subprocess.run([sys.executable, __file__, "--measure", str(Path(folder) / "root"), *flags], check=True)


if __name__ == "__main__":
    main()
