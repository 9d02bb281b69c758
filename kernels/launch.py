"""Local attention's kernels as PyTorch operators, with gradients, and known to ``torch.compile``.

The idea: PyTorch sees two operators, forward and backward, that take flat lists of tensors and integers, and knows
nothing of the kernels inside. When a geometry is met for the first time, a few tile sizes are tried on the GPU and the
fastest is kept, because it depends on the GPU and on the type which tiles fit into the registers
(``benchmarks/kernel_resources.py`` counts them).

Shapes: ``B`` rows of queries, ``b`` of keys, ``T`` query tokens, ``n`` keys of one kind, ``N`` heads, ``H`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from minicogview.kernels import local_attention as kernels
from minicogview.kernels.available import interpreted

INTERPRETED = interpreted()
GEO = 11  # integers that describe the geometry of one kind of keys: ``kernels.HEIGHT`` to ``kernels.GROUP``
KEY_NAMES = ("k_at", "v_at", "bias_at", "k_row", "k_stride", "v_row", "v_stride")


def choices(block: str, tiles: Sequence[tuple[int, int]]) -> list[triton.Config]:
    """Configurations to try: rows and columns of a tile, keys or queries (``block``) in each step of its loop, warps.

    A second, smaller tile is for float32, which takes twice the registers.
    """
    return [
        triton.Config({"TILE_Y": y, "TILE_X": x, block: step}, num_warps=warps, num_stages=stages)
        for (y, x), steps in zip(tiles, (((32, 4, 2), (64, 4, 2), (64, 8, 3)), ((32, 4, 2),)))
        for step, warps, stages in steps
    ]


def tuned(kernel: Any, block: str, *tiles: tuple[int, int]) -> Any:
    """A kernel that finds its fastest configuration by trying; in the interpreter, it takes the first."""
    configs = choices(block, tiles)[: 1 if INTERPRETED else None]
    geometry = "GEO" if "GEO" in kernel.arg_names else "GEOS"
    return triton.autotune(configs, key=[geometry, "GRID_Y", "GRID_X", "HEADS", "HEAD"])(kernel)


forward = tuned(kernels.forward, "KEYS", (8, 8), (4, 4))
backward_queries = tuned(kernels.backward_queries, "KEYS", (8, 8), (4, 4))
# The query's own grid has many keys, a coarse grid has few, and a text is one row of them: each wants its own tile.
backward_keys: dict[str, Any] = {
    "own": tuned(kernels.backward_keys, "QUERIES", (8, 8), (4, 4)),
    "coarse": tuned(kernels.backward_keys, "QUERIES", (4, 4)),
    "row": tuned(kernels.backward_keys, "QUERIES", (1, 16)),
}


def n_tiles(height: int, width: int, copies: int) -> Callable[[dict[str, int]], tuple[int]]:
    """The launch grid: one program for each tile of a grid, times ``copies``, the number of pictures and heads."""
    return lambda meta: (triton.cdiv(height, meta["TILE_Y"]) * triton.cdiv(width, meta["TILE_X"]) * copies,)


def rows_in_place(x: Tensor) -> Tensor:
    """The tensor itself if the heads of a token lie side by side in memory, as the kernels read them; else a copy."""
    in_place = x.stride(3) == 1 and x.stride(2) == x.shape[3]
    return x if in_place else x.contiguous()


def sizes(q: Tensor, grid: Sequence[int]) -> dict[str, Any]:
    """The constants that every kernel is compiled for."""
    head = q.shape[3]
    exact = q.dtype == torch.float32 and q.is_cuda and torch.version.hip is None
    return {
        "GRID_Y": grid[0],
        "GRID_X": grid[1],
        "HEADS": q.shape[2],
        "HEAD": head,
        "HEAD_BLOCK": max(16, triton.next_power_of_2(head)),
        "PRECISION": "tf32x3" if exact else "ieee",  # three tf32 products on tensor cores are as exact as float32
    }


def split(keys: Sequence[Tensor], biases: Sequence[Tensor], geometry: Sequence[int]) -> list[dict[str, Any]]:
    """The kernels' arguments for each kind of keys."""
    kinds, left = [], list(biases)
    for i in range(len(keys) // 2):
        k, v, geo = keys[2 * i], keys[2 * i + 1], (*geometry[GEO * i : GEO * (i + 1)],)
        bias = left.pop(0) if geo[9] else k  # without a bias, the kernel reads none: any tensor will do
        arguments = (k, v, bias, k.stride(0), k.stride(1), v.stride(0), v.stride(1))
        kinds.append({**dict(zip(KEY_NAMES, arguments, strict=True)), "GEO": geo})
    return kinds


def side_by_side(kinds: list[dict[str, Any]]) -> dict[str, Any]:
    """The same for the kernels that take all kinds at once: tuples, with one entry for each kind."""
    together = {name: tuple(kind[name] for kind in kinds) for name in (*KEY_NAMES, "GEO")}
    return {"GEOS": together.pop("GEO"), **together}


@torch.library.custom_op("minicogview::local_attention", mutates_args=())
def attend(
    q: Tensor,
    keys: Sequence[Tensor],
    biases: Sequence[Tensor],
    geometry: Sequence[int],
    grid: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of q (B, T, N, H) to several kinds of keys under one softmax.

    Args:
        keys: k and v of the first kind, (b, n, N, H) each, then of the second, ...
        biases: (b, n) contiguous float32, one for each kind that has a bias.
        geometry: ``GEO`` integers for each kind.
        grid: rows and columns of the queries, T in all.

    Returns:
        (B, T, N, H), and log2 of each query's sum of exponentials (B, N, T).
    """
    q, keys = rows_in_place(q), [rows_in_place(x) for x in keys]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if q.numel():
        forward[n_tiles(grid[0], grid[1], q.shape[0] * q.shape[2])](
            q, out, log_sum, q.stride(0), q.stride(1), scale,
            **side_by_side(split(keys, biases, geometry)), **sizes(q, grid),
        )  # fmt: skip
    return out, log_sum


@attend.register_fake
def _(q, keys, biases, geometry, grid, scale):  # type: ignore[no-untyped-def]
    log_sum = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), log_sum


@torch.library.custom_op("minicogview::local_attention_backward", mutates_args=())
def attend_backward(
    d_out: Tensor,
    q: Tensor,
    out: Tensor,
    log_sum: Tensor,
    keys: Sequence[Tensor],
    biases: Sequence[Tensor],
    geometry: Sequence[int],
    grid: Sequence[int],
    scale: float,
) -> list[Tensor]:
    """Gradients of q and of every k and v, in the order of ``keys``."""
    q, keys, d_out = rows_in_place(q), [rows_in_place(x) for x in keys], d_out.contiguous()
    d_q, *d_keys = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, *keys))
    if q.numel():
        delta, kinds, known = torch.empty_like(log_sum), split(keys, biases, geometry), sizes(q, grid)
        backward_queries[n_tiles(grid[0], grid[1], q.shape[0] * q.shape[2])](
            q, out, log_sum, d_out, d_q, delta, q.stride(0), q.stride(1), scale, **side_by_side(kinds), **known
        )
        for i, kind in enumerate(kinds):
            height, width = kind["GEO"][:2]
            shape = "own" if kind["GEO"][2:4] == (1, 1) else "row" if height == 1 else "coarse"
            backward_keys[shape][n_tiles(height, width, keys[2 * i].shape[0] * q.shape[2])](
                q, log_sum, d_out, delta, q.stride(0), q.stride(1), scale,
                d_k_at=d_keys[2 * i], d_v_at=d_keys[2 * i + 1], **kind, **known,
            )  # fmt: skip
    return [d_q, *d_keys]


@attend_backward.register_fake
def _(d_out, q, out, log_sum, keys, biases, geometry, grid, scale):  # type: ignore[no-untyped-def]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, *keys)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, keys, biases, *ctx.settings = inputs
    ctx.n_keys = len(keys)
    ctx.save_for_backward(q, *output, *keys, *biases)


def _backward(ctx: Any, d_out: Tensor, d_log_sum: Tensor | None) -> tuple[Any, ...]:
    q, out, log_sum, *rest = ctx.saved_tensors
    keys, biases = rest[: ctx.n_keys], rest[ctx.n_keys :]
    d_q, *d_keys = attend_backward(d_out, q, out, log_sum, keys, biases, *ctx.settings)
    return d_q, d_keys, [None] * len(biases), None, None, None


attend.register_autograd(_backward, setup_context=_save)
