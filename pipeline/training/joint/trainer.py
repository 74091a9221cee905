"""The training of stage 3: live batches, validation on live features, and the loop of stage 2 between them."""

from __future__ import annotations

import math
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dask.system import CPU_COUNT
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from pipeline.cache.table import Captions, FeatureTable, ordered, shuffled
from pipeline.evaluation.evaluate import predict
from pipeline.extraction.inputs import Items, texts_of
from pipeline.runtime.device import computing, default_device
from pipeline.runtime.files import label_os_errors, lock
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.runs import RunConfig, RunFolder
from pipeline.training.config import TrainConfig
from pipeline.training.features import FeatureSet
from pipeline.training.heads import score
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.encoder_blocks import blocks, depths, executed, recomputed
from pipeline.training.joint.export import rebuild
from pipeline.training.joint.inputs import READ, Chunks, Texts, augmented, mapped, picked, prepared_items, to_device, with_items
from pipeline.training.joint.model import Encode, Joint, Parts
from pipeline.training.joint.partial_encoder import PartialEncoder
from pipeline.training.loop import train
from pipeline.training.state import Score, TrainState
from pipeline.types import Batch, Method, Predictor, Sample, Source, Split

Row = tuple[Sample, str]  # a sample and one of its texts, or "" for its media
NAMED = 64  # samples that a message lists

LIVE: Mapping[str, tuple[str, ...]] = {"image": ("image",), "text": ("text",), "both": ("image", "text")}


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """What is trained together with the head, and how."""

    train: str = "image"  # image, text, both, or last:K, the last K blocks of the image encoder
    encoder_lr: float = 5e-5  # learning rate of the encoders; the papers' band is 5e-5..1e-4
    layer_decay: float = 1.0  # factor of the learning rate per block towards the input, 0..1
    augment: bool = False  # random crops and mirrored images in training

    def __post_init__(self) -> None:
        if self.train not in LIVE and not re.fullmatch(r"last:[1-9][0-9]*", self.train):
            raise ValueError(f"--train takes image, text, both or last:K, not {self.train!r}")
        if not self.encoder_lr > 0 or not 0 < self.layer_decay <= 1:
            raise ValueError("--encoder-lr must be positive, and --layer-decay above 0 and at most 1")
        if self.augment and self.num_blocks:
            raise ValueError("last:K stores what reaches the last blocks of each image once; --augment needs --train image")

    @property
    def live(self) -> tuple[str, ...]:
        """Batch keys of the encoders that run in training."""
        return LIVE.get(self.train, ("image",))

    @property
    def num_blocks(self) -> int:
        """K of last:K, 0 for whole encoders."""
        return int(self.train.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True)
class JointOptions:
    """How the training is carried out; no field changes a number beyond the rounding of its last bits."""

    accumulate: int = 1  # parts in which a batch goes through the encoders, one in memory at a time
    checkpointing: bool = False  # keep only the inputs of blocks, and run them again backwards
    workers: int = -1  # processes that decode; -1: one per core
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Together:
    """A joint run: the head it starts from, the features that head was trained on, and what else is trained."""

    config: RunConfig
    joint: JointConfig
    training: TrainConfig
    head: Method
    init: RunFolder
    run: RunFolder
    features: FeatureSet


def train_together(plan: Together, work: JointOptions, ranks: DistributedContext) -> None:
    """Train a joint run from where it stands, with all processes of it; only the first one writes to its folder.

    `ValueError` for encoders that cannot be tuned, a loss that is not finite, and too little memory.
    """
    with ExitStack() as held:
        run = plan.run
        if ranks.rank:
            run = replace(run, path=Path(held.enter_context(tempfile.TemporaryDirectory())))
        else:
            held.enter_context(lock(run.path, wait=True))
            run.create(plan.config)
        ranks.wait()
        if plan.run.is_done:  # another process has finished it while we waited
            return
        held.enter_context(_within_memory())
        held.enter_context(label_os_errors(run.path))
        if ranks.rank and (plan.run.path / "state.pt").is_file():
            shutil.copy(plan.run.path / "state.pt", run.path)
        ranks.wait()
        live = {key: open_live(plan, key, work, ranks) for key in plan.joint.live}
        model = assemble(plan, live, ranks)
        progress = work.progress and not ranks.rank
        lane = TrainState(method=model, run=run, config=plan.training)
        judge = partial(validate, plan, live, ranks)
        source = source_of(plan, model, live, ranks, progress)
        held.enter_context(repeatable(default_device()))
        for error in train([lane], source, _nothing, judge, progress).values():
            raise error


