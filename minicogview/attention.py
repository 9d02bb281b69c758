"""Attention: which tokens look at which, how strongly, and the one place that decides how this is computed.

The idea: every token asks a question (its query ``q``) and offers an answer (its key ``k`` and value ``v``). The
softmax of the scores ``q k / sqrt(H)`` says how much of each value a token takes. A *bias* added to the scores forbids
a key or favours it. CogView (Ding et al. 2021, arXiv 2105.13290), section 2.4, keeps the scores small
with PB-relax; CogView2 (arXiv 2204.14217), section 3.2, favours text columns.

Mirrors: ``attention_fn`` of SwissArmyTransformer 0.2.1.

Shapes: ``B`` batch, ``T`` query tokens, ``S`` key tokens, ``N`` heads, ``H`` head size.

Different on purpose: a masked score becomes ``score - 10000`` instead of exactly ``-10000``. The two differ only in a
row that may see nothing, or where scores are themselves in the thousands; such scores get past either form of mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -10000.0  # finite, so that even a row that may see nothing stays free of NaN


def attention_bias(mask: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Turn a mask, "which token may look at which", into numbers that are added to the attention scores.

    Args:
        mask: (..., T, S), 1 or True where the query row may look at the key column.
        log_weights: (S,) or (..., T, S), added where looking is allowed: CogView2 puts 1.4 on the text
            columns, which multiplies the text's share of attention by up to ``exp(1.4)``.

    Returns:
        (B, 1, T, S) float32; a two-dimensional mask gives B = 1.
    """
    allowed = mask.bool()
    bias = torch.zeros(allowed.shape, device=mask.device)
    if log_weights is not None:
        bias = bias + log_weights
    bias = bias.masked_fill(~allowed, MASKED)
    return bias.reshape(-1, 1, *bias.shape[-2:])


def text_attention_weights(n_text: int, seq_len: int, weight: float) -> Tensor:
    """Log attention weights (seq_len,): ``weight`` on the text columns, 0 elsewhere, for every query row.

    They are added to the attention scores, so a ``weight`` of 1.4 makes each text token count exp(1.4) = 4.1 times.
    ``<start_of_image>`` is not text: leave it out of ``n_text``.
    """
    return F.pad(torch.full((n_text,), float(weight)), (0, seq_len - n_text))


def attention_weights(
    q: Tensor, k: Tensor, bias: Tensor | None, pb_relax: float | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention weights, computed step by step.

    PB-relax ("precision bottleneck relaxation") gives the same weights but keeps the numbers on the way small: the
    scores are divided by ``pb_relax``, their row maximum is subtracted, and only then are they multiplied back.

    Args:
        q: (B, N, T, H). k: (B, N, S, H).
        bias: broadcast to (B, N, T, S), added to the scores; or bool, True where the query may look at the key.
        scale: factor of the scores, by default ``H ** -0.5``.

    Returns:
        (B, N, T, S); each row sums to 1.
    """
    relax = pb_relax or 1.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * (scale / relax)) @ k.transpose(-1, -2)  # (B, N, T, S)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias / relax
    if pb_relax:
        scores = (scores - scores.amax(-1, keepdim=True).detach()) * relax
    return scores.softmax(-1)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """The weighted sum of the values, for each query: (B, N, T, S), (B, N, S, H) -> (B, N, T, H), in ``v``'s dtype."""
    return weights.to(v.dtype) @ v


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pb_relax: float | None = None, scale: float | None = None
) -> Tensor:
    """Attention by PyTorch's fused operator or step by step, whichever is faster here; both give the same numbers.

    The fused operator is faster, with two exceptions that were measured on a CPU: its backward pass took three times as
    long at the toy's sizes, and a single bfloat16 query took four times as long.

    Args:
        q: (B, N, T, H). k, v: (B, N, S, H).
        bias, scale: as for ``attention_weights``.
        pb_relax: as for ``attention_weights``; the fused operator does not have it.

    Returns:
        (B, N, T, H), in the dtype of ``q``.
    """
    dtype, on_cpu = q.dtype, q.device.type == "cpu"
    single = on_cpu and dtype == torch.bfloat16 and q.shape[2] == 1
    learning = on_cpu and q.requires_grad and torch.is_grad_enabled()
    if pb_relax is None and not single and not learning:
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if single:  # in float32: bfloat16 products allocate memory for every new length and keep it
        q, k, v = q.float(), k.float(), v.float()
    return weighted_values(attention_weights(q, k, bias, pb_relax, scale), v).to(dtype)
