"""Few rows times the matrices of one layer of the 6B model, in bfloat16, eight and four bits: as drawing a token does.

A layer has four matrices: 3072 x 9216, 3072 x 3072, 3072 x 12288 and 12288 x 3072. Every way is timed on several
copies of them in turn, so that no cache holds what comes next. On a CPU the quantised ways are what ``quantize_layers``
makes there, PyTorch's product with four-bit matrices; on a GPU they are the Triton kernel, and all ways are replayed as
a CUDA graph: the pauses between such short kernels are Python's. "GB/s" is what is kept of a layer / time; the memory's
own speed, at the top, is that of a large sum in the same run.

    python benchmarks/quantized_product.py                              prints the table
    python benchmarks/quantized_product.py --threads 1 --json FILE      and writes it
    python benchmarks/quantized_product.py --device cuda
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minicogview.scale.quantization import quantize_layers

WIDTH = 3072
MATRICES = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))  # inputs, outputs
ROWS = (1, 4, 8, 16)


def seconds_of(work: Callable[[], Any], device: str, rounds: int) -> float:
    """Least seconds of several rounds; on a GPU of replays of a graph."""
    for _ in range(2):
        work()  # kernels are compiled, threads started
    if device == "cpu":
        return min(one_round(work) for _ in range(rounds))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    replay()
    return min(one_round(replay) for _ in range(10 * rounds))


def one_round(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reading_speed(device: str) -> float:
    """Bytes that a large sum reads in a second."""
    large = torch.ones(2**30 if device == "cpu" else 2**32, dtype=torch.uint8, device=device).view(torch.int64)
    return large.nbytes / seconds_of(large.sum, device, 5)


def layers(way: str, device: str, copies: int) -> list[nn.ModuleList]:
    """Copies of a layer's matrices, random ones, with their biases."""
    torch.manual_seed(0)
    one = nn.ModuleList(nn.Linear(*shape, dtype=torch.bfloat16, device=device) for shape in MATRICES)
    if way != "bf16":
        quantize_layers(one, 8 if way == "int8" else 4)
    return [copy.deepcopy(one) for _ in range(copies)]


@torch.inference_mode()
def measure(way: str, device: str, copies: int, rounds: int) -> list[dict[str, Any]]:
    """A line of the table for every number of rows."""
    models, table = layers(way, device, copies), []
    kept = sum(tensor.nbytes for tensor in models[0].state_dict().values())
    for n_rows in ROWS:
        inputs = {size: torch.randn(n_rows, size).to(device, torch.bfloat16) for size in (WIDTH, 4 * WIDTH)}

        def work(inputs: dict[int, Tensor] = inputs) -> None:
            for model in models:
                for linear, (size, _) in zip(model, MATRICES, strict=True):
                    linear(inputs[size])

        seconds = seconds_of(work, device, rounds) / copies
        ms, speed = seconds * 1e3, kept / seconds / 1e9
        table.append({"way": way, "rows": n_rows, "ms": round(ms, 4), "gb_per_s": round(speed, 2)})
        print(f"{way:6}{n_rows:6}{ms:10.3f}{speed:10.1f}", flush=True)
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} threads"
    memory = reading_speed(args.device)
    print(f"{on}, {args.copies} copies of a layer; memory reads {memory / 1e9:.1f} GB/s")
    print(f"{'way':6}{'rows':>6}{'ms':>10}{'GB/s':>10}")
    table = [row for way in ("bf16", "int8", "int4") for row in measure(way, args.device, args.copies, args.rounds)]
    if args.json:
        facts = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine(), "on": on}
        facts |= {"cores": os.cpu_count(), "memory_gb_per_s": round(memory / 1e9, 2)}
        args.json.write_text(json.dumps({**facts, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
