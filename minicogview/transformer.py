"""The transformer of CogView2: sandwich LayerNorm, optional PB-relax, and a preallocated KV cache.

The idea: each token is a vector, its *residual stream*, and every layer adds two *branches* to it: attention, where
tokens look at each other, and an MLP, where each token is alone. Sandwich LayerNorm normalises a branch twice, before
it (as pre-LN does) and after it, so that no branch can add large values to the stream and half precision does not
overflow. CogView (Ding et al. 2021, arXiv 2105.13290, section 2.4) introduced it together with PB-relax, which keeps
the attention scores small for the same reason. CogView2 (arXiv 2204.14217) reuses the block unchanged.

Mirrors: SwissArmyTransformer 0.2.1, ``model/transformer.py`` with ``layernorm_order="sandwich"``.

Shapes: ``B`` batch, ``T`` query tokens, ``S`` key tokens (cached ones included), ``D`` model width, ``N`` heads,
``H`` head size, ``L`` layers, ``V`` vocabulary size.

Different on purpose: the KV cache is allocated once and written in place; the original concatenates a new one at each
token. Not in the original: RMSNorm instead of LayerNorm (``norm_kind="rms"``), the first change that later models made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicogview.attention import attend, attention_weights, weighted_values
from minicogview.config import NormKind, NormOrder, TransformerConfig
from minicogview.errors import MiniCogViewError

NORMS: dict[NormKind, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class KVCache:
    """Keys and values of earlier tokens: they never change, so each is computed once and kept.

    Memory for the longest sequence is allocated at the start and filled from the left.

    Args:
        config: the transformer's sizes.
        batch: number of rows that are generated side by side.
        max_len: the most tokens that a row will ever hold.
        n_heads: number of heads stored here; None: all. The others may be on other devices (``scale/parallel.py``).
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
        self.k, self.v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))  # (L, B, N, S, H)
        self.length = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``k, v`` (B or 1, N, T, H) of ``T`` new tokens; return all keys and values so far, (B or 1, N, S, H).

        A batch of one is shared by all rows, which is how one prompt serves many pictures.
        """
        end = self.length + k.shape[2]
        if end > self.k.shape[3]:
            raise MiniCogViewError(f"KV cache holds {self.k.shape[3]} tokens, {end} were given: allocate a longer one")
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        rows = k.shape[0]
        return self.k[layer, :rows, :, :end], self.v[layer, :rows, :, :end]

    def advance(self, n_tokens: int) -> None:
        """Move on after ``n_tokens`` have gone through all layers: the next tokens are stored behind them."""
        self.length += n_tokens


@dataclass
class Record:
    """A look inside: pass an empty one to ``Transformer.forward``, which fills it."""

    hidden: list[Tensor] = field(default_factory=list)  # residual stream after each layer, (B, T, D)
    maps: list[Tensor] = field(default_factory=list)  # attention weights of each layer, (B, N, T, S)


class Attention(nn.Module):
    """Multi-head self-attention: one matrix projects x to [q | k | v], another mixes the heads' outputs."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.n_heads, self.pb_relax = config.n_heads, config.pb_relax
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, x: Tensor, bias: Tensor | None, layer: int, cache: KVCache | None, record: Record | None
    ) -> Tensor:
        # b t (three n h) -> three b n t h; einops would take 5 % of the time of drawing, here and below
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.update(layer, k, v)  # (B, N, S, H)
        if record is None:
            y = attend(q, k, v, bias, self.pb_relax)
        else:  # the fused operator inside attend() never returns the weights
            weights = attention_weights(q, k, bias, self.pb_relax)
            record.maps.append(weights)
            y = weighted_values(weights, v)
        return self.out(y.transpose(1, 2).flatten(2))  # b n t h -> b t (n h)


