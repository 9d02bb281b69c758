"""Drawing on a CPU: what each way of making a step fast gains over a preallocated float32 cache.

* "cache": keys and values in a preallocated cache, products by ``F.linear``; ratios are to this one;
* "packed": the same with packed matrices, what ``CogLM.generate`` chooses by itself (``scale/packing.py``);
* "compiled": fixed steps (``scale/graphs.py``) through torch.compile with frozen weights; needs a C++ compiler.

Two models: "small", 6 layers of width 256 that draw 400 tokens of 1,024 codes, with random weights; and "toy", the
shipped 5 layers of width 256 that draw 64. Steps alone are timed, tokens are chosen greedily, on one thread; CPU
seconds, alternated, medians.

    python benchmarks/fast_decode.py [--batches 1 4 16] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor

from minicogview.attention import attention_bias
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, TransformerConfig
from minicogview.pipeline import CogView2
from minicogview.scale.graphs import FixedStep
from minicogview.scale.packing import packed

N_TEXT = 8


class Steps:
    """All steps of one picture, greedily, by one of the ways."""

    def __init__(self, model: CogLM, batch: int, way: str):
        self.model, self.batch, self.way = model, batch, way
        layout = model.config.layout
        self.length = N_TEXT + 1 + layout.n_image
        after = torch.arange(layout.max_text, layout.max_text + self.length - N_TEXT)
        self.positions = torch.cat([torch.arange(N_TEXT), after])[None]
        self.bias = attention_bias(torch.ones(self.length, self.length).tril())
        prompt = torch.arange(N_TEXT) + model.config.n_codes + 100
        self.prompt = torch.cat([prompt, torch.tensor([model.config.ids.boi])]).expand(batch, -1)
        self.fixed: FixedStep | None = None
        if way == "compiled":
            cache = self.read_prompt()[1]
            self.fixed = FixedStep(model.transformer, cache, self.bias)
            # Compiled code copies all of a tensor that is changed through a view: so each layer has one of its own.
            cache.k, cache.v = ([layer.clone() for layer in part] for part in (cache.k, cache.v))
            self.fixed._run = torch.compile(self.fixed._run, dynamic=False)  # type: ignore[method-assign]

    def read_prompt(self) -> tuple[Tensor, Any]:
        """Hidden states behind the prompt, and the cache."""
        cache, n = self.model.transformer.new_cache(self.batch, self.length - 1), N_TEXT + 1
        hidden = self.model.transformer(self.prompt, self.positions[:, :n], self.bias[:, :, :n, :n], cache)
        return hidden[:, -1], cache

    def __call__(self) -> tuple[float, Tensor]:
        """CPU seconds, and the tokens."""
        transformer, tokens = self.model.transformer, []
        with ExitStack() as stack:
            if self.way == "packed":  # as ``CogLM.fill`` does
                stack.enter_context(packed(transformer, self.batch))
                stack.enter_context(torch.inference_mode())
            hidden, cache = self.read_prompt()
            if self.fixed is not None:
                for ours, theirs in zip([*self.fixed.cache.k, *self.fixed.cache.v], [*cache.k, *cache.v], strict=True):
                    ours[:, :, : N_TEXT + 1] = theirs[:, :, : N_TEXT + 1]
            head = self.model._head(self.batch) if self.way == "packed" else None
            start = time.process_time()
            for i in range(N_TEXT + 1, self.length):
                logits = head(hidden) if head else transformer.logits(hidden, self.model.config.n_codes)
                tokens.append(logits.argmax(-1))
                if i == self.length - 1:
                    break
                token, position = tokens[-1][:, None], self.positions[:, i : i + 1]
                if self.fixed is not None:
                    hidden = self.fixed(token, position, i)
                else:
                    hidden = transformer(token, position, None, cache)[:, -1]
            return time.process_time() - start, torch.stack(tokens, dim=1)


@torch.no_grad()
def measure(model: CogLM, batch: int, rounds: int) -> dict[str, float]:
    """Tokens per CPU second of each way, and its ratio to the cache alone."""
    ways = ["cache", "packed", *(["compiled"] if shutil.which("g++") or shutil.which("clang++") else [])]
    steps: dict[str, Callable[[], tuple[float, Tensor]]] = {way: Steps(model, batch, way) for way in ways}
    expected = steps["cache"]()[1]
    for way in ways:
        agree = float((steps[way]()[1] == expected).float().mean())
        assert agree > 0.9, f"{way} draws other tokens: {agree}"
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            times[way].append(steps[way]()[0])
    seconds = {way: statistics.median(t) for way, t in times.items()}
    row: dict[str, float] = {"batch": batch}
    for way in ways:
        row[f"{way}_tokens_per_s"] = round(batch * model.config.layout.n_image / seconds[way])
        row[f"{way}_ratio"] = round(seconds["cache"] / seconds[way], 2)
    return row


def small() -> CogLM:
    """6 layers, width 256, 8 heads, random weights that a half-precision file could hold."""
    torch.manual_seed(0)
    n_codes, vocab = 1024, 1536
    sizes = TransformerConfig(n_layers=6, d_model=256, n_heads=8, vocab_size=vocab)
    ids = SpecialIds(pad=vocab - 1, boi=vocab - 2, boe=vocab - 3, boc=vocab - 4)
    return CogLM(CogLMConfig(sizes, LayoutConfig(), ids, n_codes)).eval().half().float()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="what each way of making a step fast gains on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    inductor.freezing = True
    models, rows = {"small": small(), "toy": CogView2.from_pretrained("toy").coglm}, []
    for name, model in models.items():
        for batch in options.batches:
            torch._dynamo.reset()
            rows.append({"model": name, **measure(model, batch, options.rounds)})
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.json:
        facts = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine()}
        options.json.write_text(json.dumps({**facts, "cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
