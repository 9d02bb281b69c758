"""The usual ways of computing local attention, which ``local_attention.py`` in this folder measures ours against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minicogview.windows import window_cells, window_mask

WINDOW, COARSE_WINDOW = (9, 5), (5, 5)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One size, type and direction: the rows of the table that are compared with one another."""

    side: int
    heads: int
    head_size: int
    dtype: str
    backward: bool
    device: str = "cpu"

    @property
    def ratio(self) -> int:
        return 3 if self.side % 3 == 0 else 4

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def coarse_grid(self) -> tuple[int, int]:
        return self.side // self.ratio, self.side // self.ratio


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, coarse k, coarse v -> out

# --- the usual ways ---------------------------------------------------------------------------------------------


def unfolded(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """A copy of every window of x (B, h * w, N, H): (B, N, H, cells, h * w), zeros outside the grid."""
    picture = rearrange(x, "b (y x) n h -> b (n h) y x", y=grid[0])
    windows = F.unfold(picture, window, padding=(window[0] // 2, window[1] // 2))
    return windows.view(len(x), *x.shape[2:], window[0] * window[1], -1)


def unfold_way(setting: Setting) -> Attend:
    """A copy of every window, with dot products as elementwise products and sums."""
    grid, coarse_grid = setting.grid, setting.coarse_grid
    inside = torch.cat(
        [
            window_cells(grid, key_grid, window)[1]
            for key_grid, window in ((grid, WINDOW), (coarse_grid, COARSE_WINDOW))
        ],
        1,
    ).T.to(setting.device)  # (70, T)
    up, across = torch.arange(grid[0])[:, None] // setting.ratio, torch.arange(grid[1]) // setting.ratio
    parent = (up * coarse_grid[1] + across).flatten().to(setting.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        q = rearrange(q, "b t n h -> b n h 1 t") * setting.head_size**-0.5
        scores = [
            (q * unfolded(k, grid, WINDOW)).sum(2),
            (q * unfolded(coarse_k, coarse_grid, COARSE_WINDOW)[..., parent]).sum(2),
        ]
        weights = torch.cat(scores, 2).masked_fill(~inside, float("-inf")).softmax(2)[:, :, None]  # (B, N, 1, 70, T)
        own = WINDOW[0] * WINDOW[1]
        out = (weights[..., :own, :] * unfolded(v, grid, WINDOW)).sum(3)
        out = out + (weights[..., own:, :] * unfolded(coarse_v, coarse_grid, COARSE_WINDOW)[..., parent]).sum(3)
        return rearrange(out, "b n h t -> b t n h")

    return attend


def side_by_side(k: Tensor, coarse_k: Tensor) -> Tensor:
    """The keys of both grids in one list, heads first: (B, N, S, H)."""
    return torch.cat([k, coarse_k], 1).transpose(1, 2)


def dense_way(setting: Setting) -> Attend:
    """PyTorch's fused attention with a mask over all pairs."""
    masks = [
        window_mask(setting.grid, setting.grid, WINDOW),
        window_mask(setting.grid, setting.coarse_grid, COARSE_WINDOW),
    ]
    mask = torch.cat(masks, 1).to(setting.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        keys, values = side_by_side(k, coarse_k), side_by_side(v, coarse_v)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)

    return attend


def flex_way(setting: Setting) -> Attend:
    """PyTorch's FlexAttention: the windows are a function of two positions, compiled into the kernel."""
    side, ratio, n = setting.side, setting.ratio, setting.side**2
    coarse_side = side // ratio

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        y, x, coarse_key = query // side, query % side, key - n
        own = ((key // side - y).abs() <= WINDOW[0] // 2) & ((key % side - x).abs() <= WINDOW[1] // 2)
        dy, dx = coarse_key // coarse_side - y // ratio, coarse_key % coarse_side - x // ratio
        coarse = (dy.abs() <= COARSE_WINDOW[0] // 2) & (dx.abs() <= COARSE_WINDOW[1] // 2)
        return torch.where(key < n, own, coarse)

    torch._dynamo.reset()
    blocks = create_block_mask(seen, None, None, n, n + coarse_side**2, device=setting.device)
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        keys, values = side_by_side(k, coarse_k), side_by_side(v, coarse_v)
        return compiled(q.transpose(1, 2), keys, values, block_mask=blocks).transpose(1, 2)

    return attend


def xformers_way(setting: Setting) -> Attend:
    """xformers' memory-efficient attention, with the mask as a bias on the scores."""
    from xformers.ops import memory_efficient_attention

    n, coarse_n = setting.side**2, setting.coarse_grid[0] ** 2
    masks = [
        window_mask(setting.grid, setting.grid, WINDOW),
        window_mask(setting.grid, setting.coarse_grid, COARSE_WINDOW),
    ]
    bias = torch.zeros(n, -(-(n + coarse_n) // 8) * 8, dtype=DTYPES[setting.dtype])  # its rows must be aligned
    bias[:, : n + coarse_n].masked_fill_(~torch.cat(masks, 1), float("-inf"))
    bias = bias.to(setting.device)[None, None, :, : n + coarse_n].expand(1, setting.heads, -1, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        keys, values = torch.cat([k, coarse_k], 1), torch.cat([v, coarse_v], 1)
        return memory_efficient_attention(q.contiguous(), keys, values, attn_bias=bias)

    return attend


def natten_way(setting: Setting) -> Attend:
    """NATTEN's neighbourhood attention, on the fine grid only."""
    from natten import na2d

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        pictures = (rearrange(x, "b (y x) n h -> b y x n h", y=setting.side).contiguous() for x in (q, k, v))
        return na2d(*pictures, kernel_size=WINDOW).flatten(1, 2)

    return attend
