"""What CogLM learns from: captions and coarse pictures, made into samples of four tasks that share a batch.

The idea: every sample is a text and a picture; the task decides the mask (``masking.py``). Three tasks are the
original's (draw, caption with patch infilling, text spans). ``complete`` trains with the mask that editing uses,
which the original meets for the first time at inference. CogView2 (arXiv 2204.14217), section 3.1.

The original's authors never published this part. Ours adds what made a small model draw combinations that it was
never shown: token embeddings that start from the codebook; input codes replaced at random or by those of a similar
picture, so that the model trusts the text more than the latest tokens; targets spread over neighbouring codes;
captions left out now and then; and a larger weight for text tokens, since a sample has far more picture tokens.

Shapes: ``S`` sequence length, ``n`` picture tokens, ``K`` codebook size.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicogview import masking
from minicogview.coglm import Batch, CogLM, collate
from minicogview.data.captions import LANGUAGES
from minicogview.errors import MiniCogViewError
from minicogview.masking import Sample
from minicogview.numbers import MANY, checked, integer, number
from minicogview.tokenizer import Tokenizer
from minicogview.training.state import checksum

TASKS = ("draw", "caption", "complete", "text")


@dataclass(frozen=True)
class CogLMData:
    """Pictures and their words.

    ``describe(i, language, rng)`` returns a caption of picture ``i``, which may be another one each time;
    ``name(i, language)`` returns its plain name. In captioning, a picture is followed by a text in each language.
    """

    codes: Tensor  # (N, n) int64, coarse picture tokens
    describe: Callable[[int, str, random.Random], str]
    name: Callable[[int, str], str]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class CogLMRecipe:
    """How samples are made. Shares and rates are between 0 and 1."""

    batch_size: int = 64
    shares: tuple[float, ...] = (0.6, 0.25, 0.1, 0.05)  # of TASKS
    no_caption: float = 0.1  # of "draw" samples: without a text, for classifier-free guidance
    plain_caption: float = 0.5  # of "caption" targets: the plain name; the others come from ``describe``
    text_weight: float = 3.0  # weight of a text token in the loss; a picture token has weight 1
    lookalike: float = 0.4  # of "draw" samples: some input codes are replaced by those of a similar picture
    n_lookalikes: int = 8
    max_noise: float = 0.3  # the share of replaced input codes is uniform between 0 and this
    foreign: float = 0.3  # of the replaced codes: by any code; the others by a neighbour in the codebook
    spread: float = 0.1  # probability that a target gives to neighbouring codes
    n_neighbours: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_recipe(self, "no_caption", "plain_caption", "lookalike", "max_noise", "foreign", "spread")
        shares = tuple(number(share, "shares", 0, MANY) for share in self.shares)
        if len(shares) != len(TASKS) or sum(shares) == 0:
            raise MiniCogViewError(f"shares is {self.shares}: give one for each of {', '.join(TASKS)}, not all 0")
        object.__setattr__(self, "shares", shares)
        object.__setattr__(self, "text_weight", number(self.text_weight, "text_weight", 0, MANY))
        object.__setattr__(self, "n_lookalikes", integer(self.n_lookalikes, "n_lookalikes", 1, MANY))


def check_recipe(recipe: Any, *rates: str) -> None:
    """Check the numbers that all recipes have, and these rates, which are between 0 and 1."""
    for name in ("batch_size", "seed"):
        object.__setattr__(recipe, name, checked(name, getattr(recipe, name)))
    object.__setattr__(recipe, "n_neighbours", integer(recipe.n_neighbours, "n_neighbours", 1, MANY))
    for name in rates:
        object.__setattr__(recipe, name, number(getattr(recipe, name), name, 0, 1))


def neighbours(codebook: Tensor, count: int) -> Tensor:
    """(K, count) ids of the nearest other codes of each code."""
    distances = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    return distances.topk(count, largest=False).indices


def spread_targets(codebook: Tensor, spread: float, count: int) -> Tensor:
    """(K, K) target distributions: ``1 - spread`` on the true code, the rest on its neighbours, more on nearer ones."""
    near = neighbours(codebook, count)
    squared = (codebook[:, None] - codebook[near]).square().sum(-1)  # (K, count)
    weights = (-squared / squared.mean(-1, keepdim=True).clamp_min(1e-12)).softmax(-1)
    targets = torch.eye(len(codebook)) * (1 - spread)
    return targets.scatter_add_(1, near, spread * weights)


def lookalikes(codes: Tensor, count: int) -> Tensor:
    """(N, count) rows of the pictures that have the most codes of ``codes`` (N, n) in common with each picture.

    Codes are compared cell by cell. Among the emoji such pictures are the same character in other skin tones, or
    another character in the same pose: only the text tells them apart.
    """
    shared = torch.stack([(codes == picture).sum(1) for picture in codes]).fill_diagonal_(-1)  # (N, N)
    return shared.topk(min(count, len(codes) - 1)).indices


def embed_codebook(model: CogLM, codebook: Tensor, generator: torch.Generator) -> None:
    """Initialize the token table's picture rows by a random rotation of the codebook: near codes get near rows."""
    table = model.transformer.token_embedding.weight
    centred = codebook - codebook.mean(0)
    rotation = torch.randn(codebook.shape[1], table.shape[1], generator=generator)
    rows = centred @ rotation
    with torch.no_grad():
        table[: len(codebook)] = 0.02 * (rows / rows.std() + 0.3 * torch.randn(rows.shape, generator=generator))


