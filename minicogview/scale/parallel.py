"""Tensor parallelism: one model split over several processes, each with a part of every layer.

The idea: attention heads do not need one another before the output projection, nor do the columns of an MLP. So each
of R ranks keeps N / R heads and 4D / R columns of every layer and multiplies with those alone; the two sums over ranks
that a layer then needs (after ``out`` and after ``down``) are all that is sent. Drawing waits for weights to come from
memory, and R memories are read at once. Shoeybi et al. 2019 (arXiv 1909.08053), section 3. For models as small as the
toy it is slower: a product of DTensors takes some tenths of a millisecond before it begins, and nothing is packed.

Mirrors: the model parallelism of SwissArmyTransformer 0.2.1, ``mpu/layers.py`` and ``mpu/transformer.py``, here with
PyTorch's own DTensor.

Different on purpose: norms and the token and position tables are whole on every rank, as they are on one machine, where
the original splits the token table as well. For inference, with weights that every rank has read from the same file.

Shapes: ``R`` ranks, ``N`` heads, ``H`` head size, ``D`` model width = N * H.

Example: ``torchrun --nproc-per-node 2 draw.py``, where ``draw.py`` is

    from minicogview.scale.parallel import process_group, shard_pipeline
    from minicogview.pipeline import CogView2

    with process_group("cpu") as mesh:  # or "cuda"
        model = CogView2.from_pretrained("toy")
        shard_pipeline(model, mesh)
        pictures = model.generate("a red apple", n=2)  # on every rank: they work together
        if mesh.get_rank() == 0:
            pictures[0].save("apple.png")
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from minicogview.errors import MiniCogViewError
from minicogview.transformer import MLP, Attention, Block, Transformer

if TYPE_CHECKING:
    from minicogview.pipeline import CogView2

PARTS = {Attention: ("qkv", "out"), MLP: ("up", "down")}  # the first is split by outputs, the second by inputs


@contextmanager
def process_group(device: str = "cpu") -> Iterator[DeviceMesh]:
    """Connect the processes that ``torchrun`` has started; within, only rank 0 prints to stdout.

    Args:
        device: "cpu" (they talk by gloo) or "cuda" (by nccl; each process takes the GPU of its local rank).

    Returns:
        a mesh of one dimension; ``mesh.get_rank()`` tells who one is.

    Raises:
        MiniCogViewError: if ``torchrun`` did not start this process, or it has no GPU for it.
    """
    if "LOCAL_RANK" not in os.environ:
        raise MiniCogViewError("this process was not started by torchrun: use torchrun --nproc-per-node 2 SCRIPT")
    local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device == "cuda":
        if local >= n_gpus:
            raise MiniCogViewError(f"process {local} has no GPU, there are {n_gpus}: start one process for each")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        with redirect_stdout(io.StringIO() if dist.get_rank() else sys.stdout):
            yield init_device_mesh(device, (dist.get_world_size(),))
    finally:
        dist.destroy_process_group()


def by_rank(qkv: Tensor, ranks: int) -> Tensor:
    """Rows [q | k | v] of a joint projection (3D, ...) in the order [q | k | v of rank 0], [q | k | v of rank 1] ..."""
    return rearrange(qkv, "(three r rows) ... -> (r three rows) ...", three=3, r=ranks)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split all attentions and MLPs of a model over the ranks, in place, and move it to the mesh's device.

    Layers that are split already stay as they are, since stages share layers. From then on ``record.maps`` has the
    rank's own heads, and every rank has to call the model with inputs of the same shapes.

    Args:
        model: a Transformer, CogLM, DirectSR or IterativeSR, or a list of them; the same weights on every rank. On a
            GPU's mesh it may come from the CPU: its matrices are moved one by one, and only a part of each stays.

    Raises:
        MiniCogViewError: if the ranks cannot have equally many heads, or layers are quantized or without weights.
    """
    ranks = mesh.size()
    parts: list[Any] = [part for part in model.modules() if type(part) in PARTS]
    for part in parts:
        check(part, ranks)
    for base in model.modules():
        if isinstance(base, Transformer) and not is_split(cast(Block, base.layers[0]).mlp):
            base.token_embedding.register_forward_pre_hook(same_tokens)
    for part in parts:
        if is_split(part):
            continue
        if isinstance(part, Attention):
            for tensor in part.qkv.parameters():
                tensor.data = by_rank(tensor.data, ranks)  # so that a slice of the rows is a rank's own q, k and v
            part.n_heads //= ranks
        plan = dict(zip(PARTS[type(part)], (ColwiseParallel(), RowwiseParallel()), strict=True))
        parallelize_module(part, mesh, plan, src_data_rank=None)  # None: all cut their slices from their own copies
    model.to(mesh.device_type)


def is_split(part: nn.Module) -> bool:
    """Whether an attention or MLP has been split."""
    return any(isinstance(tensor, DTensor) for tensor in part.parameters())


def check(part: nn.Module, ranks: int) -> None:
    """Raise MiniCogViewError if an attention or MLP cannot be split over ``ranks`` processes."""
    linear = [getattr(part, name) for name in PARTS[type(part)]]
    if not all(isinstance(layer, nn.Linear) for layer in linear):
        raise MiniCogViewError("quantized layers cannot be split over processes: load the weights in full precision")
    if any(layer.weight.is_meta for layer in linear):
        raise MiniCogViewError("layers without weights cannot be split over processes: load them without offloading")
    if isinstance(part, Attention) and not is_split(part) and part.n_heads % ranks:
        raise MiniCogViewError(f"{part.n_heads} attention heads cannot be split over {ranks} processes: use a divisor")


def same_tokens(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Rank 0's tokens for all, before they are embedded.

    All ranks have the same logits and seeds, but a GPU's cumulative sums may differ from run to run, and with them,
    once in a long while, a token.
    """
    tokens = args[0].clone(memory_format=torch.contiguous_format)
    dist.broadcast(tokens, src=0)
    return (tokens,)


def shard_pipeline(model: CogView2, mesh: DeviceMesh) -> None:
    """Split all stages of a pipeline over the ranks, in place; the VQVAE is whole on every rank.

    Raises:
        MiniCogViewError: as ``shard``; or if the stages are brought in one by one, or layers come from the disk.
    """
    later = [] if model.upsampler is None else [model.upsampler.direct, model.upsampler.iterative]
    stages = nn.ModuleList(stage for stage in [model.coglm, *later] if stage is not None)
    if model.offload is not None or any(getattr(module, "walk", iter) is not iter for module in stages.modules()):
        raise MiniCogViewError("split over processes all stages stay in memory: load them without offloading")
    shard(stages, mesh)
    model.vqvae.to(mesh.device_type)
