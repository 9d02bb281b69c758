"""Reading files that strangers made: every fault ends in one line, and nothing outside the folder is opened.

The idea: weights, indexes and configurations come from the internet, so nothing in them is taken on trust. All readers
of ``checkpoints/`` go through this module: it opens files, reads JSON, and checks names, tensors and sizes before they
are used. Whatever is wrong is raised as a ``MiniCogViewError`` that names the file.

Checksums (SHA-256) tell a flipped bit. A folder may have a list of them, ``SHA256SUMS``, in the format of the command
``sha256sum``; a file that ``save_model`` wrote also has one of its content in its own header.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import safe_open
from torch import Tensor, nn

from minicogview.errors import MiniCogViewError

SUMS = "SHA256SUMS"
POINTER = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer begins
MAX_JSON = 2**26  # bytes; the index of the released CogLM has less than 0.2 MB
MAX_SIZE = 2**31  # of any number in a configuration
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- faults


def shown(text: object, limit: int = 200) -> str:
    """A text from a file for an error message: on one line, without control characters, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


@contextlib.contextmanager
def refusing(path: str | Path, fault: str = "is damaged", remedy: str = "get it again") -> Iterator[None]:
    """Turn whatever goes wrong within this context into one line about a file.

    Parsers and model classes raise many kinds of exceptions for damaged content, so all of them are meant.
    """
    try:
        yield
    except MiniCogViewError as error:
        said = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise MiniCogViewError(shown(said, 1000)) from None
    except Exception as error:
        reason = shown(error) or type(error).__name__
        raise MiniCogViewError(f"{path} {fault} ({reason}): {remedy}") from None


