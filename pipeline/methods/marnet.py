"""MARNet: the branches EMA and CDR, whose features or logits are fused (MARNet sec. 3.4, eq. 24)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.methods import cdr, ema
from pipeline.nn.feature_space import num_classes_in
from pipeline.nn.losses import LabelLoss, classification_loss
from pipeline.nn.method import Method
from pipeline.nn.sampler import PREDICTION_SETTINGS
from pipeline.runtime.errors import UserError
from pipeline.runtime.rng import KeyedRNG
from pipeline.runtime.settings import Range, Settings
from pipeline.types import Batch, Phase, Shapes

FEATURE_FUSIONS = ("concat", "add", "mul")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Settings of the fusion, and of the branches as parts; see `ema.Config` and `cdr.Config`."""

    fusion: Annotated[
        Literal["concat", "add", "mul", "sum", "hm"],
        "of features (concat, add, mul) or of logits (sum, hm); regime=staged trains all, so prediction may choose another",
    ] = "concat"
    regime: Annotated[
        Literal["staged", "joint"],
        "staged: train the branches, then fuse their sampled features; joint: train all at once on one-step predictions",
    ] = "staged"
    crossfit: Annotated[
        int,
        Range(0, 20),
        "K folds, at least 2: the fusion learns from K more pairs of branches, each sample's pair has not seen it; 0: none",
    ] = 0
    ema: ema.Config = field(default_factory=ema.Config)
    cdr: cdr.Config = field(default_factory=cdr.Config)

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {  # what the settings were called before branches had names of their own
        **{name: (f"ema.{name}",) for name in ("width", "tau", "learn_tau", "w_ita")},
        **{f"{name}_ema": (f"ema.{name}",) for name in ("w_ce", "dropout")},
        **{f"{name}_cdr": (f"cdr.{name}",) for name in ("w_ce", "dropout")},
        **{
            name: (f"cdr.{name}",)
            for name in ("hidden", "num_steps", "schedule", "w_mse", "mse_reduction", "ce_min_step", "train_min_step")
        },
        **{name: (f"cdr.{name}",) for name in ("sampler", "sample_steps", "eta", "draws", "zero_start")},
        **{name: (f"ema.{name}", f"cdr.{name}") for name in ("scale", "label_loss")},
    }

    def recorded(self) -> dict[str, Any]:
        """Return the settings, without `crossfit` where it is off."""
        return {name: value for name, value in super().recorded().items() if name != "crossfit" or value}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema.label_loss != self.cdr.label_loss:
            raise UserError("the branches and their fusion have one label loss: set label_loss, which names ema's and cdr's")
        if self.cdr.adapter != "none":
            raise UserError("cdr.adapter must be none: the fusion reads text features of their own width")
        if self.crossfit == 1:
            raise UserError("crossfit must be 0 or at least 2: with one fold no sample is left to train its branches on")
        if self.crossfit and self.regime == "joint":
            raise UserError("crossfit needs regime=staged: with regime=joint, fusion and branches are trained at once")


def fuse_sum(z_e: Tensor, z_c: Tensor) -> Tensor:
    """Return log sigmoid(z_E + z_C): SUM of Niu et al. 2021 (CF-VQA), without its counterfactual part."""
    return F.logsigmoid(z_e + z_c)


def fuse_hm(z_e: Tensor, z_c: Tensor) -> Tensor:
    """Return log(Z / (1 + Z)) with Z = sigmoid(z_E) sigmoid(z_C): HM of Niu et al. 2021 (CF-VQA)."""
    log_z = F.logsigmoid(z_e) + F.logsigmoid(z_c)
    return log_z - F.softplus(log_z)


def fold_of(key: Tensor, num_folds: int) -> Tensor:
    """Return the fold 0 .. num_folds - 1 of each sample, int64 [B], from its key [B], which is a hash of its id."""
    return key.remainder(num_folds)


