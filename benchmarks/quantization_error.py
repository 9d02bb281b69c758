"""The errors of 8-bit and 4-bit weights: in the matrices, in the logits, and in the likeliest code.

Three small, untrained models for which tests/golden has the original's logits are read from the original's checkpoint
files, quantized in groups of 64 weights, and compared with these logits. The shipped toy is compared with itself in
float32. "matrices" is the norm of the error of all matrices / the norm of the matrices, and "worst_matrix" the largest
such ratio of a single matrix. "logits" is the same ratio for logits, after their mean is subtracted. "same" is how
often the likeliest code stays the same.

    python benchmarks/quantization_error.py [--layers]       --layers: also prints every matrix of the toy
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minicogview.attention import attention_bias, text_attention_weights
from minicogview.checkpoints import sat
from minicogview.coglm import CogLM
from minicogview.config import LayoutConfig, SpecialIds, SuperResolutionConfig
from minicogview.lopar import IterativeSR
from minicogview.masking import inference
from minicogview.pipeline import CogView2
from minicogview.scale.quantization import Bits, Quantized, quantize_layers, relative_error
from minicogview.super_resolution import DirectSR

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
Logits = Callable[[Any], Tensor]


def released(folder: Path, n_codes: int, boi: int) -> tuple[Any, dict[str, Tensor]]:
    """CogLM's sizes in an official checkpoint, and all its weights under our names."""
    found = sat.SatFolder(folder)
    config = sat.sat_config(found.sizes, SpecialIds(pad=0, boi=boi, boe=0, boc=0), LayoutConfig(), n_codes)
    return config, {sat.sat_to_ours(name): found.tensor(name) for name in found.shapes}


def golden_coglm() -> tuple[nn.Module, Logits, Tensor]:
    """CogLM, and its logits of a prompt and a picture."""
    g, said = load_file(GOLDEN / "coglm/forward.safetensors"), json.loads((GOLDEN / "coglm/config.json").read_text())
    config, state = released(GOLDEN / "coglm/coglm", said["vocab"], said["boi"])
    model = CogLM(config).eval()
    model.transformer.load_state_dict(state)
    length = g["tokens"].shape[1]
    weights = text_attention_weights(said["txt"], length, said["attn_plus"])
    bias = attention_bias(inference(said["txt"], length, config.layout)[1], weights)

    def logits(m: CogLM) -> Tensor:
        return m.transformer.logits(m.transformer(g["tokens"].long(), g["position_ids"].long(), bias))

    return model, logits, g["logits"]


def stage(name: str, kind: type[DirectSR] | type[IterativeSR]) -> tuple[Any, dict[str, Any]]:
    """A super-resolution model from the golden files, and the configuration that its file states."""
    said = json.loads((GOLDEN / "sr/config.json").read_text())
    config, state = released(GOLDEN / "sr" / f"cogview2-{name}", said["vocab"], said["boi"])
    slots, kernel = said[f"{name}_layout"], said["kernel_size"]
    factor = math.isqrt((slots[-1] - slots[-2]) // config.layout.n_image)
    window, coarse = (2 * kernel - 1, kernel), (said["kernel_size2"],) * 2
    model = kind(SuperResolutionConfig(config, slots[0], factor, window, coarse)).eval()
    model.load_state_dict({n if n.startswith("fine_") else f"base.{n}": value for n, value in state.items()})
    return model, said


def golden_direct() -> tuple[nn.Module, Logits, Tensor]:
    """The direct stage, and its logits of the rows that the golden file has."""
    g = load_file(GOLDEN / "sr/dsr_forward.safetensors")
    model, _ = stage("dsr", DirectSR)

    def logits(m: DirectSR) -> Tensor:
        hidden = torch.cat(m(g["text_tokens"].tolist(), g["low_res_tokens"].long()), 1)
        return m.base.logits(hidden[:1, g["rows"].long()])

    return model, logits, g["logits_rows"]


def golden_iterative() -> tuple[nn.Module, Logits, Tensor]:
    """The iterative stage, and our float32 logits of its first round; the parity tests compare it with the original."""
    g = load_file(GOLDEN / "sr/lopar.safetensors")
    model, _ = stage("itersr", IterativeSR)

    def logits(m: IterativeSR) -> Tensor:
        return m.base.logits(m(g["text_tokens"].tolist(), g["model_tokens"][0].long()[:, -3600:])[1])

    return model, logits, logits(model)


def toy_coglm() -> tuple[nn.Module, Logits, Tensor]:
    """The shipped toy's CogLM, and its logits of a picture that it drew itself."""
    pipeline = CogView2.from_pretrained("toy")
    coglm, ids = pipeline.coglm, pipeline.encode("a red apple")
    picture = pipeline.generate("a red apple", n=1, stages=1)
    layout = coglm.config.layout
    positions, mask = inference(len(ids), len(ids) + 1 + layout.n_image, layout)
    tokens = torch.tensor([[*ids, coglm.config.ids.boi, *picture.tokens.flatten().tolist()]])

    def logits(m: CogLM) -> Tensor:
        hidden = m.transformer(tokens, positions[None], attention_bias(mask))
        return m.transformer.logits(hidden[:, len(ids) : -1], m.config.n_codes)

    return coglm, logits, logits(coglm)


MODELS = {"coglm": golden_coglm, "direct": golden_direct, "iterative": golden_iterative, "toy": toy_coglm}


@torch.no_grad()
def errors(name: str, bits: Bits, on_layer: Callable[[str, float], None] | None = None) -> dict[str, float]:
    """Errors of one model whose weights have this many bits; ``on_layer`` gets the error of each matrix."""
    model, logits, expected = MODELS[name]()
    quantized, squares, worst = copy.deepcopy(model), [0.0, 0.0], 0.0

    def each(layer: str, weight: Tensor, q: Quantized) -> None:
        nonlocal worst
        error, length = float(relative_error(weight, q)), float(weight.float().norm())
        squares[0] += (error * length) ** 2
        squares[1] += length**2
        worst = max(worst, error)
        if on_layer:
            on_layer(layer, error)

    quantize_layers(quantized, bits, each)
    found, expected = logits(quantized).float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return {
        "matrices": math.sqrt(squares[0] / squares[1]),
        "worst_matrix": worst,
        "logits": float((found - expected).norm() / spread),
        "same": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        "unquantized": float((logits(model) - expected).norm() / spread),
    }


def show(layer: str, error: float) -> None:
    """Print the error of one matrix."""
    print(f"    {layer:48} {error:.4f}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="the errors of 8-bit and 4-bit weights")
    parser.add_argument("--layers", action="store_true", help="also print every matrix of the toy")
    options = parser.parse_args()
    for name in MODELS:
        for bits in (8, 4):
            found = errors(name, bits, show if options.layers and name == "toy" else None)
            print(f"{name:8} {bits} bits: " + ", ".join(f"{key} {value:.4f}" for key, value in found.items()))


if __name__ == "__main__":
    main()
