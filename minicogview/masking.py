"""What every token may look at, in every task: the masks, positions and targets of CogLM.

The idea: one transformer draws, captions and fills in, because each task is only another attention mask.
Some tokens are *context* and see each other in both directions; the others are predicted one after another
and see the context and what came before. Every run of predictions starts behind an anchor that is given: a start
token, the first cell of a patch's row, the first token of a span. CogView2 (arXiv 2204.14217), section 3.1.

Mirrors: the data and mask functions of the original's ``pretrain_coglm`` and ``coglm_strategy`` files; every
function here equals them bit by bit when given the same random choices (``tests/test_parity.py``).

A training sample starts as ``raw``: text, <pad>, perhaps a second text, <pad>..., then the picture at the end.
Random choices are drawn by the ``draw_*`` functions and handed in, so that each mask is a plain function.

Shapes: ``S`` sequence length, ``n`` tokens of the picture (``grid * grid``). 1 = may look.
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
    """Every token's successor; the last one keeps itself."""
    return torch.cat([tokens[1:], tokens[-1:]])


def split_texts(raw: Tensor, n_image: int, pad: int) -> list[tuple[int, int]]:
    """Half-open index ranges of the one or two texts in front of the picture.

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
    """Draw: the chosen text is context for all, the picture follows it token by token.

    Args:
        raw: (S,) with at least one pad before the picture: it becomes <start_of_image>.
        second_text: whether the second of two texts is the one to draw.
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
    """Top-left corners (row, column) of the patches to fill in, without repetition.

    Args:
        whole_grid: False, as in the original: corners come from a range one too short, so that no patch ever
            covers the last row or column. True: they may lie wherever a patch fits.
    """
    side = layout.grid - layout.patch_size + whole_grid
    codes = torch.randperm(side * side, generator=generator)[: layout.n_patches]
    return [divmod(code, side) for code in codes.tolist()]


def patch_cells(corners: list[tuple[int, int]], layout: LayoutConfig) -> tuple[Tensor, Tensor]:
    """The cells inside any patch, and those of them that predict their right neighbour in the patch.

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
    """Caption and fill in: each text follows the picture; in the picture, patches follow the rest of it.

    Args:
        raw: (S,) as above, with at least one pad before the picture.
        languages: the language token (English or Chinese) of each text.
        corners: patch corners from ``draw_patches``; none makes the whole picture context.
    """
    n, length = layout.n_image, len(raw)
    first = length - n
    tokens = raw.clone()
    tokens[1:first] = raw[: first - 1]  # room for the first language token
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
        rows = slice(start, end + 1)  # the language token stands where the pad before the text was
        size = end + 1 - start
        tokens[start] = language
        positions[rows] = torch.arange(size)
        mask[rows, rows] = torch.ones(size, size, dtype=torch.bool).tril()
        mask[rows, first:] = True
        loss_mask[start:end] = True
    return Sample(tokens, positions, mask, shift_left(tokens), loss_mask)


def span_lengths(draws: list[int], length: int, share: float = 0.15) -> list[int]:
    """Take drawn span lengths (at least 1) in order until the next one would pass ``share * length``."""
    taken: list[int] = []
    for draw in draws:
        if sum(taken) + max(draw, 1) > share * length:
            break
        taken.append(max(draw, 1))
    return taken


def span_starts(gaps: list[int], lengths: list[int]) -> list[int]:
    """Turn distinct draws from ``range(length - sum(lengths))`` into starts: each moves past earlier spans."""
    starts, covered = [], 0
    for gap, size in zip(sorted(gaps), lengths, strict=True):
        starts.append(gap + covered)
        covered += size
    return starts


def draw_spans(generator: torch.Generator, length: int, share: float = 0.15) -> list[tuple[int, int]]:
    """(start, length) of the spans to predict: lengths are Poisson(3), places uniform."""
    draws = torch.poisson(torch.full((length,), 3.0), generator=generator).int().tolist()
    lengths = span_lengths(draws, length, share)
    places = torch.randperm(length - sum(lengths), generator=generator)[: len(lengths)].tolist()
    return list(zip(span_starts(places, lengths), lengths, strict=True))


def text_spans(raw: Tensor, spans: list[tuple[int, int]]) -> Sample:
    """Text alone: spans are predicted in order, the text between them is context in both directions.

    Args:
        raw: (S,) text, no pads.
        spans: (start, length) in order, from ``draw_spans``.

    The row just before a span is not its context but its first predicting row, so the context between two
    spans runs from one past the end of the earlier one to the start of the later one.
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
    """Positions and mask for drawing: text is context, everything after it is causal.

    Returns:
        positions (S,) and mask (S, S) for ``n_text`` text tokens, <start_of_image>, and picture tokens.
    """
    positions = torch.cat([torch.arange(n_text), torch.arange(layout.max_text, layout.max_text + length - n_text)])
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :n_text] = True
    return positions, mask


def completion_order(region: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which a picture with a hole is laid out: first what stays in view, then the hole.

    A kept cell whose right neighbour is in the hole moves to the second part with its true token, so that the
    first cell of every run has its left neighbour just before it.

    Args:
        region: (grid, grid), 1 = cell to generate anew.

    Returns:
        raster indices of the first part and of the second part, each in raster order.
    """
    hole = region.bool()
    second = hole.clone()
    second[:, :-1] |= hole[:, 1:]
    second = second.flatten()
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


def completion_mask(n_text: int, n_context: int, length: int) -> Tensor:
    """(S, S): causal; all see the text; rows after the start token see every kept cell of the first part."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:n_text, :n_text] = True
    mask[n_text + 1 :, :n_context] = True
    return mask


def completion(
    text: Tensor, picture: Tensor, region: Tensor, ids: SpecialIds, layout: LayoutConfig
) -> tuple[Sample, int]:
    """Fill a hole: text and start token, kept cells, then the hole and its left borders.

    Args:
        text: (n_text,) int64. picture: (grid * grid,) codes. region: (grid, grid), 1 = generate anew.

    Returns:
        the sequence, with -1 where a token is to be generated, and the length of its first part.
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
    """``completion`` with the true codes in place: each row before a cell of the hole predicts that cell.

    The original never trains on this mask.
    """
    sample, _ = completion(text, picture, region, ids, layout)
    wanted = sample.tokens < 0
    cells = sample.positions[len(text) + 1 :] - layout.max_text - 1
    sample.tokens[len(text) + 1 :] = picture[cells]
    loss_mask = torch.cat([wanted[1:], torch.tensor([False])])
    return Sample(sample.tokens, sample.positions, sample.mask, shift_left(sample.tokens), loss_mask)


def caption_scoring(picture: Tensor, text: Tensor, language: int, layout: LayoutConfig) -> Sample:
    """Score a caption given a picture: the picture in both directions, then language token and text, causal.

    Args:
        picture: (n,) codes. text: (n_text,). language: the language token, which is not a target.
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
    """Lengthen a training sample with pads that see only themselves, are seen by nobody and predict nothing."""
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
