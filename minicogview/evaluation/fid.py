"""The Fréchet distance between two sets of pictures, on the features of the course's own tokenizer.

The idea: FID (Heusel et al. 2017, arXiv 1706.08500, equation 6) fits a Gaussian to the features of each set, with means
m1, m2 and covariances C1, C2, and measures how far apart the two are: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). It
judges sets, not single pictures.

Shapes: ``N`` pictures, (N, 3, H, W) in 0..1; ``C`` feature channels.

Different on purpose: the usual features come from Inception v3, a network for photographs that would have to be
downloaded. Here they are the latents of the tokenizer's encoder, averaged over space. So these distances can be
compared with each other, but never with published FIDs; and they reflect colours and textures, but hardly the places
of things.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError
from minicogview.vqvae import VQVAE


class LatentFeatures(nn.Module):
    """Pictures (B, 3, H, W) in 0..1 to features (B, C): the encoder's latents at a level, averaged over the cells.

    Attributes:
        num_features: C, under the name that torchmetrics expects.
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
    """Fréchet distance between two sets of pictures: 0 for equal sets, without unit or upper limit.

    The features are the encoder's latents averaged over space, not Inception's: see the top of this file. If there are
    fewer pictures than features (``latent_channels``), the covariance has low rank and the distance is too large, so
    compare only distances between sets of the same size.

    Args:
        vqvae: the picture tokenizer. level: the level whose latents are compared.
        real, fake: (N, 3, H, W) and (M, 3, H, W) in 0..1, at least 2 pictures each; their sizes may differ.
        batch_size: number of pictures that are encoded together.

    Raises:
        MiniCogViewError: if torchmetrics is missing, a set has fewer than 2 pictures, or their size does not fit the
            level.
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
    return max(0.0, float(metric.compute()))  # rounding may take it slightly below 0
