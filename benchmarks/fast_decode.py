"""Drawing on a CPU: how much faster each method makes a step, compared with a plain preallocated float32 cache.

* "cache": keys and values in a preallocated cache, products by ``F.linear``; the ratios are relative to this method;
* "packed": the same with packed matrices, which the package uses on a CPU by default (``scale/packing.py``);
* "compiled": fixed steps (``scale/graphs.py``) under torch.compile with frozen weights; needs a C++ compiler.

There are two models: "small" has 6 layers of width 256 with random weights, and draws 400 tokens out of 1,024 codes;
"toy" is the shipped model of 5 layers of width 256, and draws 64 tokens. Only the steps are timed, on one thread, and
tokens are chosen greedily. The numbers are medians of CPU seconds; the methods are timed in turn.

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

from minicogview.attention import MASKED, attention_bias
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, TransformerConfig
from minicogview.pipeline import CogView2
from minicogview.scale.fast_steps import packed_head
from minicogview.scale.graphs import FixedStep
from minicogview.scale.packing import packed
from minicogview.transformer import KVCache

N_TEXT = 8


class Steps:
    """All steps of drawing one batch of pictures greedily, by one method, ``way``."""

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
            self.fixed = FixedStep(model.transformer, self.read_prompt()[1])
            # Compiled code copies the whole of a tensor that is changed through a view, so each layer gets its own.
            cache: Any = self.fixed.cache
            cache.k, cache.v = ([layer.clone() for layer in part] for part in (cache.k, cache.v))
            self.fixed._run = torch.compile(self.fixed._run, dynamic=False)  # type: ignore[method-assign]

    def read_prompt(self) -> tuple[Tensor, Any]:
        """Hidden states at the end of the prompt, and the cache."""
        cache, n = self.model.transformer.new_cache(self.batch, self.length - 1), N_TEXT + 1
        hidden = self.model.transformer(self.prompt, self.positions[:, :n], self.bias[:, :, :n, :n], cache)
        return hidden[:, -1], cache

    @staticmethod
    def start_again(fixed: FixedStep, prompt: KVCache) -> None:
        """Put the prompt's keys and values into the fixed step's cache, and mask all later places."""
        for ours, theirs in zip([*fixed.cache.k, *fixed.cache.v], [*prompt.k, *prompt.v], strict=True):
            ours[:, :, : N_TEXT + 1] = theirs[:, :, : N_TEXT + 1]
        fixed.cache.length = N_TEXT + 1
        fixed.bias.fill_(MASKED)

    def __call__(self) -> tuple[float, Tensor]:
        """CPU seconds of all steps, and the tokens (B, n)."""
        transformer, tokens = self.model.transformer, []
        with ExitStack() as stack:
            if self.way == "packed":  # as ``fast_steps`` and ``CogLM.fill`` do
                stack.enter_context(packed(transformer, self.batch))
                stack.enter_context(packed_head(self.model, self.batch))
                stack.enter_context(torch.inference_mode())
            hidden, cache = self.read_prompt()
            if self.fixed is not None:
                self.start_again(self.fixed, cache)
            start = time.process_time()
            for i in range(N_TEXT + 1, self.length):
                tokens.append(self.model.code_logits(hidden).argmax(-1))
                if i == self.length - 1:
                    break
                token, position = tokens[-1][:, None], self.positions[:, i : i + 1]
                if self.fixed is not None:
                    hidden = self.fixed(token, position, None)
                else:
                    hidden = transformer(token, position, None, cache)[:, -1]
            return time.process_time() - start, torch.stack(tokens, dim=1)


@torch.no_grad()
def measure(model: CogLM, batch: int, rounds: int) -> dict[str, float]:
    """Tokens per CPU second of each method, and its speed relative to "cache"."""
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
    """A model of 6 layers, width 256 and 8 heads, with random weights rounded to half precision."""
    torch.manual_seed(0)
    n_codes, vocab = 1024, 1536
    sizes = TransformerConfig(n_layers=6, d_model=256, n_heads=8, vocab_size=vocab)
    ids = SpecialIds(pad=vocab - 1, boi=vocab - 2, boe=vocab - 3, boc=vocab - 4)
    return CogLM(CogLMConfig(sizes, LayoutConfig(), ids, n_codes)).eval().half().float()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="how much faster each method makes drawing on a CPU")
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
