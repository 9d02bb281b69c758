"""Where weights are, which preset they go with, whether the files of a folder belong together, and the models in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from minicogview.checkpoints.files import (
    has_weights,
    identity,
    load_config,
    load_into,
    load_part,
    load_weights,
    same_as_coglm,
    stored_dtype,
)
from minicogview.coglm import CogLM
from minicogview.config import PRESETS, CogLMConfig, Preset, VQVAEConfig, get_preset
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.scale.offload import Offload, State
from minicogview.scale.plan import BITS, Plan, Sizes, Way, check_device, choose_plan, parse_dtype, parse_memory
from minicogview.scale.quantization import quantize_layers
from minicogview.scale.streaming import forget_pages, mapped_from_files
from minicogview.super_resolution import DirectSR
from minicogview.tokenizer import Tokenizer

SHIPPED = Path(__file__).parents[1] / "weights"
FILES = "vqvae.safetensors, coglm.safetensors and text.model"
STAGES = ("coglm", "direct", "iterative")


class Streamed(Protocol):
    """A model that can read its layers from the disk when their turn comes."""

    def stream_layers(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        """From now on."""


def find_folder(source: str | Path) -> Path:
    """The folder of a preset's shipped weights, or the user's own."""
    if isinstance(source, str) and source in PRESETS:
        if (SHIPPED / source).is_dir():
            return SHIPPED / source
        raise MiniCogViewError(f"no weights ship with the preset {source!r}: give the folder of your own, with {FILES}")
    folder = Path(source)
    if folder.is_dir():
        return folder
    raise MiniCogViewError(
        f"{str(source)!r} is neither a preset ({', '.join(PRESETS)}) nor a folder: give one of these names, "
        f"or a folder with {FILES}"
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
    """Refuse files of different models: their ids would mean different things."""
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
        memory: how much there is, see ``parse_memory``. dtype: see ``parse_dtype``.
        offload: have the weights as they are, of one stage at a time.

    Raises:
        MiniCogViewError: if a setting makes no sense, or there is no way to run in so little.
    """
    check_device(device)
    first, second, third = (folder / f"{name}.safetensors" for name in STAGES)
    coglm = load_config(first, "coglm")
    direct = load_config(second, "direct") if has_weights(second) else None
    iterative = direct is not None and has_weights(third)
    number = parse_dtype(dtype, Sizes.of(coglm, direct, iterative).parameters)
    mapped = torch.device(device).type == "cpu" and stored_dtype(first) == number
    sizes = Sizes.of(coglm, direct, iterative, mapped)
    return choose_plan(sizes, parse_memory(memory, device), number, device, offload)


# --- the models of a folder -----------------------------------------------------------------------------------------


class Stages(NamedTuple):
    """The models of a folder; None where there is no file. Without ``offload`` all have their weights at hand."""

    coglm: CogLM
    direct: DirectSR | None = None
    iterative: IterativeSR | None = None
    offload: Offload | None = None


def load_stages(folder: Path, plan: Plan) -> Stages:
    """CogLM and, where there are files, both super-resolution models, in eval mode.

    Args:
        plan: how each has its weights.

    Raises:
        MiniCogViewError: if a file is missing or damaged, or the direct stage was trained on top of another CogLM.
    """
    first, second, third = (folder / f"{name}.safetensors" for name in STAGES)
    offload = Offload(plan.device)
    with torch.device("meta"):
        coglm = CogLM(load_config(first, "coglm")).eval()
    coglm.transformer.identity = identity(first)

    def read_direct() -> State:
        """Without what CogLM has in memory already: that is shared."""
        _, state = load_part(second, "direct", first, None)
        for name in same_as_coglm(second, coglm):
            if shared:
                del state[name]
            elif not plan.one_by_one and not is_layer(name):
                state[name] = coglm.get_parameter(name.replace("base.", "transformer.", 1)).data
        return state

    def add(name: str, module: nn.Module, way: Way, read: Callable[[], State], stack: Streamed) -> None:
        offload.add(name, module, lambda: place(module, read(), way, plan, stack, folder), stays=way in BITS)

    add("coglm", coglm, plan.draw, lambda: load_weights(first, "coglm", None)[1], coglm.transformer)
    direct = iterative = None
    if has_weights(second):
        config = load_config(second, "direct")
        base_names = {f"base.{name}" for name in coglm.transformer.state_dict()}
        shared = plan.draw == plan.direct == "memory" and base_names <= set(same_as_coglm(second, coglm))
        with torch.device("meta"):
            direct = DirectSR(config, coglm.transformer if shared else None).eval()
        own = {name: part for name, part in direct.named_children() if not (shared and name == "base")}
        add("direct", nn.ModuleDict(own), plan.direct, read_direct, direct)
        if shared:
            offload.stands_on["direct"] = "coglm"
    if has_weights(second) and has_weights(third):
        with torch.device("meta"):
            iterative = IterativeSR(load_config(third, "iterative")).eval()
        add("iterative", iterative, plan.refine, lambda: load_part(third, "iterative", first, None)[1], iterative)
    if plan.one_by_one:
        return Stages(coglm, direct, iterative, offload)
    offload.need(*offload.modules)
    return Stages(coglm, direct, iterative)


def is_layer(name: str) -> bool:
    """Whether a weight of this name belongs to one of the layers, and not to a table or to the norm at the end."""
    return "layers." in name or "fine_attention." in name


def place(module: nn.Module, state: State, way: Way, plan: Plan, stack: Streamed, source: Path) -> None:
    """Give a module without weights those of a stage, in one of the four ways.

    Args:
        state: mapped from files. stack: the model whose layers they are, for those that stay on the disk.
    """
    here = {
        name: value if way != "memory" and is_layer(name) else value.to(plan.device, plan.dtype)
        for name, value in state.items()
    }
    load_into(module, here, source, assign=True)
    if way == "disk":
        stack.stream_layers(plan.device, plan.dtype)
    elif way in BITS:
        for blocks in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
            for block in blocks:
                stored = [parameter.data for parameter in block.parameters()]
                quantize_layers(block.to(plan.device, plan.dtype), 8 if way == "int8" else 4)
                if mapped_from_files(stored):
                    for tensor in stored:
                        forget_pages(tensor)
