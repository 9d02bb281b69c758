"""How close pictures are to a reference, by PSNR and SSIM, and how much detail the tokenizer loses.

The idea: PSNR is the mean squared error on a logarithmic scale. SSIM compares means, variances and correlation in a
small moving window (Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity").

Shapes: ``B`` pictures, (B, 3, H, W) in 0..1 everywhere.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minicogview.data.emoji import indices, load_emoji, render
from minicogview.vqvae import VQVAE

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels; the published choice


def psnr(pictures: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) of each picture in dB, after clamping to 0..1; equal pictures give 100.

    Args:
        pictures, reference: (B, 3, H, W) on the scale 0..1.
    """
    error = (pictures.float().clamp(0, 1) - reference.float().clamp(0, 1)).pow(2).mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def _gaussian_window(window: int, sigma: float) -> Tensor:
    offset = torch.arange(window, dtype=torch.float32) - (window - 1) / 2
    line = torch.exp(-offset.pow(2) / (2 * sigma**2))
    line = line / line.sum()
    return torch.outer(line, line)


def ssim(pictures: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (B,) of each picture, 1 for equal pictures; mean over colours, borders left out.

    Args:
        pictures, reference: (B, 3, H, W) on the scale 0..1, with sides of at least 11 pixels.
    """
    x, y = (rearrange(p.float().clamp(0, 1), "b c h w -> (b c) 1 h w") for p in (pictures, reference))
    kernel = _gaussian_window(SSIM_WINDOW, SSIM_SIGMA).to(x)[None, None]
    mean_x, mean_y = F.conv2d(x, kernel), F.conv2d(y, kernel)
    var_x = F.conv2d(x * x, kernel) - mean_x**2
    var_y = F.conv2d(y * y, kernel) - mean_y**2
    covariance = F.conv2d(x * y, kernel) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2  # keep the ratios stable where pictures are flat
    value = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    value = value / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return rearrange(value, "(b c) 1 h w -> b (c h w)", c=pictures.shape[1]).mean(1)


@torch.no_grad()
def reconstruct(vqvae: VQVAE, pictures: Tensor, level: int, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Encode and decode: pictures (B, 3, H, W) clamped to 0..1, and their codes (B, h, w)."""
    decoded, codes = [], []
    for batch in pictures.split(batch_size):
        numbers = vqvae.encode(batch, level)
        decoded.append(vqvae.decode(numbers, level).clamp(0, 1))
        codes.append(numbers)
    return torch.cat(decoded), torch.cat(codes)


def perplexity(codes: Tensor, codebook_size: int) -> float:
    """Effective number of codes in use: 2 to the power of their entropy in bits; at most ``codebook_size``."""
    share = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    share = share / share.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-30).log()).sum()))


def tokenizer_psnr(vqvae: VQVAE, size: int, split: str = "tokenizer_heldout", level: int = 0) -> dict[str, float]:
    """How much the tokenizer loses on the emoji of one split, rendered at ``size`` pixels.

    Returns:
        ``n`` pictures; ``psnr`` (dB, mean over pictures); ``psnr_pooled`` (dB of the mean squared error over the pixels
        of all pictures, never above ``psnr``); ``ssim``; ``perplexity`` of the codes, and ``codes_used``, their number.

    Raises:
        MiniCogViewError: for an unknown split, or a size that the level's rate does not divide.
    """
    rows = indices(load_emoji(split))
    pixels = torch.from_numpy(render(size)[rows])
    reference = rearrange(pixels, "n h w c -> n c h w").float() / 255
    decoded, codes = reconstruct(vqvae, reference, level)
    error = (decoded - reference).pow(2).mean()
    return {
        "n": len(reference),
        "psnr": float(psnr(decoded, reference).mean()),
        "psnr_pooled": float(-10 * error.log10()),
        "ssim": float(ssim(decoded, reference).mean()),
        "perplexity": perplexity(codes, vqvae.config.codebook_size),
        "codes_used": len(codes.unique()),
    }
