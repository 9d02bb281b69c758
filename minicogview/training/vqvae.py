"""Train the picture tokenizer: reconstruct pictures through the codebook, and let the codebook follow the encoder.

The loss is the difference between picture and reconstruction (absolute plus squared) and the encoder's commitment
to the rows it chose (van den Oord et al. 2017). ``codebook.py`` moves the codebook.

Different from the original on purpose: two more terms make a code depend on its own cell. Without them the encoder
hides detail of neighbouring cells in plain ones, so that a white background has hundreds of codes and another skin
tone changes the codes of the hair: that gains a few tenths of a decibel, and the codes become hard to learn.

Training has two parts, so that codes keep their meaning once other models have learned them: ``levels=(0,)`` trains
the encoder, the codebook and the finest decoder; ``levels=(1, 2)`` freezes these and trains the rest.

Shapes: B pictures, H x W pixels, h x w cells, C width of a codebook row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from minicogview.checkpoints.weight_files import load_vqvae, save_model
from minicogview.config import get_preset
from minicogview.data.emoji import indices, load_emoji, render
from minicogview.evaluation.metrics import psnr, tokenizer_psnr
from minicogview.training.codebook import CodebookLearner
from minicogview.training.loop import DEFAULTS, RunOptions, fit
from minicogview.training.state import Settings, checksum
from minicogview.vqvae import VQVAE

COMMITMENT = 0.25  # weight of the commitment loss
LOCALITY = 0.3  # weight of how much a cell's vector changes with the cell's surroundings
SAMENESS = 1.0  # weight of how far the vectors of cells with the very same pixels lie apart
FINEST = Settings(steps=4000, lr=1.5e-3, weight_decay=1e-4, betas=(0.9, 0.99), ema_decay=0.998)  # for levels=(0,)
COARSER = replace(FINEST, steps=1200)  # for levels=(1, 2)
SIZES = (32, 96)  # pixels a side; steps alternate between them


def reconstruction(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: the first keeps edges sharp, the second avoids large mistakes."""
    return F.l1_loss(output, target) + F.mse_loss(output, target)


def spread_of_equals(pictures: Tensor, z: Tensor, rate: int) -> Tensor:
    """How far vectors z (B, C, h, w) of cells with the very same pixels lie apart, relative to the variance of z.

    Nearly all such cells have one plain colour. Without this term the encoder would hide detail of their neighbours
    in them, and the background of a picture would have a different code in every cell.
    """
    cells = rearrange(pictures, "b c (h p) (w q) -> (b h w) (c p q)", p=rate, q=rate)
    vectors = rearrange(z.float(), "b c h w -> (b h w) c")
    _, group, counts = cells.unique(dim=0, return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), z.shape[1], device=z.device).index_add(0, group, vectors)
    means = means / counts[:, None]
    return (vectors - means[group]).pow(2).mean() / vectors.detach().var(0).mean()


