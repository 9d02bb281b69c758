"""Pictures between files, PIL and tensors; the object that holds a model's pictures; contact sheets and files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from minicogview.errors import MiniCogViewError
from minicogview.pictures import Pictures, contact_sheet, enlarge, save, to_image, to_pil, to_tensor


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
    for shape in ((8, 8, 3), (3, 8), (3, 0, 8)):
        with pytest.raises(MiniCogViewError, match=r"picture tensor has shape .*: give \(3, H, W\)"):
            to_tensor(torch.zeros(shape))


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
