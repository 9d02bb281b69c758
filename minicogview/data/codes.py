"""The emoji as tensors: pictures, the codes of both grids, and pictures decoded from codes.

Shapes: ``N`` pictures, ``n`` coarse and ``F`` fine tokens of a picture, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from minicogview.config import Preset
from minicogview.data.emoji import render
from minicogview.vqvae import VQVAE


def emoji_pictures(size: int, progress: bool = True) -> Tensor:
    """All emoji as (N, 3, size, size) in 0..1."""
    return rearrange(torch.from_numpy(render(size, progress)), "n h w c -> n c h w").float() / 255


@torch.no_grad()
def encode_all(vqvae: VQVAE, pictures: Tensor, level: int, batch_size: int = 64) -> Tensor:
    """Codes of many pictures, encoded in batches: (N, 3, H, W) -> (N, n) in raster order."""
    codes = [vqvae.encode(batch, level) for batch in pictures.split(batch_size)]
    return rearrange(torch.cat(codes), "n h w -> n (h w)")


def encode_pairs(vqvae: VQVAE, preset: Preset, rows: Tensor, progress: bool = True) -> tuple[Tensor, Tensor]:
    """Coarse codes (N, n) and fine codes (N, F) of the emoji with these row numbers (N,)."""
    coarse, fine = (
        encode_all(vqvae, emoji_pictures(size, progress)[rows], preset.level, batch_size=16)
        for size in (preset.coarse_pixels, preset.fine_pixels)
    )
    return coarse, fine


@torch.no_grad()
def decode_all(vqvae: VQVAE, codes: Tensor, level: int, batch_size: int = 64) -> Tensor:
    """Pictures of many code grids, decoded in batches: (N, n) -> (N, 3, H, W), clamped to 0..1."""
    side = int(codes.shape[1] ** 0.5)
    grids = rearrange(codes, "n (h w) -> n h w", h=side)
    return torch.cat([vqvae.decode(batch, level).clamp(0, 1) for batch in grids.split(batch_size)])
