"""A few rows times the matrices of one layer of the 6B model, in bfloat16, 8 and 4 bits: the work of one new token.

A layer has four matrices: 3072 x 9216, 3072 x 3072, 3072 x 12288 and 12288 x 3072. Each way is timed on several copies
of them in turn, so that no cache holds the next matrix. On a CPU the quantized ways are PyTorch's product with 4-bit
matrices, which ``quantize_layers`` chooses there. On a GPU they are the Triton kernel, and every way is replayed as a
CUDA graph, because Python would leave pauses between kernels as short as these. "GB/s" is a layer's stored bytes
divided by the time; the first line gives the memory's own speed, measured on a large sum in the same run.

    python benchmarks/quantized_product.py                              prints the table
    python benchmarks/quantized_product.py --threads 1 --json FILE      also writes it
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
    """The least seconds of several calls; on a GPU, of several replays of a CUDA graph."""
    for _ in range(2):
        work()  # compile kernels, start threads
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
    """Seconds that one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reading_speed(device: str) -> float:
    """Bytes per second that a large sum reads."""
    large = torch.ones(2**30 if device == "cpu" else 2**32, dtype=torch.uint8, device=device).view(torch.int64)
    return large.nbytes / seconds_of(large.sum, device, 5)


def layers(way: str, device: str, copies: int) -> list[nn.ModuleList]:
    """Several copies of a layer's linear maps, with random weights."""
    torch.manual_seed(0)
    one = nn.ModuleList(nn.Linear(*shape, dtype=torch.bfloat16, device=device) for shape in MATRICES)
    if way != "bf16":
        quantize_layers(one, 8 if way == "int8" else 4)
    return [copy.deepcopy(one) for _ in range(copies)]


@torch.inference_mode()
def measure(way: str, device: str, copies: int, rounds: int) -> list[dict[str, Any]]:
    """One row of the table for each number of input rows."""
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
    """Measure every way, print its rows, and write them."""
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
