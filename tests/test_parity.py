"""Parity with the original program: every size is read from the golden files, and a missing one fails.

`MINICOGVIEW_GOLDEN` names another folder of the same form. `MINICOGVIEW_SLOW=1` adds the full-size tokenizer
(97 million weights, about 0.4 GB each for the recipe and the model).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

import minicogview
from minicogview import editing, masking, sampling
from minicogview.attention import MASKED, attention_bias, text_attention_weights
from minicogview.checkpoints import files as checkpoint
from minicogview.checkpoints import sat
from minicogview.clusters import Clusters
from minicogview.coglm import Batch, CogLM
from minicogview.config import (
    CogLMConfig,
    LayoutConfig,
    SpecialIds,
    SuperResolutionConfig,
    TransformerConfig,
    get_preset,
)
from minicogview.local_attention import Impl, dot_products, local_attention
from minicogview.lopar import OFFICIAL, IterativeSR, lopar_attention
from minicogview.masking import Sample
from minicogview.super_resolution import (
    CellSampler,
    DirectSR,
    direct_attention,
    low_mask,
    start_positions,
    text_slots,
)
from minicogview.tokenizer import FIRST_CHINESE, Tokenizer
from minicogview.transformer import KVCache, Record
from minicogview.vqvae import VQVAE, from_official, from_official_name, official_config
from minicogview.windows import Coarse, Global, shared_by_group, window_cells

GOLDEN = Path(os.environ.get("MINICOGVIEW_GOLDEN", Path(__file__).parent / "golden"))
ATOL = 1e-4
slow = pytest.mark.skipif(os.environ.get("MINICOGVIEW_SLOW") != "1", reason="slow: set MINICOGVIEW_SLOW=1")


def golden(path: str) -> Any:
    """Content of a golden file: a dict of tensors or arrays (.safetensors, .npz), or JSON."""
    file = GOLDEN / path
    if not file.is_file():
        pytest.fail(f"golden file {file} is missing: set MINICOGVIEW_GOLDEN to a complete folder")
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".npz":
        with np.load(file) as archive:
            return dict(archive)
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_golden_file_is_compared_with() -> None:
    source = Path(__file__).read_text()
    folders = {path.parents[1] for path in GOLDEN.rglob("mp_rank_00_model_states.pt")}  # read as a whole, by fixtures
    files = [p for p in GOLDEN.rglob("*.*") if p.suffix != ".md" and not folders & set(p.parents)]
    assert len(folders) == 3 and len(files) > 20
    for path in files:
        assert path.relative_to(GOLDEN).as_posix() in source or path.stem in source, path


def close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    """Equal within the tolerance of float32, shapes included."""
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=0)


def same_choices(actual: Tensor, expected: Tensor, margin: Tensor, atol: float = ATOL) -> None:
    """Equal choices, but for ties: where the runner-up is closer than the tolerance."""
    assert actual.shape == expected.shape
    wrong = (actual != expected) & (margin > atol)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} choices differ beyond a tie"


# ---------------------------------------------------------------- picture tokenizer (section 7)


def recipe(name: str, shape: list[int], seed: int) -> Tensor:
    """A weight made from its name alone, as the golden files' description says."""
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    value = random.standard_normal(shape).astype(np.float32)
    fan_in = float(np.prod(shape[1:]))
    scale, offset = 1 / np.sqrt(fan_in), 0.0
    if name == "quantize.embed.weight":
        scale = 1.0
    elif name == "quantize.proj.weight":
        scale = 4 / np.sqrt(fan_in)
    elif ".norm" in name and name.endswith("weight"):
        scale, offset = 0.2, 1.0
    elif name.endswith("bias"):
        scale = 0.1
    return torch.from_numpy(value * np.float32(scale) + np.float32(offset))


def check_sums(weights: dict[str, Tensor], checksums: Tensor) -> None:
    """The weights are those that the original ran with: sum and absolute sum, in name order."""
    sums = [(w.double().sum(), w.double().abs().sum()) for _, w in sorted(weights.items())]
    torch.testing.assert_close(torch.tensor(sums, dtype=torch.float64), checksums, atol=1e-3, rtol=1e-6)


@pytest.fixture(scope="module")
def small_vqvae() -> VQVAE:
    weights = golden("hvqvae/small_weights_fp16.safetensors")
    assert {name: list(w.shape) for name, w in weights.items()} == golden("hvqvae/small.json")["keys"]
    check_sums(
        {k: v.float() for k, v in weights.items()}, golden("hvqvae/small.safetensors")["weight_checksums"]
    )
    return from_official(weights)


