"""Runs: the config of a run, and the folder that is named by the hash of the config."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

from pipeline.runtime.errors import UserError, note_traceback_file
from pipeline.runtime.files import (
    append_lines,
    canonical_json,
    fingerprint,
    lock,
    read_lines,
    sha256,
    sync_folder,
    write_atomic,
)
from pipeline.runtime.settings import flatten

MAX_SEED = 2**63 - 1
REAL_TEXT = "real"  # `RunConfig.text_control` of a run that was trained on the texts of its own samples
RECIPE = 3  # of runs that are trained now; 1 drew the random numbers of training by sample id, 2 rounded losses otherwise
SEED_FOLDER = re.compile("seed[0-9]+")
TEST_READS = "test_reads.jsonl"  # log of a run: one line for each read of the test split
REMOVED_TEST_READS = "removed_test_reads.jsonl"  # the same of all removed runs of a dataset, beside its heads
HEAD_FOLDER = re.compile(".+-[0-9a-f]{12}")


def check_seed(seed: SupportsIndex) -> int:
    """Return the seed of a run, which names its folder, as an int.

    Raises:
        UserError: it is no whole number in 0 .. 2^63 - 1.
    """
    number = index(seed) if isinstance(seed, SupportsIndex) and not isinstance(seed, bool) else -1
    if not 0 <= number <= MAX_SEED:
        raise UserError(f"a seed must be a whole number in 0..2^63 - 1, not {seed!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that can change the numbers of a run, except its seed; its hash names the run."""

    dataset: str
    method: str
    settings: Mapping[str, Any]  # fields of the method's Config; of a run of an earlier version, its aliases
    training: Mapping[str, Any]  # fields of TrainConfig
    caches: Mapping[str, str]  # batch key -> full fingerprint of the feature cache that its values are read from
    shapes: Mapping[str, list[int]]  # batch key -> shape of its values without the batch (types.Shapes)
    text_aggregate: str  # how several texts of a sample become one vector
    manifest: str  # fingerprint of the manifest
    plugin_sha256: str = ""  # of the file of a method from outside of this package; "": a method of this package
    recipe: int = 1  # version of how a step is computed; equal settings of two recipes are two runs
    text_control: str = REAL_TEXT  # what training read in place of the texts of its samples; see `training.text_controls`
    train_fraction: float = 1.0  # share of each class of the training split that training read

    def as_json(self) -> dict[str, Any]:
        """Return the config as plain JSON values, without what ordinary runs of the first version did not have."""
        absent = {"plugin_sha256": "", "recipe": 1, "text_control": REAL_TEXT, "train_fraction": 1.0}
        return {key: value for key, value in asdict(self).items() if key not in absent or value != absent[key]}

    def setting(self, name: str) -> Any:
        """Return a setting of the method, or of the part of it that has a setting of this name; None if there is none."""
        return {key.rpartition(".")[2]: value for key, value in flatten(self.settings).items()}.get(name)

    @property
    def is_continued(self) -> bool:
        """Whether joint training has trained the head on, with encoders or, under --unfreeze none, alone."""
        return self.training.get("stage") == "joint"

    @property
    def label_loss(self) -> str:
        """The loss of multi-label data, which says how logits become scores; methods without this setting have a softmax."""
        return str(self.setting("label_loss") or "softmax_kl")

    @property
    def is_multi_label(self) -> bool:
        """Whether a sample may have several labels."""
        return bool(self.shapes["label"])

    def fingerprint(self) -> str:
        """Return the SHA-256 of the canonical JSON of the config."""
        return fingerprint(self.as_json())


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one config and one seed: `<home>/runs/<dataset>/<method>-<fingerprint12>/seed<k>/`."""

    path: Path
    seed: int

    @staticmethod
    def of(home: Path, config: RunConfig, seed: int) -> RunFolder:
        """Return the folder of a run, without creating it."""
        name = f"{config.method}-{config.fingerprint()[:12]}"
        return RunFolder(home / "runs" / config.dataset / name / f"seed{seed}", seed)

    @staticmethod
    def at(path: Path) -> RunFolder:
        """Return the run in an existing folder.

        Raises:
            UserError: the folder does not hold a run.
        """
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not a run: give a folder …/runs/<dataset>/<method>-<fingerprint>/seed<k>")
        if not SEED_FOLDER.fullmatch(path.name):
            raise UserError(f"{path} holds the files of a run, and its name should say the seed: call the folder seed<k> again")
        return RunFolder(path, int(path.name.removeprefix("seed")))

    @property
    def is_done(self) -> bool:
        """Whether training has finished and all files are on disk."""
        return (self.path / "done").is_file()

    def read_done(self) -> dict[str, Any]:
        """Return what training recorded when it finished: "seconds", "checkpoint_sha256", "code", and perhaps "kernels".

        "code" is the version of the program that trained the run, see `code_version`; "" for runs of earlier versions.
        "kernels" is there for joint runs that ended with --fast or --compile: "fast", "compile_encoders".

        Raises:
            UserError: the file `done` is damaged.
        """
        path = self.path / "done"
        try:
            facts = json.loads(path.read_text())
            seconds, checksum, code = float(facts["seconds"]), str(facts["checkpoint_sha256"]), str(facts.get("code", ""))
            kernels = {"kernels": [str(name) for name in facts["kernels"]]} if "kernels" in facts else {}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged; {self.remedy}") from error
        return {"seconds": seconds, "checkpoint_sha256": checksum, "code": code, **kernels}

    def write_done(self, facts: Mapping[str, Any]) -> None:
        """Write the file `done`, which makes the run valid, with what `read_done` returns; all other files are on disk."""
        has_config = (self.path / "config.json").is_file()  # `train` by itself needs none
        recorded = {"config": self.config().fingerprint()} if has_config else {}
        write_atomic(self.path / "done", json.dumps({**facts, **recorded}))

    def write_alignment(self, figures: Mapping[str, float]) -> None:
        """Write what `read_alignment` returns; without figures, nothing."""
        if figures:
            write_atomic(self.path / "alignment.json", json.dumps(dict(figures)))

    def read_alignment(self) -> dict[str, float]:
        """Return how near the text that the head generates is to the real one, see `measure_alignment`.

        It is empty for heads that generate none, and for runs of earlier versions.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "alignment.json"
        if not path.is_file():
            return {}
        try:
            return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged; delete this file: the run is as good without it") from error

    def read_checkpoint(self) -> bytes:
        """Return the bytes of the checkpoint of a finished run, in the safetensors format.

        Raises:
            UserError: its SHA-256 is not the one that training recorded.
        """
        path = self.path / "checkpoint.safetensors"
        content = path.read_bytes()
        if sha256(content) != self.read_done()["checkpoint_sha256"]:
            raise UserError(f"{path} is damaged (its sha256 does not fit); {self.remedy}")
        return content

    def create(self, config: RunConfig) -> None:
        """Create the folder and write config.json into it."""
        write_atomic(self.path / "config.json", json.dumps(config.as_json(), indent=1, sort_keys=True, allow_nan=False))

    def config(self) -> RunConfig:
        """Return the config that the run was started with.

        A copy in a folder of another name is read if the run has recorded the hash of its config.

        Raises:
            UserError: config.json is damaged, or its hash is neither in the name of the folder nor recorded in the run.
        """
        path = self.path / "config.json"
        try:
            config = RunConfig(**json.loads(path.read_text()))
            digest = config.fingerprint()
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); {self.remedy}") from error
        if self.path.parent.name.endswith(f"-{digest[:12]}"):
            return config
        recorded = self._recorded_configs()
        if digest in recorded:
            return config
        problem = f"{path} does not hash to the name of its folder"
        if recorded:
            raise UserError(f"{problem}: it was changed after the training; bring the old one back, or {self.remedy}")
        name = f"{config.method}-{digest[:12]}"
        raise UserError(f"{problem}: if {self.path.parent} is a copy, call it {name} again; if the file was changed, undo that")

    def _recorded_configs(self) -> set[str]:
        """Return the hashes of the config that training and evaluations have recorded; none for an unfinished run."""
        found = []
        for name in ("done", "metrics.json"):
            with suppress(OSError, ValueError):
                content = json.loads((self.path / name).read_text())
                entries = [content, *content.values()] if isinstance(content, dict) else []
                found += [each.get("config") for each in entries if isinstance(each, dict)]
        return {digest for digest in found if isinstance(digest, str)}

    @property
    def remedy(self) -> str:
        """What the user should do when a file of the run is damaged."""
        return f"delete {self.path} and run the same command again"

    def write_traceback(self, error: BaseException) -> Path:
        """Write the traceback of a bug to `error.txt`, note that on the error, and return the path. No other code reads it."""
        path = self.path / "error.txt"
        write_atomic(path, "".join(traceback.format_exception(error)))
        note_traceback_file(error, path)
        return path

    def delete_traceback(self) -> None:
        """Delete the traceback of an earlier attempt, if there is one."""
        path = self.path / "error.txt"
        if path.is_file():  # the folder of a finished run may be read-only; then there is nothing to delete
            path.unlink(missing_ok=True)

    def check_done(self) -> None:
        """Check that training has finished.

        Raises:
            UserError: it has not.
        """
        if not self.is_done:
            raise UserError(f"{self.path} has not finished training; run the same command again to complete it")


