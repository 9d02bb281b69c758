"""CogLM: one transformer that draws pictures of a text, captions pictures and fills in missing parts of them.

The idea: all three tasks are "predict the next token" under different masks (``masking.py``), so one set of weights
and one loss serve them all, and generating is one loop that fills a sequence from left to right.
CogView2 (arXiv 2204.14217), sections 3.1 and 3.2.

Mirrors: the original's ``coglm_strategy`` and SwissArmyTransformer's ``filling_sequence``: the prompt is read once
and shared by all pictures, tokens that are known are copied, and the last token is never fed back.

Shapes: ``B`` rows of a batch, ``S`` sequence length, ``n`` picture tokens (grid * grid), ``D`` model width,
``V`` vocabulary size, ``R`` rows given, from which ``B`` are generated.

Different on purpose: the cache is preallocated; texts of different lengths may share a batch (padded on the left);
and there is classifier-free guidance, which the original does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minicogview import masking
from minicogview.attention import attention_bias, text_attention_weights
from minicogview.config import CogLMConfig
from minicogview.errors import MiniCogViewError
from minicogview.masking import Sample
from minicogview.sampling import guide
from minicogview.transformer import KVCache, Transformer

ChooseTokens = Callable[[Tensor, int], Tensor]  # (logits (B, V), step) -> (B,) ids, such as a ``Sampler``


@dataclass
class Batch:
    """Training samples of equal length, stacked. Tasks may be mixed."""

    tokens: Tensor  # (B, S) int64
    positions: Tensor  # (B, S) int64
    mask: Tensor  # (B, S, S) bool
    labels: Tensor  # (B, S) int64
    loss_mask: Tensor  # (B, S) bool

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def collate(samples: list[Sample]) -> Batch:
    """Stack training samples of one length into a batch."""
    return Batch(**{name: torch.stack([getattr(s, name) for s in samples]) for name in vars(samples[0])})


@dataclass
class Filled:
    """Sequences that were filled, and how likely the model finds them."""

    tokens: Tensor  # (B, S) int64
    scores: Tensor  # (B,) mean log-probability of the generated tokens in nats, without temperature and guidance


def plain_steps(model: CogLM, rows: int) -> AbstractContextManager[None]:
    """A context that changes nothing: the default of ``CogLM.decoding``."""
    return nullcontext()


class CogLM(nn.Module):
    """The transformer, together with what its ids and positions mean."""

    def __init__(self, config: CogLMConfig):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config.transformer)
        # A context inside which decoding steps of this many rows may be computed faster (``scale/fast_steps.py``).
        self.decoding: Callable[[CogLM, int], AbstractContextManager[None]] = plain_steps

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.token_embedding.weight.device

    # --- training -----------------------------------------------------------------------------------------

    def forward(self, batch: Batch, targets: Tensor | None = None, text_weight: float = 1.0) -> Tensor:
        """The loss: mean cross entropy in nats over the predictions that ``loss_mask`` marks.

        Args:
            batch: samples of any tasks.
            targets: (codes, codes), optional soft targets: row ``c`` is the distribution to predict for a picture token
                whose true code is ``c``. If given, picture tokens are scored against picture codes alone, as they are
                in generation; the original scores them against the whole vocabulary.
            text_weight: used only with ``targets``: the weight of a predicted text token, where a picture token has 1.
                A batch has many more picture tokens.
        """
        hidden = self.transformer(batch.tokens, batch.positions, attention_bias(batch.mask))  # (B, S, D)
        hidden, labels = hidden[batch.loss_mask], batch.labels[batch.loss_mask]  # (rows, D), (rows,)
        if targets is None:
            return F.cross_entropy(self.transformer.logits(hidden).float(), labels)
        is_code = labels < self.config.n_codes
        code_logits = self.transformer.logits(hidden[is_code], self.config.n_codes).float()
        text_logits = self.transformer.logits(hidden[~is_code]).float()
        total = F.cross_entropy(code_logits, targets[labels[is_code]], reduction="sum")
        total = total + text_weight * F.cross_entropy(text_logits, labels[~is_code], reduction="sum")
        return total / (len(code_logits) + text_weight * len(text_logits))

    # --- the one loop behind generating and completing --------------------------------------------------------

    @torch.no_grad()
    def fill(
        self,
        tokens: Tensor,
        positions: Tensor,
        bias: Tensor,
        n_context: int,
        sampler: ChooseTokens,
        n: int = 1,
        guidance: float = 1.0,
        on_step: Callable[[int], None] | None = None,
    ) -> Filled:
        """Replace every -1 after the context by a picture token, from left to right.

        Args:
            tokens, positions: (R, S); a token of -1 is generated, every other one stays.
            bias: (R, 1, S, S) from ``attention_bias``.
            n_context: length of the known part at the start, which is read in one forward pass.
            sampler: chooses tokens, given logits over the picture codes.
            n: number of rows to generate from a single given row (R = 1).
            guidance: scale of classifier-free guidance. If it is not 1, the second half of the rows must be the first
                half without its text, and only the first half is returned.
            on_step: called with the number of tokens generated so far, for progress bars.

        Raises:
            MiniCogViewError: if ``n`` is not 1 and several rows are given.
        """
        rows, length = tokens.shape
        if n != 1 and rows != 1:
            raise MiniCogViewError(
                f"n={n} pictures of one row were asked for, but {rows} rows given: repeat them instead"
            )
        batch = max(rows, n)
        cache = self.transformer.new_cache(batch, length - 1)
        out = tokens.expand(batch, length).clone()
        wanted = (tokens[0] < 0).tolist()  # columns to generate, the same in every row
        biased = (bias.tril() != 0).any(-1).flatten(0, -2).any(0).tolist()  # query rows whose bias changes anything
        total, step = torch.zeros(batch, device=self.device), 0
        # Inference mode saves the bookkeeping for gradients in each operation: 6 % of the toy's time.
        with self.decoding(self, batch), torch.inference_mode():
            hidden = self.transformer(
                tokens[:, :n_context], positions[:, :n_context], bias[:, :, :n_context, :n_context], cache
            )[:, -1]  # (R, D)
            hidden = hidden.expand(batch, -1)
            for i in range(n_context, length):
                if wanted[i]:
                    logits = self.code_logits(hidden).float()  # (B, codes)
                    out[:, i] = choice = self._choose(logits, sampler, step, guidance)
                    total -= F.cross_entropy(logits, choice, reduction="none")
                    step += 1
                    if on_step is not None:
                        on_step(step)
                if i < length - 1:
                    row = bias[:, :, i : i + 1, : i + 1] if biased[i] else None
                    hidden = self.next_hidden(out[:, i : i + 1], positions[:, i : i + 1], row, cache)
        keep = batch if guidance == 1.0 else batch // 2
        return Filled(out[:keep], total[:keep] / max(step, 1))

    def next_hidden(self, tokens: Tensor, positions: Tensor, bias: Tensor | None, cache: KVCache) -> Tensor:
        """Feed one more token (B, 1) of every row: hidden states (B, D), from which the token after it is predicted."""
        return self.transformer(tokens, positions, bias, cache)[:, -1]

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, D) -> logits over the picture codes (B, codes)."""
        return self.transformer.logits(hidden, self.config.n_codes)

    @staticmethod
    def _choose(logits: Tensor, sampler: ChooseTokens, step: int, guidance: float) -> Tensor:
        """Sampled ids (B,); with guidance, both halves of the rows get the same ones."""
        if guidance == 1.0:
            return sampler(logits, step)
        with_text, without = logits.chunk(2)
        return sampler(guide(with_text, without, guidance), step).repeat(2)

    # --- tasks --------------------------------------------------------------------------------------------------

    def generate(
        self,
        texts: list[list[int]],
        sampler: ChooseTokens,
        n: int = 1,
        text_weight: float = 0.0,
        guidance: float = 1.0,
        on_step: Callable[[int], None] | None = None,
    ) -> Filled:
        """Draw ``n`` pictures of one text, or one picture of each of several texts.

        Args:
            texts: token ids of each text, without start tokens; an empty list draws a picture without a text.
            sampler, guidance, on_step: see ``fill``.
            text_weight: added to the attention scores of text tokens (1.4 in the original).

        Returns:
            ``Filled``, whose ``tokens`` (B, grid * grid) are the codes of each picture in raster order.
        """
        if guidance != 1.0:
            texts = [text for text in texts for _ in range(n)] if n > 1 else texts
            texts, n = texts + [[]] * len(texts), 1
        layout, ids = self.config.layout, self.config.ids
        for text in texts:
            self.check_text(text)
        longest = max(len(text) for text in texts)
        length = longest + 1 + layout.n_image
        tokens = torch.full((len(texts), length), -1)
        positions = torch.zeros(len(texts), length, dtype=torch.long)
        biases = []
        for r, text in enumerate(texts):
            pad = longest - len(text)  # pads on the left, which no token sees
            own_positions, own_mask = masking.inference(len(text), length - pad, layout)
            tokens[r, : longest + 1] = torch.tensor([ids.pad] * pad + text + [ids.boi])
            positions[r, pad:] = own_positions
            mask = torch.zeros(length, length, dtype=torch.bool)
            mask[pad:, pad:] = own_mask
            weights = F.pad(text_attention_weights(len(text), length - pad, text_weight), (pad, 0))
            biases.append(attention_bias(mask, weights))
        bias = torch.cat(biases).to(self.device)  # (R, 1, S, S)
        filled = self.fill(
            tokens.to(self.device), positions.to(self.device), bias, longest + 1, sampler, n, guidance, on_step
        )
        return Filled(filled.tokens[:, longest + 1 :], filled.scores)

    def complete(
        self,
        text: list[int],
        picture: Tensor,
        region: Tensor,
        sampler: ChooseTokens,
        n: int = 1,
        text_weight: float = 0.0,
    ) -> Filled:
        """Fill a hole in a picture: each new token sees the text and everything around the hole.

        Args:
            text: token ids. picture: (grid * grid,) codes. region: (grid, grid), 1 where cells are generated anew.

        Returns:
            ``Filled``, whose ``tokens`` (n, grid * grid) are whole pictures in raster order.
        """
        self.check_text(text)
        sample, n_context = masking.completion(
            torch.tensor(text, dtype=torch.long), picture.cpu(), region.cpu(), self.config.ids, self.config.layout
        )
        bias = attention_bias(sample.mask, text_attention_weights(len(text), len(sample.tokens), text_weight))
        filled = self.fill(
            sample.tokens[None].to(self.device),
            sample.positions[None].to(self.device),
            bias.to(self.device),
            n_context,
            sampler,
            n,
        )
        cells = sample.positions[len(text) + 1 :] - self.config.layout.max_text - 1
        result = torch.empty(filled.tokens.shape[0], len(cells), dtype=torch.long, device=self.device)
        result[:, cells] = filled.tokens[:, len(text) + 1 :]
        return Filled(result, filled.scores)

    @torch.no_grad()
    def score_captions(self, pictures: Tensor, texts: list[list[int]], language: int) -> Tensor:
        """Mean log-probability per token of each text, given its picture.

        Args:
            pictures: (B, grid * grid) codes, one picture for each text; or (1, grid * grid), one picture for all
                texts, which is then read only once.
            texts: token ids of the B captions. language: the start token of their language.

        Returns:
            (B,) in nats; higher means likelier.
        """
        n, longest = pictures.shape[1], max(len(text) for text in texts)
        cache = self._read_pictures(pictures, len(texts), longest)
        padded = torch.full((len(texts), longest + 1), self.config.ids.pad)
        for r, text in enumerate(texts):
            padded[r, : len(text) + 1] = torch.tensor([language, *text])
        padded = padded.to(self.device)
        mask = torch.ones(longest, n + longest, dtype=torch.bool).tril(diagonal=n)  # pads come after every target
        positions = torch.arange(longest, device=self.device)[None]
        hidden = self.transformer(padded[:, :-1], positions, attention_bias(mask).to(self.device), cache)
        log_p = self.transformer.logits(hidden).float().log_softmax(-1)  # (B, longest, V)
        token_scores = log_p.gather(-1, padded[:, 1:, None])[..., 0]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        real = torch.arange(longest, device=self.device) < lengths[:, None]
        return (token_scores * real).sum(-1) / lengths

    @torch.no_grad()
    def caption(self, picture: Tensor, language: int, end: int, max_tokens: int = 24) -> list[int]:
        """Describe a picture, greedily: append the likeliest text token until that token is ``end``.

        Args:
            picture: (grid * grid,) codes. language: start token of the language. end: id that closes a caption.

        Returns:
            token ids of the caption, without ``language`` and ``end``; at most ``max_tokens``.
        """
        cache = self._read_pictures(picture[None], 1, max_tokens)
        ids = self.config.ids
        text = [language]
        while len(text) <= max_tokens:
            token = torch.tensor([text[-1:]], device=self.device)
            position = torch.tensor([[len(text) - 1]], device=self.device)
            logits = self.transformer.logits(self.transformer(token, position, None, cache)[0, -1])
            logits[: self.config.n_codes] = -torch.inf  # captions are text
            logits[[ids.pad, ids.boi, ids.boe, ids.boc]] = -torch.inf
            text.append(int(logits.argmax()))
            if text[-1] == end:
                return text[1:-1]
        return text[1:]

    def _read_pictures(self, pictures: Tensor, batch: int, n_text: int) -> KVCache:
        """A cache that holds whole pictures (B or 1, n) as context, with room for a language token and the text."""
        n = pictures.shape[1]
        cache = self.transformer.new_cache(batch, n + 1 + n_text)
        first = self.config.layout.max_text + 1
        positions = torch.arange(first, first + n, device=self.device)[None]
        self.transformer(pictures.to(self.device), positions, None, cache)
        return cache

    def check_text(self, text: list[int]) -> None:
        """Raise MiniCogViewError if the text has more tokens than there are text positions."""
        limit = self.config.layout.max_text
        if len(text) > limit:
            raise MiniCogViewError(f"text has {len(text)} tokens, at most {limit} fit: shorten it")
