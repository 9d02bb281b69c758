"""Weights on disk: safetensors files that describe themselves.

The idea: the configuration is JSON in the file's header, so nothing is guessed from names, and nothing that is loaded
can run code: safetensors holds only tensors. Large models are cut in several files with an index beside them
(``checkpoints/shards.py``); the released checkpoints are read by ``checkpoints/sat.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minicogview.checkpoints.shards import INDEX, Shards
from minicogview.coglm import CogLM
from minicogview.config import (
    CogLMConfig,
    SuperResolutionConfig,
    VQVAEConfig,
    from_json,
    to_json,
)
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.transformer import Transformer
from minicogview.vqvae import VQVAE

CONFIG_TYPES = {
    "coglm": CogLMConfig,
    "vqvae": VQVAEConfig,
    "direct": SuperResolutionConfig,
    "iterative": SuperResolutionConfig,
}

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
        dtype: type of the stored floating-point numbers.
        leave_out: weights whose names start so stand in another file.
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
    part.chmod(0o644)  # safetensors leaves it readable by its owner alone
    os.replace(part, path)


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[Any]:
    """A weight file, opened, or several with an index; a clear error if it is missing or damaged, now or later."""
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


def load_config(path: str | Path, kind: str) -> Any:
    """The configuration in a file that ``save_model`` wrote, without the weights; raises as ``load_weights`` does."""
    with open_weights(path) as file:
        metadata = file.metadata() or {}
    if metadata.get("kind") != kind or "config" not in metadata:
        raise MiniCogViewError(f"weight file {path} holds {metadata.get('kind')!r}, expected {kind!r}")
    return from_json(CONFIG_TYPES[kind], metadata["config"])


def has_weights(path: str | Path) -> bool:
    """Whether there is such a weight file, or several with an index in its place."""
    return Path(path).is_file() or Path(path).with_suffix(INDEX).is_file()


def load_weights(
    path: str | Path, kind: str, dtype: torch.dtype | None = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a file that ``save_model`` or ``minicogview import`` wrote.

    Args:
        dtype: of the floating-point weights; None leaves them as they are stored, mapped into memory and not read.

    Raises:
        MiniCogViewError: if the file is missing, damaged, or holds another kind of model.
    """
    config = load_config(path, kind)
    with open_weights(path) as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return config, {k: v.to(dtype or v.dtype) if v.is_floating_point() else v for k, v in state.items()}


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path, assign: bool = False) -> None:
    """Put weights into a model, refusing missing or unexpected names and wrong shapes by name.

    Args:
        assign: make these very tensors the model's own, instead of copying them.
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
    model.transformer.identity = identity(path)
    return model


def identity(path: str | Path) -> str:
    """What tells the weights of an index from others, by its checksums; empty for a single file."""
    index = Path(path).with_suffix(INDEX)
    return hashlib.sha256(json.dumps(Shards(index).sha256).encode()).hexdigest()[:16] if index.is_file() else ""


def fingerprint(model: Transformer) -> str:
    """What tells one set of weights from another: a hash of them, rounded to half precision as files keep them."""
    return model.identity or fingerprint_of(model.state_dict())


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """The same from the weights alone."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().half().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def stored_dtype(path: str | Path) -> torch.dtype:
    """Number format of the weights in a file, which is one for all."""
    with open_weights(path) as file:
        name = next(name for name in file.keys() if name.endswith("norm.weight"))  # noqa: SIM118 (not a dict)
        return cast(Tensor, file.get_tensor(name)).dtype


def same_as_coglm(path: str | Path, coglm: CogLM) -> list[str]:
    """Names of the weights of a super-resolution stage that only CogLM's file has."""
    with open_weights(path) as file:
        facts = file.metadata()
    return _shared(facts, coglm.transformer.state_dict()) if facts.get("base") else []


def _shared(facts: dict[str, str], transformer: Iterable[str]) -> list[str]:
    """Names of the shared weights by a file's header; without a list there, those of CogLM's whole transformer."""
    if "same_as_coglm" in facts:
        return cast(list[str], json.loads(facts["same_as_coglm"]))
    return [f"base.{name}" for name in transformer]


def save_direct(path: str | Path, model: DirectSR) -> None:
    """Write what ``DirectSR`` has beside CogLM's transformer; that one stays in CogLM's file."""
    save_model(path, model, model.config, "direct", leave_out="base.", base=fingerprint(model.base))


def load_part(
    path: str | Path, kind: str, base: Transformer | Path | None, dtype: torch.dtype | None = torch.float32
) -> tuple[SuperResolutionConfig, dict[str, Tensor]]:
    """Configuration and weights of a super-resolution stage, those included that only CogLM's file has.

    Args:
        base: CogLM's transformer, for a stage that shares weights with it; or its file, to read these from there.

    Raises:
        MiniCogViewError: as ``load_weights`` does; or if it belongs to other weights of CogLM.
    """
    config, state = load_weights(path, kind, dtype)
    with open_weights(path) as file:
        facts = file.metadata()
    if not facts.get("base"):
        return config, state
    weights: dict[str, Tensor] = {}
    if isinstance(base, Path):
        _, of_file = load_weights(base, "coglm", dtype)
        weights = {name.removeprefix("transformer."): value for name, value in of_file.items()}
        known = identity(base) or fingerprint_of(weights)
    elif base is not None and base.config == config.coglm.transformer:
        weights, known = base.state_dict(), fingerprint(base)
    if not weights or facts["base"] != known:
        raise MiniCogViewError(f"{path} was trained on top of another coglm.safetensors: train it again, or get both")
    return config, state | {name: weights[name.removeprefix("base.")] for name in _shared(facts, weights)}


def load_direct(path: str | Path, base: Transformer, dtype: torch.dtype | None = torch.float32) -> DirectSR:
    """Direct super-resolution on top of CogLM's transformer, in eval mode.

    The transformer is shared as a whole where all of its weights are CogLM's, and else weight by weight.

    Raises:
        MiniCogViewError: as ``load_part`` and ``load_into`` do.
    """
    config, state = load_part(path, "direct", base, dtype)
    own = {f"base.{name}": value.data_ptr() for name, value in base.state_dict().items()}
    shared = all(name in state and state[name].data_ptr() == place for name, place in own.items())
    with torch.device("meta"):
        model = DirectSR(config, base if shared else None).eval()
    load_into(model, state, path, assign=True)
    return model


def load_iterative(
    path: str | Path, base: Transformer | None = None, dtype: torch.dtype | None = torch.float32
) -> IterativeSR:
    """Iterative super-resolution, in eval mode; raises as ``load_part`` and ``load_into`` do."""
    config, state = load_part(path, "iterative", base, dtype)
    with torch.device("meta"):
        model = IterativeSR(config).eval()
    load_into(model, state, path, assign=True)
    return model
