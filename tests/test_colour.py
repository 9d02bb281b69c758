"""Pictures in other colour spaces are seen as they look, and keep their profile."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from minicogview.colour import alike, in_profile_of, on_white, to_srgb
from minicogview.masks import to_mask
from minicogview.pictures import to_image, to_tensor
from minicogview.results import contact_sheet


def swapped_profile() -> bytes:
    """sRGB with its red and green primaries exchanged, under another name."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    for place in range(132, 132 + 12 * count, 12):
        tag = bytes(profile[place : place + 4])
        profile[place : place + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(tag, tag)
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "SWAP".encode("utf-16-be"))


def photo(mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (4, 3), (255, 0, 0, 77)[: len(mode)])
    image.info["icc_profile"] = swapped_profile()
    return image


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colours_go_to_srgb_and_back(mode: str) -> None:
    image = photo(mode)
    seen = to_srgb(image)
    assert seen.mode == mode and seen.getpixel((0, 0)) == (0, 255, 0, 77)[: len(mode)]
    assert "icc_profile" not in seen.info and "icc_profile" in image.info
    back = in_profile_of(seen.convert("RGB"), image)
    assert back.getpixel((0, 0)) == (255, 0, 0)


def test_what_is_read_and_shown_is_in_srgb() -> None:
    assert to_tensor(photo())[:, 0, 0].tolist() == [0, 1, 0]
    assert to_image(photo()).getpixel((0, 0)) == (255, 0, 0)  # still in its own profile
    assert contact_sheet([[photo()]], gap=1).getpixel((1, 1)) == (0, 255, 0)
    assert on_white(photo("RGBA")).getpixel((0, 0)) == (178, 255, 178)


def test_srgb_and_damaged_profiles_change_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"damaged", zlib.compress(b"")):
        image = Image.fromarray(noise)
        image.info["icc_profile"] = profile
        assert np.array_equal(np.asarray(to_srgb(image)), noise)
        assert np.array_equal(np.asarray(in_profile_of(Image.fromarray(noise), image)), noise)
        assert to_image(image).info["icc_profile"] == profile


def grey_profile() -> bytes:
    """A profile of linear grey: half of the light is 188 of 255 in sRGB."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    header = bytearray(srgb[:128])
    header[16:20] = b"GRAY"
    white = b"XYZ " + bytes(4) + b"".join(int(x * 65536).to_bytes(4, "big") for x in (0.9642, 1, 0.8249))
    curve = b"curv" + bytes(8)  # no entries: the curve is a straight line
    table = (2).to_bytes(4, "big")
    for name, data, place in ((b"wtpt", white, 156), (b"kTRC", curve, 156 + len(white))):
        table += name + place.to_bytes(4, "big") + len(data).to_bytes(4, "big")
    profile = header + table + white + curve
    profile[:4] = len(profile).to_bytes(4, "big")
    return bytes(profile)


def test_a_profile_of_grey_is_used_and_does_not_stay() -> None:
    image = Image.new("L", (4, 3), 128)
    image.info["icc_profile"] = grey_profile()
    seen = to_image(image)
    assert seen.getpixel((0, 0)) == (188, 188, 188) and "icc_profile" not in seen.info
    assert to_tensor(image)[0, 0, 0].item() == pytest.approx(188 / 255)
    image.paste(120, (0, 0, 2, 3))
    assert to_mask(image, (3, 4)).sum() == 6  # a mask has numbers, not colours


def test_all_modes_of_pil_are_read() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"):
        image = Image.new("RGB", (4, 3), "white").convert(*(("RGBA",) if mode == "RGBa" else ())).convert(mode)
        assert torch.allclose(to_tensor(image), torch.ones(3, 3, 4), atol=0.01), mode


def test_alike_keeps_profile_and_exif() -> None:
    image, buffer = photo(), io.BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    image.save(buffer, format="JPEG", exif=exif, icc_profile=image.info["icc_profile"])
    new = alike(np.zeros((9, 9, 3), np.uint8), to_image(Image.open(buffer)))
    assert new.size == (9, 9) and new.getexif()[0x010F] == "a camera"
    assert new.info["icc_profile"] == image.info["icc_profile"]