def test_hvqvae_weights_follow_the_recipe() -> None:
    weights = golden("hvqvae/small_weights_fp16.safetensors")
    description = golden("hvqvae/small.json")
    for name, shape in description["keys"].items():
        close(weights[name].float(), recipe(name, shape, description["seed"]).half().float(), atol=0)


def test_hvqvae_sizes_are_read_off_the_weights() -> None:
    description = golden("hvqvae/small.json")
    params = description["config"]["params"]
    config = official_config(description["keys"])
    encoder, quantizer = params["enc_config"]["params"], params["quantize_config"]["params"]
    assert config.channels == encoder["channels"]
    assert list(config.encoder_multipliers) == encoder["channels_mult"]
    assert config.encoder_blocks == encoder["num_res_blocks"]
    assert config.latent_channels == encoder["z_channels"] == quantizer["hidden_dim"]
    assert (config.codebook_size, config.codebook_dim) == (quantizer["n_embed"], quantizer["embedding_dim"])
    decoders = [d["params"]["channels_mult"] for d in params["dec_configs"]]
    assert [list(m) for m in config.decoder_multipliers] == decoders


@torch.no_grad()
def test_hvqvae_encoder(small_vqvae: VQVAE) -> None:
    g = golden("hvqvae/small.safetensors")
    close(small_vqvae.features(g["image"], level=0), g["encoder_out"])


@torch.no_grad()
def test_hvqvae_codes_and_pictures_at_each_level(small_vqvae: VQVAE) -> None:
    g = golden("hvqvae/small.safetensors")
    for level in range(small_vqvae.levels):
        tokens = g[f"tokens_l{level}"].long()
        same_choices(small_vqvae.encode(g["image"], level), tokens, g[f"gap_l{level}"])
        close(small_vqvae.decode(tokens, level), g[f"decoded_l{level}"])


@torch.no_grad()
def test_hvqvae_quantizer(small_vqvae: VQVAE) -> None:
    g = golden("hvqvae/small.safetensors")
    rows, commitment, _ = small_vqvae.quantizer(small_vqvae.features(g["image"], level=1))
    close(rows.permute(0, 2, 3, 1), g["quant_l1"])
    close(commitment, g["diff_l1"])


@torch.no_grad()
def test_hvqvae_forward(small_vqvae: VQVAE) -> None:
    g = golden("hvqvae/small.safetensors")
    outputs, commitment, _ = small_vqvae(g["image"])
    for level, output in enumerate(outputs):
        close(output, g[f"forward_out_{level}"])
    close(commitment, g["forward_total_diff"])


def test_hvqvae_full_size_names_and_shapes() -> None:
    description = golden("hvqvae/full.json")
    with torch.device("meta"):  # shapes without memory
        model = VQVAE(official_config(description["keys"]))
    ours = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert ours == {from_official_name(name): shape for name, shape in description["keys"].items()}
    assert sum(weight.numel() for weight in model.parameters()) == description["parameters"]


@slow
@torch.no_grad()
def test_hvqvae_full_size() -> None:
    description, g = golden("hvqvae/full.json"), golden("hvqvae/full.safetensors")
    weights = {name: recipe(name, shape, description["seed"]) for name, shape in description["keys"].items()}
    check_sums(weights, g["weight_checksums"])
    model = from_official(weights)
    for level in range(model.levels):
        tokens = g[f"tokens_l{level}"].long()
        same_choices(model.encode(g["image"], level), tokens, g[f"gap_l{level}"])
        decoded = model.decode(tokens, level)
        if level == 1:
            close(decoded, g["decoded_l1"])
        else:
            corner = g[f"decoded_l{level}_corner"]
            close(decoded[..., : corner.shape[-2], : corner.shape[-1]], corner)


# ---------------------------------------------------------------- sampling (section 6)


def sampling_cases() -> list[str]:
    """Names of the recorded settings; a missing file fails inside the tests, not while they are collected."""
    file = GOLDEN / "sampling/sampling.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ["missing"]