@dataclass(frozen=True)
class TrainableEncoder:
    """An encoder that is trained, what runs it, and what it runs on."""

    encoder: nn.Module
    encode: Encode  # without gradients
    step: Encode  # in training: in parts, with the gradients of all processes
    trains: tuple[str, ...]  # beginnings of the names of its trained parameters
    rates: tuple[tuple[str, float], ...]
    items: Mapping[str, Tensor]  # by split
    texts: Texts | None  # whose the items are; None: there is one of each sample


def open_live(plan: Together, key: str, work: JointOptions, ranks: DistributedContext) -> TrainableEncoder:
    """The encoder of a batch key, ready to be trained."""
    joint, encoder = plan.joint, rebuild(plan.features.caches[key]).encoder
    rows, texts = _texts(plan.features) if key == "text" else (_media(plan.features), None)
    (sample, text) = rows["train"][0]
    first = encoder.prepare(text if key == "text" else plan.features.manifest.media_path(sample))[None]
    ran = executed(encoder, first)
    wanted = joint.num_blocks or joint.layer_decay < 1 or work.checkpointing
    parts = blocks(ran) if wanted else []
    encode: Encode = encoder
    trains: tuple[str, ...] = (f"{key}.",)
    if joint.num_blocks:
        encode = bridge = PartialEncoder(encoder, parts, joint.num_blocks, first)
        names = {module: name for name, module in encoder.named_modules()}
        trains = tuple(f"{key}.{names[block]}." for block in bridge.trained)
    items = {}
    for split, own in rows.items():
        path = plan.run.path / "items" / f"{key}-{split}.npy"
        make = partial(_prepared, plan, encoder, own, path, work)
        if isinstance(encode, PartialEncoder):
            make = partial(_captured, encode, make, path, len(own), work)
        items[split] = _shared(make, ranks)
    if work.checkpointing:
        recomputed(parts[-joint.num_blocks :])  # of 0 blocks: all of them
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(f"{key}.{name}".startswith(trains))
    step = ranks.wrap(Parts(encoder, encode, work.accumulate))
    return TrainableEncoder(encoder, encode, step, trains, _rates(plan, key, encoder, ran, parts), items, texts)


def _media(features: FeatureSet) -> dict[Split, list[Row]]:
    """What an image or video encoder reads: every usable sample of the training and the validation split, in order."""
    samples = {sample.id: sample for sample in features.manifest.samples}
    tables: dict[Split, FeatureTable] = {"train": features.train, "val": features.val}
    return {split: [(samples[sample_id], "") for sample_id in table.ids] for split, table in tables.items()}


def _texts(features: FeatureSet) -> tuple[dict[Split, list[Row]], Texts]:
    """What a text encoder reads: the texts of training samples that stage 2 used, and no others."""
    ids = list(features.train.ids)
    samples = {sample.id: sample for sample in features.manifest.split("train")}
    own = [texts_of(samples[sample_id], features.manifest.meta["text"]) for sample_id in ids]
    encoded, counts = features.caches["text"].read_each(ids)
    owner, offsets = np.repeat(np.arange(len(ids)), counts), np.concatenate([[0], np.cumsum(counts)])
    usable = np.isfinite(encoded).reshape(len(encoded), -1).all(axis=1)
    if features.aggregate == "first":
        usable &= np.arange(len(owner)) == offsets[owner]
    elif features.aggregate != "random":
        usable &= ~np.isin(owner, owner[~usable])  # a mean is that of all texts
    rows = [
        (samples[ids[sample]], own[sample][text - offsets[sample]])
        for text, sample in zip(np.flatnonzero(usable), owner[usable], strict=True)
    ]
    numbers = torch.from_numpy(np.where(usable, np.cumsum(usable) - 1.0, math.nan))
    drawn = Captions(numbers[:, None], torch.from_numpy(offsets)) if features.aggregate == "random" else None
    kept = np.concatenate([[0], np.cumsum(np.bincount(owner[usable], minlength=len(ids)))])
    return {"train": rows}, Texts(torch.from_numpy(kept), drawn)


