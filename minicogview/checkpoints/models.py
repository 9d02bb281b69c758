"""From a folder of weights to models: which preset they belong to, whether files fit together, and how to load.

The idea: a plan (``scale/plan.py``) says how each stage has its weights: in memory, quantized, or layer by layer from
the disk. ``load_stages`` first builds all models without weights, then gives each its own in the way of the plan,
either at once or when the stage has to work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minicogview.checkpoints.reading import FLOATS, check_finite, compare_checksum
from minicogview.checkpoints.weight_files import (
    FILES,
    STAGES,
    build,
    has_weights,
    load_config,
    load_into,
    load_part,
    load_weights,
    other_base,
    remember_identity,
    same_as_coglm,
    stored_dtype,
)
from minicogview.coglm import CogLM
from minicogview.config import PRESETS, CogLMConfig, Preset, SuperResolutionConfig, VQVAEConfig, get_preset
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.scale.machine import pick_device
from minicogview.scale.mixed_precision import in_pieces, keep_half
from minicogview.scale.offload import Offload, State
from minicogview.scale.plan import BITS, Plan, Sizes, Way, choose_formats, choose_plan, parse_memory
from minicogview.scale.quantization import Bits, quantize_layers
from minicogview.scale.streaming import forget_pages, mapped_from_files, stream_layers
from minicogview.super_resolution import DirectSR
from minicogview.tokenizer import Tokenizer
from minicogview.transformer import Transformer

SHIPPED = Path(__file__).parents[1] / "weights"
NEEDED = "vqvae.safetensors, coglm.safetensors and text.model"


def find_folder(source: str | Path) -> Path:
    """The folder of a preset's shipped weights, or the user's own."""
    if isinstance(source, str) and source in PRESETS:
        if (SHIPPED / source).is_dir():
            return SHIPPED / source
        raise MiniCogViewError(f"no weights ship with the preset {source!r}: give a folder of your own with {NEEDED}")
    folder = Path(source)
    if folder.is_dir():
        return folder
    raise MiniCogViewError(
        f"{str(source)!r} is neither a preset ({', '.join(PRESETS)}) nor a folder: give one of these names, "
        f"or a folder with {NEEDED}"
    )


def preset_of(name: str | None, config: CogLMConfig, vqvae: VQVAEConfig, folder: Path) -> Preset:
    """The named preset, or the one that has the sizes found in a folder."""
    if name is not None:
        return get_preset(name)
    for preset in PRESETS.values():
        if preset.coglm == config and preset.vqvae == vqvae:
            return preset
    raise MiniCogViewError(
        f"the weights in {folder} have the sizes of no preset: name the preset whose tokenizer rate and sampler "
        f"settings they should be used with ({', '.join(PRESETS)})"
    )


def check_fit(config: CogLMConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse files that belong to different models, in which the same id means different things."""
    needed = (config.n_codes, config.transformer.vocab_size, config.ids.boi)
    found = (tokenizer.codebook_size, tokenizer.vocab_size, tokenizer.boi)
    if needed != found:
        raise MiniCogViewError(
            f"the files in {folder} belong to different models: coglm.safetensors expects {needed[0]} picture codes "
            f"and {needed[1]} ids in all, vqvae.safetensors and text.model have {found[0]} and {found[1]}"
        )


def plan_for(
    folder: Path, memory: str = "auto", dtype: str = "auto", device: str = "cpu", offload: bool = False
) -> Plan:
    """How the weights in a folder run on this machine.

    Args:
        memory: how much there is, see ``parse_memory``. dtype: see ``choose_formats``.
        device: see ``pick_device``.
        offload: keep weights as they are stored, and in memory only those of the stage at work.

    Raises:
        MiniCogViewError: if a setting makes no sense, or there is no way to run in so little.
    """
    where = pick_device(device)
    first, second, third = (folder / FILES[name] for name in STAGES)
    coglm = load_config(first, "coglm")
    direct = load_config(second, "direct") if has_weights(second) else None
    iterative = direct is not None and has_weights(third)
    stored = stored_dtype(first)
    formats = choose_formats(dtype, Sizes.of(coglm, direct, iterative).parameters, where, stored)
    sizes = Sizes.of(coglm, direct, iterative, mapped=where.type == "cpu" and stored == formats.kept)
    return choose_plan(sizes, parse_memory(memory, str(where)), formats, str(where), offload)


# --- the models of a folder -----------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """The models of a folder; None where there is no file. Without ``offload`` all have their weights at hand."""

    coglm: CogLM
    direct: DirectSR | None = None
    iterative: IterativeSR | None = None
    offload: Offload | None = None


class Stage(NamedTuple):
    """One model without weights, and all that is needed to give it some when its turn comes."""

    name: str
    stack: Transformer | DirectSR | IterativeSR  # whose layers may stay on the disk
    own: nn.Module  # the modules that have weights of their own, not those of another stage
    way: Way
    allow_other_base: bool = False


