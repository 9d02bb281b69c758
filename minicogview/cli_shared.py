"""What the subcommands share: which weights to use, checking a folder before work, printing.

Results go to stdout, progress and complaints to stderr.
"""

from __future__ import annotations

import json as json_module
import math
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minicogview.config import get_preset
from minicogview.errors import MiniCogViewError

if TYPE_CHECKING:
    from minicogview.pipeline import CogView2

# Left alone, tyro would show "{None}|INT" and "(default: None)"; the help texts say what a missing option means.
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
OptionalFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Language = Literal["en", "zh"]
Report = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Which weights to use."""

    preset: OptionalName = None
    """toy if not given; with --weights, the preset that has the sizes in these files"""
    weights: OptionalFolder = None
    """folder with your own vqvae.safetensors, coglm.safetensors and text.model"""
    offload: bool = False
    """have one stage's weights at a time in memory, for large models on small machines"""

    def load(self) -> CogView2:
        """The whole system."""
        folder = self.folder()
        from minicogview.pipeline import CogView2

        preset = self.preset if self.weights else self.preset or "toy"
        return CogView2.from_pretrained(folder, preset, offload=self.offload)

    def folder(self) -> Path:
        """Where the weights are."""
        if self.preset is not None:
            get_preset(self.preset)  # a wrong name is reported before torch is loaded
        from minicogview.loading import find_folder

        return find_folder(self.weights or self.preset or "toy")


Weights = Annotated[Source, tyro.conf.arg(name="")]  # options without a prefix: --preset, --weights
SHIPPED = Source()


def check_folder(folder: Path) -> None:
    """Raise MiniCogViewError unless files can be written into ``folder``; leaves no trace of the trial."""
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise MiniCogViewError(f"cannot write into {folder} ({reason}): choose another folder with --out") from None
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def one_line(error: Exception | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def complain(message: str) -> None:
    """One line on stderr."""
    print(f"minicogview: {one_line(message)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """JSON on stdout, readable in both languages."""
    print(json_module.dumps(value, ensure_ascii=False, indent=2))


def show(result: Report, json: bool) -> int:
    """A flat result, as JSON (numbers that do not exist become null) or one line for each entry."""
    if json:
        print_json({key: None if isinstance(v, float) and math.isnan(v) else v for key, v in result.items()})
    else:
        for key, value in result.items():
            print(f"{key:16} {value:.4f}" if isinstance(value, float) else f"{key:16} {value}")
    return 0
