"""The released checkpoint folders, in the form that SwissArmyTransformer (SAT) 0.2.1 wrote them.

The idea: a folder has ``latest`` (a text file with the iteration), ``model_config.json`` with the sizes, and
``ITERATION/mp_rank_00_model_states.pt``, a torch file whose entry ``module`` holds the weights. A model that was
trained on several GPUs (ranks) has one such file for each of them, with a part of every matrix. Files are
memory-mapped: a tensor is read from the disk when it is used. The official parameter names live here and nowhere else.

A torch file is a pickle, and a pickle can run code. Files are opened with ``weights_only=True`` and a list of the
harmless types that such checkpoints are known to hold beside tensors; anything else is refused by name.
"""

from __future__ import annotations

import _codecs
import argparse
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicogview.checkpoints.reading import (
    check_fields,
    check_tensor,
    inside,
    read_json,
    refuse_pointer,
    refusing,
    shown,
)
from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.scale.streaming import forget_pages

MAX_RANKS = 1024  # the released models were trained on one rank each

# Ours on the left, SwissArmyTransformer's on the right; {} is the layer's number.
SAT_NAMES = {
    "token_embedding": "word_embeddings",
    "position_embedding": "position_embeddings",
    "final_norm": "final_layernorm",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.attention_out_norm": "layers.{}.third_layernorm",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp_out_norm": "layers.{}.fourth_layernorm",
    "layers.{}.attention.qkv": "layers.{}.attention.query_key_value",
    "layers.{}.attention.out": "layers.{}.attention.dense",
    "layers.{}.mlp.up": "layers.{}.mlp.dense_h_to_4h",
    "layers.{}.mlp.down": "layers.{}.mlp.dense_4h_to_h",
}
# Fields of ``TransformerConfig``, and their names in ``model_config.json``.
SIZES = {
    "n_layers": "num_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_positions": "max_sequence_length",
}
# The weights that the super-resolution stages have beside the transformer.
SAT_MIXINS = {
    "fine_position": "extra_position_embedding.position_embeddings",
    "fine_attention.{}.qkv": "attention_plus.query_key_value.{}",
    "fine_attention.{}.out": "attention_plus.dense.{}",
}


class Bystander:
    """Stands in for objects that the training program stored beside the weights and that are not needed."""


