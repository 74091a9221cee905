"""Open an encoder for joint training: its prepared items, its trained parameters and their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from torch import Tensor, nn

from pipeline.cache.table import Captions, FeatureTable
from pipeline.extraction.inputs import EncoderInputs, texts_to_encode
from pipeline.runtime.logs import ProgressBar
from pipeline.training.compiled import compile_encoder
from pipeline.training.features import FeatureSet
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.encoder_blocks import (
    avoid_strided_convolutions,
    enable_checkpointing,
    find_blocks,
    modules_in_execution_order,
    parameter_depths,
)
from pipeline.training.joint.export import rebuild_encoder
from pipeline.training.joint.inputs import CHUNK_ITEMS, TensorChunks, TextIndex, open_mapped, open_prepared_items
from pipeline.training.joint.model import EncodeFn, JointMethod, MicroBatchEncoder
from pipeline.training.joint.partial_encoder import PartialEncoder
from pipeline.training.joint.plan import JointOptions, JointPlan
from pipeline.types import Sample, Split

InputRow = tuple[Sample, str]  # a sample and one of its texts; the text is "" for the media of the sample


@dataclass(frozen=True)
class TrainableEncoder:
    """An encoder that is trained, the functions that run it, and its prepared items."""

    encoder: nn.Module
    encode: EncodeFn  # for validation: without gradients
    encode_in_training: EncodeFn  # in parts, with the gradients of all processes
    trains: tuple[str, ...]  # prefixes of the names of its trained parameters
    rates: tuple[tuple[str, float], ...]  # prefixes of parameter names, with factors of the learning rate
    items: Mapping[str, Tensor]  # prepared items [N, ...] by split
    text_index: TextIndex | None  # which items belong to which sample; None: each sample has one item


def open_trainable_encoder(plan: JointPlan, key: str, options: JointOptions, context: DistributedContext) -> TrainableEncoder:
    """Open the encoder of a batch key for training.

    Raises:
        UserError: the encoder cannot be tuned, or an item cannot be prepared any more.
    """
    joint, encoder = plan.joint, rebuild_encoder(plan.features.caches[key]).encoder
    avoid_strided_convolutions(encoder)
    rows, text_index = _text_rows(plan.features) if key == "text" else (_media_rows(plan.features), None)
    (sample, text) = rows["train"][0]
    first_item = encoder.prepare(text if key == "text" else plan.features.manifest.media_path(sample))[None]
    executed = modules_in_execution_order(encoder, first_item)
    needs_blocks = joint.num_blocks or joint.layer_decay < 1 or options.checkpointing
    blocks = find_blocks(executed) if needs_blocks else []
    encode: EncodeFn = encoder
    trains: tuple[str, ...] = (f"{key}.",)
    if joint.num_blocks:
        encode = partial_encoder = PartialEncoder(encoder, blocks, joint.num_blocks, first_item)
        names = {module: name for name, module in encoder.named_modules()}
        trains = tuple(f"{key}.{names[block]}." for block in partial_encoder.trained_blocks)
    items = {split: _open_items(plan, key, split, rows[split], encoder, encode, options, context) for split in rows}
    if options.checkpointing:
        enable_checkpointing(blocks[-joint.num_blocks :])  # with num_blocks = 0: all blocks
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(f"{key}.{name}".startswith(trains))
    encode_in_training = context.wrap(
        MicroBatchEncoder(encoder, compile_encoder(encode) if options.compile_encoders else encode, options.accumulate)
    )
    rates = _learning_rate_factors(plan, key, encoder, executed, blocks)
    return TrainableEncoder(encoder, encode, encode_in_training, trains, rates, items, text_index)


def build_joint_method(plan: JointPlan, encoders: Mapping[str, TrainableEncoder], context: DistributedContext) -> JointMethod:
    """Return the method that is trained: the head of the plan and its encoders by batch key."""
    return JointMethod(
        plan.head,
        {key: opened.encoder for key, opened in encoders.items()},
        {key: opened.encode_in_training for key, opened in encoders.items()},
        tuple(prefix for opened in encoders.values() for prefix in opened.trains),
        tuple(rate for opened in encoders.values() for rate in opened.rates),
        context,
    )


def _media_rows(features: FeatureSet) -> dict[Split, list[InputRow]]:
    """Return what an image or video encoder reads: all usable samples of the training and validation split, in order."""
    samples = {sample.id: sample for sample in features.manifest.samples}
    tables: dict[Split, FeatureTable] = {"train": features.train, "val": features.val}
    return {split: [(samples[sample_id], "") for sample_id in table.ids] for split, table in tables.items()}


def _text_rows(features: FeatureSet) -> tuple[dict[Split, list[InputRow]], TextIndex]:
    """Return what a text encoder reads: the texts of training samples that stage 2 used, and no others."""
    ids = list(features.train.ids)
    samples = {sample.id: sample for sample in features.manifest.split("train")}
    texts_by_sample = [texts_to_encode(samples[sample_id], features.manifest.meta["text"]) for sample_id in ids]
    encoded, counts = features.caches["text"].read_rows(ids)
    owner, offsets = np.repeat(np.arange(len(ids)), counts), np.concatenate([[0], np.cumsum(counts)])
    usable = np.isfinite(encoded).reshape(len(encoded), -1).all(axis=1)
    if features.aggregate == "first":
        usable &= np.arange(len(owner)) == offsets[owner]
    elif features.aggregate != "random":
        # Stage 2 takes the mean of all texts of a sample, and no mean if one of them is unusable.
        usable &= ~np.isin(owner, owner[~usable])
    rows = [
        (samples[ids[sample]], texts_by_sample[sample][text - offsets[sample]])
        for text, sample in zip(np.flatnonzero(usable), owner[usable], strict=True)
    ]
    numbers = torch.from_numpy(np.where(usable, np.cumsum(usable) - 1.0, math.nan))
    captions = Captions(numbers[:, None], torch.from_numpy(offsets)) if features.aggregate == "random" else None
    usable_offsets = np.concatenate([[0], np.cumsum(np.bincount(owner[usable], minlength=len(ids)))])
    return {"train": rows}, TextIndex(torch.from_numpy(usable_offsets), captions)


def _open_items(
    plan: JointPlan,
    key: str,
    split: Split,
    rows: Sequence[InputRow],
    encoder: Any,
    encode: EncodeFn,
    options: JointOptions,
    context: DistributedContext,
) -> Tensor:
    """Return what the trained part of an encoder reads of each row: prepared items, or captured states of the last blocks."""
    path = plan.run.path / "items" / f"{key}-{split}.npy"
    inputs = EncoderInputs(plan.features.manifest, encoder, tuple(rows), "float32")
    workers = CPU_COUNT if options.workers < 0 else options.workers
    open_items = partial(open_prepared_items, inputs, path, workers, options.progress)
    if isinstance(encode, PartialEncoder):
        open_items = partial(_open_captured_states, encode, open_items, path, len(rows), options)
    if context.rank == 0:
        open_items()  # writes the files, which the other processes then only open
    context.barrier()
    return open_items()


def _open_captured_states(
    partial_encoder: PartialEncoder, open_items: Callable[[], Tensor], items_path: Path, length: int, options: JointOptions
) -> Tensor:
    """Return the inputs of the first trained block for all rows, and delete the file of the prepared items."""
    path = items_path.with_name(f"blocks-{items_path.name}")

    def chunks() -> TensorChunks:
        for chunk in ProgressBar(
            open_items().split(CHUNK_ITEMS), label=f"computing {path.stem}", show=options.progress, leave=False
        ):
            yield partial_encoder.capture(chunk)

    states = open_mapped(path, chunks, length)
    items_path.unlink(missing_ok=True)
    return states


def _learning_rate_factors(
    plan: JointPlan, key: str, encoder: nn.Module, executed: Sequence[nn.Module], blocks: Sequence[nn.Module]
) -> tuple[tuple[str, float], ...]:
    """Return factors of the head's learning rate by parameter name; each block towards the input multiplies by the decay."""
    encoder_factor, decay = plan.joint.encoder_lr / plan.training.lr, plan.joint.layer_decay
    if decay == 1:
        return ((f"{key}.", encoder_factor),)
    depths = parameter_depths(encoder, executed, blocks)
    return tuple((f"{key}.{name}", encoder_factor * decay ** (len(blocks) - depth)) for name, depth in depths.items())
