"""Super-resolution, the direct and the iterative stage as one: coarse tokens in, nine times as many fine tokens out.

The idea: the direct stage (``super_resolution.py``) chooses all fine tokens at once, and the iterative stage
(``lopar.py``) resamples some of them, round after round. This module joins the two models with the samplers that choose
their tokens, so that generation, editing and evaluation all use the same code. CogView2 (arXiv 2204.14217),
section 3.3.

Mirrors: ``sr_pipeline/sr_group.py`` of the official code.

Shapes: ``B`` pictures, ``n`` coarse and ``F`` fine tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minicogview.clusters import Clusters, clusters_for
from minicogview.config import Preset, SamplingConfig
from minicogview.lopar import OFFICIAL, IterativeSR, Schedule
from minicogview.sampling import NearestToMean, Sampler
from minicogview.super_resolution import CellSampler, DirectSR, enlarged_codes
from minicogview.vqvae import VQVAE

Texts = Sequence[Sequence[int]]
Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)
BATCH = 8  # pictures that are upsampled side by side, unless the plan for the memory says fewer


@dataclass(eq=False)
class Upsampler:
    """Super-resolution of coarse pictures.

    Attributes:
        vqvae: the picture tokenizer. preset: has the settings of both stages' samplers.
        direct: the first of the two models. iterative: the second; None: the direct stage is the last one.
        schedule: which tokens are resampled in which round.
        labels: (K,) cluster of each picture code; None: computed by k-means on the codebook when first needed.
        need: called with the name of a stage before it runs, to load its weights; None: all are in memory.
        batch: the most pictures that are upsampled side by side; None: ``BATCH``.
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
        """Clusters of the picture codes, for the direct stage; None for plain top-k."""
        return clusters_for(self.preset.direct_sampling.n_clusters, self.vqvae.quantizer.codebook, self.labels)

    @property
    def n_stages(self) -> int:
        """Number of stages, including CogLM, which draws the coarse picture."""
        return 2 if self.iterative is None else 3

    @property
    def grid(self) -> int:
        """Fine tokens along each side of a picture."""
        return self.direct.config.fine_grid[0]

    def sampler(
        self, seeds: Sequence[int], settings: SamplingConfig, clusters: Clusters | None = None
    ) -> CellSampler:
        """The sampler of fine tokens that ``preset.fine_choice`` names; picture i depends on ``seeds[i]`` alone."""
        if self.preset.fine_choice == "mean":
            return NearestToMean(self.vqvae.quantizer.codebook, settings.temperature)
        return Sampler(seeds, settings, clusters, self.grid**2)

    def run_direct(self, texts: Texts, coarse: Tensor, seeds: Sequence[int]) -> Tensor:
        """The direct stage: fine codes (B, F) for coarse codes (B, n)."""
        sampler = self.sampler(seeds, self.preset.direct_sampling, self.clusters)
        start = None
        if self.direct.config.fine_start == "enlarged":
            start = enlarged_codes(self.vqvae, coarse, self.direct.config, self.preset.level)
        return self.direct.upsample(texts, coarse, sampler, start)

    def run_iterative(
        self, texts: Texts, fine: Tensor, seeds: Sequence[int], region: Tensor | None = None
    ) -> list[Tensor]:
        """The iterative stage: fine codes (B, F) after each round; only cells in ``region`` (rows, columns) change."""
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
        on_codes: Callable[[int, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Upsample many coarse pictures, in batches: codes (B, F) on the CPU after stage 2 and, if it runs, stage 3.

        Args:
            coarse: codes (B, n). seeds: one for each picture. stages: the last one to run, 2 (direct) or 3 (iterative).
            on_step: called with the name of the current stage, the number of pictures done, and their total.
            keep: the fine codes (F,) of an existing picture, and (rows, columns) bool, True where they may change; all
                others stay. None: all may change.
            on_codes: called after each batch of the last stage, with the number of its first picture and its codes.
        """
        region = None if keep is None else keep[1]

        def in_batches(stage: str, last: bool, work: Callable[[slice], Tensor]) -> Tensor:
            if self.need is not None:
                self.need(stage)
            parts, batch = [], self.batch or BATCH
            for i in range(0, len(coarse), batch):
                parts.append(work(slice(i, i + batch)).cpu())
                if keep is not None and stage == "direct":
                    parts[-1] = torch.where(keep[1].flatten(), parts[-1], keep[0])
                if on_step:
                    on_step(stage, min(i + batch, len(coarse)), len(coarse))
                if on_codes and last:
                    on_codes(i, parts[-1])
            return torch.cat(parts)

        def direct(some: slice) -> Tensor:
            return self.run_direct(texts[some], coarse[some], seeds[some])

        fine = in_batches("direct", stages == 2, direct)
        if stages == 2:
            return [fine]

        def iterative(some: slice) -> Tensor:
            return self.run_iterative(texts[some], fine[some], seeds[some], region)[-1]

        return [fine, in_batches("iterative", True, iterative)]
