"""Stage 3 as a whole: interrupted, poisoned, guarded, over several processes; and its encoders make caches again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import joint_home
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pipeline import lane, train
from pipeline.cache import find_caches, open_cache
from pipeline.evaluate import evaluate
from pipeline.finetune import finetune, resolve
from pipeline.manifest import Manifest
from pipeline.runs import Run
from pipeline.streams import Streams, sample_keys
from pipeline.together import JointConfig

IMAGE, BOTH = JointConfig(train="image", encoder_lr=1e-3), JointConfig(train="both", encoder_lr=1e-3)


@pytest.fixture(scope="module")
def prepared(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("finetune") / "home")


@pytest.fixture
def home(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared home that may be written to."""
    return Path(shutil.copytree(prepared, tmp_path / "home"))


def joint_run(home: Path) -> Run:
    (folder,) = (home / "joint" / "tiny").glob("*/seed0")
    return Run(folder, 0)


def logits(run: Run, split: str) -> np.ndarray:
    return np.load(run.path / f"predictions-{split}.npz")["logits"]


def test_tuned_encoders_make_caches_that_the_joint_head_reads(home: Path) -> None:
    """What the joint model computes from pixels is what its head computes from the next generation of the cache."""
    init = joint_home.head(home, "ema", epochs=1)
    outcome = joint_home.tuned(home, init, BOTH, epochs="4")
    assert outcome.is_better, outcome
    assert outcome.run.is_done
    assert outcome.run.config().caches.keys() == {"image", "text"}
    assert not set(outcome.run.config().caches.values()) & set(init.config().caches.values())
    joint = joint_run(home)
    assert not (joint.path / "items").exists()
    metrics = evaluate(home, outcome.run, "val", {})["metrics"]
    assert metrics["acc1"] == outcome.after
    plan = joint_home.together(home, init, BOTH, resolve(init, joint_home.SHORT))
    model, live = joint_home.assembled(plan)
    model.load_state_dict(load_file(joint.path / "checkpoint.safetensors"))
    model.train(False)
    keys = sample_keys(plan.features.val.ids)
    with torch.no_grad():
        found = model.predict(live["image"].items["val"], Streams.seeded(0, keys).at("predict"))
    np.testing.assert_allclose(logits(outcome.run, "val"), found.numpy(), rtol=1e-4, atol=1e-4)
    history = pd.read_csv(joint.path / "history.csv")
    assert (history["cosine_image"] < 0.999).any()
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    assert joint_home.tuned(home, init, BOTH, epochs="4") == outcome  # nothing is done twice
    written = {path for path in home.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in written} <= {".lock"}


