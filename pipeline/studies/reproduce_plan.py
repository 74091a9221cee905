"""The plan of a paper's table: which runs its rows are, which features they read, and which rows cannot be had and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.reader import Cache, find_cache, find_caches
from pipeline.data.artefacts import Artefact, PaperRow
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import load_dataset_spec, read_manifest
from pipeline.encoders._factory import build_encoder, encoder_identity, with_absolute_paths
from pipeline.report.results import BASELINE
from pipeline.runtime import plugins
from pipeline.runtime.assignments import parse_assignments
from pipeline.runtime.choices import unknown_choice
from pipeline.runtime.errors import UserError, is_bug
from pipeline.runtime.files import canonical_json
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.settings import configure, find_settings
from pipeline.studies.backbones import BACKBONES
from pipeline.training.config import TrainConfig
from pipeline.training.features import cache_names, open_features
from pipeline.training.heads import HeadPlan, plan_head_on, resolve_head_settings
from pipeline.training.joint.finetune import finetune, joint_run, resolve_joint_settings
from pipeline.training.joint.plan import JointConfig, JointOptions
from pipeline.training.tuned import has_tuned
from pipeline.types import Split

WEIGHTS_WORDS = ("pretrained", "random")
HEAD_PRESET = "head"  # of methods without tuned settings, if no preset is named
Heads = Mapping[int, HeadPlan]  # by seed


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """What a user decides about a reproduction."""

    seeds: tuple[int, ...]
    preset: str = ""  # head, paper or tuned; "": tuned for every method that has such settings, else head
    training: Mapping[str, Any] = field(default_factory=dict)  # settings of `TrainConfig`, of every head
    joint_training: Mapping[str, Any] = field(default_factory=dict)  # the same, of joint training
    sampling: Mapping[str, Any] = field(default_factory=dict)  # settings of methods that sample, in place of the presets'
    image: str = ""  # the cache of the image features; "": that of the dataset's image encoder
    text: str = ""  # the cache of the text features; "": that of the dataset's text encoder
    backbones: Mapping[str, str] = field(default_factory=dict)  # key of `BACKBONES` -> a cache, weights, or ENCODER,KEY=VALUE,…
    tunes_backbones: bool = True  # whether these are tuned with a baseline first, each seed by itself; else they stay frozen
    split: Split = "test"  # what the table shows
    workers: int = -1  # see `num_processes`
    scheduler: str = "local"

    def settings_of(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a row with those of sampling, where the method has them."""
        config = plugins.get("methods", method).Config
        return {**{name: value for name, value in self.sampling.items() if find_settings(config, name)}, **settings}

    @property
    def joint_options(self) -> JointOptions:
        """How joint training is carried out."""
        return JointOptions(workers=self.workers)


@dataclass(frozen=True, kw_only=True)
class NamedBackbone:
    """An image encoder that the user has named for one of the paper's."""

    name: str  # the paper's, as the tables call it
    cache: str  # folder name of its features; "" if they are not extracted yet
    encoder: str = ""  # the encoder that makes them
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """One row of a table: the heads to train, or why there are none."""

    row: PaperRow
    preset: str = ""
    features: str = ""  # the image features, for readers
    heads: Heads = field(default_factory=dict)
    joint: str = ""  # the encoders that are trained with its own heads, image or both; "": none
    is_waiting: bool = False  # its heads can be planned when the backbone is extracted or tuned
    reason: str = ""  # why the row cannot be had


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """All rows of a table, and the baselines with which backbones are tuned."""

    artefact: Artefact
    manifest: Manifest
    rows: tuple[RowPlan, ...]
    bases: Mapping[str, Heads]  # by backbone
    to_extract: tuple[NamedBackbone, ...]

    def heads(self) -> list[HeadPlan]:
        """Return all heads of stage 2 that are planned, each once."""
        planned = [heads for heads in (*self.bases.values(), *(row.heads for row in self.rows))]
        return list({head.run.path: head for heads in planned for head in heads.values()}.values())

    def joint_jobs(self) -> list[tuple[HeadPlan, str]]:
        """Return each head that is trained on with its encoders, and which they are: image or both."""
        jobs = {(head.run.path, "image"): head for heads in self.bases.values() for head in heads.values()}
        for row in self.rows:
            jobs |= {(head.run.path, row.joint): head for head in row.heads.values() if row.joint}
        return [(head, unfreeze) for (_, unfreeze), head in jobs.items()]


def joint_config(unfreeze: str) -> JointConfig:
    """Return how a row's encoders are trained."""
    return JointConfig(train=unfreeze)


def tune_encoders(home: Path, head: HeadPlan, unfreeze: str, options: ReproduceOptions) -> RunFolder:
    """Train a finished head on together with its encoders, and return the better run on validation of the two."""
    training = resolve_joint_settings(head.run, options.joint_training)
    return finetune(home, head.run, joint_config(unfreeze), training, options.joint_options).run


