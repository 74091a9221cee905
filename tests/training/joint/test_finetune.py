"""Stage 3 from start to end: interruptions, failures, several processes, and the caches of the tuned encoders."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import joint_home
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache import find_caches, open_cache
from pipeline.cache.reader import find_cache
from pipeline.cache.table import shuffled_batches
from pipeline.data import media_digests
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.data.media_digests import STORE_NAME
from pipeline.encoders.timm import Timm
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.inference_spec import read_inference_spec
from pipeline.extraction.new_media import encode_files
from pipeline.runtime.errors import traceback_file
from pipeline.runtime.rng import KeyedRNG, sample_keys
from pipeline.runtime.runs import RECIPE, RunFolder
from pipeline.training import loop
from pipeline.training.features import open_features
from pipeline.training.joint.finetune import resolve_joint_settings
from pipeline.training.joint.plan import JointConfig

IMAGE, BOTH = JointConfig(train="image", encoder_lr=1e-3), JointConfig(train="both", encoder_lr=1e-3)


@pytest.fixture(scope="module")
def prepared_home(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("finetune") / "home")


@pytest.fixture
def home(prepared_home: Path, tmp_path: Path) -> Path:
    """A copy of the prepared home that a test may write to."""
    return Path(shutil.copytree(prepared_home, tmp_path / "home"))


def joint_run(home: Path) -> RunFolder:
    (folder,) = (home / "joint" / "tiny").glob("*/seed0")
    return RunFolder(folder, 0)


def logits(run: RunFolder, split: str) -> np.ndarray:
    return np.load(run.path / f"predictions-{split}.npz")["logits"]


def test_the_traceback_of_a_bug_is_kept_until_an_attempt_ends_without_one(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)

    def fail(*_: Any, **__: Any) -> Tensor:
        raise IndexError("planted")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.joint.trainer.predict", fail)
        with pytest.raises(IndexError, match="planted") as caught:
            joint_home.finetune_briefly(home, init, IMAGE, epochs="1")
    file = joint_run(home).path / "error.txt"
    assert "IndexError: planted" in file.read_text()
    assert traceback_file(caught.value) == str(file)
    joint_home.finetune_briefly(home, init, IMAGE, epochs="1")
    assert not file.exists()


def check_it_carries_its_encoder(run: RunFolder, home: Path, copied: Path) -> None:
    """Check that a copy of the run encodes pictures with the tuned weights, wherever these were."""
    shutil.copytree(run.path, copied)
    spec = json.loads((copied / "predict.json").read_text())
    spec["encoder_settings"]["weights"] = str(copied / "gone" / "image.safetensors")
    (copied / "predict.json").write_text(json.dumps(spec))
    encoder = read_inference_spec(RunFolder.at(copied), copied).build_encoder(RunFolder.at(copied))
    manifest = read_manifest(home, "tiny")
    cache = find_cache(home, manifest, run.config().caches["image"])
    files = [str(manifest.media_path(sample)) for sample in manifest.samples[:20]]
    found = np.concatenate([each.features for each in encode_files(files, encoder, "float32", workers=0)])
    np.testing.assert_allclose(found, cache.read([sample.id for sample in manifest.samples[:20]]), rtol=1e-4, atol=1e-4)


def test_tuned_encoders_make_caches_that_the_joint_head_reads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint method predicts from pixels what its head predicts from the caches of the tuned encoders."""
    monkeypatch.setattr(media_digests, "SETTLING_NS", -(10**18))  # else digests of files just made are remembered later
    init = joint_home.train_small_head(home, "ema", epochs=1)
    outcome = joint_home.finetune_briefly(home, init, BOTH, epochs="4")
    assert outcome.is_better, outcome
    assert outcome.run.is_done
    assert outcome.run.config().caches.keys() == {"image", "text"}
    assert not set(outcome.run.config().caches.values()) & set(init.config().caches.values())
    joint = joint_run(home)
    assert not (joint.path / "items").exists()
    metrics = evaluate(home, outcome.run, "val", {})["metrics"]
    assert metrics["acc1"] == outcome.after
    plan = joint_home.joint_plan(home, init, BOTH, resolve_joint_settings(init, joint_home.SHORT))
    model, encoders = joint_home.build_joint(plan)
    model.load_state_dict(load_file(joint.path / "checkpoint.safetensors"))
    model.train(False)
    keys = sample_keys(plan.features.val.ids)
    with torch.no_grad():
        found = model.predict(encoders["image"].items["val"], KeyedRNG.seeded(0, keys).at("predict"))
    np.testing.assert_allclose(logits(outcome.run, "val"), found.numpy(), rtol=1e-4, atol=1e-4)
    history = pd.read_csv(joint.path / "history.csv")
    assert (history["cosine_image"] < 0.999).any()
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert joint_home.finetune_briefly(home, init, BOTH, epochs="4") == outcome  # a finished run is not repeated
    written = {path for path in home.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in written} <= {".lock"}
    check_it_carries_its_encoder(outcome.run, home, tmp_path / "seed0")


