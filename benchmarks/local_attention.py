"""Local attention: the package's forms against the usual ways of computing it, in one run on one device.

All ways compute the same numbers, which is checked first: queries of a fine grid look at 9 x 5 cells of that grid and
at 5 x 5 cells of a coarser grid (a third of it along each axis, a quarter at 128), under one softmax, as in the direct
stage.

    unfold      copies every window with F.unfold, so that each key is copied for every query that sees it
    reference   ``minicogview.local_attention``: the scores of all pairs, written out
    dense       PyTorch's fused attention with a mask over all pairs; making the mask is not timed
    flex        PyTorch's FlexAttention, compiled; compiling is not timed, and there is no backward pass on a CPU
    xformers    its memory-efficient attention with the dense mask; on a GPU, if it is installed
    natten      its neighbourhood attention to 9 x 5 cells of the fine grid; on a GPU, if it is installed. Its numbers
                differ: it has no coarse keys, and it moves windows inwards at the border
    blocked     ``minicogview.local_attention``: tiles and halos
    triton      ``minicogview.local_attention``: fused kernels; on a GPU

Times on a CPU are median CPU milliseconds of one thread. The ways take turns, so that a busy machine slows all of them;
a way that takes more than ten seconds is run once. Times on a GPU are milliseconds between two events. Memory is the
growth of the peak, which includes the result but not the inputs. A way that would need more than ``--gigabytes`` is not
run, and the table says so. The floor is the device's best possible time: every input is read once and every result
written once at the speed of a large copy, or all products run at the speed of a large matrix product, whichever takes
longer; both speeds are measured in this run.

    python benchmarks/local_attention.py                    prints the table (about 10 minutes)
    python benchmarks/local_attention.py --json FILE        also writes it
    python benchmarks/local_attention.py --sides 24 60 96 128 192 --device cuda
    python benchmarks/local_attention.py --draw FILE.json   plots a written table as FILE.png
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path

import torch
from attention_ways import (
    COARSE_WINDOW,
    DTYPES,
    WINDOW,
    Attend,
    Setting,
    dense_way,
    flex_way,
    natten_way,
    unfold_way,
    xformers_way,
)
from torch import Tensor

from minicogview.local_attention import local_attention
from minicogview.windows import Coarse

KEYS_SEEN = WINDOW[0] * WINDOW[1] + COARSE_WINDOW[0] * COARSE_WINDOW[1]
NAMES = {
    "cpu": ["unfold", "reference", "dense", "flex", "blocked"],
    "cuda": ["unfold", "reference", "dense", "flex", "xformers", "natten", "blocked", "triton"],
}
OPTIONAL = ("flex", "xformers", "natten")  # other projects: their errors go into the table instead of ending the run


# --- ours -------------------------------------------------------------------------------------------------------


def our_way(setting: Setting, impl: str) -> Attend:
    """``local_attention``, the function that both super-resolution stages call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        coarse = Coarse(coarse_k, coarse_v, setting.coarse_grid, COARSE_WINDOW)
        return local_attention(q, k, v, setting.grid, WINDOW, coarse=coarse, impl=impl)

    return attend


WAYS: dict[str, Callable[[Setting], Attend]] = {
    "unfold": unfold_way,
    "reference": partial(our_way, impl="reference"),
    "dense": dense_way,
    "flex": flex_way,
    "xformers": xformers_way,
    "natten": natten_way,
    "blocked": partial(our_way, impl="blocked"),
    "triton": partial(our_way, impl="triton"),
}


# --- all ways ---------------------------------------------------------------------------------------------------


def gigabytes(name: str, setting: Setting) -> float:
    """A rough estimate of the memory that a way needs; 0 for the ways whose need grows slowly."""
    queries = setting.side**2
    keys = queries + setting.coarse_grid[0] ** 2
    size = DTYPES[setting.dtype].itemsize
    need = {
        "unfold": queries * 45 * setting.heads * setting.head_size * size * (6 if setting.backward else 2.2),
        "reference": queries * keys * setting.heads * 4 * (5 if setting.backward else 4),
        "dense": queries * keys * (1 + 2 * size),
        "flex": queries * keys * 20,  # while its mask is made
        "xformers": queries * keys * 2 * size,
    }
    return need.get(name, 0.0) / 1e9


