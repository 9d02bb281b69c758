"""Local attention: every picture token looks at a window around itself, at a coarser picture, and at the text.

The idea: nearby tokens matter most, so each query gets a fixed number of keys, and cost grows with the number of tokens
instead of its square. A window of the same grid, one of a coarser grid and a few words share one softmax. CogView2
(Ding et al. 2022, arXiv 2204.14217), sections 3.3 and 4.

Mirrors: the CUDA operator ``localAttention`` that the official code installs separately, and the attention functions
of ``sr_pipeline/dsr_model.py`` and ``itersr_model.py``, which join its scores with those of coarse or text keys.

Shapes: ``B`` batch, ``Hi``, ``Wi`` fine grid, ``T = Hi * Wi`` queries, ``h``, ``w`` coarse grid, ``S`` keys of all
kinds, ``G`` text keys, ``N`` heads, ``H`` head size. Tokens come before heads, as projections give them: nothing is
permuted beforehand. Grids and windows are (rows, columns). The original's window is 9 ROWS x 5 COLUMNS: it takes one of
``2 * 5 - 1`` by 5 cells, without causal order, probably by accident.

Two forms with one signature, and tests that they agree:

reference  the dense form: all T x S scores, those outside the windows removed. To read.
blocked    tiles of queries, each with the rectangle of keys (its "halo") that any of them can see. To use.

Different on purpose: a key outside the grid and a masked text key are left out of the softmax, where the original
gives them a score of -10000. Both round to a weight of exactly 0. A query that may see nothing gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicogview.errors import MiniCogViewError

Impl = Literal["auto", "reference", "blocked"]
Size = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Coarse:
    """Keys of a coarser grid. A query's window is centred on the cell that contains it."""

    k: Tensor  # (b, h * w, N, H)
    v: Tensor  # (b, h * w, N, H)
    grid: Size  # (h, w); the fine grid is an integer multiple, each way
    window: Size = (5, 5)
    bias: float | Tensor = 0.0  # added to these scores; a tensor is broadcast to (b, h * w)


@dataclass(frozen=True)
class Global:
    """A few keys that every query sees: text."""

    k: Tensor  # (b, G, N, H)
    v: Tensor  # (b, G, N, H)
    mask: Tensor | None = None  # (b, G) or (G,), 1 = may be looked at
    bias: float | Tensor = 0.0  # added to these scores; a tensor is broadcast to (b, G)


# ---------------------------------------------------------------- windows


def window_cells(query_grid: Size, key_grid: Size, window: Size, causal: bool = False) -> tuple[Tensor, Tensor]:
    """The cells of every query's window, in raster order.

    Args:
        query_grid: (Hi, Wi), an integer multiple of ``key_grid`` (h, w), each way.
        window: rows and columns. An even number reaches one further up or left than down or right.
        causal: keep only the cells before the centre, and the centre.

    Returns:
        index (T, cells) int64 into the flattened key grid, and whether the cell lies inside that grid (T, cells).
        The index of a cell outside is that of the nearest one inside.
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
    """Who may look at whom, (T, h * w) bool: the windows of ``window_cells``, drawn into a table.

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


# ---------------------------------------------------------------- keys of all kinds, side by side

Part = Coarse | Global  # the query's own grid is a "coarser" one at ratio 1


@dataclass(frozen=True)
class Keys:
    """All keys in one list, part after part, so that one table of indices reaches them all."""

    k: Tensor  # (B, S, N, H)
    v: Tensor  # (B, S, N, H)
    bias: Tensor | None  # (B, S) float, added to the scores; -inf for a key that nobody may look at
    windows: tuple[tuple[Size, Size], ...]  # (grid, window) of every part that has them; these come first
    n_global: int


