"""Rival: ATNet (Meng et al., ACM MM 2019), parts of two latents aligned; from formulas alone, its authors filed a patent.

It is written from the formulas; no code was copied. The authors hold a patent filing (SG Non-Provisional 10201907991T) and ask
commercial users to contact them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.layers import Dropout, ScaleMode, Standardise, batch_normalise, register_hyperparameters
from pipeline.nn.losses import LabelLoss, classification_loss, distillation, mse_loss, weighted_mean
from pipeline.nn.method import Method
from pipeline.nn.tokens import paired_words, pooled, token_mean, word_mask
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

CROSS_LAYERS = 8  # of the network from the latent of images to that of texts
WORDS_BY_CROSS = 2.0  # weight of the prediction of words, divided by w_cross: 10 and 5 in the published code


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of ATNet. The weights are those of the published code divided by 20, which makes that of the images' loss 1."""

    width: Annotated[int, Range(8, 65_536), "L, width of both latents; the first 3/8 of them are aligned"] = 1024
    w_ce_text: Annotated[float, Range(0), "weight of the cross-entropy of the texts"] = 0.25
    w_kl: Annotated[float, Range(0), "weight of the divergence after the first alignment; a sum over its entries"] = 0.65
    w_mse: Annotated[float, Range(0), "weight of the squared distance after the second alignment; a mean over its entries"] = (
        0.5
    )
    w_rec: Annotated[float, Range(0), "weight of the reconstruction of the image and of the text feature"] = 0.05
    w_cross: Annotated[float, Range(0), "weight of the prediction of the text's latent from that of the image"] = 0.25
    dropout: Annotated[float, Range(0, 0.99), "probability, on the image features"] = 0.0
    scale: Annotated[ScaleMode, "standardisation of both features"] = "per_dim"
    label_loss: Annotated[LabelLoss, "for multi-label data"] = "softmax_kl"

    @property
    def block(self) -> int:
        """The number of entries of a latent that are aligned."""
        return 3 * self.width // 8


class AlignmentNetwork(nn.Module):
    """Two alignments, one after the other: each has two linear layers with a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for _ in range(2)
        )

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return a_1 and a_2 [B,D] of the aligned parts of latents [B,D]."""
        first, second = self.steps
        a_1 = first(latent)
        return a_1, second(a_1)


class CrossNetwork(nn.Module):
    """Linear layers, all but the last with batch normalisation and a ReLU, from latent to latent. Only training uses it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(CROSS_LAYERS))
        self.gains, self.shifts = (
            nn.ParameterList(start.clone() for _ in range(CROSS_LAYERS - 1))
            for start in (torch.ones(width), torch.zeros(width))
        )

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Map [B,D] to [B,D]; rows of weight 0 [B] enter no statistics."""
        *layers, last = self.layers
        for layer, gain, shift in zip(layers, self.gains, self.shifts, strict=True):
            x = F.relu(batch_normalise(layer(x), weight) * gain + shift)
        return last(x)


class WordDecoder(nn.Module):
    """Gives the words of a text from its latent: all places share two layers, and each has a vector of its own between them."""

    def __init__(self, width: int, num_tokens: int, token_width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, token_width)
        self.places = nn.Parameter(torch.randn(num_tokens, width) * width**-0.5)

    def forward(self, latent: Tensor) -> Tensor:
        """Map [B,L] to [B,T,Ds]."""
        return self.last(F.relu(self.first(latent).unsqueeze(1) + self.places))


