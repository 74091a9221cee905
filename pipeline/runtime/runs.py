"""A run is a folder named by the hash of its config: canonical JSON, fingerprints, whole-file writes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime.files import fingerprint, sha256, write_atomic


def home_path(home: Path | None) -> Path:
    """Where artifacts live: the argument, else $DIFFALIGN_HOME, else ./artifacts."""
    return home or Path(os.environ.get("DIFFALIGN_HOME") or "artifacts")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that can change a run's numbers but its seed; the hash of it names the run."""

    dataset: str
    method: str
    settings: Mapping[str, Any]  # the method's Config
    training: Mapping[str, Any]  # lane.TrainConfig
    caches: Mapping[str, str]  # batch key -> full fingerprint of the feature cache it is read from
    shapes: Mapping[str, list[int]]  # types.Shapes
    text_aggregate: str  # how several texts of a sample become one vector
    manifest: str  # fingerprint of the manifest

    def fingerprint(self) -> str:
        """SHA-256 of the config's canonical JSON."""
        return fingerprint(asdict(self))


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one config and one seed: `<home>/runs/<dataset>/<method>-<fingerprint12>/seed<k>/`."""

    path: Path
    seed: int

    @staticmethod
    def of(home: Path, config: RunConfig, seed: int) -> RunFolder:
        """The run's folder; nothing is created."""
        name = f"{config.method}-{config.fingerprint()[:12]}"
        return RunFolder(home / "runs" / config.dataset / name / f"seed{seed}", seed)

    @staticmethod
    def at(path: Path) -> RunFolder:
        """The run in an existing folder; `ValueError` when it is none."""
        if not (path / "config.json").is_file() or not path.name.removeprefix("seed").isdigit():
            raise ValueError(f"{path} is not a run: give a folder …/runs/<dataset>/<method>-<fingerprint>/seed<k>")
        return RunFolder(path, int(path.name.removeprefix("seed")))

    @property
    def is_done(self) -> bool:
        """Whether training has ended and everything is on disk."""
        return (self.path / "done").is_file()

    def done(self) -> dict[str, Any]:
        """What training wrote when it ended: seconds, and the checkpoint's sha256."""
        path = self.path / "done"
        try:
            facts = json.loads(path.read_text())
            return {"seconds": float(facts["seconds"]), "checkpoint_sha256": str(facts["checkpoint_sha256"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged; {self.remedy}") from error

    def weights(self) -> bytes:
        """The checkpoint of a finished run, in the format of safetensors; `ValueError` when it is not the one it wrote."""
        path = self.path / "checkpoint.safetensors"
        content = path.read_bytes()
        if sha256(content) != self.done()["checkpoint_sha256"]:
            raise ValueError(f"{path} is damaged (its sha256 does not fit); {self.remedy}")
        return content

    def create(self, config: RunConfig) -> None:
        """Make the folder and its config.json."""
        write_atomic(self.path / "config.json", json.dumps(asdict(config), indent=1, sort_keys=True, allow_nan=False))

    def config(self) -> RunConfig:
        """The config the run was started with; `ValueError` when it is damaged or not the one that named the folder."""
        path = self.path / "config.json"
        try:
            config = RunConfig(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); {self.remedy}") from error
        if not self.path.parent.name.endswith(f"-{config.fingerprint()[:12]}"):
            raise ValueError(f"{path} was changed: it does not hash to the name of its folder; {self.remedy}")
        return config

    @property
    def remedy(self) -> str:
        """What helps when a file of the run is damaged."""
        return f"delete {self.path} and run the same command again"

    def check_done(self) -> None:
        """`ValueError` when there is more to train."""
        if not self.is_done:
            raise ValueError(f"{self.path} has not finished training; run the same command again to complete it")


def find_runs(home: Path, dataset: str) -> list[RunFolder]:
    """All runs of a dataset, finished or not, sorted by name and seed."""
    configs = sorted((home / "runs" / dataset).glob("*-*/seed*/config.json"))
    runs = [RunFolder.at(config.parent) for config in configs]
    return sorted(runs, key=lambda run: (run.path.parent.name, run.seed))