@pytest.mark.parametrize("case", sampling_cases())
def test_sampling_probabilities(case: str) -> None:
    settings, g = golden("sampling/sampling.json")[case], golden("sampling/sampling.safetensors")
    logits, expected = g["logits"], g[f"{case}/probability"]
    temperature = settings["temperature"]
    if case.startswith("itersr"):
        top_k, second, clusters = settings["topk"], 1.0, None
        probability = sampling.top_k_probabilities(logits, temperature, top_k)
    else:
        first_stage = case.startswith("coglm")  # the two programs name the same settings differently
        top_k = settings["top_k" if first_stage else "topk"]
        second = settings["top_k_cluster" if first_stage else "temperature2"]
        clusters = Clusters.of(g["labels"])
        probability = sampling.cluster_probabilities(logits, clusters, temperature, top_k, second)
    close(probability, expected, atol=1e-6)
    if "support" in settings:
        assert (probability > 0).sum(-1).tolist() == settings["support"]

    # The sampler itself, over an even grid of its two random numbers: the share of every token.
    n = 300
    steps = (torch.arange(n) + 0.5) / n
    noise = torch.cartesian_prod(steps, steps)
    for row, share in zip(logits, expected, strict=True):
        drawn = sampling.sample(row.expand(n * n, -1), noise, temperature, top_k, second, clusters)
        close(drawn.bincount(minlength=len(row)) / n**2, share, atol=2 / n)


def test_sampling_cluster_mass() -> None:
    settings, g = golden("sampling/sampling.json"), golden("sampling/sampling.safetensors")
    names = [name for name in settings if name.startswith("coglm")]
    assert names
    for name in names:
        expected = g[f"{name}/cluster_probability"]
        temperature, top_k = settings[name]["temperature"], settings[name]["top_k"]
        kept, mass = sampling.cluster_choices(g["logits"], Clusters.of(g["labels"]), temperature, top_k)
        close(torch.zeros_like(expected).scatter_(-1, kept, mass), expected, atol=1e-6)


# ---------------------------------------------------------------- stage one (sections 1 and 2)
# completion_boxes.json holds the geometry of editing (boxes, crops, resized masks) and belongs to that module.

RELEASED = get_preset("cogview2")


def golden_layout() -> LayoutConfig:
    """Where text and picture sit, read off the positions of one sequence: text, <start_of_image>, picture."""
    positions = golden("coglm/forward.safetensors")["position_ids"][0]
    n_text = golden("coglm/config.json")["txt"]
    grid = math.isqrt(len(positions) - n_text - 1)
    return LayoutConfig(max_text=int(positions[n_text]), grid=grid)


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


# ---------------------------------------------------------------- masks (section 3)


def fields(sample: Sample) -> dict[str, Tensor]:
    """A sample under the golden files' names."""
    assert sample.labels is not None and sample.loss_mask is not None
    return {
        "token": sample.tokens,
        "position": sample.positions,
        "attention_mask": sample.mask,
        "label": sample.labels,
        "loss_mask": sample.loss_mask,
    }


