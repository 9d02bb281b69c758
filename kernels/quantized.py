# mypy: disallow-untyped-defs=False
# (Triton's language has types of its own.)
"""A few rows times a 4-bit or 8-bit matrix, as a fused Triton kernel that reads the quantized matrix once.

The idea: generating token by token waits for weights to come from memory, so the kernel moves only codes, scales and
offsets, and computes the weights from them in registers. One program computes a few outputs in a loop over all inputs,
many at a time. Its threads are spread along the inputs, so that a few outputs are enough to keep them busy, and there
are enough programs for a whole GPU without splitting a sum between programs. So there are no atomics, no second pass
and no tile sizes found by trying. Every sum is formed in one order, results repeat to the bit, and the same seed gives
the same picture the next day.

4-bit codes come in words of 32 bits, eight columns each, and shifts take them apart. With a single row,
``sum(((code - middle) * scale + offset) * x)`` over the columns that share a scale is
``scale * sum(code * x) + (offset - middle * scale) * sum(x)``, which saves an operation per weight. With more rows the
weights are rounded to the type of the rows and multiplied on tensor cores, which take 16 rows at once: missing rows are
zeros.

Not part of the original. The layout is that of ``minicogview.scale.quantization.Quantized``. As counted in the compiled
code, not measured, a multiprocessor of an H100 processes 10 bytes of 4-bit codes per clock for one row and 8 for more,
while its share of the memory delivers 14; with 8-bit codes it could process 16, and waits for memory. Frantar et al.,
"MARLIN" (2024, arXiv 2408.11743) avoid this limit by taking codes apart two at a time. That is left out here, to keep
the kernel short.

Shapes: ``R`` rows, ``E`` outputs, ``D`` inputs, ``G`` = D / 64 groups; in a program ``O`` outputs, and ``C`` chunks of
``K`` inputs, 16 bytes of codes or one group.

Without a GPU the kernel runs, slowly, in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minicogview.kernels import available

INTERPRETED = available.interpreted()
GROUP = tl.constexpr(available.GROUP)


@triton.jit
def unpack(words, BITS: tl.constexpr):
    """Codes as float32 in the order of their columns: words (O, C, W) of 32 bits -> (O, C, W * 32 / BITS)."""
    codes = words.to(tl.uint32, bitcast=True)
    codes = tl.interleave(codes, codes >> 16)  # halves, then bytes, then halves of bytes, always the lower one first
    codes = tl.interleave(codes, codes >> 8)
    if BITS == 4:
        codes = tl.interleave(codes, codes >> 4)
    return (codes & (2**BITS - 1)).to(tl.int32).to(tl.float32)  # GPUs convert shorter integers to floats slowly


@triton.jit
def product(
    x_at, words_at, scale_at, offset_at, bias_at, y_at, n_rows, n_outputs,
    D: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (R, E) = x (R, D) @ weight (E, D).T + bias (E,) for ``OUTPUTS`` outputs, R <= ROWS; ROWS is 1 or 16."""
    in_word: tl.constexpr = 32 // BITS
    n_chunks: tl.constexpr = D // CHUNK
    output, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    is_output, is_row = output < n_outputs, row < n_rows
    if ROWS == 1:
        total = tl.zeros([OUTPUTS, CHUNKS], tl.float32)
    else:
        total = tl.zeros([CHUNKS, OUTPUTS, ROWS], tl.float32)
    for start in tl.range(0, n_chunks, CHUNKS, num_stages=STAGES):  # codes are loaded some steps ahead
        chunk = start + tl.arange(0, CHUNKS)
        is_chunk = chunk < n_chunks
        there = is_output[:, None] & is_chunk[None, :]  # (O, C)
        first = output[:, None] * (D // in_word) + chunk[None, :] * (CHUNK // in_word)
        words = words_at + first[:, :, None] + tl.arange(0, CHUNK // in_word)
        codes = unpack(tl.load(words, mask=there[:, :, None], other=0), BITS)  # (O, C, K)
        group = output[:, None] * (D // GROUP) + chunk[None, :] * CHUNK // GROUP
        scale = tl.load(scale_at + group, mask=there, other=0.0).to(tl.float32)
        shift = tl.load(offset_at + group, mask=there, other=0.0).to(tl.float32) - 2 ** (BITS - 1) * scale
        column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]  # (C, K)
        if ROWS == 1:
            x = tl.load(x_at + column, mask=is_chunk[:, None], other=0.0).to(tl.float32)
            total += tl.sum(codes * x[None, :, :], 2) * scale + tl.sum(x, 1)[None, :] * shift
        else:
            rows, real = x_at + row[None, None, :] * D, is_chunk[:, None, None] & is_row[None, None, :]
            x = tl.load(rows + column[:, :, None], mask=real, other=0.0)  # (C, K, R)
            weight = (codes * scale[:, :, None] + shift[:, :, None]).to(x.dtype)
            total = tl.dot(tl.permute(weight, (1, 0, 2)), x, total, input_precision=PRECISION)
    if ROWS == 1:
        y = tl.sum(total, 1)[:, None]
    else:
        y = tl.sum(total, 0)  # (O, R)
    y += tl.load(bias_at + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    to = y_at + row[None, :] * n_outputs + output[:, None]
    tl.store(to, y.to(y_at.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


# --- the launch


def settings(n_rows: int, n_outputs: int, d: int, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """The constants that the kernel is compiled for, including the tile sizes.

    For one row a chunk is 16 bytes of codes, the most that a thread reads at once. With 8 outputs per program, the
    smallest matrices of the 6B model (E = 3072) give 384 programs: 3 for each of the 132 multiprocessors of an H100.
    Tensor cores need 16 outputs. For wide matrices a program computes 32, because every program reads all rows again.
    Rows in float32 take twice the shared memory: the tile is smaller, and fewer steps are loaded ahead.
    """
    one, full = n_rows == 1, dtype == torch.float32
    return {
        "D": d,
        "BITS": bits,
        "ROWS": 1 if one else available.MOST_ROWS,
        "OUTPUTS": 8 if one else 32 if n_outputs > 8192 and not full else 16,
        "CHUNKS": 32 if one else 4,
        "CHUNK": 128 // bits if one else available.GROUP,
        "STAGES": 2 if full else 3,
        # Three tf32 products on tensor cores are as exact as float32.
        "PRECISION": "tf32x3" if full and not INTERPRETED and torch.version.hip is None else "ieee",
    }


@torch.library.custom_op("minicogview::quantized_product", mutates_args=())
def quantized_product(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """``x @ dequantize(q).T + bias`` for a few rows, summed in float32; it has no gradient.

    Args:
        x: (R, D) with 1 to 16 rows; float32, float16 or, on a GPU, bfloat16.
        codes, scale, offset: the fields of a ``Quantized`` matrix (E, D). bias: (E,).

    Returns:
        (R, E) in the type of x.
    """
    (n_rows, d), n_outputs = x.shape, len(codes)
    known = settings(n_rows, n_outputs, d, 8 if codes.shape[1] == d else 4, x.dtype)
    y = x.new_empty(n_rows, n_outputs)
    product[(triton.cdiv(n_outputs, known["OUTPUTS"]),)](
        x.contiguous(), codes.view(torch.int32), scale, offset, bias, y, n_rows, n_outputs, **known, num_warps=4
    )
    return y


@quantized_product.register_fake
def _(x, codes, scale, offset, bias):
    return x.new_empty(len(x), len(codes))
