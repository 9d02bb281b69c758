"""The recipes of the shipped toy: each puts data, a model, an objective and settings together and trains.

``minicogview train coglm --preset toy`` calls ``train_coglm``. Everything below is ordinary use of the package:
read it as the shortest example of how to train on pictures of your own.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicogview.checkpoints.weight_files import load_coglm, load_direct, load_vqvae, save_direct, save_model
from minicogview.coglm import CogLM
from minicogview.config import Preset
from minicogview.data import captions
from minicogview.data.codes import emoji_pictures, encode_all, encode_pairs
from minicogview.data.emoji import indices, load_emoji
from minicogview.evaluation.judge import Judge, sharpness
from minicogview.lopar import IterativeSR
from minicogview.pipeline import CogView2
from minicogview.super_resolution import DirectSR, enlarged_codes
from minicogview.tokenizer import Tokenizer
from minicogview.training.coglm import CogLMData, CogLMObjective, CogLMRecipe, embed_codebook
from minicogview.training.loop import DEFAULTS, RunOptions, fit
from minicogview.training.lopar import IterativeObjective
from minicogview.training.state import Settings
from minicogview.training.super_resolution import DirectObjective, Pairs, SuperResolutionRecipe
from minicogview.upsampling import Upsampler
from minicogview.vqvae import VQVAE

TOY_WEIGHTS = Path(__file__).parents[1] / "weights" / "toy"


def load_tokenizer(preset: Preset, weights: Path) -> tuple[VQVAE, Tokenizer, Tensor]:
    """Both halves of the tokenizer in a folder, and the codebook (K, C)."""
    vqvae = load_vqvae(weights / "vqvae.safetensors")
    tokenizer = Tokenizer(weights / "text.model", preset.vqvae.codebook_size, vqvae, preset.level)
    return vqvae, tokenizer, vqvae.quantizer.codebook.detach().float()


def emoji_data(preset: Preset, vqvae: VQVAE, tokenizer: Tokenizer) -> CogLMData:
    """The training split of the emoji as coarse codes; a picture's caption is another one each time."""
    emoji = load_emoji("train")
    pictures = emoji_pictures(preset.coarse_pixels)[torch.from_numpy(indices(emoji))]

    def describe(i: int, language: str, rng: random.Random) -> str:
        return captions.vary(emoji[i], language, rng)

    def name(i: int, language: str) -> str:
        return captions.name(emoji[i], language)

    return CogLMData(encode_all(vqvae, pictures, preset.level), describe, name, tokenizer)


def emoji_pairs(preset: Preset, vqvae: VQVAE, tokenizer: Tokenizer) -> Pairs:
    """The training split at both resolutions, without the characters that super-resolution is evaluated on."""
    heldout = {emoji.key for emoji in load_emoji("tokenizer_heldout")}
    emoji = [one for one in load_emoji("train") if one.key not in heldout]
    coarse, fine = encode_pairs(vqvae, preset, torch.from_numpy(indices(emoji)))

    def describe(i: int, language: str, rng: random.Random) -> str:
        return captions.vary(emoji[i], language, rng)

    start = None
    if preset.direct.fine_start == "enlarged":
        start = torch.cat([enlarged_codes(vqvae, part, preset.direct, preset.level) for part in coarse.split(32)])
    return Pairs(coarse, fine, describe, tokenizer, start)


def train_coglm(
    preset: Preset,
    weights: Path,
    out: Path,
    settings: Settings,
    options: RunOptions = DEFAULTS,
    recipe: CogLMRecipe | None = None,
) -> dict[str, Any]:
    """Train CogLM on the emoji and write ``out/coglm.safetensors``.

    Args:
        preset: sizes. weights: folder with ``vqvae.safetensors`` and ``text.model``.
        out: folder for checkpoints, logs and the result.
        settings, options: of ``training.fit``; validation draws 100 names of each split in both languages.
        recipe: how samples are made; None: with the defaults.

    Returns:
        the summary of ``fit``.
    """
    recipe = recipe or CogLMRecipe()
    torch.manual_seed(recipe.seed)
    vqvae, tokenizer, codebook = load_tokenizer(preset, weights)
    model = CogLM(preset.coglm)
    embed_codebook(model, codebook, torch.Generator().manual_seed(recipe.seed))
    judge = Judge(CogView2(model, tokenizer, preset.sampling), progress=False)
    objective = CogLMObjective(
        model, emoji_data(preset, vqvae, tokenizer), codebook, recipe, validate=lambda _: evaluate_drawing(judge)
    )
    summary = fit(objective, out, settings, options)
    save_model(out / "coglm.safetensors", model, preset.coglm, "coglm")
    return summary


