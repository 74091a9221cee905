"""Train a joint run: batches with prepared items, validation on features of the trained encoders, in the loop of stage 2."""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from pipeline.cache.table import FeatureTable, ordered_batches, shuffled_batches
from pipeline.evaluation.evaluate import predict
from pipeline.runtime.device import default_device, use_precision
from pipeline.runtime.environment import set_environment
from pipeline.runtime.errors import UserError, is_out_of_memory
from pipeline.runtime.files import label_os_errors, lock
from pipeline.runtime.logs import ProgressBar
from pipeline.runtime.rng import KeyedRNG
from pipeline.training.heads import score_logits
from pipeline.training.joint.ddp import DistributedContext
from pipeline.training.joint.inputs import augment_images, prefetch_items, select_items, to_device
from pipeline.training.joint.model import EncodeFn, JointMethod
from pipeline.training.joint.plan import JointOptions, JointPlan
from pipeline.training.joint.trainable_encoder import TrainableEncoder, build_joint_method, open_trainable_encoder
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, TrainState
from pipeline.training.tracking import RunTrackers
from pipeline.training.train import train
from pipeline.types import Batch, Predictor, Source

MAX_LISTED_SAMPLES = 64  # samples that an error message names


def train_joint(plan: JointPlan, options: JointOptions, context: DistributedContext) -> None:
    """Train a joint run with all processes, starting from its saved state; only the first process writes to its folder.

    Raises:
        UserError: an encoder cannot be tuned, a loss or gradient is not finite, or there is too little memory.
    """
    with ExitStack() as resources:
        run = plan.run
        if context.rank:
            run = replace(run, path=Path(resources.enter_context(tempfile.TemporaryDirectory())))
        else:
            resources.enter_context(lock(run.path, wait=True))
            run.create(plan.config)
        context.barrier()
        if plan.run.is_done:  # another program has finished the run while this one waited for the lock
            return
        resources.enter_context(_explain_out_of_memory())
        resources.enter_context(label_os_errors(run.path))
        if context.rank and (plan.run.path / "state.pt").is_file():
            shutil.copy(plan.run.path / "state.pt", run.path)
        context.barrier()
        encoders = {key: open_trainable_encoder(plan, key, options, context) for key in plan.joint.trained_keys}
        model = build_joint_method(plan, encoders, context)
        progress = options.progress and not context.rank
        trackers = RunTrackers(() if context.rank else options.trackers)
        state = TrainState(method=model, run=run, config=plan.training, trackers=trackers, kernels=options.kernels)

        def validate(predictor: Predictor, seeds: Sequence[int]) -> list[Score]:
            return validate_joint(plan, encoders, context, predictor)

        device = default_device()
        source = joint_source(plan, model, encoders, context, progress, options.fast and device.type == "cuda")
        resources.enter_context((fast_algorithms if options.fast else deterministic_algorithms)(device))
        # The head brings its statistics, so it needs no pass over the training split.
        for error in train([state], {run.seed: Feed(source, lambda: iter(()))}, validate, progress).values():
            raise error


def _with_row_numbers(table: FeatureTable) -> FeatureTable:
    """Return the table with a column "row" that numbers its rows."""
    rows = torch.arange(len(table), device=table.columns["key"].device)
    return replace(table, columns={**table.columns, "row": rows})


def _item_fetcher(
    plan: JointPlan, encoders: Mapping[str, TrainableEncoder], context: DistributedContext, channels_last: bool = False
) -> Callable[[Batch, int], Batch]:
    """Return a function that gets the prepared items for a batch of an epoch; those of epoch -1 are not augmented.

    With `channels_last`, images are in that memory format, which convolutions then keep: of tensor cores, it asks the most.
    """
    seed, device = plan.run.seed, plan.features.train.columns["key"].device

    def fetch(batch: Batch, epoch: int) -> Batch:
        cpu_batch = {key: batch[key].cpu() for key in ("row", "key")}
        local = context.local_positions(len(cpu_batch["row"]))
        fetched: Batch = {}
        for key, opened in encoders.items():
            if opened.text_index:
                numbers, owner = opened.text_index.texts_of_batch(cpu_batch, epoch, seed)
                items = select_items(opened.items["train"], numbers[context.local_positions(len(numbers))])
                fetched["text_owner"] = owner.to(device)
            else:
                items = select_items(opened.items["train"], cpu_batch["row"][local])
                if plan.joint.augment and epoch >= 0:
                    items = augment_images(items, KeyedRNG.seeded(seed, cpu_batch["key"][local]).at("augment", epoch))
            fetched[f"{key}_items"] = to_device(items, device, channels_last)
        return fetched

    return fetch


