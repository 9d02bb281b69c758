"""MaskGIT's decoding as an alternative to LoPAR's: the model's confidence, not a table, decides what is resampled.

The idea: mask every cell and guess all codes at once. Keep the guesses that the model is surest of, mask the others and
guess them again, fewer in every round; their number falls along a cosine. LoPAR's cells (``lopar.py``) are fixed in
advance, and in its last round they lie apart. Here they depend on the picture, and they may be neighbours even in the
last round. MaskGIT (arXiv 2202.04200), section 3.2.

Mirrors: ``parallel_decode.py`` of google-research/maskgit, including the noise that is added to the confidence.

Shapes: ``B`` rows, ``F`` fine tokens, ``S`` cells of one chunk, ``D`` width, ``V`` picture codes, ``T`` rounds.

Different on purpose: the model is CogView2's iterative one, in which a token sees only the fine tokens around it and
not the whole picture. Models with ``fine_start="enlarged"`` are told the direct stage's code of every masked cell, in
all rounds; a rejected guess is forgotten, as in MaskGIT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.sampling import uniforms
from minicogview.super_resolution import CellSampler


def cosine_counts(n_cells: int, n_rounds: int) -> list[int]:
    """How many of ``n_cells`` each round masks: all in the first, then ever fewer; after the last round, none are left.

    Example:
        >>> cosine_counts(100, 4)
        [100, 93, 71, 39]
    """
    shares = [math.cos(math.pi / 2 * round / n_rounds) for round in range(n_rounds)]
    # 1e-9 makes up for rounding: the computed cos(60 degrees) is slightly above one half.
    return [math.ceil(n_cells * share - 1e-9) for share in shares]


@torch.no_grad()
def guess(
    model: IterativeSR, hidden: Tensor, masked: Tensor, sampler: CellSampler, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """A code for every masked cell, and the model's confidence in it.

    Args:
        hidden: (B, F, D) hidden states of the fine tokens. masked: (B, F) bool.
        chunk: number of cells whose logits are in memory together.

    Returns:
        codes (B, F) int64, and as confidence their log-probabilities (B, F) float32, at temperature 1 and over all
        codes, even if the sampler keeps only some. Where a cell is not masked, both are meaningless.
    """
    codes = torch.zeros_like(masked, dtype=torch.long)
    confidence = torch.zeros(masked.shape, device=hidden.device)
    # Each row has other cells masked, but a sampler takes the same cells for all rows: use those that any row needs.
    for cells in masked.any(0).nonzero()[:, 0].split(chunk):
        logits = model.base.logits(hidden[:, cells], model.config.coglm.n_codes).float()  # (B, S, V)
        drawn = sampler(logits, cells)  # (B, S)
        codes[:, cells] = drawn
        confidence[:, cells] = logits.gather(2, drawn[:, :, None])[:, :, 0] - logits.logsumexp(2)
    return codes, confidence


def least_sure(confidence: Tensor, masked: Tensor, n: int) -> Tensor:
    """The ``n`` cells of each row with the lowest confidence among the masked ones, as (B, F) bool.

    Args:
        confidence: (B, F). masked: (B, F) bool, with at least ``n`` cells in each row.
    """
    cells = confidence.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True)[:, :n]  # (B, n)
    return torch.zeros_like(masked).scatter_(1, cells, True)


def gumbel(seeds: Sequence[int], n_rounds: int, n_cells: int) -> Tensor:
    """Gumbel noise (B, T, F); row i depends on ``seeds[i]`` alone and is the same for every device."""
    uniform = uniforms(seeds, n_rounds * n_cells)[..., 0].clamp(1e-7, 1 - 1e-7)
    return rearrange(-torch.log(-torch.log(uniform)), "b (t f) -> b t f", f=n_cells)


@torch.no_grad()
def resample_by_confidence(
    model: IterativeSR,
    texts: Sequence[Sequence[int]],
    fine: Tensor,
    samplers: Sequence[CellSampler],
    region: Tensor | None = None,
    choice_temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    masks: list[Tensor] | None = None,
) -> list[Tensor]:
    """Guess all fine tokens, keep the guesses that the model is surest of, and guess the rest again, round after round.

    Args:
        texts: token ids of each text. fine: (B, F) codes of the direct stage. Inside the region, only models with
            ``fine_start="enlarged"`` see them.
        samplers: one for each round.
        region: (rows, columns), 1 where tokens may change; None: everywhere.
        choice_temperature: scale of the Gumbel noise that is added to the log-probabilities when cells are chosen. It
            falls linearly over the rounds, to 0 after the last. The original uses 4.5; 0 adds no noise.
        seeds: (B,) seeds of the noise, one for each row; None: 0, 1, 2, ...
        masks: a list to be filled with the cells (B, F) bool that each round masked.

    Returns:
        the codes (B, F) after each round, including guesses that the next round rejects.

    Raises:
        MiniCogViewError: if ``fine`` or ``region`` has another shape, there is no sampler, ``choice_temperature`` is
            below 0, or there is not one seed for each row.
    """
    model.check(fine, region)
    if not samplers or choice_temperature < 0:
        what = f"{len(samplers)} samplers, choice_temperature {choice_temperature}"
        raise MiniCogViewError(f"{what}: give at least one sampler, one for each round, and a temperature from 0")
    seeds = range(len(fine)) if seeds is None else seeds
    if len(seeds) != len(fine):
        raise MiniCogViewError(f"{len(seeds)} seeds for {len(fine)} pictures: give one for each")

    before = fine = fine.to(model.base.token_embedding.weight.device)
    noise = choice_temperature * gumbel(seeds, len(samplers), fine.shape[1]).to(fine.device)  # (B, T, F)
    allowed = torch.ones(model.config.fine_grid, dtype=torch.bool) if region is None else region.cpu().bool()
    masked = allowed.flatten().expand(len(fine), -1).to(fine.device)  # (B, F)
    counts = cosine_counts(int(allowed.sum()), len(samplers))
    confidence, rounds = torch.zeros(masked.shape, device=fine.device), []
    for round, (sampler, n) in enumerate(zip(samplers, counts, strict=True)):
        if round > 0:
            cooled = noise[:, round] * (1 - round / len(samplers))
            masked = least_sure(confidence + cooled, masked, n)
        if n > 0:
            _, hidden = model(texts, fine.masked_fill(masked, model.config.coglm.ids.boi), before)
            codes, confidence = guess(model, hidden, masked, sampler)
            fine = torch.where(masked, codes, fine)
        rounds.append(fine)
        if masks is not None:
            masks.append(masked)
    return rounds
