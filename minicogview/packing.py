"""Linear layers that lend themselves a copy of their matrix, stored for products with few rows.

The idea: drawing token by token gives each matrix one row per picture, so the time goes into reading the matrix
from memory, not into multiplying. FBGEMM, the library behind PyTorch's quantised layers on x86, keeps a matrix
in half precision and in the order in which it is read, and multiplies and adds in float32. Weights that come
from a half-precision file lose nothing by that. Of others the rounding error is kept too, as a second
half-precision matrix: together they hold 22 bits, and the products are as exact as ordinary float32 ones.

No part of the original. On other machines, other devices and in other number formats nothing is packed, and
everything here is ``F.linear``, the plain twin: same inputs, same answers up to float32 rounding.

Shapes: ``D`` inputs, ``E`` outputs; two or more dimensions, the last is the width.

Example:
    >>> layer, x = Linear(64, 32), torch.randn(1, 64)
    >>> with torch.inference_mode(), packed(layer):
    ...     fast = layer(x)
    >>> torch.allclose(fast, layer(x), atol=1e-5)
    True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 2.0**11  # half precision errs by at most 2**-11 of a number: scaled so, the error fits half precision too


def can_pack(weight: Tensor) -> bool:
    """Whether this machine has the kernels and they take this matrix: float32, on the CPU, in the range of half."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return bool(weight.abs().max() <= torch.finfo(torch.half).max)


def checksum(weight: Tensor, bias: Tensor | None) -> float:
    """One number that changes when the weights do, for the price of reading them once."""
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in weight.shape)
    total = rows.cos() @ (weight @ columns.sin())
    return float(total if bias is None else total + rows.sin() @ bias)


class Packed:
    """The map ``x -> x W^T + b`` with a packed copy of W; made from W (E, D) and b (E,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.checksum = checksum(weight, bias)
        rounded = weight.half().float()
        rest = (weight - rounded) * SCALE
        pack = torch.ops.quantized.linear_prepack_fp16
        self.main = pack(rounded, bias)
        self.rest = pack(rest, None) if bool(rest.any()) else None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), float32; has no gradient."""
        y = torch.ops.quantized.linear_dynamic_fp16(x, self.main)
        if self.rest is not None:
            y.add_(torch.ops.quantized.linear_dynamic_fp16(x, self.rest), alpha=1 / SCALE)
        return y


def pack(weight: Tensor, bias: Tensor | None, earlier: Packed | None = None) -> Packed | None:
    """A packed copy of a linear map, or None where it cannot be packed.

    Args:
        weight: (E, D). bias: (E,) or None.
        earlier: a copy made before; given back if it still is one.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not can_pack(weight):
        return None
    if earlier is not None and earlier.checksum == checksum(weight, bias):
        return earlier
    return Packed(weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` that multiplies with its packed copy inside of ``packed(model)``."""

    active: Packed | None = None
    kept: Packed | None = None  # from one drawing to the next

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.active is None else self.active(x)


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within this context the model's ``Linear`` layers use packed copies: for inference with few rows.

    The copies are kept for the next time, and made anew where the weights have changed since.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.active = layer.kept = pack(layer.weight, layer.bias, layer.kept)
    try:
        yield
    finally:
        for layer in layers:
            layer.active = None
