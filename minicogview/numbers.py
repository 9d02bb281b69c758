"""Numbers that a user gives: every one has a range and is checked against it before any work is done.

The idea: Python, NumPy, torch and a command line all hand numbers over, each in types of its own. Here they become
plain integers and floats, or one line that says what was given, which range is allowed, and what to do. The library
and the command line check with the same functions, so that both take and refuse the same values.
"""

from __future__ import annotations

import math
import secrets
from typing import Any, NamedTuple

from minicogview.errors import MiniCogViewError


class Range(NamedTuple):
    """The values that a number may have, ``low`` and ``high`` included; with ``above``, ``low`` itself is excluded."""

    low: float
    high: float
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        kind = "an integer" if self.whole else "a number"
        return f"{kind} {f'above {self.low} and at most' if self.above else f'from {self.low} to'} {self.high}"


MANY = 10**9
# Numbers with the same meaning wherever they occur; an option --top-k is the number top_k.
RANGES = {
    # drawing
    "n": Range(1, 10_000, whole=True),  # pictures of one text
    "seed": Range(0, 2**62 - 1, whole=True),
    "temperature": Range(0, 1000),
    "top_k": Range(1, MANY, whole=True),
    "cluster_temperature": Range(0.001, 1000),
    "n_clusters": Range(0, MANY, whole=True),
    "text_weight": Range(-1000, 1000),
    "guidance": Range(0, 1000),
    "scale": Range(1, 256, whole=True),
    # training
    "steps": Range(1, MANY, whole=True),
    "coarse_steps": Range(0, MANY, whole=True),
    "lr": Range(0, 10, above=True),
    "warmup": Range(0, MANY, whole=True),
    "weight_decay": Range(0, 100),
    "grad_clip": Range(0, MANY, above=True),
    "ema_decay": Range(0, 1),
    "batch_size": Range(1, 65536, whole=True),
    "judge_every": Range(1, MANY, whole=True),
    "validate_every": Range(1, MANY, whole=True),
    "log_every": Range(1, MANY, whole=True),
    "save_every": Range(1, MANY, whole=True),
    "save_every_s": Range(0, MANY),
    "max_seconds": Range(0, MANY),
    # evaluating
    "limit": Range(1, MANY, whole=True),
    "n_pictures": Range(1, MANY, whole=True),
    "n_names": Range(2, MANY, whole=True),
    "size": Range(11, 1024, whole=True),  # pixels along each side; the window of SSIM has 11
    "level": Range(0, 2, whole=True),
}


def checked(name: str, value: Any) -> Any:
    """The number called ``name``, an option of the command line or an argument, as a plain int or float.

    Raises:
        MiniCogViewError: if it is no number, or outside of ``RANGES``.

    Example:
        >>> checked("top_k", 5.0)
        5
    """
    return within(value, name, RANGES[name.removeprefix("--").replace("-", "_")])


def check_all(prefix: str = "", **numbers: Any) -> None:
    """Check several numbers by name; one that is None was not given. ``prefix`` "--": as options of a command."""
    for name, value in numbers.items():
        if value is not None:
            checked(prefix + (name.replace("_", "-") if prefix else name), value)


def integer(value: Any, name: str, low: int, high: int, hint: str = "") -> int:
    """``value`` as an int from ``low`` to ``high``; 5.0 and NumPy's integers are integers too, True is not."""
    return int(within(value, name, Range(low, high, whole=True), hint))


def number(value: Any, name: str, low: float, high: float, above: bool = False, hint: str = "") -> float:
    """``value`` as a float from ``low`` to ``high``, which need not be finite; with ``above``, ``low`` is excluded."""
    return float(within(value, name, Range(low, high, above=above), hint))


def within(value: Any, name: str, allowed: Range, hint: str = "") -> Any:
    """The plain number; raises MiniCogViewError if it is outside of the range or no number at all."""
    found = plain(value)
    fits = found is not None and allowed.low <= found <= allowed.high and not (allowed.above and found == allowed.low)
    if fits and found is not None and not (allowed.whole and found != int(found)):
        return int(found) if allowed.whole else found
    why = f" ({hint})" if hint else ""
    raise MiniCogViewError(f"{name} is {shown(value if found is None else found)}: give {allowed}{why}")


def plain(value: Any) -> int | float | None:
    """A number of any library as an int or a float; None for text, truth values, arrays and everything else."""
    if hasattr(value, "item"):  # NumPy and torch: also arrays of no or one element
        try:
            value = value.item()
        except (TypeError, ValueError, RuntimeError):
            return None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    if isinstance(value, (int, float)):
        return value
    try:
        return float(value)  # a fraction or a decimal number
    except (TypeError, ValueError, OverflowError):
        return math.nan


def prompt(text: Any) -> str:
    """A text as it is; raises MiniCogViewError for anything that is not a string."""
    if not isinstance(text, str):
        raise MiniCogViewError(f"text is {shown(text)}: give a string that says what the picture shows")
    return text


def shown(value: Any, limit: int = 40) -> str:
    """A value in a message, cut to a readable length."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= limit else text[:limit] + " ..."


def seeds_of(seed: Any, n: Any) -> list[int]:
    """The seeds of ``n`` pictures: ``seed``, ``seed + 1`` and so on. None draws a fresh first one, below 2 ** 31."""
    first = secrets.randbelow(2**31) if seed is None else checked("seed", seed)
    return list(range(first, first + checked("n", n)))