def evaluate_drawing(judge: Judge) -> dict[str, float]:
    """Shares of right pictures and right skin tones in free-running drawing, and of right captions, by language."""
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


def evaluate_sharpness(upsampler: Upsampler, tokenizer: Tokenizer) -> dict[str, float]:
    """PSNR and SSIM on 60 training pictures and on 60 of characters that super-resolution never sees."""
    numbers = {}
    with torch.autocast("cpu", enabled=False):
        for split in ("train", "tokenizer_heldout"):
            for key, value in sharpness(upsampler, tokenizer, split, "en", limit=60).items():
                numbers[f"{split}/{key}"] = value
    return numbers


def train_direct(
    preset: Preset,
    weights: Path,
    out: Path,
    settings: Settings,
    options: RunOptions = DEFAULTS,
    recipe: SuperResolutionRecipe | None = None,
) -> dict[str, Any]:
    """Train the direct stage on top of a finished CogLM and write ``out/direct.safetensors``.

    Args:
        weights: folder with ``coglm.safetensors``, ``vqvae.safetensors`` and ``text.model``.
        options: validation is ``evaluate_sharpness``. The other arguments are those of ``train_coglm``.
    """
    recipe = recipe or SuperResolutionRecipe()
    torch.manual_seed(recipe.seed)
    vqvae, tokenizer, codebook = load_tokenizer(preset, weights)
    model = DirectSR(preset.direct, load_coglm(weights / "coglm.safetensors").transformer)
    upsampler = Upsampler(vqvae, preset, model)
    objective = DirectObjective(
        model,
        emoji_pairs(preset, vqvae, tokenizer),
        codebook,
        recipe,
        validate=lambda _: evaluate_sharpness(upsampler, tokenizer),
    )
    summary = fit(objective, out / "direct", settings, options)
    save_direct(out / "direct.safetensors", model)
    return summary


def make_direct_codes(upsampler: Upsampler, pairs: Pairs) -> Tensor:
    """The direct stage's codes for every training picture: (N, F), from which the iterative stage learns."""
    rngs = [random.Random(row) for row in range(len(pairs.coarse))]
    said = [pairs.describe(row, rng.choice(captions.LANGUAGES), rng) for row, rng in enumerate(rngs)]
    texts = [pairs.tokenizer.encode(caption) for caption in said]
    return upsampler.run(texts, pairs.coarse, seeds=range(len(texts)), stages=2)[0]


def train_iterative(
    preset: Preset,
    weights: Path,
    out: Path,
    settings: Settings,
    options: RunOptions = DEFAULTS,
    recipe: SuperResolutionRecipe | None = None,
) -> dict[str, Any]:
    """Train the iterative stage and write ``out/iterative.safetensors``.

    It starts from CogLM's weights, with the attention and the positions of the finished direct stage.

    Args:
        weights: as for ``train_direct``, and ``direct.safetensors``, whose codes the iterative stage learns from.
    """
    recipe = recipe or SuperResolutionRecipe()
    torch.manual_seed(recipe.seed)
    vqvae, tokenizer, codebook = load_tokenizer(preset, weights)
    base, shared = (load_coglm(weights / "coglm.safetensors").transformer for _ in range(2))
    direct, model = load_direct(weights / "direct.safetensors", shared), IterativeSR(preset.iterative, base)
    model.start_from_direct(direct)
    pairs, upsampler = emoji_pairs(preset, vqvae, tokenizer), Upsampler(vqvae, preset, direct, model)
    objective = IterativeObjective(
        model,
        pairs,
        codebook,
        recipe,
        make_direct_codes(upsampler, pairs),
        validate=lambda _: evaluate_sharpness(upsampler, tokenizer),
    )
    summary = fit(objective, out / "iterative", settings, options)
    save_model(out / "iterative.safetensors", model, preset.iterative, "iterative")
    return summary
