"""What is counted on the meta device agrees with the real models and with formulas."""

from __future__ import annotations

import pytest
import torch
from tiny import TINY
from torch.utils.flop_counter import FlopCounterMode

from minicogview.coglm import CogLM
from minicogview.config import get_preset
from minicogview.evaluation.cost import costs, draw_flops
from minicogview.lopar import IterativeSR
from minicogview.scale import packing
from minicogview.super_resolution import DirectSR
from minicogview.vqvae import VQVAE


def test_parameters_are_those_of_the_real_models() -> None:
    numbers, coglm, vqvae = costs(TINY), CogLM(TINY.coglm), VQVAE(TINY.vqvae)
    n_coglm = sum(p.numel() for p in coglm.parameters())
    assert numbers["stages"]["coglm"]["parameters"] == n_coglm
    stages = numbers["stages"]
    super_resolution = stages["direct"]["parameters"] + stages["iterative"]["parameters"]
    assert super_resolution == sum(
        p.numel()
        for module in (DirectSR(TINY.direct).fine_attention, IterativeSR(TINY.iterative))
        for p in module.parameters()
    ) + 81 * 16
    assert numbers["total"]["parameters"] == n_coglm + super_resolution + sum(p.numel() for p in vqvae.parameters())
    assert numbers["total"]["fp32_bytes"] == 4 * numbers["total"]["parameters"]


def test_drawing_costs_what_its_steps_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps, run on real tensors, cost as much as the two that are counted and averaged."""
    monkeypatch.setattr(packing, "can_pack", lambda *_: False)  # the counter does not know packed products
    model = CogLM(TINY.coglm).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sampler = lambda logits, step: logits.argmax(-1)  # noqa: E731
        model.generate([[70, 71, 72]], sampler)
    fused = counter.get_flop_counts()["Global"]
    matrices = sum(n for op, n in fused.items() if "addmm" in str(op) or op is torch.ops.aten.mm)
    attention = 4 * TINY.coglm.transformer.n_layers * TINY.coglm.transformer.d_model * (4 * 4 + sum(range(5, 13)))
    assert draw_flops(TINY.coglm, 3) == matrices + attention


def test_six_billion_parameters() -> None:
    numbers = costs(get_preset("cogview2"), text_tokens=20)
    draw = numbers["stages"]["coglm"]
    assert 5.8e9 < draw["parameters"] < 6.1e9
    rows = 20 + 1 + 399  # every token that runs through the layers
    layers = draw["parameters"] - (150003 + 1024) * 3072
    assert 1.0 < draw["flops"] / (2 * rows * layers) < 1.1
    assert draw["cache_fp16_bytes"] == 2 * 2 * 48 * 3072 * 420