class CogLMObjective:
    """Makes batches that depend on (seed, step) alone, and computes their loss. See ``training.fit``."""

    def __init__(
        self,
        model: CogLM,
        data: CogLMData,
        codebook: Tensor,
        recipe: CogLMRecipe,
        validate: Callable[[CogLM], dict[str, float]] | None = None,
    ):
        self.model, self.data, self.recipe = model, data, recipe
        self.near = neighbours(codebook, recipe.n_neighbours)
        self.targets = spread_targets(codebook, recipe.spread, recipe.n_neighbours)
        self.lookalikes = lookalikes(data.codes, recipe.n_lookalikes)
        self._validate = validate
        self._group = lru_cache(maxsize=1)(self._make_group)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of batch ``step`` in nats per predicted token, with ``text_weight``."""
        device = self.model.device
        batch = self.batch(step).to(device)
        loss = self.model(batch, self.targets.to(device), self.recipe.text_weight)
        return loss, {"samples": len(batch.tokens), "tokens": batch.tokens.numel()}

    def decides(self) -> dict[str, Any]:
        """What decides the result besides the settings: the recipe, the pictures and their texts."""
        first = range(min(32, len(self.data.codes)))
        texts = [self.data.tokenizer.encode(self.data.describe(i, "en", random.Random(i))) for i in first]
        said = torch.tensor([token for text in texts for token in text])
        return {**asdict(self.recipe), "pictures": checksum(self.data.codes), "texts": checksum(said)}

    def validate(self) -> dict[str, float]:
        """The values of the function that was given as ``validate``; none without it."""
        return self._validate(self.model) if self._validate else {}

    # --- batches ------------------------------------------------------------------------------------------

    GROUP = 8  # batches whose samples are sorted by length together, to save padding

    def batch(self, step: int) -> Batch:
        """Batch number ``step``: all samples are padded to the length that the longest one needs."""
        picks = self._group(step // self.GROUP)[step % self.GROUP]
        rng = np.random.default_rng((self.recipe.seed, step))
        length = max(self._length(task, text) for _, task, _, text in picks)
        return collate([self._sample(*pick, length, rng) for pick in picks])

    def _make_group(self, group: int) -> list[list[tuple[int, str, str, list[int]]]]:
        """(picture, task, language, text ids) of ``GROUP`` batches, each of texts of similar length."""
        recipe, size = self.recipe, self.recipe.batch_size * self.GROUP
        rng = random.Random(f"{recipe.seed}/{group}")
        picks = []
        for sample in range(group * size, (group + 1) * size):
            picture = self._shuffled(sample // len(self.data.codes))[sample % len(self.data.codes)]
            task = rng.choices(TASKS, recipe.shares)[0]
            language = rng.choice(LANGUAGES)
            picks.append((picture, task, language, self._text(picture, task, language, rng)))
        picks.sort(key=lambda pick: self._length(pick[1], pick[3]))
        batches = [picks[i : i + recipe.batch_size] for i in range(0, size, recipe.batch_size)]
        rng.shuffle(batches)
        return batches

    @lru_cache(maxsize=2)  # noqa: B019 (an objective lives as long as its training)
    def _shuffled(self, epoch: int) -> list[int]:
        return np.random.default_rng((self.recipe.seed, 7, epoch)).permutation(len(self.data.codes)).tolist()

    def _length(self, task: str, text: list[int]) -> int:
        """Tokens that a sample needs; all tasks but "text" have a picture and one start token more."""
        return len(text) if task == "text" else len(text) + 1 + self.data.codes.shape[1]

    def _text(self, picture: int, task: str, language: str, rng: random.Random) -> list[int]:
        """Token ids of the text that goes with a picture, cut to the length that fits."""
        if task == "caption":
            first, second = (self._caption(picture, each, rng) for each in _both(language))
            return [*first, self.model.config.ids.pad, *second]
        limit, encode = self.model.config.layout.max_text, self.data.tokenizer.encode
        if task == "draw" and rng.random() < self.recipe.no_caption:
            return []
        text = encode(self.data.describe(picture, language, rng))
        if task == "text":
            while len(text) < limit:
                other = rng.randrange(len(self.data.codes))
                text += [self.data.tokenizer.eos, *encode(self.data.describe(other, rng.choice(LANGUAGES), rng))]
        return text[:limit]

    def _caption(self, picture: int, language: str, rng: random.Random) -> list[int]:
        """A caption to be predicted, closed by </s>; its language token takes a position too."""
        plain = rng.random() < self.recipe.plain_caption
        text = self.data.name(picture, language) if plain else self.data.describe(picture, language, rng)
        limit = self.model.config.layout.max_text - 2
        return [*self.data.tokenizer.encode(text)[:limit], self.data.tokenizer.eos]

    def _sample(
        self, picture: int, task: str, language: str, text: list[int], length: int, rng: np.random.Generator
    ) -> Sample:
        layout, ids = self.model.config.layout, self.model.config.ids
        codes = self.data.codes[picture]
        seeded = torch.Generator().manual_seed(int(rng.integers(2**62)))
        words = torch.tensor(text, dtype=torch.long)
        if task == "text":
            sample = masking.text_spans(words, masking.draw_spans(seeded, len(words)))
            return masking.pad_right(sample, length, ids.pad)
        if task == "complete":
            sample = masking.completion_training(words, codes, draw_region(layout.grid, rng), ids, layout)
            sample = masking.pad_right(sample, length, ids.pad)
        else:
            pads = torch.full((length - len(text) - layout.n_image,), ids.pad)
            raw = torch.cat([words, pads, codes])
            if task == "draw":
                sample = masking.text_to_image(raw, ids, layout)
                self._mix_in_lookalike(sample, picture, rng)
            else:
                # Half of the pictures are left whole, as they are when captions are scored and generated.
                corners = masking.draw_patches(seeded, layout) if rng.random() < 0.5 else []
                starts = [{"en": ids.boe, "zh": ids.boc}[each] for each in _both(language)]
                sample = masking.image_to_text(raw, ids, layout, starts, corners)
        self._add_noise(sample, rng)
        return sample

    def _mix_in_lookalike(self, sample: Sample, picture: int, rng: np.random.Generator) -> None:
        """Replace some or all of the picture's input codes, in place, by those of a similar picture.

        Otherwise the model repeats a wrong first guess, of a skin tone for example, through the whole picture.
        """
        if rng.random() >= self.recipe.lookalike:
            return
        other = self.data.codes[rng.choice(self.lookalikes[picture].numpy())]
        own = sample.tokens[-len(other) :]
        hit = torch.from_numpy(rng.random(len(other)) < rng.uniform())
        own[hit] = other[hit]

    def _add_noise(self, sample: Sample, rng: np.random.Generator) -> None:
        """Replace some input codes, in place; the labels stay as they are."""
        recipe, tokens = self.recipe, sample.tokens.numpy()
        rate = rng.uniform(0, recipe.max_noise)
        hit = (tokens < self.model.config.n_codes) & (rng.random(len(tokens)) < rate)
        near = self.near.numpy()[tokens[hit], rng.integers(recipe.n_neighbours, size=hit.sum())]
        foreign = rng.integers(self.model.config.n_codes, size=hit.sum())
        tokens[hit] = np.where(rng.random(hit.sum()) < recipe.foreign, foreign, near)


def _both(language: str) -> tuple[str, str]:
    """Both languages, the given one first."""
    return ("en", "zh") if language == "en" else ("zh", "en")


def draw_region(grid: int, rng: np.random.Generator) -> Tensor:
    """A random hole (grid, grid): half of the picture, a box, or scattered cells. 1 = generate anew."""
    region = np.zeros((grid, grid), dtype=bool)
    kind = rng.integers(3)
    if kind == 0:
        region[grid // 2 :] = True
        region = np.rot90(region, int(rng.integers(4))).copy()
    elif kind == 1:
        height, width = rng.integers(grid // 4, grid, size=2)
        top, left = rng.integers(grid - height + 1), rng.integers(grid - width + 1)
        region[top : top + height, left : left + width] = True
    else:
        region = rng.random((grid, grid)) < rng.uniform(0.1, 0.9)
        region[grid // 2, grid // 2] = True  # never empty
    return torch.from_numpy(region)
