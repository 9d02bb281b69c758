"""What iterative super-resolution learns: to guess masked fine tokens from those around them and from the text.

The idea: masks of all the kinds that it will meet. Half of them are rounds of the schedule, moved to a random place;
the others are cells drawn at random, few or many. The cells in view are, three times of four, not the true ones but
what the direct stage made of the picture ("drafts"): a model that has only seen true neighbours takes a draft's
mistakes for facts. A model that is told what stood in a masked cell gets the draft's code there, or that of the
enlarged coarse picture, never the true one. The original's authors never published this part. CogView2 (arXiv
2204.14217), section 3.3.

Shapes: ``N`` pictures, ``F`` fine tokens of a picture, ``B`` batch, ``K`` codebook size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minicogview.lopar import OFFICIAL, IterativeSR, Schedule
from minicogview.training.coglm import neighbours
from minicogview.training.super_resolution import (
    Pairs,
    SuperResolutionRecipe,
    fine_loss,
    replace_codes,
    soft_targets,
)


def draw_mask(grid: tuple[int, int], schedule: Schedule, rng: np.random.Generator) -> Tensor:
    """Cells to guess (rows, columns) bool: a round of the schedule at a random place, or random cells; never none."""
    if rng.random() < 0.5:
        mask = schedule.masked(int(rng.integers(schedule.n_rounds)) + 1, grid)
        return mask.roll(tuple(rng.integers(len(schedule.tile), size=2).tolist()), (0, 1))
    mask = torch.from_numpy(rng.random(grid) < rng.uniform(0.05, 1))
    mask[tuple(rng.integers(grid).tolist())] = True
    return mask


class IterativeObjective:
    """Trains ``IterativeSR``, all of it. See ``training.fit``.

    Args:
        drafts: (N, F) codes that the direct stage gives for each picture; None trains on true codes alone, or where
            ``pairs.start`` is given on those.
        validate: whatever the model is to be judged by.
    """

    DRAFTS = 0.75  # share of samples that show a draft in the cells in view

    def __init__(
        self,
        model: IterativeSR,
        pairs: Pairs,
        codebook: Tensor,
        recipe: SuperResolutionRecipe,
        drafts: Tensor | None = None,
        schedule: Schedule = OFFICIAL,
        validate: Callable[[IterativeSR], dict[str, float]] | None = None,
    ):
        self.model, self.pairs, self.recipe = model, pairs, recipe
        self.drafts, self.schedule = drafts, schedule
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
            drafted = torch.from_numpy(rng.random((len(rows), 1)) < self.DRAFTS)
            shown = torch.where(drafted, before, shown)
        masks = torch.stack([draw_mask(config.fine_grid, self.schedule, rng).flatten() for _ in rows])  # (B, F)
        _, hidden = self.model(texts, shown.masked_fill(masks, config.coglm.ids.boi), before)
        logits = self.model.base.logits(hidden[masks.to(hidden.device)], len(self.targets))
        return fine_loss(logits, labels[masks], self.targets)

    def before(self, rows: Tensor, rng: np.random.Generator) -> Tensor | None:
        """Pictures as they may come in: (B, F) codes of the direct stage or of the enlarged coarse picture."""
        drafts, start = self.drafts, self.pairs.start
        if drafts is None or start is None:
            only = start if drafts is None else drafts
            return None if only is None else only[rows]
        direct = torch.from_numpy(rng.random((len(rows), 1)) < 0.7)
        return torch.where(direct, drafts[rows], start[rows])

    def validate(self) -> dict[str, float]:
        """Whatever was handed in to judge the model by; nothing by default."""
        return self._validate(self.model) if self._validate else {}