def floor_ms(setting: Setting, bytes_per_s: float, flop_per_s: float) -> float:
    """The device's best possible time; a backward pass reads and computes about 2.5 times as much as a forward pass."""
    row = setting.heads * setting.head_size
    moved = (4 * setting.side**2 + 2 * setting.coarse_grid[0] ** 2) * row * DTYPES[setting.dtype].itemsize
    computed = 4 * setting.side**2 * KEYS_SEEN * row
    return (3.5 if setting.backward else 1) * max(moved / bytes_per_s, computed / flop_per_s) * 1e3


def speeds(device: str, dtype: str) -> tuple[float, float]:
    """Bytes per second of a large copy (reads and writes count), and FLOP per second of a large matrix product."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
    large = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(large)
    copy = min(timed(lambda: target.copy_(large), device) for _ in range(5))
    product = min(timed(lambda: a @ b, device) for _ in range(5))
    return 2 * large.numel() / copy, 2 * n**3 / product


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds that one call takes: CPU time, or the time between two events on the GPU."""
    if device == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_bytes(device: str, reset: bool = False) -> int | None:
    """The peak of memory in use since the last reset; None if the system does not report it."""
    if device == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory, so that using it again counts
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def make_inputs(setting: Setting) -> tuple[Tensor, Tensor]:
    """The projections of both grids, as the layers give them: (1, T, 3, N, H) and (1, S, 2, N, H)."""
    generator, shape = torch.Generator().manual_seed(0), (setting.heads, setting.head_size)
    own = torch.randn(1, setting.side**2, 3, *shape, generator=generator).to(DTYPES[setting.dtype])
    coarse = torch.randn(1, setting.coarse_grid[0] ** 2, 2, *shape, generator=generator).to(DTYPES[setting.dtype])
    own, coarse = own.to(setting.device), coarse.to(setting.device)
    return own.requires_grad_(setting.backward), coarse.requires_grad_(setting.backward)


