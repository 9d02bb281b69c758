"""A step of drawing that is always the same work on the same memory, so that a GPU can record it once and replay it.

The idea: with one token per picture, a GPU needs less time to compute a small kernel than the CPU needs to launch it,
and a step has hundreds of kernels. A CUDA graph is such a sequence of launches, recorded once; replaying it costs a
single launch. For that, no shape and no address may change from step to step. So a tensor says where the new keys and
values go, attention runs over all places of the cache, and the bias forbids those that are still empty.

Nothing waits for the GPU on the way: tokens are chosen there, and the CPU runs ahead.

Mirrors: nothing; the original launches every kernel, and asks the GPU for a number in every layer of every step.

Shapes: ``B`` rows of a batch, ``R`` is B or 1, ``N`` heads, ``H`` head size, ``S`` places in the cache, ``D`` width.

On a CPU a launch costs nothing, but attending to empty places does. There the steps grow (``Transformer.forward``), and
the time goes into reading matrices (``packing.py``, ``quantization.py``). Compiling such a step on a CPU was tried and
gained less than packing does (docs/notes.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from minicogview.attention import MASKED
from minicogview.coglm import CogLM
from minicogview.transformer import KVCache, Transformer


class FixedCache(KVCache):
    """A cache whose next place is a tensor, so that writing to it is the same work in every step."""

    def __init__(self, cache: KVCache):
        self.k, self.v, self.length = cache.k, cache.v, cache.length  # the same memory
        self.k[..., self.length :, :] = 0  # what is multiplied by nothing must be a number
        self.v[..., self.length :, :] = 0
        self.place = torch.full((1,), self.length, device=self.k.device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``k, v`` (B, N, 1, H) at the next place; return what is in all places."""
        return self.k[layer].index_copy_(2, self.place, k), self.v[layer].index_copy_(2, self.place, v)

    def advance(self, n_tokens: int) -> None:
        """The place moves on outside of the step: see ``FixedStep``."""


class FixedStep:
    """One token for every row of a batch: ids in, hidden states out.

    Args:
        model: a transformer in eval mode. cache: holds the prompt already, and room for at least one token more.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self.model, self.cache = model, FixedCache(cache)
        (_, batch, _, places, _), device = cache.k.shape, cache.k.device
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.tokens)
        self.bias = torch.full((batch, 1, 1, places), MASKED, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self.hidden = self._record()  # which may write at the first empty place; the first step then fills it

    def __call__(self, tokens: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
        """Hidden states (B, D) of ``tokens`` (B, 1), which stand at ``positions`` (R, 1).

        Args:
            bias: (R, 1, 1, S so far) from ``attention_bias``; None lets the token look at all before it.
        """
        place = self.cache.length
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.bias[..., : place + 1] = 0 if bias is None else bias
        self.cache.place.fill_(place)
        self.cache.length += 1
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.hidden

    def _run(self) -> Tensor:
        return self.model(self.tokens, self.positions, self.bias, self.cache)[:, -1]

    def _record(self) -> Tensor:
        """Run once on a stream of its own, so that libraries set themselves up; then record a second run."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._run()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            return self._run()


@contextmanager
def fixed_steps(model: CogLM) -> Iterator[None]:
    """Within this context one call of ``CogLM.fill`` takes its steps one like the other."""
    fixed: list[FixedStep] = []

    def next_hidden(tokens: Tensor, positions: Tensor, bias: Tensor | None, cache: KVCache) -> Tensor:
        if not fixed:
            fixed.append(FixedStep(model.transformer, cache))
        return fixed[0](tokens, positions, bias)

    model.next_hidden = next_hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.next_hidden
