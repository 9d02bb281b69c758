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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minicogview.checkpoints.shards import INDEX, Shards
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, SuperResolutionConfig, VQVAEConfig, from_json, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.transformer import Transformer
from minicogview.vqvae import VQVAE

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
    save_file(state, part, metadata={"kind": kind, "config": to_json(config), **facts})
    part.chmod(0o644)  # safetensors makes it readable for its owner alone
    os.replace(part, path)


def has_weights(path: str | Path) -> bool:
    """Whether there is such a weight file, or an index of several in its place."""
    return Path(path).is_file() or Path(path).with_suffix(INDEX).is_file()


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[Any]:
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
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MiniCogViewError(f"weight file {path} is damaged ({error}): get it again") from None


def load_header(path: str | Path, kind: str) -> dict[str, str]:
    """The text in a file's header: the ``kind`` of model, its ``config`` as JSON, and further facts.

    Raises:
        MiniCogViewError: if the file is missing, damaged, or holds another kind of model.
    """
    with open_weights(path) as file:
        header: dict[str, str] = file.metadata() or {}
    if header.get("kind") != kind or "config" not in header:
        raise MiniCogViewError(f"weight file {path} holds {header.get('kind')!r}, expected {kind!r}")
    return header


def load_config(path: str | Path, kind: str) -> Any:
    """The configuration in a file's header, without reading the weights; raises as ``load_header`` does."""
    return from_json(CONFIG_TYPES[kind], load_header(path, kind)["config"])


def load_weights(
    path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a file that ``save_model`` or ``minicogview import`` wrote.

    Args:
        dtype: of the floating-point weights; None leaves them as they are stored, memory-mapped and not yet read.

    Raises:
        MiniCogViewError: as ``load_header`` does.
    """
    config = load_config(path, kind)
    with open_weights(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return config, {k: v.to(dtype or v.dtype) if v.is_floating_point() else v for k, v in state.items()}


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights in a file, which all of them have."""
    with open_weights(path) as file:
        name = next(name for name in file.keys() if name.endswith("norm.weight"))  # noqa: SIM118 (not a dict)
        return cast(Tensor, file.get_tensor(name)).dtype


# --- models that share no weights


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """Put weights into a model.

    Args:
        source: where the weights come from, for the error message.
        assign: make these very tensors the model's own instead of copying them.

    Raises:
        MiniCogViewError: with the names of missing and unexpected weights, and of those that have the wrong shape.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    both = sorted(own.keys() & state.keys())
    shapes = [f"{k} {tuple(state[k].shape)}" for k in both if state[k].shape != own[k].shape]
    if missing or unexpected or shapes:
        raise MiniCogViewError(
            f"{source} does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"wrong shapes {shapes[:5]}"
        )
    model.load_state_dict(state, assign=assign)


def load_vqvae(path: str | Path) -> VQVAE:
    """The picture tokenizer in a weight file, in eval mode; raises as ``load_weights`` and ``load_into`` do."""
    config, state = load_weights(path, "vqvae")
    model = VQVAE(config).eval()
    load_into(model, state, path)
    return model


def load_coglm(path: str | Path, dtype: torch.dtype | None = torch.float32) -> CogLM:
    """The first stage in a weight file, in eval mode; raises as ``load_weights`` and ``load_into`` do."""
    config, state = load_weights(path, "coglm", dtype)
    with torch.device("meta"):
        model = CogLM(config).eval()
    load_into(model, state, path, assign=True)
    remember_identity(model.transformer, path)
    return model


# --- which CogLM a super-resolution stage was trained on

_identities: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # of models whose weights came from an index


def identity(path: str | Path) -> str:
    """What tells the weights of an index from others: a hash of its checksums. It is empty for a single file."""
    index = Path(path).with_suffix(INDEX)
    return hashlib.sha256(json.dumps(Shards(index).sha256).encode()).hexdigest()[:16] if index.is_file() else ""


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
        return _shared_names(file.metadata(), coglm.transformer.state_dict())


def _shared_names(header: dict[str, str], transformer: Iterable[str]) -> list[str]:
    """Names of the shared weights by a stage's header; without a list there, those of CogLM's whole transformer."""
    if not header.get("base"):
        return []
    if "same_as_coglm" in header:
        return cast(list[str], json.loads(header["same_as_coglm"]))
    return [f"base.{name}" for name in transformer]


def save_direct(path: str | Path, model: DirectSR) -> None:
    """Write the weights of ``DirectSR`` without those of CogLM's transformer, which are in CogLM's file."""
    save_model(path, model, model.config, "direct", leave_out="base.", base=fingerprint(model.base))


def load_part(
    path: str | Path, kind: str, base: Transformer | Path | None, dtype: torch.dtype | None = torch.float32
) -> tuple[SuperResolutionConfig, dict[str, Tensor]]:
    """Configuration and all weights of a super-resolution stage, including those that are stored in CogLM's file.

    Args:
        base: CogLM's transformer, or its file: where the shared weights are taken from.

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
        weights = {name.removeprefix("transformer."): value for name, value in coglm.items()}
        known = identity(base) or fingerprint_of(weights)
    elif base is not None:
        weights, known = base.state_dict(), fingerprint(base)
    if header["base"] != known:
        raise MiniCogViewError(
            f"{path} was trained on top of another coglm.safetensors: train it again, or get both files from one source"
        )
    return config, state | {name: weights[name.removeprefix("base.")] for name in _shared_names(header, weights)}


def load_direct(path: str | Path, base: Transformer, dtype: torch.dtype | None = torch.float32) -> DirectSR:
    """The direct stage on top of CogLM's transformer, in eval mode.

    If all of the transformer's weights are shared, so is the module; otherwise the two models share single tensors.

    Raises:
        MiniCogViewError: as ``load_part`` and ``load_into`` do.
    """
    config, state = load_part(path, "direct", base, dtype)
    own = base.state_dict()
    whole = {f"base.{name}" for name in own} <= set(_shared_names(load_header(path, "direct"), own))
    with torch.device("meta"):
        model = DirectSR(config, base if whole else None).eval()
    load_into(model, state, path, assign=True)
    return model


def load_iterative(
    path: str | Path, base: Transformer | None = None, dtype: torch.dtype | None = torch.float32
) -> IterativeSR:
    """The iterative stage, in eval mode; raises as ``load_part`` and ``load_into`` do."""
    config, state = load_part(path, "iterative", base, dtype)
    with torch.device("meta"):
        model = IterativeSR(config).eval()
    load_into(model, state, path, assign=True)
    return model
