"""Running a model that does not fit into memory: one layer after another, straight from the disk.

The idea: weights that are memory-mapped take up no memory until they are used, and their pages can be dropped
afterwards, since the file still has them. While one layer computes, a second thread reads the next one. So reading
hides behind the arithmetic wherever a pass takes longer to compute than to read: with thousands of tokens, as in
super-resolution, but not with one token at a time. On a GPU, the second thread also copies the layer over.

The operating system would read pages by itself when they are touched, but only then, and in small pieces; and it would
keep them until memory runs out. Source of the arithmetic: notebook 10. The original keeps all models in memory.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minicogview.lopar import IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.transformer import Transformer

PAGE = mmap.PAGESIZE


def forget_pages(tensor: Tensor) -> None:
    """Tell the operating system that a memory-mapped tensor's pages are not needed now, where it has such a call.

    Only for tensors that are mapped from a file and were never written to: others would lose their numbers.
    """
    start = -(-tensor.data_ptr() // PAGE) * PAGE  # whole pages alone
    length = (tensor.data_ptr() + tensor.nbytes - start) // PAGE * PAGE
    advise = getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_DONTNEED") else None
    if advise is not None and length > 0:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def mapped_from_files(tensors: Sequence[Tensor]) -> bool:
    """Whether all of these tensors lie in memory that files are mapped to, as far as the operating system tells."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    ranges = []
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            ranges.append([int(end, 16) for end in fields[0].split("-")])
    return all(any(start <= t.data_ptr() and t.data_ptr() + t.nbytes <= end for start, end in ranges) for t in tensors)


def touch(tensors: Sequence[Tensor]) -> None:
    """Make the operating system read all pages of mapped tensors, by looking at one byte of each."""
    for tensor in tensors:
        if tensor.numel():
            tensor.view(-1).view(torch.uint8)[::PAGE].max()


class Stream:
    """Reads the weights of one layer ahead of the work, and drops those of the layers behind it.

    Args:
        groups: the modules of each layer, on all levels. Their parameters should be mapped from files, see
            ``load_weights`` with ``dtype=None``; if they are not, nothing is dropped.
        device: where the layers compute. Weights that lie elsewhere are copied there, and the copy is dropped after
            use.
        dtype, vectors: number formats that matrices and vectors are converted to; None: as they are stored.

    Example:
        >>> layers = [nn.Linear(2, 2) for _ in range(3)]
        >>> stream = Stream([[layer] for layer in layers])
        >>> len(list(stream.walk(layers)))
        3
    """

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Module]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        vectors: torch.dtype | None = None,
    ) -> None:
        self.parameters = [[p for module in group for p in module.parameters()] for group in groups]
        self.stored = [[p.data for p in group] for group in self.parameters]
        self.device, self.dtype, self.vectors = torch.device(device), dtype, vectors or dtype
        self.mapped = mapped_from_files([tensor for group in self.stored for tensor in group])
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        # Copies to a GPU go on beside its work, in an order of their own.
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def walk(self, layers: Iterable[Any]) -> Iterator[Any]:
        """The layers one after another, each with its weights in memory while it computes."""
        ahead = self._read(0)
        for i, layer in enumerate(layers):
            weights, ahead = ahead.result(), self._read(i + 1)
            if self.copies is not None:
                torch.cuda.current_stream(self.device).wait_stream(self.copies)
            for parameter, weight in zip(self.parameters[i], weights, strict=True):
                parameter.data = weight
                if self.copies is not None:  # else its memory could be given away before the work is done
                    weight.record_stream(torch.cuda.current_stream(self.device))
            del weights
            yield layer
            for parameter, stored in zip(self.parameters[i], self.stored[i], strict=True):
                parameter.data = stored
                if self.mapped:
                    forget_pages(stored)

    def _read(self, i: int) -> Future[list[Tensor]]:
        return self.reader.submit(self._fetch, self.stored[i] if i < len(self.stored) else [])

    def _fetch(self, stored: list[Tensor]) -> list[Tensor]:
        """Weights on the device, in their number formats; where that changes nothing, the stored tensors themselves."""
        touch(stored)
        if self.copies is None:
            return [tensor.to(self.device, self._format(tensor)) for tensor in stored]
        with torch.cuda.stream(self.copies):
            return [tensor.to(self.device, self._format(tensor), non_blocking=True) for tensor in stored]

    def _format(self, tensor: Tensor) -> torch.dtype | None:
        return self.vectors if tensor.ndim == 1 else self.dtype


def stream_layers(
    model: Transformer | DirectSR | IterativeSR,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    vectors: torch.dtype | None = None,
) -> None:
    """From now on a model reads its layers from their file when their turn comes; arguments as for ``Stream``."""
    model.walk = Stream(stack(model), device, dtype, vectors).walk


def stack(model: Transformer | DirectSR | IterativeSR) -> list[tuple[nn.Module, ...]]:
    """The modules of each layer, of both levels where there are two."""
    if isinstance(model, DirectSR):
        fine = model.fine_layers if model.config.own_layers else model.fine_attention
        return list(zip(model.base.layers, fine, strict=True))
    layers = model.layers if isinstance(model, Transformer) else model.base.layers
    return [(layer,) for layer in layers]
