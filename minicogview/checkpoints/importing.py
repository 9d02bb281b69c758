"""``minicogview import``: the released folders as safetensors files that this package loads.

The idea: everything is checked before anything is written: which parts are there, whether their names and shapes are
those of the models, whether the disk has room. Then one tensor after another is taken from the mapped files, given our
name, and written; so the memory in use stays small, whatever the size of the model. What is stopped goes on later.

Weights of the super-resolution models that are equal to CogLM's are not written again: the direct model's authors kept
CogLM frozen inside of it.

Mirrors: the folders of the official release, ``coglm``, ``cogview2-dsr`` and ``cogview2-itersr``, ``ice_image.pt`` and
``ice_text.model``, and the cluster labels of its sampler.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minicogview.checkpoints.files import identity, save_model
from minicogview.checkpoints.sat import SatFolder, open_torch_file, sat_config, sat_to_ours
from minicogview.checkpoints.shards import LIMIT, OnStep, free_room, n_bytes, write_shards
from minicogview.clusters import load_labels
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, Preset, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import from_official

MODELS = {"coglm": "coglm", "direct": "cogview2-dsr", "iterative": "cogview2-itersr"}  # ours: the release's folder
PICTURES, TEXT, LABELS = "ice_image.pt", "ice_text.model", "cluster_label.npy"


@dataclass
class Source:
    """One released model, checked: what is written under which name, and what CogLM's file already has."""

    kind: str
    folder: SatFolder
    config: Any
    names: dict[str, str]  # ours: the release's
    same: list[str] = dataclasses.field(default_factory=list)  # ours, not written: equal to CogLM's
    dtype: torch.dtype | None = None  # to write; None: as released

    def sizes(self) -> dict[str, int]:
        """Bytes of every weight that is written."""
        left_out = set(self.same)
        ranks = self.folder.ranks[0]
        return {
            ours: n_bytes(self.folder.shapes[theirs], self.dtype or ranks[theirs].dtype)
            for ours, theirs in self.names.items()
            if ours not in left_out
        }

    def get(self, ours: str) -> Tensor:
        """A weight by our name."""
        return self.folder.tensor(self.names[ours]).to(self.dtype)


def our_name(kind: str, theirs: str) -> str:
    """Name of a released parameter in the model of this kind; raises as ``sat_to_ours`` does."""
    prefix = "" if theirs.startswith("mixins.") else "transformer." if kind == "coglm" else "base."
    return prefix + sat_to_ours(theirs)


def build(kind: str, coglm: CogLMConfig, preset: Preset) -> tuple[nn.Module, Any]:
    """An empty model on the meta device, and its configuration."""
    with torch.device("meta"):
        if kind == "coglm":
            return CogLM(coglm), coglm
        config = dataclasses.replace(getattr(preset, kind), coglm=coglm)
        return (DirectSR(config) if kind == "direct" else IterativeSR(config)), config


def check_source(kind: str, folder: SatFolder, preset: Preset) -> Source:
    """Whether a released folder is what its name says, before anything is written.

    Raises:
        MiniCogViewError: if its sizes are not the preset's, or with the names that are missing, unexpected, or of
            another shape.
    """
    config = sat_config(folder.sizes, preset.coglm.ids, preset.coglm.layout, preset.vqvae.codebook_size)
    found, wanted = config.transformer, preset.coglm.transformer
    for name in ("n_layers", "d_model", "n_heads", "vocab_size"):
        if getattr(found, name) != getattr(wanted, name):
            raise MiniCogViewError(
                f"{folder.path} has {name} {getattr(found, name)}, the preset {preset.name} {getattr(wanted, name)}: "
                "it is another model, or wants another preset"
            )
    model, built = build(kind, config, preset)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names, unknown = {}, []
    for theirs in folder.shapes:
        try:
            names[our_name(kind, theirs)] = theirs
        except MiniCogViewError:
            unknown.append(theirs)
    unknown += [names[ours] for ours in names.keys() - own.keys()]
    missing = sorted(own.keys() - names.keys())
    shapes = [
        f"{names[ours]} {folder.shapes[names[ours]]} instead of {shape}"
        for ours, shape in own.items()
        if ours in names and folder.shapes[names[ours]] != shape
    ]
    problems = {"missing": missing, "unexpected": sorted(unknown), "of another shape": shapes}
    said = "; ".join(f"{what}: {', '.join(which[:5])}" for what, which in problems.items() if which)
    if said:
        raise MiniCogViewError(f"{folder.path} is not the {kind} model. {said}")
    return Source(kind, folder, built, names)


