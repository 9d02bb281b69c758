"""Editing takes any mask and any picture, and changes not a single bit outside the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_colour import swapped_profile
from tiny import TINY, write_tiny

from minicogview.cli.main import main
from minicogview.colour import to_srgb
from minicogview.config import PRESETS
from minicogview.editing import crop_box, inner_box, paste, token_region
from minicogview.errors import MiniCogViewError
from minicogview.pipeline import CogView2
from minicogview.results import save
from minicogview.variations import outpaint, vary


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


def test_an_edited_photo_keeps_profile_and_exif(model: CogView2, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6
    profile = swapped_profile()
    noise(20, 30).save(tmp_path / "photo.jpg", exif=exif, icc_profile=profile)
    edited = model.edit("cat", tmp_path / "photo.jpg", box_mask((30, 20), 4, 4, 9, 9), seed=1)
    grown = outpaint(model, "cat", tmp_path / "photo.jpg", (3, 0, 0, 4), seed=1)
    for picture in (edited[0], grown[0]):
        save(picture, tmp_path / "out.png")
        with Image.open(tmp_path / "out.png") as out:
            assert out.info["icc_profile"] == profile
            assert out.getexif()[0x010F] == "a camera" and 0x0112 not in out.getexif()  # it is upright now


def test_new_pixels_are_in_the_photos_profile() -> None:
    picture, green = Image.new("RGB", (8, 8)), Image.new("RGB", (3, 3), (0, 255, 0))
    picture.info["icc_profile"] = swapped_profile()
    pasted = paste(picture, green, (0, 0, 8, 8), box_mask((8, 8), 2, 2, 4, 4))
    assert pasted.getpixel((2, 2)) == (255, 0, 0) and to_srgb(pasted).getpixel((2, 2)) == (0, 255, 0)


def test_masks_and_pictures_of_any_kind(model: CogView2, tmp_path: Path) -> None:
    picture, mask = noise(20, 30), box_mask((20, 30), 4, 4, 9, 9)
    wanted = np.asarray(model.edit("cat", picture, mask)[0])
    erased = picture.copy()
    erased.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    Image.fromarray(np.asarray(mask)).save(tmp_path / "mask.png")
    for same in (np.asarray(picture), np.asarray(picture).transpose(2, 0, 1) / 255, [picture]):
        assert np.array_equal(model.edit("cat", same, mask)[0], wanted)
    for marks in (mask.int() * 255, tmp_path / "mask.png", erased):
        assert np.array_equal(model.edit("cat", picture, marks)[0], wanted)
    after = np.asarray(model.edit("cat", erased, erased)[0])
    assert after.shape == (20, 30, 4) and (after[..., 3] == 255).all()  # the hole is filled
    assert np.array_equal(after[~mask.numpy(), :3], np.asarray(picture)[~mask.numpy()])
    with pytest.raises(MiniCogViewError, match="values from 0 to 255: divide by 255"):
        model.edit("cat", np.asarray(picture) * 1.0, mask)


def test_wrong_floats_give_no_caption(model: CogView2) -> None:
    pixels = torch.from_numpy(np.array(noise(24, 24))).permute(2, 0, 1) / 255
    assert model.caption(pixels) == model.caption(pixels.permute(1, 2, 0).numpy()) == model.caption([pixels])
    for wrong in (pixels * 2 - 1, pixels * 255, pixels / 0, pixels[None].repeat(2, 1, 1, 1)):
        for task in (model.caption, lambda one: model.score(one, ["cat"]), lambda one: vary(model, "cat", one)):
            with pytest.raises(MiniCogViewError, match=r"has values|are NaN|a batch of pictures"):
                task(wrong)


def test_memory_is_named_before_drawing(model: CogView2) -> None:
    large = Image.new("RGB", (6000, 6000))
    with pytest.raises(MiniCogViewError, match=r"20 pictures of 6000 x 6000 pixels would need 2\.9 GB: draw fewer"):
        model.edit("cat", large, box_mask((6000, 6000), 0, 0, 50, 50), n=20)
    with pytest.raises(MiniCogViewError, match="has 20000 x 20000 pixels, more than 67 million"):
        outpaint(model, "cat", noise(8, 8), (19_992, 0, 0, 19_992))


def test_a_mask_is_inverted_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "weights")
    picture, mask = noise(20, 30), box_mask((20, 30), 4, 4, 18, 28).numpy()
    picture.save("photo.png")
    Image.fromarray(mask).save("mask.png")
    command = ["edit", "cat", "photo.png", "--weights", "weights", "--n", "1", "--out", "new"]
    assert main([*command, "--mask", "mask.png", "--invert-mask"]) == 0
    changed = (np.asarray(Image.open("new/cat_edit_0.png")) != np.asarray(picture)).any(-1)
    assert changed.any() and not changed[mask].any()
    capsys.readouterr()
    assert main([*command, "--box", "0", "0", "1", "1", "--invert-mask"]) == 2
    assert capsys.readouterr().err == "minicogview: --invert-mask belongs to --mask FILE: give one, or leave it out\n"
