"""Drawing a picture token by token: this package against the original's way of doing it, in one run.

The original's way, written plainly below: every step joins the cache of each layer with the new keys and values
into a new tensor, multiplies the scores with a mask, and samples in a Python loop over the batch (softmax,
cluster sums, two draws per row). Both sides share the weights, the clusters and the settings, and are timed in
turn, so that a busy machine slows both.

    python benchmarks/decode.py                    prints the table
    python benchmarks/decode.py --json FILE        and writes it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SamplingConfig, SpecialIds, TransformerConfig
from minicogview.sampling import Clusters, Sampler
from minicogview.transformer import Transformer

N_TEXT, N_CODES, VOCAB = 20, 20000, 20480
SETTINGS = SamplingConfig(temperature=1.0, top_k=16, n_clusters=500, text_weight=1.4)


def make_model() -> CogLM:
    """6 layers, width 256, 8 heads, vocabulary 20480, random weights."""
    torch.manual_seed(0)
    transformer = TransformerConfig(n_layers=6, d_model=256, n_heads=8, vocab_size=VOCAB, max_positions=1024)
    ids = SpecialIds(pad=VOCAB - 1, boi=VOCAB - 2, boe=VOCAB - 3, boc=VOCAB - 4)
    return CogLM(CogLMConfig(transformer, LayoutConfig(), ids, N_CODES)).eval()


# --- the original's way -----------------------------------------------------------------------------------


def concatenating_step(
    model: Transformer, tokens: Tensor, positions: Tensor, mask: Tensor, log_weights: Tensor, mems: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One forward pass whose cache grows by ``torch.cat``: mems[layer] is (B, S, 2D), keys then values."""
    x = model.token_embedding(tokens) + model.position_embedding(positions)
    new_mems = []
    for i, layer in enumerate(model.layers):
        normed = layer.attention_norm(x)
        q, k, v = layer.attention.qkv(normed).chunk(3, dim=-1)  # (B, T, D)
        kv = torch.cat([k, v], dim=-1)
        kv = torch.cat([mems[i].expand(len(kv), -1, -1), kv], dim=1) if mems else kv
        new_mems.append(kv)
        k, v = kv.chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b t (n h) -> b n t h", n=layer.attention.n_heads) for t in (q, k, v))
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2) + log_weights
        scores = scores * mask - 10000.0 * (1.0 - mask)
        y = rearrange(scores.softmax(-1) @ v, "b n t h -> b t (n h)")
        x = x + layer.attention_out_norm(layer.attention.out(y))
        x = x + layer.mlp_out_norm(layer.mlp(layer.mlp_norm(x)))
    return model.final_norm(x), new_mems


def sample_row_by_row(logits: Tensor, labels: Tensor) -> Tensor:
    """Cluster sampling in a Python loop over the batch."""
    choices = []
    for row in logits:
        p = F.softmax(row / SETTINGS.temperature, dim=-1)
        mass = torch.zeros(SETTINGS.n_clusters).scatter_add_(0, labels, p)
        kept, clusters = mass.topk(SETTINGS.top_k)
        cluster = clusters[torch.multinomial(kept / kept.sum(), 1)]
        inside = torch.where(labels == cluster, row / SETTINGS.temperature / SETTINGS.cluster_temperature, -65504.0)
        choices.append(torch.multinomial(F.softmax(inside, dim=-1), 1))
    return torch.cat(choices)


@torch.inference_mode()
def original_way(model: CogLM, text: list[int], labels: Tensor, batch: int) -> Tensor:
    """(B, 400) codes drawn with the growing cache; the whole mask is kept and sliced, as there."""
    layout, t = model.config.layout, model.transformer
    length = len(text) + 1 + layout.n_image
    positions = torch.cat([torch.arange(len(text)), torch.arange(layout.max_text, layout.max_text + length - len(text))])
    mask = torch.ones(1, 1, length, length).tril()
    mask[..., : len(text)] = 1
    log_weights = torch.zeros(length)
    log_weights[: len(text)] = SETTINGS.text_weight
    tokens = torch.tensor([[*text, model.config.ids.boi]])
    mems: list[Tensor] = []
    begin = 0
    while True:
        end = tokens.shape[1]
        hidden, mems = concatenating_step(
            t, tokens[:, begin:], positions[None, begin:end], mask[..., begin:end, :end], log_weights[:end], mems
        )
        logits = F.linear(hidden[:, -1], t.token_embedding.weight[:N_CODES]).expand(batch, -1)
        tokens = torch.cat([tokens.expand(batch, -1), sample_row_by_row(logits, labels)[:, None]], dim=1)
        begin = end
        if tokens.shape[1] == length:
            return tokens[:, len(text) + 1 :]


# --- ours ---------------------------------------------------------------------------------------------------


def our_way(model: CogLM, text: list[int], clusters: Clusters, batch: int) -> Tensor:
    """(B, 400) codes from ``CogLM.generate``, the function that the command line calls."""
    sampler = Sampler(range(batch), SETTINGS, clusters, model.config.layout.n_image)
    return model.generate([text], sampler, n=batch, text_weight=SETTINGS.text_weight).tokens


def measure(model: CogLM, labels: Tensor, batch: int, rounds: int) -> dict[str, float]:
    """Median CPU seconds of both ways, alternated."""
    text, clusters = list(range(N_CODES, N_CODES + N_TEXT)), Clusters.of(labels)
    seconds: dict[str, list[float]] = {"original": [], "ours": []}
    for _ in range(rounds):
        for name, draw in (
            ("original", lambda: original_way(model, text, labels, batch)),
            ("ours", lambda: our_way(model, text, clusters, batch)),
        ):
            start = time.process_time()
            assert draw().shape == (batch, model.config.layout.n_image)
            seconds[name].append(time.process_time() - start)
    original, ours = (sorted(seconds[name])[rounds // 2] for name in ("original", "ours"))
    tokens = batch * model.config.layout.n_image
    return {
        "batch": batch,
        "original_s": round(original, 2),
        "ours_s": round(ours, 2),
        "ratio": round(original / ours, 2),
        "original_tokens_per_s": round(tokens / original),
        "ours_tokens_per_s": round(tokens / ours),
    }


def main() -> None:
    """Measure batch 1, 8 and 32 and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    labels = torch.randint(SETTINGS.n_clusters, (N_CODES,), generator=torch.Generator().manual_seed(0))
    print("6 layers, width 256, 8 heads, 20 text and 400 picture tokens, one thread, CPU seconds, medians")
    print(f"{'batch':>5} {'original':>9} {'ours':>7} {'ratio':>6} {'original tok/s':>15} {'ours tok/s':>11}")
    rows = []
    for batch in args.batches:
        row = measure(model, labels, batch, args.rounds)
        rows.append(row)
        print(
            f"{row['batch']:>5} {row['original_s']:>9.2f} {row['ours_s']:>7.2f} {row['ratio']:>6.2f} "
            f"{row['original_tokens_per_s']:>15.0f} {row['ours_tokens_per_s']:>11.0f}",
            flush=True,
        )
    if args.json:
        where = {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"date": date.today().isoformat(), **where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
