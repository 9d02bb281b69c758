"""What super-resolution saves: one direct pass and six LoPAR rounds, against drawing fine tokens one after another.

Both sides have the same layers, width and vocabulary, random float32 weights and the same text, and both end with
sampled fine tokens. The sequential side is ``CogLM.generate`` on the fine grid, with a KV cache that is allocated once
and the packed products that this package uses on a CPU. It is the simple alternative to the paper's hierarchy
(CogView2, arXiv 2204.14217, section 3.3, speaks of 10 times fewer model runs than its predecessor).

The first table also compares one LoPAR pass with one direct pass. The second table is the memory that attention on the
fine grid needs in addition to its inputs: the peak size of the process minus its size before the call, as Linux
reports them.

    python benchmarks/super_resolution.py                 toy size, and 20 x 20 -> 60 x 60 at widths 256 and 768
    python benchmarks/super_resolution.py --json FILE     also writes the numbers to a file
    python benchmarks/super_resolution.py --sizes toy     measures only this size
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, SamplingConfig, SuperResolutionConfig, get_preset
from minicogview.local_attention import Impl, local_attention
from minicogview.lopar import OFFICIAL, IterativeSR
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps
from minicogview.super_resolution import DirectSR

SIZES = {"toy": (8, 256, 5, 4), "60 x 60, width 256": (20, 256, 6, 4), "60 x 60, width 768": (20, 768, 12, 12)}
PLAIN = SamplingConfig(temperature=1.0, top_k=16, n_clusters=0)


def coglm_config(grid: int, width: int, n_layers: int, n_heads: int) -> CogLMConfig:
    """A configuration with the toy's vocabulary and text positions, but another grid and other layers."""
    toy = get_preset("toy")
    layout = LayoutConfig(max_text=toy.layout.max_text, grid=grid)
    sizes = replace(
        toy.transformer,
        d_model=width,
        n_layers=n_layers,
        n_heads=n_heads,
        max_positions=layout.max_text + 1 + layout.n_image,
    )
    return CogLMConfig(sizes, layout, toy.ids, toy.vqvae.codebook_size)


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest wall-clock time of some calls, which other work on the machine slowed down least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def compare(grid: int, width: int, n_layers: int, n_heads: int) -> dict[str, float]:
    """Seconds of both sides for one picture, and of single passes."""
    torch.manual_seed(0)
    config = coglm_config(grid, width, n_layers, n_heads)
    whole = SuperResolutionConfig(config, n_text=16)
    side = whole.fine_grid[0]
    text = [[config.n_codes + 10 + i for i in range(16)]]
    direct, iterative = DirectSR(whole).eval(), IterativeSR(whole).eval()
    coarse = torch.randint(config.n_codes, (1, grid * grid))
    fine = torch.randint(config.n_codes, (1, side * side))

    def upsample() -> None:
        codes = direct.upsample(text, coarse, Sampler([0], PLAIN, None, side * side))
        iterative.resample(text, codes, [Sampler([0], PLAIN, None, side * side) for _ in OFFICIAL.top_k])

    repeats = 5 if side < 30 else 2
    upsample()  # the first call is slower: it computes tables
    ours, direct_pass = seconds(upsample, repeats), seconds(lambda: direct(text, coarse), repeats)
    lopar_pass = seconds(lambda: iterative(text, fine), repeats)
    one_by_one = CogLM(coglm_config(side, width, n_layers, n_heads)).eval()
    one_by_one.decoding = fast_steps
    sequential = seconds(lambda: one_by_one.generate(text, Sampler([0], PLAIN, None, side * side)), 1 + (side < 30))
    return {
        "sequential_s": sequential,
        "direct_and_lopar_s": ours,
        "ratio": sequential / ours,
        "direct_pass_s": direct_pass,
        "lopar_pass_s": lopar_pass,
        "lopar_over_direct": lopar_pass / direct_pass,
    }


def kernel_count(name: str) -> int:
    """Kilobytes of this process according to Linux: "VmRSS" is the current size, "VmHWM" the peak since a reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def peak_megabytes(side: int, impl: Impl) -> float:
    """Peak memory of attention on ``side`` x ``side`` fine tokens, 4 heads of size 64, in addition to its inputs."""
    q, k, v = (torch.randn(1, side * side, 4, 64) for _ in range(3))
    local_attention(q[:, :36], k[:, :36], v[:, :36], (6, 6), impl=impl)  # so that libraries are loaded already
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = kernel_count("VmRSS")
    local_attention(q, k, v, (side, side), impl=impl)
    return (kernel_count("VmHWM") - before) / 1024


def memory(sides: Sequence[int] = (24, 48, 96)) -> list[dict[str, float]]:
    """Peak megabytes of tiled and of dense attention at some sizes, each measured in its own process."""
    rows = []
    for side in sides:
        row: dict[str, float] = {"side": side}
        for impl in ("blocked", "reference"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row[impl] = pool.apply(peak_megabytes, (side, impl))
        rows.append(row)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="sequential generation against super-resolution")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    print(f"{'':20}{'sequential s':>14}{'direct + LoPAR s':>18}{'ratio':>8}{'LoPAR pass / direct pass':>27}")
    for name in options.sizes:
        row = results[name] = compare(*SIZES[name])
        ours, ratio, passes = row["direct_and_lopar_s"], row["ratio"], row["lopar_over_direct"]
        print(f"{name:20}{row['sequential_s']:14.2f}{ours:18.2f}{ratio:8.1f}{passes:27.2f}", flush=True)
    print("\nmemory that attention on the fine grid adds, MB (4 heads of 64, float32)")
    print(f"{'tokens a side':>14}{'tiles':>10}{'dense':>10}")
    rows = memory()
    for row in rows:
        print(f"{row['side']:14}{row['blocked']:10.1f}{row['reference']:10.1f}")
    if options.json:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"
        options.json.write_text(json.dumps({"machine": machine, "speed": results, "memory": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