def run(attend: Attend, setting: Setting, own: Tensor, coarse: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """Seconds that one call takes, and its result."""
    own.grad = coarse.grad = None
    results = []

    def work() -> None:
        with torch.set_grad_enabled(setting.backward):
            out = attend(*own.unbind(2), *coarse.unbind(2))
        if setting.backward:
            out.backward(direction)
        results.append(out.detach())

    return timed(work, setting.device), results[0]


def measure(setting: Setting, rounds: int, limit: float, floor: float) -> list[dict]:
    """One row for each way: milliseconds and extra memory, or why it was not run."""
    own, coarse = make_inputs(setting)
    direction = torch.ones(1, setting.side**2, setting.heads, setting.head_size, dtype=own.dtype)
    direction = direction.to(setting.device)
    rows, ways, expected, names = {}, {}, None, NAMES[setting.device]
    for name in reversed(names):  # the first run checks the result, compiles, fills caches and measures memory
        rows[name] = row = {"name": name, **asdict(setting), "ms": None, "runs": 0, "extra_gb": None, "note": ""}
        row["floor_ms"] = round(floor, 4)
        if name == "flex" and setting.backward and setting.device == "cpu":
            row["note"] = "not measured: no backward pass on a CPU"
            continue
        if gigabytes(name, setting) > limit:
            row["note"] = f"not measured: needs about {gigabytes(name, setting):.0f} GB"
            continue
        try:
            attend = WAYS[name](setting)
            if name in ("blocked", "flex", "triton"):  # make their tables and compiled code
                run(attend, setting, own, coarse, direction)
            own.grad = coarse.grad = None
            before = peak_bytes(setting.device, reset=True)
            seconds, out = run(attend, setting, own, coarse, direction)
            after = peak_bytes(setting.device)
        except Exception as error:
            if name not in OPTIONAL:
                raise
            here = "is not installed" if isinstance(error, ImportError) else f"fails here ({type(error).__name__})"
            row["note"] = f"not measured: {here}"
            continue
        expected = out if expected is None else expected
        tolerance = 1e-4 if setting.dtype == "f32" else 5e-2
        same = name == "natten" or (out - expected).abs().max() < tolerance
        assert same, f"{name} computes something else"
        ways[name], row["seconds"] = attend, [seconds]
        if before is not None and after is not None:
            row["extra_gb"] = round((after - before) / 1e9, 3)
        del out
    for _ in range(rounds if setting.device == "cpu" else 10 * rounds):
        for name, attend in ways.items():
            if rows[name]["seconds"][0] < 10:
                rows[name]["seconds"].append(run(attend, setting, own, coarse, direction)[0])
    for row in rows.values():
        seconds = row.pop("seconds", [])
        seconds = seconds[1:] or seconds  # the first run is a warm-up, unless it is the only one
        if seconds:
            row["ms"], row["runs"] = round(statistics.median(seconds) * 1e3, 4), len(seconds)
    for row in rows.values():
        for other in ("unfold", "dense"):
            both = rows[other]["ms"] and row["ms"]
            row[f"faster_than_{other}"] = round(rows[other]["ms"] / row["ms"], 2) if both else None
    return [rows[name] for name in names]


def settings(sides: list[int], device: str) -> list[Setting]:
    """The toy's sizes, then those of the 6B model; the backward pass on a CPU has a quarter of the heads."""
    toy = [Setting(24, 6, 48, "f32", backward, device) for backward in (False, True)]
    kinds = [(48, "f32", False), (48, "bf16", False), (12, "f32", True)]
    if device == "cuda":
        kinds = [(48, "f32", False), (48, "bf16", False), (48, "bf16", True)]
    return toy + [Setting(side, heads, 64, dtype, back, device) for side in sides for heads, dtype, back in kinds]


def draw(table: Path) -> Path:
    """Plot time and memory against the number of tokens, from a written table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = json.loads(table.read_text())
    rows = [row for row in facts["rows"] if row["ms"] is not None and row["head_size"] == 64 and not row["backward"]]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
    for column, dtype in enumerate(("f32", "bf16")):
        for name in dict.fromkeys(row["name"] for row in rows):
            some = [row for row in rows if row["dtype"] == dtype and row["name"] == name]
            sides = [row["side"] for row in some]
            axes[0, column].loglog(sides, [row["ms"] for row in some], marker="o", label=name)
            axes[1, column].loglog(sides, [max(row["extra_gb"] or 0, 1e-3) for row in some], marker="o", label=name)
        axes[0, column].set_title(f"{dtype}, 48 heads of 64, forward", fontsize=10)
        axes[1, column].set_xlabel("tokens per side")
        for axis in axes[:, column]:
            axis.set_xticks(sorted({row["side"] for row in rows}), sorted({row["side"] for row in rows}))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("milliseconds")
    axes[1, 0].set_ylabel("extra memory, GB (at least 0.001)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, {facts['date']}", fontsize=9)
    path = table.with_suffix(".png")
    figure.savefig(path, dpi=110)
    return path


def show(value: float | None, form: str) -> str:
    return format("-" if value is None else value, form if value is not None else f">{form[1:].split('.')[0]}")


def main() -> None:
    """Measure every setting, print each row when it is ready, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--sides", type=int, nargs="+", default=[24, 60, 96], help="multiples of 3 or 4")
    parser.add_argument("--device", choices=list(NAMES), default="cpu")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="plot a written table instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="the most memory that one way may use")
    args = parser.parse_args()
    if args.draw:
        print(draw(args.draw))
        return
    torch.set_num_threads(1)
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that PyTorch can use")
    cpu = f"CPU, {platform.machine()}, 1 thread of {os.cpu_count()}, {torch.backends.cpu.get_cpu_capability()}"
    facts = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "device": cpu if on_cpu else torch.cuda.get_device_name(),
        "gpu": "not measured" if on_cpu else "measured",
    }
    peak = {dtype: speeds(args.device, dtype) for dtype in DTYPES}
    for dtype, (bytes_per_s, flop_per_s) in peak.items():
        facts[dtype] = f"copies {bytes_per_s / 1e9:.1f} GB/s, products {flop_per_s / 1e9:.0f} GFLOP/s"
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for setting in settings(args.sides, args.device):
        direction = "forward + backward" if setting.backward else "forward"
        what = f"{setting.heads} heads of {setting.head_size}, {setting.dtype}, {direction}"
        floor = floor_ms(setting, *peak[setting.dtype])
        print(f"\n{setting.side} x {setting.side}, {what}; floor {floor:.3f} ms")
        print(f"{'':10} {'ms':>10} {'runs':>5} {'extra GB':>9} {'x unfold':>9} {'x dense':>8}")
        for row in measure(setting, args.rounds, args.gigabytes, floor):
            numbers = (
                f"{show(row['ms'], '>10.3f')} {row['runs']:>5} {show(row['extra_gb'], '>9.3f')} "
                f"{show(row['faster_than_unfold'], '>9.1f')} {show(row['faster_than_dense'], '>8.1f')}"
            )
            print(f"{row['name']:10} {row['note'] or numbers}", flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
