"""How well the shipped weights draw, caption and fill in: the numbers of the model card.

The idea: in training, a model always sees the true tokens before the one it predicts (teacher forcing), and its loss
flatters a small model. So the model is judged by what it generates from its own tokens. A picture counts as right if,
among the decoded pictures of all 3,139 emoji (the *gallery*), the nearest one is the emoji that the prompt names.

Shapes: ``M`` prompts, ``N`` pictures in the gallery, ``n`` tokens of a picture.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from minicogview.data import captions
from minicogview.data.codes import decode_all, emoji_pictures, encode_all, encode_pairs
from minicogview.data.emoji import Emoji, indices, load_emoji
from minicogview.errors import MiniCogViewError
from minicogview.evaluation.fid import frechet_distance
from minicogview.evaluation.metrics import psnr, ssim
from minicogview.pipeline import CogView2
from minicogview.tokenizer import Tokenizer
from minicogview.upsampling import Texts, Upsampler


def upsample_all(
    upsampler: Upsampler, texts: Texts, coarse: Tensor, seed: int, stages: int, progress: bool = False
) -> list[Tensor]:
    """``Upsampler.run`` with a progress bar; picture i has the seed ``seed + i``."""
    with tqdm(total=len(texts) * (stages - 1), desc="super-resolution", disable=not progress) as bar:

        def on_step(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.update(done + (total if stage == "iterative" else 0) - bar.n)

        return upsampler.run(texts, coarse, range(seed, seed + len(texts)), stages, on_step)


@dataclass
class Judge:
    """Evaluates a model. The gallery is computed once and then used by all measures."""

    model: CogView2
    progress: bool = True  # show progress bars

    def __post_init__(self) -> None:
        if self.model.offload is not None:
            raise MiniCogViewError("judging needs all weights in memory: load them without offload")
        self.vqvae, self.tokenizer, self.level = self.model.vqvae, self.model.tokenizer, self.model.tokenizer.level
        pictures = emoji_pictures(self.model.size, self.progress)
        self.codes = encode_all(self.vqvae, pictures, self.level)  # (N, n)
        self.gallery = decode_all(self.vqvae, self.codes, self.level)  # (N, 3, H, W)
        self.emoji = load_emoji("all")

    def draw(self, texts: list[str], seed: int = 0, batch_size: int = 64) -> Tensor:
        """One picture of each text: codes (M, n). The picture of text i has the seed ``seed + i``."""
        ids, sampling = [self.model.encode(text) for text in texts], self.model.sampling
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths together need less padding
        result = torch.empty(len(ids), self.codes.shape[1], dtype=torch.long)
        for start in tqdm(range(0, len(order), batch_size), desc="coglm", disable=not self.progress):
            rows = order[start : start + batch_size]
            drawn = self.model.coglm.generate(
                [ids[i] for i in rows],
                self.model.sampler([seed + i for i in rows]),
                text_weight=sampling.text_weight,
                guidance=sampling.guidance,
            )
            result[rows] = drawn.tokens.cpu()
        return result

    @cached_property
    def fine_gallery(self) -> Tensor:
        """The gallery for fine pictures: all emoji, decoded from true fine codes and ``shrunk``: (N, 3, H, W)."""
        preset = self.upsampler.preset
        pictures = emoji_pictures(preset.fine_pixels, self.progress)
        fine = encode_all(self.vqvae, pictures, self.level, batch_size=16)
        return self.shrunk(fine)

    @property
    def upsampler(self) -> Upsampler:
        """Both super-resolution stages; raises MiniCogViewError if there are none."""
        return self.model.require_upsampler()

    def shrunk(self, fine: Tensor) -> Tensor:
        """Fine codes (M, F) decoded and shrunk: every ``factor`` x ``factor`` pixels are averaged: (M, 3, H, W)."""
        factor = self.upsampler.preset.direct.factor
        parts = [decode_all(self.vqvae, part, self.level, batch_size=16) for part in fine.split(64)]
        return torch.cat([F.avg_pool2d(part, factor) for part in parts])

    def ranks(self, drawn: Tensor, targets: Tensor, gallery: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rank (M,) of the right picture in the gallery (0 = nearest), and the row (M,) of the nearest picture.

        Another picture that is exactly as near does not lower the rank, so identical emoji count as the same.

        Args:
            drawn: codes (M, n), or pictures (M, 3, H, W). targets: (M,) rows of the right pictures in the gallery.
            gallery: (N, 3, H, W); None: the decoded coarse pictures.
        """
        pictures = decode_all(self.vqvae, drawn, self.level) if drawn.ndim == 2 else drawn
        gallery = self.gallery if gallery is None else gallery
        exact = "donot_use_mm_for_euclid_dist"  # matrix products round so much that identical emoji would differ
        distances = torch.cdist(pictures.flatten(1), gallery.flatten(1), compute_mode=exact)  # (M, N)
        wanted = distances.gather(1, targets[:, None])
        return (distances < wanted - 1e-4).sum(1), distances.argmin(1)

    def retrieval(
        self,
        split: str,
        lang: str,
        seed: int = 0,
        template: bool = False,
        limit: int | None = None,
        stages: int = 1,
    ) -> dict[str, float]:
        """Draw the name of every emoji in a split once, and look for the picture among all emoji.

        Args:
            split: see ``load_emoji``. lang: "en" or "zh".
            template: put each name into a random template from ``captions.TEMPLATES``.
            limit: judge a fixed random subset of this size.
            stages: the last stage to run. 1 judges coarse pictures; 2 and 3 judge fine pictures in a gallery of fine
                pictures, both shrunk to the coarse size.

        Returns:
            ``n``; ``top1`` and ``top5``, shares in 0..1; and ``same_tone``: of the emoji with a skin tone, the share
            whose nearest picture has the same tone (NaN if there are none).
        """
        rng = random.Random(0)
        asked = load_emoji(split) if limit is None else _some(split, limit, rng)
        texts = [self._text(emoji, lang, template, rng) for emoji in asked]
        drawn, targets = self.draw(texts, seed), torch.from_numpy(indices(asked))
        if stages == 1:
            ranks, nearest = self.ranks(drawn, targets)
        else:
            ids = [self.model.encode(text) for text in texts]
            fine = upsample_all(self.upsampler, ids, drawn, seed, stages, self.progress)[-1]
            ranks, nearest = self.ranks(self.shrunk(fine), targets, self.fine_gallery)
        toned = [self.emoji[row].tone == e.tone for row, e in zip(nearest.tolist(), asked, strict=True) if e.tone]
        return {
            "n": len(asked),
            "top1": float((ranks == 0).float().mean()),
            "top5": float((ranks < 5).float().mean()),
            "same_tone": sum(toned) / len(toned) if toned else float("nan"),
        }

    @staticmethod
    def _text(emoji: Emoji, lang: str, template: bool, rng: random.Random) -> str:
        if not template:
            return captions.name(emoji, lang)
        return captions.in_template(rng.choice(captions.TEMPLATES[lang]), emoji, lang)

    def captioning(self, lang: str, n_pictures: int = 200, n_names: int = 100, seed: int = 0) -> dict[str, float]:
        """Share of training pictures whose true name is the likeliest caption among ``n_names`` names."""
        rng = random.Random(seed)
        asked = _some("train", n_pictures, rng)
        if not 2 <= n_names <= len(asked):
            raise MiniCogViewError(f"cannot compare {n_names} names of {len(asked)} pictures: choose 2 to {len(asked)}")
        language = self.tokenizer.boe if lang == "en" else self.tokenizer.boc
        right = 0
        for emoji in tqdm(asked, desc="captioning", disable=not self.progress):
            others = rng.sample([other for other in asked if other is not emoji], n_names - 1)
            names = [[*self.tokenizer.encode(captions.name(e, lang)), self.tokenizer.eos] for e in (emoji, *others)]
            picture = self.codes[torch.from_numpy(indices([emoji]))]
            right += int(self.model.coglm.score_captions(picture, names, language).argmax()) == 0
        return {"n": len(asked), "n_names": n_names, "top1": right / len(asked)}

    def selection(
        self, split: str, lang: str, n: int = 8, seed: int = 0, limit: int = 100
    ) -> dict[str, float]:
        """Draw ``n`` pictures of every name, and keep the one for which the name is the likeliest caption.

        This is post-selection.

        Returns:
            ``random``: share of all pictures that are right (``retrieval``'s top-1); ``kept``: share of the kept
            pictures that are right; ``any``: share of names with at least one right picture, an upper bound for
            ``kept``.
        """
        asked = _some(split, limit, random.Random(0))
        texts = [captions.name(emoji, lang) for emoji in asked]
        targets = torch.from_numpy(indices(asked)).repeat_interleave(n)
        codes = self.draw([text for text in texts for _ in range(n)], seed)  # (M * n, tokens)
        right = (self.ranks(codes, targets)[0] == 0).unflatten(0, (-1, n))  # (M, n)
        start = self.tokenizer.boe if lang == "en" else self.tokenizer.boc
        kept = []
        for text, pictures in zip(texts, codes.split(n), strict=True):
            ids = [*self.tokenizer.encode(text), self.tokenizer.eos]
            kept.append(int(self.model.coglm.score_captions(pictures, [ids] * n, start).argmax()))
        best = right[torch.arange(len(asked)), kept]
        return {
            "n": len(asked),
            "random": float(right.float().mean()),
            "kept": float(best.float().mean()),
            "any": float(right.any(1).float().mean()),
        }

    def infilling(self, lang: str, n_pictures: int = 100, seed: int = 0) -> dict[str, float]:
        """Hide the right half of training pictures, and fill it in from the name and the left half.

        Returns:
            ``psnr`` of the filled half against the original pixels, in dB; ``psnr_tokenizer``, the same with the true
            codes, about the best that filling in can reach; ``exact``, the share of codes that are exactly right.
        """
        asked = _some("train", n_pictures, random.Random(seed))
        rows = torch.from_numpy(indices(asked))
        pixels = emoji_pictures(self.model.size, self.progress)[rows]
        side = int(self.codes.shape[1] ** 0.5)
        hole = torch.zeros(side, side, dtype=torch.bool)
        hole[:, side // 2 :] = True
        filled = []
        for i, emoji in enumerate(tqdm(asked, desc="filling in", disable=not self.progress)):
            text, weight = self.model.encode(captions.name(emoji, lang)), self.model.sampling.text_weight
            sampler = self.model.sampler([seed + i])
            drawn = self.model.coglm.complete(text, self.codes[rows[i]], hole, sampler, text_weight=weight)
            filled.append(drawn.tokens.cpu())
        codes = torch.cat(filled)
        half = slice(self.model.size // 2, None)
        decoded = decode_all(self.vqvae, codes, self.level)[..., half]
        best = self.gallery[rows][..., half]
        return {
            "n": len(asked),
            "psnr": float(psnr(decoded, pixels[..., half]).mean()),
            "psnr_tokenizer": float(psnr(best, pixels[..., half]).mean()),
            "exact": float((codes == self.codes[rows])[:, hole.flatten()].float().mean()),
        }


@torch.no_grad()
def sharpness(
    upsampler: Upsampler,
    tokenizer: Tokenizer,
    split: str,
    lang: str,
    limit: int = 60,
    seed: int = 0,
    fid: bool = False,
) -> dict[str, float]:
    """How close super-resolution comes to the true fine pictures, compared with bicubic enlargement.

    It starts from the true coarse tokens of some emoji, and the reference is their decoded true fine tokens. Emoji that
    super-resolution was never trained on are judged only under the split "tokenizer_heldout".

    Args:
        fid: also measure ``fid.frechet_distance``, which needs torchmetrics.

    Returns:
        ``n`` pictures; ``psnr_...`` in dB and ``ssim_...``, means over pictures, and ``fid_...``, each for ``bicubic``,
        ``direct`` and, if there is an iterative model, ``iterative``.
    """
    vqvae, preset = upsampler.vqvae, upsampler.preset
    unseen = "tokenizer_heldout"
    asked = _some(split, limit, random.Random(0), without="" if split == unseen else unseen)
    coarse, fine = encode_pairs(vqvae, preset, torch.from_numpy(indices(asked)), progress=False)
    true = decode_all(vqvae, fine, preset.level, batch_size=16)
    blurred = decode_all(vqvae, coarse, preset.level)
    results = {"bicubic": F.interpolate(blurred, size=true.shape[-2:], mode="bicubic").clamp(0, 1)}
    names = [tokenizer.encode(captions.name(emoji, lang)) for emoji in asked]
    after_stages = upsample_all(upsampler, names, coarse, seed, upsampler.n_stages)
    for name, codes in zip(("direct", "iterative"), after_stages):
        results[name] = decode_all(vqvae, codes, preset.level, batch_size=16)
    numbers: dict[str, float] = {"n": len(asked)}
    for name, pictures in results.items():
        numbers[f"psnr_{name}"] = float(psnr(pictures, true).mean())
        numbers[f"ssim_{name}"] = float(ssim(pictures, true).mean())
        if fid:
            numbers[f"fid_{name}"] = frechet_distance(vqvae, true, pictures, preset.level)
    return numbers


def _some(split: str, n: int, rng: random.Random, without: str = "") -> list[Emoji]:
    """``n`` random emoji of a split that are not in the split ``without``; all of them if there are fewer."""
    left_out = {one.key for one in load_emoji(without)} if without else set()
    emoji = [one for one in load_emoji(split) if one.key not in left_out]
    if n < 1:
        raise MiniCogViewError(f"cannot judge {n} pictures: ask for 1 or more")
    return rng.sample(emoji, n) if n < len(emoji) else emoji
