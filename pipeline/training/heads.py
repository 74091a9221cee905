"""Stage 2 as a command: from caches and the settings of a method to a finished run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.streaming import choose_window
from pipeline.cache.table import ordered_batches, shuffled_batches
from pipeline.evaluation import metrics
from pipeline.evaluation.alignment import measure_alignment
from pipeline.evaluation.evaluate import PREDICTION_BATCH_SIZE, predict
from pipeline.evaluation.inference_spec import InferenceSpec
from pipeline.nn import losses
from pipeline.nn.method import Method
from pipeline.runtime import plugins
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.device import default_device, free_bytes, reproducible
from pipeline.runtime.errors import UserError, describe_error, is_bug, is_out_of_memory
from pipeline.runtime.files import label_os_errors, lock
from pipeline.runtime.runs import REAL_TEXT, RECIPE, RunConfig, RunFolder, check_seed
from pipeline.runtime.settings import configure, flatten, name_settings, recorded_settings, spellings
from pipeline.training.capacity import bytes_kept, bytes_per_method
from pipeline.training.captured import is_captured
from pipeline.training.config import TRAINING_PRESETS, TrainConfig, paper_training
from pipeline.training.features import FeatureSet, open_features
from pipeline.training.seeds import Feed
from pipeline.training.state import Score, StopCheck, TrainState, delete_saved_state, never_stop
from pipeline.training.tracking import MakeTracker, RunTrackers, replay
from pipeline.training.train import train
from pipeline.training.tuned import read_tuned
from pipeline.types import Predictor

logger = logging.getLogger(__name__)

HEADS_MEMORY_SHARE = 0.8  # share of the free memory that heads trained together may use
STATE_COPIES = 5  # memory that a run needs on the CPU, in multiples of its weights: the best weights, and what is being saved


def resolve_head_settings(
    dataset: str,
    method: str,
    preset: str,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    home: Path | None = None,
) -> tuple[Any, TrainConfig]:
    """Return the config of the method and the training config.

    Given settings replace those of the preset, and these replace the defaults.

    Args:
        dataset: The dataset, for its tuned settings.
        method: The name of a method.
        preset: "head", the defaults; "paper", the learning rate of the papers and the method's `paper` and `paper_training`; or
            "tuned", settings that were chosen on validation, see `read_tuned`.
        settings: Given settings of the method, by name, alias or the papers' letter.
        training: Given settings of `TrainConfig`.
        home: Where the dataset is prepared: it may have tuned settings of its own, or another name for the dataset.

    Raises:
        UserError: there is no such preset or setting, or the dataset has no tuned settings for the method.
    """
    module = plugins.get("methods", method)
    chosen: Mapping[str, Any] = {}
    base: Mapping[str, Any] = TRAINING_PRESETS.get(preset, {})
    if preset == "tuned":
        chosen, base = read_tuned(dataset, method, home)
    elif preset == "paper":
        chosen, base = getattr(module, "paper", {}), paper_training(module)
    elif preset not in TRAINING_PRESETS:
        raise unknown_choice(preset, f"unknown preset {preset!r}", [*TRAINING_PRESETS, "tuned"])
    given = flatten(settings)  # by the words of the user, which messages repeat
    replaced = spellings(module.Config, given, module.symbols)
    kept = {name: value for name, value in name_settings(module.Config, chosen, module.symbols).items() if name not in replaced}
    config = configure(module.Config, kept | given, module.symbols)
    return config, configure(TrainConfig, {**base, **training})


@dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """Everything that is needed to train one head."""

    run: RunFolder
    config: RunConfig
    settings: Any  # the method's Config
    training: TrainConfig
    features: FeatureSet


def plan_head_on(features: FeatureSet, method: str, settings: Any, training: TrainConfig, seed: int) -> HeadPlan:
    """Plan the run of a head on opened features. Features that do not fit in memory are read in windows.

    Raises:
        UserError: the seed is no whole number in 0 .. 2^63 - 1.
    """
    seed = check_seed(seed)
    if not training.window:
        training = replace(training, window=choose_window(features.caches, features.aggregate, default_device()))
    config = RunConfig(
        dataset=features.manifest.dataset,
        method=method,
        settings=recorded_settings(settings),
        training=asdict(training),
        caches={key: cache.fingerprint for key, cache in features.caches.items()},
        shapes={key: list(shape) for key, shape in features.shapes.items()},
        text_aggregate=features.aggregate,
        manifest=features.manifest.fingerprint(),
        plugin_sha256=plugins.external_sha256("methods", method),
        recipe=RECIPE,
        text_control=features.text_control,
        train_fraction=features.fraction,
    )
    run = RunFolder.of(features.home, config, seed)
    return HeadPlan(run=run, config=config, settings=settings, training=training, features=features)


def plan_head(
    home: Path,
    dataset: str,
    method: str,
    settings: Any,
    training: TrainConfig,
    seed: int,
    encoders: Mapping[str, str],
    aggregate: str = "",
) -> HeadPlan:
    """Open the features of a head and plan its run; see `open_features`."""
    return plan_head_on(open_features(home, dataset, method, encoders, aggregate), method, settings, training, seed)


def train_head(
    head: HeadPlan, progress: bool, should_stop: StopCheck = never_stop, trackers: Sequence[MakeTracker] = ()
) -> RunFolder:
    """Train a head and return its run. A finished run is not repeated, and an interrupted one resumes.

    Args:
        head: The plan of the run.
        progress: Whether to show a progress bar.
        should_stop: Called after each validation; training stops early when it returns True.
        trackers: What is told the epochs of the run as they come; of a finished run, all at once.

    Raises:
        UserError: the run fails, for example because it diverges or because memory runs out.
        Exception: there is a bug; its traceback is in `error.txt` of the run until a later attempt ends without a bug.
    """
    try:
        failed = train_heads([head], progress, should_stop, trackers)
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(head.run, error) from error
        if is_bug(error):
            head.run.write_traceback(error)
        raise
    for error in failed.values():
        raise error
    return head.run


def out_of_memory_error(run: RunFolder, error: Exception) -> UserError:
    """Return the failure of a run for which memory ran out, as one line."""
    return UserError(f"{run.path}: memory ran out ({describe_error(error)}); take a smaller batch_size, or a window")


def train_heads(
    heads: Sequence[HeadPlan],
    progress: bool,
    should_stop: StopCheck = never_stop,
    trackers: Sequence[MakeTracker] = (),
) -> dict[RunFolder, UserError]:
    """Train heads on the same features as one model; see `train_head`.

    Args:
        heads: The plans of the runs, with equal `structure_key`s and equal `SHARED_SETTINGS`. They have one seed unless
            `can_stack_seeds` says otherwise.
        progress: Whether to show a progress bar.
        should_stop: Called for each run after each of its validations.
        trackers: See `train_head`.

    Returns:
        The runs that failed, and why. A failed run does not disturb the others. A bug is raised, and ends them all.
    """
    device, states = default_device(), []
    with label_os_errors(heads[0].run.path), reproducible(device), ExitStack() as all_locks:
        # All processes lock folders in the same order, so that no two of them wait for each other; plans with settings that
        # change nothing may have one folder.
        for _, head in sorted({head.run.path: head for head in heads}.items()):
            if head.run.is_done:
                logger.debug("%s is trained already", head.run.path)
                delete_saved_state(head.run)
                head.run.delete_traceback()
                replay(head.run, trackers)
                continue
            method = _build_method(head, device)
            folder_lock = all_locks.enter_context(ExitStack())
            folder_lock.enter_context(lock(head.run.path, wait=True))
            if head.run.is_done:  # another process has finished it while this one waited for the lock
                folder_lock.close()
                continue
            head.run.create(head.config)
            InferenceSpec.of(head.features.manifest, head.features.caches["image"]).write(head.run)
            states.append(
                TrainState(
                    method=method,
                    run=head.run,
                    config=head.training,
                    should_stop=should_stop,
                    trackers=RunTrackers(trackers),
                    folder_lock=folder_lock,
                )
            )
        failed = _train_states(heads[0], states, progress) if states else {}
        for state in states:
            state.run.delete_traceback()
    return failed


def _build_method(head: HeadPlan, device: torch.device) -> Method:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(head.run.seed)
        return plugins.get("methods", head.config.method)(head.settings, head.features.shapes).to(device)


def _train_states(head: HeadPlan, states: Sequence[TrainState], progress: bool) -> dict[RunFolder, UserError]:
    """Train runs with the features and the shared settings of `head`, which is one of them."""
    training, class_stream = head.training, states[0].method.class_stream
    _, val = head.features.splits(training.window, head.run.seed)
    label, device = val.label, default_device()

    def validate(model: Predictor, seeds: Sequence[int]) -> list[Score]:
        seed = torch.tensor(seeds, device=device) if len(set(seeds)) > 1 else seeds[0]
        logits = predict(model, val, seed, precision=training.precision)
        return [score_logits(each, label, head.config.label_loss) for each in logits.reshape(-1, *logits.shape[-2:])]

    if "text" in head.features.caches:
        pairs = head.features.validation_pairs
        for state in states:
            state.measure = partial(measure_alignment, pairs=pairs, seed=state.run.seed, precision=training.precision)
    feeds = {}
    for seed in {state.run.seed for state in states}:
        source, _ = head.features.splits(training.window, seed)
        batches = shuffled_batches(source, training.batch_size, seed, class_stream)
        feeds[seed] = Feed(batches, ordered_batches(source, seed))
    return train(states, feeds, validate, progress, is_captured(training))


def can_stack_seeds(head: HeadPlan) -> bool:
    """Return whether runs like this one, of several seeds, can be trained as one model.

    They cannot where a seed has training samples of its own in memory (text controls, windows), nor through torch.compile.
    """
    return head.features.text_control == REAL_TEXT and not (head.training.window or head.training.compiled)


def score_logits(logits: Tensor, label: Tensor, label_loss: str) -> Score:
    """Return the validation metric and the loss of logits [N,C].

    The metric is Acc-1 for single-label data and mAP for multi-label data. Both values are NaN when a logit is not finite,
    because such a result must not be ranked.
    """
    if not logits.isfinite().all():
        return Score(math.nan, math.nan)
    if label.ndim == 1:
        metric = float(metrics.per_example(logits, label, (1,))["acc1"].mean())
    else:
        metric = metrics.summary_metrics(logits, label, label_loss=label_loss)["map"]
    return Score(metric, float(losses.classification_loss(logits, label, "softmax_kl")))


def head_capacity(head: HeadPlan) -> int:
    """Return how many heads like this one fit in the free memory of the device and the machine together; at least 1."""
    device, training = default_device(), head.training
    size = training.batch_size
    train_source, _ = head.features.splits(training.window, head.run.seed)
    # a batch in training, its gradients, which are not larger than the tensors they belong to, and a batch of predictions
    num_rows = 2 * size + PREDICTION_BATCH_SIZE
    with reproducible(device, training.precision):
        method = _build_method(head, device)
        batch = next(shuffled_batches(train_source, size, head.run.seed, method.class_stream)(0))
        # runs of other seeds read other batches
        own_batch = sum(column.nbytes for column in batch.values()) if can_stack_seeds(head) else 0
        needed = {device.type: bytes_per_method(method, batch, num_rows) + own_batch}
        weights = sum(tensor.nbytes for tensor in method.state_dict().values())
        kept = bytes_kept(method, batch) * len(train_source.ids) // len(batch["key"])
    needed[device.type] += weights * (training.weight_average > 0) + kept
    needed["cpu"] = needed.get("cpu", 0) + STATE_COPIES * (weights + kept)
    counts = [int(HEADS_MEMORY_SHARE * free_bytes(torch.device(kind)) / num_bytes) for kind, num_bytes in needed.items()]
    return max(1, min(counts))
