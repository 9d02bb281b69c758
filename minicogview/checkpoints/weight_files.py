"""Weights on disk: safetensors files that describe themselves.

The idea: the header of a file holds the model's configuration as JSON, so nothing is guessed from file names. A
safetensors file holds tensors and text alone, so loading one cannot run code.

Every function takes the path of a single file such as ``coglm.safetensors``. Where a large model was cut into several
files with an index beside them (``checkpoints/shards.py``), the same path stands for all of them. ``load_weights``
reads a file, ``load_into`` puts its weights into a model, and ``load_vqvae`` and ``load_coglm`` do both.

A super-resolution stage may share weights with CogLM; these are stored in CogLM's file alone. ``load_part`` reads such
a stage with all of its weights, and ``load_direct`` and ``load_iterative`` build the model. The released checkpoints
are read by ``checkpoints/sat.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minicogview.checkpoints.reading import (
    FLOATS,
    WeightFile,
    check_counts,
    check_fields,
    check_finite,
    check_fits,
    check_tensor,
    compare_checksum,
    content_checksum,
    refusing,
    replace_sum,
    shown,
)
from minicogview.checkpoints.shards import INDEX, Shards
from minicogview.coglm import CogLM
from minicogview.config import PRESETS, CogLMConfig, SuperResolutionConfig, VQVAEConfig, from_json, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.transformer import Transformer
from minicogview.vqvae import VQVAE

Model = TypeVar("Model", bound=nn.Module)

STAGES = ("coglm", "direct", "iterative")
CONFIG_TYPES = {
    "coglm": CogLMConfig,
    "vqvae": VQVAEConfig,
    "direct": SuperResolutionConfig,
    "iterative": SuperResolutionConfig,
}
# The files in a folder of weights, by the part of the system that they hold.
FILES = {kind: f"{kind}.safetensors" for kind in CONFIG_TYPES} | {"text": "text.model", "labels": "cluster_label.npy"}


# --- files


def save_model(
    path: str | Path,
    model: nn.Module,
    config: object,
    kind: str,
    dtype: torch.dtype = torch.float16,
    leave_out: str = "",
    **facts: str,
) -> None:
    """Write a model's weights and configuration as one safetensors file, whole or not at all.

    Args:
        kind: one of CONFIG_TYPES: which configuration class the file carries.
        dtype: of the stored floating-point weights.
        leave_out: prefix of the weights that are stored in another file.
        facts: further text for the file's header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        for name, value in model.state_dict().items()
        if not (leave_out and name.startswith(leave_out))
    }
    part = path.with_name(path.name + ".part")
    metadata = {"kind": kind, "config": to_json(config), **facts}
    metadata["sha256"] = content_checksum(metadata, sorted(state.items()))
    save_file(state, part, metadata=metadata)
    part.chmod(0o644)  # safetensors makes it readable for its owner alone
    os.replace(part, path)
    replace_sum(path)


def has_weights(path: str | Path) -> bool:
    """Whether there is such a weight file, or an index of several in its place."""
    return Path(path).is_file() or Path(path).with_suffix(INDEX).is_file()


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[WeightFile | Shards]:
    """An open weight file, or the files of an index as if they were one, with the methods of ``safe_open``.

    Raises:
        MiniCogViewError: if the file is missing, or turns out to be damaged now or while it is being read.
    """
    path = Path(path)
    index = path.with_suffix(INDEX)
    if not path.is_file() and index.is_file():
        yield Shards(index)
        return
    if not path.is_file():
        raise MiniCogViewError(f"weight file {path} is missing: install the package again or pass another folder")
    yield WeightFile(path)


def load_header(path: str | Path, kind: str) -> dict[str, str]:
    """The text in a file's header: the ``kind`` of model, its ``config`` as JSON, and further facts.

    Raises:
        MiniCogViewError: if the file is missing, damaged, or holds another kind of model.
    """
    with open_weights(path) as file:
        return _header(file, path, kind)


def _header(file: WeightFile | Shards, path: str | Path, kind: str) -> dict[str, str]:
    header = file.metadata()
    if header.get("kind") != kind or "config" not in header:
        raise MiniCogViewError(f"weight file {path} holds {shown(repr(header.get('kind')))}, expected {kind!r}")
    return header


def load_config(path: str | Path, kind: str) -> Any:
    """The configuration in a file's header, without reading the weights; raises as ``load_header`` does."""
    with open_weights(path) as file:
        return _config(file, path, kind)


