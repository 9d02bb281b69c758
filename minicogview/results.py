"""What a model made of one text: its pictures, shown in a notebook, put on a contact sheet, or written to files.

The idea: what the toy draws is small, so a notebook shows every pixel as a square of several, while the pictures
themselves stay as they were made. A file is written under a temporary name and then renamed, so that nobody ever finds
half a picture.

Shapes: ``n`` pictures, ``grid`` tokens along each side.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from minicogview.colour import on_white
from minicogview.errors import MiniCogViewError

VISIBLE = 128  # pixels; a notebook shows smaller pictures enlarged
LARGEST = 1024  # pixels; a notebook shows larger pictures shrunk


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """Pictures of one prompt: a sequence of PIL images that shows itself in a notebook.

    Attributes:
        images: the pictures of the last stage that ran, not enlarged.
        tokens: (n, grid, grid) int64 picture codes of the first stage.
        scores: (n,) float32, mean log-probability of these tokens in nats, before temperature and top-k.
        text: the prompt. seeds: one for each picture.
        caption_scores: (n,) float32, how likely the prompt is as a caption of each picture (mean log-probability of its
            tokens in nats), best first; None if pictures were not selected by this score.
        coglm, direct, iterative: the pictures after each stage; None for a stage that did not run.
        fine_tokens: (n, fine grid, fine grid) int64 picture codes of the last stage; None if only the first ran.
    """

    images: list[Image.Image]
    tokens: Tensor
    scores: Tensor
    text: str
    seeds: list[int]
    caption_scores: Tensor | None = None
    coglm: list[Image.Image] | None = None
    direct: list[Image.Image] | None = None
    iterative: list[Image.Image] | None = None
    fine_tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self.images)

    def __repr__(self) -> str:
        return f"Pictures({len(self)} of {self.text!r}, seeds {self.seeds})"

    def best(self, keep: int, caption_scores: Tensor) -> Pictures:
        """The ``keep`` coarse pictures with the highest caption scores (n,), best first."""
        scores, order = caption_scores.sort(descending=True, stable=True)
        kept = order[:keep].tolist()
        images, seeds = ([some[i] for i in kept] for some in (self.images, self.seeds))
        return Pictures(images, self.tokens[kept], self.scores[kept], self.text, seeds, scores[:keep], coglm=images)

    def sheet(self, scale: int | None = None) -> Image.Image:
        """All pictures on one sheet, at most 8 in a row; ``scale`` as for ``enlarge``, None: large enough to see."""
        return contact_sheet([self.images], scale or scale_to(self.images[0].width, VISIBLE))

    def _repr_png_(self) -> bytes:
        return png(contact_sheet([self.images], scale_to(self.images[0].width, VISIBLE), largest=LARGEST))


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=image.info.get("exif"))
    return buffer.getvalue()


def scale_to(side: int, pixels: int) -> int:
    """The smallest integer scale that makes ``side`` at least ``pixels``.

    Example:
        >>> scale_to(32, 128), scale_to(160, 128), scale_to(480, 128)
        (4, 1, 1)
    """
    return -(-pixels // side)


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """The picture with every pixel as a square of ``scale`` x ``scale`` pixels.

    Raises:
        MiniCogViewError: if the scale is below 1.
    """
    if scale < 1:
        raise MiniCogViewError(f"scale is {scale}: use 1 (as drawn) or more")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def thumbnail(image: Image.Image, largest: int | None) -> Image.Image:
    """The picture, shrunk if its longer side has more than ``largest`` pixels."""
    if largest is None or max(image.size) <= largest:
        return image
    image = image.copy()
    image.thumbnail((largest, largest))
    return image


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], scale: int = 1, columns: int = 8, gap: int = 4, largest: int | None = None
) -> Image.Image:
    """Pictures of one size on one white sheet: each row starts on a new line and breaks after ``columns`` pictures.

    Args:
        scale: see ``enlarge``. gap: white pixels around every picture.
        largest: pixels along the longer side of one picture; larger ones are shrunk.
    """
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    cells = [[enlarge(on_white(thumbnail(image, largest)), scale) for image in line] for line in lines]
    width, height = (side + gap for side in cells[0][0].size)
    sheet = Image.new("RGB", (max(map(len, cells)) * width + gap, len(cells) * height + gap), "white")
    for y, line in enumerate(cells):
        for x, image in enumerate(line):
            sheet.paste(image, (gap + x * width, gap + y * height))
    return sheet


def save(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG file with these texts by name, either complete or not at all; its folder is created if needed.

    Raises:
        MiniCogViewError: if the folder cannot be created or written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="PNG", exif=image.info.get("exif"), pnginfo=text_chunks(texts or {}))
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MiniCogViewError(f"cannot write {path} ({error.strerror}): choose another folder") from None


def text_chunks(texts: Mapping[str, str]) -> PngInfo:
    """Texts as chunks of a PNG file, in UTF-8."""
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    return info
