"""Local attention: every picture token looks at a window around itself, at a coarser picture, and at the text.

The idea: nearby tokens matter most, so each query gets a fixed number of keys, and the cost grows with the number of
tokens instead of its square. A window of the same grid, a window of a coarser grid and a few words share one softmax.
CogView2 (Ding et al. 2022, arXiv 2204.14217), sections 3.3 and 4.

Mirrors: the CUDA operator ``localAttention`` that the official code installs separately, and the attention functions
of ``sr_pipeline/dsr_model.py`` and ``itersr_model.py``, which join its scores with those of coarse or text keys.

Shapes: ``B`` batch, ``Hi``, ``Wi`` fine grid, ``T = Hi * Wi`` queries, ``h``, ``w`` coarse grid, ``S`` keys of all
kinds, ``G`` text keys, ``N`` heads, ``H`` head size. Tokens come before heads, as the projections give them: nothing is
permuted beforehand. Grids and windows are (rows, columns); ``windows.py`` says which keys a window holds.

There are three forms with the same arguments, and tests that they agree:

reference  the dense form, for reading: it computes all T x S scores and removes those outside the windows.
blocked    tiles of queries, each with the rectangle of keys (its "halo") that any of them can see (``tiles.py``).
triton     the same loop over tiles as fused GPU kernels, forward and backward (``kernels/local_attention.py``).

Different on purpose: a key outside the grid or a masked text key is left out of the softmax, where the original gives
it a score of -10000. In both cases its weight is exactly 0 after rounding. A query that sees no key gets zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.kernels.available import LARGEST_HEAD, why_no_triton
from minicogview.tiles import blocked
from minicogview.windows import Coarse, Global, Keys, Part, Size, collect_keys, key_bias, no_bias, window_mask

Impl = Literal["auto", "reference", "blocked", "triton"]

# ---------------------------------------------------------------- reference: dense


def dot_products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores of every query with every key: q (B, T, N, H), k (B, S, N, H) -> (B, N, T, S)."""
    return torch.einsum("btnh,bsnh->bnts", q * scale, k)


def reference(q: Tensor, keys: Keys, grid: Size, causal: bool, scale: float) -> Tensor:
    """The definition: all T x S scores, in float32 or wider; q (B, T, N, H) -> (B, T, N, H)."""
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
    weights = scores.softmax(dim=-1).masked_fill(~mask, 0.0)  # matters only where a query sees no key
    return torch.einsum("bnts,bsnh->btnh", weights, keys.v.to(exact)).to(q.dtype)


# ---------------------------------------------------------------- triton: fused kernels


def why_no_kernel(q: Tensor, parts: Sequence[Part] = ()) -> str:
    """Why the kernels cannot take these tensors, and what to do; empty if they can."""
    if reason := why_no_triton(q, "q"):
        return reason
    if q.shape[3] > LARGEST_HEAD:
        return f"heads of size {q.shape[3]}: use at most {LARGEST_HEAD}, or another impl"
    if any(isinstance(p.bias, Tensor) and p.bias.requires_grad for p in parts):
        return "there is no gradient of bias: detach it, or use another impl"
    if max(x.shape[1] * x.stride(1) for x in (q, *(p.k for p in parts))) >= 2**31:
        return "a picture has 2 ** 31 numbers or more: use another impl"
    return ""


