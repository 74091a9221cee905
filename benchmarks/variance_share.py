"""How much of what SeDA's decoder reads the image explains: at initialisation and after training.

At a middle step, each of some validation images meets many noisy texts x_n of unit variance. The share of the image is the
variance of the image's means over the variance of all, of the vector F_t that the decoder reads beside the step (eq. 4). With a
residual on the noisy text alone, attention averages the image away: then the decoder reads noise.

    python benchmarks/variance_share.py --home artifacts artifacts/runs/openclipart/seda-1a2b3c4d5e6f/seed0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.cache.reader import find_cache
from pipeline.cache.table import load_split
from pipeline.data.manifest_files import read_manifest
from pipeline.evaluation.evaluate import apply_overrides, load_method
from pipeline.nn.denoisers import PFIN
from pipeline.runtime.errors import UserError
from pipeline.runtime.runs import RunFolder

NUM_IMAGES, NUM_TEXTS = 64, 32


@torch.no_grad()
def image_share(network: PFIN, condition: Tensor, width: int, step: int) -> float:
    """Return the share of the variance of F_t that the image explains, 0..1.

    Args:
        network: PFIN, but not with interaction=concat, which has no F_t.
        condition: what the network reads of the images [B,Dv].
        width: D of the noisy texts.
        step: the step n.
    """
    images = condition.repeat_interleave(NUM_TEXTS, 0)
    x_n = torch.randn(len(images), width, generator=torch.Generator().manual_seed(0))
    read: list[Tensor] = []
    handle = network.first.register_forward_pre_hook(lambda layer, arguments: read.append(arguments[1]))
    network(x_n, network.embed_step(torch.tensor(step)), network.image_context(images))
    handle.remove()
    f_t = read[0].unflatten(0, (len(condition), NUM_TEXTS))
    return float(f_t.mean(1).var(0, correction=0).sum() / f_t.flatten(0, 1).var(0, correction=0).sum())


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    print("| run | interaction | residual | at initialisation | after training |\n|---|---|---|---|---|")
    for folder in arguments.runs:
        run = RunFolder.at(folder)
        config = run.config()
        settings, _ = apply_overrides(config, {})
        trained: Any = load_method(run, config, settings)
        if not isinstance(trained.denoiser, PFIN) or trained.denoiser.interaction is None:
            raise UserError(f"{folder} is no SeDA with an F_t: take denoiser=pfin and another interaction than concat")
        manifest = read_manifest(arguments.home, config.dataset)
        cache = find_cache(arguments.home, manifest, config.caches["image"])
        image = load_split(manifest, {"image": cache}, "val", torch.device("cpu"), "mean").columns["image"][:NUM_IMAGES]
        condition, width, step = trained.cpu().condition(image), trained.space.text_width, settings.num_steps // 2
        torch.manual_seed(run.seed)
        fresh: Any = type(trained)(settings, {key: tuple(shape) for key, shape in config.shapes.items()})
        shares = [image_share(each.denoiser, condition, width, step) for each in (fresh, trained)]
        print(f"| {folder.parent.name} | {settings.interaction} | {settings.residual} | {shares[0]:.2f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
