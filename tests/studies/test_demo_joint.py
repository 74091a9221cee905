"""The study of joint training on the tiny dataset: its rows are runs, and each seed has its own encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import joint_home
from helpers.tiny_heads import small_settings

from pipeline.data.manifest import Manifest
from pipeline.evaluation.evaluate import evaluate
from pipeline.runtime.runs import RunFolder, find_runs
from pipeline.studies import demo_joint
from pipeline.studies.demo_joint import (
    BASELINE_ENCODER,
    FROZEN,
    HEAD_ONLY,
    JOINT,
    OWN_ENCODER,
    Continuation,
    Continued,
    Head,
    compare_joint_training,
    train_and_test,
    train_continued,
    write_table,
)
from pipeline.training.heads import resolve_head_settings
from pipeline.training.joint.plan import JointConfig

SEEDS, IMAGE, TRAINING = (0, 1), JointConfig(encoder_lr=1e-3), {"epochs": 3, "batch_size": 8, "lr": 1e-3}


def run_here(train: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    return [train(job) for job in jobs]


def make_heads(home: Path) -> list[Head]:
    heads = []
    for method in ("baseline", "ema"):
        settings, training = resolve_head_settings(
            "tiny", method, "head", small_settings(method), {"epochs": 1, "batch_size": 8}
        )
        heads += [Head(home, "tiny", method, settings, training, joint_home.caches(home), seed) for seed in SEEDS]
    return heads


@pytest.fixture(scope="module")
def study(tiny_manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Head], pd.DataFrame]:
    home = joint_home.make_home(tiny_manifest, tmp_path_factory.mktemp("demo_joint") / "home")
    heads = make_heads(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_joint, "train_on_all_cores", run_here)
        return heads, compare_joint_training(heads, IMAGE, TRAINING)


def runs_of(heads: Sequence[Head]) -> dict[tuple[str, str], list[RunFolder]]:
    """The runs of the study by method and part, one per seed: finished runs are not repeated."""
    continued: dict[tuple[str, int], Continued] = {
        (head.method, head.seed): train_continued(Continuation(head, IMAGE, TRAINING)) for head in heads
    }
    runs: dict[tuple[str, str], list[RunFolder]] = {}
    for head in heads:
        own = continued[head.method, head.seed]
        parts = {FROZEN: own.frozen, HEAD_ONLY: own.head_only, JOINT: own.joint}
        for title, source in ((OWN_ENCODER, own), (BASELINE_ENCODER, continued["baseline", head.seed])):
            image = source.joint.config().caches["image"]
            parts[title] = train_and_test(head._replace(caches={**head.caches, "image": image}))
        for title, run in parts.items():
            runs.setdefault((head.method, title), []).append(run)
    assert runs["baseline", OWN_ENCODER] == runs.pop(("baseline", BASELINE_ENCODER))
    return runs


def test_rows_are_runs_and_differences_are_those_of_the_runs(study: tuple[list[Head], pd.DataFrame]) -> None:
    heads, table = study
    before = find_runs(heads[0].home, "tiny")
    runs = runs_of(heads)
    assert find_runs(heads[0].home, "tiny") == before  # the study has made these runs and no others
    assert list(zip(table["method"], table["head"], strict=True)) == list(runs)
    means = {
        key: np.mean([evaluate(heads[0].home, run, "test", {})["metrics"]["acc1"] for run in own]) for key, own in runs.items()
    }
    for row in table.to_dict("records"):
        key = row["method"], row["head"]
        assert float(row["Acc-1"].split()[0]) == pytest.approx(means[key], abs=0.006)
        difference = row[f"Acc-1 vs {HEAD_ONLY}"]
        if row["head"] == HEAD_ONLY:
            assert (difference, row["verdict"]) == ("-", "-")
            continue
        assert float(difference.split()[0]) == pytest.approx(means[key] - means[row["method"], HEAD_ONLY], abs=0.006)
        assert row["verdict"] == "2 of 5 seeds"
        num_kept = sum(run != frozen for run, frozen in zip(runs[key], runs[row["method"], FROZEN], strict=True))
        assert row["kept"] == ("-" if row["head"] == FROZEN else f"{num_kept} of 2")


def test_each_seed_has_the_encoder_that_it_has_tuned(study: tuple[list[Head], pd.DataFrame]) -> None:
    heads, _ = study
    runs = runs_of(heads)
    tuned = set()
    for method in ("baseline", "ema"):
        for frozen, head_only, joint, new in zip(
            *(runs[method, title] for title in (FROZEN, HEAD_ONLY, JOINT, OWN_ENCODER)), strict=True
        ):
            assert frozen.seed == head_only.seed == joint.seed == new.seed
            assert head_only.config().caches == frozen.config().caches
            assert new.config().caches == joint.config().caches
            assert (new == frozen) == (joint == frozen)  # where joint training is not kept, there is no other encoder
            if head_only != frozen:
                assert head_only.config().training["train"] == "none"
            if joint != frozen:
                assert joint.config().training["train"] == "image"
                assert new.config().training == frozen.config().training
                tuned.add(joint.config().caches["image"])
    assert len(tuned) == sum(
        joint != frozen for m in ("baseline", "ema") for joint, frozen in zip(runs[m, JOINT], runs[m, FROZEN], strict=True)
    )
    assert len(tuned) >= 2
    for run, baseline in zip(runs["ema", BASELINE_ENCODER], runs["baseline", JOINT], strict=True):
        assert run.config().caches["image"] == baseline.config().caches["image"]


def test_the_table_is_a_markdown_file_and_nothing_is_trained_twice(
    study: tuple[list[Head], pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, table = study
    home = heads[0].home
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    monkeypatch.setattr(demo_joint, "train_on_all_cores", run_here)
    pd.testing.assert_frame_equal(compare_joint_training(heads, IMAGE, TRAINING), table)
    written = {path for path in home.rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns}
    assert {path.name for path in written} <= {".lock"}
    lines = write_table(home, "tiny", table).read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == list(table.columns)
    assert rows[2:] == table.to_numpy().tolist()
    assert [line.split(":")[0] for line in lines if line.startswith("- ")] == [f"- {part}" for part in demo_joint.PARTS]
