"""The transformer of CogView2: sandwich LayerNorm, optional PB-relax, and a preallocated KV cache.

The idea: every residual branch is normalised twice, once before it (as in pre-LN) and once after it, so that
no branch can add large values to the residual stream and half precision does not overflow. CogView (Ding et
al. 2021, arXiv 2105.13290, section 2.4) introduced it together with PB-relax, which keeps the attention
scores small for the same reason. CogView2 (arXiv 2204.14217) reuses the block unchanged.

Mirrors: SwissArmyTransformer 0.2.1, ``model/transformer.py`` with ``layernorm_order="sandwich"``.

Shapes: ``B`` batch, ``T`` query tokens, ``S`` key tokens (cached ones included), ``D`` model width,
``N`` heads, ``H`` head size, ``V`` vocabulary rows.

Different on purpose: the KV cache is written in place instead of concatenated anew at each token; a masked
score becomes ``score - 10000`` instead of exactly ``-10000``. Only a fully masked row can tell, or scores that
are themselves in the thousands; such scores get past either form of mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicogview.config import NormOrder, TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.scale.packing import Linear
from minicogview.scale.streaming import Stream

MLP_ROWS = 512  # tokens at a time on a CPU: what lies between an MLP's matrices then stays in the cache
MASKED = -10000.0  # finite, so that even a row that may see nothing stays free of NaN


def attention_bias(mask: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Turn "who may look at whom" into numbers that are added to the attention scores.

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


class KVCache:
    """Keys and values of every layer, allocated once for the longest sequence and filled from the left.

    Args:
        config: the transformer's sizes.
        batch: rows that will be generated side by side.
        max_len: the most tokens that a row will ever hold.
        n_heads: heads that are kept here; None: all. Others may be on other machines (``scale/parallel.py``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        n_heads: int | None = None,
    ):
        size = config.d_model // config.n_heads
        shape = (config.n_layers, batch, n_heads or config.n_heads, max_len, size)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (L, B, N, S, H)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.place: Tensor | None = None  # (1,), where the next token goes, if steps are to be fixed: ``scale/graphs.py``

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k, v`` (B or 1, N, T, H) behind what is there; return all keys and values so far.

        A batch of one is shared by all rows: that is how one prompt serves many pictures.
        """
        if self.place is not None:  # the same work whatever the place is: all places are returned
            return self.k[layer].index_copy_(2, self.place, k), self.v[layer].index_copy_(2, self.place, v)
        end = self.length + k.shape[2]
        if end > self.k.shape[3]:
            raise MiniCogViewError(f"KV cache holds {self.k.shape[3]} tokens, {end} were given: allocate a longer one")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        rows = k.shape[0]
        return self.k[layer, :rows, :, :end], self.v[layer, :rows, :, :end]


@dataclass
class Record:
    """Fill me: hand one to ``Transformer.forward`` to get what happened inside."""

    hidden: list[Tensor] = field(default_factory=list)  # residual stream after each layer, (B, T, D)
    maps: list[Tensor] = field(default_factory=list)  # attention of each layer, (B, N, T, S)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None, pb_relax: float | None = None) -> Tensor:
    """Softmax attention weights, written out.

    PB-relax ("precision bottleneck relaxation") computes the same numbers from smaller ones: the scores are
    divided by ``pb_relax``, their row maximum is subtracted, and only then are they multiplied back.

    Args:
        q: (B, N, T, H). k: (B, N, S, H). bias: (B, 1, T, S) or None.

    Returns:
        (B, N, T, S), rows sum to 1.
    """
    relax = pb_relax or 1.0
    scores = (q / (math.sqrt(q.shape[-1]) * relax)) @ k.transpose(-1, -2)  # (B, N, T, S)
    if bias is not None:
        scores = scores + bias / relax
    if pb_relax:
        scores = (scores - scores.amax(-1, keepdim=True).detach()) * relax
    return scores.softmax(-1)


class Attention(nn.Module):
    """Multi-head self-attention with one joint projection whose output is [q | k | v]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.n_heads, self.pb_relax = config.n_heads, config.pb_relax
        self.qkv = Linear(config.d_model, 3 * config.d_model)
        self.out = Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, bias: Tensor | None, layer: int, cache: KVCache | None, record: Record | None
    ) -> Tensor:
        # "b t (three n h) -> three b n t h"; einops itself takes 5 % of the time of drawing, here and below
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        on_cpu = x.device.type == "cpu"
        alone = on_cpu and x.dtype == torch.bfloat16 and x.shape[1] == 1
        if alone:  # fused bfloat16 took four times as long; written out it kept memory for every length that occurs
            q, k, v = q.float(), k.float(), v.float()
        # On a CPU the fused backward pass took three times as long as the plain one at the toy's sizes.
        plain = record is not None or self.pb_relax is not None or alone or (on_cpu and x.requires_grad)
        if not plain:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
        else:
            weights = attention_weights(q, k, bias, self.pb_relax)
            y = weights.to(v.dtype) @ v
            if record is not None:
                record.maps.append(weights)
        return self.out(y.to(x.dtype).transpose(1, 2).flatten(2))  # "b n t h -> b t (n h)"


