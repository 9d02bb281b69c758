"""Paint a mask on a picture in the notebook, and have a model draw the painted part anew.

The idea: the browser shows the picture under a transparent canvas. After every stroke it sends the canvas to Python,
one bit for each pixel, and Python unpacks the bits into the mask that ``CogView2.edit`` takes. The code in the browser
is ``painter.js``, a plain ES module that anywidget loads in JupyterLab, Colab and VS Code.

For: CogView2 (arXiv 2204.14217), section 3.2; the geometry is in ``editing.py``, the drawing in ``pipeline.py``. The
original has no counterpart: its masks are typed in as numbers. For readers without a running notebook,
``editing.box_mask`` makes a mask without painting.

Shapes: a picture has H x W pixels, and its mask H * W bits in ceil(H * W / 8) bytes, row after row.
"""

from __future__ import annotations

from pathlib import Path

import anywidget
import ipywidgets as ipw
import numpy as np
import torch
import traitlets
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.pictures import Picture, to_image
from minicogview.pipeline import CogView2
from minicogview.results import LARGEST, contact_sheet, png, scale_to

SMALL, LARGE = 256, 512  # screen pixels: smaller pictures are shown enlarged, larger ones shrunk
CSS = """
.mcv-stage { position: relative; max-width: 100%; touch-action: none; overflow: hidden; }
.mcv-stage > * { position: absolute; top: 0; left: 0; }
.mcv-picture, .mcv-mask { width: 100%; height: 100%; max-width: none; margin: 0; }
.mcv-mask { opacity: 0.6; cursor: crosshair; touch-action: none; }
.mcv-ring { display: none; box-sizing: border-box; transform: translate(-50%, -50%); pointer-events: none;
            border: 1px solid white; outline: 1px solid black; border-radius: 50%; }
.mcv-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; margin: 4px 0; }
.mcv-tools label { display: flex; align-items: center; gap: 4px; }
.mcv-number { min-width: 4em; }
"""


def zoom_of(height: int, width: int) -> float:
    """Screen pixels for each pixel of a picture: an integer for small pictures, below 1 for large ones.

    Example:
        >>> zoom_of(32, 24), zoom_of(300, 400), zoom_of(1024, 768)
        (8.0, 1.0, 0.5)
    """
    side = max(height, width)
    return min(float(scale_to(side, SMALL)), LARGE / side)


class MaskPainter(anywidget.AnyWidget):
    """Paint a mask on a picture with the mouse, a pen or a finger; the brush has a size and can erase.

    Attributes:
        picture: the PIL picture, upright, in its own size.
        size: (H, W) of the picture.
        zoom: screen pixels for each pixel of the picture.
        png: the picture as the browser shows it, shrunk if it is larger than any screen needs.
        bits: the mask as the browser sends it, ``numpy.packbits`` of (H, W); empty before the first stroke.

    Example:
        >>> painter = MaskPainter(torch.zeros(3, 2, 4))
        >>> painter.bits = bytes([0b0110_0000])  # as if painted in the browser
        >>> painter.mask.int().tolist()
        [[0, 1, 1, 0], [0, 0, 0, 0]]
    """

    _esm = Path(__file__).with_name("painter.js")
    _css = CSS
    size = traitlets.Tuple(traitlets.Int(), traitlets.Int()).tag(sync=True)
    zoom = traitlets.Float().tag(sync=True)
    png = traitlets.Bytes().tag(sync=True)
    # The browser's message arrives as a memoryview, which Bytes refuses, and ipywidgets would silently drop it.
    bits = traitlets.Bytes().tag(sync=True, from_json=lambda value, _: bytes(value))

    def __init__(self, picture: Picture) -> None:
        """Show a picture of any size, given in any way that ``pictures.to_tensor`` takes, with nothing painted.

        Raises:
            MiniCogViewError: if the picture cannot be read.
        """
        image = to_image(picture)
        shown = image.copy()
        shown.thumbnail((LARGEST, LARGEST))  # twice the size on the screen, for high-density displays
        size = image.height, image.width
        super().__init__(size=size, zoom=zoom_of(*size), png=png(shown))
        self.picture = image

    @property
    def mask(self) -> Tensor:
        """The painted mask, (H, W) bool, in the picture's own size; True marks what is drawn anew.

        Raises:
            MiniCogViewError: if nothing is painted, or the number of bytes does not fit the picture.
        """
        height, width = self.size
        wanted = -(-height * width // 8)
        if self.bits and len(self.bits) != wanted:
            raise MiniCogViewError(
                f"the mask has {len(self.bits)} bytes, one of {height} x {width} pixels has {wanted}: "
                "press clear and paint again"
            )
        if not any(self.bits):
            raise MiniCogViewError("nothing is painted: paint with the mouse over what is to be drawn anew")
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=height * width)
        return torch.from_numpy(bits.reshape(height, width).astype(bool))

    def clear(self) -> None:
        """Remove all paint, here and in the browser."""
        self.bits = b""


def edit_panel(model: CogView2, picture: Picture, text: str = "", n: int = 1, seed: int = 0) -> ipw.VBox:
    """Paint on a picture, type what should be there, and press the button: ``model.edit`` draws it.

    Args:
        model: any object with an ``edit`` method like that of ``CogView2``.
        picture: file, PIL image, array or tensor, of any size.
        text, seed: initial values of the text and seed fields.
        n: number of pictures for each press of the button, shown side by side.

    Returns:
        a box with the painter, the text, the seed, the button, a line for errors, and the pictures.

    Raises:
        MiniCogViewError: if the picture cannot be read.
    """
    painter = MaskPainter(picture)
    words = ipw.Text(text, description="text")
    number = ipw.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed")
    button = ipw.Button(description="draw", button_style="primary")
    status = ipw.Label()
    as_it_is = ipw.Layout(max_width="100%", align_self="flex-start", display="none")  # otherwise the box stretches it
    image = ipw.Image(format="png", layout=as_it_is)

    def draw(_: ipw.Button) -> None:
        button.disabled = True  # clicks during drawing would queue up
        status.value = "drawing ..."
        try:
            drawn = list(model.edit(words.value, painter.picture, painter.mask, n=n, seed=number.value))
            image.value = png(contact_sheet([drawn], max(1, int(painter.zoom)), largest=LARGEST))
            image.layout.display = None
            status.value = f"drawn with seed {number.value}"
        except MiniCogViewError as error:
            status.value = str(error)
        except Exception as error:
            status.value = f"{type(error).__name__}: {error}".splitlines()[0]
            raise  # the traceback goes to Jupyter's log
        finally:
            button.disabled = False

    button.on_click(draw)
    parts = {"text": words, "seed": number, "button": button, "status": status, "result": image}
    for name, part in parts.items():
        part.add_class(f"mcv-{name}")  # for style sheets and tests
    return ipw.VBox([painter, *parts.values()])
