"""``minicogview generate``: texts in, PNG files and a contact sheet out.

The idea: everything that can be known to be wrong is checked before anything is drawn, an error in one text does not
stop the others, and files appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minicogview.cli.shared import (
    DEFAULTS,
    SHIPPED,
    Drawing,
    DrawingOptions,
    OptionalFloat,
    OptionalInt,
    Report,
    Weights,
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
    keep: OptionalInt = None,
    scale: OptionalInt = None,
    top_k: OptionalInt = None,
    guidance: OptionalFloat = None,
    style: str = "none",
    drawing: Drawing = DEFAULTS,
    source: Weights = SHIPPED,
) -> int:
    """Draw pictures of texts: one PNG file for each picture, and all of them on one contact sheet.

    Args:
        texts: what to draw, in English or Chinese.
        keep: keep only this many: those whose text is the likeliest caption, best first; all --n if not given.
        scale: side of the square that each pixel becomes; 1 for none; if not given, small pictures get 256 pixels.
        top_k: number of clusters of tokens to choose from; the preset's if not given.
        guidance: scale of classifier-free guidance, 1 for none; the preset's if not given.
        style: for the released weights: mainbody, photo, flat, comics, oil, sketch, isometric, chinese or watercolor.
    """
    check(texts, keep, scale, drawing)
    options = {"top_k": top_k, "guidance": guidance}
    sampling = drawing.sampling() | {name: value for name, value in options.items() if value is not None}
    model = source.load()
    from minicogview.styles import get_style

    chosen = get_style(style)
    model = chosen.model(model)
    model.settings(sampling)  # wrong ones are reported once, not for every text
    if drawing.stages is not None and not 1 <= drawing.stages <= model.n_stages:
        raise MiniCogViewError(f"--stages is {drawing.stages}: these weights have 1 to {model.n_stages}")
    from minicogview.pictures import contact_sheet, save, scale_to

    reports: list[Report] = []
    rows, stems = [], set[str]()
    for text in texts:
        try:
            pictures = draw(model, chosen.text(text), keep, drawing, sampling)
        except MiniCogViewError as error:
            complain(f"{shorten(text)!r}: {error}" if len(texts) > 1 else str(error))
            reports.append({"text": text, "error": one_line(error)})
            continue
        scale = scale or scale_to(pictures[0].width, LARGE)
        reports.append({"text": text, **save_pictures(pictures, drawing.out, free_stem(text, stems), scale)})
        rows.append(pictures.images)
    if rows:
        sheet = drawing.out / "contact_sheet.png"
        save(contact_sheet(rows, scale or 1), sheet)
        reports = [{**report, "sheet": str(sheet)} if "files" in report else report for report in reports]
    print_json(reports) if drawing.json else print_reports(reports)
    return 2 if len(rows) < len(texts) else 0


def check(texts: Sequence[str], keep: int | None, scale: int | None, drawing: DrawingOptions) -> None:
    """Raise MiniCogViewError for what can be known to be wrong before weights are loaded."""
    if not texts:
        raise MiniCogViewError('no text was given: write for example minicogview generate "a red apple"')
    if scale is not None and scale < 1:
        raise MiniCogViewError(f"--scale is {scale}: use 1 (as drawn) or more")
    drawing.check()
    if keep is not None and not 1 <= keep <= drawing.n:
        raise MiniCogViewError(f"--keep is {keep}: keep 1 to {drawing.n} (--n) of the pictures")


def draw(model: CogView2, text: str, keep: int | None, drawing: DrawingOptions, sampling: dict[str, float]) -> Pictures:
    """Draw one text, with a progress bar on a terminal that names the stage at work."""
    from tqdm import tqdm

    hidden = True if drawing.json else None  # None: hidden unless stderr is a terminal
    with tqdm(leave=False, disable=hidden) as bar:
        at_work = ""

        def on_step(stage: str, done: int, total: int) -> None:
            nonlocal at_work
            if stage != at_work:
                at_work = stage
                bar.reset(total)
                bar.set_description(f"{shorten(text)}: {stage}")
            bar.update(done - bar.n)

        return model.generate(text, drawing.n, drawing.seed, on_step, keep, drawing.stages, None, **sampling)


def save_pictures(pictures: Pictures, out: Path, stem: str, scale: int) -> Report:
    """Write the pictures of one text as ``out/STEM_SEED.png``; returns their files, scores and seeds."""
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
    """A file name for a text: "A red apple!" becomes "a-red-apple". It differs from those in ``taken`` and is added."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    stem = unused = "-".join(words)[:40].strip("-") or "picture"
    number = 1
    while unused in taken:
        number += 1
        unused = f"{stem}-{number}"
    taken.add(unused)
    return unused


def print_reports(reports: Sequence[Report]) -> None:
    """Print where the pictures of each text are, and how well they score."""
    drawn = [report for report in reports if "files" in report]
    for report in drawn:
        print(report["text"])
        name = "caption_scores" if "caption_scores" in report else "scores"
        for path, score in zip(report["files"], report[name], strict=True):
            print(f"    {path}    {name.removesuffix('s').replace('_', ' ')} {score:.2f}")
    if drawn:
        print(f"all on one sheet, texts from top to bottom: {drawn[0]['sheet']}")
