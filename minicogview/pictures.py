"""Pictures that a model made: shown in a notebook, put on a contact sheet, written to files.

The idea: what the toy draws is 32 pixels wide, too small for the eye, so pictures are shown with every pixel as
a square of several; the pictures themselves stay as they were made. A file is written beside its place and then
renamed, so that nobody ever finds half a picture.

Shapes: ``n`` pictures, ``grid`` tokens along each side.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from minicogview.errors import MiniCogViewError

VISIBLE = 128  # pixels: smaller pictures are enlarged in a notebook


@dataclass(frozen=True, eq=False, repr=False)
class Pictures:
    """Pictures of one text: a sequence of PIL images that shows itself in a notebook.

    Attributes:
        images: as the last stage made them, not enlarged.
        tokens: (n, grid, grid) int64 picture codes of the first stage.
        scores: (n,) float32, mean log-probability of the drawn tokens in nats, before temperature and top-k.
        text: what was asked for. seeds: one for each picture.
        caption_scores: (n,) float32, how likely the text is as a caption of each picture (mean log-probability of its
            tokens in nats), best first; None where nothing was selected by it.
        coarse, direct, refined: the pictures after each stage; None for a stage that was left out.
        fine_tokens: (n, fine grid, fine grid) int64 picture codes of the last stage; None after the first.
    """

    images: list[Image.Image]
    tokens: Tensor
    scores: Tensor
    text: str
    seeds: list[int]
    caption_scores: Tensor | None = None
    coarse: list[Image.Image] | None = None
    direct: list[Image.Image] | None = None
    refined: list[Image.Image] | None = None
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
        return Pictures(images, self.tokens[kept], self.scores[kept], self.text, seeds, scores[:keep], coarse=images)

    def sheet(self, scale: int | None = None) -> Image.Image:
        """All pictures on one, at most 8 in a row; ``scale`` as for ``enlarge``, None: well visible."""
        return contact_sheet([self.images], scale or scale_to(self.images[0].width, VISIBLE))

    def _repr_png_(self) -> bytes:
        return png(self.sheet())


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def scale_to(side: int, pixels: int) -> int:
    """The least whole scale that makes ``side`` at least ``pixels``.

    Example:
        >>> scale_to(32, 128), scale_to(160, 128), scale_to(480, 128)
        (4, 1, 1)
    """
    return -(-pixels // side)


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Every pixel as a square of ``scale`` pixels.

    Raises:
        MiniCogViewError: if the scale is below 1.
    """
    if scale < 1:
        raise MiniCogViewError(f"scale is {scale}: use 1 (as drawn) or more")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def contact_sheet(rows: Sequence[Sequence[Image.Image]], scale: int = 1, columns: int = 8, gap: int = 4) -> Image.Image:
    """Pictures of one size on a grid: each row begins a new line, a longer one than ``columns`` breaks.

    Args:
        scale: see ``enlarge``. gap: white pixels around every picture.
    """
    lines = [row[i : i + columns] for row in rows for i in range(0, len(row), columns)]
    cells = [[enlarge(image, scale) for image in line] for line in lines]
    width, height = (side + gap for side in cells[0][0].size)
    sheet = Image.new("RGB", (max(map(len, cells)) * width + gap, len(cells) * height + gap), "white")
    for y, line in enumerate(cells):
        for x, image in enumerate(line):
            sheet.paste(image, (gap + x * width, gap + y * height))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG file, whole or not at all; its folder is made.

    Raises:
        MiniCogViewError: if the folder cannot be made or written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="PNG")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MiniCogViewError(f"cannot write {path} ({error.strerror}): choose another folder") from None
