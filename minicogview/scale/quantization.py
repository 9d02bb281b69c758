"""Weights in 8 or 4 bits: a half or a quarter of the memory, and of the time it takes to read them.

The idea: neighbouring weights of a row are of similar size. So 64 of them share a scale and an offset, and each weight
is kept as a small integer: ``weight = (code - middle) * scale + offset``. Drawing token by token waits for weights to
come from memory, so a quarter of the bytes makes it nearly four times as fast. The price is a rounding error in every
matrix, which ``relative_error`` measures.

No part of the original. Rounding to the nearest code in groups is the plainest form of weight quantization, see
Dettmers & Zettlemoyer, "The case for 4-bit precision" (2022, arXiv 2212.09720); better ones look at activations too.

On x86 and ARM processors PyTorch has a product of bfloat16 rows with 4-bit matrices, which reads the codes as they are;
an 8-bit matrix goes through it as two 4-bit halves. On a GPU a Triton kernel does the same for up to 16 rows
(``kernels/quantized.py``). Everywhere else matrices are dequantized one by one, which saves memory but no time.

Shapes: ``E`` outputs, ``D`` inputs, ``G`` = D / 64 groups in a row.

Example:
    >>> weight = torch.randn(128, 256)
    >>> four, eight = quantize(weight, bits=4), quantize(weight, bits=8)
    >>> four.codes.shape, four.scale.shape
    (torch.Size([128, 128]), torch.Size([128, 4]))
    >>> bool(relative_error(weight, eight) < 0.1 * relative_error(weight, four))
    True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError
from minicogview.kernels.available import GROUP, MOST_ROWS, why_no_triton

Bits = Literal[4, 8]
ROWS_AT_ONCE = 128


class Quantized(NamedTuple):
    """A quantized matrix (E, D), where D is rounded up to whole groups."""

    codes: Tensor  # uint8: (E, D) for 8 bits; (E, D / 2) for 4 bits, the even column in the lower half of a byte
    scale: Tensor  # (E, G) bfloat16
    offset: Tensor  # (E, G) bfloat16, the value of the middle code

    @property
    def bits(self) -> Bits:
        """Bits per code."""
        return 8 if self.codes.shape[1] == self.scale.shape[1] * GROUP else 4


def quantize(weight: Tensor, bits: Bits) -> Quantized:
    """Round a matrix (E, D) to codes of ``bits`` bits, spread evenly between the least and the largest of 64 weights.

    A last group that is not full is filled up with the last column, which does not widen its range.

    Raises:
        MiniCogViewError: if bits is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise MiniCogViewError(f"{bits} bits: weights are kept in 4 or 8 bits")
    missing = -weight.shape[1] % GROUP
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], dim=1)
    # So many rows at a time stay in the processor's cache: a third faster than all at once.
    parts = [_quantize(rows, bits) for rows in weight.detach().split(ROWS_AT_ONCE)]
    return Quantized(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _quantize(weight: Tensor, bits: Bits) -> Quantized:
    middle, last = 2 ** (bits - 1), 2**bits - 1
    groups = weight.unflatten(1, (-1, GROUP)).float()  # (E, G, 64)
    least, largest = groups.aminmax(dim=-1)
    scale = ((largest - least) / last).clamp(min=1e-8).bfloat16()
    offset = (least + middle * scale.float()).bfloat16()
    # With the rounded scale and offset, so that their error is not added to that of the codes.
    groups = groups.sub(offset.float()[..., None]).div_(scale.float()[..., None]).round_().add_(middle)
    codes = groups.clamp_(0, last).to(torch.uint8).flatten(1)  # (E, D)
    return Quantized(codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4, scale, offset)


def split_bytes(codes: Tensor) -> Tensor:
    """Codes of four bits, one in a byte: (E, D / 2) -> (E, D)."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that a quantized one stands for, (E, D) with D in whole groups."""
    codes = q.codes if q.bits == 8 else split_bytes(q.codes)
    centred = codes.to(dtype).sub_(2 ** (q.bits - 1)).unflatten(1, (-1, GROUP))  # exact in bfloat16: at most 8 bits
    return centred.mul_(q.scale.to(dtype)[..., None]).add_(q.offset.to(dtype)[..., None]).flatten(1)


def relative_error(weight: Tensor, q: Quantized) -> Tensor:
    """Length of the error / length of the matrix: about 0.1 in four bits, 0.006 in eight, for normal weights."""
    weight = weight.float()
    return (dequantize(q)[:, : weight.shape[1]] - weight).norm() / weight.norm().clamp(min=1e-30)


# --- products without a dequantized copy --------------------------------------------------------------------------


def has_int4_product(device: torch.device) -> bool:
    """Whether PyTorch multiplies with four-bit matrices on this device."""
    return device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")


def _halves(q: Quantized) -> list[tuple[Tensor, Tensor]]:
    """Four bits of a matrix at a time, in the order in which PyTorch's product reads them: one half, or two.

    With ``code - 128 = 16 (high - 8) + (low - 8) + 8`` both halves have the form of four-bit weights:
    ``(high - 8) * 16 scale + offset`` and ``(low - 8) * scale + 8 scale``.

    Returns:
        packed codes, and scale and offset (G, E, 2), of each.
    """

    def half(codes: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return packed, torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous()

    if q.bits == 4:
        return [half(split_bytes(q.codes), q.scale, q.offset)]
    return [half(q.codes >> 4, 16 * q.scale, q.offset), half(q.codes & 15, q.scale, 8 * q.scale)]


def fused_product(rows: Tensor) -> bool:
    """Whether a Triton kernel takes these rows (R, D): at most 16, on a GPU, and no gradient is needed."""
    if not rows.is_cuda or not 1 <= len(rows) <= MOST_ROWS or (rows.requires_grad and torch.is_grad_enabled()):
        return False
    return not why_no_triton(rows, "x")


def in_groups(x: Tensor) -> Tensor:
    """Rows (..., D) filled up with zeros to whole groups."""
    missing = -x.shape[-1] % GROUP
    return F.pad(x, (0, missing)) if missing else x


# --- layers ---------------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with a quantized matrix, for inference; it is dequantized unless ``fused_product`` holds.

    Attributes:
        codes, scale, offset: see ``Quantized``. bias: (E,).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    bias: Tensor

    def __init__(self, quantized: Quantized, bias: Tensor):
        super().__init__()
        for name, value in quantized._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E)."""
        x, quantized = in_groups(x), Quantized(self.codes, self.scale, self.offset)
        rows = x.reshape(-1, x.shape[-1])
        if fused_product(rows):
            from minicogview.kernels.quantized import quantized_product

            return quantized_product(rows, *quantized, self.bias).unflatten(0, x.shape[:-1])
        return F.linear(x, dequantize(quantized, x.dtype), self.bias)


class Int4ProductLinear(nn.Module):
    """The same on a CPU, by PyTorch's product of bfloat16 rows with 4-bit matrices: nothing is dequantized.

    Attributes:
        packed0, scale0: of the upper or only half; packed1, scale1: of the lower one, for eight bits.
    """

    bias: Tensor

    def __init__(self, quantized: Quantized, bias: Tensor):
        super().__init__()
        halves = _halves(quantized)
        self.n_halves = len(halves)
        for i, (packed, scale) in enumerate(halves):
            self.register_buffer(f"packed{i}", packed)
            self.register_buffer(f"scale{i}", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), in the format of x; rows are rounded to bfloat16, as the product wants them."""
        rows, y = in_groups(x).flatten(0, -2).bfloat16(), self.bias
        for i in range(self.n_halves):
            packed, scale = getattr(self, f"packed{i}"), getattr(self, f"scale{i}")
            y = y + torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, GROUP, scale)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def quantize_layers(
    model: nn.Module,
    bits: Bits,
    on_layer: Callable[[str, Tensor, Quantized], None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Replace every linear layer inside of a model by a quantized one; tables and norms stay.

    Args:
        dtype: number format of the model's activations; None: that of its matrices.
        on_layer: called with each one's name, old matrix and new one.
    """
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        weight = module.weight.detach()
        quantized = quantize(weight, bits)
        if on_layer:
            on_layer(name, weight, quantized)
        # Of float32 matrices on a CPU the model is small or the wish for precision great: rows stay unrounded then.
        fused = weight.dtype != torch.float32 and has_int4_product(weight.device) and len(weight) % 16 == 0
        kind = Int4ProductLinear if fused else QuantizedLinear
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, kind(quantized, module.bias.detach().to(dtype or weight.dtype)))
