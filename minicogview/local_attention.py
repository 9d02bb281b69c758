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

Three forms with one signature, and tests that they agree:

reference  the dense form: all T x S scores, those outside the windows removed. To read.
blocked    tiles of queries, each with the rectangle of keys (its "halo") that any of them can see (``tiles.py``).
triton     the same walk fused into one GPU kernel for each direction (``kernels/local_attention.py``).

Different on purpose: a key outside the grid and a masked text key are left out of the softmax, where the original
gives them a score of -10000. Both round to a weight of exactly 0. A query that may see nothing gets zeros.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.tiles import blocked

Impl = Literal["auto", "reference", "blocked", "triton"]
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


def no_bias(part: Part) -> bool:
    """Whether nothing is added to the scores, and no key is masked."""
    return isinstance(part.bias, (int, float)) and part.bias == 0 and getattr(part, "mask", None) is None


def collect_keys(parts: list[Part], batch: int) -> Keys:
    """Put the keys of all parts side by side, and repeat those that several rows share."""
    exact, plain = torch.promote_types(parts[0].k.dtype, torch.float32), all(map(no_bias, parts))
    return Keys(
        k=torch.cat([shared_by_group(p.k, batch) for p in parts], dim=1),
        v=torch.cat([shared_by_group(p.v, batch) for p in parts], dim=1),
        bias=None if plain else torch.cat([shared_by_group(key_bias(p, exact), batch) for p in parts], dim=1),
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
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # the zeros matter only where nothing may be seen
    return torch.einsum("bnts,bsnh->btnh", weights, keys.v.to(exact)).to(q.dtype)


# ---------------------------------------------------------------- triton: fused kernels


def why_no_triton(q: Tensor, parts: Sequence[Part] = ()) -> str:
    """What stands in the way of ``impl="triton"`` for such tensors, and what to do; empty where nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or q.is_cuda:
        from minicogview.kernels import launch

        interpreted = launch.INTERPRETED  # what was set when Triton was imported
    if not q.is_cuda and not interpreted:
        return (
            f"q is on {q.device}: use a GPU, or set TRITON_INTERPRET=1 before Triton is first imported, "
            "to run the kernels slowly in its interpreter"
        )
    known = [torch.float32, torch.float16] if interpreted else [torch.float32, torch.float16, torch.bfloat16]
    if q.dtype not in known:
        where = " in Triton's interpreter" if interpreted and q.dtype == torch.bfloat16 else ""
        return f"q is {q.dtype}: use one of {', '.join(map(str, known))}{where}"
    if q.shape[3] > 128:
        return f"heads of size {q.shape[3]}: at most 128"
    if any(isinstance(p.bias, Tensor) and p.bias.requires_grad for p in parts):
        return "there is no gradient of bias: detach it, or use another impl"
    if max(x.shape[1] * x.stride(1) for x in (q, *(p.k for p in parts))) >= 2**31:
        return "a picture of 2 ** 31 numbers or more"
    return ""


def geometry(part: Part, grid: Size, causal: bool, group: int, has_bias: bool) -> list[int]:
    """How one kind of keys lies, in the order that ``kernels.local_attention`` reads it."""
    if isinstance(part, Global):  # a row of keys; all queries have their centre at its first, and see it all
        n = part.k.shape[1]
        return [1, n, *grid, 0, 0, 0, n - 1, 0, int(has_bias), group]
    (h, w), (rows, columns) = part.grid, part.window
    up, left = rows // 2, columns // 2
    reach = [up, left, rows - up - 1, columns - left - 1]
    return [h, w, grid[0] // h, grid[1] // w, *reach, int(causal), int(has_bias), group]


def fused_kernels(q: Tensor, parts: list[Part], grid: Size, causal: bool, scale: float) -> Tensor:
    """The same numbers as ``reference``, by the Triton kernels: q (B, T, N, H) -> (B, T, N, H)."""
    if not len(q):
        return q.clone()
    from minicogview.kernels import launch

    keys: list[Tensor] = []
    biases: list[Tensor] = []
    places: list[int] = []
    for part in parts:
        if not part.k.shape[1]:
            continue
        has_bias = not no_bias(part)
        keys += [part.k, part.v]
        biases += [key_bias(part, torch.float32).contiguous()] if has_bias else []
        places += geometry(part, grid, causal, len(q) // len(part.k), has_bias)
    return launch.attend(q, keys, biases, places, grid, scale)[0]


# ---------------------------------------------------------------- the operator


def choose_impl(impl: Impl = "auto", q: Tensor | None = None, parts: Sequence[Part] = ()) -> Impl:
    """What ``impl`` stands for: itself, or for "auto" what is fastest for such tensors.

    On a GPU that is "triton", where its kernels can do it. Elsewhere it is "blocked" on grids of every size: on small
    ones it takes a single tile, dense attention with a mask.

    Raises:
        MiniCogViewError: for an unknown name, or for "triton" where it cannot run; the message says why.
    """
    if impl not in get_args(Impl):
        raise MiniCogViewError(f"local_attention: unknown impl {impl!r}: choose one of {', '.join(get_args(Impl))}")
    if impl == "auto":
        return "triton" if q is not None and q.is_cuda and not why_no_triton(q, parts) else "blocked"
    if impl == "triton" and q is not None and (reason := why_no_triton(q, parts)):
        raise MiniCogViewError(f"local_attention: impl='triton' cannot run: {reason}")
    return impl


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
        impl: "auto" (``choose_impl`` says what it takes), "reference", "blocked" or "triton".

    Returns:
        (B, Hi * Wi, N, H), in the type of ``q``.

    Raises:
        MiniCogViewError: when shapes, types, devices or settings do not fit together.
    """
    choose_impl(impl)
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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_impl(impl, q, list(parts.values()))
    if chosen == "triton":
        return fused_kernels(q, list(parts.values()), grid, causal, scale)
    keys = collect_keys(list(parts.values()), len(q))
    return (reference if chosen == "reference" else blocked)(q, keys, grid, causal, scale)
