"""``minicogview evaluate``: the numbers of the model card, printed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from minicogview.cli.shared import SHIPPED, Language, OptionalFloat, OptionalInt, Weights, WeightsOptions, show
from minicogview.errors import MiniCogViewError
from minicogview.numbers import check_all

if TYPE_CHECKING:
    from minicogview.evaluation.judge import Judge


def retrieval(
    split: Literal["names", "train", "heldout", "all"] = "names",
    lang: Language = "en",
    template: bool = False,
    limit: OptionalInt = None,
    seed: int = 0,
    stages: Literal[1, 2, 3] = 1,
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Draw every name once, and count how often its own emoji is the nearest of all.

    Args:
        split: names (without skin tones), train, heldout (characters and tones never seen together), or all.
        lang: language of the names.
        template: put each name into a sentence, such as "a picture of ...".
        limit: judge a fixed random choice of this many names; all if not given.
        seed: picture i is drawn with seed + i.
        stages: judge the pictures after CogLM (1), after the direct stage (2) or after the iterative stage (3).
        json: print n, top1, top5 and same_tone (shares from 0 to 1; null where no picture has a tone) as JSON.
    """
    check_all("--", limit=limit, seed=seed)
    return show(judge(source, json).retrieval(split, lang, seed, template, limit, stages), json)


def captioning(
    lang: Language = "en",
    n_pictures: int = 200,
    n_names: int = 100,
    seed: int = 0,
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Score names as captions of pictures, and count how often the true name is the likeliest.

    Args:
        lang: language of the names.
        n_pictures: training pictures to judge.
        n_names: names to choose from.
        seed: seed of the choice of pictures and names.
        json: print n, n_names and top1 (share from 0 to 1) as JSON.
    """
    check_all("--", n_pictures=n_pictures, n_names=n_names, seed=seed)
    return show(judge(source, json).captioning(lang, n_pictures, n_names, seed), json)


def selection(
    split: Literal["names", "train", "heldout", "all"] = "heldout",
    lang: Language = "en",
    n: int = 8,
    limit: int = 100,
    temperature: OptionalFloat = None,
    seed: int = 0,
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Draw several pictures of every name, and keep the one for which the name is the likeliest caption.

    Args:
        split: as for retrieval.
        lang: language of the names.
        n: pictures of each name.
        limit: judge a fixed random choice of this many names.
        temperature: temperature of the sampler; the preset's if not given.
        seed: seed of the sampler.
        json: print n, and the shares of right pictures among all (random), the kept ones (kept) and the best (any).
    """
    check_all("--", n=n, limit=limit, temperature=temperature, seed=seed)
    judged = judge(source, json)
    if temperature is not None:
        judged.model.sampling = judged.model.settings({"temperature": temperature})
    return show(judged.selection(split, lang, n, seed, limit), json)


def infilling(
    lang: Language = "en",
    n_pictures: int = 100,
    seed: int = 0,
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Hide the right half of training pictures, and compare what the model fills in with the original.

    Args:
        lang: language of the names.
        n_pictures: training pictures to judge.
        seed: seed of the choice of pictures and of the sampler.
        json: print n, psnr and psnr_tokenizer (dB) and exact (share of codes) as JSON.
    """
    check_all("--", n_pictures=n_pictures, seed=seed)
    return show(judge(source, json).infilling(lang, n_pictures, seed), json)


def sharpness(
    split: Literal["names", "train", "tokenizer_heldout", "all"] = "tokenizer_heldout",
    lang: Language = "en",
    limit: int = 60,
    seed: int = 0,
    fid: bool = False,
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Measure how close super-resolution comes to the true picture, compared with bicubic enlargement.

    Args:
        split: names, train, tokenizer_heldout (characters that super-resolution never saw, in any colour), or all.
        lang: language of the names.
        limit: judge a fixed random choice of this many pictures.
        seed: picture i is drawn with seed + i.
        fid: also print the Frechet distance between features of the picture tokenizer; needs the extra "evaluate".
        json: print n, and psnr (dB), ssim and perhaps fid of bicubic, direct and iterative as JSON.
    """
    check_all("--", limit=limit, seed=seed)
    model = source.load()
    from minicogview.evaluation.judge import sharpness as judge_sharpness

    return show(judge_sharpness(model.require_upsampler(), model.tokenizer, split, lang, limit, seed, fid), json)


def tokenizer(
    size: int = 32,
    level: int = 0,
    split: Literal["tokenizer_heldout", "names", "all"] = "tokenizer_heldout",
    source: Weights = SHIPPED,
    json: bool = False,
) -> int:
    """Measure what the picture tokenizer loses on pictures that it was not trained on.

    Args:
        size: pixels along each side of the pictures.
        level: which rate of the tokenizer; 0 is the finest.
        split: tokenizer_heldout (characters that it never saw, in any colour), names, or all.
        json: print n, psnr (dB), ssim, perplexity and more as JSON.
    """
    check_all("--", size=size, level=level)
    folder = source.folder()
    from minicogview.checkpoints.weight_files import load_vqvae
    from minicogview.evaluation.metrics import tokenizer_psnr
    from minicogview.scale.machine import pick_device

    pick_device(source.device)
    vqvae = load_vqvae(folder / "vqvae.safetensors")
    if size % vqvae.config.rates[level]:
        raise MiniCogViewError(f"--size is {size}: give a multiple of {vqvae.config.rates[level]}, a token's pixels")
    return show(tokenizer_psnr(vqvae, size, split, level), json)


def judge(source: WeightsOptions, quiet: bool) -> Judge:
    """The judge of the model that the options name."""
    model = source.load()
    from minicogview.evaluation.judge import Judge

    return Judge(model, progress=not quiet)
