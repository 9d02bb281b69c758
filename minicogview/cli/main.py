"""The command ``minicogview``: draw, train, evaluate, import and examine weights, and count what a preset costs.

The idea: every subcommand is a plain function whose arguments are the options and whose docstring is the help (tyro
reads both). Heavy modules such as torch are imported inside these functions, so that help and usage errors appear at
once. Wrong input ends with one line on stderr and exit status 2.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Union

import tyro

from minicogview.cli.edit import edit, outpaint, vary
from minicogview.cli.evaluate import captioning, infilling, retrieval, selection, sharpness, tokenizer
from minicogview.cli.generate import generate
from minicogview.cli.shared import complain, print_json
from minicogview.cli.train import train_coglm, train_direct, train_iterative, train_text, train_vqvae
from minicogview.cli.weights import doctor, import_weights
from minicogview.config import get_preset
from minicogview.errors import MiniCogViewError


def info(preset: tyro.conf.Positional[str] = "toy", /, text_tokens: int = 16, json: bool = False) -> int:
    """Print the parameters, memory and floating-point operations of a preset, stage by stage.

    Args:
        preset: toy, small or cogview2 (6 billion parameters).
        text_tokens: length of the prompt in tokens.
        json: print plain numbers (bytes, operations) as JSON.
    """
    sizes = get_preset(preset)
    if not 1 <= text_tokens <= sizes.coglm.layout.max_text:
        limit = sizes.coglm.layout.max_text
        raise MiniCogViewError(f"--text-tokens is {text_tokens}: the preset {preset} takes 1 to {limit}")
    from minicogview.evaluation.cost import costs

    numbers = costs(sizes, text_tokens)
    if json:
        print_json(numbers)
        return 0
    print(
        f"{preset}: {numbers['text_tokens']} text tokens to {numbers['image_tokens']} coarse and "
        f"{numbers['fine_tokens']} fine picture tokens, {numbers['pixels']} x {numbers['pixels']} pixels"
    )
    print(f"{'':24}{'parameters':>15}{'fp16 MB':>12}{'fp32 MB':>12}{'GFLOP':>12}")
    rows = {
        "coglm": numbers["stages"]["coglm"],
        "direct": numbers["stages"]["direct"],
        "iterative": numbers["stages"]["iterative"],
        "decode (VQ-VAE)": numbers["stages"]["decode"],
        "encode (VQ-VAE)": numbers["stages"]["encode"],
        "all weights; all stages": numbers["total"],
    }
    for name, row in rows.items():
        fp16, fp32 = row["fp16_bytes"] / 1e6, row["fp32_bytes"] / 1e6
        print(f"{name:24}{row['parameters']:15,}{fp16:12,.1f}{fp32:12,.1f}{row['flops'] / 1e9:12,.2f}")
    print(f"KV cache of one picture in fp16: {numbers['stages']['coglm']['cache_fp16_bytes'] / 1e6:,.1f} MB")
    return 0


COMMANDS: dict[str, Any] = {
    "generate": generate,
    "edit": edit,
    "vary": vary,
    "outpaint": outpaint,
    "train": {
        "text": train_text,
        "vqvae": train_vqvae,
        "coglm": train_coglm,
        "direct": train_direct,
        "iterative": train_iterative,
    },
    "evaluate": {
        "retrieval": retrieval,
        "captioning": captioning,
        "infilling": infilling,
        "selection": selection,
        "sharpness": sharpness,
        "tokenizer": tokenizer,
    },
    "import": import_weights,
    "doctor": doctor,
    "info": info,
}
GROUPS = {
    "train": "Train a part of the toy, or your own model, on the emoji.",
    "evaluate": "Measure the quality of weights: the numbers of the model card.",
}
# What Ctrl-C leaves of a command.
STOPPED = {
    "generate": "the pictures of finished texts are saved",
    **dict.fromkeys(("edit", "vary", "outpaint"), "pictures are saved only when all are drawn"),
    "train": "run the same command again to resume from the last checkpoint",
    "evaluate": "nothing was saved",
    "import": "run the same command again to resume; complete files are kept",
}


def choice(commands: dict[str, Any]) -> Any:
    """The type that tyro reads as "one of these subcommands"."""
    options = []
    for name, command in commands.items():
        if isinstance(command, dict):
            subcommand = tyro.conf.subcommand(name=name, description=GROUPS[name])
            options.append(Annotated[choice(command), subcommand])
        else:
            options.append(Annotated[Any, tyro.conf.subcommand(name=name, constructor=command)])
    return Union[tuple(options)]  # noqa: UP007 (made of a list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's stream cannot be set up
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        description = "Turn texts in English or Chinese into pictures; train, evaluate and examine the models."
        return tyro.cli(choice(COMMANDS), prog="minicogview", description=description, args=arguments)
    except MiniCogViewError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 141  # the status of a program that the signal of a closed pipe ends
    except KeyboardInterrupt:
        complain(after_stop(sys.argv[1:] if arguments is None else arguments))
        return 130


def after_stop(arguments: Sequence[str]) -> str:
    """What Ctrl-C leaves of the command with these arguments, and how to resume it."""
    parts = ["stopped"]
    if arguments and arguments[0] in STOPPED:
        parts.append(STOPPED[arguments[0]])
    if "--weights random" in " ".join(arguments).replace("=", " "):
        parts.append("the same command writes the random weights that are still missing")
    return "; ".join(parts)
