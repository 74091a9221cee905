"""Tests of the demo's settings, and of the targets of make."""

from __future__ import annotations

import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline.runtime import plugins
from pipeline.runtime.settings import flatten, name_settings
from pipeline.studies.demo import DEMO_METHODS, EXTRA_OVERRIDES, demo_settings, extra_overrides
from pipeline.studies.demo_joint import JOINT_DEMO_DATASET, JOINT_DEMO_METHODS
from pipeline.training.config import TrainConfig
from pipeline.training.heads import resolve_head_settings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", DEMO_METHODS)
def test_every_method_of_the_demo_has_settings(method: str) -> None:
    settings, training = demo_settings(method)
    assert training.epochs > 0
    for overrides in EXTRA_OVERRIDES.get(method, ()):
        named = name_settings(type(settings), overrides)
        assert set(named) <= set(plugins.get("methods", method).prediction)
        is_new = all(flatten(asdict(settings))[name] != value for name, value in named.items())
        assert (overrides in extra_overrides(method)) == is_new
    assert training == TrainConfig(lr=1e-3)


@pytest.mark.parametrize("method", JOINT_DEMO_METHODS)
def test_every_method_of_the_joint_demo_has_tuned_settings(method: str) -> None:
    _, training = resolve_head_settings(JOINT_DEMO_DATASET, method, "tuned", {}, {})
    assert training.epochs > 0


@pytest.mark.parametrize(
    "target", ["setup", "demo", "test", "check", "extract", "train-head", "grid", "finetune", "demo-joint", "report", "bench"]
)
def test_make_targets_exist(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout
