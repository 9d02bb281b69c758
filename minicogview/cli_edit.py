"""``minicogview edit``: a text, a picture and what to draw anew in it, in; PNG files out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

Text = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
OptionalFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
OptionalBox = Annotated[
    tuple[float, float, float, float] | None, tyro.conf.arg(metavar="TOP LEFT BOTTOM RIGHT", help_behavior_hint="")
]


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
    report = write(pictures, out, f"{free_stem(text, set())}_edit", scale=1)
    if json:
        print_json({"text": text, **report})
    else:
        for path, score in zip(report["files"], report["scores"], strict=True):
            print(f"{path}    score {score:.2f}")
    return 0
