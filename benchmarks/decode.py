"""Drawing a picture token by token: how much faster this package is than the original, measured in one run.

The original's method is reimplemented below from the official CogView2 scripts and SwissArmyTransformer 0.2.1.
At every step

* each layer concatenates its old keys and values with the new ones, and after the last layer, the keys and values of
  all layers are concatenated once more into a single tensor: the whole cache is copied twice;
* masks and attention weights of the whole sequence are cut to the current row, and every layer searches this row for a
  forbidden column;
* tokens are sampled in a Python loop over the batch: for each row, one of the 16 likeliest of 500 clusters is drawn, a
  boolean mask forbids all tokens outside this cluster, a softmax and a second draw over all tokens follow, and the new
  column is concatenated with all tokens so far.

Both sides use the same weights, clusters and settings, restrict the output layer to the picture codes, and run in
float32 on one thread. They are timed in turn, so that a busy machine slows down both. Parts of the original are left
out, in its favour: its hooks and its wrappers for several GPUs cost Python time in every layer.

    python benchmarks/decode.py                    prints the table
    python benchmarks/decode.py --json FILE        also writes it to a file
    python benchmarks/decode.py --full             with weights that use all bits of float32, see make_model
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicogview.clusters import Clusters
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SamplingConfig, SpecialIds, TransformerConfig
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps
from minicogview.scale.packing import packed
from minicogview.transformer import MLP, Attention, Transformer

Choose = Callable[[Tensor], Tensor]  # logits (B, codes) -> (B,) tokens
N_TEXT, N_CODES, VOCAB = 20, 20000, 20480
TEXT = list(range(N_CODES, N_CODES + N_TEXT))
SETTINGS = SamplingConfig(temperature=1.0, top_k=16, n_clusters=500, text_weight=1.4)


def make_model(full: bool = False) -> CogLM:
    """A model of 6 layers, width 256, 8 heads and vocabulary size 20480, with random float32 weights.

    The weights are rounded to half precision, in which the original's and this package's own weights are stored. With
    ``full`` they are not rounded, and each packed matrix needs two parts.
    """
    torch.manual_seed(0)
    transformer = TransformerConfig(n_layers=6, d_model=256, n_heads=8, vocab_size=VOCAB, max_positions=1024)
    ids = SpecialIds(pad=VOCAB - 1, boi=VOCAB - 2, boe=VOCAB - 3, boc=VOCAB - 4)
    model = CogLM(CogLMConfig(transformer, LayoutConfig(), ids, N_CODES)).eval()
    model.decoding = fast_steps  # as in ``CogView2``
    return model if full else model.half().float()


# --- the original's way -----------------------------------------------------------------------------------------


def attend_with_memory(
    attention: Attention, x: Tensor, mask: Tensor, log_weights: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One layer's attention from x (B, T, D) to ``memory`` (B or 1, S, 2D) and x; also x's own memory (B, T, 2D)."""
    n_heads = attention.n_heads
    q, k, v = (rearrange(t, "b t (n h) -> b n t h", n=n_heads) for t in attention.qkv(x).chunk(3, dim=-1))
    own = rearrange(torch.stack([k, v]), "two b n t h -> b t (two n h)")
    if memory is not None:
        old = rearrange(memory.expand(len(x), -1, -1), "b s (two n h) -> two b n s h", two=2, n=n_heads)
        k, v = torch.cat([old[0], k], dim=2), torch.cat([old[1], v], dim=2)
    scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
    scores += log_weights
    if not (mask.shape[-2] == 1 and bool((mask > 0).all())):
        scores = scores * mask - 10000.0 * (1.0 - mask)
    y = scores.softmax(-1) @ v
    return attention.out(rearrange(y, "b n t h -> b t (n h)")), own


def mlp_written_out(mlp: MLP, x: Tensor) -> Tensor:
    """Two linear layers around a GELU whose tanh approximation is computed step by step, as in the original."""
    x = mlp.up(x)
    return mlp.down(0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x))))