class MLP(nn.Module):
    """Two linear layers, to four times the width and back, around a GELU in its tanh approximation."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, 4 * config.d_model)
        self.down = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: two branches, each added to the residual stream x. ``config.norm`` says where the norms (LN) stand:

    sandwich  x + LN(Attn(LN(x)))      pre  x + Attn(LN(x))      post  LN(x + Attn(x))
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        for name, chosen, known in (
            ("norm", config.norm, get_args(NormOrder)),
            ("norm_kind", config.norm_kind, get_args(NormKind)),
        ):
            if chosen not in known:
                raise MiniCogViewError(f"unknown {name} {chosen!r}: choose one of {', '.join(known)}")
        self.norm_order = config.norm
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.attention_norm = make_norm(config)  # before the branch; in post-LN, after the sum
        self.mlp_norm = make_norm(config)
        if config.norm == "sandwich":
            self.attention_out_norm = make_norm(config)
            self.mlp_out_norm = make_norm(config)

    def forward(
        self, x: Tensor, bias: Tensor | None, layer: int, cache: KVCache | None, record: Record | None
    ) -> Tensor:
        return self.finish(x, self.attention(self.prepare(x), bias, layer, cache, record))

    # A layer is split around attention because super-resolution puts an attention of its own between the halves.

    def prepare(self, x: Tensor) -> Tensor:
        """The input of attention (B, T, D), from the residual stream x (B, T, D)."""
        return x if self.norm_order == "post" else self.attention_norm(x)

    def finish(self, x: Tensor, branch: Tensor) -> Tensor:
        """Add attention's output ``branch`` to x, then the MLP's: the residual stream (B, T, D) after this layer."""
        if self.norm_order == "post":
            x = self.attention_norm(x + branch)
            return self.mlp_norm(x + self.mlp(x))
        sandwich = self.norm_order == "sandwich"
        x = x + (self.attention_out_norm(branch) if sandwich else branch)
        branch = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_out_norm(branch) if sandwich else branch)


def make_norm(config: TransformerConfig) -> nn.Module:
    """A norm over the model width: LayerNorm, or RMSNorm, which neither subtracts the mean nor adds a bias."""
    return NORMS[config.norm_kind](config.d_model, eps=1e-5)


class Transformer(nn.Module):
    """Token and position embeddings, the layers, and a final norm; the token embedding is the output matrix too.

    Example:
        >>> model = Transformer(TransformerConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=50))
        >>> hidden = model(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]))
        >>> model.logits(hidden).shape
        torch.Size([1, 3, 50])
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.walk: Callable[[Iterable[Any]], Iterable[Any]] = iter  # visits the layers; scale/streaming.py sets it
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_positions, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Draw initial weights as GPT-2 does: normal with standard deviation 0.02; biases are 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        scale = 0.02 / math.sqrt(2 * self.config.n_layers)  # smaller where a branch ends: 2 * layers of them are summed
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
        """Run the layers: hidden states, from each of which ``logits`` predicts the token after it.

        Args:
            tokens, positions: (B, T) int64; positions may be (1, T).
            bias: (B or 1, 1, T, S) from ``attention_bias``; None lets every token look at every token.
            cache: keys and values of earlier tokens; those of ``tokens`` are added to it.
            record: filled with hidden states and attention weights (slower: the weights are materialised).

        Returns:
            (B, T, D) after the final norm.
        """
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        for i, layer in enumerate(self.walk(self.layers)):
            x = layer(x, bias, i, cache, record)
            if record is not None:
                record.hidden.append(x)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.final_norm(x)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``max_len`` tokens, with this model's device and number format."""
        like, n_heads = cast(Tensor, self.final_norm.weight), cast(Block, self.layers[0]).attention.n_heads
        return KVCache(self.config, batch, max_len, like.device, like.dtype, n_heads)

    def logits(self, hidden: Tensor, n_rows: int | None = None) -> Tensor:
        """Scores of every possible next token: (..., D) -> (..., V), or of only the first ``n_rows`` token ids."""
        return F.linear(hidden, self.token_embedding.weight[:n_rows])
