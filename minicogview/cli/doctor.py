"""``minicogview doctor``: what is in a folder of weights, and what would run on this machine, in words.

The idea: whoever has 40 GB of released files wants to know before the first run whether anything is missing or damaged,
how the weights would run in the memory of this machine (``scale/plan.py``), in which number format
(``scale/machine.py``), and about how long a picture would take. Time follows from two speeds that are measured on the
spot: of a large sum, since drawing token by token reads all weights again and again, and of a large matrix product,
since super-resolution passes thousands of tokens at a time.

Simplified: times are the least that the measured speeds allow; real runs take up to twice as long.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from minicogview.checkpoints.importing import MODELS, RELEASED, check_source, check_vqvae, find_parts
from minicogview.checkpoints.models import check_fit, find_folder, stage_config
from minicogview.checkpoints.reading import check_finite, check_fits, compare_checksum, refuse_pointer
from minicogview.checkpoints.sat import SatFolder
from minicogview.checkpoints.shards import INDEX, Shards
from minicogview.checkpoints.weight_files import (
    FILES,
    build,
    has_weights,
    load_config,
    load_part,
    load_weights,
)
from minicogview.clusters import load_labels
from minicogview.coglm import CogLM
from minicogview.config import PRESETS, Preset, get_preset
from minicogview.errors import MiniCogViewError
from minicogview.evaluation.cost import costs
from minicogview.lopar import IterativeSR
from minicogview.scale.machine import bfloat16_pays, cpu_speeds, free_memory
from minicogview.scale.plan import BITS, Plan, Sizes, choose_formats, choose_plan, parse_memory
from minicogview.super_resolution import DirectSR
from minicogview.tokenizer import Tokenizer
from minicogview.vqvae import VQVAE

MODEL_TYPES = {"coglm": CogLM, "direct": DirectSR, "iterative": IterativeSR, "vqvae": VQVAE}
NAMES = {
    "coglm": "CogLM (first stage)",
    "direct": "direct stage",
    "iterative": "iterative stage",
    "vqvae": "picture tokenizer",
    "text": "text tokenizer",
    "labels": "cluster labels",
}
WITHOUT = {
    "coglm": "nothing can be drawn",
    "direct": "pictures stay coarse",
    "iterative": "pictures stay as the direct stage made them",
    "vqvae": "tokens cannot be shown",
    "text": "texts cannot be read",
    "labels": "clusters are made by k-means instead",
}


def doctor(source: str | Path, preset: Preset | None = None, verify: bool = False) -> list[str]:
    """A report about a folder of weights, of the release or of this package, as lines of text.

    Args:
        preset: sizes to expect; None: the sizes that are found, or those of the release.
        verify: also read the files of an index, to compare them with their checksums and to find NaN and infinity;
            single files are always read.

    Raises:
        MiniCogViewError: if there is no such folder.
    """
    folder = find_folder(source)
    if find_parts(folder):
        return released(folder, preset or get_preset("cogview2"))
    lines, found = imported(folder, verify)
    return [*lines, *machine(preset or found)]


def released(folder: Path, preset: Preset) -> list[str]:
    """Which files of the release a folder has, and whether each holds what its name says."""
    lines, parts, ready = [f"{folder}: files of the release, to be imported"], find_parts(folder), 0
    for name, title in NAMES.items():
        if name not in parts:
            lines.append(line(title, f"{RELEASED[name]} is missing: without it {WITHOUT[name]}"))
            continue
        try:
            if name in MODELS:
                model = check_source(name, SatFolder(parts[name]), preset)
                size = sum(model.sizes().values())
                ranks = len(model.folder.files)
                said = f"{size / 1e9:.1f} GB, {ranks} rank{'s' if ranks > 1 else ''}: names and shapes are right"
                ready += size
            else:
                check_released(parts[name], name, preset)
                said = f"{parts[name].stat().st_size / 1e9:.3f} GB"
        except MiniCogViewError as error:
            said = f"UNUSABLE: {error}"
        lines.append(line(title, said))
    free = shutil.disk_usage(folder).free
    lines.append(line("to import", f"at most {ready / 1e9:.1f} GB on the disk; it has {free / 1e9:.1f} GB free"))
    lines.append(f"next: minicogview import {folder} FOLDER")
    return lines


def check_released(path: Path, name: str, preset: Preset) -> None:
    """Raise MiniCogViewError if a released file beside the three models is not what its name says."""
    refuse_pointer(path)
    if name == "vqvae":
        check_vqvae(path, preset)
    elif name == "labels":
        load_labels(path, preset.vqvae.codebook_size)
    else:
        Tokenizer(path, preset.vqvae.codebook_size)


def imported(folder: Path, verify: bool) -> tuple[list[str], Preset | None]:
    """What a folder of this package's own files has, and the preset whose sizes these are."""
    lines, preset = [f"{folder}: weights of this package"], None
    for name, title in NAMES.items():
        path = folder / FILES[name]
        if not has_weights(path):
            lines.append(line(title, f"{path.name} is missing: without it {WITHOUT[name]}"))
            continue
        try:
            said = check_weights(path, name, verify)
            if name == "coglm":
                config = load_config(path, "coglm")
                preset = next((p for p in PRESETS.values() if p.coglm == config), None)
        except MiniCogViewError as error:
            said = f"UNUSABLE: {error}"
        lines.append(line(title, said))
    lines.append(line("sizes", f"those of the preset {preset.name}" if preset else "of no preset"))
    return lines, preset