def equal_to_coglm(source: Source, coglm: Source) -> Iterator[str]:
    """Names of a super-resolution model's weights that CogLM has with the same numbers."""
    for ours in source.names:
        theirs = coglm.names.get(ours.replace("base.", "transformer.", 1)) if ours.startswith("base.") else None
        if theirs is None:
            continue
        one, other = source.folder.tensor(source.names[ours]), coglm.folder.tensor(theirs)
        if one.dtype == other.dtype and torch.equal(one, other):
            yield ours
        source.folder.let_go([source.names[ours]])
        coglm.folder.let_go([theirs])


def find_parts(source: Path) -> dict[str, Path]:
    """Which parts of the release a folder has, by our names of them."""
    parts = {kind: source / folder for kind, folder in MODELS.items() if (source / folder).is_dir()}
    files = {"vqvae": PICTURES, "text": TEXT, "labels": LABELS}
    return parts | {name: source / file for name, file in files.items() if (source / file).is_file()}


def import_released(
    source: str | Path,
    target: str | Path,
    preset: Preset,
    on_step: OnStep | None = None,
    limit: int = LIMIT,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Turn the released folders into a folder of weights for ``CogView2.from_pretrained``.

    Args:
        source: has any of the release's folders and files. target: is made if missing.
        preset: the sizes that are expected.
        on_step: called with a file's name, bytes written of its model, and of how many.
        limit: bytes in a file.
        dtype: number format of the written weights; None: as released. What is computed in the format of the files
            needs no copy: bfloat16 suits processors, the released half precision GPUs.

    Returns:
        ``parts`` that were imported, ``missing`` ones, ``bytes`` written.

    Raises:
        MiniCogViewError: if nothing is there, a part is not what it should be, or the disk is too small; then nothing
            was written.
    """
    source, target = Path(source), Path(target)
    parts = find_parts(source)
    if not parts:
        wanted = ", ".join([*MODELS.values(), PICTURES, TEXT])
        raise MiniCogViewError(f"{source} has no part of the release: expected any of {wanted}")
    models = {kind: check_source(kind, SatFolder(parts[kind]), preset) for kind in MODELS if kind in parts}
    vqvae = from_official(_vqvae_weights(parts["vqvae"])) if "vqvae" in parts else None
    if vqvae is not None and vqvae.config != preset.vqvae:
        raise MiniCogViewError(f"{parts['vqvae']} is not the picture tokenizer of the preset {preset.name}")
    if "labels" in parts:
        load_labels(parts["labels"], preset.vqvae.codebook_size)
    for kind, model in models.items():
        model.dtype = dtype
        if kind != "coglm" and "coglm" in models:
            model.same = list(equal_to_coglm(model, models["coglm"]))
    check_room(target, models)

    written = 0
    for kind, model in models.items():
        sizes = model.sizes()
        facts = {"kind": kind, "config": to_json(model.config)}
        if model.same:
            base = identity(target / "coglm.safetensors")
            facts |= {"same_as_coglm": json.dumps(model.same), "base": base}
        files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in model.folder.files]

        def let_go(file: str, done: int, total: int, model: Source = model) -> None:
            model.folder.let_go(model.folder.shapes)
            if on_step:
                on_step(file, done, total)

        write_shards(target, kind, sizes, model.get, facts, f"{files} {limit} {dtype}", on_step=let_go, limit=limit)
        written += sum(sizes.values())
    if vqvae is not None:
        save_model(target / "vqvae.safetensors", vqvae, vqvae.config, "vqvae", dtype=torch.float32)
    for name, file in (("text", "text.model"), ("labels", LABELS)):
        if name in parts:
            shutil.copyfile(parts[name], target / file)
    missing = [name for name in [*MODELS, "vqvae", "text", "labels"] if name not in parts]
    return {"parts": list(parts), "missing": missing, "bytes": written}


def _vqvae_weights(path: Path) -> dict[str, Tensor]:
    content = open_torch_file(path)
    weights = content.get("module", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise MiniCogViewError(f"{path} holds no picture tokenizer: expected a dictionary of tensors")
    return weights


def check_room(target: Path, models: dict[str, Source]) -> None:
    """Raise MiniCogViewError if the disk cannot hold what is still to be written."""
    there, free = free_room(target)
    already = sum(file.stat().st_size for file in target.glob("*.safetensors")) if target.is_dir() else 0
    needed = sum(sum(model.sizes().values()) for model in models.values()) - already
    if needed + 2**28 > free:
        raise MiniCogViewError(
            f"{there} has {free / 1e9:.1f} GB free, the weights take {needed / 1e9:.1f} GB more: make room, or choose "
            "another folder"
        )
