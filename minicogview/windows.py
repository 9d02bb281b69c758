"""Windows: which keys each picture token of a fine grid looks at, and all these keys in one list.

The idea: a query looks at a rectangle of cells around itself. The cells belong to its own grid or to a coarser grid,
where the window is centred on the cell that contains the query. Every query also sees a few more keys, the words of a
text. This module says which keys a query sees; ``local_attention.py`` computes with them.
CogView2 (Ding et al. 2022, arXiv 2204.14217), sections 3.3 and 4.

Mirrors: the geometry of the CUDA operator ``localAttention`` that the official code installs separately. The original's
window is 9 ROWS x 5 COLUMNS: it asks for ``2 * 5 - 1`` by 5 cells, without causal order, probably by accident.

Shapes: ``B`` batch, ``Hi``, ``Wi`` fine grid, ``T = Hi * Wi`` queries, ``h``, ``w`` coarse grid, ``S`` keys of all
kinds, ``G`` text keys, ``N`` heads, ``H`` head size. Grids and windows are (rows, columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

Size = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Coarse:
    """Keys of a coarser grid. A query's window is centred on the cell that contains it."""

    k: Tensor  # (b, h * w, N, H)
    v: Tensor  # (b, h * w, N, H)
    grid: Size  # (h, w); the fine grid is an integer multiple of it along each axis
    window: Size = (5, 5)
    bias: float | Tensor = 0.0  # added to these scores; a tensor is broadcast to (b, h * w)


@dataclass(frozen=True)
class Global:
    """A few keys that every query sees: the text."""

    k: Tensor  # (b, G, N, H)
    v: Tensor  # (b, G, N, H)
    mask: Tensor | None = None  # (b, G) or (G,), 1 where a key may be seen
    bias: float | Tensor = 0.0  # added to these scores; a tensor is broadcast to (b, G)


def window_cells(query_grid: Size, key_grid: Size, window: Size, causal: bool = False) -> tuple[Tensor, Tensor]:
    """The cells of every query's window, in raster order.

    Args:
        query_grid: (Hi, Wi), an integer multiple of ``key_grid`` (h, w) along each axis.
        window: rows and columns. An even window reaches one cell further up or left than down or right.
        causal: keep only the centre and the cells before it.

    Returns:
        The cells' index (T, cells) int64 in the flattened key grid, and whether each lies inside that grid (T, cells).
        A cell outside gets the index of the nearest cell inside.
    """
    y, x = (
        (torch.arange(queries) // (queries // keys))[:, None] + torch.arange(size) - size // 2
        for queries, keys, size in zip(query_grid, key_grid, window, strict=True)
    )  # (Hi, rows) and (Wi, columns): row numbers and column numbers
    y, x = y[:, None, :, None], x[None, :, None, :]
    h, w = key_grid
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)  # (Hi, Wi, rows, columns)
    index = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    cells = window[0] * window[1] // 2 + 1 if causal else None
    flat = "hi wi rows columns -> (hi wi) (rows columns)"
    return rearrange(index, flat)[:, :cells], rearrange(inside, flat)[:, :cells]


def window_mask(query_grid: Size, key_grid: Size, window: Size, causal: bool = False) -> Tensor:
    """Which query sees which key, (T, h * w) bool: the windows of ``window_cells`` as a table.

    Example:
        >>> window_mask((1, 4), (1, 4), window=(1, 3)).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    index, inside = window_cells(query_grid, key_grid, window, causal)
    query, entry = inside.nonzero(as_tuple=True)
    mask = torch.zeros(len(index), key_grid[0] * key_grid[1], dtype=torch.bool)
    mask[query, index[query, entry]] = True
    return mask


Part = Coarse | Global  # one kind of keys; the query's own grid is a "coarse" grid at ratio 1


@dataclass(frozen=True)
class Keys:
    """The keys of all parts in one list, so that one table of indices can point to any of them."""

    k: Tensor  # (B, S, N, H)
    v: Tensor  # (B, S, N, H)
    bias: Tensor | None  # (B, S) float, added to the scores; -inf for a key that no query may see
    windows: tuple[tuple[Size, Size], ...]  # (grid, window) of every ``Coarse`` part; these parts come first
    n_global: int


def shared_by_group(x: Tensor, batch: int) -> Tensor:
    """(b, ...) -> (B, ...): each row is repeated for the B / b consecutive rows that share it."""
    return x if len(x) == batch else x.repeat_interleave(batch // len(x), dim=0)


def key_bias(part: Part, dtype: torch.dtype) -> Tensor:
    """The bias that is added to the scores of each key, (b, n); -inf where the mask is 0."""
    bias = torch.as_tensor(part.bias, dtype=dtype, device=part.k.device).expand(part.k.shape[:2])
    if isinstance(part, Global) and part.mask is not None:
        bias = bias.masked_fill(~part.mask.bool(), float("-inf"))
    return bias


def no_bias(part: Part) -> bool:
    """Whether nothing is added to the scores, and no key is masked."""
    return isinstance(part.bias, (int, float)) and part.bias == 0 and getattr(part, "mask", None) is None


def collect_keys(parts: list[Part], batch: int) -> Keys:
    """Join the keys of all parts in one list, and repeat those that several rows share."""
    exact, plain = torch.promote_types(parts[0].k.dtype, torch.float32), all(map(no_bias, parts))
    return Keys(
        k=torch.cat([shared_by_group(p.k, batch) for p in parts], dim=1),
        v=torch.cat([shared_by_group(p.v, batch) for p in parts], dim=1),
        bias=None if plain else torch.cat([shared_by_group(key_bias(p, exact), batch) for p in parts], dim=1),
        windows=tuple(((*p.grid,), (*p.window,)) for p in parts if isinstance(p, Coarse)),
        n_global=sum(p.k.shape[1] for p in parts if isinstance(p, Global)),
    )
