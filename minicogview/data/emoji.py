"""The emoji pictures: 3,139 drawings with an English and a Chinese name, and the held-out split.

`emoji.json.xz` holds Microsoft's Fluent Emoji Flat as SVG text together with names and tags of Unicode CLDR;
`scripts/make_emoji.py` made it. `render` draws all of them once and keeps the pixels in a cache folder.
There are 1,594 characters without a skin tone, and 309 of them also exist in five tones. `heldout.json` fixes what
training never sees: some pairs of character and tone (a test of composition), and some whole characters
that the picture tokenizer is evaluated on.

Shapes: N pictures, S pixels a side.

Different on purpose: a picture is drawn large and then averaged over blocks of pixels, so the pictures of 32 and
96 pixels are box averages of the same 192-pixel drawing, and nothing depends on how a resampler rounds.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image

from minicogview.errors import MiniCogViewError

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SPLITS = ("all", "names", "train", "heldout", "tokenizer_heldout")
DRAWING_SIZE = 192  # pixels; every size is drawn at its smallest multiple that is not below this
RENDER_VERSION = 1  # part of the cache file's name: raise it when the way of drawing changes
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Emoji:
    """One picture's words. `character` is the English name without the tone, `tone` one of TONES or None."""

    key: str  # code points in hexadecimal, such as "1f468-1f3fd-200d-1f373"
    en: str
    zh: str
    tags_en: tuple[str, ...]
    tags_zh: tuple[str, ...]
    character: str
    tone: str | None


@lru_cache(maxsize=1)
def _packed() -> bytes:
    return (HERE / "emoji.json.xz").read_bytes()


@lru_cache(maxsize=1)
def _rows() -> tuple[tuple[Emoji, str], ...]:
    """Every picture's words and its SVG text, in the order of Unicode's emoji list."""
    rows = json.loads(lzma.decompress(_packed()))["emoji"]
    return tuple(
        (
            Emoji(
                key=row["key"],
                en=row["en"],
                zh=row["zh"],
                tags_en=tuple(row["tags_en"]),
                tags_zh=tuple(row["tags_zh"]),
                character=row["character"],
                tone=row["tone"],
            ),
            row["svg"],
        )
        for row in rows
    )


@lru_cache(maxsize=1)
def heldout() -> tuple[frozenset[tuple[str, str]], frozenset[str]]:
    """The (character, tone) pairs that CogLM never sees, and the characters that the tokenizer never sees."""
    content = json.loads((HERE / "heldout.json").read_text(encoding="utf-8"))
    pairs = frozenset((character, tone) for character, tone in content["combinations"])
    return pairs, frozenset(content["tokenizer_characters"])


def load_emoji(split: str = "all") -> list[Emoji]:
    """The emoji of one split, always in the same order.

    Args:
        split: "all"; "names" (without skin tones); "train" (all but the held-out pairs of character and
            tone); "heldout" (those pairs); "tokenizer_heldout" (characters that the VQ-VAE is never
            trained on, in any skin tone; CogLM does see them).

    Raises:
        MiniCogViewError: for another split.
    """
    if split not in SPLITS:
        raise MiniCogViewError(f"unknown split {split!r} of the emoji: choose one of {', '.join(SPLITS)}")
    everything = [emoji for emoji, _ in _rows()]
    pairs, characters = heldout()
    if split == "names":
        return [emoji for emoji in everything if emoji.tone is None]
    if split == "train":
        return [emoji for emoji in everything if (emoji.character, emoji.tone) not in pairs]
    if split == "heldout":
        return [emoji for emoji in everything if (emoji.character, emoji.tone) in pairs]
    if split == "tokenizer_heldout":
        return [emoji for emoji in everything if emoji.character in characters]
    return everything


def indices(emoji: Sequence[Emoji]) -> np.ndarray:
    """Rows of `render(size)` that show these emoji: (N,) int64."""
    row_of = {known.key: row for row, (known, _) in enumerate(_rows())}
    return np.array([row_of[one.key] for one in emoji], dtype=np.int64)


def cache_folder() -> Path:
    """Where rendered pictures are kept: MINICOGVIEW_CACHE, or this system's cache folder of the user."""
    chosen = os.environ.get("MINICOGVIEW_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minicogview"


def cache_file(size: int) -> Path:
    """The cache file of one size; its name changes with the packed drawings and with the way of drawing."""
    digest = hashlib.sha256(_packed()).hexdigest()[:12]
    return cache_folder() / f"emoji_{size}px_{digest}_v{RENDER_VERSION}.npy"


def draw(svg: str, size: int) -> np.ndarray:
    """Draw one SVG text on white: (S, S, 3) uint8, S = `size` pixels.

    Raises:
        MiniCogViewError: if resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise MiniCogViewError(
            f"drawing the emoji needs resvg-py, which is not installed, and there is no {cache_file(size)}: "
            "run `pip install resvg-py`, or copy that file from a machine that has it"
        ) from None
    factor = -(-DRAWING_SIZE // size)  # rounded up
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=size * factor,
        height=size * factor,
        background="#ffffff",
        skip_system_fonts=True,
    )
    with Image.open(io.BytesIO(png)) as picture:
        large = np.asarray(picture.convert("RGB"))  # (S * factor, S * factor, 3)
    mean = reduce(large.astype(np.float32), "(h a) (w b) c -> h w c", "mean", a=factor, b=factor)
    return np.asarray(np.floor(mean + 0.5), dtype=np.uint8)


def render(size: int, progress: bool = True) -> np.ndarray:
    """All pictures in the order of `load_emoji("all")`: (N, S, S, 3) uint8 on white, S = `size` pixels.

    The first call for a size draws them (about 15 seconds on one core, with a progress bar unless
    `progress` is False) and writes them to `cache_file(size)`; later calls read that file.

    Raises:
        MiniCogViewError: if `size` is below 1, or if both resvg-py and the cache file are missing.
    """
    if size < 1:
        raise MiniCogViewError(f"emoji cannot be drawn {size} pixels wide: size must be at least 1")
    path = cache_file(size)
    shape = (len(_rows()), size, size, 3)
    cached = _read(path, shape)
    if cached is not None:
        return cached
    from tqdm.auto import tqdm

    drawings = tqdm(_rows(), desc=f"drawing emoji at {size} px", unit="", disable=not progress)
    pictures = np.empty(shape, dtype=np.uint8)
    for row, (_, svg) in enumerate(drawings):
        pictures[row] = draw(svg, size)
    _write(path, pictures)
    return pictures


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pictures; None if the file is missing, damaged or of another shape."""
    try:
        pictures = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(pictures, np.ndarray) or pictures.shape != shape or pictures.dtype != np.uint8:
        return None
    return pictures


def _write(path: Path, pictures: np.ndarray) -> None:
    """Write a temporary file and rename it: no reader sees half a file, and two writers do not disturb each other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as part:
            try:
                np.save(part, pictures)
                part.close()
                os.replace(part.name, path)
            except BaseException:
                part.close()
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        warnings.warn(
            f"the drawn emoji could not be kept in {path.parent} ({error.strerror}): they will be drawn "
            "again next time; set MINICOGVIEW_CACHE to a folder that can be written",
            stacklevel=3,
        )
