"""The Frechet distance between two sets of pictures, on the features of the course's own tokenizer.

FID (Heusel et al. 2017, arXiv 1706.08500, equation 6) fits a Gaussian to the features of each set and measures how
far the two lie apart: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It judges sets, not single pictures.

Shapes: ``N`` pictures, (N, 3, H, W) in 0..1; ``C`` feature channels.

Different on purpose: the usual features come from Inception v3, a network for photographs that would have to be
downloaded. Here they are the encoder's latents averaged over space, so the numbers compare with each other and never
with published FIDs; and they see colours and textures, but little of where things stand.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError
from minicogview.vqvae import VQVAE


class LatentFeatures(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 to features (B, C): a level's latents, averaged over the cells.

    Attributes:
        num_features: C; the name is what torchmetrics asks for.
    """

    def __init__(self, vqvae: VQVAE, level: int) -> None:
        super().__init__()
        self.vqvae, self.level = vqvae, level
        self.num_features = vqvae.config.latent_channels

    def forward(self, pictures: Tensor) -> Tensor:
        """Features (B, C) float32 of pictures (B, 3, H, W)."""
        return self.vqvae.features(pictures, self.level).float().mean(dim=(2, 3))


@torch.no_grad()
def frechet_distance(vqvae: VQVAE, real: Tensor, fake: Tensor, level: int, batch_size: int = 32) -> float:
    """How far the pictures of two sets lie apart, 0 for the same ones; no unit, and no upper limit.

    The features are the encoder's latents averaged over space, not Inception's: see the top of this file. Fewer
    pictures than features (``latent_channels``) give a covariance of low rank and a distance that is too large:
    compare sets of the same size.

    Args:
        vqvae: the picture tokenizer. level: whose latents to compare.
        real, fake: (N, 3, H, W) and (M, 3, H, W) in 0..1, at least 2 pictures each; the sizes may differ.
        batch_size: pictures that are encoded together.

    Raises:
        MiniCogViewError: if torchmetrics is missing, a set has fewer than 2 pictures, or they do not fit the level.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise MiniCogViewError(
            "the Frechet distance needs torchmetrics, which is not installed: run `pip install torchmetrics`"
        ) from None
    for name, pictures in (("real", real), ("fake", fake)):
        if len(pictures) < 2:
            raise MiniCogViewError(f"{len(pictures)} {name} pictures: a covariance needs at least 2 of each set")
    device = vqvae.pixel_mean.device
    metric = FrechetInceptionDistance(LatentFeatures(vqvae, level)).to(device)
    for pictures, is_real in ((real, True), (fake, False)):
        for batch in pictures.split(batch_size):
            metric.update(batch.to(device), real=is_real)
    return max(0.0, float(metric.compute()))  # rounding may take it a hair below 0