def load_stages(folder: Path, plan: Plan, allow_other_base: bool = False) -> Stages:
    """CogLM and, where there are files, both super-resolution models, in eval mode.

    Args:
        plan: how each has its weights.
        allow_other_base: warn, instead of raising, if a stage was trained on top of another CogLM.

    Raises:
        MiniCogViewError: if a file is missing or damaged, or a stage was trained on top of another CogLM.
    """
    for part in ("text", "labels"):  # the weights are compared when they are read
        if (folder / FILES[part]).is_file():
            compare_checksum(folder / FILES[part])
    files = {name: folder / FILES[name] for name in STAGES}
    first = load_config(files["coglm"], "coglm")
    coglm = build(lambda: CogLM(first), files["coglm"])
    remember_identity(coglm.transformer, files["coglm"])
    stages = [Stage("coglm", coglm.transformer, coglm, plan.coglm)]
    direct = iterative = None
    if has_weights(files["direct"]):
        second = stage_config(files["direct"], "direct", first, allow_other_base)
        shared = shares_transformer(files["direct"], coglm, plan)
        base = coglm.transformer if shared else None
        direct = build(lambda: DirectSR(second, base), files["direct"])
        own = {name: part for name, part in direct.named_children() if not (shared and name == "base")}
        stages.append(Stage("direct", direct, nn.ModuleDict(own), plan.direct, allow_other_base))
    if direct is not None and has_weights(files["iterative"]):
        third = stage_config(files["iterative"], "iterative", first, allow_other_base)
        iterative = build(lambda: IterativeSR(third), files["iterative"])
        stages.append(Stage("iterative", iterative, iterative, plan.iterative, allow_other_base))

    offload = Offload(plan.device)
    for stage in stages:
        offload.add(stage.name, stage.own, partial(bring, stage, folder, plan, coglm), stays=stage.way in BITS)
    if direct is not None and direct.base is coglm.transformer:
        offload.stands_on["direct"] = "coglm"
    if plan.one_by_one:
        return Stages(coglm, direct, iterative, offload)
    offload.need(*offload.modules)
    return Stages(coglm, direct, iterative)


def stage_config(path: Path, kind: str, coglm: CogLMConfig, allow_other_base: bool) -> SuperResolutionConfig:
    """A super-resolution stage's configuration, after comparing the CogLM in it with the one that it will work with."""
    config: SuperResolutionConfig = load_config(path, kind)
    if config.coglm != coglm:
        other_base(path, allow_other_base)
    return config


def shares_transformer(path: Path, coglm: CogLM, plan: Plan) -> bool:
    """Whether the direct stage can stand on CogLM's transformer itself: all of it is the same, and both are at hand."""
    base = {f"base.{name}" for name in coglm.transformer.state_dict()}
    return plan.coglm == plan.direct == "memory" and base <= set(same_as_coglm(path, coglm))


def bring(stage: Stage, folder: Path, plan: Plan, coglm: CogLM) -> None:
    """Give a stage its weights, in the way that its plan says."""
    path, first = folder / FILES[stage.name], folder / FILES["coglm"]
    if stage.name == "coglm":
        _, state = load_weights(path, "coglm", None)
    else:
        _, state = load_part(path, stage.name, first, None, stage.allow_other_base)
    if stage.name == "direct":
        state = without_copies(state, same_as_coglm(path, coglm), stage, plan, coglm)
    place(stage, state, plan, path)


def without_copies(state: State, same: Sequence[str], stage: Stage, plan: Plan, coglm: CogLM) -> State:
    """The direct stage's weights, where CogLM has the same ones in memory: left out, or CogLM's tables themselves."""
    own = set(stage.own.state_dict())
    state = {name: value for name, value in state.items() if name in own or name not in same}
    if not plan.one_by_one:
        for name in [name for name in same if name in state and not is_layer(name)]:
            state[name] = coglm.get_parameter(name.replace("base.", "transformer.", 1)).data
    return state


def is_layer(name: str) -> bool:
    """Whether a weight of this name belongs to one of the layers, and not to a table or to the norm at the end."""
    return "layers." in name or "fine_attention." in name


def place(stage: Stage, state: State, plan: Plan, source: Path) -> None:
    """Give the modules of a stage weights that are mapped from files, in one of the four ways.

    All numbers are checked for NaN and infinity when they are read, except those of layers that stay on the disk.
    """
    for name, value in state.items():
        if value.dtype in FLOATS and not waits(stage, name):
            check_finite(name, value, source)
    here = {name: value if waits(stage, name) else to(value, plan) for name, value in state.items()}
    load_into(stage.own, here, source, assign=True)
    if stage.way == "disk":
        stream_layers(stage.stack, plan.device, plan.matrices, plan.dtype)
    elif stage.way in BITS:
        for blocks in [part for part in stage.own.modules() if isinstance(part, nn.ModuleList)]:
            for block in blocks:
                quantize_block(block, plan, 8 if stage.way == "int8" else 4, source)
    if plan.matrices != plan.dtype:
        keep_half(stage.own, plan.dtype)
    if torch.device(plan.device).type == "cpu":
        in_pieces(stage.own)


def waits(stage: Stage, name: str) -> bool:
    """Whether a weight stays as it lies in its file for now: it is read, or quantized, layer by layer."""
    return stage.way != "memory" and is_layer(name)


def to(value: Tensor, plan: Plan) -> Tensor:
    """A weight where it is needed, and in the number format that it is kept in."""
    return value.to(plan.device, plan.dtype if value.ndim == 1 else plan.matrices)


def quantize_block(block: nn.Module, plan: Plan, bits: Bits, source: Path) -> None:
    """Quantize one layer, and let go of the pages of its file."""
    stored = [parameter.data for parameter in block.parameters()]
    for name, parameter in block.named_parameters():
        check_finite(name, parameter.data, source)
        parameter.data = to(parameter.data, plan)
    quantize_layers(block, bits, dtype=plan.dtype)
    if mapped_from_files(stored):
        for tensor in stored:
            forget_pages(tensor)