def geometry(part: Part, grid: Size, causal: bool, group: int, has_bias: bool) -> list[int]:
    """Grid, ratio and window of one kind of keys, as the integers that ``kernels.local_attention`` reads."""
    if isinstance(part, Global):  # one row of keys: every query is centred on the first of them, and sees them all
        n = part.k.shape[1]
        return [1, n, *grid, 0, 0, 0, n - 1, 0, int(has_bias), group]
    (h, w), (rows, columns) = part.grid, part.window
    up, left = rows // 2, columns // 2
    reach = [up, left, rows - up - 1, columns - left - 1]
    return [h, w, grid[0] // h, grid[1] // w, *reach, int(causal), int(has_bias), group]


def fused_kernels(q: Tensor, parts: list[Part], grid: Size, causal: bool, scale: float) -> Tensor:
    """The same result as ``reference`` from the Triton kernels: q (B, T, N, H) -> (B, T, N, H)."""
    if not len(q) or not any(part.k.shape[1] for part in parts):
        return 0.0 * q  # there is no query, or no key to see
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
    """The form that ``impl`` stands for: itself, or for "auto" the fastest form for these tensors.

    On a GPU that is "triton" if the kernels can take the tensors. Otherwise it is "blocked", on grids of every size: on
    a small grid it uses a single tile, which is dense attention with a mask.

    Raises:
        MiniCogViewError: if the name is unknown, or if it is "triton" and that cannot run; the message says why.
    """
    if impl not in get_args(Impl):
        raise MiniCogViewError(f"local_attention: unknown impl {impl!r}: choose one of {', '.join(get_args(Impl))}")
    if impl == "auto":
        return "triton" if q is not None and q.is_cuda and not why_no_kernel(q, parts) else "blocked"
    if impl == "triton" and q is not None and (reason := why_no_kernel(q, parts)):
        raise MiniCogViewError(f"local_attention: impl='triton' cannot run: {reason}")
    return impl


def check_part(name: str, part: Part, q: Tensor, grid: Size, causal: bool) -> None:
    """Check that one kind of keys fits the queries; the error names the argument that does not."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise MiniCogViewError(f"local_attention: {name}{what}")

    if isinstance(part, Coarse):
        cells, window = part.grid, part.window
        need(len(cells) == 2 and min(cells) > 0, f"grid is {cells}: expected rows and columns")
        need(grid[0] % cells[0] == 0 and grid[1] % cells[1] == 0, f"grid {cells} does not divide the fine grid, {grid}")
        need(len(window) == 2 and min(window) > 0, f"window is {window}: expected rows and columns")
        need(not causal or bool(window[0] % 2 and window[1] % 2), f"window {window} must be odd for causal=True")
    n_keys = part.grid[0] * part.grid[1] if isinstance(part, Coarse) else part.k.shape[min(1, part.k.dim() - 1)]
    for label, x in (("k", part.k), ("v", part.v)):
        expected = (len(part.k), n_keys, *q.shape[2:])
        need(tuple(x.shape) == expected, f"{label} has shape {tuple(x.shape)}: expected {expected}")
        need(x.dtype == q.dtype, f"{label} is {x.dtype}, but q is {q.dtype}")
        need(x.device == q.device, f"{label} is on {x.device}, but q is on {q.device}")
    rows = len(part.k)
    need(len(q) % rows == 0 if rows else not len(q), f"k has {rows} rows, which does not divide the {len(q)} of q")
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
        k, v: (b, Hi * Wi, N, H), keys and values of the same grid, or None. Here, in ``coarse`` and in ``everywhere``,
            b divides B: each group of B / b consecutive rows of ``q`` shares one row of keys.
        grid: (Hi, Wi). window: rows and columns, centred on the query.
        coarse, everywhere: keys of a coarser grid; keys that every query sees.
        causal: on both grids, see only the query's own cell and the cells before it in raster order. On the coarse grid
            the own cell contains the query, and with it tokens that come later.
        scale: factor of the scores, by default ``H ** -0.5``.
        impl: "auto" (see ``choose_impl``), "reference", "blocked" or "triton".

    Returns:
        (B, Hi * Wi, N, H), in the type of ``q``.

    Raises:
        MiniCogViewError: if shapes, types, devices or settings do not fit together.
    """
    choose_impl(impl)
    if len(grid) != 2 or min(grid) < 1 or q.dim() != 4 or q.shape[1] != grid[0] * grid[1]:
        shape = tuple(q.shape)
        raise MiniCogViewError(f"local_attention: q has shape {shape}, expected (B, Hi * Wi, N, H) with grid {grid}")
    grid = grid[0], grid[1]  # may come as a list
    own = None if k is None or v is None else Coarse(k, v, grid, window)
    named = {"": own, "coarse.": coarse, "everywhere.": everywhere}
    parts: dict[str, Part] = {name: part for name, part in named.items() if part is not None}
    if (k is None) != (v is None) or not parts:
        raise MiniCogViewError("local_attention: give both k and v, or leave both out and give coarse or everywhere")
    for name, part in parts.items():
        check_part(name, part, q, grid, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose_impl(impl, q, list(parts.values()))
    if chosen == "triton":
        return fused_kernels(q, list(parts.values()), grid, causal, scale)
    keys = collect_keys(list(parts.values()), len(q))
    return (reference if chosen == "reference" else blocked)(q, keys, grid, causal, scale)
