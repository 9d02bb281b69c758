"""The iterative stage resamples as the original does, round after round (the golden files' README, section 5)."""

from __future__ import annotations

import pytest
import torch
from golden_data import Likeliest, close, golden, in_every_form, leaves, stage_config, stage_sizes

from minicogview.checkpoints import weight_files as checkpoint
from minicogview.local_attention import Impl
from minicogview.lopar import OFFICIAL, IterativeSR, lopar_attention
from minicogview.super_resolution import CellSampler, text_slots

LOPAR_FILES = ("lopar", "lopar_region", "lopar_long_text")


@in_every_form
def test_sr_attention_of_the_iterative_stage(impl: Impl) -> None:
    g = golden("sr/attention_itersr_small.safetensors")
    _, n_heads, size, n_text, edge, kernel = g["meta"].tolist()
    config = stage_sizes(n_heads, n_heads * size, edge, edge, kernel, kernel)
    stored0, text = leaves(g, 0, n_heads)
    stored1, high = leaves(g, 1, n_heads)
    assert g["mask"].shape == g["log_attention_weights"].shape == (1, n_text)
    real, weights = g["mask"].bool(), g["log_attention_weights"][0]
    out = torch.cat([y.flatten(2) for y in lopar_attention(text, high, real, config, weights, impl)], dim=1)
    close(out, g["out"])
    (out * g["grad_out"]).sum().backward()
    for name, leaf in (stored0 | stored1).items():
        close(leaf.grad, g[f"grad_{name}"])


@pytest.fixture(scope="module")
def iterative() -> IterativeSR:
    config, state = stage_config("itersr")
    model = IterativeSR(config).eval()
    checkpoint.load_into(model, state, "golden checkpoint")
    return model


@torch.no_grad()
@pytest.mark.parametrize("file", LOPAR_FILES)
def test_sr_lopar_inputs_and_logits(iterative: IterativeSR, file: str) -> None:
    g, n_text = golden(f"sr/{file}.safetensors"), iterative.config.n_text
    texts, boi = g["text_tokens"].tolist(), iterative.config.coglm.ids.boi
    tokens, positions, real = text_slots(texts, n_text)
    assert torch.equal(positions[0], g["position_ids"][:n_text])
    assert torch.equal(real[:1], g["attention_mask"].bool())
    before = g["high_res_in"].long()
    for i, (inputs, after) in enumerate(zip(g["model_tokens"].long(), g["outputs"].long(), strict=True)):
        masked = OFFICIAL.masked(i + 1, iterative.config.fine_grid)
        if "input_mask" in g:
            masked &= g["input_mask"].bool()
        assert torch.equal(masked, g["remask"][i].bool())
        expected = before.masked_fill(masked.flatten(), boi)
        assert torch.equal(inputs, torch.cat([tokens, expected], 1))
        before = after
    for key in [key for key in g if key.startswith("logits_rows_step")]:
        step = int(key.removeprefix("logits_rows_step"))
        hidden = torch.cat(iterative(texts, g["model_tokens"][step - 1, :, n_text:].long()), 1)
        logits = iterative.base.logits(hidden, iterative.config.coglm.n_codes)
        rows = g["rows"] if step == 1 else g["rows"][::4]
        close(logits[:1, rows], g[key])
        if f"logsumexp_step{step}" in g:
            close(logits.logsumexp(-1), g[f"logsumexp_step{step}"])
    assert file == "lopar_region" or any(key.startswith("logits_rows_step") for key in g)


@pytest.mark.parametrize("file", LOPAR_FILES)
def test_sr_lopar_rounds(iterative: IterativeSR, file: str) -> None:
    g = golden(f"sr/{file}.safetensors")
    assert OFFICIAL.top_k == tuple(g["topk"].tolist())
    n_known = len(g["outputs"])  # of a long text only the first round is stored
    assert file == "lopar_long_text" or n_known == OFFICIAL.n_rounds
    samplers: list[CellSampler] = [
        Likeliest(output, margin.float()) for output, margin in zip(g["outputs"], g["margin"], strict=True)
    ]
    n_codes = golden("sr/config.json")["n_img"]
    samplers += [lambda logits, cells: logits[..., :n_codes].argmax(-1)] * (OFFICIAL.n_rounds - n_known)
    region = g.get("input_mask")
    assert (region is not None) == (file == "lopar_region")
    rounds = iterative.resample(g["text_tokens"].tolist(), g["high_res_in"].long(), samplers, OFFICIAL, region)
    for ours, expected in zip(rounds, g["outputs"].long(), strict=False):
        assert torch.equal(ours, expected)
    differing = (rounds[-1] != g["result"].long()).float().mean()
    assert differing == 0 if n_known == OFFICIAL.n_rounds else differing < 0.001
