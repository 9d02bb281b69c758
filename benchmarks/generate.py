"""What the stages of a large model cost on this machine, in seconds and memory, compared with the machine's limits.

Stages: "coglm" is one step of CogLM for a batch of pictures, measured over some steps after the prompt; "direct" and
"iterative" are one pass of each super-resolution model, sampling included (LoPAR has six); "picture" is a whole
picture under a plan for that much memory, loading left out. Weights: "memory" (as stored), "int8" and "int4" are in
memory; with "disk" one layer after another is read. Each row has a process of its own, whose peak memory is its own.

Limits are measured in the same run: how fast memory is read by a large sum (a GPU's by a large copy), how fast a
product as large as one of a layer's goes in the number format of the computation, and how fast the disk is read. A step
of the first stage can be no faster than its weights and cache are read, a pass no faster than its products, or than the
disk; "share" is that floor / time.

    python benchmarks/generate.py FOLDER                             of weights; if it is new, random ones are written
    python benchmarks/generate.py FOLDER --device cuda
    python benchmarks/generate.py FOLDER --stages coglm --weights int4 --batches 1 4 --json FILE
    python benchmarks/generate.py FOLDER --stages picture --memory 6GB
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from importing import Memory, disk_speed, forget

from minicogview.checkpoints.models import load_stages
from minicogview.checkpoints.random_weights import write_random
from minicogview.clusters import Clusters
from minicogview.config import SamplingConfig, get_preset
from minicogview.evaluation.cost import super_resolution_flops
from minicogview.lopar import OFFICIAL, IterativeSR
from minicogview.pipeline import CogView2
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps
from minicogview.scale.plan import BITS, Formats, Plan, Sizes, choose_formats
from minicogview.super_resolution import DirectSR

WAYS = ("memory", "int8", "int4", "disk")
TEXT = 16  # tokens of the text
PRODUCT = 3600, 3072, 12288  # rows, inner size and columns of a product as large as one of a layer's
SUM = 2**27  # numbers of 8 bytes each in a large sum


class Enough(Exception):
    """Raised to end generation after the steps that are timed."""


def wait(device: str) -> None:
    """Wait until the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def limits(folder: Path, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second from memory and from the disk, and operations a second of a large product in ``dtype``."""
    rows, inner, columns = PRODUCT
    a, b = (torch.randn(n, inner, dtype=dtype, device=device) for n in (rows, columns))
    large = torch.ones(SUM, dtype=torch.int64, device=device)

    def best(work: Any, rounds: int = 5) -> float:
        times = []
        for _ in range(rounds):
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            times.append(time.perf_counter() - start)
        return min(times)

    copies = 1 if device == "cpu" else 2  # a sum only reads, a copy reads and writes
    seconds = best(large.sum if device == "cpu" else large.clone)
    return {
        "memory": copies * large.nbytes / seconds,
        "product": 2 * rows * inner * columns / best(lambda: torch.nn.functional.linear(a, b)),
        "disk": disk_speed(folder)[1],
    }


def one_step(folder: Path, preset: Any, plan: Plan, batch: int, steps: int) -> float:
    """Seconds of one step of CogLM."""
    model, _, _, offload = load_stages(folder, plan)
    model.decoding = fast_steps  # as in ``CogView2``
    assert offload is not None
    offload.need("coglm")
    clusters = Clusters.of(torch.arange(preset.coglm.n_codes) % SamplingConfig().n_clusters)
    sampler = Sampler(range(batch), SamplingConfig(), clusters, preset.coglm.layout.n_image)
    text = list(range(preset.coglm.n_codes + 100, preset.coglm.n_codes + 100 + TEXT))
    times = []

    def on_step(done: int) -> None:
        if done in (3, 3 + steps):  # the first three steps are a warm-up
            wait(str(plan.device))
            times.append(time.perf_counter())
        if done == 3 + steps:
            raise Enough

    with contextlib.suppress(Enough):
        model.generate([text], sampler, batch, SamplingConfig().text_weight, on_step=on_step)
    return (times[1] - times[0]) / steps


def one_pass(folder: Path, preset: Any, plan: Plan, batch: int, stage: str) -> float:
    """Seconds of one pass of a super-resolution stage."""
    _, direct, iterative, offload = load_stages(folder, plan)
    assert offload is not None and direct is not None and iterative is not None
    offload.need("direct" if stage == "direct" else "iterative")
    texts = [[preset.coglm.n_codes + 100 + i for i in range(TEXT)]] * batch
    n_cells = preset.coglm.layout.n_image if stage == "direct" else direct.config.fine_grid[0] ** 2
    codes = torch.randint(preset.coglm.n_codes, (batch, n_cells), generator=torch.Generator().manual_seed(0))
    sampler = Sampler(range(batch), SamplingConfig(top_k=40, n_clusters=0), None, direct.config.fine_grid[0] ** 2)
    times = []
    for _ in range(1 if plan.device == "cpu" else 3):
        for file in folder.glob("*-of-*.safetensors"):
            forget(file)  # so that a pass that streams its weights really reads the disk
        wait(plan.device)
        start = time.perf_counter()
        if stage == "direct":
            direct.upsample(texts, codes, sampler)
        else:
            iterative.resample(texts, codes, [sampler], replace(OFFICIAL, top_k=OFFICIAL.top_k[:1]))
        wait(plan.device)
        times.append(time.perf_counter() - start)
    return min(times)


def picture(folder: Path, memory: str, device: str) -> dict[str, float]:
    """Seconds of a whole picture, and of each stage."""
    start = time.perf_counter()
    model = CogView2.from_pretrained(folder, memory=memory, device=device)
    began = {"coglm": time.perf_counter()}

    def on_step(stage: str, done: int, total: int) -> None:
        began[f"{stage} last"] = time.perf_counter()

    model.generate("a red apple", n=1, on_step=on_step)
    end = time.perf_counter()
    return {
        "load_s": began["coglm"] - start,
        "coglm_s": began["coglm last"] - began["coglm"],
        "direct_s": began["direct last"] - began["coglm last"],
        "iterative_s": began["iterative last"] - began["direct last"],
        "s": end - began["coglm"],
    }


def floor(stage: str, weights: str, batch: int, preset: Any, speed: dict[str, float]) -> float:
    """The fewest seconds in which this machine could do the work, given its measured limits."""
    sizes = Sizes.of(preset.coglm, preset.direct, True, mapped=True)
    bits = BITS.get(weights, 16.0)
    if stage == "coglm":
        head = 2 * preset.coglm.n_codes * preset.coglm.transformer.d_model
        cache = sizes.draw_picture * batch  # half full
        return max((sizes.layers * bits / 8 + head + cache) / speed["memory"], _from_disk(weights, sizes.layers, speed))
    kind, config = (DirectSR, preset.direct) if stage == "direct" else (IterativeSR, preset.iterative)
    layers = sizes.layers + (sizes.extra if stage == "direct" else 0)
    products = batch * super_resolution_flops(config, kind, TEXT) / speed["product"]
    return max(products, _from_disk(weights, layers, speed))


def _from_disk(weights: str, layers: int, speed: dict[str, float]) -> float:
    return 2 * layers / speed["disk"] if weights == "disk" else 0.0


def formats_of(options: argparse.Namespace) -> Formats:
    """The number formats that a plan would choose for these weights on this machine."""
    preset = get_preset(options.preset)
    n_parameters = Sizes.of(preset.coglm, preset.direct, True).parameters
    return choose_formats(options.dtype, n_parameters, options.device, torch.bfloat16)


def worker(options: argparse.Namespace) -> None:
    """Measure one row, and print it as JSON."""
    torch.set_num_threads(options.threads)
    preset, (stage, weights, batch) = get_preset(options.preset), options.row
    memory = Memory()
    memory.start()
    if stage == "picture":
        row = picture(options.folder, weights, options.device)
    else:
        way: Any = weights
        formats = formats_of(options)
        plan = Plan(way, way, way, True, formats.dtype, options.device, formats.kept)
        n = int(batch)
        work = one_step if stage == "coglm" else one_pass
        row = {"s": work(options.folder, preset, plan, n, options.steps if stage == "coglm" else stage)}
    memory.ended = True
    on_gpu = options.device != "cpu"
    row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else memory.resident
    print(json.dumps(row))


def measure(options: argparse.Namespace, stage: str, weights: str, batch: int) -> dict[str, Any]:
    """One row, measured in its own process; if that is impossible, the reason."""
    if options.device != "cpu" and not torch.cuda.is_available():
        return {"not_measured": "no GPU here"}
    command = [sys.executable, __file__, str(options.folder), "--row", stage, weights, str(batch)]
    same = ["--preset", options.preset, "--device", options.device, "--threads", str(options.threads)]
    same += ["--dtype", options.dtype]
    done = subprocess.run([*command, *same, "--steps", str(options.steps)], capture_output=True, text=True)
    if done.returncode:
        return {"not_measured": done.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def said(value: Any) -> str:
    """A value as text; a float has three digits after the decimal point."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure all rows that the options ask for, print each, and write them to a file if one is given."""
    parser = argparse.ArgumentParser(description="what the stages of a large model cost on this machine")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="cogview2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="number format of the computation")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--stages", nargs="+", default=["coglm", "direct", "iterative", "picture"])
    parser.add_argument("--weights", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--memory", nargs="+", default=["6GB"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        worker(options)
        return
    preset = get_preset(options.preset)
    write_random(options.folder, preset)
    cpu = options.device == "cpu"
    torch.set_num_threads(options.threads)
    formats = formats_of(options)
    speed = limits(options.folder, options.device, formats.dtype) if cpu or torch.cuda.is_available() else {}
    name = f"{platform.machine()}, {options.threads} threads of {os.cpu_count()}"
    facts = {
        "date": date.today().isoformat(),
        "preset": options.preset,
        "torch": torch.__version__,
        "device": name if cpu else torch.cuda.get_device_name() if speed else "GPU",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "computed_in": str(formats.dtype).removeprefix("torch."),
        **{f"{what}_per_s": value for what, value in speed.items()},
    }
    print(json.dumps(facts))
    rows = []
    for stage in options.stages:
        for weights in options.memory if stage == "picture" else options.weights:
            for batch in [1] if stage == "picture" else options.batches:
                row = {"stage": stage, "weights": weights, "batch": batch}
                row |= measure(options, stage, weights, batch)
                if "s" in row and stage != "picture":
                    least = floor(stage, weights, batch, preset, speed)
                    tokens = batch * (1 if stage == "coglm" else preset.coglm.layout.n_image * preset.direct.factor**2)
                    row |= {"tokens_per_s": tokens / row["s"], "floor_s": least, "share": least / row["s"]}
                rows.append(row)
                print(", ".join(f"{key} {said(value)}" for key, value in row.items()), flush=True)
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.is_file() else []
        options.json.write_text(json.dumps([*known, {**facts, "rows": rows}], indent=1) + "\n")


if __name__ == "__main__":
    main()
