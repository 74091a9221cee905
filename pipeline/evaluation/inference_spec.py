"""What a run carries to classify new media without its home: the file `predict.json`, and the files of its encoder.

The weights of the head, with the statistics of the features, are in the checkpoint. The encoder is built again by its name and
settings, wherever its weights are found, and has to be the one that made the features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pipeline.cache.reader import Cache, find_cache, identity_differences
from pipeline.data.manifest import Manifest
from pipeline.data.manifest_files import read_manifest
from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import build_encoder, encoder_identity, with_files_of
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import canonical_json, write_atomic
from pipeline.runtime.runs import RunFolder

NO_CHANGES: Mapping[str, str] = MappingProxyType({})
SPEC_FILE = "predict.json"
ENCODER_FOLDER = "encoder"  # in a run: files of its encoder, such as tuned weights, that are on no hub


@dataclass(frozen=True, kw_only=True)
class InferenceSpec:
    """What a trained head needs to know to classify new media, beside its checkpoint and its config."""

    dataset: str
    licence: str  # of the data
    class_names: tuple[str, ...]
    label_kind: Literal["single", "multi"]
    encoder: str  # its name
    encoder_settings: Mapping[str, str]  # those that are not the defaults
    encoder_identity: Mapping[str, Any]  # modality, weights digest, preprocessing, …
    store_dtype: str  # number format that features are rounded to

    @staticmethod
    def of(manifest: Manifest, cache: Cache) -> InferenceSpec:
        """Return the spec of heads that are trained on a cache of image features."""
        return InferenceSpec(
            dataset=manifest.dataset,
            licence=str(manifest.meta.get("licence", "")),
            class_names=manifest.class_names,
            label_kind=manifest.label_kind,
            encoder=cache.identity["encoder"]["name"],
            encoder_settings=cache.provenance.get("settings", {}),
            encoder_identity=cache.identity["encoder"],
            store_dtype=cache.identity["store_dtype"],
        )

    @property
    def is_multi_label(self) -> bool:
        """Whether a sample may have several labels."""
        return self.label_kind == "multi"

    def write(self, run: RunFolder) -> None:
        """Write the spec into a run."""
        write_atomic(run.path / SPEC_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    def build_encoder(self, run: RunFolder, changed: Mapping[str, str] = NO_CHANGES) -> Encoder:
        """Return the encoder of the run, ready to encode new media.

        Args:
            run: the run.
            changed: settings to replace, such as the format that it computes in.

        Raises:
            UserError: the features were not made here from media, the weights are not found, or it has become another encoder.
        """
        if self.encoder_identity.get("modality") == "text":
            raise UserError(f"{run.path} was trained on features of texts, a diagnostic: it cannot classify media")
        if self.encoder not in plugins.names("encoders"):
            raise UserError(
                f"{run.path} was trained on features of {self.encoder}, which were computed elsewhere or by a plug-in: load "
                "that with --plugin, or predict from a cache of such features, --cache"
            )
        settings = with_files_of({**self.encoder_settings, **changed}, run.path / ENCODER_FOLDER)
        encoder = build_encoder(self.encoder, settings)
        found = json.loads(canonical_json(encoder_identity(self.encoder, encoder)))
        for field, wanted, have in self.differences(found):
            raise UserError(f"{run.path} was trained with {field} = {wanted!r}, which is {have!r} here; bring that back")
        return encoder

    def differences(self, encoder_identity: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return (field, value of this run, value there) of every field in which the encoder of other features differs.

        The format that it computes in may differ: another processor rounds in another way.
        """
        found = identity_differences(self.encoder_identity, encoder_identity, "encoder.")
        return [each for each in found if not each[0].endswith("compute_dtype")]


def read_inference_spec(run: RunFolder, home: Path) -> InferenceSpec:
    """Return the spec of a run; runs of earlier versions get theirs from the home, and carry it from then on if possible.

    Raises:
        UserError: the file is damaged, or the run has none, and the home has not what it was trained on.
    """
    path, config = run.path / SPEC_FILE, run.config()
    if path.is_file():
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return _checked_spec(fields, *config.shapes["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and predict once where the home of the run is") from error
    try:
        manifest = read_manifest(home, config.dataset)
        spec = InferenceSpec.of(manifest, find_cache(home, manifest, config.caches["image"]))
    except UserError as error:
        raise UserError(
            f"{run.path} was trained by an earlier version and has no {SPEC_FILE}, and its data are not in {home} ({error}); "
            "predict once where the home of the run is (--home), and copy the run again"
        ) from error
    with suppress(OSError):
        spec.write(run)
    return spec


def _checked_spec(fields: Mapping[str, Any], num_classes: int) -> InferenceSpec:
    """Return the spec of these fields, which may be of others; a ValueError says which is wrong."""
    spec = InferenceSpec(**{**fields, "class_names": tuple(map(str, fields["class_names"]))})
    if len(spec.class_names) != num_classes:
        raise ValueError(f"it names {len(spec.class_names)} classes, and the head has {num_classes}")
    if spec.label_kind not in ("single", "multi"):
        raise ValueError(f"label_kind is {spec.label_kind!r}, neither single nor multi")
    return spec


def carry_encoder_file(run: RunFolder, file: Path) -> None:
    """Put a file of the encoder into the run, so that copies of the run have it: as a second name of the file if possible."""
    target = run.path / ENCODER_FOLDER / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(file, target)
    except OSError:  # another disk, or one that knows no links
        shutil.copyfile(file, target)
