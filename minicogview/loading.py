"""Where weights are, which preset they go with, whether the files of a folder belong together, and the models in it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minicogview.checkpoint import (
    has_weights,
    identity,
    load_coglm,
    load_config,
    load_direct,
    load_iterative,
    load_part,
    load_weights,
)
from minicogview.coglm import CogLM
from minicogview.config import PRESETS, CogLMConfig, Preset, VQVAEConfig, get_preset
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.offload import Offload
from minicogview.super_resolution import DirectSR
from minicogview.tokenizer import Tokenizer

SHIPPED = Path(__file__).parent / "weights"
FILES = "vqvae.safetensors, coglm.safetensors and text.model"


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


class Stages(NamedTuple):
    """The models of a folder; None where there is no file. Without ``offload`` all their weights are in memory."""

    coglm: CogLM
    direct: DirectSR | None = None
    iterative: IterativeSR | None = None
    offload: Offload | None = None


def load_stages(folder: Path, device: str = "cpu", one_by_one: bool = False) -> Stages:
    """CogLM and, where there are files, both super-resolution models, in eval mode.

    Args:
        one_by_one: make them without weights, and with an ``Offload`` that brings in those of the stage at work.

    Raises:
        MiniCogViewError: if a file is missing or damaged, or the direct stage was trained on top of another CogLM.
    """
    first, second, third = (folder / f"{name}.safetensors" for name in ("coglm", "direct", "iterative"))
    if not one_by_one:
        coglm = load_coglm(first).to(device)
        if not has_weights(second):
            return Stages(coglm)
        iterative = load_iterative(third, coglm.transformer).to(device) if has_weights(third) else None
        return Stages(coglm, load_direct(second, coglm.transformer).to(device), iterative)

    with torch.device("meta"):
        coglm = CogLM(load_config(first, "coglm")).eval()
        coglm.transformer.identity = identity(first)
        offload = Offload({"coglm": coglm}, {"coglm": lambda: load_weights(first, "coglm")[1]}, device)
        if not has_weights(second):
            return Stages(coglm, offload=offload)
        direct, iterative = DirectSR(load_config(second, "direct"), coglm.transformer).eval(), None
        own = nn.ModuleDict({name: part for name, part in direct.named_children() if name != "base"})
        offload.modules["direct"] = own
        offload.read["direct"] = lambda: {
            name: value
            for name, value in load_part(second, "direct", coglm.transformer)[1].items()
            if not name.startswith("base.")
        }
        if has_weights(third):
            iterative = IterativeSR(load_config(third, "iterative")).eval()
            offload.modules["iterative"] = iterative
            offload.read["iterative"] = lambda: load_part(third, "iterative", first)[1]
    return Stages(coglm, direct, iterative, offload)
