"""A step of drawing that is always the same work on the same memory, so that a GPU can record it once and replay it.

The idea: for one token per picture a GPU needs less time to compute a small kernel than the processor needs to launch
it, and a step has hundreds of them. A CUDA graph is such a sequence of launches, recorded once; replaying it costs one
launch. For that no shape and no address may change from step to step. So the new keys and values go where a tensor
says, attention runs over all places of the cache, and a row of the bias forbids those that are still empty.

Nothing waits for the GPU on the way: tokens are chosen there, and the processor runs ahead.

Mirrors: nothing; the original launches every kernel, and asks the GPU for a number in every layer of every step.

Shapes: ``B`` rows of a batch, ``R`` is B or 1, ``S`` places in the cache, ``D`` width.

On a CPU launching costs nothing, and attending to empty places does: there steps grow (``Transformer.forward``), and
the time goes into reading matrices (``scale/packing.py``, ``scale/quantization.py``). Compiling such a step was tried there and
gave less than packing does (docs/notes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicogview.transformer import MASKED, KVCache, Transformer


def fixed_steps_pay(model: Transformer) -> bool:
    """Whether drawing with this model should take fixed steps: on a GPU, with whole layers at hand."""
    whole = all(type(parameter.data) is Tensor for parameter in model.layers[0].parameters())  # see ``scale/parallel.py``
    return model.token_embedding.weight.device.type == "cuda" and model.stream is None and whole


class FixedStep:
    """One token for every row of a batch: ids in, hidden states out.

    Args:
        model: a transformer in eval mode. cache: holds the prompt already, and room for at least one token more.
        bias: (R, 1, S + 1, S + 1) from ``attention_bias``, for the whole sequence.
    """

    def __init__(self, model: Transformer, cache: KVCache, bias: Tensor):
        self.model, self.cache = model, cache
        batch, places = cache.k.shape[1], cache.k.shape[3]
        device = cache.k.device
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        later = torch.ones(places, places, dtype=torch.bool, device=device).triu(1)
        self.biases = bias[:, :, :places, :places].masked_fill(later, MASKED)  # of all steps
        self.bias = torch.zeros_like(self.biases[:, :, :1])  # (R, 1, 1, S), of this one
        cache.k[..., cache.length :, :] = 0  # what is multiplied by nothing must be a number
        cache.v[..., cache.length :, :] = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        # Recording may write at the first empty place, which the first step then fills.
        cache.place = torch.full((1,), cache.length, device=device)
        if device.type == "cuda":
            self.hidden = self._record()

    def __call__(self, tokens: Tensor, positions: Tensor, place: int) -> Tensor:
        """Hidden states (B, D) of ``tokens`` (B, 1), which stand at ``positions`` (R, 1) and
        at ``place`` in the cache."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.bias.copy_(self.biases[:, :, place : place + 1])
        assert self.cache.place is not None
        self.cache.place.fill_(place)
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
