"""``minicogview import``: the released folders as safetensors files that this package loads.

The idea: everything is checked before anything is written: which parts are there, whether their names and shapes are
those of the models, and whether the disk has room. Then one tensor after another is taken from the memory-mapped files,
given our name, and written, so memory use stays small for a model of any size. The same call resumes an interrupted
import.

Weights of the super-resolution models that are equal to CogLM's are not written again: the authors kept CogLM frozen
inside the direct stage.

Mirrors: the folders of the official release, ``coglm``, ``cogview2-dsr`` and ``cogview2-itersr``, ``ice_image.pt`` and
``ice_text.model``, and the cluster labels of its sampler.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minicogview.checkpoints.reading import check_finite, check_tensor, refuse_pointer, refusing, replace_sum, shown
from minicogview.checkpoints.sat import SatFolder, open_torch_file, sat_config, sat_to_ours
from minicogview.checkpoints.shards import LIMIT, OnStep, free_room, n_bytes, write_shards
from minicogview.checkpoints.weight_files import FILES, save_model, sharing_facts
from minicogview.clusters import load_labels
from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, Preset, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import VQVAE, from_official

# Our name of each part of the system: the name of its folder or file in the release.
MODELS = {"coglm": "coglm", "direct": "cogview2-dsr", "iterative": "cogview2-itersr"}
PICTURES, TEXT = "ice_image.pt", "ice_text.model"
RELEASED = {**MODELS, "vqvae": PICTURES, "text": TEXT, "labels": "cluster_label.npy"}


@dataclass
class Source:
    """One released model that was checked: which weights to write under which names, and which CogLM's file has."""

    kind: str
    folder: SatFolder
    config: Any
    names: dict[str, str]  # our name: the release's
    same: list[str] = dataclasses.field(default_factory=list)  # our names of those equal to CogLM's: not written
    dtype: torch.dtype | None = None  # of the written weights; None: as released
    ignored: list[str] = dataclasses.field(default_factory=list)  # the release's names of weights that are not ours

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
        """A weight by our name, without NaN and infinity."""
        value = self.folder.tensor(self.names[ours])
        check_finite(self.names[ours], value, self.folder.path)
        return value.to(self.dtype)


def find_parts(source: Path) -> dict[str, Path]:
    """Which parts of the release a folder has, by our names of them."""
    paths = {part: source / name for part, name in RELEASED.items()}
    return {part: path for part, path in paths.items() if (path.is_dir() if part in MODELS else path.is_file())}


# --- checks, before anything is written


def our_name(kind: str, theirs: str) -> str:
    """Our name of a released parameter of a model of this kind; raises as ``sat_to_ours`` does."""
    prefix = "" if theirs.startswith("mixins.") else "transformer." if kind == "coglm" else "base."
    return prefix + sat_to_ours(theirs)


def build(kind: str, coglm: CogLMConfig, preset: Preset) -> tuple[nn.Module, Any]:
    """An empty model on the meta device, and its configuration."""
    with torch.device("meta"):
        if kind == "coglm":
            return CogLM(coglm), coglm
        config = dataclasses.replace(getattr(preset, kind), coglm=coglm)
        return (DirectSR(config) if kind == "direct" else IterativeSR(config)), config


def check_source(kind: str, folder: SatFolder, preset: Preset, ignore_unexpected: bool = False) -> Source:
    """A released folder, after making sure that it holds the model that its name promises.

    Args:
        ignore_unexpected: list parameters that the model does not have, instead of raising; the original's loader
            ignores them.

    Raises:
        MiniCogViewError: if its sizes are not the preset's; or with the names of parameters that are missing,
            unexpected, or have another shape.
    """
    config = sat_config(folder.sizes, preset.coglm.ids, preset.coglm.layout, preset.vqvae.codebook_size, folder.shapes)
    found, wanted = config.transformer, preset.coglm.transformer
    for name in ("n_layers", "d_model", "n_heads", "vocab_size"):
        if getattr(found, name) != getattr(wanted, name):
            raise MiniCogViewError(
                f"{folder.path} has {name} {getattr(found, name)}, the preset {preset.name} {getattr(wanted, name)}: "
                "it is another model, or needs another --preset"
            )
    model, built = build(kind, config, preset)
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names, unknown = {}, []
    for theirs in folder.shapes:
        try:
            names[our_name(kind, theirs)] = theirs
        except MiniCogViewError:
            unknown.append(theirs)
    unknown += [names.pop(ours) for ours in names.keys() - own.keys()]
    ignored = sorted(unknown) if ignore_unexpected else []
    missing = sorted(own.keys() - names.keys())
    shapes = [
        f"{names[ours]} {folder.shapes[names[ours]]} instead of {shape}"
        for ours, shape in own.items()
        if ours in names and folder.shapes[names[ours]] != shape
    ]
    problems = {"missing": missing, "unexpected": [] if ignored else sorted(unknown), "of another shape": shapes}
    said = "; ".join(f"{what}: {', '.join(which[:5])}" for what, which in problems.items() if which)
    if said:
        raise MiniCogViewError(f"{folder.path} is not the {kind} model. {shown(said, 1000)}")
    return Source(kind, folder, built, names, ignored=ignored)


