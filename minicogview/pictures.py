"""Pictures as files, PIL images, arrays and tensors: everything that a user hands in as a picture is read here.

The idea: a datum has one meaning, whatever holds it: the layout of its axes, the value that means white, transparency,
orientation and colour profile. Where there is more than one reading, the picture is refused with what was seen.

Shapes: ``H`` x ``W`` pixels, ``C`` channels: 1 (grey), 3 (RGB) or 4 (RGBA).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from minicogview.colour import on_white, with_rgb_profile
from minicogview.errors import MiniCogViewError

MAX_PIXELS = 2**26  # 8192 x 8192; of a larger picture, only a JPEG that need not be decoded at full size is read
ENOUGH = 1024  # pixels along a side that a picture keeps when it is shrunk before the models see it
ROUNDING = 1e-4  # how far a float may lie outside 0..1

# Wherever a user gives a picture; a sequence is nested lists of numbers, or holds a single picture.
Picture = str | os.PathLike[str] | Image.Image | Tensor | np.ndarray | Sequence[Any]


# --- one meaning for whatever is handed in


def to_tensor(picture: Picture, side: int | None = None) -> Tensor:
    """A picture as float32 (3, H, W) in 0..1 and in sRGB; transparent parts become white.

    Args:
        picture: a file; a PIL image; or an array, a tensor or lists of shape (H, W), (C, H, W) or (H, W, C), boolean,
            float in 0..1, or integers: 0..255, or 0..65535 if they have 16 bits or a value is above 255.
        side: pixels along a side that are needed. A much larger picture is shrunk early, a JPEG while it is decoded.

    Raises:
        MiniCogViewError: if the file is missing or not a picture, there are several pictures, or the shape or the
            values have no one reading; or if there are more than ``MAX_PIXELS`` pixels.
    """
    source = opened(picture, side=side)
    if isinstance(source, Image.Image):
        source = np.asarray(on_white(shrunk(source, side))).transpose(2, 0, 1)
    pixels = torch.from_numpy(as_float(source))  # (C, H, W)
    if len(pixels) == 4:
        pixels = pixels[:3] * pixels[3] + 1 - pixels[3]
    return pixels.expand(3, -1, -1)


def to_image(picture: Picture) -> Image.Image:
    """A picture as an upright PIL image, RGB or RGBA, with its EXIF data and RGB profile; raises as ``to_tensor``."""
    source = opened(picture)
    if isinstance(source, Image.Image):
        return source
    pixels = torch.from_numpy(as_float(source))
    return to_pil(pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels)


def opened(picture: Picture, name: str = "picture", side: int | None = None) -> Image.Image | np.ndarray:
    """A picture as an upright 8-bit PIL image; or as an array (C, H, W), if its values need a closer look."""
    if isinstance(picture, str | os.PathLike):
        return opened(open_picture(picture, side), name)
    if isinstance(picture, Image.Image):
        loaded(picture, f"the {name}")
        deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16")  # convert() would clip these to white
        seen = picture if name == "mask" else with_rgb_profile(picture)  # a mask has numbers, not colours
        source = np.asarray(ImageOps.exif_transpose(picture))[None] if deep else upright(seen)
    else:
        source = channels_first(picture, name)
        check_pixels(source.shape[2], source.shape[1], f"the {name}")
    return source


def channels_first(picture: Any, name: str) -> np.ndarray:
    """An array, a tensor or lists as an array (C, H, W); raises if the shape has no one reading."""
    if isinstance(picture, list | tuple):
        if len(picture) == 1 and not isinstance(picture[0], int | float | list | tuple):
            return channels_first(picture[0], name) if not is_file(picture[0]) else as_array(opened(picture[0], name))
        if any(is_file(one) for one in picture):
            raise MiniCogViewError(f"a list of {len(picture)} {name}s: give one at a time")
    first = isinstance(picture, Tensor)  # where both ends could be channels, each library has its habit
    try:
        values = plain(picture)
    except (ValueError, TypeError, RuntimeError):  # lists of unequal length; tensors that are sparse, or without data
        kind = type(picture).__name__
        raise MiniCogViewError(f"the {name}, a {kind}, is no plain array: give rows of equal length") from None
    if values.dtype.kind not in "biuf":
        raise MiniCogViewError(
            f"the {name} is of type {type(picture).__name__}: give a file, a PIL image, an array or a tensor of numbers"
        )
    shape = values.shape
    while values.ndim > 3 and len(values) == 1:
        values = values[0]
    if values.ndim > 3:
        raise MiniCogViewError(f"a batch of {name}s of shape {shape}: give one at a time, (3, H, W) or (H, W, 3)")
    if values.ndim == 2 and values.size:
        return values[None]
    for axis in (0, 2) if first else (2, 0):
        if values.ndim == 3 and values.shape[axis] in (1, 3, 4) and values.size:
            return np.moveaxis(values, axis, 0)
    raise MiniCogViewError(f"the {name} has shape {shape}: give (3, H, W), (H, W, 3) or, in grey, (H, W)")


def as_codes(picture: Picture, grid: int) -> Tensor | None:
    """Integers of rank 2 as int64 picture codes; None for a picture.

    Bytes and 16-bit values are grey pixels, unless their shape is (grid, grid).
    """
    try:
        values = np.zeros(0) if is_file(picture) else plain(picture)
    except (ValueError, TypeError, RuntimeError):  # to_tensor says why
        return None
    if values.ndim != 2 or values.size == 0 or values.dtype.kind not in "iu":
        return None
    if values.dtype in (np.uint8, np.uint16) and values.shape != (grid, grid):
        return None
    codes = torch.from_numpy(values.astype(np.int64))
    return codes.to(picture.device) if isinstance(picture, Tensor) else codes


def is_file(value: Any) -> bool:
    """Whether a value is a picture of its own: a file or a PIL image."""
    return isinstance(value, str | os.PathLike | Image.Image)


def plain(value: Any) -> np.ndarray:
    """A tensor, an array, or lists of them or of numbers, as an array."""
    if isinstance(value, list | tuple):
        return np.asarray([plain(one) if isinstance(one, Tensor) else one for one in value])
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def as_array(source: Image.Image | np.ndarray) -> np.ndarray:
    """What ``opened`` returns as an array (C, H, W)."""
    return np.asarray(source).transpose(2, 0, 1) if isinstance(source, Image.Image) else source


def white_value(values: np.ndarray, name: str = "picture") -> int:
    """The value that means white: 1 for booleans and floats; for integers 127 (int8), 255 or 65535.

    Integers that have more bits than they need do not tell their range. It is 0..255 if no value is above 255.

    Raises:
        MiniCogViewError: if a value is NaN or infinite, or they lie outside of every range.
    """
    low, high = float(values.min()), float(values.max())
    seen = f"the {name} has values from {low:.6g} to {high:.6g}"
    if not np.isfinite([low, high]).all():
        wrong = f"{np.sum(~np.isfinite(values))} of {values.size} values"
        raise MiniCogViewError(f"{wrong} of the {name} are NaN or infinite: give numbers from 0 to 1")
    kind, size = values.dtype.kind, values.dtype.itemsize
    if low < (-ROUNDING if kind == "f" else 0):
        remedy = "add 1 and divide by 2" if -1 <= low and high <= 1 and kind == "f" else "give 0..1, or bytes 0..255"
        raise MiniCogViewError(f"{seen}: {remedy}")
    if kind == "b" or (kind == "f" and high <= 1 + ROUNDING):
        return 1
    if size == 1 or (kind == "u" and size == 2):
        return np.iinfo(values.dtype).max  # 127, 255 or 65535
    if high > 65535:
        raise MiniCogViewError(f"{seen}: give 0..1, 0..255 or 0..65535")
    return 255 if high <= 255 else 65535


def as_float(values: np.ndarray) -> np.ndarray:
    """Values (C, H, W) of a picture as float32 in 0..1; raises if they have no one reading."""
    white = white_value(values)
    if values.dtype.kind == "f" and white > 1:
        low, high = values.min(), values.max()
        raise MiniCogViewError(f"the picture has values from {low:.6g} to {high:.6g}: divide by {white}")
    if values.dtype.kind in "iu" and values.dtype not in (np.uint8, np.uint16) and values.max() == 1:
        raise MiniCogViewError("the picture has integers, 0 and 1 alone: give floats 0..1, or uint8 0..255")
    return (np.array(values, dtype=np.float32) / np.float32(white)).clip(0, 1)


# --- files and PIL images


def open_picture(path: str | os.PathLike[str], side: int | None = None) -> Image.Image:
    """Read the whole of a picture file, so that damage is noticed here; a file that is too large is not read.

    Args:
        side: pixels along a side that are needed: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, if that is enough.

    Raises:
        MiniCogViewError: if the file is missing, damaged, not a picture, or has more than ``MAX_PIXELS`` pixels.
    """
    name = f"picture {path}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_pixels has a lower limit
            image = Image.open(path)
    except FileNotFoundError:
        raise MiniCogViewError(f"{name} does not exist: check the path") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MiniCogViewError(f"{name} cannot be read ({error}): give a PNG or JPEG file") from None
    with image:
        if side is not None:
            image.draft(None, (kept(side), kept(side)))
        return loaded(image, name)


def loaded(image: Image.Image, name: str) -> Image.Image:
    """A PIL image with its pixels in memory; raises if it is too large or damaged."""
    check_pixels(*image.size, name)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MiniCogViewError(f"{name} cannot be read ({error}): give a PNG or JPEG file") from None
    return image


def check_pixels(width: int, height: int, name: str) -> None:
    """Raise MiniCogViewError if a picture is too large to work with, before that takes time and memory."""
    if width * height == 0:
        raise MiniCogViewError(f"{name} has {width} x {height} pixels: give at least one")
    if width * height > MAX_PIXELS:
        limit = f"{MAX_PIXELS / 1e6:.0f} million"
        raise MiniCogViewError(f"{name} has {width} x {height} pixels, more than {limit}: shrink it first")


def kept(side: int) -> int:
    """Pixels along a side that suffice if ``side`` are needed."""
    return max(ENOUGH, 2 * side)


def shrunk(image: Image.Image, side: int | None) -> Image.Image:
    """A much larger picture averaged over boxes of whole pixels, so that ``side`` and more remain along each side."""
    if side is None:
        return image
    width, height = (max(1, length // kept(side)) for length in image.size)
    return image if width == height == 1 else image.reduce((width, height))


def upright(image: Image.Image) -> Image.Image:
    """A picture as a viewer shows it: rotated as its EXIF data says, 8-bit, RGB, or RGBA if parts are transparent."""
    image = ImageOps.exif_transpose(image)
    try:
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except ValueError as error:
        raise MiniCogViewError(f"the picture cannot be shown ({error}): convert it to RGB first") from None


def to_pil(pixels: Tensor) -> Image.Image:
    """A picture tensor (3 or 4, H, W) in 0..1 (values outside are clamped) as a PIL image."""
    array = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(rearrange(array, "c h w -> h w c").contiguous().numpy())
