"""The whole system as one object: text to pictures, pictures to text, and pictures to edited pictures.

The idea: a system is CogLM (``coglm.py``), a tokenizer for text (``tokenizer.py``) and pictures (``vqvae.py``), sampler
settings (``sampling.py``) and super-resolution (``upsampling.py``). ``CogView2`` joins them, so that a user gives words
and pictures and gets words and pictures back. CogView2 (arXiv 2204.14217), section 3; mirrors the original's
``cogview2_text2image.py`` and ``cogview2_completion.py``.

Shapes: ``n`` pictures, ``grid`` tokens along each side, ``K`` picture codes.

Different on purpose: a picture depends on its own seed alone, whatever is drawn beside it. In an edited picture, the
fine tokens outside the mask are the picture's own too; super-resolution does not predict them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL.Image import Image
from torch import Tensor

from minicogview.checkpoints.models import check_fit, find_folder, load_stages, plan_for, preset_of
from minicogview.checkpoints.weight_files import load_vqvae
from minicogview.clusters import Clusters, check_count, clusters_for, load_labels
from minicogview.coglm import CogLM, Filled
from minicogview.config import PRESETS, Preset, SamplingConfig, replace_settings
from minicogview.editing import CONTEXT, check_total, crop_box, paste_all, token_region
from minicogview.errors import MiniCogViewError
from minicogview.masks import check_region, to_mask
from minicogview.numbers import integer, prompt, seeds_of
from minicogview.pictures import Picture, as_codes, to_image
from minicogview.results import Pictures
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps
from minicogview.scale.machine import float32_by_default, sleeping_threads
from minicogview.scale.offload import Offload
from minicogview.scale.plan import Plan
from minicogview.tokenizer import Tokenizer, check_codes
from minicogview.upsampling import Progress, Upsampler
from minicogview.vqvae import VQVAE

BATCH = 32  # pictures that CogLM draws side by side, unless the plan for the memory says fewer


@dataclass(eq=False)
class CogView2:
    """Text to pictures, pictures to text, and pictures to edited pictures.

    Attributes:
        coglm: the first stage.
        tokenizer: of text and pictures; its ``level`` is the one that ``coglm`` was trained on.
        sampling: the sampler's settings, for calls that do not change them.
        labels: (K,) cluster of each picture code; None: computed by k-means on the codebook when first needed.
        upsampler: both super-resolution stages; None: pictures stay as coarse as ``coglm`` draws them.
        offload: loads the weights of the stage that is about to run; None: all are in memory.
        plan: how the weights of each stage are stored; None: in memory.

    Example:
        >>> model = CogView2.from_pretrained("toy")
        >>> pictures = model.generate("a red apple", n=2, seed=0)
        >>> pictures[0].size, tuple(pictures.tokens.shape)
        ((96, 96), (2, 8, 8))
        >>> pictures.coglm[0].size
        (32, 32)
    """

    coglm: CogLM
    tokenizer: Tokenizer
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    labels: Tensor | None = None
    upsampler: Upsampler | None = None
    offload: Offload | None = None
    plan: Plan | None = None

    def __post_init__(self) -> None:
        self._clusters: dict[int, Clusters | None] = {}
        self.coglm.decoding = fast_steps

    @classmethod
    @float32_by_default()
    def from_pretrained(
        cls,
        source: str | Path = "toy",
        preset: str | Preset | None = None,
        device: str = "cpu",
        offload: bool = False,
        memory: str | Plan = "auto",
        dtype: str = "auto",
        allow_other_base: bool = False,
    ) -> CogView2:
        """Load a preset whose weights ship with the package, or a folder of weights.

        Args:
            source: "toy", or a folder with ``vqvae.safetensors``, ``coglm.safetensors``, ``text.model`` and perhaps
                ``direct.safetensors``, ``iterative.safetensors`` and the original's ``cluster_label.npy``. Sizes are
                read from these files.
            preset: for a folder, the preset whose tokenizer level and sampler settings to use; None: the one whose
                sizes the files have.
            device: where the models run.
            offload: keep the weights of only one stage in memory, and load those of the next when it is about to run.
            memory: how much memory to use, such as "6GB", from which a plan for each stage's weights is made
                (``scale/plan.py``); "auto": all that is free. Or a plan.
            dtype: "float32", "bfloat16" or "float16", for computing; "auto": depends on the size of the model.
            allow_other_base: warn, instead of raising, if a super-resolution stage was trained on top of another CogLM.

        Raises:
            MiniCogViewError: if there is no such preset or folder, a file is missing, damaged or belongs to another
                model, or the memory is not enough.
        """
        folder = find_folder(source if str(source) in PRESETS else Path(source).expanduser())
        if preset is None and isinstance(source, str) and source in PRESETS:
            preset = source
        plan = memory if isinstance(memory, Plan) else plan_for(folder, memory, dtype, device, offload)
        coglm, direct, iterative, weights = load_stages(folder, plan, allow_other_base)
        vqvae = load_vqvae(folder / "vqvae.safetensors").to(plan.device)
        chosen = preset if isinstance(preset, Preset) else preset_of(preset, coglm.config, vqvae.config, folder)
        tokenizer = Tokenizer(folder / "text.model", vqvae.config.codebook_size, vqvae, chosen.level)
        check_fit(coglm.config, tokenizer, folder)
        label_file = folder / "cluster_label.npy"
        labels = load_labels(label_file, coglm.config.n_codes) if label_file.exists() else None
        upsampler = None
        if direct is not None:
            need = None if weights is None else weights.need
            upsampler = Upsampler(vqvae, chosen, direct, iterative, labels=labels, need=need, batch=plan.batch)
        return cls(coglm, tokenizer, chosen.sampling, labels, upsampler, weights, plan)

    # --- sizes and settings

    @property
    def vqvae(self) -> VQVAE:
        """The picture tokenizer."""
        assert self.tokenizer.vqvae is not None, "CogView2 needs a tokenizer that was made with a VQVAE"
        return self.tokenizer.vqvae

    @property
    def grid(self) -> int:
        """Tokens along each side of a picture."""
        return self.coglm.config.layout.grid

    @property
    def size(self) -> int:
        """Pixels along each side of a coarse picture."""
        return self.grid * self.vqvae.config.rates[self.tokenizer.level]

    @property
    def batch(self) -> int:
        """How many pictures CogLM draws side by side; the others wait for their turn."""
        return (self.plan and self.plan.batch) or BATCH

    @property
    def n_stages(self) -> int:
        """Number of stages with weights: 1 is CogLM, 2 adds the direct stage, 3 the iterative stage."""
        return 1 if self.upsampler is None else self.upsampler.n_stages

    def require_upsampler(self) -> Upsampler:
        """Both super-resolution stages; raises MiniCogViewError if there are none."""
        if self.upsampler is None:
            raise MiniCogViewError("these weights draw coarse pictures only: there is no direct.safetensors with them")
        return self.upsampler

    def clusters(self, n_clusters: int) -> Clusters | None:
        """Clusters of the picture codes, computed once; None for ``n_clusters`` 0, which is plain top-k."""
        if n_clusters not in self._clusters:
            self._clusters[n_clusters] = clusters_for(n_clusters, self.vqvae.quantizer.codebook, self.labels)
        return self._clusters[n_clusters]

    def sampler(self, seeds: Sequence[int], sampling: SamplingConfig | None = None) -> Sampler:
        """A sampler for the tokens of pictures with these seeds."""
        sampling = sampling or self.sampling
        return Sampler(seeds, sampling, self.clusters(sampling.n_clusters), self.grid**2)

    def settings(self, overrides: dict[str, Any]) -> SamplingConfig:
        """The sampler's settings with some of them replaced; raises as ``replace_settings`` does."""
        settings = replace_settings(self.sampling, overrides)
        if "n_clusters" in overrides:
            check_count(settings.n_clusters, self.labels)
        return settings

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without blanks around it.

        Raises:
            MiniCogViewError: if the text is empty, or has more tokens than there are positions.
        """
        ids = self.tokenizer.encode(prompt(text).strip())
        if not ids:
            raise MiniCogViewError("the text is empty: say in words what the picture shows")
        self.coglm.check_text(ids)
        return ids

    @float32_by_default()
    def codes(self, picture: Picture) -> Tensor:
        """Picture codes (grid, grid) of a file, a PIL image, an array or a tensor, which is resized to a square.

        Integers (grid, grid) are taken to be codes already and returned; see ``pictures.as_codes``.

        Raises:
            MiniCogViewError: if the picture cannot be read, or codes have another shape or range.
        """
        if (codes := as_codes(picture, self.grid)) is not None:
            return check_codes(codes, self.grid, self.coglm.config.n_codes)
        return self.tokenizer.encode_picture(picture, size=self.size)

    # --- tasks

    @float32_by_default()
    def generate(
        self,
        text: str,
        n: int = 4,
        seed: int | None = 0,
        on_step: Progress | None = None,
        keep: int | None = None,
        stages: int | None = None,
        on_picture: Callable[[int, Image], None] | None = None,
        **sampling: float,
    ) -> Pictures:
        """Draw ``n`` pictures of a text and upsample them.

        Args:
            text: English or Chinese.
            seed: picture ``i`` depends on ``seed + i`` alone, not on ``n``. None: a fresh one, told by ``.seeds``.
            on_step: called with the name of the current stage, the number of steps done, and their total.
            keep: post-selection: return and upsample only this many of the ``n`` pictures, those for which the same
                model finds the text the likeliest caption, best first. None: all, in the order of their seeds.
            stages: how many stages to run; None: all that have weights.
            on_picture: called with the seed and the picture as soon as one is finished.
            sampling: ``temperature``, ``top_k``, ``guidance`` and so on, instead of the preset's settings; see
                ``config.SamplingConfig``.

        Raises:
            MiniCogViewError: if the text is empty or too long, or a number is outside of its range.
        """
        settings, ids, stages = self.settings(sampling), self.encode(text), self._stages(stages)
        seeds = seeds_of(seed, n)
        keep = None if keep is None else integer(keep, "keep", 1, len(seeds), "n of the pictures at most")

        def draw(some: list[int], done: int) -> Filled:
            total = math.ceil(len(seeds) / self.batch) * self.grid**2
            report = None if on_step is None else lambda step: on_step("coglm", done + step, total)
            sampler = self.sampler(some, settings)
            return self.coglm.generate([ids], sampler, len(some), settings.text_weight, settings.guidance, report)

        pictures = self._in_batches(draw, text, seeds)
        if keep is not None:
            pictures = pictures.best(keep, self._caption_scores(ids, pictures.tokens))
        return self.upsample(pictures, stages, on_step, on_picture=on_picture)

    @float32_by_default()
    def complete(
        self, text: str, picture: Picture, region: Any, n: int = 1, seed: int | None = 0, **sampling: float
    ) -> Pictures:
        """Draw a part of a picture anew, with the text and the rest of the picture in view.

        Args:
            picture: file, PIL image, tensor (3, H, W), or codes (grid, grid).
            region: (grid, grid) tensor, array or lists, 1 where the picture is drawn anew.
            n, seed, sampling: as for ``generate``; guidance has no effect here.

        Raises:
            MiniCogViewError: as ``generate``; or if the region has another shape or is empty.
        """
        settings, ids, codes = self.settings(sampling), self.encode(text), self.codes(picture)
        hole = check_region(region, self.grid)

        def draw(some: list[int], done: int) -> Filled:
            sampler = self.sampler(some, settings)
            return self.coglm.complete(ids, codes.flatten(), hole, sampler, len(some), settings.text_weight)

        return self._in_batches(draw, text, seeds_of(seed, n))

    @float32_by_default()
    def edit(
        self,
        text: str,
        picture: Picture,
        mask: Picture,
        n: int = 1,
        seed: int | None = 0,
        stages: int | None = None,
        context: float = CONTEXT,
        **sampling: float,
    ) -> Pictures:
        """Draw the marked part of a picture of any size anew; pixels outside the mask do not change (``editing.py``).

        Args:
            text: describes the cut-out as it should be afterwards.
            picture: file, PIL image, array or tensor; see ``pictures.to_tensor``.
            mask: the same, of the picture's size, white where it is drawn anew; see ``masks.to_mask``.
            n, seed, sampling: as for ``complete``. stages: as for ``generate``.
            context: side of the cut-out / longer side of the mask; more of it shows the models more surroundings.

        Returns:
            whole pictures, after each stage; their ``tokens`` are those of the cut-out.

        Raises:
            MiniCogViewError: as ``complete``; or if the mask does not have the picture's size or marks nothing, or
                ``context`` is below 1.
        """
        image = to_image(picture)
        chosen = to_mask(mask, (image.height, image.width), image)
        top, left, bottom, right = box = crop_box(chosen, context, self.grid)
        cut, hole = image.crop((left, top, right, bottom)), chosen[top:bottom, left:right]
        stages = self._stages(stages)
        check_total(image, n * stages)
        drawn = self.complete(text, self.codes(cut), token_region(hole, self.grid), n, seed, **sampling)
        if stages > 1 and self.upsampler is not None:
            side = self.upsampler.grid
            own = self.tokenizer.encode_picture(cut, size=self.size * side // self.grid).flatten()
            drawn = self.upsample(drawn, stages, keep=(own.cpu(), token_region(hole, side)))
        return paste_all(image, drawn, box, chosen)

    @float32_by_default()
    def upsample(
        self,
        pictures: Pictures,
        stages: int | None = None,
        on_step: Progress | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
        on_picture: Callable[[int, Image], None] | None = None,
    ) -> Pictures:
        """Run the super-resolution stages on coarse pictures.

        Args:
            stages, on_step, on_picture: as for ``generate``. keep: as for ``Upsampler.run``.
        """
        stages, upsampler, last = self._stages(stages), self.upsampler, list[Image]()
        tell = on_picture or (lambda seed, image: None)
        if stages == 1 or upsampler is None:
            for seed, image in zip(pictures.seeds, pictures.images, strict=True):
                tell(seed, image)
            return pictures

        def decode(first: int, codes: Tensor) -> None:
            for seed, one in zip(pictures.seeds[first:], codes):
                last.append(self.tokenizer.decode_picture(one.unflatten(0, (upsampler.grid, -1))))
                tell(seed, last[-1])

        texts, tokens = [self.encode(pictures.text)] * len(pictures.tokens), pictures.tokens.flatten(1)
        with sleeping_threads(self.coglm):
            after = upsampler.run(texts, tokens, pictures.seeds, stages, on_step, keep, decode)
        fine = [rearrange(codes, "n (h w) -> n h w", h=upsampler.grid) for codes in after]
        direct = last if stages == 2 else [self.tokenizer.decode_picture(one) for one in fine[0]]
        iterative = last if stages == 3 else None
        return dataclasses.replace(pictures, images=last, direct=direct, iterative=iterative, fine_tokens=fine[-1])

    @float32_by_default()
    def caption(self, picture: Picture, language: str = "en") -> str:
        """Describe a picture in English ("en") or Chinese ("zh"), always choosing the likeliest token."""
        self._need_coglm()
        codes, start = self.codes(picture).flatten(), self.tokenizer.start_token(language)
        return self.tokenizer.decode(self.coglm.caption(codes, start, self.tokenizer.eos))

    @float32_by_default()
    def score(self, picture: Picture, texts: str | Sequence[str]) -> Tensor:
        """How well each text (or the only one) describes a picture: (texts,) mean log-probability per token in nats.

        Both languages may be mixed. Post-selection keeps the pictures for which the prompt scores highest.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        self._need_coglm()
        codes, scores = self.codes(picture).flatten()[None], torch.empty(len(texts))
        ids = [[*self.encode(text), self.tokenizer.eos] for text in texts]
        starts = [self.tokenizer.language_token(row[:-1]) for row in ids]
        for start in set(starts):
            rows = [i for i, other in enumerate(starts) if other == start]
            scores[rows] = self.coglm.score_captions(codes, [ids[i] for i in rows], start).cpu()
        return scores

    def _caption_scores(self, ids: list[int], tokens: Tensor) -> Tensor:
        """Mean log-probability (n,) of one text's tokens as the caption of each picture (n, grid, grid)."""
        self._need_coglm()
        texts, start = [[*ids, self.tokenizer.eos]] * self.batch, self.tokenizer.language_token(ids)
        scored = (self.coglm.score_captions(b, texts[: len(b)], start) for b in tokens.flatten(1).split(self.batch))
        return torch.cat([scores.cpu() for scores in scored])

    def _need_coglm(self) -> None:
        """Have CogLM's weights loaded, if they are offloaded."""
        if self.offload is not None:
            self.offload.need("coglm")

    def _stages(self, stages: int | None) -> int:
        """``stages``, or all there are if it is None; raises MiniCogViewError if there are fewer."""
        return self.n_stages if stages is None else integer(stages, "stages", 1, self.n_stages, "these have weights")

    def _in_batches(self, draw: Callable[[list[int], int], Filled], text: str, seeds: list[int]) -> Pictures:
        """Call ``draw(seeds, tokens done before)`` for one batch of pictures after another, and decode their tokens."""
        self._need_coglm()
        batches = range(0, len(seeds), self.batch)
        drawn = [draw(seeds[i : i + self.batch], i // self.batch * self.grid**2) for i in batches]
        tokens = rearrange(torch.cat([part.tokens for part in drawn]), "n (h w) -> n h w", h=self.grid).cpu()
        # One by one: the decoder rounds differently in a batch, and a picture must not depend on its neighbours.
        images = [self.tokenizer.decode_picture(codes) for codes in tokens]
        return Pictures(images, tokens, torch.cat([part.scores for part in drawn]).cpu(), text, seeds, coglm=images)