def refuse_pointer(path: Path) -> None:
    """Raise MiniCogViewError if a file is the text that stands for it in a Git repository with LFS."""
    with refusing(path, "cannot be read"), path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise MiniCogViewError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs pull`")


# --- names and JSON


def inside(folder: Path, name: object, source: Path) -> Path:
    """The path of a file or folder whose name another file holds.

    Args:
        source: the file that holds the name, for the error message.

    Raises:
        MiniCogViewError: if the name is a path, or is a link that leads out of the folder. The one exception is the
            cache of huggingface_hub, where ``snapshots/REVISION`` has links into ``blobs``.
    """
    plain = isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200 and name not in (".", "..")
    if not isinstance(name, str) or not plain or any(c in name for c in "/\\:"):
        raise MiniCogViewError(f"{source} names {shown(repr(name))}: expected the plain name of a file beside it")
    root = folder.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    with refusing(source, f"names {name}, which cannot be opened"):
        target = (folder / name).resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise MiniCogViewError(f"{source} names {name}, which is a link out of the folder: refused")
    return folder / name


def read_json(path: Path, remedy: str = "get it again") -> dict[str, Any]:
    """A JSON object from a small file; raises MiniCogViewError if it is anything else."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"it holds {name}")

    refuse_pointer(path)
    with refusing(path, remedy=remedy):
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it is larger than {MAX_JSON >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=refuse_constant)
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {type(content).__name__}")
    return content


def texts(value: Any, what: str) -> dict[str, str]:
    """The same dictionary, if it maps texts to texts; else raises ValueError."""
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{what} is {shown(repr(value), 60)}: expected an object of texts")
    return value


# --- configurations


def check_fields(config: Any, path: str | Path) -> None:
    """Raise MiniCogViewError if a field of a configuration dataclass has a value of another type than it declares."""
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not _fits(value, types[field.name]):
            found = shown(repr(value), 60)
            raise MiniCogViewError(f"{path} has {field.name} {found}, which makes no sense there: get it again")
        if dataclasses.is_dataclass(value):
            check_fields(value, path)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type: integers are at least 0 and no booleans, and floats are finite."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in args)
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is ... else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if kind is int:
        return type(value) is int and 0 <= value <= MAX_SIZE
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return value is None if kind is NoneType else isinstance(value, kind)


def check_counts(config: Any, n_weights: int, path: str | Path) -> None:
    """Refuse a configuration with more layers or blocks than its file has weights: it would take long to build."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        count = len(value) if isinstance(value, tuple) else value if field.name in ("n_layers", "encoder_blocks") else 0
        if count > n_weights:
            raise MiniCogViewError(f"{path} has {field.name} {shown(value, 60)}, but only {n_weights} weights")
        if dataclasses.is_dataclass(value):
            check_counts(value, n_weights, path)


# --- tensors


def check_tensor(name: object, value: Any, path: str | Path) -> None:
    """Raise MiniCogViewError unless a value is a plain tensor of floating-point numbers that are all in memory."""
    said = ""
    if not isinstance(name, str):
        said = "whose name is no text"
    elif not isinstance(value, Tensor):
        said = "which is no tensor"
    elif value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_nested:
        said = "which is a sparse, quantized, nested or empty (meta) tensor"
    elif value.dtype not in FLOATS:
        said = f"which is {value.dtype}"
    elif value.ndim == 0:
        said = "which is a single number"
    elif value.nbytes > value.untyped_storage().nbytes():
        said = f"whose shape {tuple(value.shape)} has more numbers than are stored"
    if said:
        raise MiniCogViewError(f"{path} holds {shown(repr(name), 80)}, {said}: expected floating-point numbers")


def check_finite(name: str, value: Tensor, path: str | Path) -> None:
    """Raise MiniCogViewError if a tensor has NaN or infinity; reads all of it once, at several GB/s."""
    # Both ends are NaN where any number is.
    if value.numel() and not all(math.isfinite(end.item()) for end in torch.aminmax(value)):
        raise MiniCogViewError(f"{path} holds NaN or infinity in {shown(name, 80)}: get it again")


def check_fits(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raise MiniCogViewError if weights do not fit a model, with their names.

    That is: some are missing or unexpected, have the wrong shape, or are integers or booleans where the model computes
    with floating-point numbers.
    """
    own = model.state_dict()
    both = sorted(own.keys() & state.keys())
    kinds = [k for k in both if own[k].is_floating_point() and state[k].dtype not in FLOATS]
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "wrong shapes": [f"{k} {tuple(state[k].shape)}" for k in both if state[k].shape != own[k].shape],
        "wrong types": [f"{k} {state[k].dtype}" for k in kinds],
    }
    if any(problems.values()):
        said = ", ".join(f"{what} {which[:5]}" for what, which in problems.items())
        raise MiniCogViewError(f"{source} does not fit the model: {shown(said, 800)}")


class WeightFile:
    """One open safetensors file, with the methods of ``safe_open`` that are needed.

    Raises:
        MiniCogViewError: if the file is damaged, or lacks a tensor that is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        with self._refusing():
            self._file = safe_open(path, framework="pt")
            self._metadata: dict[str, str] = self._file.metadata() or {}
            self._keys: list[str] = list(self._file.keys())

    def _refusing(self) -> contextlib.AbstractContextManager[None]:
        return refusing(f"weight file {self.path}")

    def metadata(self) -> dict[str, str]:
        """The text in the header."""
        return self._metadata

    def keys(self) -> Sequence[str]:
        """Names of the weights."""
        return self._keys

    def get_tensor(self, name: str) -> Tensor:
        """A weight, memory-mapped: it is read from the disk when it is first used."""
        with self._refusing():
            return self._file.get_tensor(name)


# --- checksums


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def content_checksum(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of what a weight file holds: the text of its header, and its tensors in the order of their names."""
    texts = {key: text for key, text in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """The checksums that a folder lists, by the names of its files; empty if there is no list."""
    path, sums = folder / SUMS, {}
    if not path.is_file():
        return {}
    with refusing(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            number, name = line.split(maxsplit=1)
            sums[name.removeprefix("*")] = number
    return sums


def replace_sum(path: Path) -> None:
    """After a file was written: put its new checksum into the list of its folder, if it is in there."""
    sums = read_sums(path.parent)
    if path.name in sums:
        sums[path.name] = checksum(path)
        (path.parent / SUMS).write_text("".join(f"{number}  {name}\n" for name, number in sums.items()))


def compare_checksum(path: Path, again: bool = False) -> bool:
    """Compare a single file with its checksum in the folder's list, or else with the one in its header.

    Args:
        again: also read a file that was compared before and has not changed its date and size since.

    Returns:
        whether there was a checksum to compare with.

    Raises:
        MiniCogViewError: if the file was altered or damaged.
    """
    state = path.stat()
    if again:
        _compare.cache_clear()
    return _compare(path, read_sums(path.parent).get(path.name, ""), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _compare(path: Path, listed: str, size: int, date: int) -> bool:
    refuse_pointer(path)
    if listed:
        expected, found = listed, checksum(path)
    elif path.suffix == ".safetensors":
        file = WeightFile(path)
        expected = file.metadata().get("sha256", "")
        if not expected:
            return False
        found = content_checksum(file.metadata(), ((name, file.get_tensor(name)) for name in sorted(file.keys())))
    else:
        return False
    if expected != found:
        where = SUMS if listed else "its header"
        raise MiniCogViewError(f"{path} was altered or damaged: its checksum is not the one in {where}; get it again")
    return True
