"""``minicogview import``: the released checkpoints as weights that this package loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from minicogview.cli_shared import check_folder, show
from minicogview.config import get_preset

SourceFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
TargetFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]


def import_weights(source: SourceFolder, target: TargetFolder, /, preset: str = "cogview2", json: bool = False) -> int:
    """Turn the released checkpoint folders into safetensors files. What was stopped goes on when it is called again.

    Args:
        source: holds any of coglm, cogview2-dsr, cogview2-itersr, ice_image.pt, ice_text.model, cluster_label.npy.
        target: folder for the weights, made if missing.
        preset: sizes that are expected.
        json: print the result as JSON.
    """
    sizes = get_preset(preset)
    check_folder(target)
    from tqdm import tqdm

    from minicogview.importing import import_released

    with tqdm(unit="B", unit_scale=True, leave=False, disable=True if json else None) as bar:

        def on_step(file: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(file, refresh=False)
            bar.update(done - bar.n)

        report = import_released(source, target, sizes, on_step)
    return show(
        {
            "weights": str(target),
            "parts": ", ".join(report["parts"]),
            "missing": ", ".join(report["missing"]) or "nothing",
            "gigabytes": report["bytes"] / 1e9,
        },
        json,
    )
