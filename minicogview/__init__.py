"""minicogview: CogView2 rebuilt step by step, one module and one notebook for each concept.

    from minicogview import CogView2
    CogView2.from_pretrained("toy").generate("a red apple", n=4, seed=0)

Importing the package costs next to nothing, because each public name is imported from its module on first use: torch
is loaded with the first model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minicogview.scale import threads  # noqa: F401 (before torch is loaded)

if TYPE_CHECKING:
    from minicogview.config import PRESETS, get_preset
    from minicogview.errors import MiniCogViewError
    from minicogview.pipeline import CogView2
    from minicogview.results import Pictures

__version__ = "0.1.0"
__all__ = ["CogView2", "Pictures", "PRESETS", "get_preset", "MiniCogViewError", "__version__"]

_HOME = {
    "CogView2": "pipeline",
    "Pictures": "results",
    "PRESETS": "config",
    "get_preset": "config",
    "MiniCogViewError": "errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'minicogview' has no attribute {name!r}")
    return getattr(import_module(f"minicogview.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(globals() | dict.fromkeys(__all__))