def masks_layout(cases: dict[str, Any], arrays: dict[str, np.ndarray]) -> LayoutConfig:
    """Sizes of the pretraining samples, read off the cases: picture, start position, patches."""
    drawn = next(name for name, case in cases.items() if case["task"] == "text_image_generation")
    boi = int(np.flatnonzero(arrays[f"{drawn}/token"] == RELEASED.coglm.ids.boi)[0])
    grid = math.isqrt(len(arrays[f"{drawn}/token"]) - boi - 1)
    patched = next(case for case in cases.values() if case["task"] == "image_text_understanding")
    pairs = zip(patched["patch_corner_codes"], patched["patch_rows_cols"], strict=True)
    side = next((code - column) // row for code, (row, column) in pairs if row > 0)
    return LayoutConfig(
        max_text=int(arrays[f"{drawn}/position"][boi]),
        grid=grid,
        n_patches=len(patched["patch_corner_codes"]),
        patch_size=grid - side,
    )


def released_language_token(text: Tensor) -> int:
    """The start token of a text of the released vocabulary: the tokenizer's own rule.

    The rule only compares ids; the text model inside plays no part, so the shipped small one will do.
    """
    sizes = RELEASED.vqvae.codebook_size, RELEASED.n_text_pieces
    path = Path(minicogview.__file__).parent / "weights/toy/text.model"
    tokenizer = Tokenizer(path, sizes[0], first_chinese=FIRST_CHINESE[sizes])
    return RELEASED.coglm.ids.boe if tokenizer.language(text) == "en" else RELEASED.coglm.ids.boc


def made_by_us(case: dict[str, Any], raw: Tensor, layout: LayoutConfig) -> Sample:
    """The sample that ``masking`` makes of a raw sequence, given the recorded random decisions."""
    ids = RELEASED.coglm.ids
    if case["task"] == "text_image_generation":
        return masking.text_to_image(raw, ids, layout, case.get("second_text_selected", False))
    if case["task"] == "image_text_understanding":
        corners = [(row, column) for row, column in case["patch_rows_cols"]]
        side = layout.grid - layout.patch_size
        assert corners == [divmod(code, side) for code in case["patch_corner_codes"]]
        texts = masking.split_texts(raw, layout.n_image, ids.pad)
        languages = [released_language_token(raw[start:end]) for start, end in texts]
        return masking.image_to_text(raw, ids, layout, languages, corners)
    assert case["task"] == "text_understanding"
    lengths = masking.span_lengths(case["poisson_draws_before_clip"], len(raw))
    assert len(raw) - sum(lengths) == case["gap_population"]
    starts = masking.span_starts(case["gap_positions_unsorted"], lengths)
    return masking.text_spans(raw, list(zip(starts, lengths, strict=True)))


def test_masks_of_pretraining_tasks() -> None:
    cases, arrays = golden("masks/pretraining_tasks.json"), golden("masks/pretraining_tasks.npz")
    assert {name.split("/")[0] for name in arrays} == cases.keys()
    tasks = {"text_image_generation", "image_text_understanding", "text_understanding"}
    assert {case["task"] for case in cases.values()} == tasks
    layout = masks_layout(cases, arrays)
    for name, case in cases.items():
        raw = torch.from_numpy(arrays[f"{name}/input"])
        for field, ours in fields(made_by_us(case, raw, layout)).items():
            expected = torch.from_numpy(arrays[f"{name}/{field}"])
            assert torch.equal(ours.to(expected.dtype), expected), f"{name}: {field} differs"


def test_masks_of_inference() -> None:
    arrays = golden("masks/inference_masks.npz")
    layout = masks_layout(golden("masks/pretraining_tasks.json"), golden("masks/pretraining_tasks.npz"))
    kinds = set()
    for name in sorted({key.split("/")[0] for key in arrays}):
        kind = name.split("_")[0]
        sizes = {part[:3]: int(part[3:]) for part in name.split("_")[1:]}  # len, ctx and perhaps txt
        expected = torch.from_numpy(arrays[f"{name}/attention_mask"])[0, 0].bool()
        if kind == "coglm":
            positions, mask = masking.inference(sizes["ctx"], sizes["len"], layout)
            assert torch.equal(positions, torch.from_numpy(arrays[f"{name}/position_ids"])[0]), name
        else:  # its positions are whatever was handed in
            mask = masking.completion_mask(sizes["txt"], sizes["ctx"], sizes["len"])
        assert torch.equal(mask, expected), name
        kinds.add(kind)
    assert kinds == {"coglm", "comp"}


# ---------------------------------------------------------------- local attention (section 4)


def local_attention_cases() -> list[str]:
    """Names of the recorded calls; a missing file fails inside the tests, not while they are collected."""
    file = GOLDEN / "local_attention/local_attention.json"
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else ["missing"]


no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
in_every_form = pytest.mark.parametrize("impl", ["reference", "blocked", pytest.param("triton", marks=no_triton)])


@pytest.fixture
def cut_small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles on the golden files' small grids too, where the blocked form would take one."""
    monkeypatch.setattr("minicogview.tiles.ONE_TILE_UP_TO", 0)


class LocalCase:
    """One recorded call in our layout: pictures become token lists with a single head."""

    def __init__(self, name: str) -> None:
        case = golden("local_attention/local_attention.json")[name]
        tensors = golden("local_attention/local_attention.safetensors")
        self.golden = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        self.grid, self.key_grid = tuple(case["HW"]), tuple(case["hw"])
        self.window, self.causal, self.out_of_range = (case["kH"], case["kW"]), case["causal"], case["out_of_range"]
        self.q, self.k, self.v = (self.tokens(name).requires_grad_() for name in ("q", "k", "v"))
        sizes = [case["batch_q"], case["batch_kv"], self.grid, self.key_grid, case["channels"]]
        assert [len(self.q), len(self.k), self.grid, self.key_grid, self.q.shape[-1]] == sizes

    def tokens(self, name: str) -> Tensor:
        """A recorded (B, c, y, x) tensor as (B, T, 1, c)."""
        return rearrange(self.golden[name], "b c y x -> b (y x) 1 c").contiguous()

    def check_gradients(self, output: Tensor, direction: Tensor, names: dict[str, str]) -> None:
        grads = torch.autograd.grad(output, [getattr(self, name) for name in names], direction)
        for grad, expected in zip(grads, names.values(), strict=True):
            close(grad, self.tokens(expected))


@pytest.mark.parametrize("name", local_attention_cases())
def test_local_attention_scores(name: str) -> None:
    case = LocalCase(name)
    index, inside = window_cells(case.grid, case.key_grid, case.window, case.causal)
    k = shared_by_group(case.k, len(case.q))
    scores = dot_products(case.q, k, scale=1.0)[:, 0]  # (B, T, S)
    listed = scores.gather(-1, index.expand(len(scores), -1, -1)).masked_fill(~inside, MASKED)
    listed = listed.unflatten(1, case.grid)
    close(listed, case.golden["scores"])
    assert int((~inside).sum()) * len(scores) == case.out_of_range
    names = {"q": "grad_q_from_scores", "k": "grad_k_from_scores"}
    case.check_gradients(listed, case.golden["grad_scores"], names)


@in_every_form
@pytest.mark.parametrize("name", local_attention_cases())
def test_local_attention(name: str, impl: Impl, cut_small_grids: None) -> None:
    case = LocalCase(name)
    k, v, coarse = case.k, case.v, None
    if case.key_grid != case.grid:
        k, v, coarse = None, None, Coarse(case.k, case.v, case.key_grid, case.window)
    out = local_attention(
        case.q, k, v, case.grid, case.window, coarse=coarse, causal=case.causal, scale=1.0, impl=impl
    )
    close(out, case.tokens("out"))
    case.check_gradients(out, case.tokens("grad_out"), {"q": "grad_q", "k": "grad_k", "v": "grad_v"})


@in_every_form
def test_local_attention_of_the_direct_model(impl: Impl, cut_small_grids: None) -> None:
    g = golden("sr/attention_dsr_small.safetensors")
    _, n_heads, _, n_text, coarse_edge, edge, kernel, kernel2 = g["meta"].tolist()
    _, (_, k0, v0) = leaves(g, 0, n_heads)
    stored, (q, k, v) = leaves(g, 1, n_heads)
    for bias, name in (1.5, "out1_add_scalar_1p5"), (0.0, "out1"):
        coarse = Coarse(k0[:, n_text:], v0[:, n_text:], (coarse_edge, coarse_edge), (kernel2, kernel2), bias)
        out = local_attention(q, k, v, (edge, edge), (2 * kernel - 1, kernel), coarse=coarse, impl=impl).flatten(2)
        close(out, g[name])
    for name, grad in zip(stored, torch.autograd.grad(out, list(stored.values()), g["grad_out1"])):
        close(grad, g[f"grad_{name}"])


@in_every_form
def test_local_attention_of_the_iterative_model(impl: Impl, cut_small_grids: None) -> None:
    g = golden("sr/attention_itersr_small.safetensors")
    _, n_heads, _, n_text, edge, kernel = g["meta"].tolist()
    stored0, (q0, k0, v0) = leaves(g, 0, n_heads)
    stored1, (q, k, v) = leaves(g, 1, n_heads)
    text, weighted = Global(k0, v0, g["mask"]), Global(k0, v0, g["mask"], g["log_attention_weights"])
    level0 = local_attention(q0, None, None, (1, n_text), everywhere=text, impl=impl)
    level1 = local_attention(q, k, v, (edge, edge), (2 * kernel - 1, kernel), everywhere=weighted, impl=impl)
    out, stored = torch.cat([level0, level1], 1).flatten(2), stored0 | stored1
    close(out, g["out"])
    for name, grad in zip(stored, torch.autograd.grad(out, list(stored.values()), g["grad_out"]), strict=True):
        close(grad, g[f"grad_{name}"])


# ---------------------------------------------------------------- super-resolution (section 5)


def stage_sizes(n_heads: int, d_model: int, coarse: int, fine: int, kernel: int, kernel2: int) -> SuperResolutionConfig:
    """Sizes of a stage whose attention alone is looked at; a kernel of size k is a window of 2k - 1 rows, k columns."""
    transformer = TransformerConfig(n_layers=1, d_model=d_model, n_heads=n_heads, vocab_size=8)
    config = CogLMConfig(transformer, LayoutConfig(grid=coarse), SpecialIds(pad=0, boi=0, boe=0, boc=0), n_codes=8)
    return SuperResolutionConfig(config, 0, fine // coarse, (2 * kernel - 1, kernel), (kernel2, kernel2))


def leaves(g: dict[str, Tensor], level: int, n_heads: int) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of one level as stored (B, S, D), which gather gradients, and with their heads apart."""
    stored = {f"{name}{level}": g[f"{name}{level}"].clone().requires_grad_() for name in "qkv"}
    q, k, v = (rearrange(x, "b s (n h) -> b s n h", n=n_heads) for x in stored.values())
    return stored, (q, k, v)


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


def test_sr_position_start_values() -> None:
    g = golden("sr/position_reinit.safetensors")
    factor = math.isqrt(len(g["extra_positions"]) // golden_layout().n_image)
    close(start_positions(g["base_positions"], golden_layout(), factor), g["extra_positions"], atol=0)


def stage_config(name: str) -> tuple[SuperResolutionConfig, dict[str, Tensor]]:
    """Sizes and weights of a golden super-resolution checkpoint, opened the way that a released one is."""
    released = sat.SatFolder(GOLDEN / "sr" / f"cogview2-{name}")
    sizes = released.sizes
    golden_sizes = golden("sr/config.json")
    assert (sizes["num_layers"], sizes["hidden_size"]) == (golden_sizes["layers"], golden_sizes["hidden"])
    ids, layout = SpecialIds(pad=0, boi=golden_sizes["boi"], boe=0, boc=0), golden_layout()
    n_codes = min(RELEASED.vqvae.codebook_size, sizes["vocab_size"])
    slots = golden_sizes[f"{name}_layout"]  # text, then (direct: low level and) everything
    factor = math.isqrt((slots[-1] - slots[-2]) // layout.n_image)
    kernel, kernel2 = golden_sizes["kernel_size"], golden_sizes["kernel_size2"]
    coglm, window = sat.sat_config(sizes, ids, layout, n_codes), (2 * kernel - 1, kernel)
    config = SuperResolutionConfig(coglm, slots[0], factor, window, (kernel2, kernel2))
    prefix = {ours: "" if ours.startswith("fine_") else "base." for ours in map(sat.sat_to_ours, released.shapes)}
    names = {name: sat.sat_to_ours(name) for name in released.shapes}
    return config, {prefix[ours] + ours: released.tensor(name) for name, ours in names.items()}


@pytest.fixture(scope="module")
def direct() -> DirectSR:
    config, state = stage_config("dsr")
    model = DirectSR(config).eval()
    checkpoint.load_into(model, state, "golden checkpoint")
    return model


@pytest.fixture(scope="module")
def iterative() -> IterativeSR:
    config, state = stage_config("itersr")
    model = IterativeSR(config).eval()
    checkpoint.load_into(model, state, "golden checkpoint")
    return model


class Likeliest:
    """The golden files' sampler: the likeliest of the first picture codes. Keeps margins and follows golden ties."""

    def __init__(self, expected: Tensor, margin: Tensor) -> None:
        self.expected, self.margin = expected.long(), margin  # (B, F) both, or fewer rows of margins
        self.n_codes = golden("sr/config.json")["n_img"]

    def __call__(self, logits: Tensor, cells: Tensor) -> Tensor:
        choice, golden_choice = logits[..., : self.n_codes].argmax(-1), self.expected[:, cells]
        rows = len(self.margin)
        same_choices(choice[:rows], golden_choice[:rows], self.margin[:, cells])
        assert torch.equal(choice[rows:], golden_choice[rows:])
        return golden_choice


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


LOPAR_FILES = ("lopar", "lopar_region", "lopar_long_text")


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


# ---------------------------------------------------------------- editing (section 2, completion_boxes.json)


def test_completion_boxes() -> None:
    cases, pixels, layout = golden("coglm/completion_boxes.json"), RELEASED.coarse_pixels * 3, golden_layout()
    assert cases
    for case in cases:
        mask = editing.box_mask((pixels, pixels), case["h0_w0_h1_w1"])
        assert list(editing.inner_box(mask)) == case["inner_box"]
        box = editing.crop_box(mask)
        assert list(box) == case["crop_box"]
        crop = mask[box[0] : box[2], box[1] : box[3]]
        assert list(crop.shape) == case["crop_shape"]
        rows = ["".join(str(int(cell)) for cell in row) for row in editing.token_region(crop, layout.grid)]
        assert rows == case["small_mask_rows"]
        assert int(editing.token_region(crop, 3 * layout.grid).sum()) == case["big_mask_count"]
