"""What the subcommands share: options, checks before any work is done, and printing.

Results go to stdout, progress and errors to stderr.
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
from minicogview.numbers import check_all, integer

if TYPE_CHECKING:
    from minicogview.pipeline import CogView2

# By itself tyro would show "{None}|INT" and "(default: None)"; the help texts say what a missing option means.
Folder = Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
OptionalFolder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Language = Literal["en", "zh"]
Report = dict[str, Any]
RANDOM = "random"  # may be given in place of a folder of weights


def at_home(path: Path) -> Path:
    """The path with "~" replaced by the home folder, where there is one."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


@dataclass(frozen=True)
class WeightsOptions:
    """Which weights to use, and how to run them.

    Attributes:
        preset: toy if not given; with --weights, the preset whose sizes the files have.
        weights: folder with your own vqvae.safetensors, coglm.safetensors and text.model; or the word random: untrained
            weights of the preset's sizes, written to your cache folder once, to measure time and memory.
        memory: memory budget, such as 6GB, or auto for what is free. It decides whether a stage keeps its weights in
            memory, quantizes them to 8 or 4 bits, or streams them from the disk.
        dtype: float32, bfloat16 or float16; auto: float32 for small models, else bfloat16.
        device: where the models run, such as cpu or cuda.
        offload: leave the weights unquantized, and keep only those of the stage at work in memory.
    """

    preset: OptionalName = None
    weights: OptionalFolder = None
    memory: str = "auto"
    dtype: str = "auto"
    device: str = "cpu"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None:
            object.__setattr__(self, "weights", at_home(self.weights))

    def load(self) -> CogView2:
        """The whole system. Prints on stderr how it will run, unless it is small and no memory budget was given."""
        folder = self.folder()
        from minicogview.checkpoints.models import plan_for
        from minicogview.pipeline import CogView2
        from minicogview.scale.plan import SMALL

        preset = self.preset if self.weights else self.preset or "toy"
        plan = plan_for(folder, self.memory, self.dtype, self.device, self.offload)
        if self.memory != "auto" or plan.needed >= SMALL:
            print(f"plan: {plan}", file=sys.stderr)
        return CogView2.from_pretrained(folder, preset, memory=plan)

    def folder(self) -> Path:
        """Where the weights are. Random ones are written first if they do not exist yet."""
        if self.preset is not None:
            get_preset(self.preset)  # a wrong name is reported before torch is loaded
        if self.weights == Path(RANDOM):
            return random_weights(self.preset or "toy")
        from minicogview.checkpoints.models import find_folder

        return find_folder(self.weights or self.preset or "toy")


def random_weights(name: str) -> Path:
    """The folder of a preset's random weights, which are written first if they do not exist yet."""
    from minicogview.checkpoints.random_weights import random_folder, write_random

    folder = random_folder(get_preset(name))
    print(f"random weights of {name}: {folder}; delete it when you are done", file=sys.stderr)
    with bytes_bar() as on_step:
        return write_random(folder, get_preset(name), on_step=on_step)


@contextmanager
def bytes_bar(hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal for writing files; call what it yields with (file, bytes done, bytes in all)."""
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, leave=False, disable=hidden or None) as bar:

        def on_step(file: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(file, refresh=False)
            bar.update(done - bar.n)

        yield on_step


@dataclass(frozen=True)
class DrawingOptions:
    """The options that are shared by all commands that draw pictures.

    Attributes:
        n: number of pictures to draw for a text.
        seed: picture i depends only on seed + i.
        out: folder for the files, made if missing.
        overwrite: replace files of earlier runs; otherwise new names are chosen beside them.
        temperature: above 1: more varied; below 1: safer; 0: always the likeliest token; the preset's if not given.
        stages: 1 stops after CogLM (the coarse picture), 2 after the direct stage, 3 after the iterative stage; all if
            not given.
        json: print files, scores and seeds as JSON.
    """

    n: int = 4
    seed: int = 0
    out: Folder = Path("pictures")
    overwrite: bool = False
    temperature: OptionalFloat = None
    stages: OptionalInt = None
    json: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", at_home(self.out))

    def check(self) -> None:
        """Raise MiniCogViewError for values that are wrong with any weights, before these are loaded."""
        check_all("--", n=self.n, seed=self.seed, temperature=self.temperature)
        if self.stages is not None:
            integer(self.stages, "--stages", 1, 3)
        check_folder(self.out)

    def sampling(self) -> dict[str, float]:
        """The settings of the sampler that were given."""
        return {} if self.temperature is None else {"temperature": self.temperature}

    def arguments(self) -> dict[str, Any]:
        """Arguments that ``CogView2.edit``, ``vary`` and ``outpaint`` all take."""
        return {"n": self.n, "seed": self.seed, "stages": self.stages, **self.sampling()}


# Without a name, options have no prefix: --preset instead of --source.preset.
Weights = Annotated[WeightsOptions, tyro.conf.arg(name="")]
Drawing = Annotated[DrawingOptions, tyro.conf.arg(name="")]
SHIPPED, DEFAULTS = WeightsOptions(), DrawingOptions()


def check_folder(folder: Path) -> None:
    """Raise MiniCogViewError unless files can be written into ``folder``; leaves nothing behind."""
    made: list[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        raise MiniCogViewError(f"cannot write into {folder} ({reason}): choose another folder with --out") from None
    finally:
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()


def one_line(error: Exception | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def complain(message: str) -> None:
    """Print an error on stderr, as one line."""
    print(f"minicogview: {one_line(message)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print JSON on stdout, Chinese characters as they are."""
    print(json_module.dumps(value, ensure_ascii=False, indent=2))


def show(result: Report, json: bool) -> int:
    """Print a flat result, as JSON (NaN becomes null) or with one line for each entry; returns the exit status."""
    if json:
        print_json({key: None if isinstance(v, float) and math.isnan(v) else v for key, v in result.items()})
    else:
        for key, value in result.items():
            print(f"{key:16} {value:.4f}" if isinstance(value, float) else f"{key:16} {value}")
    return 0
