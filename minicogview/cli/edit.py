"""``minicogview edit``, ``vary`` and ``outpaint``: a text and a picture in, other pictures out as PNG files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minicogview.cli.generate import free_stem, write
from minicogview.cli.shared import (
    SHIPPED,
    Folder,
    OptionalFloat,
    OptionalInt,
    Weights,
    check_folder,
    print_json,
)
from minicogview.errors import MiniCogViewError

if TYPE_CHECKING:
    from minicogview.pictures import Pictures

Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OptionalBox = Annotated[
    tuple[float, float, float, float] | None, tyro.conf.arg(metavar="TOP LEFT BOTTOM RIGHT", help_behavior_hint="")
]

Margins = Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="TOP LEFT BOTTOM RIGHT")]


@dataclass(frozen=True)
class Drawing:
    """How to draw, and where to; the same for all three commands."""

    n: int = 4
    """how many pictures to draw"""
    seed: int = 0
    """picture i follows from seed + i alone"""
    out: Folder = Path("pictures")
    """folder for the files, made if missing"""
    temperature: OptionalFloat = None
    """above 1 wilder, below 1 safer, 0 without chance; the preset's if not given"""
    stages: OptionalInt = None
    """1 stops at the coarse picture, 2 after direct super-resolution, 3 after LoPAR; all if not given"""
    json: bool = False
    """print files, scores and seeds as JSON"""

    def arguments(self) -> dict[str, Any]:
        """As ``CogView2.edit`` takes them."""
        sampling = {} if self.temperature is None else {"temperature": self.temperature}
        return {"n": self.n, "seed": self.seed, "stages": self.stages, **sampling}


Options = Annotated[Drawing, tyro.conf.arg(name="")]  # options without a prefix, as for Weights
DEFAULTS = Drawing()


def edit(
    text: Text,
    picture: File,
    /,
    source: Weights = SHIPPED,
    mask: OptionalFile = None,
    box: OptionalBox = None,
    context: float = 20 / 14,
    drawing: Options = DEFAULTS,
) -> int:
    """Draw a part of a picture anew, as a text says. Pixels outside of that part stay as they are.

    Args:
        text: what the part and its surroundings show when it is done, in English or Chinese.
        picture: a picture file of any size.
        mask: a picture of the same size; what is white in it is drawn anew.
        box: in place of a mask: a rectangle, in fractions of the picture's height and width, from 0 to 1.
        context: side of the square that the models see / longer side of the mask.
    """
    if (mask is None) == (box is None):
        raise MiniCogViewError("say what to draw anew: either --mask FILE or --box TOP LEFT BOTTOM RIGHT")
    if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise MiniCogViewError(f"--box is {box}: give TOP LEFT BOTTOM RIGHT from 0 to 1, top above bottom")
    check_folder(drawing.out)
    model = source.load()
    from minicogview.editing import box_mask
    from minicogview.pictures import open_picture, to_image

    image = to_image(picture)
    chosen = box_mask((image.height, image.width), box) if box is not None else open_picture(mask or "")
    pictures = model.edit(text, image, chosen, context=context, **drawing.arguments())
    return report_files(pictures, "edit", drawing)


def vary(
    text: Text,
    picture: File,
    /,
    source: Weights = SHIPPED,
    share: float = 0.5,
    drawing: Options = DEFAULTS,
) -> int:
    """Draw pictures much like a given one: a random part of it is drawn anew, each time another.

    Args:
        text: what the picture shows, in English or Chinese.
        picture: a picture file, made square.
        share: of the picture that is drawn anew, above 0 and at most 1; the more, the less alike.
    """
    check_folder(drawing.out)
    model = source.load()
    from minicogview import variations

    pictures = variations.vary(model, text, picture, share, **drawing.arguments())
    return report_files(pictures, "vary", drawing)


def outpaint(
    text: Text,
    picture: File,
    /,
    margins: Margins,
    source: Weights = SHIPPED,
    drawing: Options = DEFAULTS,
) -> int:
    """Let a picture go on beyond its edges. Its own pixels stay as they are.

    Args:
        text: what the whole picture shows when it is done, in English or Chinese.
        picture: a picture file of any size.
        margins: pixels to add at each edge.
    """
    check_folder(drawing.out)
    model = source.load()
    from minicogview import variations

    pictures = variations.outpaint(model, text, picture, margins, **drawing.arguments())
    return report_files(pictures, "outpaint", drawing)


def report_files(pictures: Pictures, what: str, drawing: Drawing) -> int:
    """Write the pictures as ``out/TEXT_WHAT_SEED.png`` and say where they are."""
    report = write(pictures, drawing.out, f"{free_stem(pictures.text, set())}_{what}", scale=1)
    if drawing.json:
        print_json({"text": pictures.text, **report})
    else:
        for path, score in zip(report["files"], report["scores"], strict=True):
            print(f"{path}    score {score:.2f}")
    return 0
