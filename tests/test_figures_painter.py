"""Painting a mask: what comes from the browser becomes a mask; and the whole way in a real browser."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minicogview.errors import MiniCogViewError
from minicogview.figures.painter import LARGE, SMALL, MaskPainter, edit_panel, zoom_of
from minicogview.masks import to_mask

PATIENCE = 120  # seconds: a kernel that imports torch on a busy machine takes its time


def paint(painter: MaskPainter, mask: torch.Tensor) -> None:
    """What the browser sends after a stroke: a memoryview, through the same door."""
    painter.set_state({"bits": memoryview(np.packbits(mask.numpy()).tobytes())})


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (32, 48), (16, 16)])
def test_painted_bits_become_a_mask(size):
    painter = MaskPainter(Image.new("RGB", size[::-1]))
    torch.manual_seed(0)
    mask = torch.rand(size) > 0.5
    mask[-1, -1] = True
    paint(painter, mask)
    assert painter.mask.dtype == torch.bool and painter.mask.shape == size
    assert torch.equal(painter.mask, mask)
    assert torch.equal(to_mask(painter.mask, size), mask)  # as edit() reads it


def test_nothing_painted_is_an_error():
    painter = MaskPainter(Image.new("RGB", (6, 4)))
    with pytest.raises(MiniCogViewError, match="nothing is painted"):
        _ = painter.mask
    paint(painter, torch.zeros(4, 6, dtype=torch.bool))  # painted and erased again
    with pytest.raises(MiniCogViewError, match="nothing is painted"):
        _ = painter.mask
    paint(painter, torch.ones(4, 6, dtype=torch.bool))
    assert painter.mask.all()
    painter.clear()
    with pytest.raises(MiniCogViewError, match="nothing is painted"):
        _ = painter.mask


@pytest.mark.parametrize("length", [2, 4, 24])
def test_wrong_number_of_bytes_is_an_error(length):
    painter = MaskPainter(Image.new("RGB", (6, 4)))
    painter.set_state({"bits": memoryview(b"\xff" * length)})
    with pytest.raises(MiniCogViewError, match=rf"{length} bytes.*4 x 6 pixels has 3"):
        _ = painter.mask


def test_pictures_of_any_kind_are_shown(tmp_path):
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "photo.jpg", exif=exif)
    painter = MaskPainter(tmp_path / "photo.jpg")
    assert painter.size == (6, 4) and painter.picture.size == (4, 6)
    large = MaskPainter(Image.new("L", (3000, 10)))
    assert large.size == (10, 3000)
    assert Image.open(io.BytesIO(large.png)).width == 2 * LARGE
    array = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    assert np.array_equal(np.asarray(MaskPainter(array).picture), array)
    assert np.array_equal(np.asarray(MaskPainter(torch.from_numpy(array).permute(2, 0, 1) / 255).picture), array)
    with pytest.raises(MiniCogViewError, match="does not exist"):
        MaskPainter(tmp_path / "none.png")
    with pytest.raises(MiniCogViewError, match="divide by 255"):
        MaskPainter(array * 3.0)


@pytest.mark.parametrize("side", [1, 32, 100, 255, 256, 300, 512, 4000])
def test_pictures_are_shown_in_a_handy_size(side):
    assert SMALL <= zoom_of(side, 1) * side <= LARGE


class Model:
    """Paints red under the mask; refuses an empty text, and breaks on "break"."""

    def edit(self, text, picture, mask, n=1, seed=0):
        if not text:
            raise MiniCogViewError("the text is empty")
        if text == "break":
            raise RuntimeError("out of memory\nand much more")
        self.asked = (text, mask, n, seed)
        red = Image.new(picture.mode, picture.size, "red")
        return [Image.composite(red, picture, Image.fromarray(mask.numpy())) for _ in range(n)]


def test_the_button_draws_and_tells_what_was_refused():
    model = Model()
    panel = edit_panel(model, Image.new("RGB", (6, 4), "white"), "an apple", n=2, seed=5)
    painter, text, _, button, status, result = panel.children
    button.click()
    assert status.value.startswith("nothing is painted") and not result.value and result.layout.display == "none"
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:4] = True
    paint(painter, mask)
    button.click()
    asked, got, n, seeds = model.asked
    assert (asked, n, seeds) == ("an apple", 2, 5) and torch.equal(got, mask)
    first = result.value
    assert Image.open(io.BytesIO(first)).getpixel((4 + 3 * int(painter.zoom), 4 + 2 * int(painter.zoom))) == (255, 0, 0)
    assert "seed 5" in status.value and result.layout.display is None
    text.value = ""
    button.click()
    assert status.value == "the text is empty" and result.value == first and not button.disabled
    text.value = "break"
    button.click()  # outside of Jupyter, ipywidgets logs what is raised in a callback
    assert status.value == "RuntimeError: out of memory" and not button.disabled


def test_the_panel_is_white_where_pictures_are_transparent_and_not_larger_than_a_screen():
    for side in (8, 2000):
        panel = edit_panel(Model(), Image.new("RGBA", (side, side), (0, 0, 0, 0)), "an apple")
        painter, *_, button, _, result = panel.children
        mask = torch.zeros(side, side, dtype=torch.bool)
        mask[: side // 2] = True
        paint(painter, mask)
        button.click()
        shown = Image.open(io.BytesIO(result.value))
        assert shown.mode == "RGB" and shown.getpixel((shown.width // 2, shown.height - 20)) == (255, 255, 255)
        assert shown.getpixel((shown.width // 2, 20)) == (255, 0, 0) and shown.width <= 1024 + 8


# --- In a browser -----------------------------------------------------------------------------------------

CELL = """
from pathlib import Path
from PIL import Image
from minicogview.figures.painter import edit_panel

