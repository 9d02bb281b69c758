"""What the direct stage learns from: the same pictures as coarse and as fine codes, and their captions.

The idea: the model sees a caption and the coarse codes and predicts every fine code at once. The original's authors
never published this part. Ours adds what helped a small model: a caption is left out now and then; some coarse codes
are replaced, because at inference they come from CogLM and are not perfect; and the target is a distribution over all
codes that favours those near the true one, because several codes may look the same in a cell. CogView2 (arXiv
2204.14217), section 3.3.

Shapes: ``N`` pictures, ``n`` coarse and ``F`` fine tokens of a picture, ``B`` batch, ``K`` codebook size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicogview.data.captions import LANGUAGES
from minicogview.numbers import MANY, number
from minicogview.super_resolution import DirectSR, text_slots
from minicogview.tokenizer import Tokenizer
from minicogview.training.coglm import check_recipe, neighbours
from minicogview.training.state import checksum


@dataclass(frozen=True)
class Pairs:
    """Pictures at two resolutions. ``describe(i, language, rng)`` returns a caption of picture ``i``."""

    coarse: Tensor  # (N, n) int64
    fine: Tensor  # (N, F) int64
    describe: Callable[[int, str, random.Random], str]
    tokenizer: Tokenizer
    start: Tensor | None = None  # (N, F) codes of the enlarged coarse pictures, for models that start from these

    def draw(self, size: int, no_caption: float, seed: int, step: int) -> tuple[Tensor, list[list[int]]]:
        """Rows (B,) and caption ids of a batch that depends on (seed, step) alone; some captions are empty."""
        rng = random.Random(f"{seed}/{step}")
        rows = [rng.randrange(len(self.fine)) for _ in range(size)]
        texts = [self.tokenizer.encode(self.describe(row, rng.choice(LANGUAGES), rng)) for row in rows]
        return torch.tensor(rows), [[] if rng.random() < no_caption else text for text in texts]


    def checksums(self) -> dict[str, str]:
        """What tells these pictures and their texts from others."""
        first = range(min(32, len(self.fine)))
        texts = [self.tokenizer.encode(self.describe(i, "en", random.Random(i))) for i in first]
        said = torch.tensor([token for text in texts for token in text])
        return {"pictures": checksum(self.coarse, self.fine, self.start), "texts": checksum(said)}


@dataclass(frozen=True)
class SuperResolutionRecipe:
    """How samples are made. Shares and rates are between 0 and 1."""

    batch_size: int = 8
    no_caption: float = 0.1  # share of samples without a caption
    max_noise: float = 0.1  # the share of replaced input codes is uniform between 0 and this
    softness: float = 1.5  # of the targets, see ``soft_targets``; 0: the true code alone
    n_neighbours: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_recipe(self, "no_caption", "max_noise")
        object.__setattr__(self, "softness", number(self.softness, "softness", 0, MANY))


def replace_codes(codes: Tensor, near: Tensor, max_noise: float, rng: np.random.Generator) -> Tensor:
    """Codes (B, n) with some of them replaced by a neighbour in the codebook; ``near`` is (K, count)."""
    rate = torch.from_numpy(rng.uniform(0, max_noise, (len(codes), 1)))
    hit = torch.from_numpy(rng.random(tuple(codes.shape))) < rate
    which = torch.from_numpy(rng.integers(near.shape[1], size=tuple(codes.shape)))
    return torch.where(hit, near[codes, which], codes)


def soft_targets(codebook: Tensor, softness: float) -> Tensor:
    """(K, K) target distributions: the nearer a code (K, C) is to the true one, the larger its probability.

    It falls as exp(-d / (softness * d0)), with d the squared distance of two codes and d0 that of nearest neighbours,
    on average.
    """
    if softness == 0:
        return torch.eye(len(codebook))
    squared = torch.cdist(codebook, codebook).square()
    nearest = squared.clone().fill_diagonal_(torch.inf).min(1).values.mean()
    return (-squared / (softness * nearest)).softmax(-1)


class DirectObjective:
    """Trains what is new in ``DirectSR``: positions, and the fine level's attention or all of its layers.

    See ``training.fit``.

    Args:
        train_base: an experiment: also train the weights that the model shares with CogLM. Afterwards they are no
            longer CogLM's.
        validate: an optional function that evaluates the model.
    """

    def __init__(
        self,
        model: DirectSR,
        pairs: Pairs,
        codebook: Tensor,
        recipe: SuperResolutionRecipe,
        train_base: bool = False,
        validate: Callable[[DirectSR], dict[str, float]] | None = None,
    ):
        self.model, self.pairs, self.recipe = model, pairs, recipe
        self.near = neighbours(codebook, recipe.n_neighbours)
        self.targets = soft_targets(codebook, recipe.softness)
        self._validate, self.train_base = validate, train_base
        model.base.requires_grad_(train_base)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of batch ``step`` in nats per fine token."""
        recipe = self.recipe
        rows, texts = self.pairs.draw(recipe.batch_size, recipe.no_caption, recipe.seed, step)
        rng = np.random.default_rng((recipe.seed, step))
        coarse = replace_codes(self.pairs.coarse[rows], self.near, recipe.max_noise, rng)
        start = self.pairs.start
        if start is not None:
            start = replace_codes(start[rows], self.near, recipe.max_noise, rng)
        slots = text_slots(texts, self.model.config.n_text)
        _, hidden = self.model(slots, coarse, start)  # (B, F, D)
        labels = self.pairs.fine[rows]
        return fine_loss(self.model.base.logits(hidden, len(self.targets)), labels, self.targets)

    def decides(self) -> dict[str, Any]:
        """What decides the result besides the settings: the recipe and the data."""
        return {**asdict(self.recipe), "train_base": self.train_base, **self.pairs.checksums()}

    def validate(self) -> dict[str, float]:
        """The values of the function that was given as ``validate``; none without it."""
        return self._validate(self.model) if self._validate else {}


def fine_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of logits (..., K) against soft targets, and the share of labels (...) predicted exactly."""
    logits, labels = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
    loss = F.cross_entropy(logits, targets.to(logits.device)[labels])
    right = (logits.detach().argmax(-1) == labels).float().mean()
    return loss, {"exact": float(right), "tokens": len(labels)}
