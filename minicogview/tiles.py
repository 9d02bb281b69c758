"""Local attention by tiles, on any device: the ``blocked`` form of ``local_attention.py``.

The idea: neighbouring queries see nearly the same keys. So the grid is cut into tiles of queries. Each tile gathers the
rectangle of keys that any of its queries can see, its "halo", and PyTorch's own attention computes the rest, with a
mask for the keys outside a query's window. Memory is bounded, because only a few tiles are gathered at a time.

Shapes: as in ``local_attention.py``: ``B`` batch, ``T`` queries, ``S`` keys of all kinds, ``N`` heads, ``H`` head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicogview.attention import attend
from minicogview.windows import Keys, Size

TILE = (6, 6)  # queries; the fastest of nine sizes measured on a CPU, in float32 and in bfloat16
ONE_TILE_UP_TO = 256  # queries: on smaller grids halos overlap so much that one tile with all keys is faster
CHUNK_BYTES = 2**22  # keys and values gathered at a time without gradients: they stay in a CPU's cache
TRAINING_BYTES = 2**24  # the same with gradients: the system takes freed large blocks back, and new ones cost time
GPU_FACTOR = 64  # a GPU is faster with fewer and larger pieces


@dataclass(frozen=True)
class Tiling:
    """Which queries and keys each tile holds. A tile that overlaps the border repeats the last row or column."""

    queries: Tensor  # (tiles, tile queries), int64 into T
    keys: Tensor  # (tiles, tile keys), int64 into S
    mask: Tensor  # (tiles, tile queries, tile keys) bool
    places: Tensor  # (T,): the position of each query's result among the results of all tiles


def cut_axis(n_queries: int, n_keys: int, tile: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut one axis into tiles with halos of equal size: at a border a halo is moved inwards, so no index lies outside.

    Returns:
        queries (tiles, tile), keys (tiles, halo), and each key's offset from each query's centre (tiles, tile, halo).
    """
    starts, ratio = range(0, n_queries, tile), n_queries // n_keys
    queries = (torch.tensor(starts)[:, None] + torch.arange(tile)).clamp(max=n_queries - 1)
    centres = queries // ratio
    spread = max((min(start + tile, n_queries) - 1) // ratio - start // ratio for start in starts)
    halo = min(spread + window, n_keys)
    first = (centres[:, 0] - window // 2).clamp(0, n_keys - halo)
    keys = first[:, None] + torch.arange(halo)
    return queries, keys, keys[:, None, :] - centres[:, :, None]


def in_window(dy: Tensor, dx: Tensor, window: Size, causal: bool) -> Tensor:
    """Whether a query sees a key that lies ``dy`` rows below and ``dx`` columns to the right of the query's centre."""
    rows, columns = window
    seen = (dy >= -(rows // 2)) & (dy < rows - rows // 2) & (dx >= -(columns // 2)) & (dx < columns - columns // 2)
    return seen & ((dy < 0) | ((dy == 0) & (dx <= 0))) if causal else seen


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # so that tables made during inference can be used in training too
def make_tiling(
    grid: Size, windows: tuple[tuple[Size, Size], ...], n_global: int, causal: bool, tile: Size, device: torch.device
) -> Tiling:
    """The index tables of one geometry, computed once and cached."""
    ny, nx = -(-grid[0] // tile[0]), -(-grid[1] // tile[1])
    tile = -(-grid[0] // ny), -(-grid[1] // nx)  # as many tiles, but of even size: 15 = 5 + 5 + 5, not 6 + 6 + 3
    keys, masks, start = [], [], 0
    for key_grid, window in windows:
        (_, key_y, dy), (_, key_x, dx) = (cut_axis(*sizes) for sizes in zip(grid, key_grid, tile, window))
        index = key_y[:, None, :, None] * key_grid[1] + key_x[None, :, None, :]
        seen = in_window(dy[:, None, :, None, :, None], dx[None, :, None, :, None, :], window, causal)
        keys.append(start + rearrange(index, "ny nx ky kx -> (ny nx) (ky kx)"))
        masks.append(rearrange(seen, "ny nx qy qx ky kx -> (ny nx) (qy qx) (ky kx)"))
        start += key_grid[0] * key_grid[1]
    keys.append((start + torch.arange(n_global)).expand(ny * nx, -1))
    masks.append(torch.ones(ny * nx, tile[0] * tile[1], n_global, dtype=torch.bool))

    (query_y, _, _), (query_x, _, _) = (cut_axis(size, size, edge, 1) for size, edge in zip(grid, tile))
    queries = rearrange(query_y[:, None, :, None] * grid[1] + query_x[None, :, None, :], "ny nx y x -> (ny nx) (y x)")
    y, x = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    in_tile = y % tile[0] * tile[1] + x % tile[1]
    places = (y // tile[0] * nx + x // tile[1]) * queries.shape[1] + in_tile  # (Hi, Wi)
    tables = queries, torch.cat(keys, dim=1), torch.cat(masks, dim=2), places.flatten()
    return Tiling(*(table.to(device) for table in tables))


def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Ordinary attention: q (n, t, N, H), k, v (n, s, N, H), mask (1 or n, t, s), bias (n, s) -> (n, t, N, H)."""
    mask = mask[:, None]
    if bias is not None:
        mask = bias[:, None, None].to(q.dtype).masked_fill(~mask, float("-inf"))
    q, k, v = (rearrange(x, "n t heads h -> n heads t h") for x in (q, k, v))
    return rearrange(attend(q, k, v, mask, scale=scale), "n heads t h -> n t heads h")


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, s, N, H), numbered through the whole batch: index (tiles, n) -> (tiles, n, N, H)."""
    # Not index_select: in the backward pass F.embedding adds whole rows at once.
    return F.embedding(index, rearrange(x, "b s n h -> (b s) (n h)")).unflatten(-1, x.shape[2:])


def attend_tiles(q: Tensor, keys: Keys, tiling: Tiling, which: Tensor, scale: float) -> Tensor:
    """Attention in some tiles, ``which`` (tiles,), numbered picture by picture: (tiles, tile queries, N, H)."""
    picture, tile = (which // len(tiling.keys))[:, None], which % len(tiling.keys)
    query_index = picture * q.shape[1] + tiling.queries[tile]
    key_index = picture * keys.k.shape[1] + tiling.keys[tile]
    bias = None if keys.bias is None else keys.bias.flatten()[key_index]
    tile_k, tile_v = gather(keys.k, key_index), gather(keys.v, key_index)
    return attend_all(gather(q, query_index), tile_k, tile_v, tiling.mask[tile], bias, scale)


def in_chunks(q: Tensor, keys: Keys, tiling: Tiling, scale: float, limit: int) -> Tensor:
    """Attention in all tiles without gradients, a few tiles at a time: (B * tiles, tile queries, N, H)."""
    batch, _, n_heads, head_size = q.shape
    which = torch.arange(batch * len(tiling.keys), device=q.device)
    chunk = max(1, limit // (2 * tiling.keys.shape[1] * n_heads * head_size * q.element_size()))
    results = q.new_empty(len(which), tiling.queries.shape[1], n_heads, head_size)
    for start in range(0, len(which), chunk):
        results[start : start + chunk] = attend_tiles(q, keys, tiling, which[start : start + chunk], scale)
    return results


def in_groups(q: Tensor, keys: Keys, tiling: Tiling, scale: float, limit: int) -> Tensor:
    """The same with gradients: a few pictures and heads at a time, because the backward pass of ``split`` is cheap."""
    batch, _, n_heads, head_size = q.shape
    bytes_per_head = tiling.keys.numel() * head_size * q.element_size()  # of one picture
    pictures = max(1, min(batch, limit // (n_heads * bytes_per_head)))
    heads = max(1, min(n_heads, limit // (pictures * bytes_per_head)))
    biases = [None] * max(1, batch) if keys.bias is None else keys.bias.split(pictures)
    results = []
    for rows_q, rows_k, rows_v, bias in zip(*(x.split(pictures) for x in (q, keys.k, keys.v)), biases):
        which = torch.arange(len(rows_q) * len(tiling.keys), device=q.device)
        cut = zip(*(x.split(heads, dim=2) for x in (rows_q, rows_k, rows_v)))
        some = [attend_tiles(x, replace(keys, k=k, v=v, bias=bias), tiling, which, scale) for x, k, v in cut]
        results.append(torch.cat(some, dim=2))
    return torch.cat(results)


def blocked(q: Tensor, keys: Keys, grid: Size, causal: bool, scale: float) -> Tensor:
    """The same result as ``reference``, tile by tile: q (B, T, N, H) -> (B, T, N, H)."""
    tile = grid if q.shape[1] <= ONE_TILE_UP_TO else TILE
    tiling = make_tiling(grid, keys.windows, keys.n_global, causal, tile, q.device)
    n_tiles, n_queries = tiling.queries.shape
    if n_tiles == 1:  # it holds all queries and keys, in order
        return attend_all(q, keys.k, keys.v, tiling.mask, keys.bias, scale)
    learning = any(x is not None and x.requires_grad for x in (q, keys.k, keys.v, keys.bias))
    run, limit = (in_groups, TRAINING_BYTES) if learning and torch.is_grad_enabled() else (in_chunks, CHUNK_BYTES)
    results = run(q, keys, tiling, scale, limit if q.device.type == "cpu" else GPU_FACTOR * limit)
    places = torch.arange(len(q), device=q.device)[:, None] * n_tiles * n_queries + tiling.places
    return gather(results, places)
