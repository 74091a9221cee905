"""Run an exported folder: prepare media, draw the noise that the run itself would draw, and call the graph."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from pipeline.evaluation.calibration import Calibration

BATCH_SIZE = 16
Backend = Literal["auto", "onnx", "torch"]


@dataclass(frozen=True)
class ExportedClassifier:
    """A run that `diffalign export` wrote: it needs no home, no encoder's weights and no code of its method."""

    folder: Path
    class_names: tuple[str, ...]
    facts: Mapping[str, Any]  # of config.json, the part "diffalign"
    calibration: Calibration
    graph: Callable[[Any, Any], np.ndarray]  # (pixel_values, noise) -> logits

    def predict(self, paths: str | Path | Sequence[str | Path], top: int = 5) -> pd.DataFrame:
        """Classify pictures or clips in this process; `Run.predict` does so with many.

        Args:
            paths: Files, folders, patterns such as "photos/**/*.jpg", or several of them.
            top: How many of the most probable classes are told.

        Returns:
            The same columns as `Run.predict`: file, class_1, probability_1, …, error.
        """
        import pandas as pd

        from pipeline.data.media_files import find_media
        from pipeline.evaluation.prediction_files import prediction_columns, prediction_rows

        files = find_media([paths] if isinstance(paths, str | Path) else paths)
        columns = prediction_columns("file", len(self.class_names), top)
        parts = (self._classify(files[start : start + BATCH_SIZE]) for start in range(0, len(files), BATCH_SIZE))
        return pd.DataFrame(
            [row for part in parts for row in prediction_rows(part, self.class_names, columns)], columns=list(columns)
        )

    def noise(self, digests: Sequence[bytes]) -> np.ndarray:
        """Return the noise [B,M] that the run draws for files with these digests of their contents."""
        from pipeline.runtime.rng import content_keys
        from pipeline.studies.export_graph import Draw, run_noise

        draws = [Draw(tuple(each["names"]), tuple(each["shape"])) for each in self.facts["noise"]]
        return run_noise(draws, self.facts["seed"], content_keys(digests)).numpy()

    def _classify(self, files: Sequence[str]) -> Any:
        import numpy as np

        from pipeline.data.media_digests import read_digest
        from pipeline.evaluation.classify import ClassifiedRows
        from pipeline.studies.export_inputs import read_preprocessing

        prepare = read_preprocessing(self.folder)
        pixels, digests, errors = [], [], []
        for file in files:
            try:
                pixels.append(prepare(Path(file)).numpy())
                digests.append(read_digest(Path(file)))
                errors.append("")
            except (UserError, OSError) as error:
                errors.append(str(error).removeprefix(f"{Path(file).name}: "))
        probabilities = np.full((len(files), len(self.class_names)), np.nan)
        if pixels:
            logits = self.graph(np.stack(pixels), self.noise(digests))
            if logits.shape[1:] != (len(self.class_names),):
                num_classes = len(self.class_names)
                raise UserError(f"{self.folder} is damaged: its graph has not the {num_classes} classes of labels.json")
            probabilities[[not error for error in errors]] = self.calibration.probabilities(logits)
        return ClassifiedRows(files, probabilities, errors)


def load_export(folder: str | Path, backend: Backend = "auto") -> ExportedClassifier:
    """Return the classifier in a folder that `diffalign export` wrote.

    Args:
        folder: The folder.
        backend: "onnx" and "auto" run model.onnx with ONNX Runtime, "torch" runs model.pt2. Take "torch" only for folders
            that you trust: to load a program of torch can run code of whoever wrote it.

    Raises:
        UserError: the folder is no export, is damaged, or lacks the graph.
    """
    from pipeline.evaluation.calibration import Calibration

    folder = Path(folder)
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))["diffalign"]
        names = tuple(map(str, json.loads((folder / "labels.json").read_text(encoding="utf-8"))))
        calibration = Calibration.of(facts["calibration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no folder of `diffalign export`, or it is damaged ({error})") from error
    has_onnx = (folder / "model.onnx").is_file() and importlib.util.find_spec("onnxruntime") is not None
    if backend != "torch" and not has_onnx:
        raise UserError(
            f"{folder} has no model.onnx, or ONNX Runtime is missing: pip install onnxruntime, or pass "
            'backend="torch", only for folders that you trust: a program of torch can run code'
        )
    graph = _torch_graph(folder) if backend == "torch" else _onnx_graph(folder)
    return ExportedClassifier(folder, names, facts, calibration, graph)


def _onnx_graph(folder: Path) -> Callable[[Any, Any], np.ndarray]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(pixel_values: Any, noise: Any) -> Any:
        return session.run(None, dict(zip(names, (pixel_values, noise), strict=False)))[0]

    return run


def _torch_graph(folder: Path) -> Callable[[Any, Any], np.ndarray]:
    import torch

    module = torch.export.load(folder / "model.pt2").module()

    def run(pixel_values: Any, noise: Any) -> Any:
        inputs = [torch.from_numpy(each) for each in (pixel_values, noise) if each.size]
        with torch.no_grad():
            return module(*inputs).numpy()

    return run
