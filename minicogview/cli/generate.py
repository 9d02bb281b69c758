"""``minicogview generate``: texts in, PNG files and a contact sheet out.

The idea: all that can be known to be wrong is checked before anything is drawn, a bad text does not keep the
others from being drawn, and files appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minicogview.cli.shared import (
    SHIPPED,
    Folder,
    OptionalFloat,
    OptionalInt,
    Report,
    Weights,
    check_folder,
    complain,
    one_line,
    print_json,
)
from minicogview.errors import MiniCogViewError

if TYPE_CHECKING:
    from minicogview.pictures import Pictures
    from minicogview.pipeline import CogView2

Texts = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")
]
LARGE = 256  # pixels: smaller pictures are enlarged in the files


def generate(
    texts: Texts,
    /,
    source: Weights = SHIPPED,
    n: int = 4,
    keep: OptionalInt = None,
    seed: int = 0,
    out: Folder = Path("pictures"),
    scale: OptionalInt = None,
    temperature: OptionalFloat = None,
    top_k: OptionalInt = None,
    guidance: OptionalFloat = None,
    stages: OptionalInt = None,
    style: str = "none",
    json: bool = False,
) -> int:
    """Draw pictures of texts: one PNG file for each, and all of them on one contact sheet.

    Args:
        texts: what to draw, in English or Chinese.
        n: pictures of each text.
        keep: keep so many of them: those whose text is the likeliest caption, best first; all if not given.
        seed: picture i follows from seed + i alone.
        out: folder for the files, made if missing.
        scale: every pixel becomes a square of this side; 1: as drawn; if not given, small pictures get 256 pixels.
        temperature: above 1 wilder, below 1 safer, 0 without chance; the preset's if not given.
        top_k: how many clusters of tokens stay in play; the preset's if not given.
        guidance: classifier-free guidance, 1 is none; the preset's if not given.
        stages: 1 stops at the coarse picture, 2 after direct super-resolution, 3 after LoPAR; all if not given.
        style: a recipe of the original, for weights that know it: mainbody, photo, flat, comics, oil, sketch,
            isometric, chinese or watercolor.
        json: print a list of texts with files, scores and seeds, or the error.
    """
    if not texts:
        raise MiniCogViewError('no text was given: write for example minicogview generate "a red apple"')
    if scale is not None and scale < 1:
        raise MiniCogViewError(f"--scale is {scale}: use 1 (as drawn) or more")
    if n < 1:
        raise MiniCogViewError(f"--n is {n}: ask for 1 picture or more")
    if keep is not None and not 1 <= keep <= n:
        raise MiniCogViewError(f"--keep is {keep}: keep 1 to {n} (--n) of the pictures")
    if not 0 <= seed < 2**62:
        raise MiniCogViewError(f"--seed is {seed}: use a whole number from 0 to 2 ** 62")
    check_folder(out)
    options = {"temperature": temperature, "top_k": top_k, "guidance": guidance}
    sampling = {name: value for name, value in options.items() if value is not None}
    model = source.load()
    from minicogview.styles import get_style

    chosen = get_style(style)
    model = chosen.model(model)
    model.settings(sampling)  # wrong ones are reported once, not for every text
    if stages is not None and not 1 <= stages <= model.n_stages:
        raise MiniCogViewError(f"--stages is {stages}: these weights have 1 to {model.n_stages}")
    from minicogview.pictures import contact_sheet, save, scale_to

    reports: list[Report] = []
    rows, stems = [], set[str]()
    for text in texts:
        try:
            pictures = draw(model, chosen.text(text), n, keep, seed, stages, sampling, progress=not json)
        except MiniCogViewError as error:
            complain(f"{shorten(text)!r}: {error}" if len(texts) > 1 else str(error))
            reports.append({"text": text, "error": one_line(error)})
            continue
        scale = scale or scale_to(pictures[0].width, LARGE)
        stem = free_stem(text, stems)
        reports.append({"text": text, **write(pictures, out, stem, scale)})
        rows.append(pictures.images)
    if rows:
        sheet = out / "contact_sheet.png"
        save(contact_sheet(rows, scale or 1), sheet)
        reports = [{**report, "sheet": str(sheet)} if "files" in report else report for report in reports]
    if json:
        print_json(reports)
    else:
        print_pictures(reports)
    return 2 if len(rows) < len(texts) else 0


def draw(
    model: CogView2,
    text: str,
    n: int,
    keep: int | None,
    seed: int,
    stages: int | None,
    sampling: dict[str, float],
    progress: bool,
) -> Pictures:
    """Draw one text with a progress bar that names the stage at work, where there is a terminal to show it."""
    from tqdm import tqdm

    hidden = None if progress else True  # None: hidden unless stderr is a terminal
    with tqdm(leave=False, disable=hidden) as bar:

        at_work = ""

        def on_step(stage: str, done: int, total: int) -> None:
            nonlocal at_work
            if stage != at_work:
                at_work = stage
                bar.reset(total)
                bar.set_description(f"{shorten(text)}: {stage}")
            bar.update(done - bar.n)

        return model.generate(text, n, seed, on_step, keep, stages, **sampling)


def write(pictures: Pictures, out: Path, stem: str, scale: int) -> Report:
    """Write the pictures of one text as ``out/STEM_SEED.png``; what there is to say about them."""
    from minicogview.pictures import enlarge, save

    files = [out / f"{stem}_{seed}.png" for seed in pictures.seeds]
    for image, path in zip(pictures, files, strict=True):
        save(enlarge(image, scale), path)
    report: Report = {
        "files": [str(path) for path in files],
        "scores": [round(score, 4) for score in pictures.scores.tolist()],
        "seeds": pictures.seeds,
    }
    if pictures.caption_scores is not None:
        report["caption_scores"] = [round(score, 4) for score in pictures.caption_scores.tolist()]
    return report


def shorten(text: str, limit: int = 40) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else text[:limit] + " ..."


def free_stem(text: str, taken: set[str]) -> str:
    """A file name for a text, different from those taken, which it joins: "A red apple!" is "a-red-apple"."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    stem = unused = "-".join(words)[:40].strip("-") or "picture"
    number = 1
    while unused in taken:
        number += 1
        unused = f"{stem}-{number}"
    taken.add(unused)
    return unused


def print_pictures(reports: Sequence[Report]) -> None:
    """Where the pictures of each text are."""
    drawn = [report for report in reports if "files" in report]
    for report in drawn:
        print(report["text"])
        name = "caption_scores" if "caption_scores" in report else "scores"
        for path, score in zip(report["files"], report[name], strict=True):
            print(f"    {path}    {name.removesuffix('s').replace('_', ' ')} {score:.2f}")
    if drawn:
        print(f"all on one sheet, texts from top to bottom: {drawn[0]['sheet']}")
