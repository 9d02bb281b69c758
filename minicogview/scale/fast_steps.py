"""Drawing token by token, as fast as this machine can: what ``CogLM.decoding`` is set to.

The idea: a step of drawing has one token for each picture, so its time does not go into arithmetic. On a GPU it goes
into launching hundreds of small kernels, so a step is recorded once and replayed (``graphs.py``). On a CPU it goes into
reading matrices, so they are kept in a form that is read faster (``packing.py``). All of this is put in from outside,
for the time of one call; ``CogLM`` knows nothing of it.

A small model draws on one thread. Its steps are too short to be shared out: a second thread gains nothing, but waits in
a loop for the next piece of work. Where another program uses the cores as well, two such threads hold each other up:
four pictures of the toy took 14.5 to 20.9 seconds of computing instead of 2.5 to 2.8 (docs/notes.md).

Example:
    >>> model = CogLM(get_preset("toy").coglm)
    >>> model.decoding = fast_steps
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from minicogview.coglm import CogLM
from minicogview.config import get_preset
from minicogview.scale.graphs import fixed_steps
from minicogview.scale.machine import is_small, one_thread
from minicogview.scale.packing import pack, packed

__all__ = ["fast_steps", "get_preset"]


@contextmanager
def fast_steps(model: CogLM, rows: int) -> Iterator[None]:
    """Within this context a model's single steps, with ``rows`` rows each, take the fastest way on this machine."""
    transformer = model.transformer
    whole = all(type(parameter.data) is Tensor for parameter in transformer.layers[0].parameters())  # see parallel.py
    at_hand = whole and transformer.walk is iter
    with ExitStack() as stack:
        if any(part._compiled_call_impl is not None for part in model.modules()):
            # Compiled for training: the steps grow, so each would be compiled anew.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if at_hand and model.device.type == "cuda":
            stack.enter_context(fixed_steps(model))
        elif at_hand:
            if is_small(transformer):
                stack.enter_context(one_thread())
            stack.enter_context(packed(transformer, rows))
            stack.enter_context(packed_head(model, rows))
        yield


@contextmanager
def packed_head(model: CogLM, rows: int) -> Iterator[None]:
    """Within this context logits over picture codes come from a packed copy of their rows of the token table."""
    table = model.transformer.token_embedding
    head = pack(table, table.weight[: model.config.n_codes], None, rows)
    if head is None:
        yield
        return
    model.code_logits = head  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del model.code_logits