def _prepared(plan: Together, encoder: Any, rows: Sequence[Row], path: Path, work: JointOptions) -> Tensor:
    """The prepared items of rows."""
    items = Items(plan.features.manifest, encoder, tuple(rows), "float32")
    return prepared_items(items, path, CPU_COUNT if work.workers < 0 else work.workers, work.progress)


def _captured(bridge: PartialEncoder, prepare: Callable[[], Tensor], pixels: Path, length: int, work: JointOptions) -> Tensor:
    """What reaches the trained blocks, of every row, after which the file of `pixels` is not needed any more."""
    path = pixels.with_name(f"blocks-{pixels.name}")

    def chunks() -> Chunks:
        for chunk in ProgressBar(prepare().split(READ), label=path.stem, show=work.progress, leave=False):
            yield bridge.capture(chunk)

    states = mapped(path, chunks, length)
    pixels.unlink(missing_ok=True)
    return states


def _shared(make: Callable[[], Tensor], ranks: DistributedContext) -> Tensor:
    """What the first process makes; the others open it when it is there."""
    if ranks.rank == 0:
        make()
    ranks.wait()
    return make()


def _rates(
    plan: Together, key: str, encoder: nn.Module, ran: Sequence[nn.Module], parts: Sequence[nn.Module]
) -> tuple[tuple[str, float], ...]:
    """Factors of the encoder's learning rates: smaller by the decay for each block further from the features."""
    whole, decay = plan.joint.encoder_lr / plan.training.lr, plan.joint.layer_decay
    if decay == 1:
        return ((f"{key}.", whole),)
    depth = depths(encoder, ran, parts)
    return tuple((f"{key}.{name}", whole * decay ** (len(parts) - own)) for name, own in depth.items())


def assemble(plan: Together, live: Mapping[str, TrainableEncoder], ranks: DistributedContext) -> Joint:
    """The method that is trained."""
    return Joint(
        plan.head,
        {key: each.encoder for key, each in live.items()},
        {key: each.step for key, each in live.items()},
        tuple(name for each in live.values() for name in each.trains),
        tuple(rate for each in live.values() for rate in each.rates),
        ranks,
    )


def _numbered(table: FeatureTable) -> FeatureTable:
    """The table with the numbers of its rows."""
    rows = torch.arange(len(table), device=table.columns["key"].device)
    return replace(table, columns={**table.columns, "row": rows})


def _fetch(plan: Together, live: Mapping[str, TrainableEncoder], ranks: DistributedContext) -> Callable[[Batch, int], Batch]:
    """What gets the prepared items of a batch in an epoch; those of epoch -1 are not augmented."""
    seed, device = plan.run.seed, plan.features.train.columns["key"].device

    def fetch(batch: Batch, epoch: int) -> Batch:
        here = {key: batch[key].cpu() for key in ("row", "key")}
        own = ranks.share(len(here["row"]))
        fetched: Batch = {}
        for key, each in live.items():
            if each.texts:
                numbers, owner = each.texts.of(here, epoch, seed)
                items = picked(each.items["train"], numbers[ranks.share(len(numbers))])
                fetched["text_owner"] = owner.to(device)
            else:
                items = picked(each.items["train"], here["row"][own])
                if plan.joint.augment and epoch >= 0:
                    items = augmented(items, KeyedRNG.seeded(seed, here["key"][own]).at("augment", epoch))
            fetched[f"{key}_items"] = to_device(items, device)
        return fetched

    return fetch