def shared_by_group(x: Tensor, batch: int) -> Tensor:
    """(b, ...) -> (B, ...): consecutive groups of B / b rows share one."""
    return x if len(x) == batch else x.repeat_interleave(batch // len(x), dim=0)


def key_bias(part: Part, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of each key, (b, n)."""
    bias = torch.as_tensor(part.bias, dtype=dtype, device=part.k.device).expand(part.k.shape[:2])
    if isinstance(part, Global) and part.mask is not None:
        bias = bias.masked_fill(~part.mask.bool(), float("-inf"))
    return bias


def collect_keys(parts: list[Part], batch: int) -> Keys:
    """Put the keys of all parts side by side, and repeat those that several rows share."""
    no_bias = all(isinstance(p.bias, (int, float)) and p.bias == 0 and getattr(p, "mask", None) is None for p in parts)
    exact = torch.promote_types(parts[0].k.dtype, torch.float32)
    return Keys(
        k=torch.cat([shared_by_group(p.k, batch) for p in parts], dim=1),
        v=torch.cat([shared_by_group(p.v, batch) for p in parts], dim=1),
        bias=None if no_bias else torch.cat([shared_by_group(key_bias(p, exact), batch) for p in parts], dim=1),
        windows=tuple(((*p.grid,), (*p.window,)) for p in parts if isinstance(p, Coarse)),
        n_global=sum(p.k.shape[1] for p in parts if isinstance(p, Global)),
    )


# ---------------------------------------------------------------- reference: dense


def dot_products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores of every query and every key: q (B, T, N, H), k (B, S, N, H) -> (B, N, T, S)."""
    return torch.einsum("btnh,bsnh->bnts", q * scale, k)


def reference(q: Tensor, keys: Keys, grid: Size, causal: bool, scale: float) -> Tensor:
    """The definition: q (B, T, N, H) -> (B, T, N, H), through all T x S scores, in float32 at least."""
    masks = [window_mask(grid, key_grid, window, causal) for key_grid, window in keys.windows]
    masks.append(torch.ones(q.shape[1], keys.n_global, dtype=torch.bool))
    mask = torch.cat(masks, dim=1).to(q.device)  # (T, S)
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = dot_products(q.to(exact), keys.k.to(exact), scale)  # (B, N, T, S)
    if keys.bias is not None:
        bias = keys.bias[:, None, None]
        mask = mask & (bias > float("-inf"))
        scores = scores + bias
    scores = scores.masked_fill(~mask, torch.finfo(exact).min)
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # the zeros matter only where nothing may be seen
    return torch.einsum("bnts,bsnh->btnh", weights, keys.v.to(exact)).to(q.dtype)


# ---------------------------------------------------------------- blocked: tiles and halo

TILE: Size = (6, 6)  # queries; the best of nine that were measured on a CPU, in float32 and in bfloat16
ONE_TILE_UP_TO = 256  # query tokens: on smaller grids halos overlap so much that one tile with all keys is faster
CHUNK_BYTES = 2**22  # keys and values gathered at a time without gradients: what stays in a CPU's cache
TRAINING_BYTES = 2**24  # the same with gradients: the system takes large blocks back, and fresh ones cost
GPU_FACTOR = 64  # a GPU wants fewer and larger pieces


@dataclass(frozen=True)
class Tiling:
    """Which queries and keys each tile holds. A tile that sticks out of the grid repeats the last row or column."""

    queries: Tensor  # (tiles, tile queries), int64 into T
    keys: Tensor  # (tiles, tile keys), int64 into S
    mask: Tensor  # (tiles, tile queries, tile keys) bool
    places: Tensor  # (T,): where each query's result stands among all tiles' results


def cut_axis(n_queries: int, n_keys: int, tile: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """One axis cut in tiles: queries (tiles, tile), keys (tiles, halo), and how far each key lies from each centre.

    Every tile gets equally many keys; at the border its halo is moved inwards, so that no index points outside.
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
    """Whether a key that lies ``dy`` rows below and ``dx`` columns right of a query's centre is one to look at."""
    rows, columns = window
    seen = (dy >= -(rows // 2)) & (dy < rows - rows // 2) & (dx >= -(columns // 2)) & (dx < columns - columns // 2)
    return seen & ((dy < 0) | ((dy == 0) & (dx <= 0))) if causal else seen


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # tables made while drawing serve training too
def make_tiling(
    grid: Size, windows: tuple[tuple[Size, Size], ...], n_global: int, causal: bool, tile: Size, device: torch.device
) -> Tiling:
    """The tables of one geometry, made once and kept."""
    ny, nx = -(-grid[0] // tile[0]), -(-grid[1] // tile[1])
    tile = -(-grid[0] // ny), -(-grid[1] // nx)  # as many tiles, but of even sizes: 15 is 5 + 5 + 5, not 6 + 6 + 3
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


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """PyTorch's own attention: q (n, t, N, H), k, v (n, s, N, H), mask (1 or n, t, s), bias (n, s) -> (n, t, N, H)."""
    mask = mask[:, None]
    if bias is not None:
        mask = bias[:, None, None].to(q.dtype).masked_fill(~mask, float("-inf"))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled():  # there, fusing the way back is slow
        scores = (q * scale) @ k.transpose(-2, -1)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, s, N, H), counted through the whole batch: index (tiles, n) -> (tiles, n, N, H)."""
    # Not index_select: on the way back, F.embedding adds whole rows at once.
    return F.embedding(index, rearrange(x, "b s n h -> (b s) (n h)")).unflatten(-1, x.shape[2:])


def attend_tiles(q: Tensor, keys: Keys, tiling: Tiling, which: Tensor, scale: float) -> Tensor:
    """Some tiles, numbered picture after picture by which (tiles,): (tiles, tile queries, N, H)."""
    picture, tile = (which // len(tiling.keys))[:, None], which % len(tiling.keys)
    query_index = picture * q.shape[1] + tiling.queries[tile]
    key_index = picture * keys.k.shape[1] + tiling.keys[tile]
    bias = None if keys.bias is None else keys.bias.flatten()[key_index]
    tile_k, tile_v = gather(keys.k, key_index), gather(keys.v, key_index)
    return fused(gather(q, query_index), tile_k, tile_v, tiling.mask[tile], bias, scale)


def in_chunks(q: Tensor, keys: Keys, tiling: Tiling, scale: float, limit: int) -> Tensor:
    """All tiles, a few at a time, without gradients: (B * tiles, tile queries, N, H)."""
    batch, _, n_heads, head_size = q.shape
    which = torch.arange(batch * len(tiling.keys), device=q.device)
    chunk = max(1, limit // (2 * tiling.keys.shape[1] * n_heads * head_size * q.element_size()))
    results = q.new_empty(len(which), tiling.queries.shape[1], n_heads, head_size)
    for start in range(0, len(which), chunk):
        results[start : start + chunk] = attend_tiles(q, keys, tiling, which[start : start + chunk], scale)
    return results


def in_groups(q: Tensor, keys: Keys, tiling: Tiling, scale: float, limit: int) -> Tensor:
    """The same with gradients: a few pictures and heads at a time, because the way back through ``split`` is cheap."""
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
    """The same numbers as ``reference``: q (B, T, N, H) -> (B, T, N, H), tile by tile."""
    tile = grid if q.shape[1] <= ONE_TILE_UP_TO else TILE
    tiling = make_tiling(grid, keys.windows, keys.n_global, causal, tile, q.device)
    n_tiles, n_queries = tiling.queries.shape
    if n_tiles == 1:  # it holds everything, in order
        return fused(q, keys.k, keys.v, tiling.mask, keys.bias, scale)
    learning = any(x is not None and x.requires_grad for x in (q, keys.k, keys.v, keys.bias))
    run, limit = (in_groups, TRAINING_BYTES) if learning and torch.is_grad_enabled() else (in_chunks, CHUNK_BYTES)
    results = run(q, keys, tiling, scale, limit if q.device.type == "cpu" else GPU_FACTOR * limit)
    places = torch.arange(len(q), device=q.device)[:, None] * n_tiles * n_queries + tiling.places
    return gather(results, places)


# ---------------------------------------------------------------- the operator


def choose_impl(impl: Impl = "auto") -> Impl:
    """What ``impl`` stands for: itself, or for "auto" what was measured to be the fastest.

    That is "blocked" on grids of every size: on small ones it takes a single tile, dense attention with a mask.
    """
    if impl not in get_args(Impl):
        raise MiniCogViewError(f"local_attention: unknown impl {impl!r}: choose one of {', '.join(get_args(Impl))}")
    return "blocked" if impl == "auto" else impl


def check_part(name: str, part: Part, q: Tensor, grid: Size, causal: bool) -> None:
    """Keys fit the queries, or an error says which argument does not."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise MiniCogViewError(f"local_attention: {name}{what}")

    if isinstance(part, Coarse):
        cells, window = part.grid, part.window
        need(len(cells) == 2 and min(cells) > 0, f"grid is {cells}: expected rows and columns")
        need(grid[0] % cells[0] == 0 and grid[1] % cells[1] == 0, f"grid {cells} does not divide the fine one, {grid}")
        need(len(window) == 2 and min(window) > 0, f"window is {window}: expected rows and columns")
        need(not causal or bool(window[0] % 2 and window[1] % 2), f"window {window} must be odd for causal=True")
    n_keys = part.grid[0] * part.grid[1] if isinstance(part, Coarse) else part.k.shape[min(1, part.k.dim() - 1)]
    for label, x in (("k", part.k), ("v", part.v)):
        expected = (len(part.k), n_keys, *q.shape[2:])
        need(tuple(x.shape) == expected, f"{label} has shape {tuple(x.shape)}: expected {expected}")
        need(x.dtype == q.dtype, f"{label} is {x.dtype}, but q is {q.dtype}")
        need(x.device == q.device, f"{label} is on {x.device}, but q is on {q.device}")
    rows = len(part.k)
    need(len(q) % rows == 0 if rows else not len(q), f"k has {rows} rows: their number must divide that of q, {len(q)}")
    for label in ("bias", "mask"):
        extra = getattr(part, label, None)
        if isinstance(extra, Tensor):
            fits = extra.dim() <= 2 and all(a in (1, b) for a, b in zip(extra.shape[::-1], (n_keys, rows)))
            need(fits, f"{label} has shape {tuple(extra.shape)}: expected ({rows}, {n_keys}) or ({n_keys},)")
            need(extra.device == q.device, f"{label} is on {extra.device}, but q is on {q.device}")


def local_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    grid: Size,
    window: Size = (9, 5),
    *,
    coarse: Coarse | None = None,
    everywhere: Global | None = None,
    causal: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of every token of a picture to the keys near it, under one softmax.

    Args:
        q: (B, Hi * Wi, N, H), float16, bfloat16, float32 or float64.
        k, v: (b, Hi * Wi, N, H), keys of the same grid, or None. As for all keys, b divides B: consecutive groups of
            B / b rows of ``q`` share a row.
        grid: (Hi, Wi). window: rows and columns, centred on the query.
        coarse, everywhere: keys of a coarser grid; keys that every query sees.
        causal: of both grids, keep only the cells before the query's in raster order, and that cell itself. On the
            coarse grid this is the whole cell that contains the query, with the tokens in it that come later.
        scale: factor of the scores, by default ``H ** -0.5``.
        impl: "auto" (``choose_impl`` says what it takes), "reference" or "blocked".

    Returns:
        (B, Hi * Wi, N, H), in the type of ``q``.

    Raises:
        MiniCogViewError: when shapes, types, devices or settings do not fit together.
    """
    chosen = choose_impl(impl)
    if len(grid) != 2 or min(grid) < 1 or q.dim() != 4 or q.shape[1] != grid[0] * grid[1]:
        shape = tuple(q.shape)
        raise MiniCogViewError(f"local_attention: q has shape {shape}, expected (B, Hi * Wi, N, H) with grid {grid}")
    grid = grid[0], grid[1]  # a list would do as well
    own = None if k is None or v is None else Coarse(k, v, grid, window)
    named = {"": own, "coarse.": coarse, "everywhere.": everywhere}
    parts: dict[str, Part] = {name: part for name, part in named.items() if part is not None}
    if (k is None) != (v is None) or not parts:
        raise MiniCogViewError("local_attention: give both k and v, or neither and coarse or global keys instead")
    for name, part in parts.items():
        check_part(name, part, q, grid, causal)
    keys = collect_keys(list(parts.values()), len(q))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (reference if chosen == "reference" else blocked)(q, keys, grid, causal, scale)
