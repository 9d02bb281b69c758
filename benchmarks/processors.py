"""What number formats cost on this kind of processor, and whether the package's own choice is the fastest one.

Rows: a training step of the toy's CogLM; an update of its matrices by Muon; drawing four pictures with the toy; one
layer of the 6B model, streamed from the disk, for all fine tokens of a picture; and the same layer for a single token,
with its weights in memory. Each is measured in every number format in turn, and as the package chooses by itself
("auto"). For the streamed layer the products alone are timed too, in float32 with float32 matrices: what the layer
takes beyond them is attention, norms, reading, and converting matrices.

    python benchmarks/processors.py                                  on the processor as it is
    python benchmarks/processors.py --plain                          as on one without instructions for half precision
    python benchmarks/processors.py --json benchmarks/results/processors.json

``--plain`` sets two variables that restrict PyTorch's libraries to AVX2: ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY.
Times are seconds of computing (all threads together), the least of some rounds; the formats take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from minicogview.checkpoints.models import load_stages
from minicogview.checkpoints.random_weights import write_random
from minicogview.coglm import CogLM
from minicogview.config import Preset, get_preset
from minicogview.pipeline import CogView2
from minicogview.scale.machine import cpu_speeds, training_precision
from minicogview.scale.plan import Plan, Sizes, choose_formats
from minicogview.training.coglm import CogLMObjective, CogLMRecipe
from minicogview.training.optimizers import make_muon, updates_in
from minicogview.training.recipes import TOY_WEIGHTS, emoji_data, load_tokenizer
from minicogview.training.state import Settings

PLAIN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TEXT = 16  # tokens of the prompt


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of computing that each way takes at least, measured in turns."""
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - start)
    return least


def training(rounds: int) -> dict[str, float]:
    """One update of the toy's CogLM, batch 64."""
    preset = get_preset("toy")
    vqvae, tokenizer, codebook = load_tokenizer(preset, TOY_WEIGHTS)
    model = CogLM(preset.coglm)
    objective = CogLMObjective(model, emoji_data(preset, vqvae, tokenizer), codebook, CogLMRecipe())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    objective.batch(0)  # makes a group of batches

    def step(precision: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=training_precision(precision, "cpu") == "bf16"):
            loss, _ = objective.loss(0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ways = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
    return in_turns({name: lambda p=precision: step(p) for name, precision in ways.items()}, rounds)


def muon(rounds: int) -> dict[str, float]:
    """One update of all matrices of the toy's CogLM by Muon, the optimizer of the super-resolution stages."""
    model = CogLM(get_preset("toy").coglm)
    matrices = [p for p in model.transformer.layers.parameters() if p.ndim == 2]
    optimizer = make_muon(matrices, Settings(steps=1, lr=1e-3))
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)

    def step(precision: str) -> None:
        with updates_in(training_precision(precision, "cpu")):
            optimizer.step()

    ways = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
    return in_turns({name: lambda p=precision: step(p) for name, precision in ways.items()}, rounds)


def drawing(rounds: int) -> dict[str, float]:
    """Four pictures of one text with the toy, all stages."""
    models = {dtype: CogView2.from_pretrained("toy", dtype=dtype) for dtype in ("auto", "float32", "bfloat16")}
    return in_turns({name: lambda m=m: m.generate("a red apple", n=4) for name, m in models.items()}, rounds)


def wide(n_layers: int) -> Preset:
    """The 6B model with a few of its layers."""
    preset = get_preset("cogview2")
    transformer = replace(preset.coglm.transformer, n_layers=n_layers)
    return preset.with_coglm(replace(preset.coglm, transformer=transformer))


def plans(way: Any) -> dict[str, Plan]:
    """The package's choice of number formats for the whole 6B model, and each format by itself."""
    parameters = Sizes.of(get_preset("cogview2").coglm, get_preset("cogview2").direct, True).parameters
    found = {}
    for dtype in ("auto", "float32", "bfloat16"):
        formats = choose_formats(dtype, parameters, "cpu", stored=torch.bfloat16)
        found[dtype] = Plan(way, way, way, True, formats.dtype, "cpu", formats.kept)
    return found