class Model:
    calls = 0

    def edit(self, text, picture, mask, n=1, seed=0):
        assert text != "break", "broken on purpose"
        Model.calls += 1
        whole = Image.fromarray(mask.numpy())
        whole.convert("L").save(f"part-{Model.calls}.png")
        Path(f"part-{Model.calls}.png").rename(f"mask-{Model.calls}.png")
        Path("asked.txt").write_text(f"{text} {n} {seed}")
        return [Image.composite(Image.new("RGB", picture.size, "red"), picture, whole)]

picture = Image.linear_gradient("L").resize((48, 32)).convert("RGB")
panel = edit_panel(Model(), picture, "a red apple", seed=3)
panel
"""


@pytest.fixture
def chromium() -> str:
    """Where Chromium is; without it the test is skipped, or fails where CI_BROWSER=1 promises a browser."""
    missing = []
    found = shutil.which("chromium")
    if found is None:
        missing.append("no chromium on the PATH: apt-get install chromium")
    try:
        import playwright.sync_api  # noqa: F401
    except ModuleNotFoundError:
        missing.append("no playwright: pip install 'minicogview[dev]'")
    if missing and os.environ.get("CI_BROWSER") == "1":
        pytest.fail("CI_BROWSER=1, but " + "; ".join(missing))
    if missing:
        pytest.skip("; ".join(missing))
    assert found is not None
    return found


@pytest.fixture
def lab(chromium: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """JupyterLab with one notebook: (address, folder). It knows no settings but its own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": None, "outputs": [], "source": CELL}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (folder / "paint.ipynb").write_text(json.dumps(notebook))
    news = tmp_path / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')  # else a question covers the page
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    own["IPYTHONDIR"] = str(tmp_path / "ipython")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--IdentityProvider.token="]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"]
    address = f"http://127.0.0.1:{port}"
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=os.environ | own, stdout=log, stderr=log)
        try:
            wait_for(lambda: answers(f"{address}/api"), f"JupyterLab, see {log.name}")
            yield f"{address}/lab/tree/paint.ipynb", folder
        finally:
            server.terminate()  # stops its kernels too
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def wait_for(done, what: str) -> None:
    """Ask again and again until ``done()`` is true."""
    end = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}"
        time.sleep(0.1)