def find_runs(home: Path, dataset: str) -> list[RunFolder]:
    """Return all runs of a dataset, finished or not, sorted by name and seed. Other folders, such as copies, are no runs."""
    folders = [config.parent for config in (home / "runs" / dataset).glob("*-*/seed*/config.json")]
    named = [each for each in folders if HEAD_FOLDER.fullmatch(each.parent.name) and SEED_FOLDER.fullmatch(each.name)]
    runs = [RunFolder.at(folder) for folder in named]
    return sorted(runs, key=lambda run: (run.path.parent.name, run.seed))


def disk_usage(folders: Sequence[Path]) -> int:
    """Return the bytes of all files below some folders."""
    files = [file for folder in folders for file in folder.rglob("*") if not file.is_symlink()]
    return sum(file.stat().st_size for file in files if file.is_file())


def removed_test_reads(home: Path, dataset: str) -> list[dict[str, str]]:
    """Return the reads of the test split by runs that `remove_runs` has removed: evaluation, time, run ("<head>/seed<k>")."""
    lines = read_lines(home / "runs" / dataset / REMOVED_TEST_READS)
    return [json.loads(line) for line in dict.fromkeys(lines)]  # a removal that was killed and repeated writes a line twice


def _keep_test_reads(folders: Sequence[Path]) -> None:
    """Copy what runs have logged of their reads of the test split to a log of their dataset, which stays."""
    for folder in sorted(folders):
        reads = [json.loads(line) for line in read_lines(folder / TEST_READS)]
        named = [canonical_json({**read, "run": f"{folder.parent.name}/{folder.name}"}) for read in reads]
        append_lines(folder.parents[1] / REMOVED_TEST_READS, named)


