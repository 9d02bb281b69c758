"""Local attention on a CPU: the package's two forms against the usual ways of computing it, in one run.

All compute the same numbers, which is checked at the start: queries of a fine grid look at 9 x 5 cells of it and at
5 x 5 cells of a grid three times as coarse, under one softmax, as direct super-resolution does.

    unfold      every window copied out with F.unfold, one copy of each key per query that sees it
    reference   ``minicogview.local_attention``, all scores of all pairs, written out
    dense       the same with PyTorch's fused attention and a mask, which is made once and not counted
    flex        PyTorch's FlexAttention, compiled; the compiler's time is not counted, and it has no backward on a CPU
    blocked     ``minicogview.local_attention``, tiles and halo

Times are CPU seconds of one thread, medians, taken in turn so that a busy machine slows all of them; what takes more
than ten seconds is run once. Memory is what the process's peak grew by: the inputs are not counted, the result is. What
would need more than ``--gigabytes`` is not run, and the table says so.

    python benchmarks/local_attention.py                    prints the table (about 10 minutes)
    python benchmarks/local_attention.py --json FILE        and writes it
    python benchmarks/local_attention.py --sides 24 60 96 128 192
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
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minicogview.local_attention import Coarse, local_attention, window_cells, window_mask

WINDOW, COARSE_WINDOW, RATIO = (9, 5), (5, 5), 3
NAMES = ["unfold", "reference", "dense", "flex", "blocked"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """One block of rows."""

    side: int
    heads: int
    head_size: int
    dtype: str
    backward: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def coarse_grid(self) -> tuple[int, int]:
        return self.side // RATIO, self.side // RATIO


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, coarse k, coarse v -> out

# --- the usual ways ---------------------------------------------------------------------------------------------


def unfolded(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Every window of x (B, h * w, N, H), copied out: (B, N, H, cells, h * w), zeros outside the grid."""
    picture = rearrange(x, "b (y x) n h -> b (n h) y x", y=grid[0])
    windows = F.unfold(picture, window, padding=(window[0] // 2, window[1] // 2))
    return windows.view(len(x), *x.shape[2:], window[0] * window[1], -1)


def unfold_way(setting: Setting) -> Attend:
    """Windows copied out, and the dot products as products and sums."""
    grid, coarse_grid = setting.grid, setting.coarse_grid
    inside = torch.cat(
        [
            window_cells(grid, key_grid, window)[1]
            for key_grid, window in ((grid, WINDOW), (coarse_grid, COARSE_WINDOW))
        ],
        1,
    ).T  # (70, T)
    parent = (torch.arange(grid[0])[:, None] // RATIO * coarse_grid[1] + torch.arange(grid[1]) // RATIO).flatten()

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        q = rearrange(q, "b t n h -> b n h 1 t") * setting.head_size**-0.5
        scores = [
            (q * unfolded(k, grid, WINDOW)).sum(2),
            (q * unfolded(coarse_k, coarse_grid, COARSE_WINDOW)[..., parent]).sum(2),
        ]
        weights = torch.cat(scores, 2).masked_fill(~inside, float("-inf")).softmax(2)[:, :, None]  # (B, N, 1, 70, T)
        own = WINDOW[0] * WINDOW[1]
        out = (weights[..., :own, :] * unfolded(v, grid, WINDOW)).sum(3)
        out = out + (weights[..., own:, :] * unfolded(coarse_v, coarse_grid, COARSE_WINDOW)[..., parent]).sum(3)
        return rearrange(out, "b n h t -> b t n h")

    return attend


def side_by_side(k: Tensor, coarse_k: Tensor) -> Tensor:
    """Keys of both grids, heads first: (B, N, S, H)."""
    return torch.cat([k, coarse_k], 1).transpose(1, 2)


def dense_way(setting: Setting) -> Attend:
    """Fused attention with a mask over all pairs."""
    masks = [
        window_mask(setting.grid, setting.grid, WINDOW),
        window_mask(setting.grid, setting.coarse_grid, COARSE_WINDOW),
    ]
    mask = torch.cat(masks, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        keys, values = side_by_side(k, coarse_k), side_by_side(v, coarse_v)
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask).transpose(1, 2)

    return attend


def flex_way(setting: Setting) -> Attend:
    """FlexAttention: the windows as a function of two positions, compiled into the kernel."""
    side, coarse_side, n = setting.side, setting.side // RATIO, setting.side**2

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        y, x, coarse_key = query // side, query % side, key - n
        own = ((key // side - y).abs() <= WINDOW[0] // 2) & ((key % side - x).abs() <= WINDOW[1] // 2)
        dy, dx = coarse_key // coarse_side - y // RATIO, coarse_key % coarse_side - x // RATIO
        coarse = (dy.abs() <= COARSE_WINDOW[0] // 2) & (dx.abs() <= COARSE_WINDOW[1] // 2)
        return torch.where(key < n, own, coarse)

    torch._dynamo.reset()
    blocks = create_block_mask(seen, None, None, n, n + coarse_side**2, device="cpu")
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        keys, values = side_by_side(k, coarse_k), side_by_side(v, coarse_v)
        return compiled(q.transpose(1, 2), keys, values, block_mask=blocks).transpose(1, 2)

    return attend


# --- ours -------------------------------------------------------------------------------------------------------


def our_way(setting: Setting, impl: str) -> Attend:
    """``local_attention``, the function that both super-resolution models call."""

    def attend(q: Tensor, k: Tensor, v: Tensor, coarse_k: Tensor, coarse_v: Tensor) -> Tensor:
        coarse = Coarse(coarse_k, coarse_v, setting.coarse_grid, COARSE_WINDOW)
        return local_attention(q, k, v, setting.grid, WINDOW, coarse=coarse, impl=impl)

    return attend


WAYS: dict[str, Callable[[Setting], Attend]] = {
    "unfold": unfold_way,
    "reference": partial(our_way, impl="reference"),
    "dense": dense_way,
    "flex": flex_way,
    "blocked": partial(our_way, impl="blocked"),
}


# --- all of them ------------------------------------------------------------------------------------------------


def gigabytes(name: str, setting: Setting) -> float:
    """Rough need of memory, of those ways whose need grows fast."""
    queries = setting.side**2
    keys = queries + (setting.side // RATIO) ** 2
    size = DTYPES[setting.dtype].itemsize
    need = {
        "unfold": queries * 45 * setting.heads * setting.head_size * size * (6 if setting.backward else 2.2),
        "reference": queries * keys * setting.heads * 4 * (5 if setting.backward else 4),
        "dense": queries * keys * (1 + 2 * size),
        "flex": queries * keys * 0.1,
    }
    return need.get(name, 0.0) / 1e9


def peak_bytes(reset: bool = False) -> int | None:
    """The most memory this process has held since the last reset; None where the system does not tell."""
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, so that using it again counts
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def make_inputs(setting: Setting) -> tuple[Tensor, Tensor]:
    """Both projections, as the layers give them: (1, T, 3, N, H) and (1, S, 2, N, H)."""
    generator, shape = torch.Generator().manual_seed(0), (setting.heads, setting.head_size)
    own = torch.randn(1, setting.side**2, 3, *shape, generator=generator).to(DTYPES[setting.dtype])
    coarse = torch.randn(1, (setting.side // RATIO) ** 2, 2, *shape, generator=generator).to(DTYPES[setting.dtype])
    return own.requires_grad_(setting.backward), coarse.requires_grad_(setting.backward)


def run(attend: Attend, setting: Setting, own: Tensor, coarse: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """CPU seconds of one call, and its result."""
    own.grad = coarse.grad = None
    start = time.process_time()
    with torch.set_grad_enabled(setting.backward):
        out = attend(*own.unbind(2), *coarse.unbind(2))
    if setting.backward:
        out.backward(direction)
    return time.process_time() - start, out.detach()


def measure(setting: Setting, rounds: int, limit: float) -> list[dict]:
    """One row for every way: milliseconds, extra memory, or why it was not run."""
    own, coarse = make_inputs(setting)
    direction = torch.ones(1, setting.side**2, setting.heads, setting.head_size, dtype=own.dtype)
    rows, ways, expected = {}, {}, None
    for name in reversed(NAMES):  # first run: checks the result, compiles, fills caches, and measures memory
        rows[name] = row = {"name": name, **asdict(setting), "ms": None, "runs": 0, "extra_gb": None, "note": ""}
        if name == "flex" and setting.backward:
            row["note"] = "not measured: no backward pass on a CPU"
            continue
        if gigabytes(name, setting) > limit:
            row["note"] = f"not measured: needs about {gigabytes(name, setting):.0f} GB"
            continue
        try:
            attend = WAYS[name](setting)
            if name in ("blocked", "flex"):  # tables and compiled code are made once
                run(attend, setting, own, coarse, direction)
            own.grad = coarse.grad = None
            before = peak_bytes(reset=True)
            seconds, out = run(attend, setting, own, coarse, direction)
            after = peak_bytes()
        except Exception as error:
            if name != "flex":
                raise
            row["note"] = f"not measured: cannot be compiled here ({type(error).__name__})"
            continue
        expected = out if expected is None else expected
        tolerance = 1e-4 if setting.dtype == "f32" else 5e-2
        assert (out - expected).abs().max() < tolerance, f"{name} computes something else"
        ways[name], row["seconds"] = attend, [seconds]
        if before is not None and after is not None:
            row["extra_gb"] = round((after - before) / 1e9, 3)
        del out
    for _ in range(rounds):
        for name, attend in ways.items():
            if rows[name]["seconds"][0] < 10:
                rows[name]["seconds"].append(run(attend, setting, own, coarse, direction)[0])
    for row in rows.values():
        seconds = row.pop("seconds", [])
        seconds = seconds[1:] or seconds  # the first run warms up, unless it is the only one
        if seconds:
            row["ms"], row["runs"] = round(statistics.median(seconds) * 1e3, 2), len(seconds)
    for row in rows.values():
        for other in ("unfold", "dense"):
            both = rows[other]["ms"] and row["ms"]
            row[f"faster_than_{other}"] = round(rows[other]["ms"] / row["ms"], 2) if both else None
    return [rows[name] for name in NAMES]


def settings(sides: list[int]) -> list[Setting]:
    """The toy's sizes, then those of the 6B model: all heads forward, a quarter of them forward and backward."""
    toy = [Setting(24, 6, 48, "f32", backward) for backward in (False, True)]
    kinds = [(48, "f32", False), (48, "bf16", False), (12, "f32", True)]
    return toy + [Setting(side, heads, 64, dtype, back) for side in sides for heads, dtype, back in kinds]


def show(value: float | None, form: str) -> str:
    return format("-" if value is None else value, form if value is not None else f">{form[1:].split('.')[0]}")


def main() -> None:
    """Measure every setting, print its rows as they come, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--sides", type=int, nargs="+", default=[24, 60, 96], help="multiples of 3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="the most memory that one way may take")
    args = parser.parse_args()
    torch.set_num_threads(1)
    facts = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "device": f"CPU, {platform.machine()}, 1 thread of {os.cpu_count()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": "not measured",
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for setting in settings(args.sides):
        direction = "forward + backward" if setting.backward else "forward"
        what = f"{setting.heads} heads of {setting.head_size}, {setting.dtype}, {direction}"
        print(f"\n{setting.side} x {setting.side}, {what}")
        print(f"{'':10} {'CPU ms':>10} {'runs':>5} {'extra GB':>9} {'x unfold':>9} {'x dense':>8}")
        for row in measure(setting, args.rounds, args.gigabytes):
            numbers = (
                f"{show(row['ms'], '>10.1f')} {row['runs']:>5} {show(row['extra_gb'], '>9.3f')} "
                f"{show(row['faster_than_unfold'], '>9.1f')} {show(row['faster_than_dense'], '>8.1f')}"
            )
            print(f"{row['name']:10} {row['note'] or numbers}", flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