def mask_in(path: Path) -> np.ndarray:
    wait_for(path.exists, path.name)
    return np.asarray(Image.open(path)) > 0


def paint_and_draw(page, folder: Path, shots: Path) -> None:
    """Everything that a reader may do with the panel, in an open notebook."""
    from playwright.sync_api import expect

    # The toolbar's indicator says idle before there is a kernel, the status bar does not. Without one, "run all" does
    # nothing, or asks which kernel to take, and the question covers the page.
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator("[data-command='runmenu:run-all']").click()
    canvas, status, result = (page.locator(f".mcv-{name}") for name in ("mask", "status", "result"))
    canvas.wait_for()

    page.locator(".mcv-button").click()
    expect(status).to_contain_text("nothing is painted")
    expect(result).to_be_hidden()
    page.screenshot(path=shots / "1_nothing.png")

    def stroke(start, end):
        """Drag the mouse between two pixels (x, y) of the picture."""
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        side = box["width"] / 48
        points = [(box["x"] + (x + 0.5) * side, box["y"] + (y + 0.5) * side) for x, y in (start, end)]
        page.mouse.move(*points[0])
        page.mouse.down()
        page.mouse.move(*points[1], steps=5)
        page.mouse.up()

    def draw(number):
        """Press the button; the mask (32, 48) that the model was given."""
        before = result.get_attribute("src")
        page.locator(".mcv-button").click()
        mask = mask_in(folder / f"mask-{number}.png")
        expect(result).not_to_have_attribute("src", before or "")
        expect(status).to_contain_text("seed 3")
        return mask

    page.locator(".mcv-brush").fill("4")
    stroke((10, 8), (30, 8))
    page.screenshot(path=shots / "2_painted.png")
    mask = draw(1)
    ys, xs = mask.nonzero()
    assert mask.shape == (32, 48)
    assert mask[8, 10:31].all() and xs.min() >= 8 and xs.max() <= 32 and ys.min() >= 6 and ys.max() <= 10
    assert (folder / "asked.txt").read_text() == "a red apple 1 3"
    expect(result).to_be_visible()
    result.scroll_into_view_if_needed()
    box, drawn = canvas.bounding_box(), result.bounding_box()
    assert 0 <= drawn["width"] - box["width"] < 20 and 0 <= drawn["height"] - box["height"] < 20  # a margin
    page.screenshot(path=shots / "3_drawn.png")

    stroke((40, 20), (60, 50))  # leaves the picture
    page.locator(".mcv-erase").check()
    stroke((20, 8), (20, 8))
    more = draw(2)  # as many bytes as before, others
    assert more[20, 40] and not more[8, 20] and more[8, 11] and more[8, 29]
    page.locator(".mcv-text input").fill("break")
    page.locator(".mcv-button").click()
    expect(status).to_contain_text("broken on purpose")
    result.scroll_into_view_if_needed()
    page.screenshot(path=shots / "4_erased.png")

    page.locator(".mcv-clear").click()
    page.locator(".mcv-button").click()
    expect(status).to_contain_text("nothing is painted")
    page.screenshot(path=shots / "5_cleared.png")


def test_in_jupyterlab_a_stroke_becomes_a_new_picture(chromium, lab, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    address, folder = lab
    shots = Path(os.environ.get("PAINTER_SHOTS", tmp_path))  # to look at them: PAINTER_SHOTS=some/folder pytest ...
    shots.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=PATIENCE * 1000)
    told: list[str] = []
    with sync_playwright() as play:
        window = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = window.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.on("console", lambda message: told.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        try:
            page.goto(address)
            paint_and_draw(page, folder, shots)
        except Exception as error:
            page.screenshot(path=shots / "failed.png")
            (shots / "console.txt").write_text("\n".join(told))
            seen = f"see failed.png and console.txt in {shots}, and {tmp_path / 'lab.log'}"
            raise AssertionError(f"{error}\n{seen}") from error
        finally:
            window.close()
