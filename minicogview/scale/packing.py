"""Linear layers that multiply with a packed copy of their matrix, made for products with few rows.

The idea: drawing token by token gives each matrix one row per picture, so the time goes into reading the matrix from
memory, not into multiplying. FBGEMM, the library behind PyTorch's quantized layers on x86, keeps a matrix in half
precision and in the order in which it is read, and multiplies and adds in float32. Weights that come from a
half-precision file lose nothing by that. For other weights the rounding error is kept too, as a second half-precision
matrix: together they hold 22 bits, and the products are as exact as ordinary float32 ones.

No part of the original. On other machines, other devices and in other number formats nothing is packed, and the layers
stay what they are. They are the plain twin: the same inputs give the same answers up to float32 rounding.

Shapes: ``D`` inputs, ``E`` outputs; two or more dimensions, the last is the width.

Example:
    >>> layer, x = nn.Linear(64, 32), torch.randn(1, 64)
    >>> with torch.inference_mode(), packed(layer, rows=1):
    ...     fast = layer(x)
    >>> torch.allclose(fast, layer(x), atol=1e-5)
    True
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

SCALE = 2.0**11  # half precision errs by at most 2**-11 of a number: scaled so, the error fits half precision too
MOST_ROWS = 128  # for one thread: the packed kernels use a single thread, ``F.linear`` uses all of them


def can_pack(weight: Tensor, rows: int) -> bool:
    """Whether this machine has the kernels, they are faster at ``rows`` rows, and they take the matrix (float32)."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    if not hasattr(torch, "fbgemm_linear_fp16_weight_fp32_activation"):
        return False  # its removal is announced, without a successor as fast: then F.linear serves
    if type(weight.detach()) is not Tensor:
        return False  # a DTensor: of a matrix that is split over processes only a part is here
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or rows * torch.get_num_threads() > MOST_ROWS:
        return False
    return bool(weight.abs().max() <= torch.finfo(torch.half).max)


def checksum(weight: Tensor, bias: Tensor | None) -> float:
    """A number that changes when the weights change; it costs as much as reading them once."""
    rows, columns = (torch.arange(n, dtype=torch.float32) for n in weight.shape)
    total = rows.cos() @ (weight @ columns.sin())
    return float(total if bias is None else total + rows.sin() @ bias)


class Packed:
    """The map ``x -> x W^T + b`` with a packed copy of W (E, D); b (E,) or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.checksum = checksum(weight, bias)
        self.zero = weight.new_zeros(len(weight))
        self.bias = self.zero if bias is None else bias.clone()
        rounded = weight.half().float()
        rest = (weight - rounded) * SCALE
        with warnings.catch_warnings():  # both functions say once that they will be removed: see can_pack
            warnings.simplefilter("ignore")
            self.main = torch.fbgemm_pack_gemm_matrix_fp16(rounded)
            self.rest = torch.fbgemm_pack_gemm_matrix_fp16(rest) if bool(rest.any()) else None
            self(weight[:1])

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), float32; has no gradient."""
        y = torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.main, self.bias)
        if self.rest is not None:
            y.add_(torch.fbgemm_linear_fp16_weight_fp32_activation(x, self.rest, self.zero), alpha=1 / SCALE)
        return y


_KEPT: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()  # not in the module: packs cannot be pickled


def pack(owner: nn.Module, weight: Tensor, bias: Tensor | None, rows: int) -> Packed | None:
    """A packed copy of a linear map, or None where packing is impossible or gains nothing.

    Args:
        owner: the module that the weights belong to. Its copy is kept for later calls, and made anew when the weights
            have changed since.
        weight: (E, D). bias: (E,) or None.
        rows: how many rows are multiplied at a time.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not can_pack(weight, rows):
        return None
    kept = _KEPT.get(owner)
    if kept is None or kept.checksum != checksum(weight, bias):
        kept = _KEPT[owner] = Packed(weight, bias)
    return kept


@contextmanager
def packed(model: nn.Module, rows: int) -> Iterator[None]:
    """Within this context the model's linear layers use packed copies, for inference with ``rows`` rows at a time."""
    swapped = []
    try:
        for layer in model.modules():
            if type(layer) is nn.Linear and (copy := pack(layer, layer.weight, layer.bias, rows)) is not None:
                layer.forward = copy  # type: ignore[method-assign, assignment]
                swapped.append(layer)
        yield
    finally:
        for layer in swapped:
            del layer.forward
