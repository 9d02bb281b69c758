"""``minicogview import`` converts the released checkpoints; ``minicogview doctor`` examines a folder of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from minicogview.cli.shared import OptionalName, bytes_bar, check_folder, print_json, show
from minicogview.config import PRESETS, get_preset

SourceFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
TargetFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]


def import_weights(
    source: SourceFolder,
    target: TargetFolder,
    /,
    preset: str = "cogview2",
    dtype: Literal["released", "bfloat16", "float16", "float32"] = "released",
    ignore_unexpected: bool = False,
    json: bool = False,
) -> int:
    """Convert the released checkpoints to safetensors files. To resume an interrupted import, run it again.

    Args:
        source: has any of coglm, cogview2-dsr, cogview2-itersr, ice_image.pt, ice_text.model, cluster_label.npy.
        target: folder for the weights, made if missing.
        preset: the preset whose sizes are expected.
        dtype: dtype of the written weights; released leaves it as it is, bfloat16 is best for running on a CPU.
        ignore_unexpected: leave out parameters that the models do not have, and list them.
        json: print the result as JSON.
    """
    sizes = get_preset(preset)
    check_folder(target)
    from minicogview.checkpoints.importing import import_released
    from minicogview.checkpoints.reading import shown
    from minicogview.scale.machine import parse_dtype

    number = None if dtype == "released" else parse_dtype(dtype)
    with bytes_bar(hidden=json) as on_step:
        report = import_released(source, target, sizes, on_step, dtype=number, ignore_unexpected=ignore_unexpected)
    return show(
        {
            "weights": str(target),
            "parts": ", ".join(report["parts"]),
            "missing": ", ".join(report["missing"]) or "nothing",
            **({"ignored": shown(", ".join(report["ignored"]), 2000)} if report["ignored"] else {}),
            "gigabytes": report["bytes"] / 1e9,
        },
        json,
    )


def doctor(folder: SourceFolder, /, preset: OptionalName = None, verify: bool = False, json: bool = False) -> int:
    """Report what is in a folder of weights, what is missing or damaged, and how it would run on this machine.

    Args:
        folder: a folder with the released files, a folder that import wrote, or the name of a preset.
        preset: the preset whose sizes are expected; if not given, the one whose sizes the files have.
        verify: compare all files with their checksums, which takes a while.
        json: print the lines as JSON.
    """
    from minicogview.cli.doctor import doctor as examine

    name = str(folder)
    lines = examine(name if name in PRESETS else folder, None if preset is None else get_preset(preset), verify)
    if json:
        print_json(lines)
    else:
        print("\n".join(lines))
    return 2 if any("UNUSABLE" in line for line in lines) else 0
