"""Importing a released model of full size: time and memory, compared with the speed of the disk.

It writes a file of random half-precision weights in the format of the release (CogLM of the preset, 12 GB for
cogview2), imports it, and reads the result back. Just before, it measures the speed of the disk in the same folder: a
large file is written and flushed, then read again after its pages have been dropped from memory (if the system allows
that).

    python benchmarks/importing.py FOLDER                     needs 26 GB on the disk and 14 GB of memory
    python benchmarks/importing.py FOLDER --layers 4          a part of the model
    python benchmarks/importing.py FOLDER --json FILE         also writes the numbers to a file
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minicogview.checkpoints.importing import MODELS, import_released
from minicogview.checkpoints.sat import ours_to_sat
from minicogview.checkpoints.weight_files import load_weights
from minicogview.coglm import CogLM
from minicogview.config import Preset, get_preset


def write_random(folder: Path, preset: Preset) -> None:
    """A folder of random weights in the form that the authors uploaded theirs in."""
    sizes = preset.coglm.transformer
    place = folder / MODELS["coglm"] / "20000"
    place.mkdir(parents=True)
    (place.parent / "latest").write_text("20000")
    said = {
        "num_layers": sizes.n_layers,
        "hidden_size": sizes.d_model,
        "num_attention_heads": sizes.n_heads,
        "vocab_size": sizes.vocab_size,
        "max_sequence_length": sizes.max_positions,
        "layernorm_order": "sandwich",
        "model_parallel_size": 1,
    }
    (place.parent / "model_config.json").write_text(json.dumps(said))
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in CogLM(preset.coglm).state_dict().items()}
    block = (torch.randn(2**24) * 0.02).half()
    module = {}
    for name, shape in shapes.items():
        flat = torch.empty(shape.numel(), dtype=torch.half)
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            part.copy_(block[: len(part)])
        module[ours_to_sat(name)] = flat.view(shape)
    torch.save({"module": module}, place / "mp_rank_00_model_states.pt")


def forget(path: Path) -> None:
    """Have the system drop a file's pages from memory, so that reading it again reads the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path, gigabytes: float = 2) -> tuple[float, float]:
    """Bytes per second of writing and flushing a file, and of reading it again."""
    path, block = folder / "speed.bin", os.urandom(2**24)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(round(gigabytes * 64)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    wrote = time.perf_counter() - start
    forget(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return gigabytes * 2**30 / wrote, gigabytes * 2**30 / read


class Memory(threading.Thread):
    """A thread that records this process's peak memory in GB: without pages of mapped files, and with them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.resident = 0.0
        self.ended = False

    def run(self) -> None:
        while not self.ended:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            own, resident = (int(status[name].split()[0]) / 1e6 for name in ("RssAnon", "VmRSS"))
            self.own, self.resident = max(self.own, own), max(self.resident, resident)
            time.sleep(0.02)


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="importing a released model of full size")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="cogview2")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    preset = get_preset(options.preset)
    if options.layers:
        transformer = dataclasses.replace(preset.coglm.transformer, n_layers=options.layers)
        preset = preset.with_coglm(dataclasses.replace(preset.coglm, transformer=transformer))
    options.folder.mkdir(parents=True, exist_ok=True)
    source, target = options.folder / "release", options.folder / "weights"
    for path in (source, target):
        shutil.rmtree(path, ignore_errors=True)
    write, read = disk_speed(options.folder)
    print(f"disk: writes {write / 1e9:.2f} GB/s, reads {read / 1e9:.2f} GB/s", flush=True)
    write_random(source, preset)
    file = source / MODELS["coglm"] / "20000" / "mp_rank_00_model_states.pt"
    size = file.stat().st_size
    forget(file)
    with torch.device("meta"):
        largest = max(p.numel() * 2 for p in CogLM(preset.coglm).parameters())
    memory = Memory()
    start_own = int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1e6
    memory.start()
    took = timed(lambda: import_released(source, target, preset))
    memory.ended = True
    for part in target.glob("*.safetensors"):
        forget(part)
    opened = timed(lambda: load_weights(target / "coglm.safetensors", "coglm", dtype=None))
    possible = 1 / (1 / write + 1 / read)  # every byte is read once and written once
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, torch {torch.__version__}",
        "gigabytes": size / 1e9,
        "disk_write_gb_s": write / 1e9,
        "disk_read_gb_s": read / 1e9,
        "import_s": took,
        "import_gb_s": size / took / 1e9,
        "share_of_disk": size / took / possible,
        "share_of_writing": size / took / write,
        "largest_tensor_gb": largest / 1e9,
        "peak_own_gb": memory.own - start_own,
        "peak_resident_gb": memory.resident,
        "open_s": opened,
    }
    for name, value in result.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    for path in (source, target):
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
