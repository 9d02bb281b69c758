"""Both super-resolution stages as one: coarse tokens in, nine times as many fine tokens out.

The idea: the direct stage (``super_resolution.py``) chooses every fine token at once, the iterative stage
(``lopar.py``) guesses a part of them again, round after round. This module holds the two models together with what
chooses their tokens, so that generating, editing and evaluating all go through the same code. CogView2
(arXiv 2204.14217), section 3.3.

Mirrors: ``sr_pipeline/sr_group.py`` of the official code.

Shapes: ``B`` pictures, ``n`` coarse and ``F`` fine tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minicogview.clusters import Clusters, cluster_codebook
from minicogview.config import Preset, SamplingConfig
from minicogview.lopar import OFFICIAL, IterativeSR, Schedule
from minicogview.sampling import NearestToMean, Sampler
from minicogview.super_resolution import CellSampler, DirectSR, enlarged_codes
from minicogview.vqvae import VQVAE

Texts = Sequence[Sequence[int]]
Progress = Callable[[str, int, int], None]  # (stage, done, of how many)
BATCH = 8  # pictures side by side, unless the plan for the memory says fewer


@dataclass(eq=False)
class Upsampler:
    """Super-resolution of coarse pictures.

    Attributes:
        vqvae, preset: the tokenizer's picture half, and the settings of both stages' samplers.
        direct: the first of the two models. iterative: the second; None: the direct stage is the last one.
        schedule: which tokens are guessed again in which round.
        labels: (K,) cluster of each picture code; None: by k-means on the codebook when first needed.
        need: called with the name of a stage before it works, to bring in its weights; None: all are in memory.
        batch: pictures side by side at most; None: BATCH.
    """

    vqvae: VQVAE
    preset: Preset
    direct: DirectSR
    iterative: IterativeSR | None = None
    schedule: Schedule = OFFICIAL
    labels: Tensor | None = None
    need: Callable[[str], object] | None = None
    batch: int | None = None

    @cached_property
    def clusters(self) -> Clusters | None:
        """Of the picture codes, for the direct stage; None for plain top-k."""
        n_clusters = self.preset.direct_sampling.n_clusters
        if n_clusters == 0:
            return None
        labels = cluster_codebook(self.vqvae.quantizer.codebook, n_clusters) if self.labels is None else self.labels
        return Clusters.of(labels)

    @property
    def n_stages(self) -> int:
        """Stages in all, the one that draws the coarse picture included."""
        return 2 if self.iterative is None else 3

    @property
    def grid(self) -> int:
        """Fine tokens along each side of a picture."""
        return self.direct.config.fine_grid[0]

    def sampler(
        self, seeds: Sequence[int], settings: SamplingConfig, clusters: Clusters | None = None
    ) -> CellSampler:
        """What chooses fine tokens, as ``preset.fine_choice`` says; picture i follows from its own seed."""
        if self.preset.fine_choice == "mean":
            return NearestToMean(self.vqvae.quantizer.codebook, settings.temperature)
        return Sampler(seeds, settings, clusters, self.grid**2)

    def run_direct(self, texts: Texts, coarse: Tensor, seeds: Sequence[int]) -> Tensor:
        """The direct stage: fine codes (B, F) for coarse codes (B, n); picture i follows from its own seed."""
        sampler = self.sampler(seeds, self.preset.direct_sampling, self.clusters)
        start = None
        if self.direct.config.fine_start == "enlarged":
            start = enlarged_codes(self.vqvae, coarse, self.direct.config, self.preset.level)
        return self.direct.upsample(texts, coarse, sampler, start)

    def run_iterative(
        self, texts: Texts, fine: Tensor, seeds: Sequence[int], region: Tensor | None = None
    ) -> list[Tensor]:
        """The iterative stage: fine codes (B, F) after each round; only those in ``region`` (rows, columns) change."""
        assert self.iterative is not None, "an Upsampler without an iterative model has one stage only"
        samplers = []
        for number, top_k in enumerate(self.schedule.top_k, 1):
            settings = SamplingConfig(temperature=self.preset.iterative_temperature, top_k=top_k)
            samplers.append(self.sampler([seed + (number << 40) for seed in seeds], settings))
        return self.iterative.resample(texts, fine, samplers, self.schedule, region)

    def run(
        self,
        texts: Texts,
        coarse: Tensor,
        seeds: Sequence[int],
        stages: int,
        on_step: Progress | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Many coarse pictures through both stages: codes (B, F) on the CPU after stage 2 and, if asked for, stage 3.

        Args:
            coarse: codes (B, n). seeds: one for each picture. stages: 2 or 3; the one that drew ``coarse`` counts.
            on_step: called with the name of the stage at work, how many pictures are done, and of how many.
            keep: fine codes (F,) of a picture, and where (rows, columns) bool they may change; with it everything
                else stays as it is.
        """
        region = None if keep is None else keep[1]

        def in_batches(stage: str, work: Callable[[slice], Tensor]) -> Tensor:
            if self.need is not None:
                self.need(stage)
            parts, batch = [], self.batch or BATCH
            for i in range(0, len(coarse), batch):
                parts.append(work(slice(i, i + batch)).cpu())
                if on_step:
                    on_step(stage, min(i + batch, len(coarse)), len(coarse))
            return torch.cat(parts)

        fine = in_batches("direct", lambda some: self.run_direct(texts[some], coarse[some], seeds[some]))
        if keep is not None:
            fine = torch.where(keep[1].flatten(), fine, keep[0])
        if stages == 2:
            return [fine]

        def iterative(some: slice) -> Tensor:
            return self.run_iterative(texts[some], fine[some], seeds[some], region)[-1]

        return [fine, in_batches("iterative", iterative)]