def source_of(
    plan: Together, model: Joint, live: Mapping[str, TrainableEncoder], ranks: DistributedContext, progress: bool
) -> Source:
    """The batches of stage 2 with prepared items; `ValueError` when a step was not finite."""
    table, size = _numbered(plan.features.train), plan.training.batch_size
    device, batches = table.columns["key"].device, with_items(shuffled(table, size, plan.run.seed), _fetch(plan, live, ranks))

    def steps(epoch: int) -> Iterator[Batch]:
        num_batches = len(table) // min(size, len(table))
        with ProgressBar(total=num_batches, label=f"epoch {epoch}", unit="batch", show=progress, leave=False) as bar:
            for step, batch in enumerate(batches(epoch)):
                yield batch
                for what in _not_finite(model):
                    raise ValueError(_stopped(plan, batch, f"{what} is not finite in step {step} of epoch {epoch}"))
                bar.set_postfix(memory=f"{_memory(device) / 2**30:.1f}GiB", refresh=False)
                bar.update()

    return steps


@torch.no_grad()
def _not_finite(model: Joint) -> list[str]:
    """What is not finite after a step: its loss, its gradients."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = torch.stack([model.last_loss.float(), get_total_norm(grads, torch.inf)]).isfinite().tolist()
    return [name for name, is_finite in zip(("the loss", "a gradient"), finite, strict=True) if not is_finite]


def _stopped(plan: Together, batch: Batch, reason: str) -> str:
    """A reason to stop, with the samples of the batch and where to go on from."""
    ids = [plan.features.train.ids[row] for row in batch["row"].tolist()]
    listed = ", ".join(ids[:NAMED]) + (f" and {len(ids) - NAMED} more" if len(ids) > NAMED else "")
    saved = plan.run.path / "state.pt"
    good = saved if saved.is_file() else plan.init.path / "checkpoint.safetensors"
    return f"{reason} (samples {listed}); the last good checkpoint is {good}; lower --encoder-lr or --train lr"


def _memory(device: torch.device) -> int:
    """Most bytes in use so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def validate(plan: Together, live: Mapping[str, TrainableEncoder], ranks: DistributedContext, model: Predictor) -> list[Score]:
    """The metric and the loss of the head on live features of the validation split, after its statistics have followed.

    These are of the training split; no text of the validation split is read.
    """
    assert isinstance(model, Joint)
    source = ordered(_numbered(plan.features.train), plan.run.seed, plan.training.batch_size)
    facts = model.follow(with_items(lambda _: source(), _fetch(plan, live, ranks))(-1))
    table = plan.features.val
    if "image" in live:
        column = table.columns["image"]
        features = features_of(live["image"].encode, live["image"].items["val"], plan.training.batch_size, ranks)
        table = replace(table, columns={**table.columns, "image": features.to(column.device, column.dtype)})
    logits = predict(model.head, table, plan.run.seed, precision=plan.training.precision)
    return [score(logits, table.label)._replace(facts=facts)]


@torch.no_grad()
def features_of(encode: Encode, items: Tensor, batch_size: int, ranks: DistributedContext) -> Tensor:
    """Features [N, *shape] of items [N, ...], each process doing its share."""
    own = items[ranks.share(len(items))] if ranks.size > 1 else items
    return ranks.gather(torch.cat([encode(part) for part in own.split(batch_size)]), len(items))


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Compute the same bits again, backwards too; on a GPU that has to be asked for, and some of its kernels cannot."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(device.type == "cuda", warn_only=True)
    try:
        with computing("float32", device):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _within_memory() -> Iterator[None]:
    """Too little memory inside is a `ValueError` that names what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("allocate memory", "out of memory", "STATUS_ALLOC_FAILED")  # of the CPU, of CUDA, of cuBLAS and cuDNN
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not any(sign in str(error) for sign in signs):
            raise
        raise ValueError(
            "too little memory for this batch: take --checkpointing, --accumulate 4, or a smaller --train batch_size"
        ) from error


def _nothing() -> Iterator[Batch]:
    """The head comes with its statistics: no pass over the training split is needed."""
    return iter(())