def find_joint_run(home: Path, head: HeadPlan, unfreeze: str, options: ReproduceOptions) -> RunFolder | None:
    """Return the joint run that `tune_encoders` makes, finished or not; None before the head is trained."""
    if not head.run.is_done:
        return None
    return joint_run(home, head.run, joint_config(unfreeze), resolve_joint_settings(head.run, options.joint_training))


def is_tuned(home: Path, head: HeadPlan, unfreeze: str, options: ReproduceOptions) -> bool:
    """Whether `tune_encoders` has nothing to train."""
    run = find_joint_run(home, head, unfreeze, options)
    return run is not None and run.is_done


def choose_preset(home: Path, dataset: str, method: str, preset: str) -> str:
    """Return the preset of a method: the one that is named, else "tuned" where there are such settings, else "head"."""
    return preset or ("tuned" if has_tuned(dataset, method, home) else HEAD_PRESET)


def plan_heads(
    home: Path,
    dataset: str,
    method: str,
    settings: Mapping[str, Any],
    image: Mapping[int, str] | str,
    options: ReproduceOptions,
) -> Heads:
    """Plan a head for every seed, and build those that are to be trained once, so that bad settings are found now.

    Args:
        home: The folder of all caches and runs.
        dataset: The name of a prepared dataset.
        method: The name of a method.
        settings: Its settings; they replace those of the preset.
        image: The cache of the image features, for all seeds or by seed; "": that of the dataset's encoder.
        options: The other settings, and the seeds.

    Raises:
        UserError: there is no such method or setting, or its features are missing.
    """
    preset = choose_preset(home, dataset, method, options.preset)
    config, training = resolve_head_settings(
        dataset, method, preset, options.settings_of(method, settings), options.training, home
    )
    heads = {}
    for seed in options.seeds:
        names = cache_names(home, dataset, image if isinstance(image, str) else image[seed], options.text)
        heads[seed] = plan_head_on(open_features(home, dataset, method, names), method, config, training, seed)
    new = next((head for head in heads.values() if not head.run.is_done), None)
    if new:
        _try_to_build(new)
    return heads


def _try_to_build(head: HeadPlan) -> None:
    """Build a head, so that settings that do not fit the features are found; a bug is met again and recorded in training."""
    try:
        with torch.random.fork_rng([]):
            plugins.get("methods", head.config.method)(head.settings, head.features.shapes)
    except Exception as error:
        if not is_bug(error):
            raise


def plan_table(home: Path, dataset: str, artefact: Artefact, options: ReproduceOptions) -> TablePlan:
    """Plan the rows of a table. Nothing is trained or extracted, and the plan grows when something has been.

    Raises:
        UserError: the dataset is not prepared, an option is wrong, or the base row cannot be had.
    """
    manifest = read_manifest(home, dataset)
    configure(TrainConfig, options.training)  # a mistake here is no reason why single rows are missing
    backbones = {each.name: each for each in _resolve_backbones(home, manifest, artefact, options)}
    bases = {}
    if options.tunes_backbones:
        used = {row.backbone or artefact.backbone for row in artefact.rows if not _missing_method(row.method)}
        bases = {
            name: plan_heads(home, dataset, BASELINE, {}, each.cache, options)
            for name, each in backbones.items()
            if each.cache and name in used
        }
    plan = partial(_plan_row, home, dataset, artefact, options, backbones, bases)
    rows = tuple(map(plan, artefact.rows))
    base = next(row for row in rows if row.row.title == artefact.base)
    if base.reason:
        raise UserError(f"{artefact.name}: without its row {artefact.base} there is nothing to compare with: {base.reason}")
    to_extract = tuple(each for each in backbones.values() if not each.cache)
    return TablePlan(artefact=artefact, manifest=manifest, rows=rows, bases=bases, to_extract=to_extract)


def _missing_method(method: str) -> bool:
    return method not in plugins.names("methods")


