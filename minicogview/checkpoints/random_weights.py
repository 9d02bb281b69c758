"""Weights of full size that nobody trained: to see time and memory on a machine before 40 GB are downloaded.

The idea: how long a picture takes, and in how much memory, depends on the sizes of the weights and not on what they
learned. So a folder of random weights in exactly the form that ``minicogview import`` writes runs through the same code
as the real one, and draws noise. The text tokenizer is the toy's, filled up with unused pieces to the full number.

    minicogview generate "a red apple" --preset cogview2 --weights random --memory 6GB

Simplified: every matrix is cut from one block of normal numbers, since nothing here depends on their being independent.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor, nn

from minicogview.checkpoints.files import has_weights, identity, save_model
from minicogview.checkpoints.shards import OnStep, free_room, n_bytes, write_shards
from minicogview.coglm import CogLM
from minicogview.config import Preset, to_json
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import VQVAE

TOY_TEXT = Path(__file__).parents[1] / "weights" / "toy" / "text.model"
BLOCK = 2**24 + 1  # not a multiple of any width, so that rows differ


def random_folder(preset: Preset) -> Path:
    """Where the random weights of a preset are kept: in the user's folder for files that can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minicogview" / f"random-{preset.name}"


def random_tensor(name: str, shape: tuple[int, ...], block: Tensor, dtype: torch.dtype) -> Tensor:
    """Normal(0.02) for a matrix; norms that change nothing, and no bias."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=dtype)
    count = torch.Size(shape).numel()
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def models(preset: Preset) -> dict[str, nn.Module]:
    """All three stages on the meta device; the direct one stands on the first."""
    with torch.device("meta"):
        coglm = CogLM(preset.coglm)
        direct = DirectSR(preset.direct, coglm.transformer)
        return {"coglm": coglm, "direct": direct, "iterative": IterativeSR(preset.iterative)}


def sizes(kind: str, model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each weight that is written: of the direct stage those that CogLM does not have."""
    state = model.state_dict().items()
    return {n: n_bytes(tuple(v.shape), dtype) for n, v in state if not (kind == "direct" and n.startswith("base."))}


def write_random(
    folder: str | Path, preset: Preset, dtype: torch.dtype = torch.bfloat16, on_step: OnStep | None = None
) -> Path:
    """Write random weights for all stages of a preset; what was stopped goes on, what is there stays.

    Returns:
        the folder, for ``CogView2.from_pretrained``.

    Raises:
        MiniCogViewError: if the disk is too small; then nothing was written.
    """
    folder, stages = Path(folder), models(preset)
    missing = {k: m for k, m in stages.items() if not has_weights(folder / f"{k}.safetensors")}
    needed = sum(sum(sizes(kind, model, dtype).values()) for kind, model in missing.items())
    needed -= sum(file.stat().st_size for kind in missing for file in folder.glob(f"{kind}-*.safetensors"))
    there, free = free_room(folder)
    if needed + 2**30 > free:
        raise MiniCogViewError(
            f"{there} has {free / 1e9:.1f} GB free, random weights of {preset.name} take {needed / 1e9:.1f} GB more: "
            "make room, or set XDG_CACHE_HOME to a folder on another disk"
        )
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * 0.02).to(dtype)
    for kind, model in missing.items():
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        facts = {"kind": kind, "config": to_json(model.config)}
        if kind == "direct":
            shared = [name for name in shapes if name.startswith("base.")]
            facts |= {"same_as_coglm": json.dumps(shared), "base": identity(folder / "coglm.safetensors")}

        def get(name: str, shapes: dict[str, tuple[int, ...]] = shapes) -> Tensor:
            return random_tensor(name, shapes[name], block, dtype)

        write_shards(folder, kind, sizes(kind, model, dtype), get, facts, f"random {dtype}", on_step)
    if not has_weights(folder / "vqvae.safetensors"):
        torch.manual_seed(0)
        save_model(folder / "vqvae.safetensors", VQVAE(preset.vqvae), preset.vqvae, "vqvae", dtype=torch.float32)
    (folder / "text.model").write_bytes(text_model_of(preset.n_text_pieces))
    return folder


def text_model_of(n_pieces: int) -> bytes:
    """The toy's SentencePiece model, filled up with unused pieces.

    A SentencePiece model is a protobuf message, and in these a list grows by what is written behind the message:
    field 1 is a piece, in which field 1 is its text, 2 its score and 3 its type, of which 5 is "unused".
    """
    import sentencepiece

    model = TOY_TEXT.read_bytes()
    known = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    if n_pieces < known:
        raise MiniCogViewError(f"a text tokenizer of {n_pieces} pieces: at least {known} are needed")
    pieces = [model]
    for i in range(known, n_pieces):
        text = f"<unused{i}>".encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", 0.0) + b"\x18\x05"
        pieces.append(b"\x0a" + bytes([len(piece)]) + piece)
    return b"".join(pieces)
