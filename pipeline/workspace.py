"""The public API: a home folder as an object, whose methods are the stages. What a notebook needs, and what the commands call.

Stages are imported when they are used, so that `import pipeline` and `Workspace(…)` take no time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.runtime.assignments import merge_settings, setting_text
from pipeline.runtime.head_names import find_run
from pipeline.runtime.places import Address, check_local, parse_place
from pipeline.runtime.plugins import load_file
from pipeline.studies.runs import Run, Runs, list_runs, load_run, train_runs

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.cache.arrays import Features
    from pipeline.cache.layout import StoreDtype
    from pipeline.cache.reader import Cache
    from pipeline.data.manifest import Manifest
    from pipeline.data.prepare import PrepareReport
    from pipeline.studies.grid import PrecisionChoice
    from pipeline.studies.search import GridResult, GridStrategy
    from pipeline.training.joint.finetune import FinetuneResult
    from pipeline.training.tracking import MakeTracker

Aggregate = Literal["", "mean", "first", "random"]
NO_SETTINGS: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Workspace:
    """A home folder with manifests, feature caches, runs, grids and reports; every stage is a method.

    Nothing is computed twice: a method that is called again with the same arguments reads what is there, and goes on where it
    was interrupted. Settings of plug-ins are keyword arguments, by their names or by the papers' letters: T=1200, gamma=1.5;
    or a mapping, `settings={"T": 1200}`. A mistake that you can mend is a `UserError`.
    """

    home: Path

    def __init__(self, home: str | Path = "artifacts", *, plugins: str | Path | Sequence[str | Path] = ()) -> None:
        """Open a home; the folder is created when something is written to it.

        Args:
            home: Its path.
            plugins: A file or files with methods, encoders or datasets of your own, such as examples/own_method.py.
        """
        object.__setattr__(self, "home", check_local(home, "the home"))
        for path in [plugins] if isinstance(plugins, str | Path) else plugins:
            load_file(Path(path))

    def prepare(
        self,
        dataset: str,
        root: str | Path | Address | None = None,
        *,
        name: str | None = None,
        image_root: str | Path | None = None,
        verify_media: bool = False,
        overwrite: bool = False,
        settings: Mapping[str, Any] = NO_SETTINGS,
        **more_settings: Any,
    ) -> PrepareReport:
        """Build and check the manifest of a dataset from its official files: one row per sample.

        Args:
            dataset: A dataset plug-in: "openmoji", …; "table" for data of your own. Or a prepared dataset's name: do it again.
            root: Folder of the official files, for `webdataset` also s3://…; None: packaged or fetched ones, else the last.
            name: Another name for the dataset in this home, which then holds several; everything takes this name then.
            image_root: Folder of the media, when it is not below `root`.
            verify_media: Decode every file once.
            overwrite: Replace a dataset of this name that was built from other files.
            settings: What `diffalign datasets NAME` lists, as a mapping.
            more_settings: The same as keyword arguments: label_column="species", splits=(80, 10, 10) in percent.

        Returns:
            The path of the manifest, its fingerprint, the counts beside the published ones, and warnings.

        Raises:
            UserError: names file and line, or what is missing and the remedy.
        """
        from pipeline.data.prepare import prepare

        return prepare(
            dataset,
            parse_place(root) if root else None,
            self.home,
            {key: setting_text(value) for key, value in merge_settings(settings, more_settings).items()},
            name=name or "",
            image_root=Path(image_root) if image_root else None,
            verify_media=verify_media,
            overwrite=overwrite,
            progress=True,
        )

    def manifest(self, dataset: str) -> Manifest:
        """Return the manifest of a prepared dataset: its samples, class names and splits."""
        from pipeline.data.manifest_files import read_manifest

        return read_manifest(self.home, dataset)

    def extract(
        self,
        dataset: str,
        encoder: str | Sequence[str] = (),
        *,
        batch_size: int = 0,
        workers: int = -1,
        shard_rows: int = 0,
        max_failures: float = 0.05,
        retry_failed: bool = False,
        store_dtype: StoreDtype = "float16",
        compiled: bool = False,
        scheduler: str = "local",
        gpus: Sequence[int] = (),
        settings: Mapping[str, Any] = NO_SETTINGS,
        **more_settings: Any,
    ) -> dict[str, Cache]:
        """Stage 1: run encoders once over a dataset, and store the features.

        Args:
            dataset: A prepared dataset.
            encoder: One encoder or several; (): the dataset's image encoder, and its text encoder if it has texts.
            batch_size: Items per batch of a new cache; 0: 16, or up to 256 on a GPU.
            workers: Processes; -1: one per core, 0: only this process.
            shard_rows: Rows per shard, a multiple of 512; 0: 8192, of clips 512.
            max_failures: Share of samples that may be undecodable, 0..1.
            retry_failed: Try samples again that could not be decoded.
            store_dtype: Number format on disk.
            compiled: Run the encoder through torch.compile; this makes another cache.
            scheduler: "local", or the address of a dask scheduler, "tcp://host:port".
            gpus: Numbers of GPUs of this machine to use together.
            settings: The settings of the encoder, when there is only one, as a mapping.
            more_settings: The same as keyword arguments: width=32.

        Returns:
            The complete caches by encoder name.

        Raises:
            UserError: there is no such encoder or setting, the dataset is not prepared, or too many samples fail.
        """
        from pipeline.cache.reader import open_cache
        from pipeline.extraction.distributed import dispatch_extraction
        from pipeline.extraction.extract import ExtractOptions
        from pipeline.extraction.inputs import check_encoders, default_encoders

        given = {key: setting_text(value) for key, value in merge_settings(settings, more_settings).items()}
        chosen = [encoder] if isinstance(encoder, str) else list(encoder)
        chosen = chosen or default_encoders(self.home, self.manifest(dataset))
        check_encoders(chosen, given)
        options = ExtractOptions(
            batch_size=batch_size, workers=workers, shard_rows=shard_rows, max_failures=max_failures, retry_failed=retry_failed
        )
        return {
            name: open_cache(
                dispatch_extraction(scheduler, gpus, self.home, dataset, name, given, store_dtype, compiled, options)
            )
            for name in chosen
        }

    def cache(self, dataset: str, encoder: str) -> Cache:
        """Return a feature cache of a dataset; it is read by sample id.

        Args:
            dataset: A prepared dataset.
            encoder: "image" or "text" for the dataset's own encoders; or an encoder, a cache's folder name or fingerprint.

        Raises:
            UserError: no cache fits, or several do; the message names the choices.
        """
        from pipeline.cache.reader import find_cache
        from pipeline.data.manifest_files import load_dataset_spec

        name = load_dataset_spec(self.home, dataset)["encoders"][encoder] if encoder in ("image", "text") else encoder
        return find_cache(self.home, self.manifest(dataset), name)

    def features(
        self, dataset: str, encoder: str, split: str | None = None, *, aggregate: Literal["", "mean", "first"] = ""
    ) -> Features:
        """Return features with ids, labels and splits, in the order of the manifest; rows without feature are NaN and marked.

        Several texts of a sample become one row, as the heads read them: their mean, or the first, as the dataset says. Where
        training draws another text in each epoch ("random"), this is the mean. `Workspace.cache(…).read_rows(ids)` gives all.

        Args:
            dataset: A prepared and extracted dataset.
            encoder: As in `cache`.
            split: "train", "val" or "test"; None: all samples.
            aggregate: "mean" or "first", instead of what the dataset says.

        Returns:
            ids; labels, class indices int64 [N] or indicators float32 [N,C]; split [N]; array, float32 [N, *shape];
            is_present, bool [N]; and `to_torch()`, a `torch.utils.data.Dataset` of the rows that are present.
        """
        from pipeline.cache.arrays import read_features

        return read_features(self.manifest(dataset), self.cache(dataset, encoder), split or "", aggregate)

    def train_head(
        self,
        dataset: str,
        method: str,
        *,
        seed: int = 0,
        preset: str = "head",
        train: Mapping[str, Any] = NO_SETTINGS,
        image: str = "",
        text: str = "",
        aggregate: Aggregate = "",
        fraction: float = 1.0,
        name: str = "",
        log: Sequence[str | MakeTracker] = (),
        settings: Mapping[str, Any] = NO_SETTINGS,
        **more_settings: Any,
    ) -> Run:
        """Stage 2: train a head on cached features, and score it on validation.

        Args:
            dataset: A prepared and extracted dataset.
            method: the name of a method, such as "seda" (`diffalign methods` lists them), or your own.
            seed: 0 .. 2^63 - 1.
            preset: "head" (lr 1e-3), "paper" (lr 1e-4, the paper's settings), or "tuned" (of `diffalign tune`, or shipped).
            train: Settings of training, such as {"epochs": 20, "lr": 1e-3}; see `TrainConfig`.
            image: Cache of the image features, as in `cache`; "": the dataset's image encoder.
            text: Cache of the text features; "": the dataset's text encoder. Or a control that training reads instead: texts
                of other samples with the same labels ("shuffled-within") or of any ("shuffled-across"), Gaussian "noise" with
                the texts' mean and variance, or the "label"; "CACHE:noise" names both.
            aggregate: How several texts of a sample become one vector; "": as the dataset says.
            fraction: The share of each class of the training split to train on; the samples of a smaller share are in a larger.
            name: A name for the head, which no other head has; `diffalign runs tag` gives more.
            log: Who is told the epochs as they come: "tensorboard", or classes of your own, see `training.tracking.Tracker`.
            settings: Settings of the method, by name (of a part: "ema.tau"), alias or the papers' letter, as a mapping.
            more_settings: The same as keyword arguments: T=1200, gamma=1.5.

        Raises:
            UserError: a name or a setting is wrong, features are missing, or the training diverges.
        """
        caches: dict[str, Any] = {"image": image, "text": text, "aggregate": aggregate, "fraction": fraction}
        given = merge_settings(settings, more_settings)
        more: dict[str, Any] = {"preset": preset, "train": train, "name": name, "log": log, **caches}
        return self.train_heads(dataset, method, seeds=(seed,), **more, settings=given)[0]

    def train_heads(
        self,
        dataset: str,
        method: str,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        preset: str = "head",
        train: Mapping[str, Any] = NO_SETTINGS,
        image: str = "",
        text: str = "",
        aggregate: Aggregate = "",
        fraction: float = 1.0,
        name: str = "",
        log: Sequence[str | MakeTracker] = (),
        settings: Mapping[str, Any] = NO_SETTINGS,
        **more_settings: Any,
    ) -> Runs:
        """Train one head per seed on features that are opened once; see `train_head` for the arguments."""
        from pipeline.training.features import cache_names, open_features
        from pipeline.training.heads import plan_head_on, resolve_head_settings

        config, training = resolve_head_settings(
            dataset, method, preset, merge_settings(settings, more_settings), train, self.home
        )
        names = cache_names(self.home, dataset, image, text)
        features = open_features(self.home, dataset, method, names, aggregate, fraction)
        features.warn_about_images()
        heads = [plan_head_on(features, method, config, training, seed) for seed in seeds]
        return train_runs(self.home, heads, name, log)

    def grid(
        self,
        dataset: str,
        method: str,
        axes: Mapping[str, Any] = NO_SETTINGS,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        points: int = 0,
        preset: str = "head",
        train: Mapping[str, Any] = NO_SETTINGS,
        search: Literal["all", "optuna"] = "all",
        precision: PrecisionChoice | None = None,
        read_test: bool = True,
        workers: int = -1,
        scheduler: str = "local",
        strategy: GridStrategy = "auto",
        max_ensemble_size: int = 0,
        image: str = "",
        text: str = "",
        aggregate: Aggregate = "",
        settings: Mapping[str, Any] = NO_SETTINGS,
        **more_settings: Any,
    ) -> GridResult:
        """Train all combinations of some settings, rank them on validation, and evaluate the winner on test.

        Args:
            dataset: As in `train_head`, like all arguments that are not named here.
            method: The method of all cells.
            axes: Values to try by setting, such as {"T": [900, 1200], "lr": 1e-3}; {}: the grid of the method's paper.
            seeds: The seeds of every cell.
            points: Number of random cells to try; 0: all.
            search: "optuna" stops bad cells early (successive halving).
            precision: "float32", "mixed" (bfloat16 products) or "auto" (mixed where there is hardware); None: as `train` says.
            read_test: Whether the winner may read the test split.
            workers: Processes; -1: one per core, 0: only this process.
            scheduler: "local", or the address of a dask scheduler, "tcp://host:port".
            strategy: "processes" trains every run alone, "stacked" runs of one structure as one model; "auto": on GPUs.
            max_ensemble_size: Runs of one model at most; 0: as memory allows.

        Returns:
            ranking, a table with one row per cell; winner; failed, run -> reason; folder, which has the page index.html.
        """
        from pipeline.report.grid_page import write_grid_page
        from pipeline.studies.grid import plan_grid, read_axes
        from pipeline.studies.search import run_grid

        caches: dict[str, Any] = {"image": image, "text": text, "aggregate": aggregate}
        given = {"settings": merge_settings(settings, more_settings), "training": train}
        options: dict[str, Any] = {"preset": preset, "points": points, "precision": precision, "search": search}
        planned = plan_grid(self.home, dataset, method, read_axes(method, axes), seeds, **given, **options, **caches)
        result = run_grid(planned, scheduler, workers, read_test, strategy, max_ensemble_size)
        write_grid_page(result.folder)
        return result

    def finetune(
        self,
        run: Run | str | Path,
        *,
        unfreeze: str = "image",
        encoder_lr: float = 5e-5,
        layer_decay: float = 1.0,
        augment: bool = False,
        train: Mapping[str, Any] = NO_SETTINGS,
        accumulate: int = 1,
        checkpointing: bool = False,
        fast: bool = False,
        compile_encoders: bool = False,
        workers: int = -1,
        log: Sequence[str | MakeTracker] = (),
    ) -> FinetuneResult:
        """Stage 3: train the encoders together with a head of stage 2, and extract the tuned encoders' features.

        Args:
            run: The finished run to start from, or its folder.
            unfreeze: "image", "text", "both", "last:K" (the image encoder's last K blocks); "none": the head alone, a control.
            encoder_lr: Learning rate of the encoders.
            layer_decay: Factor of that rate per block towards the input, 0..1.
            augment: Random crops and mirrored images in training.
            train: Settings of training, such as {"epochs": 3}.
            accumulate: Parts in which a batch goes through the encoders; more need less memory.
            checkpointing: Recompute blocks in the backward pass, to need less memory.
            fast: A GPU may take kernels whose last bits differ from run to run.
            compile_encoders: Run whole encoders through torch.compile in training.
            workers: Processes that decode media; -1: one per core, 0: only this process.
            log: As in `train_head`.

        Returns:
            run, the folder of the better run on validation (`load_run(result.run.path)`); metric with its values before and
            after, in percent; weights, the files of the tuned encoders.
        """
        from pipeline.runtime.settings import configure
        from pipeline.training.joint.finetune import finetune, resolve_joint_settings
        from pipeline.training.joint.plan import JointConfig, JointOptions
        from pipeline.training.tracking import find_tracker

        folder = self.run(run).folder
        given = {"train": unfreeze, "encoder_lr": encoder_lr, "layer_decay": layer_decay, "augment": augment}
        how: dict[str, Any] = {"checkpointing": checkpointing, "fast": fast, "compile_encoders": compile_encoders}
        options = JointOptions(accumulate=accumulate, workers=workers, trackers=tuple(map(find_tracker, log)), **how)
        return finetune(self.home, folder, configure(JointConfig, given), resolve_joint_settings(folder, train), options)

    def run(self, run: Run | str | Path) -> Run:
        """Return a run whose manifest and caches are in this home: by its folder, or "HEAD/seed0" as in `diffalign runs ls`."""
        return load_run(run.path if isinstance(run, Run) else find_run(self.home, str(run)).path, self.home)

    def evaluate(self, run: Run | str | Path, split: str = "val", **overrides: Any) -> dict[str, float]:
        """Return the metrics of a run, or of a run's folder, on a split, in percent; see `Run.evaluate`."""
        return self.run(run).evaluate(split, **overrides)

    def report(self, dataset: str, *, across: Sequence[str] = ()) -> tuple[Path, Path]:
        """Write the report on a dataset's runs on test, and a table `across` more datasets; return HTML and Markdown file."""
        from pipeline.report import write_report

        return write_report(self.home, dataset, across=across, progress=True)

    def runs(self, dataset: str) -> Runs:
        """Return all runs of a dataset, finished or not."""
        return list_runs(self.home, dataset)

    def compare(self, dataset: str, first: str, *others: str, split: str = "val") -> pd.DataFrame:
        """Compare heads of a dataset on the same samples; see `Runs.compare`."""
        return self.runs(dataset).compare(first, *others, split=split)