# Beside tensors and plain containers: argparse's settings, NumPy's random state, DeepSpeed's loss scale.
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("uint32", "uint8", "int64", "float64", "bool")),
    *((np.zeros(1).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_codecs.encode, "_codecs.encode"),
    *((Bystander, f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")),
]


def open_torch_file(path: Path) -> Any:
    """The content of a torch file; no code in it is run.

    Tensors are memory-mapped, except those of files from before PyTorch 1.6, which are not in ZIP format.

    Raises:
        MiniCogViewError: if the file is missing, damaged, or holds anything that is neither a tensor nor harmless.
    """
    if not path.is_file():
        raise MiniCogViewError(f"checkpoint file {path} is missing: copy it again")
    refuse_pointer(path)
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of unusual pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises many kinds for a damaged file
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise MiniCogViewError(
                f"{path} holds {shown(found.group(1))}, which is not a tensor and might run code: refused, "
                "nothing was read"
            ) from None
        # PyTorch's first line suggests loading without the check.
        lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        reason = shown(lines[0]) if lines else type(error).__name__
        raise MiniCogViewError(f"{path} is damaged or not a torch file ({reason}): copy it again") from None


def without_number(name: str) -> tuple[str, str]:
    """A name with {} in place of its layer's number, and that number, empty if there is none."""
    parts = name.split(".")
    return ".".join("{}" if part.isdigit() else part for part in parts), next(filter(str.isdigit, parts), "")


def sat_to_ours(name: str) -> str:
    """Our name of a SAT parameter, such as ``transformer.layers.3.mlp.dense_h_to_4h.bias``.

    Raises:
        MiniCogViewError: if no CogView2 model has a parameter of this name.
    """
    names = SAT_MIXINS if name.startswith("mixins.") else SAT_NAMES
    body, _, leaf = name.removeprefix("mixins.").removeprefix("transformer.").rpartition(".")
    pattern, number = without_number(body)
    for ours, theirs in names.items():
        if theirs == pattern:
            return f"{ours.format(number)}.{leaf}"
    raise MiniCogViewError(f"checkpoint parameter {shown(name)} is not known: is this a CogView2 checkpoint?")


def ours_to_sat(name: str) -> str:
    """The inverse: the SAT name of a parameter of ``CogLM``, ``DirectSR`` or ``IterativeSR``."""
    body, leaf = name.removeprefix("base.").removeprefix("transformer.").rsplit(".", 1)
    pattern, number = without_number(body)
    names, prefix = (SAT_MIXINS, "mixins.") if pattern in SAT_MIXINS else (SAT_NAMES, "transformer.")
    return f"{prefix}{names[pattern].format(number)}.{leaf}"


# --- several ranks

# Tensor parallelism: the axis along which a parameter is split over the ranks. Of all others each rank has a copy.
CUT = {
    r"query_key_value|dense_h_to_4h|word_embeddings": 0,
    r"(attention\.dense|attention_plus\.dense\.\d+|dense_4h_to_h)\.weight": 1,
}


def cut_axis(name: str) -> int | None:
    """The axis along which a parameter is split over the ranks, by its official name; None if each has a copy."""
    return next((axis for pattern, axis in CUT.items() if re.search(pattern, name)), None)


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """A whole parameter from the ranks' parts of it.

    Every rank's joint projection is [q | k | v] of its own heads, so q, k and v are joined one at a time.

    Raises:
        MiniCogViewError: if the ranks disagree on a parameter of which each has a copy.
    """
    axis = cut_axis(name)
    if len(parts) == 1:
        return parts[0]
    if "query_key_value" in name:
        return torch.cat([torch.cat(third) for third in zip(*(part.chunk(3) for part in parts), strict=True)])
    if axis is not None:
        return torch.cat(list(parts), dim=axis)
    if not all(torch.equal(part, parts[0]) for part in parts):
        raise MiniCogViewError(f"the ranks hold different values of {name}: do the files belong to one checkpoint?")
    return parts[0]


def merged_shape(name: str, parts: Sequence[Tensor]) -> tuple[int, ...]:
    """The shape of ``merge(name, parts)``, without reading the parts.

    Raises:
        MiniCogViewError: if the parts do not fit together.
    """
    shape, axis = list(parts[0].shape), cut_axis(name)
    others = {(part.dtype, *(n for i, n in enumerate(part.shape) if i != axis)) for part in parts}
    thirds = "query_key_value" in name and any(part.shape[0] % 3 for part in parts)
    if len(others) > 1 or thirds or (axis is not None and axis >= len(shape)):
        said = ", ".join(f"{tuple(part.shape)} {part.dtype}" for part in parts[:4])
        raise MiniCogViewError(f"{shown(name)} cannot be merged from {said}: do the files belong to one checkpoint?")
    if axis is not None:
        shape[axis] = sum(part.shape[axis] for part in parts)
    return tuple(shape)


# --- a folder


class SatFolder:
    """An opened checkpoint of one model, written by any number of ranks.

    Attributes:
        path: the folder.
        files: one for each rank.
        sizes: the content of ``model_config.json``.
        shapes: merged shape of each parameter by its official name.
        mapped: whether the tensors are memory-mapped, so that ``let_go`` can free their memory.

    Raises:
        MiniCogViewError: if a file is missing, damaged or might run code; or if the ranks do not fit together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.sizes = self._sizes()
        self.files = self._rank_files()
        self.ranks = [self._module(file) for file in self.files]
        self.mapped = all(zipfile.is_zipfile(file) for file in self.files)
        names = self.ranks[0].keys()
        for file, rank in zip(self.files, self.ranks, strict=True):
            if rank.keys() != names:
                differ = shown(", ".join(sorted(rank.keys() ^ names)[:5]))
                raise MiniCogViewError(f"{file} and {self.files[0].name} hold different parameters: {differ}")
        self.shapes = {name: merged_shape(name, [rank[name] for rank in self.ranks]) for name in names}

    def _sizes(self) -> dict[str, Any]:
        file = self.path / "model_config.json"
        if not file.is_file():
            raise MiniCogViewError(f"{file} is missing: is {self.path} a checkpoint folder of CogView2?")
        return read_json(file, f"is {self.path} a checkpoint folder of CogView2?")

    def _rank_files(self) -> list[Path]:
        latest = self.path / "latest"
        if not latest.is_file():
            raise MiniCogViewError(f"{latest} is missing: it names the iteration to load")
        refuse_pointer(latest)
        with refusing(latest), latest.open(encoding="utf-8-sig") as file:
            iteration = file.read(1000).strip()
        folder = inside(self.path, iteration, latest)
        found = sorted(folder.glob("mp_rank_*_model_states.pt"))
        expected = [folder / f"mp_rank_{i:02d}_model_states.pt" for i in range(max(len(found), self.n_ranks))]
        missing = [file.name for file in expected if file not in found]
        if missing:
            raise MiniCogViewError(f"{folder} lacks {', '.join(missing[:3])}: copy all ranks of the checkpoint")
        return [inside(folder, file.name, self.path) for file in expected]

    @property
    def n_ranks(self) -> int:
        """How many ranks the model was split over, according to ``model_config.json``."""
        n = self.sizes.get("model_parallel_size", 1)
        if type(n) is not int or not 1 <= n <= MAX_RANKS:
            file = self.path / "model_config.json"
            raise MiniCogViewError(f"{file} has model_parallel_size {shown(repr(n), 60)}: expected 1 to {MAX_RANKS}")
        return n

    @staticmethod
    def _module(file: Path) -> dict[str, Tensor]:
        content = open_torch_file(file)
        module = content.get("module") if isinstance(content, dict) else None
        if not isinstance(module, dict) or not module:
            raise MiniCogViewError(f"{file} has no dictionary of tensors named module: it is another kind of file")
        for name, value in module.items():
            check_tensor(name, value, file)
        return module

    def tensor(self, name: str) -> Tensor:
        """A whole parameter by its official name."""
        return merge(name, [rank[name] for rank in self.ranks])

    def let_go(self, names: Iterable[str]) -> None:
        """Free the memory of these parameters; they are read from the file again when they are used."""
        for name in names if self.mapped else ():
            for rank in self.ranks:
                forget_pages(rank[name])


def sat_transformer(module: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's weights in a SAT ``module`` dictionary, by our names and in float32, without mixins."""
    return {sat_to_ours(k): v.float() for k, v in module.items() if k.startswith("transformer.")}


def sat_config(
    sizes: Mapping[str, Any], ids: SpecialIds, layout: LayoutConfig, n_codes: int, names: Iterable[str] = ()
) -> CogLMConfig:
    """Our configuration for the sizes in a SAT ``model_config.json``.

    Args:
        names: official names of the parameters, which tell whether the norms are in sandwich order where the file does
            not: only then each layer has a third and a fourth one.

    Raises:
        MiniCogViewError: if a size is missing or makes no sense.
    """
    order = sizes.get("layernorm_order", "sandwich" if any("third_layernorm" in name for name in names) else "pre")
    source = "model_config.json"
    if lacking := [name for name in SIZES.values() if name not in sizes]:
        raise MiniCogViewError(f"{source} lacks {lacking[0]!r}: is this a checkpoint of CogView2?")
    with refusing(source, "has sizes that make no sense", "is this a checkpoint of CogView2?"):
        transformer = TransformerConfig(**{ours: sizes[theirs] for ours, theirs in SIZES.items()}, norm=order)
    check_fields(transformer, source)
    return CogLMConfig(transformer, layout, ids, n_codes)