class ATNet(Method):
    """Latents of image and text, of which the first 3/8 are aligned with the text's in two steps and then classified by one
    classifier. The rest of the latents serves the reconstruction of both features and the prediction of the text's latent.

    CE of the images + w_ce_text CE of the texts + w_kl KL(softmax(t_1) || softmax(v_1)) + w_mse |v_2 - t_2|^2 + w_rec (both
    reconstructions) + w_cross |cross(v) - t|^2, for v_i and t_i, the outputs of step i of image and text. The text is the
    teacher: KL, MSE and cross have no gradient into its branch. Before, a warm-up of 3 of 20 epochs trains reconstructions and
    texts alone, for the first stages of the original. Features stand for its pictures and lists of ingredients. The last ReLU
    can die, and a v_2 of zeros costs little where t_2 is small: the part "zeros" is the share of zeros in v_2.

    With words, of a text cache with tokens=true, the text's encoder has a mean over them between its layers, and its decoder
    gives them one by one. Then the loss has the prediction of the words from the image, the part "words": the decoder reads
    cross(v), and the weight is that of the published code, 2 w_cross. Its decoder is recurrent and names words; ours gives all
    their vectors at once. Patches are pooled.

    --preset paper has the published width and training of what is no encoder: 13 epochs, and a rate of 1e-3 that falls to a
    tenth every 4. The weight decay of 1e-3 is divided by 20, as the loss is.
    """

    Config = Config
    needs = ("image", "text", "paired", "label")
    phases = (
        Phase(
            "warm_up",
            ("image_encoder.", "image_decoder.", "text_encoder.", "text_decoder.", "text_alignment.", "classifier."),
            share=0.15,
        ),
        Phase("head"),
    )
    symbols: ClassVar[Mapping[str, str]] = {"L": "width"}
    paper: ClassVar[Mapping[str, Any]] = {"width": 2048}
    paper_training: ClassVar[Mapping[str, Any]] = {"lr": 1e-3, "weight_decay": 5e-5, "lr_gamma": 0.1, "epochs": 13}
    without_text: ClassVar[Mapping[str, Any]] = {"w_ce_text": 0.0, "w_kl": 0.0, "w_mse": 0.0, "w_cross": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {"w_kl": (0.2, 0.65, 2.0), "w_mse": (0.15, 0.5, 1.5)}

    reads_tokens = True

    w_ce_text: Tensor
    w_cross: Tensor
    w_kl: Tensor
    w_mse: Tensor
    w_rec: Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        image_width, (*num_tokens, text_width) = shapes["image"][-1], shapes["text"]
        width, self.block = config.width, config.block
        self.label_loss: LabelLoss = config.label_loss
        self.image_scale, self.text_scale = Standardise(config.scale, image_width), Standardise(config.scale, text_width)
        self.dropout = Dropout(config.dropout)
        self.image_encoder, self.image_decoder = nn.Linear(image_width, width), nn.Linear(width, image_width)
        self.text_encoder = nn.Sequential(nn.Linear(text_width, width), nn.ReLU(), nn.Linear(width, width))
        self.text_decoder = WordDecoder(width, num_tokens[0], text_width) if num_tokens else nn.Linear(width, text_width)
        self.image_alignment, self.text_alignment = (AlignmentNetwork(self.block) for _ in range(2))
        self.cross = CrossNetwork(width)
        self.classifier = nn.Linear(self.block, num_classes_in(shapes))
        register_hyperparameters(self, w_ce_text=config.w_ce_text, w_kl=config.w_kl, w_mse=config.w_mse)
        register_hyperparameters(self, w_rec=config.w_rec, w_cross=config.w_cross)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"width": 16}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features."""
        self.image_scale.fit(pooled(batch["image"]) for batch in train())
        self.text_scale.fit(paired_words(batch) for batch in train())

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss of a phase and its parts; samples without text enter no term of the text.

        Args:
            batch: see `types.Batch`.
            phase: "warm_up" has both reconstructions and the cross-entropy of the texts, "head" all terms.
        """
        label, paired = batch["label"], batch["paired"]
        x_v, x_s, is_word = self.image_scale(pooled(batch["image"])), self.text_scale(batch["text"]), word_mask(batch["text"])
        v, t = self.image_encoder(self.dropout(x_v)), self._encode_text(x_s, is_word)
        rec = mse_loss(self.image_decoder(v), x_v.detach())
        rec_text = self._text_error(t, x_s.detach(), is_word, paired)
        t_1, t_2 = self.text_alignment(t[:, : self.block])
        ce_text = classification_loss(self.classifier(t_2), label, self.label_loss, paired)
        loss = self.w_rec * (rec + rec_text) + self.w_ce_text * ce_text
        parts = {"rec": rec, "rec_text": rec_text, "ce_text": ce_text}
        if phase == "warm_up":
            return {"loss": loss, **parts}
        v_1, v_2 = self.image_alignment(v[:, : self.block])
        ce = classification_loss(self.classifier(v_2), label, self.label_loss)
        kl = weighted_mean(distillation(v_1, t_1), paired)
        mse = mse_loss(v_2, t_2.detach(), weight=paired)
        crossed = self.cross(v, paired)
        cross = mse_loss(crossed, t.detach(), weight=paired)
        loss = ce + self.w_kl * kl + self.w_mse * mse + self.w_cross * cross + loss
        if is_word is not None:
            parts["words"] = self._text_error(crossed, x_s.detach(), is_word, paired)
            loss = loss + WORDS_BY_CROSS * self.w_cross * parts["words"]
        zeros = (v_2.detach() == 0).float().mean()
        return {"loss": loss, "ce": ce, "kl": kl, "mse": mse, "cross": cross, "zeros": zeros, **parts}

    def _encode_text(self, x_s: Tensor, is_word: Tensor | None) -> Tensor:
        """Return the latent t [B,L] of texts [B,Ds], or of their words [B,T,Ds]."""
        if is_word is None:
            return self.text_encoder(x_s)
        *first, last = self.text_encoder
        return last(token_mean(nn.Sequential(*first)(x_s), is_word))

    def _text_error(self, latent: Tensor, x_s: Tensor, is_word: Tensor | None, paired: Tensor) -> Tensor:
        """Return the squared error (mean) of what the decoder makes of latents [B,L], of texts [B,Ds] or words [B,T,Ds]."""
        decoded = self.text_decoder(latent)
        if is_word is None:
            return mse_loss(decoded, x_s, weight=paired)
        return weighted_mean(token_mean((decoded - x_s).square(), is_word), paired)

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return v_2 [B, 3L/8] from image features [B,Dv] or [B,T,Dv]."""
        latent = self.image_encoder(self.dropout(self.image_scale(pooled(image))))
        return self.image_alignment(latent[:, : self.block])[1]

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv] or [B,T,Dv]."""
        return self.classifier(self.feature(image, rng))
