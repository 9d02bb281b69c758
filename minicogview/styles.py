"""The original's style recipes: words added to the prompt, and sampler settings that suit them.

The idea: captions of the original's training pictures ended in words such as "oil painting style", so adding the same
words to a prompt asks for that look. Weights that never saw these words in training, such as the toy's, do not know
them. The recipes come from CogView2's released code, ``cogview2_text2image.py``.

Different on purpose: two of the recipes' temperatures never reach the original's super-resolution stages, and the
iterative stage's top-k is overwritten by its schedule; these settings are left out here.

Example:
    >>> STYLES["oil"].text("a cat")
    'a cat 油画风格'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minicogview.errors import MiniCogViewError
from minicogview.pipeline import CogView2


@dataclass(frozen=True)
class Style:
    """Words to add to a prompt, and the sampler settings that differ from the preset's."""

    suffix: str  # added at the end of the prompt
    sampling: dict[str, Any] = field(default_factory=dict)  # settings of the first stage
    direct: dict[str, Any] = field(default_factory=dict)  # settings of the direct stage

    def text(self, text: str) -> str:
        """The text with the style's words added."""
        return f"{text} {self.suffix}".strip()

    def model(self, model: CogView2) -> CogView2:
        """The same weights with the style's sampler settings."""
        upsampler = model.upsampler
        if upsampler is not None:
            sampling = dataclasses.replace(upsampler.preset.direct_sampling, **self.direct)
            preset = dataclasses.replace(upsampler.preset, direct_sampling=sampling)
            upsampler = dataclasses.replace(upsampler, preset=preset)
        return dataclasses.replace(model, sampling=model.settings(self.sampling), upsampler=upsampler)


_FLAT = {"top_k": 5, "cluster_temperature": 0.4}

STYLES: dict[str, Style] = {
    "none": Style(""),
    "mainbody": Style("高清摄影 隔绝"),  # high-definition photograph, isolated; the original's default
    "photo": Style("高清摄影"),
    "flat": Style("平面风格", {"temperature": 1.1}, _FLAT),
    "comics": Style("漫画 隔绝", {"temperature": 1.1}, _FLAT),
    "oil": Style("油画风格"),
    "sketch": Style("素描风格", {"temperature": 1.1}),
    "isometric": Style("等距矢量图", {"temperature": 1.1}),
    "chinese": Style("水墨国画", {"temperature": 1.12}),  # ink painting
    "watercolor": Style("水彩画风格"),
}


def get_style(name: str) -> Style:
    """The style of this name.

    Raises:
        MiniCogViewError: if there is no such style; the message lists them all.
    """
    if name not in STYLES:
        raise MiniCogViewError(f"unknown style {name!r}: choose one of {', '.join(STYLES)}")
    return STYLES[name]
