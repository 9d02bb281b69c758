"""Where weights are, which preset they go with, and whether the files of a folder belong together."""

from __future__ import annotations

from pathlib import Path

from minicogview.config import PRESETS, CogLMConfig, Preset, VQVAEConfig, get_preset
from minicogview.errors import MiniCogViewError
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
