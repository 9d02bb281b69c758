# mypy: disallow-untyped-defs=False
# (Triton's language has types of its own.)
"""Few rows times a matrix in four or eight bits, as a fused Triton kernel: the matrix is read once, as it is kept.

The idea: drawing token by token waits for weights to come from memory, so the kernel moves nothing but codes, scales
and offsets, and makes numbers of them in registers. One program has a few outputs and walks over all inputs, many at a
time; its threads stand side by side along the inputs, so that few outputs keep it busy, and there are programs enough
for a whole GPU without splitting a sum over programs. So there are no atomics, no second pass, and no sizes that are
found by trying: every sum is added up in one order, results repeat to the bit, and the same seed draws the same picture
on the next day.

Four-bit codes come in words of 32 bits, eight columns each, and are taken apart by shifts. For one row a product is a
multiplication and a sum; there ``sum(((code - middle) * scale + offset) * x)`` is
``scale * sum(code * x) + (offset - middle * scale) * sum(x)`` for all columns that share a scale, which saves an
operation on every weight. For more rows the weights are rounded to the type of the rows and go through tensor cores,
which take 16 rows at once: rows that are not there are zeros.

No part of the original. The layout is that of ``minicogview.scale.quantization.Quantized``. Counted in the compiled code, not
measured, a multiprocessor of an H100 works through 10 bytes of four-bit codes in a clock for one row and 8 for more,
while its share of the memory brings 14; in eight bits it could work through 16 and waits for memory. Frantar et al.,
"MARLIN" (2024, arXiv 2408.11743) get past that by taking codes apart two at a time; it is not done here, to keep this
short.

Shapes: ``R`` rows, ``E`` outputs, ``D`` inputs, ``G`` = D / 64 groups; in a program ``O`` outputs, and ``C`` chunks of
``K`` inputs, 16 bytes of codes or one group.

Without a GPU the kernel runs in Triton's interpreter, slowly: set TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minicogview.scale import quantization

GROUP = tl.constexpr(quantization.GROUP)


@triton.jit
def unpack(words, BITS: tl.constexpr):
    """Codes as float32 in the order of their columns: words (O, C, W) of 32 bits -> (O, C, W * 32 / BITS)."""
    codes = words.to(tl.uint32, bitcast=True)
    codes = tl.interleave(codes, codes >> 16)  # halves, then bytes, then halves of bytes; the lower one comes first
    codes = tl.interleave(codes, codes >> 8)
    if BITS == 4:
        codes = tl.interleave(codes, codes >> 4)
    return (codes & (2**BITS - 1)).to(tl.int32).to(tl.float32)  # GPUs are slow at making floats of shorter integers


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
    for start in tl.range(0, n_chunks, CHUNKS, num_stages=STAGES):  # codes are on their way some steps ahead
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


# --- launching it

INTERPRETED = not isinstance(product, triton.runtime.JITFunction)


def settings(n_rows: int, n_outputs: int, d: int, bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel must know when it is compiled for rows of this type, tile sizes included.

    For one row a chunk is 16 bytes of codes, the most that a thread reads at once, and 8 outputs give 384 programs to
    the smallest matrices of the 6B model, E = 3072: 3 for each of the 132 multiprocessors of an H100. Tensor cores want
    16 outputs. Of wide matrices a program has 32, because every program reads all rows again. Rows in float32 take
    twice the shared memory: a smaller tile, and fewer steps on their way.
    """
    one, full = n_rows == 1, dtype == torch.float32
    return {
        "D": d,
        "BITS": bits,
        "ROWS": 1 if one else quantization.MOST_ROWS,
        "OUTPUTS": 8 if one else 32 if n_outputs > 8192 and not full else 16,
        "CHUNKS": 32 if one else 4,
        "CHUNK": 128 // bits if one else quantization.GROUP,
        "STAGES": 2 if full else 3,
        # Three products of tensor cores are as good as one in float32.
        "PRECISION": "tf32x3" if full and not INTERPRETED and torch.version.hip is None else "ieee",
    }


@torch.library.custom_op("minicogview::quantized_product", mutates_args=())
def quantized_product(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """``x @ dequantize(q).T + bias`` for few rows, summed in float32; there is no gradient.

    Args:
        x: (R, D) with 1 to 16 rows; float32, float16 or, on a GPU, bfloat16.
        codes, scale, offset: a ``Quantized`` matrix (E, D). bias: (E,).

    Returns:
        (R, E) in the type of x.
    """
    (n_rows, d), n_outputs = x.shape, len(codes)
    bits = quantization.Quantized(codes, scale, offset).bits
    known = settings(n_rows, n_outputs, d, bits, x.dtype)
    y = x.new_empty(n_rows, n_outputs)
    product[(triton.cdiv(n_outputs, known["OUTPUTS"]),)](
        x.contiguous(), codes.view(torch.int32), scale, offset, bias, y, n_rows, n_outputs, **known, num_warps=4
    )
    return y


@quantized_product.register_fake
def _(x, codes, scale, offset, bias):
    return x.new_empty(len(x), len(codes))
