"""The command ``minicogview``: draw, train, evaluate, import and examine weights, and count what a preset costs.

The idea: every subcommand is a plain function whose arguments are the options and whose docstring is the help (tyro
reads both). Heavy modules such as torch are imported inside these functions, so that help and usage errors appear at
once. Wrong input, a word that is no number too, ends with one line on stderr and exit status 2.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from typing import Annotated, Any, Union

import tyro

from minicogview.cli.edit import edit, outpaint, vary
from minicogview.cli.evaluate import captioning, infilling, retrieval, selection, sharpness, tokenizer
from minicogview.cli.generate import generate
from minicogview.cli.shared import complain, one_line, print_json
from minicogview.cli.show import show
from minicogview.cli.train import train_coglm, train_direct, train_iterative, train_text, train_vqvae
from minicogview.cli.weights import doctor, import_weights
from minicogview.config import get_preset
from minicogview.errors import MiniCogViewError
from minicogview.numbers import integer


def info(preset: tyro.conf.Positional[str] = "toy", /, text_tokens: int = 16, json: bool = False) -> int:
    """Print the parameters, memory and floating-point operations of a preset, stage by stage.

    Args:
        preset: toy, small or cogview2 (6 billion parameters).
        text_tokens: length of the prompt in tokens.
        json: print plain numbers (bytes, operations) as JSON.
    """
    sizes = get_preset(preset)
    integer(text_tokens, "--text-tokens", 1, sizes.coglm.layout.max_text, f"the preset {preset} takes no more")
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
    "show": show,
    "doctor": doctor,
    "info": info,
}
GROUPS = {
    "train": "Train a part of the toy, or your own model, on the emoji.",
    "evaluate": "Measure the quality of weights: the numbers of the model card.",
}
# What Ctrl-C leaves of a command.
STOPPED = {
    "generate": "finished pictures are saved",
    **dict.fromkeys(("edit", "vary", "outpaint"), "pictures are saved only when all are drawn"),
    "train": "run the same command again to resume from its last checkpoint, if it has one",
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
            options.append(Annotated[Any, tyro.conf.subcommand(name=name, constructor=later(command))])
    return Union[tuple(options)]  # noqa: UP007 (made of a list)


def later(command: Callable[..., int]) -> Any:
    """A function with the options of ``command`` that returns a call of it, so that parsing ends before work begins."""

    @functools.wraps(command)
    def bind(*args: Any, **options: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **options)

    return bind


def parse(arguments: Sequence[str] | None) -> Callable[[], int]:
    """The command with its options, ready to be called; help ends the program.

    Raises:
        MiniCogViewError: for words that are no options or no numbers: what tyro says in a box, as one line.
    """
    description = "Turn texts in English or Chinese into pictures; train, evaluate and examine the models."
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(choice(COMMANDS), prog="minicogview", description=description, args=arguments)
    except SystemExit as end:
        if not end.code:
            raise
        raise MiniCogViewError(from_box(said.getvalue())) from None


def from_box(text: str) -> str:
    """The first part of a message from tyro, as one line; a title and rules or, in UTF-8, a box surround the parts.

    Example:
        >>> from_box("Error\\n-----\\n Missing: --n\\n -----\\n More ...")
        'Missing: --n; run the command with --help for its options'
    """
    rows = [row.strip(" │") for row in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    rules = [i for i, row in enumerate(rows) if re.match("[╭╰]|[─-]+$", row)]  # the first stands before what was said
    said = rows[rules[0] + 1 : rules[1]] if len(rules) > 1 else rows
    line = one_line(" ".join(said)).rstrip(".")
    number = re.fullmatch(r"Error parsing (\S+): .*(literal for int|string to float).*: ('.*')", line)
    if number:
        return f"{number[1]} is {number[3]}: give {'an integer' if 'int' in number[2] else 'a number'}"
    return f"{line}; run the command with --help for its options"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's stream cannot be set up
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return parse(arguments)()
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
    if list(arguments[:2]) == ["train", "text"]:
        parts.append("nothing was saved")
    elif arguments and arguments[0] in STOPPED:
        parts.append(STOPPED[arguments[0]])
    if "--weights random" in " ".join(arguments).replace("=", " "):
        parts.append("the same command writes the random weights that are still missing")
    return "; ".join(parts)
