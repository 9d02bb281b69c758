"""The direct stage computes what the original's does (the golden files' README, section 5)."""

from __future__ import annotations

import math

import pytest
import torch
from golden_data import (
    Likeliest,
    close,
    golden,
    golden_layout,
    in_every_form,
    leaves,
    same_choices,
    stage_config,
    stage_sizes,
)

from minicogview.attention import attention_bias
from minicogview.checkpoints import weight_files as checkpoint
from minicogview.local_attention import Impl
from minicogview.super_resolution import DirectSR, direct_attention, low_mask, start_positions, text_slots
from minicogview.transformer import Record


@in_every_form
def test_sr_attention_of_the_direct_stage(impl: Impl) -> None:
    g = golden("sr/attention_dsr_small.safetensors")
    _, n_heads, size, _, coarse, fine, kernel, kernel2 = g["meta"].tolist()
    config = stage_sizes(n_heads, n_heads * size, coarse, fine, kernel, kernel2)
    stored0, low = leaves(g, 0, n_heads)
    stored1, high = leaves(g, 1, n_heads)
    bias = attention_bias(g["mask"], g["log_attention_weights"])
    outs = [y.flatten(2) for y in direct_attention(low, high, bias, config, impl=impl)]
    sum((y * g[f"grad_out{level}"]).sum() for level, y in enumerate(outs)).backward()
    raised = [y.flatten(2) for y in direct_attention(low, high, bias, config, coarse_bias=1.5, impl=impl)]
    for level in (0, 1):
        close(outs[level], g[f"out{level}"])
        close(raised[level], g[f"out{level}_add_scalar_1p5"])
    for name, leaf in (stored0 | stored1).items():
        close(leaf.grad, g[f"grad_{name}"])


def test_sr_position_start_values() -> None:
    g = golden("sr/position_reinit.safetensors")
    factor = math.isqrt(len(g["extra_positions"]) // golden_layout().n_image)
    close(start_positions(g["base_positions"], golden_layout(), factor), g["extra_positions"], atol=0)


@pytest.fixture(scope="module")
def direct() -> DirectSR:
    config, state = stage_config("dsr")
    model = DirectSR(config).eval()
    checkpoint.load_into(model, state, "golden checkpoint")
    return model


def test_sr_direct_layout(direct: DirectSR) -> None:
    g = golden("sr/dsr_forward.safetensors")
    tokens, positions, real = text_slots(g["text_tokens"].tolist(), direct.config.n_text)
    n_low = golden("sr/config.json")["dsr_layout"][1]
    assert torch.equal(torch.cat([tokens, g["low_res_tokens"]], 1), g["model_tokens"][:, :n_low])
    assert (g["model_tokens"][:, n_low:] == direct.config.coglm.ids.boi).all()
    assert torch.equal(positions[0], g["position_ids"][: direct.config.n_text])
    mask = low_mask(real, direct.config.coglm.layout.n_image)
    assert (mask == g["attention_mask"].bool()).all()


@torch.no_grad()
def test_sr_direct_forward(direct: DirectSR) -> None:
    g, record = golden("sr/dsr_forward.safetensors"), Record()
    hidden = torch.cat(direct(g["text_tokens"].tolist(), g["low_res_tokens"], record=record), 1)
    for layer, state in enumerate(record.hidden):
        close(state[:1, g["rows"]], g[f"hidden_after_layer_{layer}_rows"])
    logits = direct.base.logits(hidden, direct.config.coglm.n_codes)
    close(logits[:1, g["rows"]], g["logits_rows"])
    close(logits[1:, g["rows"][::8]], g["logits_rows_batch1"])
    close(logits.logsumexp(-1), g["logsumexp"])
    choice = logits[..., : golden("sr/config.json")["n_img"]].argmax(-1)
    same_choices(choice, g["argmax_of_image_tokens"].long(), g["margin"])


def test_sr_direct_upsampling(direct: DirectSR) -> None:
    g = golden("sr/dsr_forward.safetensors")
    n_low = golden("sr/config.json")["dsr_layout"][1]
    sampler = Likeliest(g["result"], g["margin"][:, n_low:])
    assert torch.equal(direct.upsample(g["text_tokens"].tolist(), g["low_res_tokens"], sampler), g["result"].long())
