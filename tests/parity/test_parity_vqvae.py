"""The picture tokenizer computes what the original's does (the golden files' README, section 7).

``MINICOGVIEW_SLOW=1`` adds the tokenizer of full size: 97 million weights, about 0.4 GB for the recipe and as much for
the model.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest
import torch
from golden_data import close, golden, same_choices
from torch import Tensor

from minicogview.vqvae import VQVAE, from_official, from_official_name, official_config

slow = pytest.mark.skipif(os.environ.get("MINICOGVIEW_SLOW") != "1", reason="slow: set MINICOGVIEW_SLOW=1")


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
