"""Presets: sizes that follow from one another, and configurations that survive a file."""

from __future__ import annotations

import pytest

from minicogview.config import (
    PRESETS,
    CogLMConfig,
    LayoutConfig,
    SpecialIds,
    TransformerConfig,
    VQVAEConfig,
    from_json,
    get_preset,
    to_json,
)
from minicogview.errors import MiniCogViewError
from minicogview.tokenizer import Tokenizer
from minicogview.training.recipes import TOY_WEIGHTS


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_configurations_come_back_from_json(preset) -> None:
    assert from_json(CogLMConfig, to_json(preset.coglm)) == preset.coglm
    assert from_json(VQVAEConfig, to_json(preset.vqvae)) == preset.vqvae


def test_sizes_of_the_released_model() -> None:
    preset = get_preset("cogview2")
    assert preset.coglm.ids == SpecialIds(pad=20003, boi=150000, boe=150001, boc=150002)
    assert preset.vqvae.rates == (4, 8, 16)
    assert (preset.coarse_pixels, preset.fine_pixels) == (160, 480)
    assert preset.coglm.layout.max_text + preset.coglm.layout.n_image < preset.coglm.transformer.max_positions


def test_the_toy_fits_its_tokenizer() -> None:
    preset = get_preset("toy")
    tokenizer = Tokenizer(TOY_WEIGHTS / "text.model", preset.vqvae.codebook_size)
    assert tokenizer.special_ids == preset.coglm.ids
    assert tokenizer.vocab_size == preset.coglm.transformer.vocab_size
    assert (preset.coarse_pixels, preset.fine_pixels) == (32, 96)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(MiniCogViewError, match="choose one of toy, small, cogview2"):
        get_preset("large")
    with pytest.raises(MiniCogViewError, match="n_heads 3"):
        TransformerConfig(n_layers=1, d_model=32, n_heads=3, vocab_size=8)
    for text in ("{}", '{"grid": 4, "colour": 1}', "no json", "[1]"):
        if text == "{}":
            assert from_json(LayoutConfig, text) == LayoutConfig()
            continue
        with pytest.raises(MiniCogViewError, match="LayoutConfig does not fit"):
            from_json(LayoutConfig, text)