def joint_source(
    plan: JointPlan,
    model: JointMethod,
    encoders: Mapping[str, TrainableEncoder],
    context: DistributedContext,
    progress: bool,
    channels_last: bool = False,
) -> Source:
    """Return the training batches of stage 2, with prepared items; `channels_last`: the memory format of images.

    After each step, the source checks that the loss and the gradients are finite, and raises `UserError` if they are not.
    """
    table, batch_size = _with_row_numbers(plan.features.train), plan.training.batch_size
    device = table.columns["key"].device
    fetch = _item_fetcher(plan, encoders, context, channels_last)
    batches = prefetch_items(shuffled_batches(table, batch_size, plan.run.seed), fetch)

    def checked_batches(epoch: int) -> Iterator[Batch]:
        num_batches = len(table) // min(batch_size, len(table))
        with ProgressBar(total=num_batches, label=f"epoch {epoch}", unit="batch", show=progress, leave=False) as bar:
            for step, batch in enumerate(batches(epoch)):
                yield batch
                for name in _non_finite_values(model):
                    raise UserError(_failure_message(plan, batch, f"{name} is not finite in step {step} of epoch {epoch}"))
                bar.set_postfix(memory=f"{_peak_memory(device) / 2**30:.1f}GiB", refresh=False)
                bar.update()

    return checked_batches


@torch.no_grad()
def _non_finite_values(model: JointMethod) -> list[str]:
    """Return which of the loss and the gradients of the last step are not finite."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = torch.stack([model.last_loss.float(), get_total_norm(grads, torch.inf)]).isfinite().tolist()
    return [name for name, is_finite in zip(("the loss", "a gradient"), finite, strict=True) if not is_finite]


def _failure_message(plan: JointPlan, batch: Batch, reason: str) -> str:
    """Return an error message that names the samples of the batch and the checkpoint to resume from."""
    ids = [plan.features.train.ids[row] for row in batch["row"].tolist()]
    num_hidden = len(ids) - MAX_LISTED_SAMPLES
    listed = ", ".join(ids[:MAX_LISTED_SAMPLES]) + (f" and {num_hidden} more" if num_hidden > 0 else "")
    saved = plan.run.path / "state.pt"
    good = saved if saved.is_file() else plan.init.path / "checkpoint.safetensors"
    return f"{reason} (samples {listed}); the last good checkpoint is {good}; lower --encoder-lr or --train lr"


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far, of the GPU or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def validate_joint(
    plan: JointPlan, encoders: Mapping[str, TrainableEncoder], context: DistributedContext, model: Predictor
) -> list[Score]:
    """Return the metric and the loss of the head on the validation split, with features of the trained encoders.

    Before, the statistics of the head are updated from the training split. No text of the validation split is read.
    """
    assert isinstance(model, JointMethod)
    train_pass = ordered_batches(_with_row_numbers(plan.features.train), plan.run.seed, plan.training.batch_size)
    facts = model.update_statistics(prefetch_items(lambda _: train_pass(), _item_fetcher(plan, encoders, context))(-1))
    table = plan.features.val
    if "image" in encoders:
        column, image = table.columns["image"], encoders["image"]
        features = compute_features(image.encode, image.items["val"], plan.training.batch_size, context)
        table = replace(table, columns={**table.columns, "image": features.to(column.device, column.dtype)})
    logits = predict(model.head, table, plan.run.seed, precision=plan.training.precision)
    return [score_logits(logits, table.label, plan.config.label_loss)._replace(facts=facts)]


@torch.no_grad()
def compute_features(encode: EncodeFn, items: Tensor, batch_size: int, context: DistributedContext) -> Tensor:
    """Return the features [N, *shape] of items [N, ...]; each process encodes its share."""
    local = items[context.local_positions(len(items))] if context.world_size > 1 else items
    return context.gather(torch.cat([encode(part) for part in local.split(batch_size)]), len(items))


@contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Compute the same bits in every run, also in the backward pass.

    A GPU needs a special mode for this, and some of its kernels have no deterministic version. The gradients of its fused
    attention are not the same in every run, so that attention is computed step by step.
    """
    set_environment()
    before, on_gpu = torch.are_deterministic_algorithms_enabled(), device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu, warn_only=True)
    try:
        with use_precision("float32", device), sdpa_kernel(SDPBackend.MATH) if on_gpu else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def fast_algorithms(device: torch.device) -> Iterator[None]:
    """Compute in the same format with the fastest kernels of a GPU: the last bits may differ from run to run."""
    kernels = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)
    with use_precision("float32", device), kernels:
        yield


@contextmanager
def _explain_out_of_memory() -> Iterator[None]:
    """Turn an out-of-memory error into a `UserError` that names the options that help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "too little memory for this batch: take --checkpointing, --accumulate 4, or a smaller --train batch_size"
        ) from error
