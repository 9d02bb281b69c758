"""What a preset costs: parameters, bytes and floating-point operations of each stage.

The idea: on torch's "meta" device, tensors have shapes but no numbers. So the real modules of the 6B model can be built
and run within a second, while every matrix product and convolution is counted. A multiply-add counts as two operations;
norms, activations and softmax are left out, as is usual.

Simplified: one picture, without guidance. The search for the nearest codebook row is counted by its formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, Preset, SuperResolutionConfig
from minicogview.lopar import OFFICIAL, IterativeSR
from minicogview.super_resolution import DirectSR
from minicogview.transformer import KVCache
from minicogview.vqvae import VQVAE


def count_parameters(*modules: nn.Module | nn.Parameter) -> int:
    """Number of values in these modules and parameters, each parameter counted once."""
    parameters = {p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])}
    return sum(p.numel() for p in parameters)


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of one call, without gradients."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def draw_flops(config: CogLMConfig, text_tokens: int) -> int:
    """Operations of generating one picture's tokens with CogLM."""

    def of_layers(n_layers: int) -> int:
        return _draw_flops(CogLM(_of_depth(config, n_layers)), text_tokens)

    return _all_layers(of_layers, config)


def super_resolution_flops(
    config: SuperResolutionConfig, kind: type[DirectSR] | type[IterativeSR], text_tokens: int
) -> int:
    """Operations of one pass of a super-resolution stage, including the logits of all fine tokens."""
    n_fine, n_codes = config.fine_grid[0] * config.fine_grid[1], config.coglm.n_codes
    codes = torch.zeros(1, config.coglm.layout.n_image if kind is DirectSR else n_fine, dtype=torch.long)
    fine = torch.zeros(1, n_fine, dtype=torch.long)

    def of_layers(n_layers: int) -> int:
        model = kind(replace(config, coglm=_of_depth(config.coglm, n_layers)))
        return count_flops(lambda: model.base.logits(model([[0] * text_tokens], codes, fine)[1], n_codes))

    return _all_layers(of_layers, config.coglm)


def _of_depth(config: CogLMConfig, n_layers: int) -> CogLMConfig:
    return replace(config, transformer=replace(config.transformer, n_layers=n_layers))


def _all_layers(of_layers: Callable[[int], int], config: CogLMConfig) -> int:
    """Operations of a model of any depth. Its layers cost the same, and two layers minus one layer gives that cost."""
    with torch.device("meta"):
        one, two = of_layers(1), of_layers(2)
    return one + (config.transformer.n_layers - 1) * (two - one)


def _draw_flops(model: CogLM, text_tokens: int) -> int:
    """Operations of ``CogLM.generate``: the prompt in one pass, then one token after another with the KV cache."""
    n = model.config.layout.n_image
    length = text_tokens + 1 + n

    def step(n_tokens: int, n_before: int) -> int:
        cache = KVCache(model.config.transformer, 1, length, "meta")
        cache.length = n_before
        tokens = torch.zeros(1, n_tokens, dtype=torch.long, device="meta")

        def run() -> None:
            hidden = model.transformer(tokens, tokens, None, cache)
            model.transformer.logits(hidden[:, -1], model.config.n_codes)

        return count_flops(run)

    # The cost grows by the same amount at each step, so the mean of the first and the last step is exact.
    first, last = step(1, text_tokens + 1), step(1, length - 2)
    return step(text_tokens + 1, 0) + (n - 1) * (first + last) // 2


def encode_flops(vqvae: VQVAE, pixels: int, level: int) -> int:
    """Operations of encoding one picture with sides of ``pixels`` pixels."""
    picture = torch.zeros(1, 3, pixels, pixels, device="meta")
    cells = (pixels // vqvae.config.rates[level]) ** 2
    search = 2 * cells * vqvae.config.codebook_size * vqvae.config.codebook_dim
    return search + count_flops(lambda: vqvae.quantizer.project(vqvae.features(picture, level)))


def costs(preset: Preset, text_tokens: int = 16) -> dict[str, Any]:
    """Parameters, bytes and operations of a preset's stages.

    Args:
        text_tokens: length of the prompt.

    Returns:
        ``stages``: for each of "coglm", "direct" (only what it adds to "coglm"), "iterative" (all rounds), "decode" (a
        fine picture) and "encode" (a coarse picture), its ``parameters``, ``fp16_bytes``, ``fp32_bytes``, and ``flops``
        for one picture; "coglm" also has ``cache_fp16_bytes``, the size of the KV cache for one picture. ``total``: the
        same keys for all weights (each counted once, including decoders of other levels) and for all stages that turn
        a text into a fine picture.
    """
    with torch.device("meta"):
        coglm, vqvae = CogLM(preset.coglm), VQVAE(preset.vqvae)
        direct, iterative = DirectSR(preset.direct, coglm.transformer), IterativeSR(preset.iterative)
    level, grid, quantizer = preset.level, preset.coglm.layout.grid, vqvae.quantizer
    side = preset.direct.fine_grid[0]
    codes = torch.zeros(1, side, side, dtype=torch.long, device="meta")
    n_direct = count_parameters(direct) - count_parameters(coglm)
    encoder = (vqvae.encoder, vqvae.halvers[:level], quantizer)
    stages = {
        "coglm": _cost(count_parameters(coglm), draw_flops(preset.coglm, text_tokens)),
        "direct": _cost(n_direct, super_resolution_flops(preset.direct, DirectSR, text_tokens)),
        "iterative": _cost(
            count_parameters(iterative),
            OFFICIAL.n_rounds * super_resolution_flops(preset.iterative, IterativeSR, text_tokens),
        ),
        "decode": _cost(
            count_parameters(vqvae.decoder(level), quantizer.codebook),
            count_flops(lambda: vqvae.decode(codes, level)),
        ),
        "encode": _cost(count_parameters(*encoder), encode_flops(vqvae, preset.coarse_pixels, level)),
    }
    sizes = preset.coglm.transformer
    stages["coglm"]["cache_fp16_bytes"] = 2 * 2 * sizes.n_layers * sizes.d_model * (text_tokens + grid * grid)
    flops = sum(stages[name]["flops"] for name in ("coglm", "direct", "iterative", "decode"))
    return {
        "preset": preset.name,
        "pixels": preset.fine_pixels,
        "text_tokens": text_tokens,
        "image_tokens": grid * grid,
        "fine_tokens": side * side,
        "stages": stages,
        "total": _cost(count_parameters(direct, iterative, vqvae), flops),
    }


def _cost(parameters: int, flops: int) -> dict[str, int]:
    return {
        "parameters": parameters,
        "fp16_bytes": 2 * parameters,
        "fp32_bytes": 4 * parameters,
        "flops": flops,
    }
