"""Calibrated probabilities: a temperature for the logits of a run, chosen on its validation predictions (Guo et al. 2017).

Classes that exclude each other share a softmax, p = softmax(z / T). Each class of multi-label data has a sigmoid of its own,
p = sigmoid(z / T + b): after training with a sigmoid, b = 0; after training with a softmax, z is its log-probability, the share
of a class in the sample, and b turns the share into a presence. T and b have the least negative log-likelihood (NLL).
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import write_atomic
from pipeline.runtime.runs import RunFolder

logger = logging.getLogger(__name__)

MAX_LOGITS = 4_000_000  # of more, some samples at equal distances are read
LOG_TEMPERATURES = (-7.0, 7.0)  # natural logarithms of the temperatures that are tried
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """How logits become probabilities."""

    kind: Literal["softmax", "sigmoid"]
    is_log: bool = True  # z is the log-softmax of the logits, else the logits themselves
    temperature: float = 1.0  # T
    bias: float = 0.0  # b
    num_samples: int = 0  # validation samples that T and b were chosen on; 0: they were not chosen
    nll_before: float = 0.0  # mean NLL of these samples, in nats, with T = 1 and b = 0
    nll: float = 0.0  # with T and b

    @staticmethod
    def of(recorded: Any) -> Calibration:
        """Return a calibration from its fields in a JSON file, which may be of others.

        Raises:
            ValueError: a field has no such value.
            TypeError: there are no such fields.
        """
        found = Calibration(**recorded)
        numbers = (found.temperature, found.bias, found.num_samples, found.nll_before, found.nll)
        if found.kind not in ("softmax", "sigmoid"):
            raise ValueError(f"kind is {found.kind!r}, neither softmax nor sigmoid")
        if (
            not all(type(each) in (int, float) and abs(each) <= sys.float_info.max for each in numbers)
            or found.temperature <= 0
        ):
            raise ValueError("a number is not finite, or the temperature is not above 0")
        return found

    def probabilities(self, logits: NDArray[Any]) -> Array:
        """Return the probabilities of the classes, float64 [N,C], of logits [N,C]."""
        z = self._scores(logits)
        if self.kind == "softmax":
            return np.exp(log_softmax(z / self.temperature, axis=1))
        return expit(z / self.temperature + self.bias)

    def _scores(self, logits: NDArray[Any]) -> Array:
        z = np.asarray(logits, dtype=np.float64)
        return log_softmax(z, axis=1) if self.is_log else z

    def describe(self) -> str:
        """Return one line for users."""
        if not self.num_samples:
            return f"{self.kind} of the logits, without a temperature"
        bias = f" and bias {self.bias:.2f}" if self.bias else ""
        chosen = f"chosen on {self.num_samples} validation samples (NLL {self.nll_before:.3f} -> {self.nll:.3f})"
        return f"{self.kind} at temperature {self.temperature:.3g}{bias}, {chosen}"


def plain_calibration(is_multi_label: bool, label_loss: str) -> Calibration:
    """Return the probabilities that a head was trained to give, without a temperature.

    Args:
        is_multi_label: whether a sample may have several labels.
        label_loss: the method's loss for multi-label data, see `RunConfig.label_loss`.
    """
    is_sigmoid = is_multi_label and label_loss == "bce"
    return Calibration("sigmoid" if is_sigmoid else "softmax", is_log=not is_sigmoid)


def calibrate(logits: NDArray[Any], label: NDArray[Any], label_loss: str) -> Calibration:
    """Return the calibration with the least mean NLL of samples.

    A head without a mistake on them would be the better the lower the temperature is: it keeps its own probabilities.

    Args:
        logits: of the validation samples [N,C].
        label: their classes [N], or indicators [N,C] for multi-label data.
        label_loss: the method's loss for multi-label data.
    """
    plain = plain_calibration(label.ndim == 2, label_loss)
    step = -(-logits.size // MAX_LOGITS)  # two numbers need no more
    logits, label = logits[::step], label[::step]
    scores = plain._scores(logits)
    if label.ndim == 1:
        is_faultless = bool((scores.argmax(axis=1) == label).all())
        return plain if is_faultless else _with_temperature(plain, scores, label)
    is_present = label > 0.5
    threshold = scores[~is_present].max(initial=-np.inf) if plain.is_log else 0.0
    if (scores[is_present] > threshold).all() and (scores[~is_present] <= threshold).all():
        return plain
    sigmoid = Calibration("sigmoid", plain.is_log)
    return _with_temperature_and_bias(sigmoid, scores, label) if plain.is_log else _with_temperature(sigmoid, scores, label)


def _with_temperature(calibration: Calibration, z: Array, label: NDArray[Any]) -> Calibration:
    def nll(log_temperature: float) -> float:
        return _mean_nll(calibration.kind, z / np.exp(log_temperature), label)

    found: Any = minimize_scalar(nll, bounds=LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-5})
    return _chosen(calibration, float(np.exp(found.x)), 0.0, nll(0.0), float(found.fun), len(z))


def _with_temperature_and_bias(calibration: Calibration, z: Array, label: NDArray[Any]) -> Calibration:
    def nll(scale_and_bias: Array) -> float:
        return _mean_nll("sigmoid", z * scale_and_bias[0] + scale_and_bias[1], label)

    scales = tuple(float(np.exp(-each)) for each in reversed(LOG_TEMPERATURES))
    found: Any = minimize(nll, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=[scales, (-50.0, 50.0)])
    scale, bias = map(float, found.x)
    return _chosen(calibration, 1.0 / scale, bias, nll(np.array([1.0, 0.0])), float(found.fun), len(z))


def _chosen(calibration: Calibration, temperature: float, bias: float, before: float, after: float, num: int) -> Calibration:
    return Calibration(calibration.kind, calibration.is_log, temperature, bias, num, before, after)


def _mean_nll(kind: str, z: Array, label: NDArray[Any]) -> float:
    if kind == "softmax":
        return float(-log_softmax(z, axis=1)[np.arange(len(z)), label].mean())
    return float((np.logaddexp(0.0, z) - label * z).mean())


def write_calibration(run: RunFolder, logits: NDArray[Any], label: NDArray[Any]) -> Calibration:
    """Choose the calibration of a run on its validation predictions, write it to the run if that is possible, and return it."""
    calibration = calibrate(logits, label, run.config().label_loss)
    with suppress(OSError):  # a run on a read-only disk is calibrated each time
        write_atomic(run.path / "calibration.json", json.dumps(asdict(calibration), indent=1))
    return calibration


def read_calibration(run: RunFolder, is_multi_label: bool) -> Calibration:
    """Return the calibration of a run: the recorded one, or one from its validation predictions; without them, warn.

    Raises:
        UserError: the recorded one is damaged.
    """
    path, predictions = run.path / "calibration.json", run.path / "predictions-val.npz"
    if path.is_file():
        try:
            return Calibration.of(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it: it is made again from {predictions.name}") from error
    if predictions.is_file():
        with np.load(predictions) as arrays:
            return write_calibration(run, arrays["logits"], arrays["label"])
    logger.warning(
        "the probabilities are not calibrated: %s has no predictions of the validation split; diffalign evaluate %s",
        run.path,
        run.path,
    )
    return plain_calibration(is_multi_label, run.config().label_loss)
