"""`diffalign export`: a finished run as a folder that needs nothing else, in the layout of the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pipeline.encoders._encoder import Encoder
from pipeline.encoders._factory import parse_settings
from pipeline.evaluation.classify import Classifier
from pipeline.evaluation.inference_spec import InferenceSpec
from pipeline.runtime import plugins
from pipeline.runtime.errors import UserError, describe_error
from pipeline.runtime.runs import RunFolder
from pipeline.runtime.version import program_version
from pipeline.studies.export_graph import NUM_EXAMPLES, ClassifierGraph, run_noise, trace, used_weights
from pipeline.studies.export_inputs import PREPROCESSING, write_preprocessing
from pipeline.studies.export_onnx import write_onnx
from pipeline.studies.model_card import NO_LICENCE, model_card, number_format

logger = logging.getLogger(__name__)

PROGRAM, ONNX, WEIGHTS, LABELS, CONFIG, CARD = (
    *("model.pt2", "model.onnx", "model.safetensors"),
    *("labels.json", "config.json", "README.md"),
)
FILES = {PROGRAM, ONNX, f"{ONNX}.data", WEIGHTS, LABELS, CONFIG, CARD, PREPROCESSING}


def export_run(run: RunFolder, folder: Path, home: Path, weights_licence: str = "", overwrite: bool = False) -> list[str]:
    """Write a run as a folder of its own, and return the names of its files; the folder is there when all of them are.

    Args:
        run: a finished run.
        folder: the folder to make.
        home: where the data of a run of an earlier version are.
        weights_licence: the licence of the encoder's weights, for the model card; "": what the encoder's library says.
        overwrite: replace an earlier export.

    Raises:
        UserError: the folder is there, the run cannot classify new media, or it cannot be traced.
    """
    folder = folder.resolve()  # of a link, what it leads to
    _check_target(folder, overwrite)
    classifier = Classifier.of(run, home)
    encoder = classifier.spec.build_encoder(run, _format_of_run(classifier.spec))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
        made = Path(aside) / "made"
        made.mkdir()
        _write(classifier, encoder, made, weights_licence or _known_licence(encoder), home)
        made.chmod(0o755)
        _put_in_place(made, folder, Path(aside) / "old")
    return sorted(path.name for path in folder.iterdir())


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that cannot be made, or has anything but an export that may be replaced."""
    if Path.cwd().is_relative_to(folder):
        raise UserError(f"{folder} is the current folder or has it inside: take another folder")
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    is_export = {CONFIG, PROGRAM} <= names
    if names and not (overwrite and is_export):
        raise UserError(f"{folder} is there: take another folder" + (", or --overwrite this export" if is_export else ""))
    if foreign := sorted(names - FILES):
        raise UserError(f"{folder} has {foreign[0]!r}, which is no file of an export: take it away, or take another folder")


def _put_in_place(made: Path, folder: Path, old: Path) -> None:
    """Rename `made` to `folder`; what was there becomes `old`, and comes back if the renaming fails."""
    is_there = folder.exists()
    if is_there:
        os.replace(folder, old)
    try:
        os.replace(made, folder)
    except OSError:
        if is_there:
            os.replace(old, folder)
        raise


def _format_of_run(spec: InferenceSpec) -> dict[str, str]:
    """Return the settings with which the encoder of a run computes as it did for the run, whatever this processor has."""
    identity = spec.encoder_identity.get("image", spec.encoder_identity)  # of `frames`, the encoder of each frame
    name, compute_dtype = str(identity.get("name", spec.encoder)), identity.get("compute_dtype")
    config = plugins.get("encoders", name).Config if name in plugins.names("encoders") else None
    if not compute_dtype or config is None or "compute_dtype" not in {field.name for field in fields(config)}:
        return {}
    if name == spec.encoder:
        return {"compute_dtype": compute_dtype}
    pairs = parse_settings(spec.encoder_settings.get("settings", "")) | {"compute_dtype": compute_dtype}
    return {"settings": ",".join(f"{key}={value}" for key, value in pairs.items())}


