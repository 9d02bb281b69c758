"""``minicogview generate``: texts in, PNG files and a contact sheet out.

The idea: everything that can be known to be wrong is checked before anything is drawn, an error in one text does not
stop the others, each picture is written as soon as it is finished, whole or not at all, and no file of an earlier run
is replaced unless that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from minicogview.cli.show import chunks, describe
from minicogview.errors import MiniCogViewError
from minicogview.numbers import check_all, integer

if TYPE_CHECKING:
    from PIL.Image import Image

    from minicogview.pipeline import CogView2
    from minicogview.results import Pictures

Texts = Annotated[
    tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT [TEXT ...]", help_behavior_hint="")
]
LARGE = 256  # pixels: smaller pictures are enlarged in the files
WIDEST = 10_000  # pixels along each side of a file
SHEET = 50_000_000  # pixels of a contact sheet, if the pictures are not larger by themselves


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
    check_all("--", top_k=top_k, guidance=guidance)
    options = {"top_k": top_k, "guidance": guidance}
    sampling = drawing.sampling() | {name: value for name, value in options.items() if value is not None}
    model = source.load()
    from minicogview.styles import get_style

    chosen = get_style(style)
    model = chosen.model(model)
    model.settings(sampling)  # wrong ones are reported once, not for every text
    if drawing.stages is not None:
        integer(drawing.stages, "--stages", 1, model.n_stages, "these weights have no more")
    from minicogview.results import contact_sheet, enlarge, save, scale_to

    coarse = drawing.stages == 1 or not model.upsampler
    width = model.size if coarse else model.require_upsampler().grid * model.size // model.grid
    scale = scale or scale_to(width, LARGE)
    integer(scale, "--scale", 1, max(1, WIDEST // width), f"pictures of at most {WIDEST} pixels")

    asked = {"style": style, "scale": scale}
    record = describe(model, source, drawing, sampling, **asked)
    reports: list[Report] = []
    rows, stems = [], set[str]()
    old = None if drawing.overwrite else drawing.out  # the folder whose files must stay
    for text in texts:
        try:
            model.encode(chosen.text(text))
        except MiniCogViewError as error:
            complain(f"{shorten(text)!r}: {error}" if len(texts) > 1 else str(error))
            reports.append({"text": text, "error": one_line(error)})
            continue
        stem = free_stem(text, stems, old)

        def finished(seed: int, image: Image, text: str = text, stem: str = stem) -> None:
            save(enlarge(image, scale), drawing.out / f"{stem}_{seed}.png", chunks(text, record, n=1, seed=seed))

        pictures = draw(model, chosen.text(text), keep, drawing, sampling, finished)
        reports.append({"text": text, **report_of(pictures, drawing.out, stem)})
        rows.append(pictures.images)
    if rows:
        sheet = drawing.out / f"{unused('contact_sheet', set(), old, '')}.png"
        drawn = [report["text"] for report in reports if "files" in report]
        about = chunks(drawn, record | {"keep": keep}, n=drawing.n, seed=drawing.seed)
        save(contact_sheet(rows, min(scale, sheet_scale(rows))), sheet, about)
        reports = [{**report, "sheet": str(sheet), **record} if "files" in report else report for report in reports]
    print_json(reports) if drawing.json else print_reports(reports)
    return 2 if len(rows) < len(texts) else 0


def check(texts: Sequence[str], keep: int | None, scale: int | None, drawing: DrawingOptions) -> None:
    """Raise MiniCogViewError for what can be known to be wrong before weights are loaded."""
    if not texts:
        raise MiniCogViewError('no text was given: write for example minicogview generate "a red apple"')
    check_all("--", scale=scale)
    drawing.check()
    if keep is not None:
        integer(keep, "--keep", 1, drawing.n, "--n of the pictures at most")


def draw(
    model: CogView2,
    text: str,
    keep: int | None,
    drawing: DrawingOptions,
    sampling: dict[str, float],
    on_picture: Callable[[int, Image], None],
) -> Pictures:
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

        return model.generate(text, drawing.n, drawing.seed, on_step, keep, drawing.stages, on_picture, **sampling)


def sheet_scale(rows: Sequence[Sequence[Image]]) -> int:
    """The largest scale at which a contact sheet stays below ``SHEET`` pixels, or 1."""
    pixels = sum(-(-len(row) // 8) * 8 * row[0].width * row[0].height for row in rows)
    return max(1, math.isqrt(SHEET // pixels))


def save_pictures(pictures: Pictures, out: Path, stem: str, scale: int, overwrite: bool = False) -> Report:
    """Write the pictures of one text as ``out/STEM_SEED.png``, without replacing files unless ``overwrite``.

    Returns:
        their files, scores and seeds.
    """
    from minicogview.results import enlarge, save

    stem = unused(stem, set(), None if overwrite else out)
    for image, seed in zip(pictures, pictures.seeds, strict=True):
        save(enlarge(image, scale), out / f"{stem}_{seed}.png")
    return report_of(pictures, out, stem)


def report_of(pictures: Pictures, out: Path, stem: str) -> Report:
    """Files, scores and seeds of the pictures of one text."""
    report: Report = {
        "files": [str(out / f"{stem}_{seed}.png") for seed in pictures.seeds],
        "scores": [round(score, 4) for score in pictures.scores.tolist()],
        "seeds": pictures.seeds,
    }
    if pictures.caption_scores is not None:
        report["caption_scores"] = [round(score, 4) for score in pictures.caption_scores.tolist()]
    return report


def shorten(text: str, limit: int = 40) -> str:
    """The beginning of a long text."""
    return text if len(text) <= limit else text[:limit] + " ..."


def free_stem(text: str, taken: set[str], folder: Path | None = None) -> str:
    """A file name for a text: "A red apple!" becomes "a-red-apple", or what ``unused`` makes of it."""
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return unused("-".join(words)[:40].strip("-") or "picture", taken, folder)


def unused(stem: str, taken: set[str], folder: Path | None, ending: str = "_*") -> str:
    """``stem``, with a number if it is in ``taken`` (to which it is added) or the folder has such files."""
    name, number = stem, 1
    while name in taken or (folder is not None and any(folder.glob(f"{name}{ending}.png"))):
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name


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
