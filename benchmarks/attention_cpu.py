"""Why training on a CPU writes attention out: its forward and backward time against PyTorch's fused operator.

    python benchmarks/attention_cpu.py

The sizes are the toy's: batch 64, 4 heads of 64, 76 tokens, bfloat16 as under autocast, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minicogview.attention import attention_weights


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's fused operator."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Our attention, written out."""
    return attention_weights(q, k, bias).to(v.dtype) @ v


def measure(attend: Callable[..., Tensor], rounds: int = 20) -> tuple[float, float]:
    """Median CPU milliseconds of the forward and of the backward pass."""
    q, k, v = (torch.randn(64, 4, 76, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    bias, times = torch.zeros(64, 1, 76, 76), []
    for _ in range(rounds):
        start = time.process_time()
        out = attend(q, k, v, bias)
        middle = time.process_time()
        out.backward(torch.ones_like(out))
        times.append((middle - start, time.process_time() - middle))
    forward, backward = (sorted(column)[rounds // 2] * 1e3 for column in zip(*times, strict=True))
    return forward, backward


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = {attend.__name__: measure(attend) for attend in (fused, plain)}
    for name, (forward, backward) in rows.items():
        print(f"{name:6} forward {forward:5.1f} ms, backward {backward:5.1f} ms")
    print(f"fused / plain, both directions: {sum(rows['fused']) / sum(rows['plain']):.1f}")
