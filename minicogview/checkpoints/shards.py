"""Large weights in several safetensors files with an index beside them, as Hugging Face lays them out.

The idea: NAME.safetensors.index.json says which file holds which weight, and what the checksum of each file is. Files
are written one by one, each whole or not at all, and the index comes last: without it there is no model. A run that was
interrupted skips the files that are already complete when it is started again.

Different on purpose from Hugging Face's index: it has checksums (SHA-256), and the configuration that our single files
carry in their headers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minicogview.checkpoints.reading import WeightFile, checksum, inside, read_json, refusing, texts
from minicogview.errors import MiniCogViewError

LIMIT = 2**29  # bytes in a file; a single larger weight has a file of its own
INDEX = ".safetensors.index.json"
OnStep = Callable[[str, int, int], None]  # (file, bytes done, bytes in all)


def group_by_file(sizes: Mapping[str, int], limit: int = LIMIT) -> list[list[str]]:
    """The names of the weights that go into each file, in their order.

    Example:
        >>> group_by_file({"a": 3, "b": 3, "c": 9, "d": 1}, limit=6)
        [['a', 'b'], ['c'], ['d']]
    """
    files: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not files or size > left:
            files.append([])
            left = limit
        files[-1].append(name)
        left -= size
    return files


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def finished_files(progress: Path, source: str) -> dict[str, str]:
    """Checksums of the files that an interrupted run wrote from the same source; none if its notes are damaged."""
    try:
        known = read_json(progress) if progress.is_file() else {}
        return texts(known["sha256"], "sha256") if known.get("source") == source else {}
    except (ValueError, KeyError):
        return {}


def apart(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where several lie in one storage as copies of their own: safetensors stores no ties."""
    times = Counter(value.untyped_storage().data_ptr() for value in state.values())
    return {n: v.clone() if times[v.untyped_storage().data_ptr()] > 1 else v for n, v in state.items()}


def write_shards(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    get: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    source: str,
    on_step: OnStep | None = None,
    limit: int = LIMIT,
) -> Path:
    """Write weights as ``folder/stem-0000i-of-0000n.safetensors`` and their index.

    Args:
        sizes: bytes of each weight by its name.
        get: returns a weight by its name; called when its turn comes.
        metadata: text for the index, such as ``kind`` and ``config``.
        source: describes what is written, and from what; an interrupted run is resumed only if it is the same.

    Returns:
        the path of the index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = group_by_file(sizes, limit)
    names = {f"{stem}-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, 1)}
    progress, index = folder / f"{stem}.import.json", folder / f"{stem}{INDEX}"
    checksums = finished_files(progress, source)
    done, total = 0, sum(sizes.values())
    for file, weights in names.items():
        path = folder / file
        if file not in checksums or not path.is_file():
            part = path.with_name(file + ".part")
            try:
                save_file(apart({name: get(name).contiguous() for name in weights}), part)
                part.chmod(0o644)  # safetensors makes it readable for its owner alone
                checksums[file] = checksum(part)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            write_json(progress, {"source": source, "sha256": checksums})
        done += sum(sizes[name] for name in weights)
        if on_step:
            on_step(file, done, total)
    weight_map = {name: file for file, weights in names.items() for name in weights}
    write_json(index, {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map, "sha256": checksums})
    progress.unlink()
    return index


class Shards:
    """The files of an index as if they were one, with the methods of ``safetensors.safe_open``.

    Attributes:
        weight_map: the file of each weight. sha256: the checksum of each file; empty if the index has none.

    Raises:
        MiniCogViewError: if the index is damaged, or names a file that is missing or not in its folder.
    """

    def __init__(self, index: Path) -> None:
        self.index, self.folder = index, index.parent
        content = read_json(index, "import the weights again")
        with refusing(index, remedy="import the weights again"):
            self.weight_map = texts(content["weight_map"], "weight_map")
            self.sha256 = texts(content.get("sha256", {}), "sha256")
            facts = content["metadata"]
            self._metadata = texts({k: v for k, v in facts.items() if k != "total_size"}, "metadata")
            self.files = sorted(set(self.weight_map.values()))
            if not self.files:
                raise ValueError("weight_map is empty")
            if unknown := sorted(self.sha256.keys() - set(self.files)):
                raise ValueError(f"sha256 has {unknown[0]!r}, which weight_map has not")
        paths = {file: inside(self.folder, file, index) for file in self.files}
        missing = [file for file, path in paths.items() if not path.is_file()]
        if missing:
            raise MiniCogViewError(f"{self.folder} lacks {', '.join(missing[:3])}: import the weights again")
        self._open: dict[str, WeightFile] = {}

    def metadata(self) -> dict[str, str]:
        """The text in the index: what a single file has in its header."""
        return self._metadata

    def keys(self) -> Sequence[str]:
        """Names of the weights."""
        return list(self.weight_map)

    def get_tensor(self, name: str) -> Tensor:
        """A weight, memory-mapped: it is read from the disk when it is first used."""
        file = self.weight_map[name]
        if file not in self._open:
            self._open[file] = WeightFile(self.folder / file)
        return self._open[file].get_tensor(name)

    def verify(self) -> int:
        """Compare every file that has a checksum with it, which reads all of it.

        Returns:
            how many files were compared.

        Raises:
            MiniCogViewError: with the name of the first file that differs.
        """
        for file, expected in self.sha256.items():
            if checksum(self.folder / file) != expected:
                raise MiniCogViewError(f"{self.folder / file} was altered or damaged: import the weights again")
        return len(self.sha256)


def free_room(folder: Path) -> tuple[Path, int]:
    """Free bytes on the disk of a folder that need not exist yet, and the part of its path that exists."""
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there, shutil.disk_usage(there).free


def n_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize
