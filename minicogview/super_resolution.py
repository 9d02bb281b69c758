"""Direct super-resolution: three times as many tokens along each side, all of them predicted in one forward pass.

The idea: the model holds two levels of tokens. The *low* level is the text and the coarse picture; the *fine* level is
the finer grid to be predicted, whose tokens all start as <start_of_image>. A fine token looks at the coarse tokens
around its place and at the fine tokens around itself, under one softmax (``local_attention.py``). After the last layer,
each fine token predicts its own code. Neighbours do not know each other's choice; making them agree is the task of the
iterative stage (``lopar.py``). CogView2 (arXiv 2204.14217), section 3.3.

Mirrors: ``sr_pipeline/dsr_model.py`` and ``dsr_sampling.py`` of the official code. It stands on CogLM, whose weights
stay frozen; only the fine level's attention weights and positions are new. Both levels share norms, MLPs and the token
embedding. With ``own_layers``, which the toy has but the original does not, the fine level has its own norms and MLPs.

Shapes: ``B`` rows, ``L`` low slots (text slots + ``n`` coarse tokens), ``F`` fine tokens, ``D`` width, ``N`` heads,
``H`` head size, ``P`` positions of CogLM, ``V`` picture codes.

Different on purpose: the original shifts the fine tokens by one place and then drops one, which cancels out; here each
slot predicts its own token. A text that is too long for its slots is cut; in the original it fails later. A fine token
may start as the one that bicubic enlargement puts there, from which a small model learns far sooner (``fine_start``;
docs/notes.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from minicogview.attention import attend, attention_bias
from minicogview.config import FineStart, LayoutConfig, SuperResolutionConfig
from minicogview.errors import MiniCogViewError
from minicogview.local_attention import Impl, local_attention
from minicogview.transformer import Attention, Block, Record, Transformer
from minicogview.vqvae import VQVAE
from minicogview.windows import Coarse

CellSampler = Callable[[Tensor, Tensor], Tensor]  # (logits (B, S, V), cells (S,)) -> (B, S) codes
Attend = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]  # (layer, low, fine) -> attention's output for each
Walk = Callable[[Iterable[Any]], Iterable[Any]]  # visits the layers; ``iter``, or a stream that reads them from disk


# --- what both super-resolution stages share ---------------------------------------------------------------------


class Slots(NamedTuple):
    """Texts of several lengths as tensors of one shape, (B, n_slots)."""

    tokens: Tensor  # id 0 where there is no text
    positions: Tensor  # counted from a text's first token
    real: Tensor  # bool: slots that hold text


def text_slots(texts: Sequence[Sequence[int]] | Slots, n_slots: int) -> Slots:
    """The first ``n_slots`` tokens of each text, moved to the right end of their slots; slots are returned as they are.

    Training gives slots to a model, not texts: ``torch.compile`` would compile it again for each batch's Python lists.
    """
    if isinstance(texts, Slots):
        return texts
    tokens = torch.zeros(len(texts), n_slots, dtype=torch.long)
    positions, real = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row, text in enumerate(texts):
        first = n_slots - min(len(text), n_slots)
        tokens[row, first:] = torch.tensor(text[:n_slots], dtype=torch.long)
        positions[row, first:] = torch.arange(n_slots - first)
        real[row, first:] = True
    return Slots(tokens, positions, real)


def enlarge(coarse: Tensor, grid: int, factor: int) -> Tensor:
    """Repeat every coarse cell as a block of ``factor`` x ``factor`` fine cells: (B, n, ...) -> (B, F, ...)."""
    return repeat(coarse, "b (h w) ... -> b (h a w c) ...", h=grid, a=factor, c=factor)


def start_positions(table: Tensor, layout: LayoutConfig, factor: int, start: FineStart = "tiled") -> Tensor:
    """Position embeddings (F, D) of the fine cells before training, from CogLM's ``table`` (P, D).

    "enlarged": every fine cell starts with the position of the coarse cell that covers it. "tiled": the coarse grid is
    repeated side by side instead of enlarged, and it begins at the row of <start_of_image>, one row before the
    picture's first. These are two accidents of the original, whose released weights were trained from this start.
    """
    if start == "enlarged":
        return enlarge(table[None, layout.max_text + 1 :][:, : layout.n_image], layout.grid, factor)[0]
    tile = table[layout.max_text : layout.max_text + layout.n_image]  # (n, D)
    return repeat(tile, "(h w) d -> (a h b w) d", h=layout.grid, a=factor, b=factor)


def two_levels(config: SuperResolutionConfig, base: Transformer | None) -> tuple[Transformer, nn.Embedding]:
    """The parts of both stages: a transformer to build on (a new one if ``base`` is None), and fine positions."""
    base = Transformer(config.coglm.transformer) if base is None else base
    positions = nn.Embedding(config.fine_grid[0] * config.fine_grid[1], config.coglm.transformer.d_model)
    if not positions.weight.is_meta:  # on the meta device there are no numbers: weights are loaded from a file later
        start = start_positions(base.position_embedding.weight, config.coglm.layout, config.factor, config.fine_start)
        with torch.no_grad():
            positions.weight.copy_(start)
    return base, positions


@torch.no_grad()
def enlarged_codes(vqvae: VQVAE, coarse: Tensor, config: SuperResolutionConfig, level: int) -> Tensor:
    """Codes (B, F) to start from: the coarse picture (B, n) decoded, enlarged bicubically and encoded again."""
    codes = []
    for picture in rearrange(coarse, "b (h w) -> b 1 h w", h=config.coglm.layout.grid):
        # One by one: convolutions round differently in a batch, and a picture must not depend on its neighbours.
        small = vqvae.decode(picture, level).clamp(0, 1)
        large = F.interpolate(small, scale_factor=config.factor, mode="bicubic").clamp(0, 1)
        codes.append(vqvae.encode(large, level).flatten(1))
    return torch.cat(codes)


def split_heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v, each (B, T, N, H), as views of a joint projection (B, T, 3 * D)."""
    q, k, v = qkv.unflatten(-1, (3, n_heads, -1)).unbind(2)
    return q, k, v


