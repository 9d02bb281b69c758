"""One vocabulary for pictures, English and Chinese.

The idea: a transformer that both reads text and draws pictures needs one list of ids. Picture codes come first, then
the SentencePiece pieces of both languages, then three tokens that announce what follows them:

    0 .. K-1                  picture codes (K = codebook size)
    K .. K+P-1                text pieces: SentencePiece piece i has id K + i; <unk> K + 0, <pad> K + 3
    K+P, K+P+1, K+P+2         <start_of_image>, <start_of_english>, <start_of_chinese>

Mirrors: the original's "icetk" package (CogView2, section 3.1), where K = 20000 and P = 130000, so that the
special tokens are 150000, 150001 and 150002; English pieces are 20100..83822, Chinese 83823..145652.

Shapes: ``h, w`` rows and columns of tokens in a picture, ``H, W`` its rows and columns of pixels.

Different on purpose: our own text models (``training/text.py``) keep every space and every character; characters that
they do not know are spelled in bytes. A text model is a protobuf message and picture weights are safetensors, so that
loading either runs no code. Simplified: there is no line-break token; a line break is text like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minicogview.config import PAD_PIECE, SpecialIds, special_ids
from minicogview.errors import MiniCogViewError
from minicogview.pictures import Picture, to_pil, to_tensor

if TYPE_CHECKING:
    from minicogview.vqvae import VQVAE

Language = Literal["en", "zh"]

UNK, EOS = 0, 2  # indices of these pieces in the original's text model and in ours; that of <pad> is PAD_PIECE
SPECIAL_TOKENS = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
# The original's text model sorts its pieces by language. It is recognised by its sizes: (K, P) -> first Chinese id.
FIRST_CHINESE = {(20000, 130000): 83823}
# Chinese characters, their punctuation, and full-width forms.
CHINESE = re.compile(
    "[\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)


class Tokenizer:
    """Text and pictures to ids of one vocabulary, and back.

    Args:
        text_model: path of a SentencePiece model, or its bytes.
        codebook_size: number of picture codes, K.
        vqvae: the picture tokenizer; without it, only text can be encoded.
        level: the level of the picture tokenizer that calls use by default (0 is the finest).
        first_chinese: id of the first Chinese piece, if pieces are sorted by language. None: that of the original's
            model, which is recognised by its sizes; with any other model, a text with a Chinese character is Chinese.

    Raises:
        MiniCogViewError: if the text model is missing or damaged, or the codebook sizes differ.

    Example:
        >>> from importlib.resources import files
        >>> tokenizer = Tokenizer(files("minicogview").joinpath("weights/toy/text.model"), codebook_size=1024)
        >>> tokenizer.decode(tokenizer.encode("a red apple"))
        'a red apple'
        >>> tokenizer.language(tokenizer.encode("红苹果"))
        'zh'
    """

    def __init__(
        self,
        text_model: str | Path | bytes,
        codebook_size: int,
        vqvae: VQVAE | None = None,
        level: int = 0,
        first_chinese: int | None = None,
    ) -> None:
        if vqvae is not None and vqvae.config.codebook_size != codebook_size:
            raise MiniCogViewError(
                f"the picture tokenizer has {vqvae.config.codebook_size} codes, but codebook_size is "
                f"{codebook_size}: give both the same number"
            )
        self.text = load_text_model(text_model)
        self.codebook_size = codebook_size
        self.vqvae = vqvae
        self.level = level
        self.n_text = self.text.get_piece_size()
        self.first_chinese = first_chinese or FIRST_CHINESE.get((codebook_size, self.n_text))

    # ---- ids ----

    @property
    def unk(self) -> int:
        """Id of <unk>, which stands for anything that the text model does not know."""
        return self.codebook_size + UNK

    @property
    def eos(self) -> int:
        """Id of </s>, which ends the captions that our models write (the original's have no end)."""
        return self.codebook_size + EOS

    @property
    def special_ids(self) -> SpecialIds:
        """The ids that CogLM needs to know: <pad> and the three start tokens."""
        return special_ids(self.codebook_size, self.n_text)

    @property
    def pad(self) -> int:
        """Id of <pad>, which fills the space after short texts."""
        return self.special_ids.pad

    @property
    def boi(self) -> int:
        """Id of <start_of_image>, the first token after the pieces."""
        return self.special_ids.boi

    @property
    def boe(self) -> int:
        """Id of <start_of_english>."""
        return self.special_ids.boe

    @property
    def boc(self) -> int:
        """Id of <start_of_chinese>."""
        return self.special_ids.boc

    @property
    def vocab_size(self) -> int:
        """Number of all ids: picture codes, text pieces and special tokens."""
        return self.codebook_size + self.n_text + len(SPECIAL_TOKENS)

    def is_picture(self, ids: int | Tensor) -> bool | Tensor:
        """Whether ids are picture codes: a bool for one id, a bool tensor of the same shape for a tensor."""
        return (ids >= 0) & (ids < self.codebook_size)

    def token(self, id: int) -> str:
        """A readable name of an id: ``picture 17``, ``▁apple``, ``<start_of_image>``."""
        id = int(id)
        if not 0 <= id < self.vocab_size:
            raise MiniCogViewError(f"id {id} is outside the vocabulary: ids are 0..{self.vocab_size - 1}")
        if id < self.codebook_size:
            return f"picture {id}"
        if id < self.boi:
            return self.text.id_to_piece(id - self.codebook_size)
        return SPECIAL_TOKENS[id - self.boi]

    # ---- text ----

    def encode(self, text: str) -> list[int]:
        """Ids of a text. No start token or padding is added, so an empty text gives an empty list.

        The name of a special token inside a text is ordinary text.

        Raises:
            MiniCogViewError: if the text is not valid Unicode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MiniCogViewError(
                f"text {text!a} is not valid Unicode at character {error.start}: give it as UTF-8"
            ) from None
        return [self.codebook_size + piece for piece in self.text.encode(text)]

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """The text of ids; <pad> and special tokens are left out.

        Raises:
            MiniCogViewError: if an id is a picture code or outside the vocabulary.
        """
        pieces = []
        for id in map(int, ids):
            if not self.codebook_size <= id < self.vocab_size:
                raise MiniCogViewError(
                    f"id {id} is no text: text ids are {self.codebook_size}..{self.boi - 1}; "
                    "picture codes go to decode_picture"
                )
            if id < self.boi and id != self.pad:
                pieces.append(id - self.codebook_size)
        return self.text.decode(pieces)

    def language(self, ids: Sequence[int] | Tensor) -> Language:
        """Language of a text given as ids.

        If pieces are sorted by language, a text is English if every id is below ``first_chinese``; otherwise, if it has
        no Chinese character. An empty text is English.
        """
        if self.first_chinese is not None:
            return "en" if all(int(id) < self.first_chinese for id in ids) else "zh"
        return "zh" if CHINESE.search(self.decode(ids)) else "en"

    def language_token(self, ids: Sequence[int] | Tensor) -> int:
        """The start token of a text's language, which announces a caption."""
        return self.start_token(self.language(ids))

    def start_token(self, language: str) -> int:
        """The start token of captions in ``language``; raises MiniCogViewError unless that is "en" or "zh"."""
        starts = {"en": self.boe, "zh": self.boc}
        if language not in starts:
            raise MiniCogViewError(f"no captions in language {language!r}: choose en or zh")
        return starts[language]

    # ---- pictures ----

    def encode_picture(
        self, picture: Picture, level: int | None = None, size: int | tuple[int, int] | None = None
    ) -> Tensor:
        """Codes of a picture, (h, w) int64, in raster order when flattened.

        Args:
            picture: a file, a PIL image (transparent parts become white), an array or a tensor; see
                ``pictures.to_tensor``.
            level: 0 is the finest; None: the tokenizer's own.
            size: pixels to resize to, one side or (H, W); None: the picture's own size. Each side is rounded to a
                multiple of the level's rate, at least one token.

        Raises:
            MiniCogViewError: if the picture cannot be read, the size has a wrong shape, or there is no such level.
        """
        vqvae, level = self._picture_half(level)
        needed = size if isinstance(size, int | None) else max(size, default=0)
        pixels = to_tensor(picture, needed)  # (3, H, W)
        pixels = _resize(pixels, _whole_tokens(pixels, size, vqvae.config.rates[level]))
        with torch.no_grad():  # inference_mode would return tensors that cannot be used in training
            return vqvae.encode(pixels[None].to(next(vqvae.parameters())), level)[0]  # (h, w)

    def decode_picture(self, codes: Tensor, level: int | None = None) -> Image.Image:
        """The picture that codes (h, w) stand for, as a PIL image of (h * rate, w * rate) pixels.

        Raises:
            MiniCogViewError: if the codes are not (h, w), an id is not a picture code, or there is no such level.
        """
        vqvae, level = self._picture_half(level)
        if codes.ndim != 2 or codes.numel() == 0:
            raise MiniCogViewError(f"codes have shape {tuple(codes.shape)}: give one picture as (h, w)")
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= self.codebook_size:
            raise MiniCogViewError(
                f"ids {lowest}..{highest}: picture codes are 0..{self.codebook_size - 1}, text goes to decode"
            )
        with torch.no_grad():
            return to_pil(vqvae.decode(codes[None].to(next(vqvae.parameters()).device), level)[0])

    def _picture_half(self, level: int | None) -> tuple[VQVAE, int]:
        """The VQ-VAE and the level to use; raises MiniCogViewError if there is none."""
        if self.vqvae is None:
            raise MiniCogViewError("this tokenizer has no picture half: make it as Tokenizer(..., vqvae=...)")
        level = self.level if level is None else level
        n_levels = len(self.vqvae.config.rates)
        if not 0 <= level < n_levels:
            raise MiniCogViewError(f"there is no level {level}: choose 0 (finest) to {n_levels - 1}")
        return self.vqvae, level


def _whole_tokens(pixels: Tensor, size: int | tuple[int, int] | None, rate: int) -> tuple[int, int]:
    """(H, W) to encode at: ``size``, or the picture's own where it is None, rounded to multiples of ``rate``."""
    if size is None:
        size = (pixels.shape[1], pixels.shape[2])
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise MiniCogViewError(f"size {size} is no picture size: give pixels, one side or (H, W)")
    height, width = (max(1, round(side / rate)) * rate for side in sides)
    return height, width


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture (3, H, W) resized bicubically to ``size``, or unchanged if it has that size already."""
    if tuple(pixels.shape[1:]) == size:
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


# ---- the text model ----


def load_text_model(model: str | Path | bytes) -> sentencepiece.SentencePieceProcessor:
    """Read a SentencePiece model from a file or from its bytes.

    Raises:
        MiniCogViewError: if it is missing or damaged, or has too few pieces to contain <pad>.
    """
    name = "given as bytes" if isinstance(model, bytes) else str(model)
    try:
        proto = model if isinstance(model, bytes) else Path(model).read_bytes()
    except OSError as error:
        raise MiniCogViewError(
            f"text model {name} cannot be read ({error.strerror}): check the path, or reinstall minicogview"
        ) from None
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(proto) and processor.LoadFromSerializedProto(proto)
    except RuntimeError:
        loaded = False
    if not loaded or processor.get_piece_size() <= PAD_PIECE:
        raise MiniCogViewError(
            f"text model {name} is damaged or no SentencePiece model: copy it again, or reinstall minicogview"
        )
    return processor


def check_codes(codes: Tensor, grid: int, n_codes: int) -> Tensor:
    """Picture codes (grid, grid) as int64; raises MiniCogViewError if they have another shape, type or range."""
    whole = not codes.is_floating_point() and not codes.is_complex() and codes.dtype != torch.bool
    if not whole or codes.shape != (grid, grid) or codes.min() < 0 or codes.max() >= n_codes:
        limits = f", from {codes.min()} to {codes.max()}" if codes.numel() and not codes.is_complex() else ""
        raise MiniCogViewError(
            f"codes of shape {tuple(codes.shape)} and type {codes.dtype}{limits}: "
            f"give ({grid}, {grid}) with values 0..{n_codes - 1}, or a picture"
        )
    return codes.long()
