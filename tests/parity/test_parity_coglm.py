"""CogLM computes, generates and learns as the original does (the golden files' README, sections 1 and 2)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from golden_data import ATOL, GOLDEN, RELEASED, close, golden, golden_layout, same_choices
from torch import Tensor

from minicogview import masking
from minicogview.attention import attention_bias, text_attention_weights
from minicogview.checkpoints import sat
from minicogview.checkpoints import weight_files as checkpoint
from minicogview.coglm import Batch, CogLM
from minicogview.config import CogLMConfig, SpecialIds, TransformerConfig
from minicogview.transformer import KVCache, Record


@pytest.fixture(scope="module")
def coglm() -> CogLM:
    """The golden checkpoint, opened the way that a released one is. Only <start_of_image> has an id there."""
    released = sat.SatFolder(GOLDEN / "coglm/coglm")
    sizes, module = released.sizes, {name: released.tensor(name) for name in released.shapes}
    config = golden("coglm/config.json")
    assert (config["layers"], config["hidden"]) == (sizes["num_layers"], sizes["hidden_size"])
    assert (config["heads"], config["vocab"]) == (sizes["num_attention_heads"], sizes["vocab_size"])
    ids = SpecialIds(pad=0, boi=config["boi"], boe=0, boc=0)
    n_codes = min(RELEASED.vqvae.codebook_size, sizes["vocab_size"])  # a small table is not restricted
    model = CogLM(sat.sat_config(sizes, ids, golden_layout(), n_codes)).eval()
    checkpoint.load_into(model.transformer, sat.sat_transformer(module), "golden checkpoint")
    return model


def unpacked(packed: Tensor, length: int) -> Tensor:
    """A mask from its packed form: 8 columns a byte, the first in the highest bit."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1)[..., :length]).bool()


def prompt_bias(coglm: CogLM) -> tuple[dict[str, Tensor], Tensor]:
    """The golden forward run, and the bias of its sequence, made as ``generate`` makes it and compared."""
    g, config = golden("coglm/forward.safetensors"), golden("coglm/config.json")
    length = g["tokens"].shape[1]
    positions, mask = masking.inference(config["txt"], length, coglm.config.layout)
    assert torch.equal(positions, g["position_ids"][0])
    assert torch.equal(mask, unpacked(g["attention_mask_packed"], length)[0, 0])
    weights = text_attention_weights(config["txt"], length, config["attn_plus"])
    close(weights, g["log_attention_weights_row"], atol=1e-6)
    return g, attention_bias(mask, g["log_attention_weights_row"])


@torch.no_grad()
def test_coglm_forward(coglm: CogLM) -> None:
    g, bias = prompt_bias(coglm)
    record = Record()
    plain = coglm.transformer(g["tokens"], g["position_ids"], bias, record=record)
    fused = coglm.transformer(g["tokens"], g["position_ids"], bias)
    close(coglm.transformer.logits(plain), g["logits"])
    close(coglm.transformer.logits(fused), g["logits"])
    for layer, hidden in enumerate(record.hidden):
        close(hidden, g[f"hidden_after_layer_{layer}"])


@torch.no_grad()
def test_coglm_forward_without_text_weights(coglm: CogLM) -> None:
    g, _ = prompt_bias(coglm)
    mask = unpacked(g["attention_mask_packed"], g["tokens"].shape[1])
    hidden = coglm.transformer(g["tokens"], g["position_ids"], attention_bias(mask))
    close(coglm.transformer.logits(hidden)[:, ::8], g["logits_without_log_attention_weights"])  # 1 row in 8


def entries(cache: KVCache) -> Tensor:
    """A cache in the original's layout (L, B, S, 2 * D): k of all heads, then v of all heads."""
    both = torch.stack([cache.k, cache.v])[..., : cache.length, :]
    return rearrange(both, "kv l b n s h -> l b s (kv n h)")


@torch.no_grad()
def test_coglm_cache_entries(coglm: CogLM) -> None:
    g, bias = prompt_bias(coglm)
    cache = KVCache(coglm.config.transformer, batch=1, max_len=g["tokens"].shape[1])
    coglm.transformer(g["tokens"], g["position_ids"], bias, cache)
    expected = g["mem_kv_layer_0"]
    close(entries(cache)[0, :, : expected.shape[1]], expected)


