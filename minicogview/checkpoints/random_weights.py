"""Untrained weights of full size, to measure time and memory on a machine before downloading 40 GB.

The idea: how long a picture takes, and how much memory, depends on the sizes of the weights and not on their values. So
a folder of random weights in exactly the form that ``minicogview import`` writes runs through the same code as the real
one, and draws noise. The text tokenizer is the toy's, padded with unused pieces to the full vocabulary.

    minicogview generate "a red apple" --preset cogview2 --weights random --memory 6GB

Simplified: every matrix repeats one block of normal numbers, since nothing here needs independent ones.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from minicogview.checkpoints.shards import OnStep, free_room, n_bytes, write_shards
from minicogview.checkpoints.weight_files import FILES, has_weights, save_model, sharing_facts
from minicogview.coglm import CogLM
from minicogview.config import Preset, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import VQVAE

TOY_TEXT = Path(__file__).parents[1] / "weights" / "toy" / FILES["text"]
BLOCK = 2**24 + 1  # not a multiple of any width, so that the rows of a matrix differ


def random_folder(preset: Preset) -> Path:
    """Where the random weights of a preset are kept: in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minicogview" / f"random-{preset.name}"


def random_tensor(name: str, shape: tuple[int, ...], block: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal(0.02) for a matrix, ones for the weights of a norm, zeros for a bias."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def models(preset: Preset) -> dict[str, nn.Module]:
    """All three stages on the meta device, the direct stage on top of CogLM's transformer."""
    with torch.device("meta"):
        coglm = CogLM(preset.coglm)
        direct = DirectSR(preset.direct, coglm.transformer)
        return {"coglm": coglm, "direct": direct, "iterative": IterativeSR(preset.iterative)}


def sizes(kind: str, model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each weight that is written; the direct stage leaves out those of CogLM's transformer."""
    state = model.state_dict().items()
    return {n: n_bytes(tuple(v.shape), dtype) for n, v in state if not (kind == "direct" and n.startswith("base."))}


def write_random(
    folder: str | Path, preset: Preset, dtype: torch.dtype = torch.bfloat16, on_step: OnStep | None = None
) -> Path:
    """Write random weights for all stages of a preset; files that are complete are kept, so it can be interrupted.

    Returns:
        the folder, for ``CogView2.from_pretrained``.

    Raises:
        MiniCogViewError: if the disk is too small; then nothing was written.
    """
    folder, stages = Path(folder), models(preset)
    missing = {k: m for k, m in stages.items() if not has_weights(folder / FILES[k])}
    needed = sum(sum(sizes(kind, model, dtype).values()) for kind, model in missing.items())
    needed -= sum(file.stat().st_size for kind in missing for file in folder.glob(f"{kind}-*.safetensors"))
    there, free = free_room(folder)
    if needed + 2**30 > free:
        raise MiniCogViewError(
            f"{there} has {free / 1e9:.1f} GB free, random weights of {preset.name} take {needed / 1e9:.1f} GB more: "
            "free some space, or set XDG_CACHE_HOME to a folder on another disk"
        )
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * 0.02).to(dtype)
    for kind, model in missing.items():
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        facts = {"kind": kind, "config": to_json(model.config)}
        if kind == "direct":
            shared = [name for name in shapes if name.startswith("base.")]
            facts |= sharing_facts(shared, folder / FILES["coglm"])

        def get(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> Tensor:
            return random_tensor(name, shapes[name], block, dtype)

        write_shards(folder, kind, sizes(kind, model, dtype), get, facts, f"random {dtype}", on_step)
    if not has_weights(folder / FILES["vqvae"]):
        torch.manual_seed(0)
        save_model(folder / FILES["vqvae"], VQVAE(preset.vqvae), preset.vqvae, "vqvae", dtype=torch.float32)
    (folder / FILES["text"]).write_bytes(text_model_of(preset.n_text_pieces))
    return folder


def text_model_of(n_pieces: int) -> bytes:
    """The toy's SentencePiece model, padded with unused pieces to ``n_pieces``.

    A SentencePiece model is a protobuf message, and bytes that are appended to a message add entries to its lists.
    Field 1 is a piece; in it, field 1 is the text, field 2 the score and field 3 the type, where 5 means "unused".

    Raises:
        MiniCogViewError: if the toy's model already has more pieces.
    """
    import sentencepiece

    model = TOY_TEXT.read_bytes()
    known = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    if n_pieces < known:
        raise MiniCogViewError(f"a text tokenizer of {n_pieces} pieces is too small: use {known} or more")
    pieces = [model]
    for i in range(known, n_pieces):
        text = f"<unused{i}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x05"
        pieces.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(pieces)