def jigsaw(x: Tensor, side: int, order: Tensor) -> Tensor:
    """Cut x (B, C, H, W) into squares of ``side`` pixels and reassemble them in another order."""
    b, _, height, width = x.shape
    pieces = rearrange(x, "b c (h p) (w q) -> (b h w) c p q", p=side, q=side)[order]
    return rearrange(pieces, "(b h w) c p q -> b c (h p) (w q)", b=b, h=height // side, w=width // side)


class TokenizerObjective:
    """Trains the tokenizer on emoji. See ``training.fit``.

    Args:
        model: trained in place.
        pictures: (N, 3, S, S) uint8 by size S.
        levels: (0,), or the coarser ones, for which everything that level 0 uses is frozen.
        batch_pixels: pixels in a batch, about the same for every size of pictures.
        warm_up: steps without quantization, before k-means places the codebook.
        revive_until: before this step, unused rows of the codebook are moved; at this step similar rows are
            merged, and from then on rows only follow their vectors.
    """

    calls_parts = True  # encoder, quantizer and decoders one by one: the model itself is never called

    def __init__(
        self,
        model: VQVAE,
        pictures: dict[int, Tensor],
        levels: Sequence[int] = (0,),
        batch_pixels: int = 36864,
        revive_until: int = 3000,
        warm_up: int = 150,
        seed: int = 0,
    ) -> None:
        self.model, self.pictures, self.levels = model, pictures, tuple(levels)
        self.batch_pixels, self.revive_until, self.seed = batch_pixels, revive_until, seed
        self.warm_up = warm_up
        self.learner = CodebookLearner(model.quantizer.codebook)
        self.frozen = 0 not in self.levels
        freeze_other_levels(model, self.levels)
        self._seen: tuple[Tensor, Tensor] | None = None
        self.start = checksum(*model.state_dict().values())

    def batch(self, step: int) -> Tensor:
        """Pictures (B, 3, S, S) in 0..1 of a step, half of them mirrored; they depend on seed and step alone."""
        generator = self._generator(step)
        size = list(self.pictures)[step % len(self.pictures)]
        pixels = self.pictures[size]  # (N, 3, S, S) uint8
        rows = torch.randint(len(pixels), (max(1, self.batch_pixels // size**2),), generator=generator)
        pictures = pixels[rows].float() / 255
        mirrored = torch.rand(len(rows), generator=generator) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
        return pictures.to(self.learner.codebook.device).contiguous(memory_format=torch.channels_last)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of the step's own batch, and numbers for the log."""
        if step == self.warm_up and not self.frozen:
            self.learner.place(self._vectors(step, n_batches=8), self._generator(step))
        pictures = self.batch(step)
        total = torch.zeros((), device=pictures.device)
        logs: dict[str, float] = {}
        for level, features in self._features(pictures):
            z = self.model.quantizer.project(features)
            if level == 0:
                locality = self._locality(pictures, z, step)
                sameness = spread_of_equals(pictures, z, self.model.config.rates[0])
                total = total + self._local_share(step) * (LOCALITY * locality + SAMENESS * sameness)
                logs |= {"locality": float(locality.detach()), "sameness": float(sameness.detach())}
            rows, commitment = self._quantize(z, step)
            output = self.model.decoder(level)(rows).float()
            total = total + reconstruction(output, self.model.normalise(pictures)) + COMMITMENT * commitment
            decoded = self.model.denormalise(output.detach())
            logs[f"psnr{pictures.shape[-1]}_level{level}"] = float(psnr(decoded, pictures).mean())
        return total, logs

    def after_step(self, step: int) -> None:
        """Let the codebook follow the encoder."""
        if self._seen is None or self.frozen:
            return
        codes, z = self._seen
        self.learner.update(codes, z)
        if step == self.revive_until:
            self.settle(step)
        elif step < self.revive_until and step % 10 == 0:
            self.learner.revive(z, self._generator(step))

    def settle(self, step: int) -> int:
        """Merge codebook rows that mean the same on the batches from this step on; returns how many moved."""
        return self.learner.settle(self._vectors(step, n_batches=32), self._generator(step))

    def validate(self) -> dict[str, float]:
        """PSNR in dB on characters that are held out from training."""
        numbers = {}
        for size in self.pictures:
            for level in self.levels:
                numbers[f"heldout_psnr{size}_level{level}"] = tokenizer_psnr(self.model, size, level=level)["psnr"]
        return numbers

    def decides(self) -> dict[str, Any]:
        """What decides the result besides the settings; ``revive_until`` follows from them."""
        facts = {name: getattr(self, name) for name in ("levels", "batch_pixels", "warm_up", "seed", "start")}
        return {**facts, "pictures": checksum(*self.pictures.values())}

    def state_dict(self) -> dict[str, Any]:
        """The codebook's moving averages, without which a resumed run would not be exact."""
        return {"counts": self.learner.counts, "sums": self.learner.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.learner.counts.copy_(state["counts"])
        self.learner.sums.copy_(state["sums"])

    def _features(self, pictures: Tensor) -> list[tuple[int, Tensor]]:
        """(level, features) of the levels in training; nothing is kept for a backward pass through a frozen encoder."""
        with torch.set_grad_enabled(not self.frozen):
            x = self.model.features(pictures, 0)
        features = []
        for level in range(max(self.levels) + 1):
            if level > 0:
                x = self.model.halvers[level - 1](x)
            if level in self.levels:
                features.append((level, x))
        return features

    def _local_share(self, step: int) -> float:
        """0 to 1: reconstruct first, be local later. A new encoder that has to do both at once learns neither."""
        return min(1.0, step / self.revive_until) ** 2

    def _locality(self, pictures: Tensor, z: Tensor, step: int) -> Tensor:
        """How much vectors z change when blocks of cells are exchanged with others, in half of the batch.

        It is relative to the variance of z, so that shrinking all vectors does not help.
        """
        generator = self._generator(step)
        cells = int(2 ** torch.randint(0, 3, (), generator=generator))  # a block's side: 1, 2 or 4
        side = cells * self.model.config.rates[0]
        here, pictures = z[: (len(z) + 1) // 2].float(), pictures[: (len(z) + 1) // 2]
        order = torch.randperm(pictures.numel() // (3 * side**2), generator=generator)
        features = self.model.features(jigsaw(pictures, side, order), 0)
        elsewhere = jigsaw(self.model.quantizer.project(features).float(), cells, order.argsort())
        return (here - elsewhere).pow(2).mean() / z.detach().float().var(dim=(0, 2, 3)).mean()

    def _quantize(self, z: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Rows and commitment loss; keeps what ``after_step`` needs. During the warm-up nothing is quantized."""
        if step < self.warm_up and not self.frozen:
            return z, z.new_zeros(())
        rows, commitment, codes = self.model.quantizer.straight_through(z)
        self._seen = codes.flatten(), rearrange(z.detach().float(), "b c h w -> (b h w) c")
        return rows, commitment

    @torch.no_grad()
    def _vectors(self, step: int, n_batches: int) -> Tensor:
        """Vectors (M, C) of the batches from this step on."""
        vectors = []
        for offset in range(n_batches):
            features = self.model.features(self.batch(step + offset), 0)
            vectors.append(rearrange(self.model.quantizer.project(features).float(), "b c h w -> (b h w) c"))
        return torch.cat(vectors)

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)


def freeze_other_levels(model: VQVAE, levels: Sequence[int]) -> None:
    """Leave trainable only what these levels need; everything that level 0 uses is frozen unless 0 is among them."""
    trained: list[nn.Module] = [model.decoder(level) for level in levels]
    trained += [model.halvers[level - 1] for level in range(1, max(levels) + 1)]
    if 0 in levels:
        trained += [model.encoder, model.quantizer.project]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)


def training_pictures(sizes: Sequence[int] = SIZES) -> dict[int, Tensor]:
    """Emoji (N, 3, S, S) uint8 by size, without the characters that the tokenizer is evaluated on."""
    left_out = set(indices(load_emoji("tokenizer_heldout")).tolist())
    rows = [row for row in range(len(load_emoji("all"))) if row not in left_out]
    return {size: rearrange(torch.from_numpy(render(size)[rows]), "n h w c -> n c h w") for size in sizes}


def train(
    folder: str | Path,
    finest: Settings | None = FINEST,
    coarser: Settings | None = COARSER,
    options: RunOptions = DEFAULTS,
    *,
    seed: int = 0,
    start_from: str | Path | None = None,
) -> dict[str, Any]:
    """Train the toy's tokenizer on emoji and write ``folder/vqvae.safetensors``.

    Level 0 comes first (about 0.4 s a step on one core), then the coarser levels with everything of level 0 frozen.
    The same call resumes an interrupted run.

    Args:
        finest, coarser: settings of the two parts; None leaves a part out.
        start_from: a weight file to start from, for example to train the coarser levels alone.

    Returns:
        ``weights`` (path), and for each size what ``tokenizer_psnr`` measures on characters that are held out from
        training, in dB.

    Raises:
        MiniCogViewError: for an unusable folder or weight file, or a loss that is not finite.
    """
    torch.manual_seed(seed)
    model = VQVAE(get_preset("toy").vqvae) if start_from is None else load_vqvae(start_from)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures, path = training_pictures(), Path(folder) / "vqvae.safetensors"
    if finest is not None:
        objective = TokenizerObjective(model, pictures, (0,), revive_until=int(0.65 * finest.steps), seed=seed)
        fit(objective, path.parent / "level0", finest, options)
        # Rows have drifted together again: merging them costs 0.1 dB, and white has one code instead of several.
        objective.settle(finest.steps)
    if coarser is not None:
        fit(TokenizerObjective(model, pictures, (1, 2), seed=seed), path.parent / "coarse", coarser, options)
    save_model(path, model, model.config, kind="vqvae")
    shipped = load_vqvae(path)
    return {"weights": str(path), **{f"{s}px": tokenizer_psnr(shipped, s) for s in SIZES}}
