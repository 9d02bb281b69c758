"""What every token may look at in every task: the masks, positions and targets of CogLM.

The idea: one transformer draws, captions and fills in, because each task is only a different attention mask.
Some tokens are *context*: they see each other in both directions. The others are predicted one after another, and each
sees the context and the tokens before it. Every run of predictions starts after a token that is given: a start token,
the first cell of a patch's row, or the first token of a span. CogView2 (arXiv 2204.14217), section 3.1.

Mirrors: the data and mask functions of the original's ``pretrain_coglm`` and ``coglm_strategy`` files. Given the same
random choices, every function here returns exactly the same (``tests/parity``).

A training sample starts as ``raw``: text, <pad>, perhaps a second text, <pad>..., and the picture at the end.
Random choices are made by the ``draw_*`` functions and passed in, so that each mask is a plain function.

Shapes: ``S`` sequence length, ``n`` tokens of the picture (``grid * grid``). In a mask, 1 means "may look".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minicogview.config import LayoutConfig, SpecialIds


@dataclass
class Sample:
    """One sequence, ready for the model. ``labels[i]`` is what row ``i`` should predict."""

    tokens: Tensor  # (S,) int64
    positions: Tensor  # (S,) int64
    mask: Tensor  # (S, S) bool, row = query
    labels: Tensor | None = None  # (S,) int64
    loss_mask: Tensor | None = None  # (S,) bool


def shift_left(tokens: Tensor) -> Tensor:
    """For each token, the one after it, which is its target; the last token, which has none, is repeated."""
    return torch.cat([tokens[1:], tokens[-1:]])


def split_texts(raw: Tensor, n_image: int, pad: int) -> list[tuple[int, int]]:
    """Start and end (not included) of the one or two texts before the picture.

    Args:
        raw: (S,) text, pad, perhaps a second text, pads, then ``n_image`` picture tokens.
    """
    is_pad = (raw[: len(raw) - n_image] == pad).tolist() + [True]
    first_end = is_pad.index(True)
    second_end = is_pad.index(True, first_end + 1) if first_end + 1 < len(is_pad) else first_end + 1
    spans = [(0, first_end)]
    if second_end > first_end + 1:
        spans.append((first_end + 1, second_end))
    return spans


def text_to_image(raw: Tensor, ids: SpecialIds, layout: LayoutConfig, second_text: bool = False) -> Sample:
    """Learn to draw: the chosen text is context for every token, and the picture is predicted token by token.

    Args:
        raw: (S,) with at least one pad before the picture, which becomes <start_of_image>.
        second_text: whether the second of two texts is the prompt.
    """
    n, length = layout.n_image, len(raw)
    texts = split_texts(raw, n, ids.pad)
    start, end = texts[1 if second_text else 0]
    boi = length - n - 1

    tokens = raw.clone()
    tokens[boi] = ids.boi
    positions = torch.zeros(length, dtype=torch.long)
    positions[start:end] = torch.arange(end - start)
    positions[boi:] = torch.arange(layout.max_text, layout.max_text + n + 1)

    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[boi:, boi:] = torch.ones(n + 1, n + 1, dtype=torch.bool).tril()
    mask[:, start:end] = True
    loss_mask = torch.zeros(length, dtype=torch.bool)
    loss_mask[boi:-1] = True
    return Sample(tokens, positions, mask, shift_left(raw), loss_mask)


def draw_patches(generator: torch.Generator, layout: LayoutConfig, whole_grid: bool = False) -> list[tuple[int, int]]:
    """Top-left corners (row, column) of the patches to fill in, all different.

    Args:
        whole_grid: True: corners may lie wherever a patch fits. False, as in the original: their range is one too
            short, so that no patch ever covers the last row or column.
    """
    side = layout.grid - layout.patch_size + whole_grid
    codes = torch.randperm(side * side, generator=generator)[: layout.n_patches]
    return [divmod(code, side) for code in codes.tolist()]


def patch_cells(corners: list[tuple[int, int]], layout: LayoutConfig) -> tuple[Tensor, Tensor]:
    """The cells inside any patch, and those among them that predict their right neighbour in the same patch.

    Returns:
        two (n,) bool tensors in raster order.
    """
    inside = torch.zeros(layout.grid, layout.grid, dtype=torch.bool)
    predicts = torch.zeros_like(inside)
    for row, column in corners:
        inside[row : row + layout.patch_size, column : column + layout.patch_size] = True
        predicts[row : row + layout.patch_size, column : column + layout.patch_size - 1] = True
    return inside.flatten(), predicts.flatten()


def image_to_text(
    raw: Tensor,
    ids: SpecialIds,
    layout: LayoutConfig,
    languages: list[int],
    corners: list[tuple[int, int]],
) -> Sample:
    """Learn to caption and to fill in: texts are predicted from the picture, its patches from the cells around them.

    Args:
        raw: (S,) as in ``text_to_image``, with at least one pad before the picture.
        languages: the language token (English or Chinese) of each text.
        corners: patch corners from ``draw_patches``; with none, the whole picture is context.
    """
    n, length = layout.n_image, len(raw)
    first = length - n
    tokens = raw.clone()
    tokens[1:first] = raw[: first - 1]  # makes room for the first language token
    positions = torch.zeros(length, dtype=torch.long)
    positions[first:] = torch.arange(layout.max_text + 1, layout.max_text + 1 + n)
    inside, predicts = patch_cells(corners, layout)
    context = torch.cat([torch.zeros(first, dtype=torch.bool), ~inside])  # (S,)

    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[first:, first:] = torch.ones(n, n, dtype=torch.bool).tril()
    mask[context] = False
    mask[:, context] = True
    loss_mask = torch.zeros(length, dtype=torch.bool)
    loss_mask[first:] = predicts
    for language, (start, end) in zip(languages, split_texts(raw, n, ids.pad), strict=True):
        rows = slice(start, end + 1)  # the language token takes the place of the pad before the text
        size = end + 1 - start
        tokens[start] = language
        positions[rows] = torch.arange(size)
        mask[rows, rows] = torch.ones(size, size, dtype=torch.bool).tril()
        mask[rows, first:] = True
        loss_mask[start:end] = True
    return Sample(tokens, positions, mask, shift_left(tokens), loss_mask)


def span_lengths(draws: list[int], length: int, share: float = 0.15) -> list[int]:
    """Take drawn span lengths in order, each at least 1, while their sum is at most ``share * length``."""
    taken: list[int] = []
    for draw in draws:
        if sum(taken) + max(draw, 1) > share * length:
            break
        taken.append(max(draw, 1))
    return taken


def span_starts(gaps: list[int], lengths: list[int]) -> list[int]:
    """Turn distinct draws from ``range(length - sum(lengths))`` into starts, each moved past all earlier spans."""
    starts, covered = [], 0
    for gap, size in zip(sorted(gaps), lengths, strict=True):
        starts.append(gap + covered)
        covered += size
    return starts


def draw_spans(generator: torch.Generator, length: int, share: float = 0.15) -> list[tuple[int, int]]:
    """(start, length) of the spans to predict: lengths are Poisson with mean 3, starts are uniform."""
    draws = torch.poisson(torch.full((length,), 3.0), generator=generator).int().tolist()
    lengths = span_lengths(draws, length, share)
    places = torch.randperm(length - sum(lengths), generator=generator)[: len(lengths)].tolist()
    return list(zip(span_starts(places, lengths), lengths, strict=True))


def text_spans(raw: Tensor, spans: list[tuple[int, int]]) -> Sample:
    """Text alone: spans are predicted from left to right, and the text between them is context for every token.

    A span's first token is given. Each token of the span predicts the one after it, so the token just after a span is
    the last one predicted, and context continues one token later.

    Args:
        raw: (S,) text, no pads.
        spans: (start, length) in order, from ``draw_spans``.
    """
    length = len(raw)
    context = torch.zeros(length, dtype=torch.bool)
    loss_mask = torch.zeros(length, dtype=torch.bool)
    begin = 0
    for start, size in spans:
        context[begin:start] = True
        loss_mask[start : start + size] = True
        begin = start + size + 1
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[context] = False
    mask[:, context] = True
    return Sample(raw.clone(), torch.arange(length), mask, shift_left(raw), loss_mask)


def inference(n_text: int, length: int, layout: LayoutConfig) -> tuple[Tensor, Tensor]:
    """Positions and mask for generating a picture: the text is context, everything after it is causal.

    Returns:
        positions (S,) and mask (S, S) for ``n_text`` text tokens, <start_of_image>, and picture tokens.
    """
    positions = torch.cat([torch.arange(n_text), torch.arange(layout.max_text, layout.max_text + length - n_text)])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :n_text] = True
    return positions, mask


def completion_order(region: Tensor) -> tuple[Tensor, Tensor]:
    """The order of a picture's cells in the sequence when it has a hole: first the kept cells, then the hole.

    A kept cell whose right neighbour is in the hole moves to the second part, with its true token. So every run of
    missing cells has its left neighbour just before it.

    Args:
        region: (grid, grid), 1 where a cell is generated anew.

    Returns:
        raster indices of the first and of the second part, each in raster order.
    """
    hole = region.bool()
    second = hole.clone()
    second[:, :-1] |= hole[:, 1:]
    second = second.flatten()
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


def completion_mask(n_text: int, n_context: int, length: int) -> Tensor:
    """(S, S): causal, but text sees all text, and every token after <start_of_image> sees the whole first part."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:n_text, :n_text] = True
    mask[n_text + 1 :, :n_context] = True
    return mask


