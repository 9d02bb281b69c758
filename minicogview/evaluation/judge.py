"""How well the shipped weights draw, caption and fill in: the numbers of the model card, by free running.

The idea: teacher-forced loss flatters a small model, so it is judged by what it makes. A drawn picture is right
when, among the decoded pictures of all 3,139 emoji, the nearest one is the emoji that was asked for.

Shapes: ``M`` asked texts, ``N`` pictures in the gallery, ``n`` tokens of a picture.
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
    """``Upsampler.run`` with a progress bar; picture i is drawn with ``seed + i``."""
    with tqdm(total=len(texts) * (stages - 1), desc="super-resolution", disable=not progress) as bar:

        def on_step(stage: str, done: int, total: int) -> None:
            bar.set_description(stage, refresh=False)
            bar.update(done + (total if stage == "iterative" else 0) - bar.n)

        return upsampler.run(texts, coarse, range(seed, seed + len(texts)), stages, on_step)




@dataclass
class Judge:
    """A model with all that is needed to judge it; the gallery is made once."""

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
        """One picture of each text: (M, n) codes. Text i is drawn with seed ``seed + i``."""
        ids, sampling = [self.model.encode(text) for text in texts], self.model.sampling
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # similar lengths together: less padding
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
        """What the fine codes of all emoji can show, in as few pixels as the coarse pictures: (N, 3, H, W)."""
        preset = self.upsampler.preset
        pictures = emoji_pictures(preset.fine_pixels, self.progress)
        fine = encode_all(self.vqvae, pictures, self.level, batch_size=16)
        return self.shrunk(fine)

    @property
    def upsampler(self) -> Upsampler:
        """Both super-resolution stages; an error where there are none."""
        return self.model.require_upsampler()

    def shrunk(self, fine: Tensor) -> Tensor:
        """Fine codes (M, F) decoded, and every ``factor`` x ``factor`` pixels averaged: (M, 3, H, W)."""
        factor = self.upsampler.preset.direct.factor
        parts = [decode_all(self.vqvae, part, self.level, batch_size=16) for part in fine.split(64)]
        return torch.cat([F.avg_pool2d(part, factor) for part in parts])

    def ranks(self, drawn: Tensor, targets: Tensor, gallery: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rank of the wanted picture (0 = nearest), and the row of the nearest one.

        Args:
            drawn: (M, n) codes, or pictures (M, 3, H, W). targets: (M,) wanted rows of the gallery.
            gallery: (N, 3, H, W); None: the decoded coarse pictures.

        A picture as near as the wanted one does not push it back: identical drawings count as the same.
        """
        pictures = decode_all(self.vqvae, drawn, self.level) if drawn.ndim == 2 else drawn
        gallery = self.gallery if gallery is None else gallery
        exact = "donot_use_mm_for_euclid_dist"  # products round so much that identical drawings would differ
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
        """Draw every name of a split once and look for it among all emoji.

        Args:
            split: see ``load_emoji``. lang: "en" or "zh".
            template: put each name into a template drawn from ``captions.TEMPLATES``.
            limit: judge a fixed random subset of this size.
            stages: 1: coarse pictures; 2 and 3: sharpened ones, among the decoded fine codes of all emoji, both shrunk
                to the coarse pictures' pixels.

        Returns:
            ``n``; ``top1`` and ``top5``, shares in 0..1; ``same_tone``, the share of pictures with a skin tone
            whose nearest neighbour has that tone (NaN where no picture has one).
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
        """Share of training pictures whose true name is the likeliest of ``n_names`` names, by caption loss."""
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
        """Draw ``n`` pictures of every name and keep the one whose caption is the likeliest (post-selection).

        Returns:
            ``random``: share of all drawn pictures that are right (``retrieval``'s top-1); ``kept``: share of the kept
            ones; ``any``: share of names with at least one right picture, the best that any selection could reach.
        """
        asked = _some(split, limit, random.Random(0))
        texts = [captions.name(emoji, lang) for emoji in asked]
        targets = torch.from_numpy(indices(asked)).repeat_interleave(n)
        codes = self.draw([text for text in texts for _ in range(n)], seed)  # (M * n, codes)
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
        """Hide one half of training pictures and fill it in from the name and the other half.

        Returns:
            ``psnr``: hidden half against the original pixels, in dB; ``psnr_tokenizer``: the same with the true
            codes, the best that any filling could reach; ``exact``: share of codes filled in exactly.
        """
        asked = _some("train", n_pictures, random.Random(seed))
        rows = torch.from_numpy(indices(asked))
        pixels = emoji_pictures(self.model.size, self.progress)[rows]
        side = int(self.codes.shape[1] ** 0.5)
        hole = torch.zeros(side, side, dtype=torch.bool)
        hole[:, side // 2 :] = True  # the right half
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
    """How close super-resolution comes to the true fine tokens, beside enlarging the coarse picture bicubically.

    Starts from the true coarse tokens of some pictures and compares with the decoded true fine tokens. Characters that
    super-resolution never saw are judged under the split "tokenizer_heldout" alone.

    Args:
        fid: measure ``fid.frechet_distance`` too, which needs torchmetrics.

    Returns:
        ``n`` pictures; ``psnr_...`` in dB and ``ssim_...``, means over pictures, and ``fid_...`` for ``bicubic``,
        ``direct`` and, where there is an iterative model, ``lopar``.
    """
    vqvae, preset = upsampler.vqvae, upsampler.preset
    unseen = "tokenizer_heldout"
    asked = _some(split, limit, random.Random(0), without="" if split == unseen else unseen)
    coarse, fine = encode_pairs(vqvae, preset, torch.from_numpy(indices(asked)), progress=False)
    true = decode_all(vqvae, fine, preset.level, batch_size=16)
    blurred = decode_all(vqvae, coarse, preset.level)
    results = {"bicubic": F.interpolate(blurred, size=true.shape[-2:], mode="bicubic").clamp(0, 1)}
    names = [tokenizer.encode(captions.name(emoji, lang)) for emoji in asked]
    sharpened = upsample_all(upsampler, names, coarse, seed, upsampler.n_stages)
    for name, codes in zip(("direct", "iterative"), sharpened):
        results[name] = decode_all(vqvae, codes, preset.level, batch_size=16)
    numbers: dict[str, float] = {"n": len(asked)}
    for name, pictures in results.items():
        numbers[f"psnr_{name}"] = float(psnr(pictures, true).mean())
        numbers[f"ssim_{name}"] = float(ssim(pictures, true).mean())
        if fid:
            numbers[f"fid_{name}"] = frechet_distance(vqvae, true, pictures, preset.level)
    return numbers


def _some(split: str, n: int, rng: random.Random, without: str = "") -> list[Emoji]:
    """``n`` emoji of a split (and not of another) in random order, or all of them where there are fewer."""
    left_out = {one.key for one in load_emoji(without)} if without else set()
    emoji = [one for one in load_emoji(split) if one.key not in left_out]
    if n < 1:
        raise MiniCogViewError(f"cannot judge {n} pictures: ask for 1 or more")
    return rng.sample(emoji, n) if n < len(emoji) else emoji
