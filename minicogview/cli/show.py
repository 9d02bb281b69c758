"""``minicogview show``: how a picture was made, from the text that ``generate`` writes into its PNG file.

The idea: a picture follows from its prompt, its seed, the settings and the weights, so the file says all of them: as
JSON in ``minicogview``, and in ``parameters`` in the form that other programs show. The command that makes the picture
again is put together from these values and never read from the file, which may come from a stranger.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json as json_module
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minicogview.cli.shared import RANDOM, DrawingOptions, WeightsOptions, at_home, one_line, print_json
from minicogview.errors import MiniCogViewError
from minicogview.numbers import checked

if TYPE_CHECKING:
    from minicogview.pipeline import CogView2

PictureFile = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
LARGE = 2 * 10**9  # bytes: single files of this size are not read again for their checksum
OPTIONS = ("keep", "temperature", "top_k", "guidance", "style", "stages", "scale")
PLACES = ("preset", "weights", "memory", "dtype", "device", "offload")


def show(picture: PictureFile, /, json: bool = False) -> int:
    """Print how a picture was made, and the command that makes it again.

    Args:
        picture: a PNG file that generate wrote.
        json: print everything as JSON.
    """
    record = read(at_home(picture))
    command = command_of(record)
    if json:
        print_json({**record, "command": command})
        return 0
    for key, value in record.items():
        text = value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False)
        print(f"{printable(key):16} {printable(text)}")
    print(f"{'command':16} {command}")
    return 0


# --- writing


def describe(
    model: CogView2, source: WeightsOptions, drawing: DrawingOptions, sampling: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """All that decides the pictures of a command besides their prompt and seed.

    Args:
        sampling: settings that differ from the model's. options: others of the command.
    """
    import torch

    from minicogview import __version__

    settings, upsampler = dataclasses.asdict(model.settings(sampling)), model.upsampler
    later: dict[str, Any] = {}
    if upsampler is not None:
        later = {
            "direct_sampling": dataclasses.asdict(upsampler.preset.direct_sampling),
            "iterative_temperature": upsampler.preset.iterative_temperature,
            "fine_choice": upsampler.preset.fine_choice,
        }
    places = {name: getattr(source, name) for name in PLACES}
    return {
        **options,
        "stages": drawing.stages or model.n_stages,
        "settings": settings | later,
        "weights": {name: value if value is True else str(value) for name, value in places.items() if value},
        "sha256": {} if source.weights == Path(RANDOM) else checksums(source.folder()),
        "plan": str(model.plan),
        "versions": {"minicogview": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def chunks(prompt: str | Sequence[str], record: dict[str, Any], **own: Any) -> dict[str, str]:
    """The texts of a PNG file, for a prompt (or those of a contact sheet) and what ``describe`` returned."""
    whole = {"prompt": prompt, **own, **record}
    words = [f"{key}: {value}" for key, value in (own | record["settings"]).items() if not isinstance(value, dict)]
    hashes = ", ".join(f"{name} hash: {value[:10]}" for name, value in record["sha256"].items())
    version = f"Version: minicogview {record['versions']['minicogview']}"
    lines = prompt if isinstance(prompt, str) else "; ".join(prompt)
    return {
        "parameters": f"{lines}\n{', '.join(words)}, {hashes}, {version}",
        "minicogview": json_module.dumps(whole, ensure_ascii=False),
    }


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each stage's weights, by name: of the file, or of the checksums in its index."""
    from minicogview.checkpoints.weight_files import FILES, identity

    found = {}
    for name, file in FILES.items():
        path = folder / file
        if known := identity(path):
            found[name] = known
        elif path.is_file() and path.stat().st_size < LARGE:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_file():
            found[name] = f"not read ({path.stat().st_size} bytes)"
    return found


# --- reading


def read(path: Path) -> dict[str, Any]:
    """The record in a PNG file; raises MiniCogViewError if there is none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()  # the texts may stand after the pixels
            record = json_module.loads(getattr(image, "text", {}).get("minicogview", "null"))
    except FileNotFoundError:
        raise MiniCogViewError(f"picture {path} does not exist: check the path") from None
    except (OSError, SyntaxError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise MiniCogViewError(f"picture {path} cannot be read ({one_line(error)}): give a PNG file") from None
    if not isinstance(record, dict) or not record.get("prompt") or not isinstance(record.get("settings"), dict):
        raise MiniCogViewError(f"picture {path} does not say how it was made: give a PNG file that generate wrote")
    return record


def command_of(record: dict[str, Any]) -> str:
    """The command that draws a picture again, or a whole contact sheet; raises MiniCogViewError for a wrong record."""
    prompt, weights = record["prompt"], record.get("weights")
    words = ["minicogview", "generate", *([prompt] if isinstance(prompt, str) else prompt)]
    for name in ("n", "seed"):
        words += [f"--{name}", str(checked(name, record.get(name)))]
    values = record["settings"] | {name: value for name, value in record.items() if name in OPTIONS}
    values |= {name: value for name, value in (weights if isinstance(weights, dict) else {}).items() if name in PLACES}
    for name in (*OPTIONS, *PLACES):
        if (value := values.get(name)) is True:
            words.append(f"--{name}")
        elif isinstance(value, (str, int, float)) and value is not False:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return " ".join(shlex.quote(printable(str(word))) for word in words)


def printable(text: str) -> str:
    """The text without control characters, which a stranger's file could send to the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)
