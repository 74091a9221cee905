"""Trackers for Weights & Biases and MLflow.

diffalign train-head --method seda --log examples/trackers.py:WeightsAndBiases
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pipeline.runtime.runs import RunFolder


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row."""
    return {name: float(value) for name, value in row.items() if name != "phase" and math.isfinite(value)}


class WeightsAndBiases:
    """One run of W&B per seed: the project is the data set, the group the head. WANDB_MODE=offline needs no account."""

    def __init__(self, run: RunFolder) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        config = run.config()
        self.run = wandb.init(
            project=config.dataset,
            group=run.path.parent.name,
            id=f"{run.path.parent.name}-seed{run.seed}",
            resume="allow",
            config={**config.as_json(), "seed": run.seed},
        )

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        self.run.log(numbers(row), step=epoch)  # W&B itself leaves out the steps that a resumed run has logged before

    def close(self, results: Mapping[str, float]) -> None:
        self.run.summary.update(dict(results))
        self.run.finish(exit_code=0 if results else 1)


class MLflow:
    """One run of MLflow per seed, in the experiment of the data set; MLFLOW_TRACKING_URI says where."""

    def __init__(self, run: RunFolder) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]

        self.client = mlflow.MlflowClient()
        config = run.config()
        found = self.client.get_experiment_by_name(config.dataset)
        experiment = found.experiment_id if found else self.client.create_experiment(config.dataset)
        name = f"{run.path.parent.name}/seed{run.seed}"
        for earlier in self.client.search_runs([experiment], f"tags.diffalign = '{name}'"):
            self.client.delete_run(earlier.info.run_id)  # of the same seed, interrupted: all epochs are logged again
        self.id = self.client.create_run(experiment, run_name=name, tags={"diffalign": name}).info.run_id
        for key, value in {**config.settings, **config.training, "method": config.method, "seed": run.seed}.items():
            self.client.log_param(self.id, key, value)

    def log(self, epoch: int, row: Mapping[str, Any]) -> None:
        for name, value in numbers(row).items():
            self.client.log_metric(self.id, name, value, step=epoch)

    def close(self, results: Mapping[str, float]) -> None:
        for name, value in results.items():
            self.client.log_metric(self.id, f"result_{name}", value)
        self.client.set_terminated(self.id, "FINISHED" if results else "FAILED")
