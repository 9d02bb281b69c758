"""Pictures between files, PIL and tensors; the object that holds a model's pictures; contact sheets and files."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minicogview.errors import MiniCogViewError
from minicogview.pictures import as_codes, to_image, to_pil, to_tensor
from minicogview.results import Pictures, contact_sheet, enlarge, save


def gradient(height: int, width: int) -> torch.Tensor:
    """A smooth colour picture (3, H, W) whose values are whole 255ths."""
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    right = torch.linspace(0, 1, width).expand(height, width)
    return (torch.stack((down, right, 1 - down)) * 255).round() / 255


def test_pil_and_tensor_convert_exactly() -> None:
    tensor = gradient(5, 7)
    assert torch.equal(to_tensor(to_pil(tensor)), tensor)
    assert to_pil(tensor * 3 - 1).getextrema() == ((0, 255),) * 3  # clamped


def test_transparent_pictures_go_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert torch.equal(to_tensor(clear), torch.ones(3, 8, 8))
    half = to_tensor(Image.new("RGBA", (8, 8), (255, 0, 0, 51)))[:, 0, 0]
    assert torch.allclose(half, torch.tensor([1.0, 0.8, 0.8]), atol=0.005)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 255])
    palette.info["transparency"] = 0
    assert torch.equal(to_tensor(palette), torch.ones(3, 8, 8))
    assert torch.equal(to_tensor(Image.new("L", (8, 8), 0)), torch.zeros(3, 8, 8))
    grey = to_tensor(Image.new("I;16", (8, 8), 0x8000))
    assert torch.allclose(grey, torch.full((3, 8, 8), 0.5), atol=0.005)


def test_a_turned_photo_is_put_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    to_pil(gradient(16, 24)).save(tmp_path / "photo.jpg", exif=exif)
    assert to_tensor(tmp_path / "photo.jpg").shape == (3, 24, 16)


def test_what_is_no_picture_is_refused_with_a_reason(tmp_path: Path) -> None:
    to_pil(gradient(64, 64)).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(MiniCogViewError, match=r"none\.png does not exist: check the path"):
        to_image(tmp_path / "none.png")
    for name in ("cut.png", "bad.png"):
        with pytest.raises(MiniCogViewError, match=rf"{name} cannot be read .*: give a PNG or JPEG file"):
            to_image(tmp_path / name)
    for shape in ((8, 8, 5), (8,), (3, 0, 8), (0, 3)):
        with pytest.raises(MiniCogViewError, match=r"the picture has shape .*: give \(3, H, W\)"):
            to_tensor(torch.zeros(shape))


PIXELS = gradient(5, 7)
BYTES = (PIXELS * 255).round().byte()
EQUAL: dict[str, Any] = {
    "tensor (3, H, W)": PIXELS,
    "tensor (H, W, 3)": PIXELS.permute(1, 2, 0),
    "a batch of one": PIXELS[None],
    "a list of one": [PIXELS],
    "float64": PIXELS.double().numpy(),
    "float (H, W, 3)": PIXELS.permute(1, 2, 0).numpy(),
    "with a gradient": PIXELS.clone().requires_grad_(),
    "bytes": BYTES,
    "bytes (H, W, 3)": BYTES.permute(1, 2, 0).numpy(),
    "bytes (H, W, 4)": np.asarray(to_pil(PIXELS).convert("RGBA")),
    "int64": BYTES.long(),
    "16 bits": BYTES.numpy().astype(np.uint16) * 257,
    "16 bits, the other end first": (BYTES.numpy().astype(np.uint16) * 257).astype(">u2"),
    "16 bits in int32": BYTES.int() * 257,
    "nested lists": PIXELS.tolist(),
    "three lists of arrays": list(BYTES.numpy()),
    "PIL": to_pil(PIXELS),
    "a list with a PIL image": [to_pil(PIXELS)],
}


@pytest.mark.parametrize("name", EQUAL)
def test_one_picture_has_one_meaning(name: str) -> None:
    assert torch.allclose(to_tensor(EQUAL[name]), PIXELS, atol=1e-6)
    assert np.array_equal(np.asarray(to_image(EQUAL[name]))[..., :3], BYTES.permute(1, 2, 0).numpy())


def test_deep_and_grey_pictures_keep_their_brightness(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 35).reshape(5, 7)
    deep, wanted = (ramp * 65535).round(), torch.from_numpy(ramp).float().expand(3, -1, -1)
    given: dict[str, Any] = {
        "I": Image.fromarray(deep.astype(np.int32)),
        "I;16": Image.fromarray(deep.astype(np.uint16)),
        "F": Image.fromarray(ramp.astype(np.float32)),
        "(H, W)": ramp,
        "(1, H, W)": torch.from_numpy(ramp)[None],
        "(H, W, 1)": deep.astype(np.uint16)[..., None],
    }
    given["I;16"].save(tmp_path / "deep.png")
    given["file"] = tmp_path / "deep.png"
    for name, picture in given.items():
        assert torch.allclose(to_tensor(picture), wanted, atol=2e-5), name
        shown = np.asarray(to_image(picture)) / 255
        assert shown.shape == (5, 7, 3) and np.abs(shown - ramp[..., None]).max() <= 0.5 / 255 + 1e-5, name


def test_transparent_arrays_go_on_white() -> None:
    half = torch.tensor([1.0, 0, 0, 0.2])[:, None, None].expand(4, 5, 7)
    wanted = torch.tensor([1.0, 0.8, 0.8])[:, None, None].expand(3, 5, 7)
    assert torch.allclose(to_tensor(half), wanted) and to_image(half).mode == "RGBA"


@pytest.mark.parametrize(
    ("picture", "reason"),
    [
        (PIXELS * 2 - 1, "the picture has values from -1 to 1: add 1 and divide by 2"),
        (PIXELS * 255, "the picture has values from 0 to 255: divide by 255"),
        (PIXELS * 65535, "divide by 65535"),
        (PIXELS * 1.5, r"values from 0 to 1\.5"),
        (PIXELS / 0, r"\d+ of 105 values of the picture are NaN or infinite"),
        (BYTES.numpy() - 128.0, "values from -128 to 127"),
        (BYTES.int() * 1000, "values from 0 to 255000"),
        ((PIXELS > 0.5).int(), "integers, 0 and 1 alone"),
        ((PIXELS > 0.5).numpy().astype(np.uint32), "integers, 0 and 1 alone"),
        (Image.fromarray(np.full((5, 7), 255, np.float32)), "values from 255 to 255: divide by 255"),
        (PIXELS.expand(2, 3, 5, 7), r"a batch of pictures of shape \(2, 3, 5, 7\): give one at a time"),
        ([PIXELS, PIXELS], r"a batch of pictures of shape \(2, 3, 5, 7\)"),
        ([to_pil(PIXELS)] * 2, "a list of 2 pictures: give one at a time"),
        ([], "picture has shape"),
        ([[0.5], [0.5, 1]], "the picture, a list, is no plain array: give rows of equal length"),
        (PIXELS.to(torch.complex64), "picture is of type Tensor"),
        (None, "picture is of type NoneType"),
        (b"PNG", "picture is of type bytes"),
        ({}, "picture is of type dict"),
        (torch.eye(3).to_sparse(), "the picture, a Tensor, is no plain array"),
        (torch.zeros(3, 2, 2, device="meta"), "the picture, a Tensor, is no plain array"),
        (np.array([None]), "picture is of type ndarray"),
        (Image.new("RGB", (0, 4)), "has 0 x 4 pixels: give at least one"),
        (Image.new("La", (4, 4)), "the picture cannot be shown"),
    ],
)
def test_what_has_no_one_reading_is_refused(picture: Any, reason: str) -> None:
    for read in (to_tensor, to_image):
        with pytest.raises(MiniCogViewError, match=reason) as caught:
            read(picture)
        assert "\n" not in str(caught.value)


def test_a_damaged_file_is_noticed_when_pil_opened_it(tmp_path: Path) -> None:
    to_pil(gradient(64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:150])
    closed = Image.open(tmp_path / "cut.png")
    with pytest.raises(MiniCogViewError, match="the picture cannot be read"):
        to_tensor(closed)


def test_codes_are_told_from_pixels() -> None:
    codes = torch.arange(9).reshape(3, 3)
    for given in (codes, codes.byte(), codes.numpy(), codes.tolist()):
        found = as_codes(given, 3)
        assert found is not None and torch.equal(found, codes)
    for picture in (codes / 9, codes.byte().repeat(2, 2), codes[None], "3", Image.new("I", (3, 3)), [PIXELS, PIXELS]):
        assert as_codes(picture, 3) is None


# --- size


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_is_named_at_once(tmp_path: Path) -> None:
    Image.new("1", (13_000, 13_000)).save(tmp_path / "huge.png")
    lazy: Callable[[], Image.Image] = lambda: Image.open(tmp_path / "huge.png")  # noqa: E731
    for picture in (tmp_path / "huge.png", lazy, np.broadcast_to(np.uint8(0), (13_000, 13_000, 3))):
        start = time.perf_counter()
        with pytest.raises(MiniCogViewError, match="has 13000 x 13000 pixels, more than 67 million: shrink it first"):
            to_tensor(picture() if callable(picture) else picture)
        assert time.perf_counter() - start < 2


def test_a_large_picture_is_shrunk_early(tmp_path: Path) -> None:
    smooth = to_pil(gradient(3000, 1200))
    for name in ("large.jpg", "large.png"):
        smooth.save(tmp_path / name)
        small = to_tensor(tmp_path / name, side=32)
        assert small.shape == (3, 1500, 1200)
        assert to_tensor(tmp_path / name).shape == (3, 3000, 1200)
        assert (small.mean((1, 2)) - 0.5).abs().max() < 0.01
    Image.new("RGB", (12_000, 12_000), "red").save(tmp_path / "huge.jpg")
    small = to_tensor(tmp_path / "huge.jpg", side=32)
    assert small.shape == (3, 1500, 1500) and small[0].min() > 0.9
    with pytest.raises(MiniCogViewError, match="12000 x 12000"):
        to_image(tmp_path / "huge.jpg")


# --- the object that holds pictures


def made(n: int = 10) -> Pictures:
    """As CogLM makes them: 12 x 12 pixels, 3 x 3 tokens."""
    images = [Image.new("RGB", (12, 12), (20 * i, 0, 0)) for i in range(n)]
    tokens = torch.arange(n)[:, None, None].expand(n, 3, 3)
    return Pictures(images, tokens, -torch.arange(float(n)), "cat", list(range(5, 5 + n)))


def test_pictures_show_themselves() -> None:
    pictures = made()
    shown = Image.open(io.BytesIO(pictures._repr_png_()))
    assert shown.size == (8 * (11 * 12 + 4) + 4, 2 * (11 * 12 + 4) + 4)  # 12 pixels enlarged to 132
    assert pictures.sheet(1).size == (8 * 16 + 4, 2 * 16 + 4)
    with pytest.raises(MiniCogViewError, match="scale is -1"):
        pictures.sheet(-1)


def test_pictures_are_a_sequence_and_the_best_can_be_kept() -> None:
    pictures = made(4)
    assert len(pictures) == 4 and list(pictures)[3] is pictures[3] and repr(pictures).startswith("Pictures(4 of 'cat'")
    best = pictures.best(2, torch.tensor([-3.0, -1.0, -2.0, -1.0]))
    assert best.seeds == [6, 8] and best.images == [pictures[1], pictures[3]]  # of two equal ones the first comes first
    assert best.tokens[:, 0, 0].tolist() == [1, 3] and best.scores.tolist() == [-1, -3]
    assert best.caption_scores is not None and best.caption_scores.tolist() == [-1, -1]
    assert best.coglm is best.images and best.fine_tokens is None


def test_contact_sheet_puts_texts_below_one_another() -> None:
    red, blue = (Image.new("RGB", (2, 3), colour) for colour in ("red", "blue"))
    sheet = contact_sheet([[red, red, red], [blue]], scale=2, columns=2, gap=1)
    assert sheet.size == (11, 22)
    where = {(1, 1): "red", (6, 1): "red", (1, 8): "red", (6, 8): "white", (1, 15): "blue", (0, 0): "white"}
    for place, colour in where.items():
        assert sheet.getpixel(place) == Image.new("RGB", (1, 1), colour).getpixel((0, 0)), place
    assert enlarge(red, 3).size == (6, 9)


def test_saving_leaves_no_half_files(tmp_path: Path) -> None:
    save(Image.new("RGB", (2, 2)), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    (tmp_path / "b.png").mkdir()
    with pytest.raises(MiniCogViewError, match=r"cannot write .*b\.png"):
        save(Image.new("RGB", (2, 2)), tmp_path / "b.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "new"]


def test_sheets_are_white_where_pictures_are_transparent() -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    for sheet in (contact_sheet([[hidden]]), contact_sheet([[hidden]], scale=3)):
        assert sheet.mode == "RGB" and sheet.getextrema() == ((255, 255),) * 3
    large = contact_sheet([[Image.new("RGB", (3000, 1500))]], gap=0, largest=1000)
    assert large.size == (1000, 500)


def test_profile_and_exif_are_written(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    image = Image.new("RGB", (2, 2))
    image.info.update(exif=exif.tobytes(), icc_profile=b"profile")
    save(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as again:
        assert again.getexif()[0x010F] == "a camera" and again.info["icc_profile"] == b"profile"
