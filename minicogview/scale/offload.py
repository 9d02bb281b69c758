"""Only one stage's weights in memory at a time; those of the other stages wait in their files.

The idea: drawing needs CogLM, the direct stage needs CogLM and what it adds to it, the iterative stage needs its own
model alone. A module that has done its work moves to torch's "meta" device, where tensors have shapes but no numbers.
When its turn comes again, its file is read again. Quantized weights take a while to make, so they are not thrown away:
while a GPU does without them they wait in the CPU's memory. The rest of the package notices nothing, because the
modules stay the same objects.

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
    """Modules of which only those at work have weights on a device.

    Attributes:
        device: where weights go.
        modules: all modules, by name. bring: for each name, the function that gives the module its weights.
        stays: names of modules that are not read again but wait in the CPU's memory.
        stands_on: for a module that needs another one to work, the name of that one.
        loaded: names of modules that have weights, on the device or, if they stay, in the CPU's memory.

    Example:
        >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> offload = Offload("cpu")
        >>> for name, module in (("first", first), ("second", second)):
        ...     state = module.state_dict()
        ...     offload.add(name, module, lambda m=module, s=state: m.load_state_dict(s, assign=True))
        >>> offload.need("second")
        >>> first.weight.device.type, second.weight.device.type
        ('meta', 'cpu')
    """

    device: torch.device | str = "cpu"
    modules: dict[str, nn.Module] = field(default_factory=dict)
    bring: dict[str, Callable[[], object]] = field(default_factory=dict)
    stays: set[str] = field(default_factory=set)
    stands_on: dict[str, str] = field(default_factory=dict)
    loaded: set[str] = field(default_factory=set)

    def add(self, name: str, module: nn.Module, bring: Callable[[], object], stays: bool = False) -> None:
        """One more module; ``bring`` gives it weights on the device."""
        self.modules[name], self.bring[name] = module, bring
        if stays:
            self.stays.add(name)

    def need(self, *names: str) -> None:
        """Bring in the weights of these modules and of what they stand on, after letting go of all others'."""
        names = (*(self.stands_on[name] for name in names if name in self.stands_on), *names)
        for name in self.modules.keys() - set(names):
            if name in self.stays and name in self.loaded:
                self.modules[name].to("cpu")
            else:
                self.modules[name].to("meta")
                self.loaded.discard(name)
        for name in names:
            if name not in self.loaded:
                self.bring[name]()
                self.loaded.add(name)
            elif name in self.stays:
                self.modules[name].to(self.device)