class MLP(nn.Module):
    """Two linear layers around a GELU in its tanh form."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.up = Linear(config.d_model, 4 * config.d_model)
        self.down = Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.requires_grad or x.shape[1] <= MLP_ROWS:
            return self._run(x)
        return torch.cat([self._run(part) for part in x.split(MLP_ROWS, dim=1)], dim=1)

    def _run(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def _same(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """One layer. The order of its norms is what ``config.norm`` chooses:

    sandwich  x + LN(Attn(LN(x)))      pre  x + Attn(LN(x))      post  LN(x + Attn(x))
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.norm not in get_args(NormOrder):
            raise MiniCogViewError(f"unknown norm {config.norm!r}: choose one of {', '.join(get_args(NormOrder))}")
        self.norm_order = config.norm
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.attention_norm = nn.LayerNorm(config.d_model)  # before the branch; after the sum in post-LN
        self.mlp_norm = nn.LayerNorm(config.d_model)
        if config.norm == "sandwich":
            self.attention_out_norm = nn.LayerNorm(config.d_model)
            self.mlp_out_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, bias: Tensor | None, layer: int, cache: KVCache | None, record: Record | None
    ) -> Tensor:
        return self.finish(x, self.attention(self.prepare(x), bias, layer, cache, record))

    # The two halves around attention: super-resolution puts an attention of its own between them.

    def prepare(self, x: Tensor) -> Tensor:
        """What attention sees of the residual stream x (B, T, D)."""
        return x if self.norm_order == "post" else self.attention_norm(x)

    def finish(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add what attention returned, then the MLP's branch: (B, T, D)."""
        drop = self.dropout if self.training else _same  # calling a module costs time, also if it does nothing
        if self.norm_order == "post":
            x = self.attention_norm(x + drop(branch))
            return self.mlp_norm(x + drop(self.mlp(x)))
        sandwich = self.norm_order == "sandwich"
        x = x + drop(self.attention_out_norm(branch) if sandwich else branch)
        branch = self.mlp(self.mlp_norm(x))
        return x + drop(self.mlp_out_norm(branch) if sandwich else branch)


class Transformer(nn.Module):
    """Token and position tables, the layers, a final norm; the output table is the token table.

    Example:
        >>> model = Transformer(TransformerConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=50))
        >>> hidden = model(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
        >>> model.logits(hidden).shape
        torch.Size([1, 3, 50])
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.identity = ""  # tells these weights from others, where their file says so
        self.stream: Stream | None = None  # brings in layers from the disk; None: all are in memory
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.d_model)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Normal(0.02); the last matrix of each branch is smaller by sqrt(2 * layers), as in GPT-2."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        scale = 0.02 / math.sqrt(2 * self.config.n_layers)
        if isinstance(module, Attention):
            nn.init.normal_(module.out.weight, std=scale)
        if isinstance(module, MLP):
            nn.init.normal_(module.down.weight, std=scale)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            tokens, positions: (B, T) int64; positions may be (1, T).
            bias: (B or 1, 1, T, S) from ``attention_bias``; None lets every token look at every token.
            cache: keys and values of earlier tokens, extended by these ones.
            record: filled with hidden states and attention maps (slower: the weights are materialised).

        Returns:
            (B, T, D) after the final norm.
        """
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        for i, layer in enumerate(self.layers if self.stream is None else self.stream.walk(self.layers)):
            x = layer(x, bias, i, cache, record)
            if record is not None:
                record.hidden.append(x)
        if cache is not None and cache.place is None:
            cache.length += tokens.shape[1]
        return self.final_norm(x)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for so many rows and tokens, on this model's device and in its number format."""
        table, n_heads = self.token_embedding.weight, cast(Block, self.layers[0]).attention.n_heads
        return KVCache(self.config, batch, max_len, table.device, table.dtype, n_heads)

    def stream_layers(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        """From now on read the layers from their file when their turn comes; see ``Stream``."""
        self.stream = Stream([[layer] for layer in self.layers], device, dtype)

    def logits(self, hidden: Tensor, n_rows: int | None = None) -> Tensor:
        """Scores of the next token: (..., D) -> (..., V), or only the first ``n_rows`` rows of the table."""
        return F.linear(hidden, self.token_embedding.weight[:n_rows])