def attend_everywhere(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Ordinary attention for q, k, v of shape (B, T, N, H), where tokens come before heads; returns (B, T, N, H)."""
    q, k, v = (rearrange(t, "b t n h -> b n t h") for t in (q, k, v))
    return rearrange(attend(q, k, v, bias), "b n t h -> b t n h")


def attentions(layers: nn.ModuleList) -> list[Attention]:
    """The attention module of each layer."""
    return [cast(Block, layer).attention for layer in layers]


def run_levels(
    base: Transformer,
    low: Tensor,
    fine: Tensor,
    attention: Attend,
    record: Record | None = None,
    fine_layers: nn.ModuleList | None = None,
    walk: Walk = iter,
) -> tuple[Tensor, Tensor]:
    """Run the layers of ``base`` on two streams, (B, L, D) and (B, F, D), which meet only in attention.

    If ``fine_layers`` are given, the fine stream uses their norms and MLPs. Both streams share the final norm.
    """
    pairs = list(zip(cast(list[Block], base.layers), cast(list[Block], fine_layers or base.layers), strict=True))
    for i, (layer, fine_layer) in enumerate(walk(pairs)):
        to_low, to_fine = attention(i, layer.prepare(low), fine_layer.prepare(fine))
        low, fine = layer.finish(low, to_low), fine_layer.finish(fine, to_fine)
        if record is not None:
            record.hidden.append(torch.cat([low, fine], dim=1))
    return base.final_norm(low), base.final_norm(fine)


def choose_codes(
    base: Transformer, hidden: Tensor, cells: Tensor, n_codes: int, sampler: CellSampler, chunk: int = 512
) -> Tensor:
    """Sample a code for each of the given cells (S,) from hidden states (B, F, D): codes (B, S).

    Cells are sampled a chunk at a time: all logits of four pictures of the released model would be 4 x 3600 x 20000
    floats, over a gigabyte. ``chunk`` counts the cells of all pictures together.
    """
    parts = cells.split(max(1, chunk // len(hidden)))
    return torch.cat([sampler(base.logits(hidden[:, part], n_codes).float(), part) for part in parts], dim=1)


def check_codes(codes: Tensor, n_cells: int, n_codes: int, what: str) -> None:
    """Raise MiniCogViewError unless ``codes`` is (B, n_cells) with values from 0 to n_codes - 1."""
    compiled = torch.compiler.is_compiling()  # a compiled graph cannot read numbers
    in_range = compiled or codes.numel() == 0 or bool(codes.min() >= 0 and codes.max() < n_codes)
    if codes.ndim != 2 or codes.shape[1] != n_cells or not in_range:
        raise MiniCogViewError(
            f"{what} codes of shape {tuple(codes.shape)}: expected (pictures, {n_cells}) with values 0..{n_codes - 1}"
        )


# --- direct super-resolution -------------------------------------------------------------------------------------


def low_mask(real: Tensor, n_coarse: int) -> Tensor:
    """Which low tokens may look at which: (B, L, L) bool, from the text slots in use, ``real`` (B, n_text).

    Text does not see the picture, and neither sees empty slots. Everything else is in view: the mask is not causal.
    """
    n_text = real.shape[1]
    in_use = F.pad(real, (0, n_coarse), value=True)  # (B, L)
    mask = in_use[:, None, :] | ~in_use[:, :, None]
    mask[:, :n_text, n_text:] = False
    return mask


def direct_attention(
    low: tuple[Tensor, Tensor, Tensor],
    fine: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
    config: SuperResolutionConfig,
    coarse_bias: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one layer on both levels.

    Args:
        low: q, k, v (B, L, N, H), text slots first. fine: q, k, v (B, F, N, H).
        bias: (B or 1, 1, L, L) from ``attention_bias``, for the low level.
        coarse_bias: added to the scores of the coarse keys; above 0, fine tokens look more at the coarse picture.

    Returns:
        (B, L, N, H) and (B, F, N, H).
    """
    grid, n = config.coglm.layout.grid, config.coglm.layout.n_image
    coarse = Coarse(low[1][:, -n:], low[2][:, -n:], (grid, grid), config.coarse_window, coarse_bias)
    fine_out = local_attention(*fine, config.fine_grid, config.window, coarse=coarse, impl=impl)
    return attend_everywhere(*low, bias), fine_out


class DirectSR(nn.Module):
    """The direct stage: CogLM's transformer with a second, fine level of tokens.

    Args:
        config: sizes.
        base: CogLM's transformer, shared and not copied; None makes a new one.
    """

    def __init__(self, config: SuperResolutionConfig, base: Transformer | None = None):
        super().__init__()
        self.config, sizes = config, config.coglm.transformer
        self.base, self.fine_position = two_levels(config, base)
        self.walk: Walk = iter
        if config.own_layers:
            self.fine_layers = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layers))
        else:
            self.fine_attention = nn.ModuleList(Attention(sizes) for _ in range(sizes.n_layers))
        if not self.fine_position.weight.is_meta:
            self.start_from_base()

    @torch.no_grad()
    def start_from_base(self) -> None:
        """Initialise the fine level from the base: copy its layers or, without own layers, their attention weights."""
        if self.config.own_layers:
            self.fine_layers.load_state_dict(self.base.layers.state_dict())
        else:
            for own, attention in zip(self.fine_attention, attentions(self.base.layers), strict=True):
                own.load_state_dict(attention.state_dict())

    def forward(
        self,
        texts: Sequence[Sequence[int]] | Slots,
        coarse: Tensor,
        start: Tensor | None = None,
        record: Record | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of both levels after the final norm: (B, L, D) and (B, F, D).

        Args:
            texts: token ids of each text, without start tokens, or ``text_slots`` of them. coarse: (B, n) codes.
            start: (B, F) from ``enlarged_codes``, for models with ``fine_start="enlarged"``.
            record: filled with the hidden states of both levels, (B, L + F, D) after each layer.

        Raises:
            MiniCogViewError: if ``coarse`` or ``start`` has another shape, or holds codes outside the codebook.
        """
        config, layout, base = self.config, self.config.coglm.layout, self.base
        check_codes(coarse, layout.n_image, config.coglm.n_codes, "coarse")
        device = base.token_embedding.weight.device
        tokens, positions, real = (t.to(device) for t in text_slots(texts, config.n_text))
        places = torch.arange(layout.n_image, device=device).expand(len(coarse), -1) + layout.max_text + 1
        low = base.token_embedding(torch.cat([tokens, coarse.to(device)], 1))
        low = low + base.position_embedding(torch.cat([positions, places], 1))  # (B, L, D)
        cells = self.start_cells(coarse, start).to(device)  # (B, F)
        fine = base.token_embedding(cells) + self.fine_position.weight  # (B, F, D)
        bias = attention_bias(low_mask(real, layout.n_image))
        of_low = attentions(base.layers)
        fine_layers = self.fine_layers if config.own_layers else None
        of_fine = cast(list[Attention], self.fine_attention) if fine_layers is None else attentions(fine_layers)

        def attention(i: int, low: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
            ours, own = of_low[i], of_fine[i]
            low_qkv, fine_qkv = split_heads(ours.qkv(low), ours.n_heads), split_heads(own.qkv(fine), own.n_heads)
            low, fine = direct_attention(low_qkv, fine_qkv, bias, config)
            return ours.out(low.flatten(2)), own.out(fine.flatten(2))

        return run_levels(base, low, fine, attention, record, fine_layers, self.walk)

    def start_cells(self, coarse: Tensor, start: Tensor | None) -> Tensor:
        """The ids (B, F) that fine tokens start as, according to ``config.fine_start``."""
        config, n_cells = self.config, len(self.fine_position.weight)
        if config.fine_start == "tiled":
            return torch.full((len(coarse), n_cells), config.coglm.ids.boi)
        if start is None:
            raise MiniCogViewError("this model starts from the enlarged picture: give start=enlarged_codes(...)")
        check_codes(start, n_cells, config.coglm.n_codes, "start")
        return start

    @torch.no_grad()
    def upsample(
        self, texts: Sequence[Sequence[int]], coarse: Tensor, sampler: CellSampler, start: Tensor | None = None
    ) -> Tensor:
        """Fine codes (B, F) in raster order for coarse codes (B, n): one pass, then every cell is sampled by itself."""
        _, fine = self(texts, coarse, start)
        cells = torch.arange(fine.shape[1], device=fine.device)
        return choose_codes(self.base, fine, cells, self.config.coglm.n_codes, sampler)
