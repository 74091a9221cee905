"""SeDA's Figure 4: the way of the samples of one class from image to text, in one step and along the steps of the sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.cache.table import FeatureTable, split_samples
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.methods.l2 import L2
from pipeline.methods.seda import SeDA
from pipeline.report.figure_data import tsne_positions
from pipeline.report.printed import AlignmentPath, ChainCosines, plot_cosines, plot_paths, write_printed
from pipeline.runtime.device import reproducible
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder
from pipeline.studies.trained_head import TrainedHead
from pipeline.types import Split

MAX_PATH_SAMPLES = 100  # of the class
MIN_PATH_SAMPLES = 3
NUM_PATH_STATES = 6  # of the chain


def write_class_path(
    home: Path, dataset: str, runs: Mapping[str, RunFolder], folder: Path, split: Split = "test"
) -> list[Path]:
    """Write SeDA's Figure 4, the way of one class from image to text.

    The texts of these samples are read for the picture alone: no prediction sees them.
    """
    manifest, heads = read_manifest(home, dataset), {method: TrainedHead.of(runs[method]) for method in ("l2", "seda")}
    number, tables = _most_frequent_class(manifest, split), {}
    for method, head in heads.items():
        tables[method] = _read_class(home, manifest, head, split, number)
    chain = trace_chain(heads["seda"], tables["seda"], NUM_PATH_STATES)
    one_step = heads["l2"].feature(tables["l2"]).unsqueeze(0)
    paths = [
        _project("(a) L2, one step", heads["l2"], tables["l2"], one_step, ("aligned",), ("",)),
        _project("(b) SeDA, steps of the sampling", heads["seda"], tables["seda"], chain.states, *_name_states(chain)),
    ]
    subject = (
        f"{dataset}, {split} split: {len(tables['seda'])} samples of {manifest.class_names[number]}, the most frequent class"
    )
    num_points = [len(path.text) * (len(path.states) + (2 if path.image is not None else 1)) for path in paths]
    no_image = "" if paths[0].image is not None else "; its image features have another width than its text features"
    caption = (
        f"{subject}, between image features x_v and text features x_s. Left: aligned by L2 in one step (t-SNE of "
        f"{num_points[0]} points{no_image}). Right: {len(chain.kept)} of the {len(chain.steps) + 1} states of SeDA's sampling "
        f"({num_points[1]} points); squares are states at steps of the learner (DSL), diamonds of the translator (DST); a "
        "line joins those of a sample. Each t-SNE is initialised by PCA, with a fixed seed. Seeds of the heads: "
        f"{heads['l2'].run.seed} and {heads['seda'].run.seed}. No prediction reads these texts."
    )
    files = write_printed(folder, "seda-fig4", partial(plot_paths, paths), _path_frame(paths, list(tables.values())), caption)
    return [*files, *_write_cosines(chain, subject, folder)]


@torch.no_grad()
def ends_of_path(head: TrainedHead, table: FeatureTable) -> tuple[Tensor | None, Tensor]:
    """Return x_v and x_s of samples with their texts, [n,D] each, on the CPU; x_v is None where its width is another."""
    image, method = table.columns["image"], head.method
    assert isinstance(method, SeDA | L2), head.config.method
    with reproducible(image.device):
        x_s = method.text_target(table.columns["text"])
        x_v = method.space.image(image) if isinstance(method, SeDA) else method.image_scale(image)
    return (x_v.float().cpu() if x_v.shape == x_s.shape else None), x_s.float().cpu()


@dataclass(frozen=True, slots=True)
class Chain:
    """The sampling of n samples in S steps, from noise to the aligned feature."""

    steps: tuple[int, ...]  # [S], in descending order, counted from 0
    is_dsl: tuple[bool, ...]  # [S]: whether the learner trains the step, else the translator does
    state_cosines: Tensor  # [S+1,2]: mean cosine of the states to x_v and x_s; the last state is the aligned feature
    prediction_cosines: Tensor  # [S,2]: the same of what the network predicts from each state
    kept: tuple[int, ...]  # the numbers 0..S of the K states that are kept
    states: Tensor  # [K,n,D]


def trace_chain(head: TrainedHead, table: FeatureTable, num_states: int) -> Chain:
    """Sample as prediction does, and watch the states of the (first) chain.

    Args:
        head: A head of `seda`.
        table: The n samples, with their texts.
        num_states: How many states are kept at most: the first, the last, and of those between the ones whose signal
            sqrt(abar_n) comes nearest to equal distances.

    Raises:
        UserError: image and text features have two widths.
    """
    method, (x_v, x_s) = head.method, ends_of_path(head, table)
    assert isinstance(method, SeDA)
    if x_v is None:
        raise UserError(
            f"{head.run.path} keeps image and text features of two widths, so that no path leads from one to the other: train "
            "one with --set adapter=classifier, which maps both to one width"
        )
    targets, steps, denoiser = (x_v, x_s), method.sampler.steps.tolist(), method.denoiser
    assert isinstance(denoiser, nn.Module)
    signal = torch.cat([torch.index_select(method.abar.values, 0, method.sampler.steps).sqrt().cpu(), torch.ones(1)])
    wanted = torch.linspace(float(signal[0]), 1.0, num_states)
    kept = (signal - wanted[:, None]).abs().argmin(dim=1).unique().tolist()
    state_cosines, prediction_cosines, states = [], [], []

    def cosines(x: Tensor) -> Tensor:
        return torch.stack([F.cosine_similarity(x, target).mean() for target in targets])

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], prediction: Tensor) -> None:
        state = inputs[0].float().cpu()
        if len(state_cosines) in kept:
            states.append(state)
        state_cosines.append(cosines(state))
        prediction_cosines.append(cosines(prediction.float().cpu()))

    handle = denoiser.register_forward_hook(watch)
    try:
        aligned = head.feature(table)
    finally:
        handle.remove()
    dsl, _ = head.settings.trained_steps()
    return Chain(
        tuple(steps),
        tuple(step in dsl for step in steps),
        torch.stack([*state_cosines, cosines(aligned)]),
        torch.stack(prediction_cosines),
        tuple(kept),
        torch.stack([*states, aligned]),
    )


def _most_frequent_class(manifest: Manifest, split: Split) -> int:
    counts = np.bincount([label for sample in split_samples(manifest, split) for label in sample.labels])
    return int(counts.argmax())


def _read_class(home: Path, manifest: Manifest, head: TrainedHead, split: Split, number: int) -> FeatureTable:
    """Return the first samples of a class that have an image and a text."""
    samples = [sample for sample in split_samples(manifest, split) if number in sample.labels][:MAX_PATH_SAMPLES]
    table = head.read(home, manifest, samples, ("image", "text"), "seda-fig4")
    rows = torch.nonzero(table.columns["paired"] > 0).flatten()
    if len(rows) < MIN_PATH_SAMPLES:
        raise UserError(
            f"{len(rows)} samples of {manifest.class_names[number]!r}, the most frequent class of the {split} split of "
            f"{manifest.dataset}, have a text, and a path is drawn of {MIN_PATH_SAMPLES} or more"
        )
    columns = {key: column[rows] for key, column in table.columns.items()}
    return FeatureTable(tuple(table.ids[row] for row in rows.tolist()), columns, table.excluded)


def _name_states(chain: Chain) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names and the stages of the kept states; steps are counted from 1, as in the papers."""
    stages = [*("DSL" if is_dsl else "DST" for is_dsl in chain.is_dsl), ""]
    names = [*(f"n = {step + 1} ({stage})" for step, stage in zip(chain.steps, stages[:-1], strict=True)), "aligned"]
    return tuple(names[number] for number in chain.kept), tuple(stages[number] for number in chain.kept)


