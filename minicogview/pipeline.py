"""From text to pictures, and everything else that one set of weights can do, as one object.

The idea: a system is a transformer (``coglm.py``), a tokenizer with its picture half (``tokenizer.py``,
``vqvae.py``) and the settings of the sampler (``sampling.py``). ``CogView2`` puts them together so that a
person can hand in words and pictures and get words and pictures back.
CogView2 (arXiv 2204.14217), section 3; mirrors the original's ``cogview2_text2image.py`` and
``cogview2_completion.py``.

Shapes: ``n`` pictures, ``grid`` tokens along each side, ``K`` picture codes.

Different on purpose: a picture follows from its own seed alone, whatever is drawn beside it. In an edited picture the
tokens outside of the mask are the picture's own on the fine grid too, not a sharpened guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from minicogview.checkpoints.files import load_vqvae
from minicogview.checkpoints.loading import check_fit, find_folder, load_stages, plan_for, preset_of
from minicogview.clusters import Clusters, cluster_codebook, load_labels
from minicogview.coglm import CogLM, Filled
from minicogview.config import PRESETS, Preset, SamplingConfig, replace_settings
from minicogview.editing import CONTEXT, Mask, crop_box, paste, to_mask, token_region
from minicogview.errors import MiniCogViewError
from minicogview.pictures import Picture, Pictures, to_image
from minicogview.sampling import Sampler
from minicogview.scale.decoding import fast_steps
from minicogview.scale.machine import sleeping_threads
from minicogview.scale.offload import Offload
from minicogview.scale.plan import Plan
from minicogview.tokenizer import Tokenizer
from minicogview.upsampling import Progress, Upsampler
from minicogview.vqvae import VQVAE

BATCH = 32  # pictures that are drawn side by side, unless the plan says fewer; more of them wait for their turn


@dataclass(eq=False)
class CogView2:
    """Text to pictures, pictures to text, and pictures with a hole to whole ones.

    Attributes:
        coglm: the transformer.
        tokenizer: with its picture half; its ``level`` is the rate that ``coglm`` draws at.
        sampling: defaults of every call. ``n_clusters`` 0 stands for plain top-k.
        labels: (K,) cluster of each picture code; None: by k-means on the codebook when first needed.
        upsampler: both super-resolution stages; None: pictures stay as coarse as ``coglm`` draws them.
        offload: brings in the weights of the stage at work; None: all are in memory.
        plan: how each stage has its weights; None: in memory.

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
        self._clusters: dict[int, Clusters] = {}
        self.coglm.decoding = fast_steps

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "toy",
        preset: str | Preset | None = None,
        device: str = "cpu",
        offload: bool = False,
        memory: str | Plan = "auto",
        dtype: str = "auto",
    ) -> CogView2:
        """Load a preset whose weights ship with the package, or a folder of weights.

        Args:
            source: "toy"; or a folder with ``vqvae.safetensors``, ``coglm.safetensors``, ``text.model`` and
                perhaps ``direct.safetensors``, ``iterative.safetensors`` and the original's ``cluster_label.npy``.
                Sizes are read from these files.
            preset: of a folder: which preset's tokenizer rate and sampler settings to use; None: of the one
                that has the sizes in the files.
            device: where the models go.
            offload: have the weights of one stage at a time in memory, and read those of the next when its turn comes.
            memory: how much there is, such as "6GB": chooses how each stage has its weights (``scale/plan.py``); "auto":
                what is free. Or a plan.
            dtype: of the computation: "float32", "bfloat16", "float16"; "auto": by the size of the model.

        Raises:
            MiniCogViewError: if there is no such preset or folder, a file is missing, damaged or of another model, or
                so little memory is not enough.
        """
        folder = find_folder(source)
        if preset is None and isinstance(source, str) and source in PRESETS:
            preset = source
        plan = memory if isinstance(memory, Plan) else plan_for(folder, memory, dtype, device, offload)
        coglm, direct, iterative, weights = load_stages(folder, plan)
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
        """The tokenizer's picture half."""
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
        """Pictures that are drawn side by side."""
        return (self.plan and self.plan.batch) or BATCH

    @property
    def n_stages(self) -> int:
        """Stages that there are weights for: 1 is CogLM, 2 adds the direct stage, 3 the iterative one."""
        return 1 if self.upsampler is None else self.upsampler.n_stages

    def require_upsampler(self) -> Upsampler:
        """Both super-resolution stages; an error where these weights have none."""
        if self.upsampler is None:
            raise MiniCogViewError("these weights draw coarse pictures only: there is no direct.safetensors beside them")
        return self.upsampler

    def clusters(self, n_clusters: int) -> Clusters | None:
        """Clusters of the picture codes, made once; None for ``n_clusters`` 0, which is plain top-k."""
        if n_clusters == 0:
            return None
        if n_clusters not in self._clusters:
            labels = self.labels
            if labels is None:
                labels = cluster_codebook(self.vqvae.quantizer.codebook, n_clusters)
            self._clusters[n_clusters] = Clusters.of(labels)
        return self._clusters[n_clusters]

    def sampler(self, seeds: Sequence[int], sampling: SamplingConfig | None = None) -> Sampler:
        """What draws the tokens of pictures with these seeds."""
        sampling = sampling or self.sampling
        return Sampler(seeds, sampling, self.clusters(sampling.n_clusters), self.grid**2)

    def settings(self, overrides: dict[str, Any]) -> SamplingConfig:
        """The sampler's settings with some of them replaced; raises as ``replace_settings`` does."""
        return replace_settings(self.sampling, overrides)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, blanks around it left out.

        Raises:
            MiniCogViewError: if the text is empty, or has more tokens than fit.
        """
        ids = self.tokenizer.encode(text.strip())
        if not ids:
            raise MiniCogViewError("the text is empty: say in words what the picture shows")
        self.coglm.check_text(ids)
        return ids

    def codes(self, picture: Picture) -> Tensor:
        """Picture codes (grid, grid) of a file, a PIL image or a (3, H, W) tensor, which is made square.

        A tensor (grid, grid) is taken for codes and given back.

        Raises:
            MiniCogViewError: if the picture cannot be read, or codes have another shape or range.
        """
        if not (isinstance(picture, Tensor) and picture.ndim == 2):
            return self.tokenizer.encode_picture(picture, size=self.size)
        n_codes = self.coglm.config.n_codes
        if picture.shape != (self.grid, self.grid) or picture.min() < 0 or picture.max() >= n_codes:
            raise MiniCogViewError(
                f"codes of shape {tuple(picture.shape)}, from {picture.min()} to {picture.max()}: "
                f"give ({self.grid}, {self.grid}) with values 0..{n_codes - 1}, or a picture"
            )
        return picture.long()

    # --- tasks

    def generate(
        self,
        text: str,
        n: int = 4,
        seed: int = 0,
        on_step: Progress | None = None,
        keep: int | None = None,
        stages: int | None = None,
        **sampling: float,
    ) -> Pictures:
        """Draw ``n`` pictures of a text and sharpen them.

        Args:
            text: English or Chinese.
            seed: picture ``i`` follows from ``seed + i`` alone, not from ``n``.
            on_step: called with the name of the stage at work, how much of it is done, and of how much.
            keep: post-selection: of the ``n`` pictures return only these many, those whose text the same model finds
                the likeliest caption, best first; only those are sharpened. None: all, in the order of their seeds.
            stages: stop after so many; None: all that there are weights for.
            sampling: ``temperature``, ``top_k``, ``guidance`` and so on instead of the preset's; see
                ``config.SamplingConfig``.

        Raises:
            MiniCogViewError: if the text is empty or too long, n is below 1, keep is not between 1 and n, there are
                not so many stages, or a setting is wrong.
        """
        settings, ids, stages = self.settings(sampling), self.encode(text), self._stages(stages)
        if keep is not None and not 1 <= keep <= n:
            raise MiniCogViewError(f"keep is {keep}: keep 1 to n = {n} of the pictures")

        def draw(seeds: list[int], done: int) -> Filled:
            total = -(-n // self.batch) * self.grid**2
            report = None if on_step is None else lambda step: on_step("coglm", done + step, total)
            sampler = self.sampler(seeds, settings)
            return self.coglm.generate([ids], sampler, len(seeds), settings.text_weight, settings.guidance, report)

        pictures = self._in_batches(draw, text, n, seed)
        if keep is not None:
            pictures = pictures.best(keep, self._caption_scores(ids, pictures.tokens))
        return self.upsample(pictures, stages, on_step)

    def complete(
        self, text: str, picture: Picture, region: Any, n: int = 1, seed: int = 0, **sampling: float
    ) -> Pictures:
        """Draw a part of a picture anew, with the text and the rest of the picture in view.

        Args:
            picture: file, PIL image, tensor (3, H, W), or codes (grid, grid).
            region: (grid, grid) tensor, array or lists, 1 = draw anew.
            n, seed, sampling: as for ``generate``; guidance has no effect here.

        Raises:
            MiniCogViewError: as ``generate``; or if the region has another shape, or nothing is to be drawn.
        """
        settings, ids, codes = self.settings(sampling), self.encode(text), self.codes(picture)
        hole = torch.as_tensor(region).bool()
        if hole.shape != (self.grid, self.grid) or not hole.any():
            raise MiniCogViewError(
                f"region of shape {tuple(hole.shape)} with {int(hole.sum())} cells to draw: "
                f"give ({self.grid}, {self.grid}) with 1 where the picture is to be drawn anew"
            )

        def draw(seeds: list[int], done: int) -> Filled:
            sampler = self.sampler(seeds, settings)
            return self.coglm.complete(ids, codes.flatten(), hole, sampler, len(seeds), settings.text_weight)

        return self._in_batches(draw, text, n, seed)

    def edit(
        self,
        text: str,
        picture: Picture,
        mask: Mask,
        n: int = 1,
        seed: int = 0,
        stages: int | None = None,
        context: float = CONTEXT,
        **sampling: float,
    ) -> Pictures:
        """Draw what a mask marks anew, in a picture of any size; pixels outside of the mask stay as they are.

        Args:
            text: what the cut-out around the mask shows when it is done.
            picture: file, PIL image, or tensor (3, H, W).
            mask: array or tensor (H, W), or a picture of that size; see ``editing.to_mask``.
            n, seed, sampling: as for ``complete``. stages: as for ``generate``.
            context: side of the cut-out / longer side of the mask: more of it shows the models more surroundings.

        Returns:
            whole pictures, after each stage; their ``tokens`` are those of the cut-out.

        Raises:
            MiniCogViewError: as ``complete``; or if the mask has another size than the picture, or marks nothing, or
                context is below 1.
        """
        image = to_image(picture)
        chosen = to_mask(mask, (image.height, image.width))
        top, left, bottom, right = box = crop_box(chosen, context, self.grid)
        stages, cut, hole = self._stages(stages), image.crop((left, top, right, bottom)), chosen[top:bottom, left:right]
        drawn = self.complete(text, self.codes(cut), token_region(hole, self.grid), n, seed, **sampling)
        if stages > 1 and self.upsampler is not None:
            side = self.upsampler.grid
            own = self.tokenizer.encode_picture(cut, size=self.size * side // self.grid).flatten()
            drawn = self.upsample(drawn, stages, keep=(own.cpu(), token_region(hole, side)))
        pasted: dict[str, Any] = {
            name: [paste(image, patch, box, chosen) for patch in patches]
            for name in ("coglm", "direct", "iterative")
            if (patches := getattr(drawn, name)) is not None
        }
        return dataclasses.replace(drawn, images=list(pasted.values())[-1], **pasted)

    def upsample(
        self,
        pictures: Pictures,
        stages: int | None = None,
        on_step: Progress | None = None,
        keep: tuple[Tensor, Tensor] | None = None,
    ) -> Pictures:
        """Coarse pictures through the other stages.

        Args:
            stages, on_step: as for ``generate``.
            keep: as for ``Upsampler.run``.
        """
        stages, upsampler = self._stages(stages), self.upsampler
        if stages == 1 or upsampler is None:
            return pictures
        texts, tokens = [self.encode(pictures.text)] * len(pictures.tokens), pictures.tokens.flatten(1)
        with sleeping_threads(self.coglm):
            after = upsampler.run(texts, tokens, pictures.seeds, stages, on_step, keep)
        codes = [rearrange(fine, "n (h w) -> n h w", h=upsampler.grid) for fine in after]
        images = [[self.tokenizer.decode_picture(one) for one in part] for part in codes]
        return dataclasses.replace(
            pictures,
            images=images[-1],
            direct=images[0],
            iterative=images[1] if stages == 3 else None,
            fine_tokens=codes[-1],
        )

    def caption(self, picture: Picture, language: str = "en") -> str:
        """Describe a picture in words, "en" or "zh": the likeliest word after word."""
        self._need_coglm()
        codes = self.codes(picture).flatten()
        return self.tokenizer.decode(self.coglm.caption(codes, self._start(language), self.tokenizer.eos))

    def score(self, picture: Picture, texts: Sequence[str]) -> Tensor:
        """How well each text describes a picture: (texts,) mean log-probability of its tokens in nats.

        Texts of both languages may be mixed. Post-selection keeps the pictures that score highest.
        """
        self._need_coglm()
        codes = self.codes(picture).flatten()[None]
        scores = torch.empty(len(texts))
        ids = [[*self.encode(text), self.tokenizer.eos] for text in texts]
        starts = [self.tokenizer.language_token(row[:-1]) for row in ids]
        for start in set(starts):
            rows = [i for i, other in enumerate(starts) if other == start]
            scores[rows] = self.coglm.score_captions(codes, [ids[i] for i in rows], start).cpu()
        return scores

    # --- helpers

    def _caption_scores(self, ids: list[int], tokens: Tensor) -> Tensor:
        """(n,) mean log-probability of one text's tokens as the caption of each picture (n, grid, grid)."""
        self._need_coglm()
        texts, start = [[*ids, self.tokenizer.eos]] * self.batch, self.tokenizer.language_token(ids)
        batches = tokens.flatten(1).split(self.batch)
        return torch.cat([self.coglm.score_captions(b, texts[: len(b)], start).cpu() for b in batches])

    def _need_coglm(self) -> None:
        if self.offload is not None:
            self.offload.need("coglm")

    def _stages(self, stages: int | None) -> int:
        """``stages``, or all there are; an error if there are not so many."""
        if stages is not None and not 1 <= stages <= self.n_stages:
            raise MiniCogViewError(f"stages is {stages}: these weights have 1 to {self.n_stages}")
        return self.n_stages if stages is None else stages

    def _start(self, language: str) -> int:
        starts = {"en": self.tokenizer.boe, "zh": self.tokenizer.boc}
        if language not in starts:
            raise MiniCogViewError(f"no captions in language {language!r}: choose en or zh")
        return starts[language]

    def _in_batches(self, draw: Callable[[list[int], int], Filled], text: str, n: int, seed: int) -> Pictures:
        """Call ``draw(seeds, tokens done before)`` for a batch of pictures at a time; decode what it returns."""
        if n < 1:
            raise MiniCogViewError(f"n is {n}: ask for 1 picture or more")
        if not 0 <= seed <= 2**63 - n:
            raise MiniCogViewError(f"seed is {seed}: use a whole number from 0 to 2 ** 63 - n")
        self._need_coglm()
        seeds = list(range(seed, seed + n))
        starts = range(0, n, self.batch)
        drawn = [draw(seeds[i : i + self.batch], i // self.batch * self.grid**2) for i in starts]
        tokens = rearrange(torch.cat([part.tokens for part in drawn]), "n (h w) -> n h w", h=self.grid).cpu()
        # One by one: in a batch the decoder rounds differently, and a picture must not depend on its neighbours.
        images = [self.tokenizer.decode_picture(codes) for codes in tokens]
        scores = torch.cat([part.scores for part in drawn]).cpu()
        return Pictures(images, tokens, scores, text, seeds, coglm=images)
