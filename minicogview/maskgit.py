"""MaskGIT's decoding beside LoPAR's: the model's own confidence, not a table, says what is guessed again.

The idea: mask everything and guess it; keep the guesses the model is surest of, mask the others and guess again, ever
fewer of them along a cosine. LoPAR's cells (``lopar.py``) are fixed in advance, and those of its last round lie apart;
here they follow from the picture, differ from picture to picture, and may lie side by side to the end. MaskGIT
(arXiv 2202.04200), section 3.2.

Mirrors: ``parallel_decode.py`` of google-research/maskgit, where the noise on the confidence comes from.

Shapes: ``B`` rows, ``F`` fine tokens, ``S`` cells of one chunk, ``V`` picture codes, ``T`` rounds.

Different on purpose: the model is CogView2's iterative one, where a token sees the fine tokens around it alone, and not
the whole picture. Models with ``fine_start="enlarged"`` are told the draft's code in every masked cell, in all rounds;
a rejected guess is forgotten, as in MaskGIT.
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
    """How many of ``n_cells`` are masked in each round: all in the first, then ever fewer; none stay after the last.

    Example:
        >>> cosine_counts(100, 4)
        [100, 93, 71, 39]
    """
    shares = [math.cos(math.pi / 2 * round / n_rounds) for round in range(n_rounds)]
    return [math.ceil(n_cells * share - 1e-9) for share in shares]  # cos(60 degrees) is a hair above one half


@torch.no_grad()
def guess(
    model: IterativeSR, hidden: Tensor, masked: Tensor, sampler: CellSampler, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """A code for every masked cell, and how likely the model found it.

    Args:
        hidden: (B, F, D) of the fine tokens. masked: (B, F) bool.
        chunk: cells whose logits are in memory together.

    Returns:
        codes (B, F) int64 and their log probabilities (B, F) float32, at temperature 1 and over all codes whatever
        the sampler leaves in play. Where a cell is not masked, code and confidence mean nothing.
    """
    codes = torch.zeros_like(masked, dtype=torch.long)
    confidence = torch.zeros(masked.shape, device=hidden.device)
    # Rows have other cells masked, but samplers take one list for all: guess where any row needs it.
    for cells in masked.any(0).nonzero()[:, 0].split(chunk):
        logits = model.base.logits(hidden[:, cells], model.config.coglm.n_codes).float()  # (B, S, V)
        drawn = sampler(logits, cells)  # (B, S)
        codes[:, cells] = drawn
        confidence[:, cells] = logits.gather(2, drawn[:, :, None])[:, :, 0] - logits.logsumexp(2)
    return codes, confidence


def least_sure(confidence: Tensor, masked: Tensor, n: int) -> Tensor:
    """The ``n`` cells of each row with the lowest confidence among the masked ones, as (B, F) bool.

    Args:
        confidence: (B, F). masked: (B, F) bool, at least ``n`` of each row.
    """
    cells = confidence.masked_fill(~masked, torch.inf).argsort(dim=1, stable=True)[:, :n]  # (B, n)
    return torch.zeros_like(masked).scatter_(1, cells, True)


def gumbel(seeds: Sequence[int], n_rounds: int, n_cells: int) -> Tensor:
    """Gumbel noise (B, T, F); row i follows from ``seeds[i]`` alone, on any device."""
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
    """Guess all fine tokens anew, keep those the model is surest of, guess the rest again, round after round.

    Args:
        texts: token ids of each text. fine: (B, F) codes of the direct stage, which only models with
            ``fine_start="enlarged"`` get to see inside the region.
        samplers: one for each round.
        region: (rows, columns), 1 where tokens may change; None lets all of them.
        choice_temperature: how much Gumbel noise is added to the log probabilities when cells are chosen, falling
            evenly to 0 at the last round; the original uses 4.5. 0 follows the confidence alone.
        seeds: (B,) of the noise, row i from ``seeds[i]`` alone; None takes 0, 1, 2, ...
        masks: filled with the cells (B, F) bool that were masked in each round.

    Returns:
        the codes (B, F) after each round, guesses that the next round throws away included.

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

    draft = fine = fine.to(model.base.token_embedding.weight.device)
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
            _, hidden = model(texts, fine.masked_fill(masked, model.config.coglm.ids.boi), draft)
            codes, confidence = guess(model, hidden, masked, sampler)
            fine = torch.where(masked, codes, fine)
        rounds.append(fine)
        if masks is not None:
            masks.append(masked)
    return rounds
