"""A mask has one meaning, whatever holds it; what has two is refused with what was seen."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from minicogview.errors import MiniCogViewError
from minicogview.masks import check_region, to_mask

SIZE = (40, 60)
MARKED = np.zeros(SIZE, dtype=bool)
MARKED[10:25, 20:50] = True


def photo(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture of many colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 8, len(mode)), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def erased(picture: Image.Image, marked: np.ndarray = MARKED) -> Image.Image:
    """The picture with a hole."""
    picture = picture.convert("RGB")
    picture.putalpha(Image.fromarray(np.where(marked, 0, 255).astype(np.uint8)))
    return picture


def again(picture: Image.Image) -> Image.Image:
    """The picture after it was saved as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80)
    return Image.open(buffer)


def strokes(*colours: str, transparent: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Image.Image:
    """The marked part in stripes of these colours on a transparent layer."""
    layer = Image.new("RGBA", SIZE[::-1], transparent)
    drawing, width = ImageDraw.Draw(layer), 30 // len(colours)
    for i, colour in enumerate(colours):
        drawing.rectangle((20 + i * width, 10, 19 + (i + 1) * width, 24), fill=colour)
    return layer


BYTES = MARKED.astype(np.uint8)
GREY = Image.fromarray(BYTES * 255)
RGB = np.repeat(BYTES[..., None] * 255, 3, axis=2)
EQUAL: dict[str, Any] = {
    "bool": MARKED,
    "bool tensor": torch.from_numpy(MARKED),
    "bool (1, H, W)": MARKED[None],
    "bool (1, 1, H, W)": torch.from_numpy(MARKED)[None, None],
    "bool (H, W, 1)": MARKED[..., None],
    "lists": MARKED.tolist(),
    "a list of one": [BYTES],
    "0/1 bytes": BYTES,
    "0/1 int8": BYTES.astype(np.int8),
    "0/127 int8": BYTES.astype(np.int8) * 127,
    "0/255 int64": BYTES.astype(np.int64) * 255,
    "0/65535": BYTES.astype(np.uint16) * 65535,
    "float": MARKED.astype(np.float64),
    "bfloat16": torch.from_numpy(MARKED).bfloat16(),
    "with a gradient": torch.from_numpy(MARKED).float().requires_grad_(),
    "float 0..255": BYTES * np.float32(255),
    "RGB (H, W, 3)": RGB,
    "RGB (3, H, W)": RGB.transpose(2, 0, 1),
    "RGB tensor": torch.from_numpy(RGB),
    "soft": np.where(MARKED, 128, 127).astype(np.uint8),
    "JPEG noise": np.where(MARKED, 250, 5).astype(np.uint8),
    "PIL L": GREY,
    "PIL L 0/1": Image.fromarray(BYTES),
    "PIL 1": GREY.convert("1"),
    "PIL RGB": GREY.convert("RGB"),
    "PIL P": GREY.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE),
    "PIL I;16": Image.fromarray(BYTES.astype(np.uint16) * 65535),
    "PIL F": Image.fromarray(MARKED.astype(np.float32)),
    "opaque RGBA": GREY.convert("RGBA"),
    "LA": Image.merge("LA", (Image.new("L", SIZE[::-1], 255), GREY)),
    "black strokes": strokes("black"),
    "red strokes": strokes("#c00000"),
    "white strokes": strokes("white"),
    "strokes on transparent white": strokes("blue", transparent=(255, 255, 255, 0)),
    "strokes in three colours": strokes("red", "yellow", "#0000ff"),
    "strokes as an array": np.asarray(strokes("green")),
    "half-opaque strokes": strokes("#00ff0090"),
    "an erased photo": erased(photo()),
    "the erased photo, saved again": erased(again(photo())),
}


@pytest.mark.parametrize("name", EQUAL)
def test_one_mask_has_one_meaning(name: str) -> None:
    for picture in (None, photo()):
        mask = to_mask(EQUAL[name], SIZE, picture)
        assert mask.dtype == torch.bool and np.array_equal(mask.numpy(), MARKED)
        assert np.array_equal(to_mask(EQUAL[name], SIZE, picture, invert=True).numpy(), ~MARKED)


