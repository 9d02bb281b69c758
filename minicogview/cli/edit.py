"""``minicogview edit``, ``vary`` and ``outpaint``: a text and a picture in, PNG files of new pictures out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minicogview.cli.generate import free_stem, save_pictures
from minicogview.cli.shared import DEFAULTS, SHIPPED, Drawing, DrawingOptions, Weights, print_json
from minicogview.errors import MiniCogViewError

if TYPE_CHECKING:
    from minicogview.results import Pictures

Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OptionalBox = Annotated[
    tuple[float, float, float, float] | None, tyro.conf.arg(metavar="TOP LEFT BOTTOM RIGHT", help_behavior_hint="")
]
Margins = Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="TOP LEFT BOTTOM RIGHT")]


def edit(
    text: Text,
    picture: File,
    /,
    mask: OptionalFile = None,
    box: OptionalBox = None,
    invert_mask: bool = False,
    context: float = 20 / 14,
    drawing: Drawing = DEFAULTS,
    source: Weights = SHIPPED,
) -> int:
    """Redraw a part of a picture as a text describes it. Pixels outside of that part do not change.

    Args:
        text: what the part and its surroundings will show, in English or Chinese.
        picture: a picture file of any size.
        mask: a picture of the same size, white where the picture is to be redrawn; or strokes in any colour on a
            transparent layer; or the picture itself with that part erased.
        invert_mask: redraw what the mask does not mark.
        box: instead of a mask, the rectangle to redraw, in fractions of the picture's height and width (0 to 1).
        context: side of the square that the models see, divided by the longer side of the mask.
    """
    if (mask is None) == (box is None):
        raise MiniCogViewError("say which part to redraw: either --mask FILE or --box TOP LEFT BOTTOM RIGHT")
    if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise MiniCogViewError(f"--box is {box}: give TOP LEFT BOTTOM RIGHT from 0 to 1, top above bottom")
    if invert_mask and mask is None:
        raise MiniCogViewError("--invert-mask belongs to --mask FILE: give one, or leave it out")
    drawing.check()
    model = source.load()
    from minicogview.editing import box_mask
    from minicogview.masks import to_mask
    from minicogview.pictures import to_image

    image = to_image(picture)
    size = image.height, image.width
    chosen = to_mask(mask, size, image, invert_mask) if mask is not None else box_mask(size, box or (0, 0, 1, 1))
    pictures = model.edit(text, image, chosen, context=context, **drawing.arguments())
    return save_and_report(pictures, "edit", drawing)


def vary(
    text: Text,
    picture: File,
    /,
    share: float = 0.5,
    drawing: Drawing = DEFAULTS,
    source: Weights = SHIPPED,
) -> int:
    """Draw variations of a picture: each of them redraws a different random part.

    Args:
        text: what the picture shows, in English or Chinese.
        picture: a picture file; it is made square.
        share: share of the picture to redraw, above 0 and at most 1; the larger, the less alike.
    """
    drawing.check()
    model = source.load()
    from minicogview import variations

    pictures = variations.vary(model, text, picture, share, **drawing.arguments())
    return save_and_report(pictures, "vary", drawing)


def outpaint(
    text: Text,
    picture: File,
    /,
    margins: Margins,
    drawing: Drawing = DEFAULTS,
    source: Weights = SHIPPED,
) -> int:
    """Extend a picture beyond its edges. Its own pixels do not change.

    Args:
        text: what the whole picture will show, in English or Chinese.
        picture: a picture file of any size.
        margins: pixels to add at each edge.
    """
    drawing.check()
    model = source.load()
    from minicogview import variations

    pictures = variations.outpaint(model, text, picture, margins, **drawing.arguments())
    return save_and_report(pictures, "outpaint", drawing)


def save_and_report(pictures: Pictures, command: str, drawing: DrawingOptions) -> int:
    """Write the pictures as ``out/TEXT_COMMAND_SEED.png`` and print where they are; returns the exit status."""
    report = save_pictures(pictures, drawing.out, f"{free_stem(pictures.text, set())}_{command}", 1, drawing.overwrite)
    if drawing.json:
        print_json({"text": pictures.text, **report})
    else:
        for path, score in zip(report["files"], report["scores"], strict=True):
            print(f"{path}    score {score:.2f}")
    return 0
