"""Pictures as files, PIL images and tensors: reading, showing, arranging on contact sheets, and writing them.

The idea: the toy's coarse pictures are 32 pixels wide, too small for the eye, so a notebook shows each pixel as a
larger square; the pictures themselves do not change. A file is written under a temporary name and then renamed, so
that nobody ever finds half a picture.

Shapes: ``n`` pictures, ``grid`` tokens along each side; ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from minicogview.errors import MiniCogViewError

VISIBLE = 128  # pixels; a notebook shows smaller pictures enlarged


Picture = str | Path | Image.Image | Tensor  # a file, a PIL image or a tensor, wherever a user gives a picture


# --- pictures between files, PIL and tensors


def to_tensor(picture: Picture) -> Tensor:
    """A picture as float32 (3, H, W) in 0..1; transparent parts become white.

    Raises:
        MiniCogViewError: if the file is missing or not a picture, or a tensor is not (3, H, W).
    """
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or picture.shape[0] != 3 or 0 in picture.shape:
            raise MiniCogViewError(f"picture tensor has shape {tuple(picture.shape)}: give (3, H, W)")
        return picture.float() / 255 if picture.dtype == torch.uint8 else picture.float()
    image = to_image(picture).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return rearrange(flat, "(h w c) -> c h w", h=image.height, w=image.width).float() / 255


def to_image(picture: Picture) -> Image.Image:
    """A file, PIL image or tensor (3, H, W) as an upright PIL image, RGB or RGBA; raises as ``to_tensor`` does."""
    if isinstance(picture, Tensor):
        return to_pil(to_tensor(picture))
    return upright(picture if isinstance(picture, Image.Image) else open_picture(picture))


def upright(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it: rotated as its EXIF data says, 8-bit, RGB, or RGBA if parts are transparent."""
    if image.mode.startswith("I;16"):  # 16-bit grey, which convert() would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    return ImageOps.exif_transpose(image).convert("RGBA" if image.has_transparency_data else "RGB")


def to_pil(pixels: Tensor) -> Image.Image:
    """A picture tensor (3, H, W) in 0..1 (values outside are clamped) as a PIL image."""
    array = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(array, "c h w -> h w c").contiguous().numpy())


def open_picture(path: str | Path) -> Image.Image:
    """Read the whole of a picture file, so that damage is noticed here; a file that is too large is not read.

    Raises:
        MiniCogViewError: if the file is missing, damaged, not a picture, or has more pixels than PIL accepts.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise MiniCogViewError(f"picture {path} does not exist: check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MiniCogViewError(f"picture {path} cannot be read ({error}): give a PNG or JPEG file") from None
    return image


# --- pictures that a model made


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
        return png(self.sheet())


def png(image: Image.Image) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
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


def contact_sheet(rows: Sequence[Sequence[Image.Image]], scale: int = 1, columns: int = 8, gap: int = 4) -> Image.Image:
    """Pictures of one size on one sheet: each row starts on a new line and breaks after ``columns`` pictures.

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


def save(image: Image.Image, path: Path, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG file with these texts by name, either complete or not at all; its folder is created if needed.

    Raises:
        MiniCogViewError: if the folder cannot be created or written to.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(part, format="PNG", pnginfo=text_chunks(texts or {}))
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
