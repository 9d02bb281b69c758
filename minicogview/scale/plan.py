"""How to run a model in the memory that there is: a plan for each stage.

The idea: three stages need weights, never all at once, and each can have them in four ways. In memory as they are; in
memory in eight or four bits (``scale/quantization.py``), which costs precision; or on the disk, from where one layer after
another is read when its turn comes (``scale/streaming.py``), which costs time where a pass has few tokens. Super-resolution
passes thousands of tokens through every layer, so reading hides behind the arithmetic; drawing passes one. So what a
small machine should do follows from sizes alone, and ``choose_plan`` takes the first way that fits.

Mirrors: nothing. The original keeps three models in 40 GB of GPU memory.

Simplified: sizes of what is computed on the way are estimates, a little above what was measured (docs/notes.md).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minicogview.config import CogLMConfig, SuperResolutionConfig
from minicogview.errors import MiniCogViewError

Way = Literal["memory", "int8", "int4", "disk"]
Ways = tuple[Way, Way, Way, bool]  # of the three stages, and whether only the stage at work is in memory

# From the best to the smallest. A processor takes longer for a pass than a disk for its weights, a GPU does not.
ON_CPU: tuple[Ways, ...] = (
    ("memory", "memory", "memory", False),
    ("memory", "disk", "disk", False),
    ("int8", "disk", "disk", False),
    ("int4", "disk", "disk", False),
    ("disk", "disk", "disk", False),
)
ON_GPU: tuple[Ways, ...] = (
    ("memory", "memory", "memory", False),
    ("memory", "memory", "memory", True),
    ("int8", "int8", "int8", True),
    ("int4", "disk", "disk", True),
    ("disk", "disk", "disk", False),
)
ONE_BY_ONE: Ways = ("memory", "memory", "memory", True)
SAID = {
    "memory": "weights as they are",
    "int8": "8-bit weights",
    "int4": "4-bit weights",
    "disk": "layers from the disk",
}
BITS = {"int8": 8.5, "int4": 4.5}  # of a weight, its share of scale and offset included: 32 bits for 64 weights
LAYERS_AHEAD = 3  # from the disk: the layer at work, the one that is read, and what is left of the one before
# Bytes beside weights: Python and PyTorch; the full picture tokenizer at work, logits of 512 fine tokens.
FIXED, FIXED_TOY = int(1.2e9), int(0.4e9)
TINY, SMALL = 10**8, 10**9  # parameters: the toy is below the first; below the second float32 is used, and no plan told
MOST = 8  # pictures side by side


@dataclass(frozen=True)
class Plan:
    """How each stage has its weights.

    Attributes:
        coglm, direct, iterative: of the three stages.
        one_by_one: only the stage at work has weights in memory (on a GPU those in few bits wait in the computer's).
        dtype: number format of the computation. device: where it happens.
        batch: pictures side by side at most; None leaves it to each stage.
        needed: bytes that this takes, estimated; 0 where nobody asked.
    """

    coglm: Way = "memory"
    direct: Way = "memory"
    iterative: Way = "memory"
    one_by_one: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    batch: int | None = None
    needed: int = 0

    def __str__(self) -> str:
        ways = {"CogLM": self.coglm, "direct stage": self.direct, "iterative stage": self.iterative}
        if self.direct == self.iterative:
            ways = {"CogLM": self.coglm, "super-resolution": self.direct}
        said = ", ".join(f"{stage} with {SAID[way]}" for stage, way in ways.items())
        if self.coglm == self.direct == self.iterative == "memory":
            said = "all weights in memory"
        if self.one_by_one:
            said += ", of one stage at a time"
        size = f", about {self.needed / 1e9:.1f} GB" if self.needed else ""
        return f"{said}; {str(self.dtype).removeprefix('torch.')} on {self.device}{size}"


def parse_memory(text: str, device: str = "cpu") -> int:
    """Bytes that "6GB", "800MB" or "auto" stand for; "auto" is nine tenths of what is free on the device.

    Raises:
        MiniCogViewError: if it is none of these.
    """
    if text == "auto":
        return int(0.9 * free_memory(device))
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB)", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise MiniCogViewError(f"memory {text!r}: write auto, or a size such as 6GB, 12GB, 24GB")
    return int(float(number[1]) * (1e9 if number[2].upper() == "GB" else 1e6))


def parse_dtype(text: str, parameters: int) -> torch.dtype:
    """The number format of this name; "auto" is float32 for small models, else bfloat16.

    Raises:
        MiniCogViewError: if there is none of that name.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text == "auto":
        return torch.float32 if parameters < SMALL else torch.bfloat16
    if text not in known:
        raise MiniCogViewError(f"dtype {text!r}: choose auto, {', '.join(known)}")
    return known[text]


def check_device(name: str) -> None:
    """Raise MiniCogViewError unless there is such a device here."""
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise MiniCogViewError(f"device {name!r} cannot be used here ({reason}): use cpu, or cuda on a GPU") from None


def free_memory(device: str = "cpu") -> int:
    """Bytes that programs can still have on a device; what there is in all where the system tells no more."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if info.exists():
        fields = dict(row.split(":", 1) for row in info.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


@dataclass(frozen=True)
class Sizes:
    """Numbers in the weights of a system, and bytes of what is computed on the way for one picture."""

    layers: int  # of CogLM; LoPAR's are as many
    tables: int  # token and position tables, as far as they are in memory
    extra: int  # what the direct stage has beside CogLM's
    n_layers: int
    draw_picture: int  # numbers in the KV cache
    fine_picture: int  # numbers in the largest tensors of a super-resolution pass
    stages: int = 3

    @classmethod
    def of(
        cls, coglm: CogLMConfig, direct: SuperResolutionConfig | None, iterative: bool, mapped: bool = False
    ) -> Sizes:
        """From configurations.

        Args:
            mapped: whether tables are used as they lie in their file, so that rows of text not asked for stay there.
        """
        t, n_text = coglm.transformer, 96 if direct is None else direct.n_text
        block = 12 * t.d_model**2 + 17 * t.d_model  # matrices; biases and four norms
        attention = 4 * t.d_model**2 + 4 * t.d_model
        rows, columns = (0, 0) if direct is None else direct.fine_grid
        own = block if direct is not None and direct.own_layers else attention
        return cls(
            layers=t.n_layers * block,
            tables=((coglm.n_codes if mapped else t.vocab_size) + t.max_positions) * t.d_model,
            extra=0 if direct is None else t.n_layers * own + rows * columns * t.d_model,
            n_layers=t.n_layers,
            draw_picture=2 * t.n_layers * t.d_model * (n_text + 1 + coglm.layout.n_image),
            fine_picture=20 * rows * columns * t.d_model,
            stages=1 if direct is None else 3 if iterative else 2,
        )

    @property
    def parameters(self) -> int:
        """Numbers in all weights; each counted once."""
        base = self.layers + self.tables
        return base + (self.extra if self.stages > 1 else 0) + (base if self.stages > 2 else 0)


def bytes_of(ways: Ways, sizes: Sizes, dtype: torch.dtype, pictures: int = 1) -> int:
    """Bytes at the peak of a plan, estimated."""
    *stages, one_by_one = ways
    shared = ways[0] == ways[1] == "memory"  # the direct stage then stands on the same layers, else on the same tables
    layers = [sizes.layers, sizes.extra + (0 if shared else sizes.layers), sizes.layers]
    tables = [sizes.tables, 0, sizes.tables]
    size, idle, at_work = dtype.itemsize, [], []
    for way, n, table in zip(stages, layers, tables, strict=True):
        stays = 0.0 if way == "disk" else n * (BITS[way] / 8 if way in BITS else size)
        idle.append(stays + table * size)
        at_work.append(LAYERS_AHEAD * n / sizes.n_layers * size if way == "disk" else 0.0)
    computed = [sizes.draw_picture, sizes.fine_picture, sizes.fine_picture]
    peaks = []
    for i in range(sizes.stages):
        weights = sum(idle[: sizes.stages])
        if one_by_one:
            weights = idle[i] + (idle[0] if i == 1 and shared else 0) + (tables[0] * size if i == 1 else 0)
        peaks.append(weights + at_work[i] + computed[i] * size * pictures)
    return int(max(peaks)) + (FIXED if sizes.parameters >= TINY else FIXED_TOY)


def choose_plan(sizes: Sizes, budget: int, dtype: torch.dtype, device: str = "cpu", one_by_one: bool = False) -> Plan:
    """The first way that fits into ``budget`` bytes, and how many pictures fit side by side.

    Args:
        one_by_one: have the weights as they are, and of one stage at a time.

    Raises:
        MiniCogViewError: if none fits; it says how much the smallest takes.
    """
    choice = ON_GPU if torch.device(device).type == "cuda" else ON_CPU
    for ways in (ONE_BY_ONE,) if one_by_one else choice:
        needed = bytes_of(ways, sizes, dtype)
        if needed <= budget:
            each = bytes_of(ways, sizes, dtype, pictures=2) - needed
            batch = 1 + min(MOST - 1, (budget - needed) // max(each, 1))
            return Plan(*ways, dtype, device, None if sizes.parameters < TINY else batch, needed)
    raise MiniCogViewError(
        f"{budget / 1e9:.2f} GB of memory are not enough: {SAID[ways[0]]}, which is the least, take about "
        f"{needed / 1e9:.2f} GB; close other programs, or give more"
    )
