"""Two more uses of filling in: pictures much like a given one, and pictures that go on beyond their edges.

The idea: CogLM fills in any set of tokens. If they are scattered over the picture, what comes out keeps its
composition and changes its details; if they lie around it, the picture grows. Both end in the same calls as editing.
CogView2 (arXiv 2204.14217), section 3.2.

Shapes: a picture has H x W pixels; ``grid`` tokens along each side.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.pictures import Picture, Pictures, to_image
from minicogview.pipeline import CogView2


def random_region(grid: int, share: float, seed: int) -> Tensor:
    """(grid, grid) bool with a random ``share`` (above 0, at most 1) of the cells set, at least one."""
    if not 0 < share <= 1:
        raise MiniCogViewError(f"share is {share}: give the part of the picture to draw anew, above 0 and at most 1")
    order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(seed))
    region = torch.zeros(grid * grid, dtype=torch.bool)
    region[order[: max(1, round(share * grid * grid))]] = True
    return region.reshape(grid, grid)


def vary(
    model: CogView2, text: str, picture: Picture, share: float = 0.5, n: int = 4, seed: int = 0,
    stages: int | None = None, **sampling: float,
) -> Pictures:  # fmt: skip
    """Pictures much like a given one: a random share of its tokens drawn anew, another choice for each picture.

    Args:
        text: what the picture shows. picture: file, PIL image, tensor (3, H, W), or codes (grid, grid).
        share: of the tokens; the more, the less alike.
        n, seed, stages, sampling: as for ``CogView2.generate``.

    Raises:
        MiniCogViewError: as ``CogView2.complete``; or if the share is not above 0 and at most 1.
    """
    if n < 1:
        raise MiniCogViewError(f"n is {n}: ask for 1 picture or more")
    codes = model.codes(picture)
    drawn = [
        model.complete(text, codes, random_region(model.grid, share, seed + i), 1, seed + i, **sampling)
        for i in range(n)
    ]
    images = [one.images[0] for one in drawn]
    tokens, scores = (torch.cat([getattr(one, name) for one in drawn]) for name in ("tokens", "scores"))
    together = Pictures(images, tokens, scores, text, [seed + i for i in range(n)], coglm=images)
    return model.upsample(together, stages)


def outpaint(
    model: CogView2, text: str, picture: Picture, margins: tuple[int, int, int, int], n: int = 1, seed: int = 0,
    stages: int | None = None, **sampling: float,
) -> Pictures:  # fmt: skip
    """A picture that goes on beyond its edges; its own pixels stay as they are.

    Args:
        text: what the whole picture shows when it is done. picture: file, PIL image, or tensor (3, H, W).
        margins: pixels to add (top, left, bottom, right).
        n, seed, stages, sampling: as for ``CogView2.edit``.

    Raises:
        MiniCogViewError: as ``CogView2.edit``; or if a margin is negative or all are 0.
    """
    top, left, bottom, right = margins
    if min(margins) < 0 or max(margins) == 0:
        raise MiniCogViewError(f"margins are {margins}: give pixels to add at top, left, bottom and right, not only 0")
    image = to_image(picture)
    # Outside of it the picture's edge goes on, so that the cut-out's own codes have nothing strange beside the hole.
    pixels = np.pad(np.array(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = torch.ones(pixels.shape[:2], dtype=torch.bool)
    mask[top : top + image.height, left : left + image.width] = False
    return model.edit(text, Image.fromarray(pixels), mask, n, seed, stages, **sampling)