def forward_with_memory(
    model: Transformer, tokens: Tensor, positions: Tensor, mask: Tensor, log_weights: Tensor, memory: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden states (B, T, D), and keys and values of all layers (L, B, S + T, 2D), concatenated anew."""
    x = model.token_embedding(tokens) + model.position_embedding(positions)
    own_parts = []
    for i, layer in enumerate(model.layers):
        past = None if memory is None else memory[i]
        branch, own = attend_with_memory(layer.attention, layer.attention_norm(x), mask, log_weights, past)
        x = x + layer.attention_out_norm(branch)
        x = x + layer.mlp_out_norm(mlp_written_out(layer.mlp, layer.mlp_norm(x)))
        own_parts.append(own)
    joined = torch.stack(own_parts)
    if memory is not None:
        joined = torch.cat([memory.expand(-1, joined.shape[1], -1, -1), joined], dim=2)
    return model.final_norm(x), joined


def sample_row_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """Tokens (B,) by cluster sampling, in a Python loop over the batch."""
    logits = logits / SETTINGS.temperature
    probability = logits.softmax(-1)
    mass = torch.zeros(len(logits), SETTINGS.n_clusters).scatter_add_(1, labels.expand_as(probability), probability)
    mass, kept = mass.topk(SETTINGS.top_k)
    for i in range(len(logits)):
        cluster = kept[i][torch.multinomial(mass[i] / mass[i].sum(), 1)]
        logits[i, labels != cluster] = -65504.0
    return torch.multinomial((logits / SETTINGS.cluster_temperature).softmax(-1), 1)[:, 0]


@torch.no_grad()
def original_way(model: CogLM, choose: Choose, batch: int) -> Tensor:
    """Codes (B, 400), generated with the memory that is concatenated anew at every step."""
    transformer, layout = model.transformer, model.config.layout
    length = N_TEXT + 1 + layout.n_image
    after_text = torch.arange(layout.max_text, layout.max_text + length - N_TEXT)
    positions = torch.cat([torch.arange(N_TEXT), after_text])[None]
    mask = torch.ones(length, length).tril()
    mask[:, :N_TEXT] = 1
    log_weights = torch.zeros(length, length)
    log_weights[:, :N_TEXT] = SETTINGS.text_weight
    tokens, memory, begin = torch.tensor([[*TEXT, model.config.ids.boi]]), None, 0
    while tokens.shape[1] < length:
        end = tokens.shape[1]
        now, row = positions[:, begin:end], (slice(begin, end), slice(end))
        hidden, memory = forward_with_memory(transformer, tokens[:, begin:], now, mask[row], log_weights[row], memory)
        logits = F.linear(hidden, transformer.token_embedding.weight[:N_CODES])[:, -1].expand(batch, -1)
        tokens = torch.cat([tokens.expand(batch, -1), choose(logits)[:, None]], dim=1)
        begin = end
    return tokens[:, N_TEXT + 1 :]


# --- ours -------------------------------------------------------------------------------------------------------


def our_way(model: CogLM, clusters: Clusters, batch: int) -> Tensor:
    """Codes (B, 400) from ``CogLM.generate``, the function that the command line uses."""
    sampler = Sampler(range(batch), SETTINGS, clusters, model.config.layout.n_image)
    return model.generate([TEXT], sampler, n=batch, text_weight=SETTINGS.text_weight).tokens


# --- both -------------------------------------------------------------------------------------------------------


def largest_difference(model: CogLM) -> float:
    """Largest difference between both sides' logits when they are made to choose the same 2 x 400 random tokens."""
    script = torch.randint(N_CODES, (2, model.config.layout.n_image), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[Tensor]] = {"original": [], "ours": []}

    def follow(logits: Tensor, name: str) -> Tensor:
        seen[name].append(logits.expand(2, -1)[:, ::97].clone())
        return script[:, len(seen[name]) - 1]

    original = original_way(model, lambda logits: follow(logits, "original"), 2)
    ours = model.generate([TEXT], lambda logits, step: follow(logits, "ours"), 2, SETTINGS.text_weight).tokens
    assert torch.equal(original, script) and torch.equal(ours, script)
    return max(float((a - b).abs().max()) for a, b in zip(seen["original"], seen["ours"]))


def measure(model: CogLM, labels: Tensor, batch: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of both sides, timed in turn."""
    clusters, shape = Clusters.of(labels), (batch, model.config.layout.n_image)
    seconds: dict[str, list[float]] = {"original": [], "ours": []}
    for _ in range(rounds):
        for name, draw in (
            ("original", lambda: original_way(model, lambda logits: sample_row_by_row(logits, labels), batch)),
            ("ours", lambda: our_way(model, clusters, batch)),
        ):
            start = time.process_time()
            assert draw().shape == shape
            seconds[name].append(time.process_time() - start)
    original, ours = (statistics.median(seconds[name]) for name in ("original", "ours"))
    tokens = shape[0] * shape[1]
    return {
        "batch": batch,
        "original_s": round(original, 2),
        "ours_s": round(ours, 2),
        "ratio": round(original / ours, 2),
        "original_tokens_per_s": round(tokens / original),
        "ours_tokens_per_s": round(tokens / ours),
    }


def main() -> None:
    """Check that both sides agree, measure batches of 1, 8 and 32, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="weights that a half-precision file could not hold")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(args.full)
    start = time.process_time()
    with packed(model.transformer, rows=1):
        packing = round(time.process_time() - start, 2)
    difference = largest_difference(model)
    print(f"the logits of both sides differ by at most {difference:.0e}; packing the layers once took {packing} s")
    labels = torch.randint(SETTINGS.n_clusters, (N_CODES,), generator=torch.Generator().manual_seed(0))
    print("6 layers, width 256, 8 heads, 20 text and 400 picture tokens, one thread, CPU seconds, medians")
    print(f"{'batch':>5} {'original':>9} {'ours':>7} {'ratio':>6} {'original tok/s':>15} {'ours tok/s':>11}")
    rows = []
    for batch in args.batches:
        rows.append(row := measure(model, labels, batch, args.rounds))
        print(
            f"{row['batch']:>5} {row['original_s']:>9.2f} {row['ours_s']:>7.2f} {row['ratio']:>6.2f} "
            f"{row['original_tokens_per_s']:>15.0f} {row['ours_tokens_per_s']:>11.0f}",
            flush=True,
        )
    if args.json:
        facts = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "half_precision_weights": not args.full,
            "largest_difference_of_logits": difference,
            "packing_s": packing,
        }
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
