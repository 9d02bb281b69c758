"""One stage's weights at a time in memory: those of the others wait in their files.

The idea: drawing needs CogLM, the first sharpening CogLM and what the direct stage adds to it, the second the iterative
model alone. A module whose turn is over moves to torch's "meta" device, where tensors have shapes but no numbers; when
its turn comes, its file is read again. Nothing else knows: the modules stay the same objects.

Mirrors: the original moves whole models between GPU and CPU memory (``sr_pipeline/sr_group.py``), so a machine needs
room for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(eq=False)
class Offload:
    """Modules of which only those at work have weights in memory.

    Attributes:
        device: where weights go.
        modules: what there is to bring in, by name. read: what gives each one's weights.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> states = {"first": first.state_dict(), "second": second.state_dict()}
        >>> offload = Offload({"first": first, "second": second}, {name: lambda s=s: s for name, s in states.items()})
        >>> offload.need("second")
        >>> first.weight.device.type, second.weight.device.type
        ('meta', 'cpu')
    """

    modules: dict[str, nn.Module]
    read: dict[str, Callable[[], State]]
    device: torch.device | str = "cpu"
    in_memory: set[str] = field(default_factory=set)

    def need(self, *names: str) -> None:
        """Bring in these modules' weights, after letting go of all others'."""
        for name, module in self.modules.items():
            if name not in names:
                module.to("meta")
                self.in_memory.discard(name)
        for name in names:
            if name not in self.in_memory:
                state = {key: value.to(self.device) for key, value in self.read[name]().items()}
                self.modules[name].load_state_dict(state, assign=True)
                self.in_memory.add(name)
