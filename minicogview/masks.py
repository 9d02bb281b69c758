"""Masks: which pixels of a picture, or which of its tokens, are drawn anew.

The idea: a mask is cut at half of its range, whatever holds it: a file, a PIL image, an array of floats or integers. On
a layer with transparent parts, what is painted counts, not its colour. Where a mask has more than one reading, it is
refused with what was seen. (The attention masks of the models are another matter: ``masking.py``.)

For: CogView2 (arXiv 2204.14217), section 3.2. The original has no counterpart: its masks are boxes typed in as numbers.

Shapes: ``H`` x ``W`` pixels; ``C`` channels: 1 (grey), 3 (RGB) or 4 (RGBA); ``grid`` tokens along each side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.pictures import Picture, as_array, channels_first, opened, white_value

SAME = 0.03  # mean difference of colours in 0..1 up to which a mask shows the picture itself; JPEG noise stays below
STROKES = 16  # colours, of 512, that strokes have at most; an erased photo has more


def to_mask(
    mask: Picture, size: tuple[int, int], picture: Image.Image | None = None, invert: bool = False
) -> Tensor:  # fmt: skip
    """A mask as (H, W) bool; True marks the pixels that are drawn anew: those brighter than half of the mask's range.

    Args:
        mask: what ``pictures.to_tensor`` takes as a picture; besides, floats 0..255, and integers 0 and 1. On a
            transparent layer, strokes of any colour mark their pixels; if they are black and white, only white does.
            Of a picture that has been erased in parts, the transparent parts are marked.
        size: (H, W) of the picture that the mask is for.
        picture: that picture, RGB or RGBA; it tells an erased copy of itself from strokes.
        invert: mark all other pixels instead.

    Raises:
        MiniCogViewError: if the mask cannot be read, has another size, marks nothing, or has two readings.
    """
    values = as_array(opened(mask, "mask"))  # (C, H, W)
    if values.shape[1:] != size:
        raise MiniCogViewError(f"the mask has size {values.shape[1:]}, the picture {size}: make them equal (H, W)")
    marks, seen = above_half(values[:3]), "brightest value"
    if len(values) == 4:
        visible = above_half(values[3:], whole=True)
        if not visible.all():
            marks, values, seen = painted(values[:3], visible, marks, picture), values[3:], "highest opacity"
    marks = marks ^ invert
    if not marks.any():
        top = f"{grey(values[:3]).max():.5g} of {white_of(values[:3])}"
        raise MiniCogViewError(f"the mask marks nothing ({seen} {top}): paint white what is to be drawn anew")
    return torch.from_numpy(marks)


def check_region(region: Any, grid: int) -> Tensor:
    """A region of tokens to draw anew (a tensor, array or lists), cut like a mask, as (grid, grid) bool.

    Raises:
        MiniCogViewError: if it has another shape, or is empty.
    """
    values = channels_first(region, "region")
    hole = torch.from_numpy(above_half(values, name="region"))
    if hole.shape != (grid, grid) or not hole.any():
        raise MiniCogViewError(
            f"region of shape {tuple(hole.shape)} with {int(hole.sum())} cells to draw: "
            f"give ({grid}, {grid}) with 1 where the picture is to be drawn anew"
        )
    return hole


# --- how a mask is read


def white_of(values: np.ndarray, whole: bool = False, name: str = "mask") -> int:
    """The value of a mask that means white; ``whole``: 0 and 1 alone do not mean that 1 is the brightest."""
    white = white_value(values, name)
    return 1 if values.max() <= 1 and not whole else white


def grey(values: np.ndarray) -> np.ndarray:
    """Brightness (H, W) of values (C, H, W), as PIL weighs red, green and blue."""
    if len(values) == 1:
        return values[0]
    red, green, blue = (values[i] * np.float32(weight) for i, weight in enumerate((0.299, 0.587, 0.114)))
    return red + green + blue


def above_half(values: np.ndarray, whole: bool = False, name: str = "mask") -> np.ndarray:
    """Where values (C, H, W) are brighter than half of their range, (H, W) bool."""
    return grey(values) > white_of(values, whole, name) / 2


def painted(
    colour: np.ndarray, visible: np.ndarray, bright: np.ndarray, picture: Image.Image | None
) -> np.ndarray:  # fmt: skip
    """What a layer with transparent parts marks, (H, W) bool: its strokes, or the hole of an erased picture.

    Args:
        colour: (3, H, W). visible, bright: (H, W) bool, where the layer is more opaque, brighter than half.
    """
    if not visible.any():
        return visible
    shown = colour[:, visible] / np.float32(white_value(colour, "mask"))  # (3, visible pixels), 0..1
    bins = np.unique((shown * 7).round().astype(int).T @ (64, 8, 1)).size
    if picture is not None:
        pixels = np.asarray(picture)[visible]
        if np.abs(shown.T - pixels[:, :3] / np.float32(255)).mean() < SAME:
            own = pixels.shape[1] == 4 and not (np.asarray(picture)[..., 3][~visible] > 127).any()
            if bins == 1 and not own:
                raise MiniCogViewError(
                    "the mask's visible part has the picture's own colour there, so it is strokes or the rest of an "
                    "erased picture: paint in another colour"
                )
            return ~visible
    if bins > STROKES:
        if picture is not None:
            raise MiniCogViewError(
                f"the mask is a picture with transparent parts ({bins} colours), and not the one to edit: "
                "give strokes in one colour, or a black and white mask"
            )
        return ~visible
    colourless = np.ptp(shown, axis=0).max() < 0.1
    marked = bright[visible]
    return bright & visible if colourless and marked.any() and not marked.all() else visible
