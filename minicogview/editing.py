"""Editing a part of a picture: what to cut out, which tokens to draw anew, and how to paste the result back.

The idea: the models only know small squares. So a square around the mask is cut out and resized, and the tokens under
the mask are drawn anew with everything else in view. Of the result, only the pixels under the mask are pasted back; all
other pixels stay exactly as they were. CogView2 (arXiv 2204.14217), section 3.2 and figure 5.

Mirrors: the geometry of the official ``cogview2_completion.py``. The cut-out is 20 / 14 times as long as the mask's
longer side, so that a square mask covers 14 of the 20 tokens along each side. A token is drawn anew if its first pixel
is marked.

Shapes: a picture has H x W pixels; a box is (top, left, bottom, right), where bottom and right are not included.

Different on purpose: masks may have any form, and pictures need not be square. If a mask is so thin that it marks no
token's first pixel, all tokens that it touches are drawn anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minicogview.colour import alike, in_profile_of
from minicogview.errors import MiniCogViewError
from minicogview.results import Pictures

Box = tuple[int, int, int, int]
MAX_TOTAL = 2**29  # pixels of all edited pictures together, 2 GB
CONTEXT = 20 / 14  # side of the cut-out / longer side of the mask


def box_mask(size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """A mask (H, W) of a rectangle given as fractions (top, left, bottom, right) of height and width.

    Raises:
        MiniCogViewError: if no pixel lies inside.
    """
    height, width = size
    top, left, bottom, right = (int(part * side) for part, side in zip(box, (height, width) * 2, strict=True))
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    if not mask.any():
        raise MiniCogViewError(f"the box {box} holds no pixel of {height} x {width}: make it larger")
    return mask


def inner_box(mask: Tensor) -> Box:
    """The smallest box around all marked pixels of a mask (H, W)."""
    rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def crop_box(mask: Tensor, context: float = CONTEXT, least: int = 1) -> Box:
    """The box to cut out of the picture for a mask (H, W).

    It is a square centred on the marked pixels, then moved inside the picture. Its side is at most the picture's
    shorter side; if the marked part is longer than that, the box is longer in that direction.

    Args:
        context: side of the square / longer side of the marked part. least: the smallest side in pixels.

    Raises:
        MiniCogViewError: if ``context`` is below 1.
    """
    if not context >= 1:
        raise MiniCogViewError(f"context is {context}: use 1 (the mask alone) or more")
    sizes, inner = tuple(mask.shape), inner_box(mask)
    longer = max(inner[2] - inner[0], inner[3] - inner[1])  # side of the marked part
    side = max(int(longer * context), least)
    if longer <= min(sizes):
        side = min(side, *sizes)
    edges = []
    for axis in (0, 1):
        length = min(side, sizes[axis])
        first, end = inner[axis], inner[axis + 2]
        start = int((first + end - 1) / 2 - length / 2)  # centred on the marked pixels
        start = min(max(start, end - length, 0), first, sizes[axis] - length)  # with all of them, inside the picture
        edges.append((start, length))
    (top, height), (left, width) = edges
    return top, left, top + height, left + width


def token_region(mask: Tensor, side: int) -> Tensor:
    """Which tokens of a cut-out are drawn anew, (side, side) bool, from the cut-out's part of the mask (h, w)."""
    region = F.interpolate(mask[None, None].float(), size=(side, side), mode="nearest")[0, 0] > 0.5
    if not region.any():
        region = F.adaptive_max_pool2d(mask[None].float(), (side, side))[0] > 0.5
    return region


def paste(picture: Image.Image, patch: Image.Image, box: Box, mask: Tensor) -> Image.Image:
    """The picture with the pixels under the mask (H, W) taken from ``patch``, which is resized to fill the box.

    The colour profile and the EXIF data of the picture are kept, and the new pixels get its profile.
    """
    top, left, bottom, right = box
    pixels, size = np.array(picture), (right - left, bottom - top)  # (H, W, 3 or 4)
    new = np.asarray(in_profile_of(patch.convert("RGB"), picture).resize(size, Image.Resampling.BICUBIC))
    inside = mask[top:bottom, left:right].numpy()
    part = pixels[top:bottom, left:right]
    part[inside, :3] = new[inside]
    if pixels.shape[2] == 4:
        part[inside, 3] = 255  # new pixels are opaque
    return alike(pixels, picture)


def check_total(picture: Image.Image, n: int) -> None:
    """Raise MiniCogViewError if ``n`` copies of a picture take too much memory, before any of them is drawn."""
    total = n * picture.width * picture.height
    if total > MAX_TOTAL:
        raise MiniCogViewError(
            f"{n} pictures of {picture.width} x {picture.height} pixels would need {total * 4 / 1e9:.1f} GB: "
            "draw fewer at a time, or shrink the picture"
        )


def paste_all(picture: Image.Image, drawn: Pictures, box: Box, mask: Tensor) -> Pictures:
    """Whole pictures from ``drawn``, pictures of a cut-out: those of every stage are pasted into ``picture``."""
    pasted: dict[str, Any] = {}
    for stage in ("coglm", "direct", "iterative"):
        patches = getattr(drawn, stage)
        if patches is not None:
            pasted[stage] = [paste(picture, patch, box, mask) for patch in patches]
    return dataclasses.replace(drawn, images=list(pasted.values())[-1], **pasted)