def test_killed_and_resumed_it_ends_in_the_same_bits(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = joint_home.train_small_head(home, "seda", epochs=1)
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    joint_home.finetune_briefly(undisturbed, RunFolder(undisturbed / init.path.relative_to(home), 0), BOTH, epochs="5")
    monkeypatch.setattr(loop, "STATE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "SAVE_COST_FACTOR", 0)
    for _ in range(2):
        process = get_context("fork").Process(
            target=joint_home.finetune_briefly, args=(home, init, BOTH), kwargs={"epochs": "5"}
        )
        saved = state_times(home)
        process.start()
        while state_times(home) in (saved, set()):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(joint_run(home).path / "items", ignore_errors=True)  # lost items are prepared again
    joint_home.finetune_briefly(home, init, BOTH, epochs="5")
    ours, theirs = joint_run(home).path, joint_run(undisturbed).path
    assert (ours / "checkpoint.safetensors").read_bytes() == (theirs / "checkpoint.safetensors").read_bytes()
    assert (ours / "history.csv").read_bytes() == (theirs / "history.csv").read_bytes()


@pytest.mark.parametrize(
    ("train", "folders"), [pytest.param("image", ("joint", "runs", "caches"), marks=pytest.mark.slow), ("last:1", ("joint",))]
)
def test_killed_at_any_write_it_ends_in_the_same_bytes(
    train: str, folders: tuple[str, ...], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed once before each write and each deletion of a file, and resumed each time."""
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    joint = JointConfig(train=train, encoder_lr=1e-3)
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    monkeypatch.setattr(loop, "STATE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "SAVE_COST_FACTOR", 0)
    expected = joint_home.finetune_briefly(
        undisturbed, RunFolder(undisturbed / init.path.relative_to(home), 0), joint, epochs="3"
    )
    assert expected.is_better
    survived: set[tuple[str, Path]] = set()

    def kill_before(module: Any, action: str) -> None:
        do = getattr(module, action)

        def act(*args: Any, **options: Any) -> Any:
            path = Path(args[-1])
            is_ours = path.suffix != ".tmp" and path.is_relative_to(home) and path.relative_to(home).parts[0] in folders
            if is_ours and (action, path) not in survived:
                survived.add((action, path))
                raise KeyboardInterrupt
            return do(*args, **options)

        patch.setattr(module, action, act)

    with monkeypatch.context() as patch:
        for module, action in ((os, "replace"), (Path, "unlink"), (shutil, "rmtree")):
            kill_before(module, action)
        outcome = None
        while outcome is None:
            with contextlib.suppress(KeyboardInterrupt):
                outcome = joint_home.finetune_briefly(home, init, joint, epochs="3")
    assert outcome.is_better
    kills = {(action, path.name) for action, path in survived}
    assert kills >= {("replace", "state.pt"), ("unlink", "state.pt"), ("rmtree", "items"), ("replace", "image.safetensors")}
    assert (("unlink", "image-train.npy") in kills) == (train == "last:1")
    ours, theirs = files(home), files(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name, content in ours.items() if content != theirs[name]] == []


def files(home: Path) -> dict[str, bytes]:
    """The content of each file of a home, without its own path and without files, or the store of digests, that hold times."""
    found = {}
    for path in sorted(home.rglob("*")):
        if path.is_file() and path.name != STORE_NAME:
            is_timed = path.name in ("done", "metrics.json") or path.parent.name == "commits"
            found[str(path.relative_to(home))] = b"" if is_timed else path.read_bytes().replace(bytes(home), b"")
    return found


def state_times(home: Path) -> set[int]:
    return {path.stat().st_mtime_ns for path in home.glob("joint/tiny/*/seed0/state.pt")}


def test_texts_of_other_splits_change_nothing(tiny_manifest: Manifest, home: Path, tmp_path: Path) -> None:
    samples = tuple(
        sample if sample.split == "train" else replace(sample, texts=(f"the lazy dog {number}", "!"))
        for number, sample in enumerate(tiny_manifest.samples)
    )
    (tmp_path / "other").mkdir()
    poisoned = joint_home.make_home(replace(tiny_manifest, samples=samples), tmp_path / "other" / "home")
    results = []
    for each_home in (home, poisoned):
        outcome = joint_home.finetune_briefly(
            each_home, joint_home.train_small_head(each_home, "ema", epochs=1), BOTH, epochs="3"
        )
        assert outcome.is_better
        evaluate(each_home, outcome.run, "test", {})
        results.append((load_file(joint_run(each_home).path / "checkpoint.safetensors"), logits(outcome.run, "test")))
    (ours, our_logits), (theirs, their_logits) = results
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(our_logits, their_logits)


def test_a_head_of_an_earlier_recipe_is_tuned_as_a_run_of_today(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    config = replace(init.config(), recipe=1)
    old = RunFolder.of(home, config, 0)
    shutil.move(init.path.parent, old.path.parent)
    (old.path / "config.json").write_text(json.dumps(config.as_json()))
    result = joint_home.finetune_briefly(home, old, IMAGE)
    assert joint_run(home).config().recipe == RECIPE
    assert result.run.config().recipe == (RECIPE if result.is_better else 1)


def test_a_joint_run_that_is_not_better_leaves_stage_2_as_it_is(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline")
    outcome = joint_home.finetune_briefly(home, init, JointConfig(encoder_lr=3.0), epochs="1")
    assert not outcome.is_better
    assert outcome.run == init
    assert len(find_caches(home, "tiny")) == 2
    assert outcome.weights["image"].is_file()


def test_a_loss_that_is_not_finite_names_step_samples_and_the_last_good_checkpoint(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline")
    with pytest.raises(
        ValueError,
        match=r"step [12] of epoch 0 \(samples (\w+-\d, ){7}\w+-\d\); the last good checkpoint is .*seed0/checkpoint",
    ) as error:
        joint_home.finetune_briefly(home, init, JointConfig(encoder_lr=1e30), lr="1e30", grad_clip="1e30")
    assert str(init.path) in str(error.value)


@pytest.mark.parametrize("step", [3, 6])
def test_a_gradient_that_is_not_finite_stops_at_its_own_step(step: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing step is the last one of an epoch that is not validated; the loss and the saved state are finite."""
    forward, calls = Timm.forward, 0

    def forward_with_infinite_gradient(encoder: Timm, prepared: Tensor) -> Tensor:
        nonlocal calls
        features = forward(encoder, prepared)
        if not torch.is_grad_enabled():
            return features
        calls += 1
        return features + torch.sqrt(features - features.detach()) if calls == step else features

    init = joint_home.train_small_head(home, "baseline", epochs=1)
    monkeypatch.setattr(Timm, "forward", forward_with_infinite_gradient)
    monkeypatch.setattr(loop, "STATE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "SAVE_COST_FACTOR", 0)
    with pytest.raises(ValueError, match=f"a gradient is not finite in step 2 of epoch {step // 3 - 1} ") as error:
        joint_home.finetune_briefly(home, init, IMAGE, epochs="5", validate_every="5")
    table = open_features(home, "tiny", "baseline", init.config().caches).train
    *_, batch = shuffled_batches(table, 8, init.seed)(step // 3 - 1)
    ids = [table.ids[row] for row in (batch["key"][:, None] == table.columns["key"]).nonzero()[:, 1].tolist()]
    assert f"(samples {', '.join(ids)})" in str(error.value)
    state = joint_run(home).path / "state.pt"
    assert f"checkpoint is {state if step == 6 else init.path}" in str(error.value)
    assert state.is_file() == (step == 6)
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        assert saved["state"]["epoch"] == 1
        assert all(tensor.isfinite().all() for tensor in saved["method"].values())


@pytest.mark.parametrize(("train", "batch_size"), [("both", "7"), ("last:2", "8")])
def test_two_processes_equal_one(train: str, batch_size: str, home: Path, tmp_path: Path) -> None:
    """With batches of seven, the last share is padded. The contrastive loss sees the features of both processes."""
    joint = JointConfig(train=train, encoder_lr=1e-3)
    init = joint_home.train_small_head(home, "ema", epochs=1)
    alone = Path(shutil.copytree(home, tmp_path / "alone"))
    joint_home.finetune_briefly(alone, RunFolder(alone / init.path.relative_to(home), 0), joint, batch_size=batch_size)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        get_context("fork").Process(target=run_as_rank, args=(rank, port, home, init, joint, batch_size)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    ours, theirs = joint_run(home).path, joint_run(alone).path
    found, expected = load_file(ours / "checkpoint.safetensors"), load_file(theirs / "checkpoint.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
    losses = [pd.read_csv(path / "history.csv")["loss"].to_numpy() for path in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def run_as_rank(rank: int, port: int, home: Path, init: RunFolder, joint: JointConfig, batch_size: str) -> None:
    """Tune in a process that has the environment of torchrun."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    joint_home.finetune_briefly(home, init, joint, batch_size=batch_size)


def test_only_the_last_blocks_change(home: Path) -> None:
    init = joint_home.train_small_head(home, "baseline", epochs=1)
    outcome = joint_home.finetune_briefly(home, init, JointConfig(train="last:2", encoder_lr=1e-3), epochs="6")
    assert outcome.is_better
    assert evaluate(home, outcome.run, "val", {})["metrics"]["acc1"] == outcome.after
    caches = joint_home.caches(home)
    (cache,) = [open_cache(path) for path in find_caches(home, "tiny") if open_cache(path).fingerprint == caches["image"]]
    tuned = load_file(outcome.weights["image"])
    plan = joint_home.joint_plan(home, init, IMAGE, resolve_joint_settings(init, {}))
    _, encoders = joint_home.build_joint(plan)
    moved = {name for name, tensor in encoders["image"].encoder.state_dict().items() if not torch.equal(tensor, tuned[name])}
    assert cache.identity["encoder"]["name"] == "timm"
    assert moved
    assert all(name.startswith(("network.blocks.4.", "network.blocks.5.")) for name in moved)


@pytest.mark.parametrize(
    ("method", "joint", "message"),
    [
        ("baseline", {"train": "text"}, "baseline reads no text"),
        ("baseline", {"train": "last:99"}, "choose last:1 to last:5"),
        ("baseline", {"train": "some"}, "takes image, text, both or last:K"),
        ("baseline", {"encoder_lr": 0.0}, "must be positive"),
        ("baseline", {"train": "last:1", "augment": True}, "--augment needs --unfreeze image"),
        ("knn", {}, "knn chooses on validation, which joint training does not"),
        ("stacked", {}, "stacked chooses on validation, which joint training does not"),
        ("baseline", {"train": "none", "augment": True}, "leave --augment out"),
    ],
)
def test_impossible_joint_settings_are_refused(method: str, joint: dict[str, Any], message: str, home: Path) -> None:
    with pytest.raises(ValueError, match=message):
        joint_home.finetune_briefly(home, joint_home.train_small_head(home, method, epochs=1), JointConfig(**joint))


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)])
@pytest.mark.parametrize("moment", ["opening", "training"])
def test_too_little_memory_names_the_options(
    moment: str, allocate: Callable[[], object], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder allocates more memory than any machine has."""
    forward = Timm.forward

    def allocating_forward(encoder: Timm, prepared: Tensor) -> Tensor:
        if torch.is_grad_enabled() == (moment == "training"):
            allocate()
        return forward(encoder, prepared)

    init = joint_home.train_small_head(home, "baseline", epochs=1)
    monkeypatch.setattr(Timm, "forward", allocating_forward)
    with pytest.raises(ValueError, match=r"--checkpointing, --accumulate 4, or a smaller --train batch_size"):
        joint_home.finetune_briefly(home, init, IMAGE)


def test_failures_of_stage_1_do_not_stop_the_next_cache(tiny_manifest: Manifest, tmp_path: Path) -> None:
    """An eighth of the images cannot be read, and the first extraction allowed that many failures."""
    media = Path(shutil.copytree(tiny_manifest.media_root, tmp_path / "media"))
    for number in (0, 4, 8):
        (media / f"red-{number}.png").write_bytes(b"")
    (media / "blue-0.png").write_bytes(b"")
    (media / "grey-1.png").write_bytes(b"")
    home = joint_home.make_home(replace(tiny_manifest, media_root=media), tmp_path / "home", max_failures=0.2)
    outcome = joint_home.finetune_briefly(home, joint_home.train_small_head(home, "baseline", epochs=1), IMAGE, epochs="4")
    assert outcome.is_better
    tuned = {path.name: open_cache(path).failed_ids for path in find_caches(home, "tiny") if path.name.startswith("timm")}
    assert [len(failed) for failed in tuned.values()] == [5, 5]
