"""Editing takes any mask and any picture, and changes not a single bit outside the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import TINY, write_tiny

from minicogview.editing import crop_box, inner_box, paste, to_mask, token_region
from minicogview.errors import MiniCogViewError
from minicogview.pipeline import CogView2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CogView2:
    return CogView2.from_pretrained(write_tiny(tmp_path_factory.mktemp("tiny")), TINY)


def box_mask(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    bands = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


@given(st.integers(1, 70), st.integers(1, 70), st.data())
@settings(max_examples=60, deadline=None)
def test_the_cut_holds_the_mask_and_lies_inside(height: int, width: int, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    mask = box_mask((height, width), top, left, bottom, right)
    assert inner_box(mask) == (top, left, bottom, right)
    a, b, c, d = crop_box(mask, least=8)
    assert 0 <= a <= top and bottom <= c <= height and 0 <= b <= left and right <= d <= width
    if max(bottom - top, right - left) <= min(height, width):
        assert c - a == d - b >= min(8, height, width)
    region = token_region(mask[a:c, b:d], 5)
    assert region.shape == (5, 5) and region.any()


def test_context_around_the_mask() -> None:
    assert crop_box(box_mask((100, 100), 40, 40, 54, 54)) == (36, 36, 56, 56)  # 14 of 20 pixels
    assert crop_box(box_mask((100, 100), 0, 90, 14, 100)) == (0, 80, 20, 100)  # moved inside
    assert crop_box(box_mask((100, 300), 10, 20, 90, 260)) == (0, 0, 100, 300)  # wider than the picture is high
    assert crop_box(box_mask((100, 100), 40, 40, 60, 60), context=3) == (19, 19, 79, 79)
    for context in (0.9, float("nan")):
        with pytest.raises(MiniCogViewError, match=f"context is {context}: use 1"):
            crop_box(box_mask((9, 9), 1, 1, 2, 2), context)


def test_masks_of_every_kind() -> None:
    expected = box_mask((4, 6), 1, 2, 3, 5)
    grey = Image.fromarray(expected.numpy().astype(np.uint8) * 255)
    transparent = Image.merge("LA", (Image.new("L", (6, 4), 255), grey))
    for mask in (expected, expected.numpy(), expected.float() * 0.9, expected.byte(), grey, transparent):
        assert torch.equal(to_mask(mask, (4, 6)), expected)
    assert not to_mask(grey.convert("1").convert("P"), (4, 6))[0].any()
    with pytest.raises(MiniCogViewError, match=r"mask has size \(4, 6\), the picture \(6, 4\)"):
        to_mask(expected, (6, 4))
    with pytest.raises(MiniCogViewError, match="marks nothing"):
        to_mask(torch.zeros(4, 6), (4, 6))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(40, 40), (33, 61), (5, 9)])
def test_pixels_outside_the_mask_do_not_change(model: CogView2, mode: str, size: tuple[int, int]) -> None:
    picture = noise(*size, mode)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[1:4, 2:5], mask[-1, -1] = True, True  # two spots, one at the corner
    edited = model.edit("a red apple", picture, mask, n=2, seed=1)
    before = np.array(picture.convert("RGBA" if mode == "RGBA" else "RGB"))
    for image in edited:
        after = np.array(image)
        assert after.shape == before.shape and np.array_equal(after[~mask.numpy()], before[~mask.numpy()])
        assert (after[mask.numpy()] != before[mask.numpy()]).any()
    assert edited.tokens.shape == (2, 3, 3) and edited.seeds == [1, 2]
    again = model.edit("a red apple", picture, mask, n=1, seed=2)
    assert np.array_equal(again[0], edited[1])


@pytest.mark.parametrize("place", [(0, 0), (0, 29), (29, 0), (29, 29), (15, 0), (13, 17)])
def test_one_pixel_and_all_pixels(model: CogView2, place: tuple[int, int]) -> None:
    picture, mask = noise(30, 30), torch.zeros(30, 30)
    mask[place] = 1
    after, before = np.array(model.edit("cat", picture, mask)[0]), np.array(picture)
    assert (after != before).any(-1).sum() <= 1
    everything = model.edit("cat", picture, torch.ones(30, 30))
    assert everything[0].size == (30, 30)


def test_turned_and_deep_pictures(model: CogView2, tmp_path: Path) -> None:
    turned = noise(20, 30)
    exif = turned.getexif()
    exif[0x0112] = 6  # a camera held upright: shown 30 high, 20 wide
    turned.save(tmp_path / "turned.png", exif=exif)
    edited = model.edit("cat", tmp_path / "turned.png", box_mask((30, 20), 4, 4, 9, 9))
    assert edited[0].size == (20, 30)
    deep = Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16))
    grey = np.array(model.edit("cat", deep, box_mask((20, 20), 0, 0, 5, 5))[0])
    assert grey[-1, -1].tolist() == [255, 255, 255] and 100 < grey[10, 10, 0] < 160


def test_wrong_pictures_are_refused(model: CogView2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(40, 40).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    mask = torch.ones(40, 40)
    for name, reason in (("nothing.png", "does not exist"), ("cut.png", "cannot be read")):
        with pytest.raises(MiniCogViewError, match=reason):
            model.edit("cat", tmp_path / name, mask)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(MiniCogViewError, match="cannot be read"):
        model.edit("cat", tmp_path / "whole.png", mask)


def test_a_patch_fills_its_box() -> None:
    picture, patch = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGB", (3, 3), (9, 8, 7))
    mask = box_mask((8, 8), 2, 2, 4, 4)
    pixels = np.array(paste(picture, patch, (1, 1, 7, 7), mask))
    assert (pixels[mask.numpy()] == [9, 8, 7, 255]).all() and not pixels[~mask.numpy()].any()
