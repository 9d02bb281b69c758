"""How to run a model in the memory that there is: a plan for each stage.

The idea: three stages need weights, never all at once, and each can have them in one of four ways. In memory as they
are stored; in memory in 8 or 4 bits (``quantization.py``), which costs precision; or on the disk, from where one layer
after another is read when its turn comes (``streaming.py``), which costs time where a pass has few tokens.
Super-resolution passes thousands of tokens through every layer, so reading hides behind the arithmetic; drawing passes
one. So what a small machine should do follows from sizes alone, and ``choose_plan`` takes the first way that fits.

The number format of the computation follows from what the machine does well (``machine.py``). Where that is float32,
the matrices of a large model stay in half precision, and products convert them piece by piece (``mixed_precision.py``).

Mirrors: nothing. The original keeps three models in 40 GB of GPU memory.

Simplified: the sizes of activations are estimates, a little above what was measured (docs/notes.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from minicogview.config import CogLMConfig, SuperResolutionConfig
from minicogview.errors import MiniCogViewError
from minicogview.scale.machine import bfloat16_pays, free_memory, parse_dtype

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
FIXED, FIXED_TOY = int(1.05e9), int(0.4e9)
TINY, SMALL = 10**8, 10**9  # parameters: the toy is below the first; below the second float32 is used, and no plan told
MOST = 8  # pictures side by side


@dataclass(frozen=True)
class Plan:
    """How each stage has its weights.

    Attributes:
        coglm, direct, iterative: of the three stages.
        one_by_one: only the stage at work has weights in memory (on a GPU, quantized ones wait in the CPU's memory).
        dtype: number format of the computation. device: where it happens.
        kept: number format of matrices and tables; None: that of the computation.
        batch: pictures side by side at most; None leaves it to each stage.
        needed: bytes that this takes, estimated; 0 where nobody asked.
    """

    coglm: Way = "memory"
    direct: Way = "memory"
    iterative: Way = "memory"
    one_by_one: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    kept: torch.dtype | None = None
    batch: int | None = None
    needed: int = 0

    @property
    def matrices(self) -> torch.dtype:
        """Number format of matrices and tables."""
        return self.kept or self.dtype

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
        dtype, kept = (str(each).removeprefix("torch.") for each in (self.dtype, self.matrices))
        computed = dtype if dtype == kept else f"{dtype} with matrices in {kept}"
        return f"{said}; {computed} on {self.device}{size}"


def parse_memory(text: str, device: str = "cpu") -> int | None:
    """Bytes that "6GB", "800MB" or "auto" stand for; "auto" is nine tenths of what is free on the device.

    Returns:
        the bytes; None for "auto" on a system that does not tell, which sets no limit.

    Raises:
        MiniCogViewError: if it is none of these.
    """
    if text == "auto":
        free = free_memory(device)
        return None if free is None else int(0.9 * free)
    number = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|MB)", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise MiniCogViewError(f"memory {text!r}: write auto, or a size such as 6GB, 12GB, 24GB")
    return int(float(number[1]) * (1e9 if number[2].upper() == "GB" else 1e6))


class Formats(NamedTuple):
    """Number formats of a computation, and of the matrices and tables that it uses."""

    dtype: torch.dtype
    kept: torch.dtype


def choose_formats(name: str, parameters: int, device: torch.device | str, stored: torch.dtype) -> Formats:
    """The number format of this name, and the format that matrices are kept in.

    Args:
        name: "float32", "bfloat16" or "float16"; or "auto": float32 for a small model. A large one computes in half
            precision on a GPU, and on a CPU where that is faster (``machine.bfloat16_pays``); elsewhere in float32.
        parameters: numbers in the weights.
        stored: the format of the weight files. A large model that computes in float32 on a CPU keeps its matrices so.

    Raises:
        MiniCogViewError: if there is no format of that name.
    """
    large, on_cpu = parameters >= SMALL, torch.device(device).type == "cpu"
    if name != "auto":
        dtype = parse_dtype(name)
    elif large and bfloat16_pays(device):
        dtype = torch.bfloat16
    else:
        dtype = torch.float16 if large and not on_cpu else torch.float32
    if not (large and on_cpu and dtype == torch.float32):
        return Formats(dtype, dtype)
    if stored == torch.float32 and name == "auto":
        return Formats(dtype, torch.bfloat16)
    return Formats(dtype, stored)


@dataclass(frozen=True)
class Sizes:
    """Numbers in the weights of a system, and bytes of what is computed on the way for one picture."""

    layers: int  # of CogLM; the iterative stage has as many
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
            fine_picture=15 * rows * columns * t.d_model,
            stages=1 if direct is None else 3 if iterative else 2,
        )

    @property
    def parameters(self) -> int:
        """Numbers in all weights; each counted once."""
        base = self.layers + self.tables
        return base + (self.extra if self.stages > 1 else 0) + (base if self.stages > 2 else 0)


def bytes_of(ways: Ways, sizes: Sizes, formats: Formats, pictures: int = 1) -> int:
    """Bytes at the peak of a plan, estimated."""
    *stages, one_by_one = ways
    shared = ways[0] == ways[1] == "memory"  # the direct stage then stands on the same layers, else on the same tables
    layers = [sizes.layers, sizes.extra + (0 if shared else sizes.layers), sizes.layers]
    tables = [sizes.tables, 0, sizes.tables]
    kept, idle, at_work = formats.kept.itemsize, [], []
    for way, n, table in zip(stages, layers, tables, strict=True):
        stays = 0.0 if way == "disk" else n * (BITS[way] / 8 if way in BITS else kept)
        idle.append(stays + table * kept)
        at_work.append(LAYERS_AHEAD * n / sizes.n_layers * kept if way == "disk" else 0.0)
    computed = [sizes.draw_picture, sizes.fine_picture, sizes.fine_picture]
    peaks = []
    for i in range(sizes.stages):
        weights = sum(idle[: sizes.stages])
        if one_by_one:
            weights = idle[i] + (idle[0] if i == 1 and shared else 0) + (tables[0] * kept if i == 1 else 0)
        peaks.append(weights + at_work[i] + computed[i] * formats.dtype.itemsize * pictures)
    return int(max(peaks)) + (FIXED if sizes.parameters >= TINY else FIXED_TOY)


def choose_plan(
    sizes: Sizes, budget: int | None, formats: Formats, device: str = "cpu", one_by_one: bool = False
) -> Plan:
    """The first way that fits into ``budget`` bytes, and how many pictures fit side by side.

    Args:
        budget: None sets no limit.
        one_by_one: have the weights as they are stored, and those of one stage at a time.

    Raises:
        MiniCogViewError: if none fits; it says how much the smallest takes.
    """
    choice = ON_CPU if torch.device(device).type == "cpu" else ON_GPU
    for ways in (ONE_BY_ONE,) if one_by_one else choice:
        needed = bytes_of(ways, sizes, formats)
        if budget is None or needed <= budget:
            batch = None if sizes.parameters < TINY else side_by_side(ways, sizes, formats, budget)
            return Plan(*ways, formats.dtype, device, formats.kept, batch, needed)
    assert budget is not None
    raise MiniCogViewError(
        f"{budget / 1e9:.2f} GB of memory are not enough: {SAID[ways[0]]}, which is the least, take about "
        f"{needed / 1e9:.2f} GB; close other programs, or give more"
    )


def side_by_side(ways: Ways, sizes: Sizes, formats: Formats, budget: int | None) -> int:
    """How many pictures fit into ``budget`` bytes together, at most ``MOST``."""
    if budget is None:
        return MOST
    one, two = (bytes_of(ways, sizes, formats, pictures) for pictures in (1, 2))
    return 1 + min(MOST - 1, (budget - one) // max(two - one, 1))
