"""A super-resolution pass of the 6B model with its weights on the disk: seconds, and memory.

Makes files of random bfloat16 weights of full size (11.8 GB for LoPAR, 15.4 GB for the direct stage), maps them, and
runs one pass with every layer read while the one before it is at work. Beside it stands what this machine could do at
best: the pass's products at the speed of a large bfloat16 matrix product, and the file at the disk's reading speed,
both measured in this run.

    python benchmarks/streaming.py FOLDER                            both stages, one picture of 60 x 60 tokens
    python benchmarks/streaming.py FOLDER --stages iterative --layers 4 --threads 1
    python benchmarks/streaming.py FOLDER --json FILE                and writes the numbers
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from importing import Memory, disk_speed, forget

from minicogview.checkpoint import load_weights
from minicogview.config import Preset, get_preset, to_json
from minicogview.cost import sharpen_flops
from minicogview.lopar import IterativeSR
from minicogview.shards import n_bytes, write_shards
from minicogview.super_resolution import DirectSR

KINDS: dict[str, Any] = {"direct": DirectSR, "iterative": IterativeSR}


def empty(kind: str, preset: Preset) -> Any:
    """The model without weights."""
    with torch.device("meta"):
        return KINDS[kind](getattr(preset, kind)).eval()


def write_random(kind: str, preset: Preset, folder: Path) -> None:
    """Weights of full size in several files."""
    shapes = {name: tuple(value.shape) for name, value in empty(kind, preset).state_dict().items()}
    block = (torch.randn(2**20) * 0.02).bfloat16()

    def get(name: str) -> torch.Tensor:
        count = torch.Size(shapes[name]).numel()
        return block.repeat(-(-count // len(block)))[:count].view(shapes[name])

    sizes = {name: n_bytes(shape, torch.bfloat16) for name, shape in shapes.items()}
    facts = {"kind": kind, "config": to_json(getattr(preset, kind))}
    write_shards(folder, kind, sizes, get, facts, source="random")


def product_speed() -> float:
    """FLOP a second of a bfloat16 product as large as one of a layer's."""
    rows, inner, columns = 3600, 3072, 12288
    a, b = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(times)


@torch.no_grad()
def measure(kind: str, preset: Preset, folder: Path) -> dict[str, float]:
    """One streamed pass."""
    config = getattr(preset, kind)
    _, state = load_weights(folder / f"{kind}.safetensors", kind, dtype=None)
    model = empty(kind, preset)
    model.load_state_dict(state, assign=True)
    del state
    model.stream_layers()
    n_codes, layout = config.coglm.n_codes, config.coglm.layout
    n_cells = layout.n_image if kind == "direct" else config.fine_grid[0] * config.fine_grid[1]
    codes = torch.randint(n_codes, (1, n_cells), generator=torch.Generator().manual_seed(0))
    text = [[config.coglm.n_codes + 200 + i for i in range(16)]]
    for file in folder.glob(f"{kind}-*.safetensors"):
        forget(file)
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    model(text, codes)
    took = time.perf_counter() - start
    memory.ended = True
    flops = sharpen_flops(config, KINDS[kind], 16)

    stored = sum(p.numel() * 2 for p in model.base.layers.parameters())
    return {"pass_s": took, "tflop": flops / 1e12, "layers_gb": stored / 1e9, "peak_resident_gb": memory.resident}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="a super-resolution pass of the 6B model from the disk")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="cogview2")
    parser.add_argument("--stages", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    preset = get_preset(options.preset)
    if options.layers:
        preset = replace(preset, transformer=replace(preset.transformer, n_layers=options.layers))
    options.folder.mkdir(parents=True, exist_ok=True)
    _, read = disk_speed(options.folder)
    speed = product_speed()
    threads = f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} threads of {os.cpu_count()}"
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {threads}, torch {torch.__version__}",
        "layers": preset.transformer.n_layers,
        "disk_read_gb_s": read / 1e9,
        "product_gflop_s": speed / 1e9,
    }
    print(", ".join(f"{name} {value}" for name, value in results.items()))
    for kind in options.stages:
        write_random(kind, preset, options.folder)
        row = measure(kind, preset, options.folder)
        row["compute_floor_s"] = row["tflop"] * 1e12 / speed
        row["disk_floor_s"] = row["layers_gb"] * 1e9 / read
        row["share_of_floor"] = max(row["compute_floor_s"], row["disk_floor_s"]) / row["pass_s"]
        results[kind] = row
        print(kind, ", ".join(f"{name} {value:.2f}" for name, value in row.items()), flush=True)
        for file in options.folder.glob(f"{kind}*"):
            file.unlink()
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