def completion(
    text: Tensor, picture: Tensor, region: Tensor, ids: SpecialIds, layout: LayoutConfig
) -> tuple[Sample, int]:
    """The sequence for filling a hole: text, <start_of_image>, kept cells, then the hole with its left neighbours.

    Args:
        text: (n_text,) int64. picture: (grid * grid,) codes. region: (grid, grid), 1 where cells are generated anew.

    Returns:
        the sequence, with -1 where a token is to be generated, and the number of tokens before its second part.
    """
    first, second = completion_order(region)
    codes = torch.where(region.flatten().bool(), -1, picture)
    boi = torch.tensor([ids.boi])
    tokens = torch.cat([text, boi, codes[first], codes[second]])
    cells = torch.cat([first, second]) + layout.max_text + 1
    positions = torch.cat([torch.arange(len(text)), torch.tensor([layout.max_text]), cells])
    n_context = len(text) + 1 + len(first)
    mask = completion_mask(len(text), n_context, len(tokens))
    return Sample(tokens, positions, mask), n_context


def completion_training(text: Tensor, picture: Tensor, region: Tensor, ids: SpecialIds, layout: LayoutConfig) -> Sample:
    """``completion`` for training: the hole holds the true codes, and the token before each of its cells predicts it.

    The original never trains on this mask.
    """
    sample, _ = completion(text, picture, region, ids, layout)
    wanted = sample.tokens < 0
    cells = sample.positions[len(text) + 1 :] - layout.max_text - 1
    sample.tokens[len(text) + 1 :] = picture[cells]
    loss_mask = torch.cat([wanted[1:], torch.tensor([False])])
    return Sample(sample.tokens, sample.positions, sample.mask, shift_left(sample.tokens), loss_mask)