def _project(
    title: str, head: TrainedHead, table: FeatureTable, states: Tensor, names: tuple[str, ...], stages: tuple[str, ...]
) -> AlignmentPath:
    """Project images, texts and states [K,n,D] to one plane."""
    x_v, x_s = ends_of_path(head, table)
    parts = [*([] if x_v is None else [x_v]), x_s, *states]
    positions = tsne_positions(torch.cat(parts).numpy()).reshape(len(parts), len(x_s), 2)
    image = None if x_v is None else positions[0]
    return AlignmentPath(title, image, positions[-len(states) - 1], positions[-len(states) :], names, stages)


def _path_frame(paths: Sequence[AlignmentPath], tables: Sequence[FeatureTable]) -> pd.DataFrame:
    parts = []
    for path, table in zip(paths, tables, strict=True):
        own = {} if path.image is None else {"image": path.image}
        for state, positions in {**own, "text": path.text, **dict(zip(path.state_names, path.states, strict=True))}.items():
            parts.append(
                pd.DataFrame({"panel": path.title, "state": state, "id": table.ids, "x": positions[:, 0], "y": positions[:, 1]})
            )
    return pd.concat(parts)


def _write_cosines(chain: Chain, subject: str, folder: Path) -> list[Path]:
    """Write how near the states of the chain are to images and texts, in the full space."""
    state, prediction = chain.state_cosines.numpy(), chain.prediction_cosines.numpy()
    step, is_dsl = np.array([*chain.steps, -1]) + 1, np.array(chain.is_dsl)
    numbers = pd.DataFrame({"step": step, "stage": [*np.where(is_dsl, "DSL", "DST"), "aligned"]})
    numbers[["state_to_image", "state_to_text"]] = state
    numbers[["prediction_to_image", "prediction_to_text"]] = np.vstack([prediction, [np.nan, np.nan]])
    to_image, to_text = chain.state_cosines[-1].tolist()
    caption = (
        f"{subject}: mean cosine similarity, in the full space, of the states of SeDA's sampling to the image features x_v and "
        "the text features x_s of their samples, and that of what the network predicts from each state. The aligned feature, "
        f"which is the last prediction, has {to_image:.2f} and {to_text:.2f}."
    )
    plot = partial(plot_cosines, ChainCosines(step, state, prediction, is_dsl))
    return write_printed(folder, "seda-fig4-cosines", plot, numbers, caption)