def _known_licence(encoder: Encoder) -> str:
    image: Any = getattr(encoder, "image", encoder)
    recorded = getattr(getattr(image, "network", None), "pretrained_cfg", None)
    return str(recorded.get("license") or NO_LICENCE) if isinstance(recorded, Mapping) else NO_LICENCE


def _write(classifier: Classifier, encoder: Encoder, folder: Path, weights_licence: str, home: Path) -> None:
    if encoder.modality == "video" and not hasattr(encoder, "image"):
        raise UserError(f"{classifier.spec.encoder} cannot be exported: of the encoders of clips, only frames can")
    spec = classifier.spec
    write_preprocessing(encoder, folder)
    graph = ClassifierGraph(encoder, classifier.method, spec.store_dtype)
    pixels = _example_pixels(encoder)
    graph.record_draws(pixels)
    noise = run_noise(graph.draws, classifier.run.seed, torch.arange(1, NUM_EXAMPLES + 1))
    examples = (pixels, noise) if graph.draws else (pixels,)
    logger.info("tracing the encoder and the head")
    program = trace(graph, examples)
    with warnings.catch_warnings(action="ignore"):  # of buffers that share their memory
        torch.export.save(program, folder / PROGRAM)
    weights = used_weights(program)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    differs = write_onnx(program, graph, examples, folder / ONNX)
    facts = {
        "version": program_version(),
        "dataset": spec.dataset,
        "media_type": encoder.modality,
        "method": classifier.run.config().method,
        "seed": classifier.run.seed,
        "encoder": spec.encoder,
        "encoder_settings": _without_folders(spec.encoder_settings),
        "encoder_identity": _without_folders(spec.encoder_identity),
        "weights_licence": weights_licence,
        "compute_dtype": str(getattr(getattr(encoder, "image", encoder), "compute_dtype", "float32")),
        "pixels": f"{str(pixels.dtype).removeprefix('torch.')} [B,{','.join(map(str, pixels.shape[1:]))}]",
        "noise": [{"names": list(draw.names), "shape": list(draw.shape)} for draw in graph.draws],
        "noise_size": sum(draw.size for draw in graph.draws),
        "calibration": asdict(classifier.calibration),
        "onnx_differs_by": differs,
    }
    names = list(spec.class_names)
    config = {
        "model_type": "diffalign",
        "architectures": [type(classifier.method).__name__],
        "problem_type": "multi_label_classification" if spec.is_multi_label else "single_label_classification",
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "diffalign": facts,
    }
    for file, content in ((CONFIG, config), (LABELS, names)):
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    graphs = [name for name in (PROGRAM, ONNX) if (folder / name).is_file()]
    logger.info("%s", number_format(facts["compute_dtype"], graphs))
    (folder / CARD).write_text(model_card(classifier, facts, graphs, home), encoding="utf-8")


def _without_folders(value: Any) -> Any:
    """Return a JSON value whose absolute paths, also those inside "key=path,key=path", are cut to the names of the files."""
    if isinstance(value, Mapping):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(each) for each in value]
    if not isinstance(value, str):
        return value
    return "".join(Path(part).name if os.path.isabs(part) else part for part in re.split("([,;=])", value))


def _example_pixels(encoder: Encoder) -> Tensor:
    """Return a batch of prepared noise pictures, or clips."""
    rng = np.random.default_rng(0)
    num_frames = getattr(encoder.config, "num_frames", 1) if encoder.modality == "video" else 1
    pictures = [
        [Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)) for _ in range(num_frames)]
        for _ in range(NUM_EXAMPLES)
    ]
    return torch.stack([encoder.prepare_pictures(each) for each in pictures])


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Upload an exported folder to a model repository of the Hugging Face hub, and return its address.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        made = api.create_repo(repository, private=private, exist_ok=True, repo_type="model")
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=f"Upload {folder.name} from diffalign")
    except Exception as error:  # the client raises errors of several libraries, for a bad name, no login or no network
        raise UserError(
            f"{folder} is written, but it could not be uploaded to {repository!r} "
            f"({describe_error(error).splitlines()[0][:200]}); log in, `hf auth login` or HF_TOKEN, and repeat with --overwrite"
        ) from error
    return str(made)