class StandIn:
    """The golden files' sampler: row ``r`` takes, at step ``t``, the token of rank ``(a * t + b * r) % m``.

    It keeps every step's logits, compares its choices and their margins with the golden ones, and follows the
    golden choice where two tokens are tied, so that one tie does not spoil all that comes after it.
    """

    def __init__(self, expected: Tensor, margin: Tensor) -> None:
        config = golden("coglm/config.json")
        rule = re.fullmatch(r"k = \((\d+)\*step \+ (\d+)\*batch_row\) % (\d+) .*", config["rank_rule"])
        assert rule is not None, config["rank_rule"]
        self.per_step, self.per_row, self.modulus = map(int, rule.groups())
        self.n_image_ids = config["n_img"]
        self.expected, self.margin = expected, margin  # (B, steps), (steps, B)
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        assert step == len(self.logits)
        self.logits.append(logits.clone())
        rows = torch.arange(len(logits))
        rank = ((self.per_step * step + self.per_row * rows) % self.modulus)[:, None]
        values, order = logits[:, : self.n_image_ids].sort(dim=-1, descending=True, stable=True)
        gaps = F.pad(values[:, :-1] - values[:, 1:], (1, 1), value=torch.inf)  # to both neighbours
        margin = torch.minimum(gaps.gather(1, rank), gaps.gather(1, rank + 1))[:, 0]
        close(margin, self.margin[step], atol=2 * ATOL)
        choice, golden_choice = order.gather(1, rank)[:, 0], self.expected[:, step]
        same_choices(choice, golden_choice, self.margin[step])
        return golden_choice


def test_coglm_cached_generation(coglm: CogLM, monkeypatch: pytest.MonkeyPatch) -> None:
    g, config = golden("coglm/cached_generation.safetensors"), golden("coglm/config.json")
    caches: list[KVCache] = []

    def kept_cache(*args: Any) -> KVCache:
        caches.append(KVCache(*args))
        return caches[-1]

    monkeypatch.setattr("minicogview.transformer.KVCache", kept_cache)
    n_text = config["txt"]
    assert g["prompt"][n_text] == config["boi"] and (g["prompt"][n_text + 1 :] == -1).all()
    expected = g["tokens"][:, n_text + 1 :]
    sampler = StandIn(expected, g["margin"])
    text = g["prompt"][:n_text].tolist()
    filled = coglm.generate([text], sampler, n=len(expected), text_weight=config["attn_plus"])
    assert torch.equal(filled.tokens, expected)
    assert (g["tokens"][:, : n_text + 1] == g["prompt"][: n_text + 1]).all()
    for step, logits in zip(g["steps"].tolist(), g["step_logits"], strict=True):
        close(sampler.logits[step], logits)
    (cache,) = caches
    assert list(entries(cache).shape) == g["mems_shape"].tolist()
    close(entries(cache)[:, :, -1], g["mems_last_position"])


def test_coglm_completion_layout(coglm: CogLM) -> None:
    g, config = golden("coglm/completion.safetensors"), golden("coglm/config.json")
    sample, n_context = masking.completion(
        g["text_tokens"], g["image_tokens"][0], g["region"], coglm.config.ids, coglm.config.layout
    )
    assert n_context == g["context_length"]
    assert torch.equal(sample.tokens, g["seq"])
    assert torch.equal(sample.positions, g["position_ids"][0])
    assert torch.equal(sample.mask, g["attention_mask"][0, 0].bool())
    weights = text_attention_weights(len(g["text_tokens"]), len(sample.tokens), config["attn_plus"])
    close(weights, g["log_attention_weights_row"], atol=1e-6)


def test_coglm_completion(coglm: CogLM) -> None:
    g, config = golden("coglm/completion.safetensors"), golden("coglm/config.json")
    hole = g["region"].flatten().bool()
    sampler = StandIn(g["result"][:, hole], g["margin"])  # the hole is generated in raster order
    picture, n = g["image_tokens"][0], len(g["result"])
    filled = coglm.complete(g["text_tokens"].tolist(), picture, g["region"], sampler, n, config["attn_plus"])
    assert torch.equal(filled.tokens, g["result"])
    close(sampler.logits[0], g["first_logits"])
    close(sampler.logits[-1], g["last_logits"])


def test_coglm_inverse_prompt_layout(coglm: CogLM) -> None:
    g, layout = golden("coglm/inverse_prompt.safetensors"), coglm.config.layout
    n, length = layout.n_image, g["tokens"].shape[1]
    for row in g["tokens"]:
        sample = masking.caption_scoring(row[:n], row[n + 1 :], int(row[n]), layout)
        assert torch.equal(sample.tokens, row)
        assert torch.equal(sample.positions, g["position_ids"])
        assert torch.equal(sample.mask, unpacked(g["attention_mask_packed"], length))
        assert sample.loss_mask is not None  # ours marks the row that predicts, theirs the predicted token
        assert torch.equal(sample.loss_mask[:-1], g["loss_mask"][1:].bool())


