"""`Encoder`: the base class of all encoders. A plug-in of the kind "encoders" is one file with one subclass of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.data.media import open_image
from pipeline.runtime.device import ComputeDtype, Precision, default_device, resolve_dtype


class Encoder(nn.Module, ABC):
    """A pretrained network, with the preprocessing that it was trained with.

    A subclass names its settings, `Config`, its `modality` and its `feature_shape`, and defines `identity` and `forward`. If it
    reads images, it also has `drawing_side` and `prepare_image`; if it reads clips or texts, it defines `prepare`. The network
    is loaded in `__init__`; what changes the features stands in `identity`.

    Rules that the contract tests hold:

    - "prepared items are the same in any process": `prepare` is deterministic, and an encoder can be pickled.
    - "a feature does not depend on its batch": it is float32 and finite, and only rounding may differ.
    - "identity is meaning": it is plain JSON without paths, so that it is the same wherever the weights are.
    - "features are differentiable": an encoder can be trained together with a head.
    """

    Config: ClassVar[type[Any]]  # a frozen dataclass: the settings, all with defaults
    config: Any  # an object of the class's `Config`
    modality: Literal["image", "video", "text"]  # what it reads; of the class, or of an object
    feature_shape: tuple[int, ...]  # of the features of one item: (D,), or (T, D) for tokens
    drawing_side: int  # pixels of the square that `prepare` renders an SVG file to
    device: torch.device  # set by `move_for_inference`, like the next two
    compute_dtype: Precision
    input_dtype: torch.dtype  # the format that the inputs of the network must have

    def __init__(self, config: Any) -> None:
        """Build the encoder.

        Args:
            config: an object of the class's `Config`.

        Raises:
            UserError: the model or its weights are not available, or do not fit each other.
        """
        super().__init__()
        self.config = config

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings of a small encoder that needs no download, for tests; by default none differs from the default."""
        return {}

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that can change the features, as plain JSON values."""

    def prepare(self, raw: Path | str) -> Tensor:
        """Preprocess one media file or text on the CPU; by default, open an image and give it to `prepare_image`.

        The result is deterministic and can be pickled.

        Raises:
            UserError: the file cannot be decoded, or the text is blank.
        """
        return self.prepare_image(open_image(Path(raw), self.drawing_side))

    def prepare_image(self, image: Image.Image) -> Tensor:
        """Return the same as `prepare` for a file with this image in it; `frames` gives it the frames of a clip."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, prepared: Tensor) -> Tensor:
        """Return the features [B, *feature_shape] of a batch of prepared items [B, ...]; they are differentiable."""

    def move_for_inference(self, choice: ComputeDtype, lower: Precision = "bfloat16") -> None:
        """Move the encoder to the device, convert it to the format that it computes in, and switch it to evaluation.

        Args:
            choice: the user's choice of the format.
            lower: the format that "auto" stands for, as in `resolve_dtype`.
        """
        self.device = default_device()
        self.compute_dtype = resolve_dtype(choice, self.device, lower)
        self.input_dtype = torch.bfloat16 if self.compute_dtype == "bfloat16" else torch.float32
        self.to(device=self.device, dtype=self.input_dtype).eval()
