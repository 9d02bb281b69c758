"""What the subcommands share: which weights to use, checking a folder before work, printing.

Results go to stdout, progress and complaints to stderr.
"""

from __future__ import annotations

import json as json_module
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
RANDOM = "random"  # instead of a folder of weights


@dataclass(frozen=True)
class Source:
    """Which weights to use."""

    preset: OptionalName = None
    """toy if not given; with --weights, the preset that has the sizes in these files"""
    weights: OptionalFolder = None
    """folder with your own vqvae.safetensors, coglm.safetensors and text.model; or the word random: untrained weights
    of the preset's sizes, written to your cache folder once, to see time and memory"""
    memory: str = "auto"
    """such as 6GB; chooses how a stage has its weights: in memory, in 8 or 4 bits, on the disk; auto: what is free"""
    dtype: str = "auto"
    """float32, bfloat16 or float16; auto: float32 for small models, else bfloat16"""
    device: str = "cpu"
    """where the models run, such as cuda"""
    offload: bool = False
    """have the weights as they are, and one stage's at a time in memory"""

    def load(self) -> CogView2:
        """The whole system; says on stderr how it has its weights, unless it is simply in memory."""
        folder = self.folder()
        from minicogview.checkpoints.loading import plan_for
        from minicogview.pipeline import CogView2
        from minicogview.scale.plan import SMALL

        preset = self.preset if self.weights else self.preset or "toy"
        plan = plan_for(folder, self.memory, self.dtype, self.device, self.offload)
        if self.memory != "auto" or plan.needed >= SMALL:
            print(f"plan: {plan}", file=sys.stderr)
        return CogView2.from_pretrained(folder, preset, memory=plan)

    def folder(self) -> Path:
        """Where the weights are; random ones are made here."""
        if self.preset is not None:
            get_preset(self.preset)  # a wrong name is reported before torch is loaded
        if self.weights == Path(RANDOM):
            return random_weights(self.preset or "toy")
        from minicogview.checkpoints.loading import find_folder

        return find_folder(self.weights or self.preset or "toy")


def random_weights(name: str) -> Path:
    """The folder of a preset's random weights, which are written if they are not there yet."""
    from minicogview.checkpoints.random_weights import random_folder, write_random

    folder = random_folder(get_preset(name))
    print(f"random weights of {name}: {folder}; delete it when you are done", file=sys.stderr)
    with bytes_bar() as on_step:
        return write_random(folder, get_preset(name), on_step=on_step)


@contextmanager
def bytes_bar(hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal for files that are written; it is moved by (file, bytes done, of how many)."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, disable=hidden or None) as bar:

        def on_step(file: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(file, refresh=False)
            bar.update(done - bar.n)

        yield on_step


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
