"""``minicogview edit``, ``vary`` and ``outpaint``: a text and a picture in, other pictures out as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minicogview.cli_generate import free_stem, write
from minicogview.cli_shared import (
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


def edit(
    text: Text,
    picture: File,
    /,
    source: Weights = SHIPPED,
    mask: OptionalFile = None,
    box: OptionalBox = None,
    n: int = 4,
    seed: int = 0,
    out: Folder = Path("pictures"),
    temperature: OptionalFloat = None,
    stages: OptionalInt = None,
    json: bool = False,
) -> int:
    """Draw a part of a picture anew, as a text says. Pixels outside of that part stay as they are.

    Args:
        text: what the part and its surroundings show when it is done, in English or Chinese.
        picture: a picture file of any size.
        mask: a picture of the same size; what is white in it is drawn anew.
        box: in place of a mask: a rectangle, in fractions of the picture's height and width, from 0 to 1.
        n: how many pictures to draw.
        seed: picture i follows from seed + i alone.
        out: folder for the files, made if missing.
        temperature: above 1 wilder, below 1 safer, 0 without chance; the preset's if not given.
        stages: 1 stops at the coarse picture, 2 after direct super-resolution, 3 after LoPAR; all if not given.
        json: print files, scores and seeds as JSON.
    """
    if (mask is None) == (box is None):
        raise MiniCogViewError("say what to draw anew: either --mask FILE or --box TOP LEFT BOTTOM RIGHT")
    if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise MiniCogViewError(f"--box is {box}: give TOP LEFT BOTTOM RIGHT from 0 to 1, top above bottom")
    check_folder(out)
    model = source.load()
    from minicogview.editing import box_mask
    from minicogview.tokenizer import open_picture, upright

    image = upright(open_picture(picture))
    chosen = box_mask((image.height, image.width), box) if box is not None else open_picture(mask or "")
    sampling = {} if temperature is None else {"temperature": temperature}
    pictures = model.edit(text, image, chosen, n, seed, stages, **sampling)
    return report_files(pictures, out, "edit", json)


def vary(
    text: Text,
    picture: File,
    /,
    source: Weights = SHIPPED,
    share: float = 0.5,
    n: int = 4,
    seed: int = 0,
    out: Folder = Path("pictures"),
    temperature: OptionalFloat = None,
    stages: OptionalInt = None,
    json: bool = False,
) -> int:
    """Draw pictures much like a given one: a random part of it is drawn anew, each time another.

    Args:
        text: what the picture shows, in English or Chinese.
        picture: a picture file, made square.
        share: of the picture that is drawn anew, above 0 and at most 1; the more, the less alike.
        n: how many pictures to draw.
        seed: picture i follows from seed + i alone.
        out: folder for the files, made if missing.
        temperature: above 1 wilder, below 1 safer, 0 without chance; the preset's if not given.
        stages: 1 stops at the coarse picture, 2 after direct super-resolution, 3 after LoPAR; all if not given.
        json: print files, scores and seeds as JSON.
    """
    check_folder(out)
    model = source.load()
    from minicogview import variations

    sampling = {} if temperature is None else {"temperature": temperature}
    pictures = variations.vary(model, text, picture, share, n, seed, stages, **sampling)
    return report_files(pictures, out, "vary", json)


def outpaint(
    text: Text,
    picture: File,
    /,
    margins: Margins,
    source: Weights = SHIPPED,
    n: int = 4,
    seed: int = 0,
    out: Folder = Path("pictures"),
    temperature: OptionalFloat = None,
    stages: OptionalInt = None,
    json: bool = False,
) -> int:
    """Let a picture go on beyond its edges. Its own pixels stay as they are.

    Args:
        text: what the whole picture shows when it is done, in English or Chinese.
        picture: a picture file of any size.
        margins: pixels to add at each edge.
        n: how many pictures to draw.
        seed: picture i follows from seed + i alone.
        out: folder for the files, made if missing.
        temperature: above 1 wilder, below 1 safer, 0 without chance; the preset's if not given.
        stages: 1 stops at the coarse picture, 2 after direct super-resolution, 3 after LoPAR; all if not given.
        json: print files, scores and seeds as JSON.
    """
    check_folder(out)
    model = source.load()
    from minicogview import variations

    sampling = {} if temperature is None else {"temperature": temperature}
    pictures = variations.outpaint(model, text, picture, margins, n, seed, stages, **sampling)
    return report_files(pictures, out, "outpaint", json)


def report_files(pictures: Pictures, out: Path, what: str, json: bool) -> int:
    """Write the pictures as ``out/TEXT_WHAT_SEED.png`` and say where they are."""
    report = write(pictures, out, f"{free_stem(pictures.text, set())}_{what}", scale=1)
    if json:
        print_json({"text": pictures.text, **report})
    else:
        for path, score in zip(report["files"], report["scores"], strict=True):
            print(f"{path}    score {score:.2f}")
    return 0
