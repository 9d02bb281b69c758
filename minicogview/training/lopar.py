"""What the iterative stage learns: to predict masked fine tokens from the tokens around them and from the text.

The idea: train with every kind of mask that the model will meet. Half of the masks are rounds of the schedule, shifted
at random; the others are random cells, few or many. Three times out of four the cells in view hold the direct stage's
codes instead of the true ones: a model that has only seen true neighbours trusts the direct stage's mistakes. A model
that is told what stood in a masked cell gets the direct stage's code there, or that of the enlarged coarse picture,
never the true one. The original's authors never published this part. CogView2 (arXiv 2204.14217), section 3.3.

Shapes: ``N`` pictures, ``F`` fine tokens of a picture, ``B`` batch, ``K`` codebook size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicogview.lopar import OFFICIAL, IterativeSR, Schedule
from minicogview.super_resolution import text_slots
from minicogview.training.coglm import neighbours
from minicogview.training.state import checksum
from minicogview.training.super_resolution import (
    Pairs,
    SuperResolutionRecipe,
    fine_loss,
    replace_codes,
    soft_targets,
)


def draw_mask(grid: tuple[int, int], schedule: Schedule, rng: np.random.Generator) -> Tensor:
    """Cells to predict, (rows, columns) bool: a randomly shifted round of the schedule, or at least one random cell."""
    if rng.random() < 0.5:
        mask = schedule.masked(int(rng.integers(schedule.n_rounds)) + 1, grid)
        return mask.roll(tuple(rng.integers(len(schedule.tile), size=2).tolist()), (0, 1))
    mask = torch.from_numpy(rng.random(grid) < rng.uniform(0.05, 1))
    mask[tuple(rng.integers(grid).tolist())] = True
    return mask


class IterativeObjective:
    """Trains all of ``IterativeSR``. See ``training.fit``.

    Args:
        direct_codes: (N, F) the direct stage's codes for each picture. None: ``pairs.start`` takes their place, or
            the true codes if that is None too.
        validate: an optional function that evaluates the model.
    """

    DIRECT_SHARE = 0.75  # of the samples; their cells in view hold the codes of ``before`` instead of the true ones

    def __init__(
        self,
        model: IterativeSR,
        pairs: Pairs,
        codebook: Tensor,
        recipe: SuperResolutionRecipe,
        direct_codes: Tensor | None = None,
        schedule: Schedule = OFFICIAL,
        validate: Callable[[IterativeSR], dict[str, float]] | None = None,
    ):
        self.model, self.pairs, self.recipe = model, pairs, recipe
        self.direct_codes, self.schedule = direct_codes, schedule
        self.near = neighbours(codebook, recipe.n_neighbours)
        self.targets = soft_targets(codebook, recipe.softness)
        self._validate = validate

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of batch ``step`` in nats per masked token."""
        recipe, config = self.recipe, self.model.config
        rows, texts = self.pairs.draw(recipe.batch_size, recipe.no_caption, recipe.seed, step)
        rng = np.random.default_rng((recipe.seed, step))
        labels = self.pairs.fine[rows]  # (B, F)
        shown = replace_codes(labels, self.near, recipe.max_noise, rng)
        before = self.before(rows, rng)
        if before is not None:
            by_direct = torch.from_numpy(rng.random((len(rows), 1)) < self.DIRECT_SHARE)
            shown = torch.where(by_direct, before, shown)
        masks = torch.stack([draw_mask(config.fine_grid, self.schedule, rng).flatten() for _ in rows])  # (B, F)
        slots = text_slots(texts, config.n_text)
        _, hidden = self.model(slots, shown.masked_fill(masks, config.coglm.ids.boi), before)
        logits = self.model.base.logits(hidden[masks.to(hidden.device)], len(self.targets))
        return fine_loss(logits, labels[masks], self.targets)

    def before(self, rows: Tensor, rng: np.random.Generator) -> Tensor | None:
        """Codes (B, F) before masking, the direct stage's or the enlarged coarse picture's; None if there are none."""
        direct_codes, start = self.direct_codes, self.pairs.start
        if direct_codes is None or start is None:
            only = start if direct_codes is None else direct_codes
            return None if only is None else only[rows]
        by_direct = torch.from_numpy(rng.random((len(rows), 1)) < 0.7)
        return torch.where(by_direct, direct_codes[rows], start[rows])

    def decides(self) -> dict[str, Any]:
        """What decides the result besides the settings: the recipe, the data, and the direct stage's codes."""
        codes, schedule = checksum(self.direct_codes), asdict(self.schedule)
        return {**asdict(self.recipe), **self.pairs.checksums(), "direct_codes": codes, "schedule": schedule}

    def validate(self) -> dict[str, float]:
        """The values of the function that was given as ``validate``; none without it."""
        return self._validate(self.model) if self._validate else {}
