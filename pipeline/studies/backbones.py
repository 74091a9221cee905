"""The eleven backbones of the papers' first tables: which encoder computes the features of a row, and with which settings.

The papers name the networks and not their variants. The variants here are those of public programs of MARNet's authors for the same
data sets, where these have the network; docs/backbones.md has the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Backbone(NamedTuple):
    """One row of the tables."""

    title: str  # as the papers print it
    encoder: str
    settings: Mapping[str, str]


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": Backbone("ResNet-18", "timm", {"model": "resnet18"}),
    "resnet50": Backbone("ResNet-50", "timm", {"model": "resnet50"}),
    "vgg19": Backbone("VGG-19", "timm", {"model": "vgg19_bn"}),
    "wrn": Backbone("WRN", "timm", {"model": "wide_resnet50_2"}),
    "wiser": Backbone("WISeR", "wiser", {}),
    "repvgg": Backbone("RepVGG", "timm", {"model": "repvgg_a2"}),
    "repmlpnet": Backbone("RepMLPNet", "repmlpnet", {"variant": "T", "side": "224"}),
    "vanillanet": Backbone("VanillaNet", "vanillanet", {"depth": "10"}),
    "vit_b16": Backbone("ViT-B/16", "timm", {"model": "vit_base_patch16_224"}),
    "vit_b32": Backbone("ViT-B/32", "timm", {"model": "vit_base_patch32_224"}),
    "swin_t": Backbone("Swin-T", "timm", {"model": "swin_tiny_patch4_window7_224"}),
}
