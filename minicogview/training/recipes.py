"""The commands that made the shipped toy: which data, which model, which settings, put together.

``minicogview train coglm --preset toy`` ends here. Everything below is ordinary use of the package:
read it as the shortest example of how to train on pictures of your own.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from minicogview.checkpoint import load_vqvae, save_model
from minicogview.coglm import CogLM
from minicogview.config import Preset
from minicogview.data import captions
from minicogview.data.emoji import indices, load_emoji
from minicogview.evaluate import Judge, emoji_pictures, encode_all
from minicogview.pipeline import CogView2
from minicogview.tokenizer import Tokenizer
from minicogview.training.coglm import CogLMData, CogLMObjective, CogLMRecipe, embed_codebook
from minicogview.training.loop import fit
from minicogview.vqvae import VQVAE

TOY_WEIGHTS = Path(__file__).parents[1] / "weights" / "toy"


def emoji_data(preset: Preset, vqvae: VQVAE, tokenizer: Tokenizer) -> CogLMData:
    """The training split of the emoji as coarse codes, with captions that change from one look to the next."""
    emoji = load_emoji("train")
    pictures = emoji_pictures(preset.coarse_pixels)[torch.from_numpy(indices(emoji))]

    def describe(i: int, language: str, rng: random.Random) -> str:
        return captions.vary(emoji[i], language, rng)

    def name(i: int, language: str) -> str:
        return captions.name(emoji[i], language)

    return CogLMData(encode_all(vqvae, pictures, preset.level), describe, name, tokenizer)


def train_coglm(
    preset: Preset,
    weights: Path,
    out: Path,
    *,
    recipe: CogLMRecipe | None = None,
    judge_every: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train CogLM on the emoji and write ``out/coglm.safetensors``.

    Args:
        preset: sizes. weights: folder with ``vqvae.safetensors`` and ``text.model``.
        out: folder for checkpoints, logs and the result. judge_every: steps between free-running judgements.
        settings: of ``training.fit``, such as ``steps`` and ``lr``.

    Returns:
        the summary of ``fit``.
    """
    recipe = recipe or CogLMRecipe()
    torch.manual_seed(recipe.seed)
    vqvae = load_vqvae(weights / "vqvae.safetensors")
    tokenizer = Tokenizer(weights / "text.model", preset.vqvae.codebook_size, vqvae, preset.level)
    codebook = vqvae.quantizer.codebook.detach().float()
    model = CogLM(preset.coglm)
    embed_codebook(model, codebook, torch.Generator().manual_seed(recipe.seed))
    judge = Judge(CogView2(model, tokenizer, preset.sampling), progress=False)

    def validate(model: CogLM) -> dict[str, float]:
        with torch.autocast("cpu", enabled=False):
            results = {
                f"{split}_{lang}": judge.retrieval(split, lang, limit=100)
                for split in ("names", "train", "heldout")
                for lang in ("en", "zh")
            }
            results |= {f"captioning_{lang}": judge.captioning(lang, n_pictures=100) for lang in ("en", "zh")}
        return {
            f"{name}/{key}": result[key]
            for name, result in results.items()
            for key in ("top1", "same_tone")
            if key in result
        }

    objective = CogLMObjective(model, emoji_data(preset, vqvae, tokenizer), codebook, recipe, validate)
    summary = fit(objective, out, validate_every=judge_every, **settings)
    save_model(out / "coglm.safetensors", model, preset.coglm, "coglm")
    return summary
