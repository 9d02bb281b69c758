"""Iterative super-resolution with LoPAR: mask some of the fine tokens and resample them, in six rounds.

The idea: the direct stage chose every fine token by itself, so neighbours may disagree. A masked-token model predicts a
masked cell from the text's first words and the fine tokens around it, and a few rounds of masking and resampling make
neighbours agree. Every round masks fewer cells than the one before. So the last choices in a neighbourhood are made one
after another, while those far apart are made at the same time: this is *local parallel autoregressive* generation,
LoPAR. In the first round, 65 % of the four direct neighbours of a masked cell are masked too; in the last round, none.
CogView2 (arXiv 2204.14217), section 3.3.

Mirrors: ``sr_pipeline/itersr_model.py`` and ``itersr_sampling.py`` of the official code. Its schedule is a 6 x 6 table
that is repeated over the picture, written here as data. It never resamples 1300 of the 3600 tokens: they stay as the
direct stage chose them.

Shapes: ``B`` rows, ``G`` text slots, ``F`` fine tokens, ``D`` width, ``N`` heads, ``H`` head size, ``P`` tile side.

Different on purpose: ``spread_schedule`` makes schedules of other lengths and tile sizes by a rule. Models with
``fine_start="enlarged"`` are told the code that a masked cell had before; the original's see an empty cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minicogview.attention import attention_bias
from minicogview.config import SuperResolutionConfig
from minicogview.errors import MiniCogViewError
from minicogview.local_attention import Impl, local_attention
from minicogview.super_resolution import (
    CellSampler,
    DirectSR,
    Slots,
    Walk,
    attend_everywhere,
    attentions,
    check_codes,
    choose_codes,
    run_levels,
    split_heads,
    text_slots,
    two_levels,
)
from minicogview.transformer import Record, Transformer
from minicogview.windows import Global


@dataclass(frozen=True)
class Schedule:
    """Which cells are masked in which round: a round masks the cells whose number is at least that of the round.

    Attributes:
        tile: (P, P) integers, repeated over the picture. A cell with number ``c`` is resampled in rounds 1 to ``c``; if
            ``c`` is below 1, never.
        top_k: how many of the likeliest codes may be drawn, one number for each round.
    """

    tile: tuple[tuple[int, ...], ...]
    top_k: tuple[int, ...]

    @property
    def n_rounds(self) -> int:
        """Number of rounds; each is one forward pass."""
        return len(self.top_k)

    def masked(self, round: int, grid: tuple[int, int]) -> Tensor:
        """The cells (rows, columns) bool of a grid that are masked in ``round``, counted from 1."""
        tile, (rows, columns) = torch.tensor(self.tile), grid
        repeats = (-(-rows // len(tile)), -(-columns // tile.shape[1]))  # rounded up
        return tile.repeat(repeats)[:rows, :columns] >= round


OFFICIAL = Schedule(
    tile=(
        (-1, 0, 1, 2, 3, 4),
        (0, -1, 2, -1, -2, 5),
        (1, -2, 3, 4, 5, 6),
        (2, 3, 4, 5, -1, 1),
        (3, -1, -2, 0, -1, 2),
        (4, 5, 6, 1, 3, -2),
    ),
    top_k=(40, 40, 40, 20, 20, 10),
)


def spread_order(side: int) -> list[tuple[int, int]]:
    """The cells of a tile in an order in which each lies as far as possible from the ones before it.

    Distances wrap around the tile's borders, since the tile is repeated.
    """
    cells = [(row, column) for row in range(side) for column in range(side)]

    def distance(a: tuple[int, int], b: tuple[int, int]) -> float:
        steps = [min(abs(x - y), side - abs(x - y)) for x, y in zip(a, b, strict=True)]
        return math.hypot(*steps)

    def spread(cell: tuple[int, int]) -> tuple[float, float]:
        distances = [distance(cell, earlier) for earlier in order]
        return min(distances), sum(distances)  # ties go to the cell that is far from all others, not only the nearest

    order = [cells[0]]
    while len(order) < len(cells):
        order.append(max((cell for cell in cells if cell not in order), key=spread))
    return order


def spread_schedule(
    n_rounds: int, side: int = 6, first: float = 0.64, last: float = 0.055, top_k: int = 20
) -> Schedule:
    """A schedule of any length by a rule: the share of masked cells falls evenly, and they lie ever farther apart.

    Args:
        n_rounds: number of rounds, at least 1. side: side of the tile.
        first, last: share of the cells that the first and the last round mask; the defaults are those of ``OFFICIAL``.
            Every round masks at least one cell of the tile.
        top_k: the same for every round.

    Raises:
        MiniCogViewError: if these numbers do not make a schedule.
    """
    if n_rounds < 1 or side < 1 or top_k < 1 or not 0 < last <= first <= 1:
        raise MiniCogViewError(
            f"no schedule of {n_rounds} rounds, tile {side}, top_k {top_k}, shares {first} to {last}: "
            "use at least 1 of each, and 0 < last <= first <= 1"
        )
    tile, order = [[0] * side for _ in range(side)], spread_order(side)
    for round in range(1, n_rounds + 1):
        share = first + (last - first) * (round - 1) / max(n_rounds - 1, 1)
        for row, column in order[: max(1, int(share * side * side + 0.5))]:
            tile[row][column] = round
    return Schedule(tuple(map(tuple, tile)), (top_k,) * n_rounds)


def lopar_attention(
    text: tuple[Tensor, Tensor, Tensor],
    fine: tuple[Tensor, Tensor, Tensor],
    real: Tensor,
    config: SuperResolutionConfig,
    text_bias: float | Tensor = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one layer: text sees text; a fine token sees the text and the fine tokens around it.

    Args:
        text: q, k, v (B, G, N, H). fine: q, k, v (B, F, N, H).
        real: (B or 1, G) bool, text slots that are in use.
        text_bias: number or (G,), added to the scores of text keys when fine tokens look at them.

    Returns:
        (B, G, N, H) and (B, F, N, H).
    """
    everywhere = Global(text[1], text[2], real, text_bias)
    fine_out = local_attention(*fine, config.fine_grid, config.window, everywhere=everywhere, impl=impl)
    bias = attention_bias(real[:, None, :])  # (B, 1, 1, G): the same for every query
    return attend_everywhere(*text, bias), fine_out