def remove_runs(home: Path, folders: Sequence[Path]) -> None:
    """Remove runs of a home, and the folders of heads that have no run left. If it is killed, a run is whole or gone.

    What they have read of the test split stays on record, see `removed_test_reads`.

    Raises:
        UserError: a folder is no run of this home, or is reached by a link, or another process writes to one of them; nothing
            is removed then.
    """
    for folder in folders:
        check_removable(home, folder)
    with ExitStack() as locks:
        for folder in sorted(folders):
            locks.enter_context(lock(folder))
        _keep_test_reads(folders)
        for folder in folders:  # no run has such a name, so what a kill leaves is none
            folder.rename(folder.with_name(f".{folder.name}.removed"))
    for head in {folder.parent for folder in folders}:
        sync_folder(head)
        for leftover in head.glob(".seed*.removed"):
            shutil.rmtree(leftover)
        _remove_empty_head(head)


def check_removable(home: Path, folder: Path) -> None:
    """Check that a folder is a run of a home, `<home>/runs/<dataset>/<method>-<fingerprint12>/seed<k>`, without a link.

    Raises:
        UserError: it is not: a copy of a run, for example, beside which other files may lie.
    """
    parts = folder.absolute().parts[-2:]
    is_run = len(parts) == 2 and HEAD_FOLDER.fullmatch(parts[0]) and SEED_FOLDER.fullmatch(parts[1])
    root = home.resolve() / "runs"
    if not is_run or folder.resolve() != root / folder.absolute().parts[-3] / parts[0] / parts[1]:
        raise UserError(f"{folder} is no run in {home / 'runs'}, or is reached by a link: delete it by hand if you want to")


def _remove_empty_head(head: Path) -> None:
    """Remove the folder of a head in which no run is left; a folder that holds anything else stays."""
    if any(head.glob("seed*")):
        return
    for name in ("tags.json", ".tags.lock"):
        (head / name).unlink(missing_ok=True)
    with suppress(OSError):  # a run has just begun there, or somebody keeps other files in it
        head.rmdir()
