"""The runs of a home as objects: their metrics, histories and predictions as tables, and comparisons between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError
from pipeline.runtime.head_names import HeadFolder, check_name_is_free, find_head
from pipeline.runtime.runs import RunConfig, RunFolder, find_runs

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.training.heads import HeadPlan
    from pipeline.training.tracking import MakeTracker


@dataclass(frozen=True)
class Run:
    """One trained head: a method with its settings, and one seed. It is a view of a folder, and holds no data."""

    home: Path  # the folder that has the manifest and the caches of the run
    path: Path  # <home>/runs/<dataset>/<method>-<fingerprint12>/seed<k>

    @property
    def name(self) -> str:
        """The folder that all seeds share, "<method>-<fingerprint12>": what `Runs.compare` takes."""
        return self.path.parent.name

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.folder.seed

    @property
    def is_done(self) -> bool:
        """Whether training has finished."""
        return self.folder.is_done

    @property
    def config(self) -> RunConfig:
        """Everything that can change the numbers of the run but its seed: dataset, method, settings, training, caches, …"""
        return self.folder.config()

    @property
    def metrics(self) -> pd.DataFrame:
        """All evaluations so far: one row each ("val", "test", "val@draws=8"), one column per metric, in percent."""
        import pandas as pd

        from pipeline.evaluation.evaluate import read_metrics

        records = {name: record["metrics"] for name, record in read_metrics(self.folder).items()}
        return pd.DataFrame.from_dict(records, orient="index")

    @property
    def history(self) -> pd.DataFrame:
        """One row per epoch: phase, epoch (from 0), lr, mean loss and its parts; val_metric (percent) and val_loss, else NaN.

        An epoch that tried a candidate, such as a k of knn, has its number in "candidate", and no lr and loss.

        Raises:
            UserError: no epoch has finished yet.
        """
        import pandas as pd

        path = self.path / "history.csv"
        if not path.is_file():
            raise UserError(f"{path} is missing: no epoch has finished yet")
        return pd.read_csv(path)

    def evaluate(self, split: str = "val", **overrides: Any) -> dict[str, float]:
        """Return the metrics on a split, in percent, from image features alone; what was computed before is read.

        Every read of "test" is logged in the run's folder: choose settings on "val".

        Args:
            split: "train", "val" or "test".
            overrides: Settings of prediction, by name, alias or the papers' letter, such as draws=8; settings of training are
                refused.

        Raises:
            UserError: the run has not finished, or there is no such split or setting.
        """
        from pipeline.evaluation.evaluate import evaluate
        from pipeline.types import SPLITS

        if split not in SPLITS:
            raise unknown_choice(split, f"unknown split {split!r}", SPLITS)
        return dict(evaluate(self.home, self.folder, split, overrides)["metrics"])

    def predictions(self, split: str = "val", **overrides: Any) -> pd.DataFrame:
        """Return the prediction for each of the N samples of a split, in the order of the manifest.

        Samples without image feature have none, and are left out.

        Args:
            split: As in `evaluate`, which is called first.
            overrides: As in `evaluate`.

        Returns:
            N rows. Columns: sample_id; label, the true class index, or a tuple of them for multi-label data; predicted, the
            class index with the largest logit; and two columns per class, "logit <class name>" and "score <class name>",
            float32. `frame.filter(like="logit ").to_numpy()` gives the logits [N,C], which rank the classes of one sample.
            Scores may be compared across samples: exp(score) is the confidence in the class, by softmax, or by sigmoid for
            heads that were trained on multi-label data with label_loss=bce.
        """
        import numpy as np
        import pandas as pd

        from pipeline.data.manifest_files import read_manifest
        from pipeline.evaluation.evaluate import apply_overrides, evaluation_name
        from pipeline.evaluation.scores import log_scores

        self.evaluate(split, **overrides)
        config = self.config
        _, changes = apply_overrides(config, overrides)
        class_names = read_manifest(self.home, config.dataset).class_names
        with np.load(self.path / f"predictions-{evaluation_name(split, changes)}.npz") as arrays:
            ids, logits, label = (arrays[key] for key in ("ids", "logits", "label"))
        labels = label if label.ndim == 1 else [tuple(np.flatnonzero(row).tolist()) for row in label]
        table = pd.DataFrame({"sample_id": ids, "label": labels, "predicted": logits.argmax(axis=1)})
        scores = log_scores(logits, label, config.label_loss).astype(np.float32)
        named = {"logit": logits, "score": scores}
        parts = [pd.DataFrame(values, columns=[f"{kind} {name}" for name in class_names]) for kind, values in named.items()]
        return pd.concat([table, *parts], axis=1)

    def predict(self, paths: str | Path | Sequence[str | Path], top: int = 5, workers: int = -1) -> pd.DataFrame:
        """Classify new pictures or clips. No text is read, and no home is needed: a run carries what it takes.

        The probabilities are calibrated on the validation split; `frame.attrs["calibration"]` says how. Random numbers of heads
        that sample depend on the content of a file, not on its name or on the other files.

        Args:
            paths: Files, folders, patterns such as "photos/**/*.jpg", or several of them.
            top: How many of the most probable classes are told.
            workers: Processes that read files; -1: one per core, 0: only this process.

        Returns:
            One row per file, in the order of the paths. Columns: file; class_1, probability_1 (0..1), class_2, …, up to `top`
            or the number of classes; error, why a file could not be read, with None for its classes; else "".

        Raises:
            UserError: a folder or a pattern has no file, the run has not finished, or the encoder's weights are not found.
        """
        import pandas as pd

        from pipeline.data.media_files import find_media
        from pipeline.evaluation.classify import Classifier
        from pipeline.evaluation.prediction_files import prediction_columns, prediction_rows

        files = find_media([paths] if isinstance(paths, str | Path) else paths)
        classifier = Classifier.of(self.folder, self.home)
        class_names = classifier.spec.class_names
        columns = prediction_columns("file", len(class_names), top)
        results = classifier.classify_files(files, workers)
        table = pd.DataFrame(
            [row for each in results for row in prediction_rows(each, class_names, columns)], columns=list(columns)
        )
        table.attrs["calibration"] = classifier.calibration.describe()
        return table

    @property
    def folder(self) -> RunFolder:
        """The folder with its files, as the stages take it."""
        return RunFolder.at(self.path)


def load_run(path: str | Path, home: str | Path | None = None) -> Run:
    """Return the run in a folder …/runs/<dataset>/<method>-<fingerprint12>/seed<k>.

    Args:
        path: The folder of the run.
        home: The folder that has the manifest and the caches; None: the one that the run lies in. A run that was copied without
            its home can still `predict`.

    Raises:
        UserError: the folder holds no run.
    """
    folder = RunFolder.at(Path(path).absolute())
    above = folder.path.parents
    return Run(Path(home).absolute() if home else above[min(3, len(above) - 1)], folder.path)


def list_runs(home: Path, dataset: str) -> Runs:
    """Return all runs of a dataset, finished or not."""
    return Runs(home, dataset, tuple(Run(home, folder.path) for folder in find_runs(home, dataset)))


@dataclass(frozen=True)
class Runs(Sequence[Run]):
    """Runs of one dataset, sorted by name and seed: a sequence of `Run`, with a table of all and comparisons."""

    home: Path
    dataset: str
    items: tuple[Run, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def table(self) -> pd.DataFrame:
        """One row per run. Columns: name, method, seed, done, and "<split> <metric>" of its own evaluations, in percent.

        The method of a diagnostic that reads test texts in place of images is told in words.
        """
        import pandas as pd

        return pd.DataFrame([self._row(run) for run in self.items])

    @staticmethod
    def _row(run: Run) -> dict[str, Any]:
        from pipeline.report.results import name_head

        evaluations = run.metrics.to_dict(orient="index")
        scores = {f"{name} {metric}": value for name, row in evaluations.items() for metric, value in row.items()}
        own = {key: value for key, value in scores.items() if not {"@", "~"} & set(key)}  # with other settings, or corrupted
        return {"name": run.name, "method": name_head(run.home, run.config), "seed": run.seed, "done": run.is_done, **own}

    def _repr_html_(self) -> str:
        return str(self.table.to_html())

    def compare(self, first: str, *others: str, split: str = "val") -> pd.DataFrame:
        """Compare heads on the same samples: the first with each of the others, by a paired bootstrap on two levels.

        Seeds are drawn anew as well as samples (groups of samples where the data have groups), as in the report. An interval
        takes three seeds of both heads, a verdict five. Finished runs that lack an evaluation on the split are evaluated.

        Args:
            first: `Run.name` of a head, "seda-1f…", a beginning of it that fits no other head, its tag, or "latest".
            others: The same, of at least one other head.
            split: "val"; or "test" once all choices are made, because its reads are logged.

        Returns:
            One row per pair and metric. Columns: a, b (names); metric; a_mean, b_mean (percent); difference, low, high (a - b
            in points, with its 95 % interval); p_holm (p-value, adjusted for the number of pairs); verdict; a_seeds, b_seeds
            (numbers of seeds).

        Raises:
            UserError: a name fits no head or several, or two heads were evaluated on different samples.
        """
        from pipeline.report.pairs import compare_pairs
        from pipeline.types import SPLITS

        if split not in SPLITS:
            raise unknown_choice(split, f"unknown split {split!r}", SPLITS)
        names = [self._find_head(name) for name in (first, *others)]
        for run in self.items:
            if others and run.is_done and run.name in names:
                run.evaluate(split)
        return compare_pairs(self.home, self.dataset, names, split)

    def _find_head(self, name: str) -> str:
        """Return the name of the head that a word means. Nothing is evaluated: reads of "test" are logged."""

        def describe(head: HeadFolder) -> str:
            from pipeline.report.results import name_head

            label = name_head(self.home, head.runs[0].config())
            return head.name if head.name.startswith(f"{label}-") else f"{head.name} ({label})"

        head = find_head(self.home, name, self.dataset, describe)
        if not head.finished:
            raise UserError(f"{head.name} has no finished run: run its command again to complete it")
        return head.name


def train_runs(home: Path, heads: Sequence[HeadPlan], name: str, log: Sequence[str | MakeTracker]) -> Runs:
    """Train the seeds of a head one after another, evaluate each on validation, and return the runs.

    Args:
        home: the folder of all artifacts.
        heads: the plans of the seeds.
        name: the head gets this tag, which no other head has; "": none.
        log: see `find_tracker`.

    Raises:
        UserError: another head has the name, there is no such tracker, or a run fails.
    """
    from pipeline.training.earlier_runs import log_earlier_runs
    from pipeline.training.heads import train_head
    from pipeline.training.tracking import find_tracker

    head = HeadFolder(heads[0].run.path.parent)
    if name:
        check_name_is_free(home, name, head)
    trackers = [find_tracker(word) for word in log]
    log_earlier_runs(heads)
    runs = Runs(home, head.dataset, tuple(Run(home, train_head(each, True, trackers=trackers).path) for each in heads))
    for run in runs:
        run.evaluate("val")
    if name:
        head.change_tags(add=[name])
    return runs