def streamed_layer(folder: Path, n_layers: int, rounds: int) -> dict[str, float]:
    """One layer of the iterative stage for 3,600 fine tokens, its weights on the disk; and its products alone."""
    preset = wide(n_layers)
    n_tokens = preset.iterative.fine_grid[0] ** 2
    codes = torch.randint(preset.coglm.n_codes, (1, n_tokens))
    texts = [[preset.coglm.n_codes + 100 + i for i in range(TEXT)]]

    def one_pass(plan: Plan) -> Callable[[], object]:
        _, _, model, offload = load_stages(folder, plan)
        assert model is not None and offload is not None
        offload.need("iterative")
        return torch.inference_mode()(lambda: model(texts, codes))

    def products() -> None:
        d = preset.coglm.transformer.d_model
        x, inner = torch.ones(n_tokens + TEXT, d), torch.ones(n_tokens + TEXT, 4 * d)
        for weight in matrices:
            F.linear(x if weight.shape[1] == d else inner, weight)

    d = preset.coglm.transformer.d_model
    matrices = [torch.randn(rows, columns) for rows, columns in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))]
    ways = {name: one_pass(plan) for name, plan in plans("disk").items()}
    seconds = {name: value / n_layers for name, value in in_turns(ways, rounds).items()}
    return seconds | in_turns({"float32 products alone": products}, rounds)


def single_token(folder: Path, n_layers: int, rounds: int) -> dict[str, float]:
    """One layer of CogLM for one token, its weights in memory."""
    steps = 4

    def tokens(plan: Plan) -> Callable[[], object]:
        coglm, _, _, offload = load_stages(folder, plan)
        assert offload is not None
        offload.need("coglm")
        model = coglm.transformer

        @torch.inference_mode()
        def run() -> None:
            cache = model.new_cache(1, 400 + steps)
            cache.length = 400
            for i in range(steps):
                model(torch.tensor([[7]]), torch.tensor([[900 + i]]), None, cache)

        return run

    ways = {name: tokens(plan) for name, plan in plans("memory").items()}
    ways |= {f"{way}, auto": tokens(plans(way)["auto"]) for way in ("int8", "int4")}
    return {name: value / n_layers / steps for name, value in in_turns(ways, rounds).items()}


def main() -> None:
    """Measure all rows, print them, and write them."""
    parser = argparse.ArgumentParser(description="number formats on this kind of processor")
    parser.add_argument("--plain", action="store_true", help="compute as a processor without half precision does")
    parser.add_argument("--muon", action="store_true", help="measure the update by Muon alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3, help="of the wide model")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    options = parser.parse_args()
    if options.plain and "ONEDNN_MAX_CPU_ISA" not in os.environ:
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=os.environ | PLAIN).returncode)
    torch.set_num_threads(1)
    facts = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "float32_gflops": cpu_speeds()[torch.float32] / 1e9,
        "bfloat16_gflops": cpu_speeds()[torch.bfloat16] / 1e9,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = {"Muon update": muon(options.rounds)}
    if not options.muon:
        rows |= {"training step": training(options.rounds), "drawing, 4 pictures": drawing(options.rounds)}
        with tempfile.TemporaryDirectory() as folder:
            write_random(folder, wide(options.layers))
            rows["streamed 6B layer, 3,600 tokens"] = streamed_layer(Path(folder), options.layers, 1)
            rows["6B layer, one token"] = single_token(Path(folder), options.layers, options.rounds)
    for what, seconds in rows.items():
        best = min(value for name, value in seconds.items() if name in ("float32", "bfloat16"))
        print(f"{what}: " + ", ".join(f"{name} {value:.4f} s" for name, value in seconds.items()))
        print(f"    auto / best format: {seconds['auto'] / best:.2f}")
        if "float32 products alone" in seconds:
            print(f"    auto / float32 products: {seconds['auto'] / seconds['float32 products alone']:.2f}")
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else []
        options.json.write_text(json.dumps([*known, {**facts, "rows": rows}], indent=1) + "\n")


if __name__ == "__main__":
    main()