class FeatureFusion(nn.Module):
    """A classifier on x_EMA and x_CDR, both scaled to length sqrt(D), where D is the width of x_EMA.

    `kind` joins the two features: "concat", "add" or "mul".
    """

    def __init__(self, kind: str, ema_width: int, cdr_width: int, num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(cdr_width, ema_width) if cdr_width != ema_width else nn.Identity()
        self.classifier = nn.Linear(2 * ema_width if kind == "concat" else ema_width, num_classes)

    def join(self, f_e: Tensor, f_c: Tensor) -> Tensor:
        """Join x_EMA [B,D] and x_CDR [B,Ds] to [B,D], or to [B,2D] for "concat"."""
        length = f_e.shape[1] ** 0.5
        f_e, f_c = F.normalize(f_e, dim=1) * length, F.normalize(self.project(f_c), dim=1) * length
        if self.kind == "concat":
            return torch.cat([f_e, f_c], dim=1)
        return f_e + f_c if self.kind == "add" else f_e * f_c

    def forward(self, f_e: Tensor, f_c: Tensor) -> Tensor:
        """Return logits [B,C] from x_EMA [B,D] and x_CDR [B,Ds]."""
        return self.classifier(self.join(f_e, f_c))


class MARNet(Method):
    """Two branches, EMA and CDR, and the classifiers that fuse them.

    The regime "staged" trains EMA, then CDR, then one classifier for each feature fusion. In the last phase the branches are
    frozen and their features are sampled without text, as at test time. The regime "joint" trains everything at once on CDR's
    one-step predictions. These predictions see the noisy text, so at test time the fusion receives features of another
    distribution.

    Branches that have learned a sample's label and text by heart give it better features in training than at test time. With
    `crossfit` = K (ours) the fusion learns from features out of fold: K more pairs of branches are trained, each on the samples
    outside of one fold, and a sample's features come from the pair that has not seen it. All pairs start from the same weights,
    so that they embed a sample in about the same space. At test time the branches that were trained on all samples are used. A
    batch has no groups: samples of one group can be in different folds.
    """

    Config = Config
    needs = ("image", "text", "paired", "label", "key")
    symbols: ClassVar[Mapping[str, str]] = {
        "T": "cdr.num_steps",
        "alpha1": "ema.w_ce",
        "beta": "ema.w_ita",
        "alpha2": "cdr.w_ce",
        "gamma": "cdr.w_mse",
        "tau": "ema.tau",
    }
    without_text: ClassVar[Mapping[str, Any]] = {"ema.w_ita": 0.0, "cdr.w_mse": 0.0}
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "ema.w_ita": (0.1, 0.3, 1.0, 3.0),
        "cdr.w_mse": (0.1, 0.3, 1.0, 3.0),
        "cdr.num_steps": (900, 1000, 1200, 1500),
    }
    prediction = ("fusion", *(f"cdr.{name}" for name in PREDICTION_SETTINGS))

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.fusion: str = config.fusion
        self.label_loss: LabelLoss = config.ema.label_loss
        self.ema = ema.EMA(config.ema, shapes)
        self.cdr = cdr.CDR(config.cdr, shapes)
        (text_width,) = shapes["text"]
        is_staged = config.regime == "staged"
        kinds = [kind for kind in FEATURE_FUSIONS if is_staged or kind == config.fusion]
        num_classes = num_classes_in(shapes)
        self.fusions = nn.ModuleDict({kind: FeatureFusion(kind, config.ema.width, text_width, num_classes) for kind in kinds})
        self.crossfit = config.crossfit
        self.folds = nn.ModuleDict(  # branches that are trained outside of a fold, by the name of their phase
            {
                f"{name}_fold{fold}": deepcopy(branch)
                for name, branch in (("ema", self.ema), ("cdr", self.cdr))
                for fold in range(config.crossfit)
            }
        )
        folds = (Phase(name, (f"folds.{name}.",)) for name in self.folds)
        stages = (Phase("ema", ("ema.",)), Phase("cdr", ("cdr.",)), *folds, Phase("fusion", ("fusions.",), share=0.5))
        self.phases = stages if is_staged else (Phase("joint"),)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Return settings for a small and fast head."""
        return {"ema.width": 16, "cdr.hidden": 32, "cdr.num_steps": 20, "cdr.sample_steps": 5}

    def begin(self, phase: str, train: Callable[[], Iterator[Batch]]) -> None:
        """Compute the statistics of the image and text features, for the branches that the phase trains."""
        if phase in ("ema", "joint"):
            self.ema.begin(phase, train)
        if phase in ("cdr", "joint"):
            self.cdr.begin(phase, train)
        if phase in self.folds:
            self._fold_branch(phase).begin(phase, lambda: self._rows_outside_fold(train(), phase))

    def _fold_branch(self, phase: str) -> ema.EMA | cdr.CDR:
        """Return the branch that a phase trains outside of a fold."""
        branch = self.folds[phase]
        assert isinstance(branch, ema.EMA | cdr.CDR)
        return branch

    def _is_outside_fold(self, batch: Batch, phase: str) -> Tensor:
        """Return which samples of a batch are outside of the fold of a phase, bool [B]."""
        return fold_of(batch["key"], self.crossfit) != int(phase.rpartition("fold")[2])

    def _rows_outside_fold(self, batches: Iterator[Batch], phase: str) -> Iterator[Batch]:
        """Yield the batches without the samples that are in the fold of a phase."""
        for batch in batches:
            rows = self._is_outside_fold(batch, phase)
            if rows.any():
                yield {key: column[rows] for key, column in batch.items()}

    def loss(self, batch: Batch, phase: str) -> Batch:
        """Return the loss of a phase and its parts.

        Args:
            batch: see `types.Batch`.
            phase: "ema" has L_EMA (eq. 13), "cdr" has L_CDR (eq. 20), "ema_fold<k>" and "cdr_fold<k>" have the same of the
                samples outside of a fold, "fusion" has the sum of the cross-entropies of all feature fusions (eq. 24), and
                "joint" has L_EMA + L_CDR + the cross-entropy of the chosen fusion.
        """
        if phase == "ema":
            return self.ema.loss(batch, phase)
        if phase == "cdr":
            return self.cdr.loss(batch, phase)
        if phase == "joint":
            return self._joint_loss(batch)
        if phase in self.folds:
            kept = self._is_outside_fold(batch, phase).float()
            return self._fold_branch(phase).loss({**batch, "paired": batch["paired"] * kept, "weight": kept}, phase)
        f_e, f_c = self.sample_features(batch)
        losses = {kind: self._fusion_loss(kind, f_e, f_c, batch) for kind in self.fusions}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def sample_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the fusion is trained on, sampled without text: x_EMA [B,D] and x_CDR [B,Ds]."""
        image, rng = batch["image"], KeyedRNG.drawn(len(batch["image"]), batch["image"].device)
        if not self.crossfit:
            return self.ema.feature(image, rng), self.cdr.feature(image, rng)
        fold, rows = fold_of(batch["key"], self.crossfit), torch.arange(len(image), device=image.device)
        features = [self._fold_branch(name).feature(image, rng) for name in self.folds]  # of ema in every fold, then of cdr
        f_e, f_c = (torch.stack(each)[fold, rows] for each in (features[: self.crossfit], features[self.crossfit :]))
        return f_e, f_c

    def text_target(self, text: Tensor) -> Tensor:
        """Return CDR's x_s [B,Ds] from text features."""
        return self.cdr.text_target(text)

    def generated_text(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return x_CDR [B,Ds] from image features [B,Dv]."""
        return self.cdr.feature(image, rng)

    def _joint_loss(self, batch: Batch) -> Batch:
        ema_parts = self.ema.loss(batch, "joint")
        x_0, x_s, n = self.cdr.predict_one_step(batch)
        cdr_parts = self.cdr.objective(x_0, x_s, n, batch)
        ce_fused = self._fusion_loss(self.fusion, self.ema.embed(batch["image"]), x_0, batch)
        parts = {"ita": ema_parts["ita"], "mse": cdr_parts["mse"], "ce_ema": ema_parts["ce"], "ce_cdr": cdr_parts["ce"]}
        return {"loss": ema_parts["loss"] + cdr_parts["loss"] + ce_fused, **parts, "ce_fused": ce_fused}

    def _fusion_loss(self, kind: str, f_e: Tensor, f_c: Tensor, batch: Batch) -> Tensor:
        return classification_loss(self.fuse(kind, f_e, f_c), batch["label"], self.label_loss)

    def fuse(self, kind: str, f_e: Tensor, f_c: Tensor) -> Tensor:
        """Return logits [B,C] from x_EMA [B,d] and x_CDR [B,Ds]; the kinds "sum" and "hm" fuse the logits of the branches."""
        if kind in FEATURE_FUSIONS:
            return self.fusions[kind](f_e, f_c)
        z_e, z_c = self.ema.classifier(f_e), self.cdr.classifier(f_c)
        return fuse_sum(z_e, z_c) if kind == "sum" else fuse_hm(z_e, z_c)

    def predict(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return logits [B,C] from image features [B,Dv]."""
        f_e = self.ema.feature(image, rng)
        return self.cdr.sampler.average_predictions(
            lambda draw: self.fuse(self.fusion, f_e, self.cdr.feature(image, rng, draw)), self.cdr.is_sigmoid
        )

    def feature(self, image: Tensor, rng: KeyedRNG) -> Tensor:
        """Return the fused feature from image features [B,Dv].

        "sum" and "hm" fuse logits; for them, return the features of both branches side by side.
        """
        f_e, f_c = self.ema.feature(image, rng), self.cdr.feature(image, rng)
        if self.fusion not in FEATURE_FUSIONS:
            return torch.cat([f_e, f_c], dim=1)
        fusion = self.fusions[self.fusion]
        assert isinstance(fusion, FeatureFusion)
        return fusion.join(f_e, f_c)
