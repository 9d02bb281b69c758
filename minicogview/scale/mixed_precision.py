"""Large matrix products on a CPU: matrices kept in half precision, numbers computed in float32, a piece at a time.

The idea: half precision halves the memory of a model, but many processors multiply float32 numbers much faster
(``machine.py``). So a matrix stays as it is stored, and a product converts it piece by piece: a piece in float32 still
lies in the processor's cache when it is multiplied, so converting costs little where there are many rows. For a few
rows nothing is converted, since such a product waits for the matrix to come from memory, and half the bytes take half
the time.

Mirrors: nothing; the original computes in float16 on a GPU. All of this is put into a model from outside and changes
none of its numbers beyond rounding: ``keep_half`` for its matrices, ``in_pieces`` for its MLPs.

Shapes: ``R`` rows, ``D`` inputs, ``E`` outputs, ``B`` batch, ``T`` tokens.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicogview.transformer import MLP, Transformer

FEW_ROWS = 8  # up to here a product in half precision is as fast as converting the matrix, even on a plain processor
PIECE = 2**23  # weights that are converted at a time: 32 MB in float32
MLP_TOKENS = 1024  # at a time: fewer keep what lies between its matrices small, but convert the matrices more often


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` in the number format of ``x``, whatever the matrix is kept in; there is no gradient.

    Args:
        x: (..., D). weight: (E, D). bias: (E,), in the format of ``x``.

    Returns:
        (..., E), in the format of ``x``.
    """
    weight = weight.detach()
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    rows = x.detach().reshape(-1, x.shape[-1])  # (R, D)
    if len(rows) <= FEW_ROWS:
        y = F.linear(rows.to(weight.dtype), weight).to(x.dtype)
    else:
        y = rows.new_empty(len(rows), len(weight))
        step = max(1, PIECE // weight.shape[1])
        for start in range(0, len(weight), step):
            piece = weight[start : start + step].to(x.dtype)
            torch.mm(rows, piece.T, out=y[:, start : start + step])
    if bias is not None:
        y += bias
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y


def keep_half(model: nn.Module, dtype: torch.dtype) -> None:
    """From now on a model computes in ``dtype``, with matrices and tables in the format that they have.

    Its vectors (norms and biases) must have that format already.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding):
            module.forward = partial(_embedding, module, dtype)  # type: ignore[method-assign]
        elif isinstance(module, Transformer):
            module.logits = partial(_logits, module)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return product(x, layer.weight, layer.bias)


def _embedding(table: nn.Embedding, dtype: torch.dtype, ids: Tensor) -> Tensor:
    return F.embedding(ids, table.weight).to(dtype)


def _logits(model: Transformer, hidden: Tensor, n_rows: int | None = None) -> Tensor:
    return product(hidden, model.token_embedding.weight[:n_rows])


def in_pieces(model: nn.Module) -> None:
    """From now on the MLPs of a model take ``MLP_TOKENS`` tokens at a time, where no gradient is asked for."""
    for module in model.modules():
        if type(module) is MLP:
            module.forward = partial(_mlp, module)  # type: ignore[method-assign]


def _mlp(mlp: MLP, x: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D)."""
    if x.shape[1] <= MLP_TOKENS or (x.requires_grad and torch.is_grad_enabled()):
        return MLP.forward(mlp, x)
    return torch.cat([MLP.forward(mlp, part) for part in x.split(MLP_TOKENS, dim=1)], dim=1)
