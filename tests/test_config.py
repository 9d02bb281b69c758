"""Presets: sizes that follow from one another, and configurations that survive a file."""

from __future__ import annotations

import dataclasses
import json

import pytest

from minicogview.config import (
    PRESETS,
    CogLMConfig,
    LayoutConfig,
    SamplingConfig,
    SpecialIds,
    TransformerConfig,
    VQVAEConfig,
    from_json,
    get_preset,
    make_preset,
    special_ids,
    to_json,
)
from minicogview.errors import MiniCogViewError
from minicogview.tokenizer import Tokenizer
from minicogview.training.recipes import TOY_WEIGHTS


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_configurations_come_back_from_json(preset) -> None:
    assert from_json(CogLMConfig, to_json(preset.coglm)) == preset.coglm
    assert from_json(VQVAEConfig, to_json(preset.vqvae)) == preset.vqvae


def test_a_configuration_with_dropout_loads_only_where_it_was_switched_off() -> None:
    """Files of earlier versions have the field, always 0."""
    coglm = get_preset("toy").coglm
    stored = json.loads(to_json(coglm))
    stored["transformer"]["dropout"] = 0.0
    assert from_json(CogLMConfig, json.dumps(stored)) == coglm
    stored["transformer"]["dropout"] = 0.1
    with pytest.raises(MiniCogViewError, match=r"stored CogLMConfig does not fit this version.*dropout"):
        from_json(CogLMConfig, json.dumps(stored))


def test_a_preset_fills_in_what_follows_from_other_sizes() -> None:
    layout, sizes = LayoutConfig(max_text=9, grid=4), {"n_layers": 1, "d_model": 8, "n_heads": 2}
    made = make_preset("new", VQVAEConfig(codebook_size=50), layout, sizes, 30, level=2, fine_choice="mean")
    transformer = made.coglm.transformer
    assert (transformer.vocab_size, transformer.max_positions) == (50 + 30 + 3, 9 + 1 + 16)
    assert made.coglm.n_codes == 50 and made.coglm.layout == layout
    assert made.direct.coglm == made.iterative.coglm == made.coglm
    assert (made.direct.n_text, made.iterative.n_text) == (96, 16) and made.direct.fine_grid == (12, 12)
    assert (made.coarse_pixels, made.fine_pixels) == (4 * 16, 12 * 16)
    assert made.fine_choice == "mean" and made.sampling == SamplingConfig()

    given = {"direct": {"n_text": 7, "factor": 2}, "iterative": {"window": (3, 3)}}
    own = make_preset("new", made.vqvae, layout, {**sizes, "max_positions": 64}, 30, 2, **given)
    assert own.coglm.transformer.max_positions == 64
    assert (own.direct.n_text, own.direct.factor, own.iterative.window) == (7, 2, (3, 3))


def test_a_preset_on_another_coglm_keeps_its_stages() -> None:
    toy = get_preset("toy")
    deeper = dataclasses.replace(toy.coglm, transformer=dataclasses.replace(toy.coglm.transformer, n_layers=7))
    changed = toy.with_coglm(deeper)
    assert changed.coglm == changed.direct.coglm == changed.iterative.coglm == deeper
    assert changed.with_coglm(toy.coglm) == toy  # nothing else was changed


def test_sizes_of_the_released_model() -> None:
    preset = get_preset("cogview2")
    assert preset.coglm.ids == SpecialIds(pad=20003, boi=150000, boe=150001, boc=150002)
    assert preset.vqvae.rates == (4, 8, 16)
    assert (preset.coarse_pixels, preset.fine_pixels) == (160, 480)
    assert preset.coglm.layout.max_text + preset.coglm.layout.n_image < preset.coglm.transformer.max_positions


def test_the_toy_fits_its_tokenizer() -> None:
    preset = get_preset("toy")
    tokenizer = Tokenizer(TOY_WEIGHTS / "text.model", preset.vqvae.codebook_size)
    ids = tokenizer.special_ids
    assert ids == special_ids(preset.vqvae.codebook_size, tokenizer.n_text) == preset.coglm.ids
    names = [tokenizer.token(id) for id in (ids.pad, ids.boi, ids.boe, ids.boc)]  # <pad> is the text model's own
    assert names == ["<pad>", "<start_of_image>", "<start_of_english>", "<start_of_chinese>"]
    assert tokenizer.vocab_size == preset.coglm.transformer.vocab_size == ids.boc + 1
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