def test_coglm_inverse_prompt(coglm: CogLM) -> None:
    g, n = golden("coglm/inverse_prompt.safetensors"), coglm.config.layout.n_image
    pictures, language, texts = g["tokens"][:, :n], int(g["tokens"][0, n]), g["tokens"][:, n + 1 :].tolist()
    close(coglm.score_captions(pictures, texts, language), g["score_mean"])
    sums = [torch.zeros(len(texts))]  # log-probability of the first k tokens, for k = 0, 1, ...
    for k in range(1, len(texts[0]) + 1):
        sums.append(k * coglm.score_captions(pictures, [text[:k] for text in texts], language))
    each = torch.stack(sums, dim=1).diff(dim=1)
    close(F.pad(each, (n, 0)), g["score_none"])  # zero where the picture and the start token are predicted


@torch.no_grad()
def test_coglm_inverse_prompt_in_one_forward_pass(coglm: CogLM) -> None:
    g, layout = golden("coglm/inverse_prompt.safetensors"), coglm.config.layout
    n = layout.n_image
    for row, expected in zip(g["tokens"], g["score_none"], strict=True):
        sample = masking.caption_scoring(row[:n], row[n + 1 :], int(row[n]), layout)
        bias = attention_bias(sample.mask)
        hidden = coglm.transformer(sample.tokens[None], sample.positions[None], bias)[0]
        assert sample.labels is not None and sample.loss_mask is not None
        scores = coglm.transformer.logits(hidden).log_softmax(-1).gather(1, sample.labels[:, None])[:, 0]
        close((scores * sample.loss_mask)[:-1], expected)


def parameters(g: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights stored in a golden file, under our names."""
    return sat.sat_transformer(
        {k.removeprefix("param."): v for k, v in g.items() if k.startswith("param.")}
    )


def own_model(prefix: str, g: dict[str, Tensor], n_codes: int) -> CogLM:
    """The model whose weights stand in the file itself; ``config.json`` has its sizes under a prefix."""
    config, state = golden("coglm/config.json"), parameters(g)
    vocab_size, d_model = state["token_embedding.weight"].shape
    assert d_model == config[f"{prefix}hidden"]
    n_layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    n_positions = len(state["position_embedding.weight"])
    transformer = TransformerConfig(n_layers, d_model, config[f"{prefix}heads"], vocab_size, n_positions)
    last = vocab_size - 1  # these small models have their special ids at the end
    ids = SpecialIds(pad=last, boi=last - 1, boe=last - 2, boc=last - 3)
    model = CogLM(CogLMConfig(transformer, golden_layout(), ids, n_codes))
    checkpoint.load_into(model.transformer, state, "golden weights")
    return model


def gradients(g: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What is stored under a prefix, under our names."""
    return {sat.sat_to_ours(k.removeprefix(prefix)): v for k, v in g.items() if k.startswith(prefix)}


def test_coglm_training_step() -> None:
    g = golden("coglm/training_step.safetensors")
    model = own_model("t", g, n_codes=golden("coglm/config.json")["tvocab"])
    mask = unpacked(g["attention_mask_packed"], g["tokens"].shape[1])[:, 0]
    batch = Batch(g["tokens"], g["position_ids"], mask, g["labels"], g["loss_mask"].bool())
    with torch.no_grad():
        hidden = model.transformer(batch.tokens, batch.positions, attention_bias(batch.mask))
        close(model.transformer.logits(hidden)[:, ::16], g["logits_every_16"])  # every 16th row
    loss = model(batch)
    close(loss, g["loss"])
    loss.backward()
    expected, row_norms = gradients(g, "grad."), gradients(g, "gradnorm_per_row.")
    found = {name: weight.grad for name, weight in model.transformer.named_parameters()}
    assert found.keys() == expected.keys() | row_norms.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        if name in expected:
            close(gradient, expected[name])
        else:
            close(gradient.norm(dim=1), row_norms[name])


@torch.no_grad()
def test_coglm_vocab_restriction() -> None:
    g = golden("coglm/vocab_restriction.safetensors")
    expected = g["logits_last_2_rows"]
    model = own_model("b", g, n_codes=expected.shape[-1])
    assert model.config.n_codes < model.config.transformer.vocab_size
    hidden = model.transformer(g["tokens"], g["position_ids"], attention_bias(g["attention_mask"][:, 0]))
    logits = model.transformer.logits(hidden, model.config.n_codes)
    close(logits[:, -expected.shape[1] :], expected)
    close(logits.logsumexp(-1), g["logsumexp"])
