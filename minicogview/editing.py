"""Editing a part of a picture: where to cut, what to draw anew, and how to put it back.

The idea: the models only know small squares, so the surroundings of the mask are cut out and resized, the tokens under
the mask are drawn anew with everything else in view, and of the result only the pixels under the mask are pasted
back. All other pixels stay as they were, to the bit. CogView2 (arXiv 2204.14217), section 3.2 and figure 5.

Mirrors: the geometry of the official ``cogview2_completion.py``: 20 / 14 of the mask's longer side is cut out, so that
a square mask covers 14 of the 20 tokens along each side.

Shapes: a picture has H x W pixels; a box is (top, left, bottom, right), the last two not included.

A token is drawn anew when its first pixel is marked, as in the original. Different on purpose: masks may be painted,
pictures need not be square; where a mask is so thin that this chooses no token, those that it touches are drawn anew.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.pictures import upright

Box = tuple[int, int, int, int]
Mask = Tensor | np.ndarray | Image.Image
CONTEXT = 20 / 14  # side of the cut-out / longer side of the mask


def to_mask(mask: Mask, size: tuple[int, int]) -> Tensor:
    """A mask as (H, W) bool: 1, True or brighter than mid-grey is drawn anew.

    Args:
        mask: array or tensor (H, W); or a picture, of which the brightness counts, black where transparent.
        size: (H, W) of the picture that it belongs to.

    Raises:
        MiniCogViewError: if the mask has another size, or marks nothing.
    """
    if isinstance(mask, Image.Image):
        grey = np.asarray(upright(mask).convert("LA"), dtype=np.float32) / 255  # brightness and opacity
        chosen = torch.from_numpy(grey.prod(-1)) > 0.5
    else:
        values = torch.as_tensor(mask)
        chosen = values > 0.5 if values.is_floating_point() else values > 0
    if tuple(chosen.shape) != size:
        raise MiniCogViewError(f"the mask has size {tuple(chosen.shape)}, the picture {size}: make them equal (H, W)")
    if not chosen.any():
        raise MiniCogViewError("the mask marks nothing: paint (or set to 1) what is to be drawn anew")
    return chosen


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
    """The smallest box around what a mask (H, W) marks."""
    rows, columns = (torch.nonzero(mask.any(axis))[:, 0] for axis in (1, 0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def crop_box(mask: Tensor, context: float = CONTEXT, least: int = 1) -> Box:
    """The part of the picture that is cut out around what a mask (H, W) marks.

    A square around the middle of the mask, moved inside the picture; no longer than the picture's shorter side, unless
    the mask itself is.

    Args:
        context: side of the square / longer side of the mask. least: pixels that a side has at least.

    Raises:
        MiniCogViewError: if ``context`` is below 1.
    """
    if not context >= 1:
        raise MiniCogViewError(f"context is {context}: use 1 (the mask alone) or more")
    sizes, inner = tuple(mask.shape), inner_box(mask)
    longer = max(inner[2] - inner[0], inner[3] - inner[1])
    side = max(int(longer * context), least)
    if longer <= min(sizes):
        side = min(side, *sizes)
    edges = []
    for axis in (0, 1):
        length = min(side, sizes[axis])
        first, end = inner[axis], inner[axis + 2]
        start = int((first + end - 1) / 2 - length / 2)
        edges.append((min(max(start, end - length, 0), first, sizes[axis] - length), length))
    (top, height), (left, width) = edges
    return top, left, top + height, left + width


def token_region(mask: Tensor, side: int) -> Tensor:
    """Which tokens (side, side) bool of a cut-out are drawn anew, from its part of the mask (h, w)."""
    region = F.interpolate(mask[None, None].float(), size=(side, side), mode="nearest")[0, 0] > 0.5
    if not region.any():
        region = F.adaptive_max_pool2d(mask[None].float(), (side, side))[0] > 0.5
    return region


def paste(picture: Image.Image, patch: Image.Image, box: Box, mask: Tensor) -> Image.Image:
    """The picture with the pixels under the mask (H, W) taken from a patch that fills the box; no other changes."""
    top, left, bottom, right = box
    pixels = np.array(picture)  # (H, W, 3 or 4)
    new = np.asarray(patch.convert("RGB").resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    inside = mask[top:bottom, left:right].numpy()
    part = pixels[top:bottom, left:right]
    part[inside, :3] = new[inside]
    if pixels.shape[2] == 4:
        part[inside, 3] = 255  # what was drawn can be seen
    return Image.fromarray(pixels)