class IterativeSR(nn.Module):
    """The iterative stage: a masked-token model of the fine grid, trained further from CogLM's weights.

    Args:
        config: sizes.
        base: the transformer to use, shared and not copied; None makes a new one.
    """

    def __init__(self, config: SuperResolutionConfig, base: Transformer | None = None):
        super().__init__()
        self.config = config
        self.base, self.fine_position = two_levels(config, base)
        self.walk: Walk = iter

    @torch.no_grad()
    def start_from_direct(self, direct: DirectSR) -> None:
        """Copy the direct stage's weights for fine tokens: positions, and its own layers or only their attention."""
        self.fine_position.load_state_dict(direct.fine_position.state_dict())
        if direct.config.own_layers:
            self.base.layers.load_state_dict(direct.fine_layers.state_dict())
        else:
            for own, learned in zip(attentions(self.base.layers), direct.fine_attention, strict=True):
                own.load_state_dict(learned.state_dict())

    def forward(
        self,
        texts: Sequence[Sequence[int]] | Slots,
        fine: Tensor,
        before: Tensor | None = None,
        record: Record | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm: text (B, G, D) and fine tokens (B, F, D).

        Args:
            texts: token ids of each text, of which the first ``config.n_text`` are read; or ``text_slots`` of them.
            fine: (B, F) codes; <start_of_image> where a cell is masked.
            before: (B, F) codes before masking, for models with ``fine_start="enlarged"``.
            record: filled with the hidden states of text and fine tokens, (B, G + F, D) after each layer.
        """
        config, base = self.config, self.base
        device = base.token_embedding.weight.device
        tokens, positions, real = (t.to(device) for t in text_slots(texts, config.n_text))
        text = base.token_embedding(tokens) + base.position_embedding(positions)  # (B, G, D)
        cells = base.token_embedding(fine.to(device)) + self.fine_position.weight  # (B, F, D)
        if config.fine_start == "enlarged":
            if before is None:
                raise MiniCogViewError("this model is told what stood in masked cells: give before, codes (B, F)")
            masked = (fine == config.coglm.ids.boi).to(device)
            cells = cells + base.token_embedding(before.to(device)) * masked[:, :, None]
        layers = attentions(base.layers)

        def attention(i: int, text: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
            layer = layers[i]
            text_qkv, fine_qkv = (split_heads(layer.qkv(x), layer.n_heads) for x in (text, fine))
            text, fine = lopar_attention(text_qkv, fine_qkv, real, config)
            return layer.out(text.flatten(2)), layer.out(fine.flatten(2))

        return run_levels(base, text, cells, attention, record, walk=self.walk)

    def check(self, fine: Tensor, region: Tensor | None) -> None:
        """Raise MiniCogViewError unless ``fine`` is (B, F) codes, and ``region`` is None or (rows, columns)."""
        grid = self.config.fine_grid
        check_codes(fine, grid[0] * grid[1], self.config.coglm.n_codes, "fine")
        if region is not None and tuple(region.shape) != grid:
            raise MiniCogViewError(f"region of shape {tuple(region.shape)}: expected {grid}, one entry for each token")

    @torch.no_grad()
    def resample(
        self,
        texts: Sequence[Sequence[int]],
        fine: Tensor,
        samplers: Sequence[CellSampler],
        schedule: Schedule = OFFICIAL,
        region: Tensor | None = None,
    ) -> list[Tensor]:
        """Mask and resample some of the fine tokens, round after round.

        Args:
            texts: token ids of each text. fine: (B, F) codes of the direct stage.
            samplers: one for each round of the schedule.
            region: (rows, columns), 1 where tokens may change; None: everywhere.

        Returns:
            the codes (B, F) after each round.

        Raises:
            MiniCogViewError: if ``fine`` or ``region`` has another shape, or there is not one sampler for each round.
        """
        grid, ids, n_codes = self.config.fine_grid, self.config.coglm.ids, self.config.coglm.n_codes
        self.check(fine, region)
        if len(samplers) != schedule.n_rounds:
            raise MiniCogViewError(f"{len(samplers)} samplers for {schedule.n_rounds} rounds: give one for each")
        fine, rounds = fine.to(self.base.token_embedding.weight.device), []
        for round, sampler in enumerate(samplers, 1):
            masked = schedule.masked(round, grid)  # (rows, columns)
            if region is not None:
                masked = masked & region.cpu().bool()
            cells = torch.nonzero(masked.flatten())[:, 0].to(fine.device)  # (S,)
            if len(cells):
                _, hidden = self(texts, fine.index_fill(1, cells, ids.boi), fine)
                fine = fine.index_copy(1, cells, choose_codes(self.base, hidden, cells, n_codes, sampler))
            rounds.append(fine)
        return rounds