def caption_scoring(picture: Tensor, text: Tensor, language: int, layout: LayoutConfig) -> Sample:
    """Score a caption of a picture: the picture is context; the language token and the text after it are causal.

    Args:
        picture: (n,) codes. text: (n_text,). language: the language token, which is not itself predicted.
    """
    n = len(picture)
    tokens = torch.cat([picture, torch.tensor([language]), text])
    positions = torch.cat([torch.arange(layout.max_text + 1, layout.max_text + 1 + n), torch.arange(len(text) + 1)])
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    mask[:, :n] = True
    loss_mask = torch.zeros(len(tokens), dtype=torch.bool)
    loss_mask[n:-1] = True
    return Sample(tokens, positions, mask, shift_left(tokens), loss_mask)


def pad_right(sample: Sample, length: int, pad: int) -> Sample:
    """Lengthen a training sample with pads that see only themselves, are seen by no other token and predict nothing."""
    extra = length - len(sample.tokens)
    mask = torch.eye(length, dtype=torch.bool)
    mask[: len(sample.tokens), : len(sample.tokens)] = sample.mask
    assert sample.labels is not None and sample.loss_mask is not None
    return Sample(
        F.pad(sample.tokens, (0, extra), value=pad),
        F.pad(sample.positions, (0, extra)),
        mask,
        F.pad(sample.labels, (0, extra), value=pad),
        F.pad(sample.loss_mask, (0, extra)),
    )