def equal_to_coglm(source: Source, coglm: Source) -> Iterator[str]:
    """Names of a super-resolution model's weights that are equal to CogLM's, number for number."""
    for ours in source.names:
        theirs = coglm.names.get(ours.replace("base.", "transformer.", 1)) if ours.startswith("base.") else None
        if theirs is None:
            continue
        one, other = source.folder.tensor(source.names[ours]), coglm.folder.tensor(theirs)
        if one.dtype == other.dtype and torch.equal(one, other):
            yield ours
        source.folder.let_go([source.names[ours]])
        coglm.folder.let_go([theirs])


def check_vqvae(path: Path, preset: Preset) -> VQVAE:
    """The released picture tokenizer.

    Raises:
        MiniCogViewError: if the file holds something else, or a tokenizer of other sizes than the preset's.
    """
    content = open_torch_file(path)
    weights = content.get("module", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise MiniCogViewError(f"{path} holds no picture tokenizer: expected a dictionary of tensors")
    for name, value in weights.items():
        check_tensor(name, value, path)
        check_finite(name, value, path)
    with refusing(path, "is not a picture tokenizer", "copy it again"):
        vqvae = from_official(weights)
    if vqvae.config != preset.vqvae:
        raise MiniCogViewError(f"{path} is not the picture tokenizer of the preset {preset.name}")
    return vqvae


def check_room(target: Path, models: dict[str, Source]) -> None:
    """Raise MiniCogViewError unless the disk has room for the files that are still to be written."""
    there, free = free_room(target)
    already = sum(file.stat().st_size for file in target.glob("*.safetensors")) if target.is_dir() else 0
    needed = sum(sum(model.sizes().values()) for model in models.values()) - already
    if needed + 2**28 > free:
        raise MiniCogViewError(
            f"{there} has {free / 1e9:.1f} GB free, the weights take {needed / 1e9:.1f} GB more: free some space, or "
            "choose another folder"
        )


# --- the import


def import_released(
    source: str | Path,
    target: str | Path,
    preset: Preset,
    on_step: OnStep | None = None,
    limit: int = LIMIT,
    dtype: torch.dtype | None = None,
    ignore_unexpected: bool = False,
) -> dict[str, Any]:
    """Turn the released folders into a folder of weights for ``CogView2.from_pretrained``.

    Args:
        source: folder with any of the release's folders and files.
        target: folder for the weights, made if missing.
        preset: the sizes that are expected.
        on_step: called with a file's name, and how many bytes of how many of its model are written.
        limit: bytes in a file.
        dtype: of the written weights; None: as released. Weights that are stored in the dtype of the computation can
            be used without a copy: bfloat16 suits CPUs, the released float16 suits GPUs.
        ignore_unexpected: leave out parameters that the models do not have, instead of raising.

    Returns:
        ``parts`` that were imported, ``missing`` ones, ``bytes`` written, parameters that were ``ignored``.

    Raises:
        MiniCogViewError: if there is nothing to import, a part is not what it should be, or the disk is too small. In
            all of these cases nothing was written.
    """
    source, target = Path(source), Path(target)
    parts = find_parts(source)
    if not parts:
        raise MiniCogViewError(f"{source} has no part of the release: expected any of {', '.join(RELEASED.values())}")
    models = {
        kind: check_source(kind, SatFolder(parts[kind]), preset, ignore_unexpected) for kind in MODELS if kind in parts
    }
    vqvae = check_vqvae(parts["vqvae"], preset) if "vqvae" in parts else None
    if "labels" in parts:
        load_labels(parts["labels"], preset.vqvae.codebook_size)
    for kind, model in models.items():
        model.dtype = dtype
        if kind != "coglm" and "coglm" in models:
            model.same = list(equal_to_coglm(model, models["coglm"]))
    check_room(target, models)

    for model in models.values():
        write_model(model, target, on_step, limit)
    if vqvae is not None:
        save_model(target / FILES["vqvae"], vqvae, vqvae.config, "vqvae", dtype=torch.float32)
    for part in ("text", "labels"):
        if part in parts:
            refuse_pointer(parts[part])
            shutil.copyfile(parts[part], target / FILES[part])
            replace_sum(target / FILES[part])
    written = sum(sum(model.sizes().values()) for model in models.values())
    return {
        "parts": list(parts),
        "missing": [part for part in RELEASED if part not in parts],
        "bytes": written,
        "ignored": [name for model in models.values() for name in model.ignored],
    }


def write_model(model: Source, target: Path, on_step: OnStep | None, limit: int) -> None:
    """Write one released model as files with an index, or the files that an interrupted import left to do."""
    facts = {"kind": model.kind, "config": to_json(model.config)}
    if model.same:
        facts |= sharing_facts(model.same, target / FILES["coglm"])
    files = [(file.stat().st_size, file.stat().st_mtime_ns) for file in model.folder.files]

    def after_file(file: str, done: int, total: int) -> None:
        model.folder.let_go(model.folder.shapes)
        if on_step:
            on_step(file, done, total)

    came_from = f"{files} {limit} {model.dtype}"
    write_shards(target, model.kind, model.sizes(), model.get, facts, came_from, after_file, limit)
