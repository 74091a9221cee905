"""Whether exported programs give the classes of their runs: of a whole split from cached features, and from pictures.

    python benchmarks/exported.py RUN… [--home artifacts] [--split test] [--pictures 200]

The head of each run is exported alone, and gets the features of the run's cache and the noise that the run draws for these
samples. A row has the share of the samples with the same class as the run and the largest difference of a logit, for the
program of torch.export and for ONNX Runtime. The last two rows are the whole export of the first run, from pixels, beside the
run on the cached features of the same pictures. Seconds are of the processor. Reads of the test split are logged in the runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

import pipeline as da
from pipeline.cache.reader import Cache
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media_digests import read_digest
from pipeline.evaluation.classify import Classifier, find_any_cache
from pipeline.evaluation.evaluate import log_test_read
from pipeline.runtime.errors import UserError
from pipeline.runtime.head_names import find_run
from pipeline.runtime.rng import content_keys, sample_keys
from pipeline.studies.export_folder import export_run
from pipeline.studies.export_graph import NUM_EXAMPLES, ClassifierGraph, run_noise, trace
from pipeline.studies.export_inputs import read_preprocessing
from pipeline.studies.export_onnx import write_onnx

ROWS_AT_ONCE = 256
PICTURES_AT_ONCE = 16
Logits = np.ndarray  # [N,C]


class Agreement(NamedTuple):
    """How far the logits of a program are from those of the run."""

    num_samples: int
    num_same: int  # samples with the same largest logit
    largest: float  # difference of a logit

    @staticmethod
    def of(found: Logits, expected: Logits) -> Agreement:
        """Compare the logits of a program with those of the run."""
        same = found.argmax(axis=1) == expected.argmax(axis=1)
        return Agreement(len(same), int(same.sum()), float(np.abs(found - expected).max()))

    def __str__(self) -> str:
        return f"{self.num_same} of {self.num_samples} ({self.num_same / self.num_samples:.2%}), {self.largest:.1e}"


def compare_head(classifier: Classifier, cache: Cache, ids: list[str], folder: Path) -> tuple[str, str, str]:
    """Return how the head's two programs agree with the run on samples of its cache, and the seconds that exporting took."""
    features, keys = cache.read(ids), sample_keys(ids)
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, len(ids), ROWS_AT_ONCE)]
    expected = np.concatenate([classifier.logits(features[part], keys[part]) for part in parts])
    started = time.process_time()
    head: Any = torch.nn.Identity()  # in place of an encoder
    graph = ClassifierGraph(head, classifier.method, "float32")
    inputs = torch.from_numpy(features)
    graph.record_draws(inputs[:NUM_EXAMPLES])
    noise = run_noise(graph.draws, classifier.run.seed, keys)
    examples = tuple(each[:NUM_EXAMPLES] for each in (inputs, noise) if each.shape[1])
    program = trace(graph, examples)
    traced = time.process_time()
    write_onnx(program, graph, examples, folder / "head.onnx")
    seconds = f"{traced - started:.0f} + {time.process_time() - traced:.0f}"
    module = program.module()
    with torch.no_grad():
        torch_logits = np.concatenate([module(*(each[part] for each in (inputs, noise)[: len(examples)])) for part in parts])
    onnx_logits = run_onnx(folder / "head.onnx", [inputs, noise][: len(examples)], parts)
    return str(Agreement.of(torch_logits, expected)), str(Agreement.of(onnx_logits, expected)), seconds


def run_onnx(path: Path, inputs: list[Tensor], parts: list[slice]) -> Logits:
    """Return the logits that ONNX Runtime computes on one thread."""
    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return np.concatenate(
        [session.run(None, dict(zip(names, (each[part].numpy() for each in inputs), strict=True)))[0] for part in parts]
    )


def compare_whole(classifier: Classifier, cache: Cache, files: dict[str, Path], home: Path, folder: Path) -> list[str]:
    """Return how both programs of an exported folder agree with the run, from these pictures by sample id."""
    started = time.process_time()
    export_run(classifier.run, folder, home)
    seconds = f"{time.process_time() - started:.0f}"
    prepare, digests = read_preprocessing(folder), [read_digest(path) for path in files.values()]
    expected = classifier.logits(cache.read(list(files)), content_keys(digests))
    pixels = np.stack([prepare(path).numpy() for path in files.values()])
    rows = []
    for backend in ("torch", "onnx"):
        model = da.load_export(folder, backend)
        noise = model.noise(digests)
        parts = [slice(start, start + PICTURES_AT_ONCE) for start in range(0, len(files), PICTURES_AT_ONCE)]
        found = np.concatenate([model.graph(pixels[part], noise[part]) for part in parts])
        rows.append(f"{backend} | {Agreement.of(found, expected)} | {seconds}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--home", type=Path, default=Path("artifacts"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--pictures", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    whole: list[str] = []
    print(
        "| run | torch.export: same class, largest difference | ONNX Runtime | seconds of export |\n|---|---|---|---|",
        flush=True,
    )
    for number, name in enumerate(options.runs):
        classifier = Classifier.of(find_run(options.home, name), options.home)
        spec, manifest = classifier.spec, read_manifest(options.home, classifier.spec.dataset)
        cache = find_any_cache(options.home, spec.encoder, spec)
        samples = manifest.split(options.split)
        finite = np.asarray(np.isfinite(cache.read([each.id for each in samples])).reshape(len(samples), -1).all(axis=1))
        there = [sample for sample, is_there in zip(samples, finite.tolist(), strict=True) if is_there]
        if options.split == "test":
            log_test_read(classifier.run, "benchmarks/exported.py")
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = compare_head(classifier, cache, [each.id for each in there], Path(folder))
            except UserError as error:
                row = (f"refused: {error}", "", "")
            print(f"| {name} | {' | '.join(row)} |", flush=True)
            if number == 0:
                step = max(len(there) // max(options.pictures, 1), 1)
                files = {each.id: manifest.media_path(each) for each in there[::step][: options.pictures]}
                whole = compare_whole(classifier, cache, files, options.home, Path(folder) / "whole") if files else []
    if whole:
        print(f"\nFrom pictures, {options.runs[0]}:\n" + "\n".join(f"| {row} |" for row in whole))


if __name__ == "__main__":
    main()