def _plan_row(
    home: Path,
    dataset: str,
    artefact: Artefact,
    options: ReproduceOptions,
    backbones: Mapping[str, NamedBackbone],
    bases: Mapping[str, Heads],
    row: PaperRow,
) -> RowPlan:
    if _missing_method(row.method):
        return RowPlan(row=row, reason=f"there is no method {row.method}")
    if row.backbone and row.backbone not in backbones:
        remedy = f"name a cache or an encoder with weights: --backbone {row.backbone}=…"
        return RowPlan(row=row, reason=f"there is no {row.backbone} at hand; {remedy}")
    backbone = backbones.get(row.backbone or artefact.backbone)
    preset = choose_preset(home, dataset, row.method, options.preset)
    try:
        if not backbone:
            image = options.image or load_dataset_spec(home, dataset)["encoders"]["image"]
            features = find_cache(home, read_manifest(home, dataset), image).path.name
            heads = plan_heads(home, dataset, row.method, row.settings, features, options)
            return RowPlan(row=row, preset=preset, features=features, heads=heads, joint=row.unfreeze)
        if not backbone.cache:
            return RowPlan(row=row, preset=preset, features=backbone.encoder, is_waiting=True)
        if backbone.name not in bases:
            heads = plan_heads(home, dataset, row.method, row.settings, backbone.cache, options)
            return RowPlan(row=row, preset=preset, features=backbone.cache, heads=heads, joint=row.unfreeze)
        features = f"{backbone.cache}, tuned with the {BASELINE} of each seed"
        plan = RowPlan(row=row, preset=preset, features=features)
        return _plan_tuned_row(home, dataset, options, plan, bases[backbone.name])
    except UserError as error:
        return RowPlan(row=row, preset=preset, reason=str(error))


def _plan_tuned_row(home: Path, dataset: str, options: ReproduceOptions, plan: RowPlan, bases: Heads) -> RowPlan:
    """Plan a row on the encoders that the baselines of its backbone have tuned, one per seed."""
    if plan.row.method == BASELINE and not plan.row.settings:  # the tuned baseline is the row itself
        return replace(plan, heads=bases, joint="image")
    if not all(is_tuned(home, head, "image", options) for head in bases.values()):
        return replace(plan, is_waiting=True)
    image = {seed: tune_encoders(home, head, "image", options).config().caches["image"] for seed, head in bases.items()}
    heads = plan_heads(home, dataset, plan.row.method, plan.row.settings, image, options)
    return replace(plan, heads=heads, joint=plan.row.unfreeze)


def _resolve_backbones(
    home: Path, manifest: Manifest, artefact: Artefact, options: ReproduceOptions
) -> Iterator[NamedBackbone]:
    """Yield the encoders that the user has named for the paper's.

    Raises:
        UserError: the paper has no such backbone, or there is no such cache or encoder.
    """
    known = list(dict.fromkeys([artefact.backbone, *(row.backbone for row in artefact.rows if row.backbone)]))
    if options.image and artefact.backbone in options.backbones:
        raise UserError(f"--image and --backbone {artefact.backbone}=… name the same features: give one of them")
    for name, place in options.backbones.items():
        if name not in known:
            raise unknown_choice(name, f"{artefact.name} has no backbone {name!r}", known)
        yield _resolve_backbone(home, manifest, name, place)


def _resolve_backbone(home: Path, manifest: Manifest, name: str, place: str) -> NamedBackbone:
    folder = Path(place)
    caches = find_caches(home, manifest.dataset)
    wanted = folder.name if (folder / "zarr.json").is_file() else place
    encoder, *pairs = place.split(",")
    if place in WEIGHTS_WORDS or (folder.exists() and wanted == place):  # weights for the encoder that this backbone has
        known = BACKBONES[name]
        encoder, pairs = known.encoder, [*(f"{key}={value}" for key, value in known.settings.items()), f"weights={place}"]
    if wanted not in plugins.names("encoders") and not pairs:
        return NamedBackbone(name=name, cache=find_cache(home, manifest, wanted).path.name)
    plugins.check_name("encoders", encoder)
    settings = with_absolute_paths(parse_assignments(pairs, "--backbone"))
    config = configure(plugins.get("encoders", encoder).Config, settings)
    chosen = {
        each.name: str(getattr(config, each.name)) for each in fields(config) if getattr(config, each.name) != each.default
    }
    complete = [path.name for path in caches if _is_complete(home, manifest, path.name, encoder, chosen)]
    if len(complete) > 1:
        raise UserError(f"several caches fit --backbone {name}={place} ({', '.join(complete)}); give the name of one of them")
    return NamedBackbone(name=name, cache="".join(complete), encoder=encoder, settings=settings)


def _is_complete(home: Path, manifest: Manifest, folder: str, encoder: str, settings: Mapping[str, str]) -> bool:
    """Whether an encoder with these settings has made all of a cache from this manifest."""
    if folder.rpartition("-")[0] != encoder:
        return False
    try:
        cache = find_cache(home, manifest, folder)
    except UserError:
        return False
    return dict(cache.provenance.get("settings", {})) == settings and _has_weights_of(cache, encoder, settings)


def _has_weights_of(cache: Cache, encoder: str, settings: Mapping[str, str]) -> bool:
    """Whether a file of weights is still the one whose features a cache has: another one may have taken its place."""
    if not Path(settings.get("weights", "")).is_absolute():
        return True
    identity = encoder_identity(encoder, build_encoder(encoder, settings))
    return json.loads(canonical_json(identity)) == cache.identity["encoder"]