def test_a_file_marks_what_its_array_marks(tmp_path: Path) -> None:
    soft = Image.fromarray((np.hypot(*np.mgrid[-20:20, -30:30]) * 9).clip(0, 255).astype(np.uint8))
    soft.save(tmp_path / "mask.jpg", quality=60)
    image = Image.open(tmp_path / "mask.jpg")
    array = np.asarray(image)
    wanted = array > 127.5
    for mask in (tmp_path / "mask.jpg", str(tmp_path / "mask.jpg"), image, array, array / 255, array.astype(np.int64)):
        assert np.array_equal(to_mask(mask, SIZE).numpy(), wanted)


def test_an_erased_picture_is_its_own_mask() -> None:
    flat = erased(Image.new("RGB", SIZE[::-1], "red"))
    for picture in (erased(photo()), flat):  # even where the rest has one colour: the same part is transparent in both
        assert np.array_equal(to_mask(picture, SIZE, picture).numpy(), MARKED)
    emoji = Image.new("RGB", SIZE[::-1], "white")
    emoji.paste("black", (5, 5, 9, 9))
    assert np.array_equal(to_mask(erased(emoji), SIZE, emoji).numpy(), MARKED)


def test_black_in_a_white_mask_on_a_layer_is_kept() -> None:
    both = np.zeros(SIZE, dtype=bool)
    both[10:25, 20:35] = True
    assert np.array_equal(to_mask(strokes("white", "black"), SIZE).numpy(), both)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((60, 40)), r"mask has size \(60, 40\), the picture \(40, 60\): make them equal"),
        (np.zeros((3, 60, 40)), r"mask has size \(60, 40\), the picture \(40, 60\)"),
        (BYTES * 3, r"marks nothing \(brightest value 3 of 255\)"),
        (BYTES.astype(np.uint16) * 255, r"brightest value 255 of 65535"),
        (MARKED * 1.5, r"brightest value 1.5 of 255"),
        (np.zeros(SIZE), r"brightest value 0 of 1\)"),
        (strokes("#00ff0040"), r"highest opacity 64 of 255"),
        (BYTES.astype(np.int8) * -1, r"mask has values from -1 to 0"),
        (MARKED * 2.0 - 1, r"mask has values from -1 to 1: add 1 and divide by 2"),
        (np.where(MARKED, np.nan, 0), r"450 of 2400 values of the mask are NaN"),
        (np.repeat(MARKED[None], 2, axis=0), r"mask has shape \(2, 40, 60\)"),
        (np.repeat(BYTES[None, None], 2, axis=0), r"a batch of masks of shape \(2, 1, 40, 60\): give one at a time"),
        ([[1, 0], [1]], "the mask, a list, is no plain array"),
        ([GREY, GREY], "a list of 2 masks: give one at a time"),
        (None, "mask is of type NoneType"),
        (erased(photo(1)), r"mask is a picture with transparent parts \(\d+ colours\), and not the one to edit"),
    ],
)
def test_what_has_no_one_reading_is_refused(mask: Any, reason: str) -> None:
    with pytest.raises(MiniCogViewError, match=reason) as caught:
        to_mask(mask, SIZE, photo())
    assert "\n" not in str(caught.value)


def test_strokes_in_the_pictures_own_colour_are_refused() -> None:
    with pytest.raises(MiniCogViewError, match="the picture's own colour there"):
        to_mask(strokes("white"), SIZE, Image.new("RGB", SIZE[::-1], "white"))
    with pytest.raises(MiniCogViewError, match="marks nothing"):
        to_mask(np.ones(SIZE), SIZE, invert=True)


def test_a_mask_is_turned_like_a_photo() -> None:
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    GREY.rotate(90, expand=True).save(buffer, format="PNG", exif=exif)
    assert np.array_equal(to_mask(Image.open(buffer), SIZE).numpy(), MARKED)


def test_regions_are_cut_like_masks() -> None:
    wanted = torch.eye(3, dtype=torch.bool)
    for region in (wanted, wanted.tolist(), wanted.int().numpy(), wanted * 0.6 + 0.2, wanted.byte() * 255):
        assert torch.equal(check_region(region, 3), wanted)
    for region, reason in (
        (torch.eye(4), r"region of shape \(4, 4\)"),
        (torch.eye(3) * 0.3, "with 0 cells"),
        (torch.eye(3) * float("nan"), "9 of 9 values of the region are NaN"),
        ([[1], [1, 0]], "the region, a list, is no plain array"),
    ):
        with pytest.raises(MiniCogViewError, match=reason):
            check_region(region, 3)