def test_killed_and_resumed_it_ends_in_the_same_bits(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = joint_home.head(home, "seda", epochs=1)
    undisturbed = Path(shutil.copytree(home, tmp_path / "undisturbed"))
    joint_home.tuned(undisturbed, Run(undisturbed / init.path.relative_to(home), 0), BOTH, epochs="5")
    monkeypatch.setattr(train, "STATE_SECONDS", -1.0)
    monkeypatch.setattr(train, "SAVE_SHARE", 0)
    for _ in range(2):
        process = get_context("fork").Process(target=joint_home.tuned, args=(home, init, BOTH), kwargs={"epochs": "5"})
        saved = states(home)
        process.start()
        while states(home) in (saved, set()):
            assert process.is_alive()
            time.sleep(0.001)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(joint_run(home).path / "items", ignore_errors=True)  # a file that a crash has taken is made again
    joint_home.tuned(home, init, BOTH, epochs="5")
    ours, theirs = joint_run(home).path, joint_run(undisturbed).path
    assert (ours / "checkpoint.safetensors").read_bytes() == (theirs / "checkpoint.safetensors").read_bytes()
    assert (ours / "history.csv").read_bytes() == (theirs / "history.csv").read_bytes()


def states(home: Path) -> set[int]:
    return {path.stat().st_mtime_ns for path in home.glob("joint/tiny/*/seed0/state.pt")}


def test_texts_of_other_splits_reach_nothing(tiny_manifest: Manifest, home: Path, tmp_path: Path) -> None:
    samples = tuple(
        sample if sample.split == "train" else replace(sample, texts=(f"the lazy dog {number}", "!"))
        for number, sample in enumerate(tiny_manifest.samples)
    )
    (tmp_path / "other").mkdir()
    poisoned = joint_home.make_home(replace(tiny_manifest, samples=samples), tmp_path / "other" / "home")
    results = []
    for place in (home, poisoned):
        outcome = joint_home.tuned(place, joint_home.head(place, "ema", epochs=1), BOTH, epochs="3")
        assert outcome.is_better
        evaluate(place, outcome.run, "test", {})
        results.append((load_file(joint_run(place).path / "checkpoint.safetensors"), logits(outcome.run, "test")))
    (ours, our_logits), (theirs, their_logits) = results
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(our_logits, their_logits)


def test_a_stage_that_does_not_pay_off_leaves_stage_2_as_it_is(home: Path) -> None:
    init = joint_home.head(home, "baseline")
    outcome = joint_home.tuned(home, init, JointConfig(encoder_lr=3.0), epochs="1")
    assert not outcome.is_better
    assert outcome.run == init
    assert len(find_caches(home, "tiny")) == 2
    assert outcome.weights["image"].is_file()


def test_a_loss_that_is_not_finite_names_step_samples_and_the_last_good_checkpoint(home: Path) -> None:
    init = joint_home.head(home, "baseline")
    with pytest.raises(
        ValueError, match=r"step [12] of epoch 0 \(samples (\w+-\d, ){8}…\).*checkpoint is .*seed0/checkpoint"
    ) as error:
        joint_home.tuned(home, init, JointConfig(encoder_lr=1e30), lr="1e30", grad_clip="1e30")
    assert str(init.path) in str(error.value)


def test_two_processes_equal_one(home: Path, tmp_path: Path) -> None:
    """Batches of seven: the last share is filled up. The contrastive loss sees the features of both."""
    init = joint_home.head(home, "ema", epochs=1)
    alone = Path(shutil.copytree(home, tmp_path / "alone"))
    joint_home.tuned(alone, Run(alone / init.path.relative_to(home), 0), BOTH, batch_size="7")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [get_context("fork").Process(target=as_rank, args=(rank, port, home, init)) for rank in (0, 1)]
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


def as_rank(rank: int, port: int, home: Path, init: Run) -> None:
    """A process as torchrun starts it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    joint_home.tuned(home, init, BOTH, batch_size="7")


def test_the_last_blocks_alone(home: Path) -> None:
    init = joint_home.head(home, "baseline", epochs=1)
    outcome = joint_home.tuned(home, init, JointConfig(train="last:2", encoder_lr=1e-3), epochs="6")
    assert outcome.is_better
    assert evaluate(home, outcome.run, "val", {})["metrics"]["acc1"] == outcome.after
    caches = joint_home.caches(home)
    (cache,) = [open_cache(path) for path in find_caches(home, "tiny") if open_cache(path).fingerprint == caches["image"]]
    tuned = load_file(outcome.weights["image"])
    plan = joint_home.together(home, init, IMAGE, resolve(init, {}))
    _, live = joint_home.assembled(plan)
    moved = {name for name, tensor in live["image"].encoder.state_dict().items() if not torch.equal(tensor, tuned[name])}
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
        ("baseline", {"train": "last:1", "augment": True}, "--augment needs --train image"),
    ],
)
def test_what_cannot_be_trained_is_refused(method: str, joint: dict[str, Any], message: str, home: Path) -> None:
    with pytest.raises(ValueError, match=message):
        joint_home.tuned(home, joint_home.head(home, method, epochs=1), JointConfig(**joint))


def test_too_little_memory_names_the_options(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    init = joint_home.head(home, "baseline", epochs=1)
    monkeypatch.setattr(lane.Lane, "note", full)
    with pytest.raises(ValueError, match=r"--checkpointing, --accumulate 4, or a smaller --train batch_size"):
        finetune(home, init, IMAGE, resolve(init, joint_home.SHORT), joint_home.QUIET)