def _config(file: WeightFile | Shards, path: str | Path, kind: str) -> Any:
    """The configuration of an open file, whose fields have the right types and whose counts fit its weights."""
    text = _header(file, path, kind)["config"]
    with refusing(path, "has a configuration that makes no sense"):
        config = from_json(CONFIG_TYPES[kind], text)
    check_fields(config, path)
    check_counts(config, len(file.keys()), path)
    return config


def build(make: Callable[[], Model], path: str | Path) -> Model:
    """A model on the meta device, in eval mode, from the configuration in a file.

    Raises:
        MiniCogViewError: if the configuration makes no model.
    """
    with refusing(path, "has sizes that make no model"), torch.device("meta"):
        return make().eval()


def load_weights(
    path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a file that ``save_model`` or ``minicogview import`` wrote.

    Args:
        dtype: of the floating-point weights; None leaves them as they are stored, memory-mapped and not yet read.

    Raises:
        MiniCogViewError: as ``load_header`` does; or if a single file does not have its checksum (the files of an index
            are compared by ``minicogview doctor --verify``); or, unless ``dtype`` is None, for NaN and infinity.
    """
    if Path(path).is_file():
        compare_checksum(Path(path))
    with open_weights(path) as file:
        config = _config(file, path, kind)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if dtype is None:
        return config, state
    for name, value in state.items():
        if value.dtype in FLOATS:
            check_finite(name, value, path)
    return config, {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in a file, which all of them have."""
    with open_weights(path) as file:
        norms = [name for name in file.keys() if name.endswith("norm.weight")]  # noqa: SIM118 (not a dict)
        if not norms:
            raise MiniCogViewError(f"weight file {path} has no norm: it is no transformer; get it again")
        return file.get_tensor(norms[0]).dtype


# --- models that share no weights


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """Put weights into a model; raises as ``check_fits`` does.

    Args:
        source: where the weights come from, for the error message.
        assign: make these very tensors the model's own instead of copying them.
    """
    check_fits(model, state, source)
    model.load_state_dict(state, assign=assign)


def load_vqvae(path: str | Path) -> VQVAE:
    """The picture tokenizer in a weight file, in eval mode; raises as ``load_weights`` and ``load_into`` do."""
    config, state = load_weights(path, "vqvae")
    if all(config != preset.vqvae for preset in PRESETS.values()):  # foreign sizes: check them before taking memory
        check_fits(build(lambda: VQVAE(config), path), state, path)
    model = VQVAE(config).eval()
    load_into(model, state, path)
    return model


def load_coglm(path: str | Path, dtype: torch.dtype | None = torch.float32) -> CogLM:
    """The first stage in a weight file, in eval mode; raises as ``load_weights`` and ``load_into`` do."""
    config, state = load_weights(path, "coglm", dtype)
    model = build(lambda: CogLM(config), path)
    load_into(model, state, path, assign=True)
    remember_identity(model.transformer, path)
    return model


# --- which CogLM a super-resolution stage was trained on

_identities: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of models whose weights came from an index


def identity(path: str | Path) -> str:
    """What tells the weights of an index from others: a hash of its checksums.

    It is empty for a single file, and for an index that does not have the checksums of all of its files.
    """
    index = Path(path).with_suffix(INDEX)
    if Path(path).is_file() or not index.is_file():
        return ""
    shards = Shards(index)
    if set(shards.files) != shards.sha256.keys():
        return ""
    return hashlib.sha256(json.dumps(shards.sha256).encode()).hexdigest()[:16]


def remember_identity(model: nn.Module, path: str | Path) -> None:
    """Note which file a model's weights come from, so that ``fingerprint`` need not read gigabytes of them."""
    if known := identity(path):
        _identities[model] = known


def fingerprint(model: Transformer) -> str:
    """What tells a transformer's weights from others: the identity of their index, or else a hash of all numbers."""
    return _identities.get(model) or fingerprint_of(model.state_dict())


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """A hash of weights, rounded to half precision as files keep them."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- stages that share weights with CogLM


def sharing_facts(names: Sequence[str], coglm: Path) -> dict[str, str]:
    """Facts for the header of a stage whose weights of these names are stored in CogLM's file, an index, alone."""
    return {"same_as_coglm": json.dumps(names), "base": identity(coglm)}


def same_as_coglm(path: str | Path, coglm: CogLM) -> list[str]:
    """Names of the weights of a super-resolution stage that are stored in CogLM's file alone."""
    with open_weights(path) as file:
        return _shared_names(file.metadata(), coglm.transformer.state_dict(), path)


def _shared_names(header: dict[str, str], transformer: Iterable[str], path: str | Path) -> list[str]:
    """Names of the shared weights by a stage's header; without a list there, those of CogLM's whole transformer.

    Raises:
        MiniCogViewError: if the list is damaged, or has a name that CogLM does not have.
    """
    known = [f"base.{name}" for name in transformer]
    if not header.get("base"):
        return []
    if "same_as_coglm" not in header:
        return known
    with refusing(path, "has a damaged list same_as_coglm"):
        names = json.loads(header["same_as_coglm"])
        if not isinstance(names, list):
            raise ValueError(f"expected a list, found {type(names).__name__}")
        if strange := [name for name in names if name not in known]:
            raise ValueError(f"coglm.safetensors has no {strange[0]!r}")
    return names


def save_direct(path: str | Path, model: DirectSR) -> None:
    """Write the weights of ``DirectSR`` without those of CogLM's transformer, which are in CogLM's file."""
    save_model(path, model, model.config, "direct", leave_out="base.", base=fingerprint(model.base))


def load_part(
    path: str | Path,
    kind: str,
    base: Transformer | Path | None,
    dtype: torch.dtype | None = torch.float32,
    allow_other_base: bool = False,
) -> tuple[SuperResolutionConfig, dict[str, Tensor]]:
    """Configuration and all weights of a super-resolution stage, including those that are stored in CogLM's file.

    Args:
        base: CogLM's transformer, or its file: where the shared weights are taken from.
        allow_other_base: warn, instead of raising, if the stage was trained on top of another CogLM.

    Raises:
        MiniCogViewError: as ``load_weights`` does; or if the stage was trained on top of another CogLM.
    """
    config, state = load_weights(path, kind, dtype)
    header = load_header(path, kind)
    if not header.get("base"):
        return config, state
    weights: dict[str, Tensor] = {}
    known = ""
    if isinstance(base, Path):
        _, coglm = load_weights(base, "coglm", dtype)
        for name, value in coglm.items():
            check_tensor(name, value, base)
        weights = {name.removeprefix("transformer."): value for name, value in coglm.items()}
        known = identity(base) or fingerprint_of(weights)
    elif base is not None:
        weights, known = base.state_dict(), fingerprint(base)
    if header["base"] != known:
        other_base(path, allow_other_base and bool(weights))
    shared = _shared_names(header, weights, path)
    return config, state | {name: weights[name.removeprefix("base.")] for name in shared}


def other_base(path: str | Path, allowed: bool) -> None:
    """Say that a stage was trained on top of another CogLM than it is used with: a warning, or an error."""
    said = f"{path} was trained on top of another coglm.safetensors"
    if not allowed:
        raise MiniCogViewError(f"{said}: train it again, or get both files from one source")
    warnings.warn(f"{said}: its pictures may be poor", stacklevel=3)


def load_direct(
    path: str | Path, base: Transformer, dtype: torch.dtype | None = torch.float32, allow_other_base: bool = False
) -> DirectSR:
    """The direct stage on top of CogLM's transformer, in eval mode.

    If all of the transformer's weights are shared, so is the module; otherwise the two models share single tensors.

    Raises:
        MiniCogViewError: as ``load_part`` and ``load_into`` do.
    """
    config, state = load_part(path, "direct", base, dtype, allow_other_base)
    own = base.state_dict()
    whole = {f"base.{name}" for name in own} <= set(_shared_names(load_header(path, "direct"), own, path))
    model = build(lambda: DirectSR(config, base if whole else None), path)
    load_into(model, state, path, assign=True)
    return model


def load_iterative(
    path: str | Path,
    base: Transformer | None = None,
    dtype: torch.dtype | None = torch.float32,
    allow_other_base: bool = False,
) -> IterativeSR:
    """The iterative stage, in eval mode; raises as ``load_part`` and ``load_into`` do."""
    config, state = load_part(path, "iterative", base, dtype, allow_other_base)
    model = build(lambda: IterativeSR(config), path)
    load_into(model, state, path, assign=True)
    return model