def check_weights(path: Path, name: str, verify: bool) -> str:
    """The size of a part of the system, and what was compared with a checksum.

    Raises:
        MiniCogViewError: if the part is damaged, or belongs to another model than the rest of the folder.
    """
    index = path.with_suffix(INDEX)
    if path.is_file():
        compared = compare_checksum(path, again=True)
        said = "its checksum is right" if compared else "not verified: there is no checksum"
        check_part(path, name, whole=True)
        return f"{path.stat().st_size / 1e6:.2f} MB, {said}"
    shards = Shards(index)
    size = sum((path.parent / file).stat().st_size for file in shards.files)
    said = "not verified: --verify compares checksums" if shards.sha256 else "not verified: there are no checksums"
    if verify and shards.sha256:
        n = shards.verify()
        said = "checksums are right" if n == len(shards.files) else f"only {n} have a checksum, which is right"
    check_part(path, name, whole=verify)
    return f"{size / 1e9:.1f} GB in {len(shards.files)} files, {said}"


def check_part(path: Path, name: str, whole: bool) -> None:
    """Raise MiniCogViewError if ``generate`` would refuse a file.

    Args:
        whole: also read all weights, to find NaN and infinity.
    """
    coglm = path.with_name(FILES["coglm"])
    if name in ("text", "labels"):
        check_small(path, name)
    else:
        if name in ("direct", "iterative"):
            stage_config(path, name, load_config(coglm, "coglm"), allow_other_base=False)
            config, state = load_part(path, name, coglm, None)
        else:
            config, state = load_weights(path, name, None)
        check_fits(build(lambda: MODEL_TYPES[name](config), path), state, path)
        for weight, value in state.items() if whole else ():
            check_finite(weight, value, path)


def check_small(path: Path, name: str) -> None:
    """The same for the text model and the label file, as far as there are models to compare them with."""
    refuse_pointer(path)
    sizes = {}
    for kind in ("coglm", "vqvae"):
        with suppress(MiniCogViewError):  # reported in a line of its own
            sizes[kind] = load_config(path.with_name(FILES[kind]), kind)
    if name == "labels":
        if "coglm" in sizes:
            load_labels(path, sizes["coglm"].n_codes)
        return
    tokenizer = Tokenizer(path, sizes["vqvae"].codebook_size if "vqvae" in sizes else 1)
    if len(sizes) == 2:
        check_fit(sizes["coglm"], tokenizer, path.parent)


def machine(preset: Preset | None) -> list[str]:
    """How the weights would run here in a given memory, and the least time that one picture would take."""
    free = free_memory()
    memory = "an unknown amount of memory" if free is None else f"{free / 1e9:.1f} GB of memory"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines = [line("this machine", f"{os.cpu_count()} cores, {memory} free, {gpu}")]
    lines.append(line("number format", format_here()))
    if preset is None:
        return lines
    sizes = Sizes.of(preset.coglm, preset.direct, iterative=True, mapped=True)
    formats = choose_formats("auto", sizes.parameters, "cpu", stored=torch.bfloat16)
    read, multiply = reading_speed(), product_speed(formats.dtype)
    lines.append(line("measured", f"reads {read / 1e9:.1f} GB/s, products {multiply / 1e9:.0f} GFLOP/s"))
    said = ""
    for budget in ("6GB", "12GB", "24GB", "auto"):
        try:
            plan = choose_plan(sizes, parse_memory(budget), formats)
        except MiniCogViewError as error:
            lines.append(line(f"--memory {budget}", f"TOO LITTLE: {error}"))
            continue
        if str(plan) != said:
            said = str(plan)
            seconds = least_time(preset, plan, read, multiply)
            lines.append(line(f"--memory {budget}", f"{plan}; a picture takes {seconds}"))
    return lines


def format_here() -> str:
    """Which number format the CPU's products are faster in, and by how much."""
    speeds = cpu_speeds()
    single, half = (speeds[dtype] / 1e9 for dtype in (torch.float32, torch.bfloat16))
    chosen = "bfloat16" if bfloat16_pays() else "float32"
    return f"{chosen} for large models and training: {single:.0f} GFLOP/s in float32, {half:.0f} in bfloat16"


def least_time(preset: Preset, plan: Plan, read: float, multiply: float) -> str:
    """Seconds of one picture if reading weights (bytes a second) and products (operations a second) were all."""
    sizes = Sizes.of(preset.coglm, preset.direct, iterative=True, mapped=True)
    stages = costs(preset)["stages"]
    passes = (stages["direct"]["flops"] + stages["iterative"]["flops"]) / multiply
    if plan.coglm == "disk":
        return "very long: every token reads all layers from the disk"
    of_weight = BITS[plan.coglm] / 8 if plan.coglm in BITS else plan.matrices.itemsize
    first = preset.coglm.layout.n_image * sizes.layers * of_weight / read
    return f"at least {first:.0f} s in the first stage and {passes:.0f} s in super-resolution"


def reading_speed() -> float:
    """Bytes that the CPU reads from memory in a second, by a large sum."""
    large = torch.ones(2**27, dtype=torch.uint8)
    return large.numel() / min(seconds_of(lambda: large.view(torch.int64).sum()) for _ in range(4))


def product_speed(dtype: torch.dtype) -> float:
    """Operations of a large product in a second, on the CPU."""
    a, b = torch.ones(1024, 2048).to(dtype), torch.ones(2048, 2048).to(dtype)
    return 2 * 1024 * 2048 * 2048 / min(seconds_of(lambda: a @ b) for _ in range(3))


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds that something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def line(title: str, said: str) -> str:
    """One row of the report."""
    return f"  {title:28}{said}"
