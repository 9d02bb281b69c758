"""Two more uses of completion: variations of a picture, and outpainting, which continues it beyond its edges.

The idea: CogLM can fill in any set of tokens. If they are scattered over the picture, the result keeps its composition
and changes its details; if they lie around it, the picture grows. Both use the same functions as editing.
CogView2 (arXiv 2204.14217), section 3.2.

Shapes: a picture has H x W pixels; ``grid`` tokens along each side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minicogview.colour import alike
from minicogview.errors import MiniCogViewError
from minicogview.numbers import number, seeds_of
from minicogview.pictures import Picture, check_pixels, to_image
from minicogview.pipeline import CogView2
from minicogview.results import Pictures


def random_region(grid: int, share: float, seed: int) -> Tensor:
    """A random ``share`` (above 0, at most 1) of the cells, at least one, as (grid, grid) bool."""
    share = number(share, "share", 0, 1, above=True, hint="the part of the picture to draw anew")
    order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed))
    region = torch.zeros(grid * grid, dtype=torch.bool)
    region[order[: max(1, round(share * grid * grid))]] = True
    return region.reshape(grid, grid)


def vary(
    model: CogView2, text: str, picture: Picture, share: float = 0.5, n: int = 4, seed: int | None = 0,
    stages: int | None = None, **sampling: float,
) -> Pictures:  # fmt: skip
    """Variations of a picture: a random share of its tokens is drawn anew, a different one for each variation.

    Args:
        text: describes the picture. picture: file, PIL image, array, tensor, or codes (grid, grid).
        share: share of the tokens that are drawn anew; the larger it is, the less alike the pictures are.
        n, seed, stages, sampling: as for ``CogView2.generate``.

    Raises:
        MiniCogViewError: as ``CogView2.complete``; or if the share is not above 0 and at most 1.
    """
    seeds, codes = seeds_of(seed, n), model.codes(picture)
    drawn = [
        model.complete(text, codes, random_region(model.grid, share, one), 1, one, **sampling) for one in seeds
    ]
    images = [one.images[0] for one in drawn]
    tokens, scores = (torch.cat([getattr(one, name) for one in drawn]) for name in ("tokens", "scores"))
    together = Pictures(images, tokens, scores, text, seeds, coglm=images)
    return model.upsample(together, stages)


def outpaint(
    model: CogView2, text: str, picture: Picture, margins: tuple[int, int, int, int], n: int = 1, seed: int | None = 0,
    stages: int | None = None, **sampling: float,
) -> Pictures:  # fmt: skip
    """Continue a picture beyond its edges; its own pixels do not change.

    Args:
        text: describes the whole picture as it should be afterwards. picture: file, PIL image, array or tensor.
        margins: number of pixels to add at (top, left, bottom, right).
        n, seed, stages, sampling: as for ``CogView2.edit``.

    Raises:
        MiniCogViewError: as ``CogView2.edit``; or if a margin is negative or all are 0.
    """
    top, left, bottom, right = margins
    if min(margins) < 0 or max(margins) == 0:
        raise MiniCogViewError(f"margins are {margins}: give pixels to add at top, left, bottom and right, not only 0")
    image = to_image(picture)
    check_pixels(image.width + left + right, image.height + top + bottom, "the picture with its margins")
    # The margins repeat the picture's edge pixels, so that they do not disturb the codes of kept cells beside the hole.
    pixels = np.pad(np.array(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = torch.ones(pixels.shape[:2], dtype=torch.bool)
    mask[top : top + image.height, left : left + image.width] = False
    return model.edit(text, alike(pixels, image), mask, n, seed, stages, **sampling)
