"""What this machine is and what it does well: its device, its free memory, and the number format of its products.

The idea: half-precision numbers take half the memory everywhere, but only some processors multiply them quickly. Where
a processor has no instructions for bfloat16, PyTorch converts the numbers one after another, and a product takes 5 to
60 times as long as in float32. What a processor claims about itself does not tell how well PyTorch uses it, so a short
product is timed, once per process. Everything that has to choose a number format by itself asks here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from minicogview.errors import MiniCogViewError
from minicogview.scale import threads

CGROUPS = Path("/sys/fs/cgroup")  # where Linux tells how much memory a container may have
SMALL = 10**8  # weights: with fewer, a step is too short to be shared among threads
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# --- devices


def pick_device(name: str = "auto") -> torch.device:
    """The device of this name; "auto" takes a GPU where there is one: cuda, then mps, otherwise the CPU.

    Raises:
        MiniCogViewError: if there is no such device here, or nothing can be computed on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes shapes only")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: torch without CUDA
        reason = str(error).splitlines()[0].split(". ")[0]
        raise MiniCogViewError(
            f"device {name!r} cannot be used here ({reason}): use auto, cpu, or cuda on a machine with a GPU"
        ) from None
    return device


# --- number formats


@lru_cache(maxsize=1)
def cpu_speeds() -> dict[torch.dtype, float]:
    """Floating-point operations per second of a product on this CPU, in float32 and in bfloat16; timed once."""
    speeds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(128, 512).to(dtype), torch.ones(512, 512).to(dtype)
        F.linear(x, weight)  # the first call sets the library up
        seconds = min(seconds_of_product(x, weight) for _ in range(3))
        speeds[dtype] = 2 * 128 * 512 * 512 / seconds
    return speeds


def seconds_of_product(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Seconds that one product takes."""
    start = time.perf_counter()
    F.linear(x, weight)
    return time.perf_counter() - start


def bfloat16_pays(device: torch.device | str = "cpu") -> bool:
    """Whether products of many rows are faster in bfloat16 than in float32 on a device."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and cpu_speeds()[torch.bfloat16] > 1.1 * cpu_speeds()[torch.float32]


def training_precision(precision: str, device: torch.device | str) -> Literal["fp32", "bf16"]:
    """The precision of forward passes in training; "auto" is bf16 where that is faster, and fp32 elsewhere.

    Raises:
        MiniCogViewError: for another name than auto, fp32 or bf16.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise MiniCogViewError(f"unknown precision {precision!r}: choose auto, fp32 or bf16")
    if precision == "auto":
        return "bf16" if bfloat16_pays(device) else "fp32"
    return "fp32" if precision == "fp32" else "bf16"


def parse_dtype(name: str) -> torch.dtype:
    """The number format of this name.

    Raises:
        MiniCogViewError: if there is none of that name.
    """
    if name not in DTYPES:
        raise MiniCogViewError(f"dtype {name!r}: choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Within this context new tensors are float32, whatever the process has chosen. Also used as a decorator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- threads


def is_small(model: nn.Module) -> bool:
    """Whether the work on a model's layers comes in pieces that are too short to be shared among threads."""
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL


@contextmanager
def one_thread() -> Iterator[None]:
    """Within this context PyTorch computes on one thread of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sleeping_threads(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which no thread waits in a loop while a small model works.

    If PyTorch was loaded before this package, its idle threads do wait so (``threads.py``), and the
    only remedy is to do without them.
    """
    return one_thread() if threads.SPIN and is_small(model) else nullcontext()


# --- memory


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that programs can still have on a device; None where the system does not tell.

    In a container it is what its control group still allows, if that is less than what the machine has free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = [room for room in (system_memory(), *cgroup_rooms()) if room is not None]
    return min(known) if known else None


def system_memory() -> int | None:
    """Bytes that the operating system can still give away; all that there are where it tells no more."""
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(row.split(":", 1) for row in info.read_text().splitlines() if ":" in row)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    names = getattr(os, "sysconf_names", {})  # Windows has none of them
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def cgroup_rooms(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group around this process still allows (Linux, versions 1 and 2)."""
    if not own.exists():
        return
    for line in own.read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = top / path.lstrip("/")
        groups = [group for group in (place, *place.parents) if group == top or top in group.parents]
        yield from (room for group in groups if (room := cgroup_room(group, *names)) is not None)


def cgroup_room(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    """What one group still allows: its limit less what it uses, cached files not counted; None without a limit."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / used).read_text()) - int(statistics.get(reclaimable, 0))
        return max(0, int(most) - max(0, taken))
    except (OSError, ValueError):
        return None
