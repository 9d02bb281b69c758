"""The direct stage: what it shares with CogLM, what is new in it, and who sees whom."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minicogview.config import (
    CogLMConfig,
    LayoutConfig,
    SpecialIds,
    SuperResolutionConfig,
    TransformerConfig,
    get_preset,
)
from minicogview.errors import MiniCogViewError
from minicogview.sampling import Sampler
from minicogview.super_resolution import DirectSR, choose_codes, low_mask, start_positions, text_slots
from minicogview.transformer import Transformer

CODES = 32
TEXTS = [[40, 41, 42], [43]]


def tiny_config(n_text: int = 4) -> SuperResolutionConfig:
    transformer = TransformerConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=64, max_positions=32)
    layout = LayoutConfig(max_text=8, grid=4)
    ids = SpecialIds(pad=60, boi=61, boe=62, boc=63)
    config = CogLMConfig(transformer, layout, ids, CODES)
    return SuperResolutionConfig(config, n_text, window=(5, 3), coarse_window=(3, 3))


@pytest.fixture
def model() -> DirectSR:
    torch.manual_seed(0)
    return DirectSR(tiny_config()).eval()


def coarse_codes() -> torch.Tensor:
    return torch.randint(CODES, (2, 16), generator=torch.Generator().manual_seed(1))


def test_text_stands_at_the_right_and_long_texts_are_cut() -> None:
    tokens, positions, real = text_slots([[5, 6], [], [1, 2, 3, 4, 9]], 4)
    assert tokens.tolist() == [[0, 0, 5, 6], [0, 0, 0, 0], [1, 2, 3, 4]]
    assert positions.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert real.sum(1).tolist() == [2, 0, 4]


def test_low_level_mask() -> None:
    mask = low_mask(torch.tensor([[False, True]]), n_coarse=2)[0].int().tolist()
    #         empty text  coarse
    assert mask == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_fine_positions_start_as_tiles_of_the_base_table() -> None:
    table = torch.arange(32.0)[:, None]
    start = start_positions(table, LayoutConfig(max_text=8, grid=4), 3).reshape(12, 12)
    assert start[0, :4].tolist() == [8, 9, 10, 11]  # 8 is <start_of_image>'s row: one off
    assert torch.equal(start[:4, :4], start[4:8, 8:])
    above = start_positions(table, LayoutConfig(max_text=8, grid=4), 3, "enlarged").reshape(12, 12)
    assert above[0, :4].tolist() == [9, 9, 9, 10] and above[11, 11] == 24


@torch.no_grad()
def test_a_fine_token_can_start_as_the_enlarged_picture_has_it() -> None:
    torch.manual_seed(0)
    alone = dataclasses.replace(tiny_config(), fine_start="enlarged", coarse_window=(1, 1), window=(1, 1))
    model, codes = DirectSR(alone).eval(), coarse_codes()
    start = torch.randint(CODES, (2, 144))
    other = start.clone()
    other[:, 40] = (other[:, 40] + 1) % CODES
    moved = (model([[], []], codes, start)[1] - model([[], []], codes, other)[1]).abs().amax((0, 2))
    assert moved.nonzero()[:, 0].tolist() == [40]  # with windows of one cell no other token is affected


def test_starts_from_the_base_and_shares_it() -> None:
    torch.manual_seed(0)
    base = Transformer(tiny_config().coglm.transformer)
    model = DirectSR(tiny_config(), base)
    assert model.base is base
    for own, layer in zip(model.fine_attention, base.layers, strict=True):
        assert torch.equal(own.qkv.weight, layer.attention.qkv.weight)
        assert own.qkv.weight is not layer.attention.qkv.weight


@torch.no_grad()
def test_own_layers_start_as_the_base_and_serve_the_fine_level_alone(model: DirectSR) -> None:
    own = DirectSR(dataclasses.replace(tiny_config(), own_layers=True), model.base).eval()
    low, fine = model(TEXTS, coarse_codes())
    assert all(torch.equal(a, b) for a, b in zip(own(TEXTS, coarse_codes()), (low, fine), strict=True))
    torch.nn.init.zeros_(own.fine_layers[0].mlp.down.weight)
    changed_low, changed_fine = own(TEXTS, coarse_codes())
    assert torch.equal(changed_low, low) and not torch.allclose(changed_fine, fine)


@torch.no_grad()
def test_the_low_level_never_sees_the_fine_one(model: DirectSR) -> None:
    low, fine = model(TEXTS, coarse_codes())
    assert low.shape == (2, 4 + 16, 32) and fine.shape == (2, 144, 32)
    model.fine_position.weight.add_(1.0)
    low_again, fine_again = model(TEXTS, coarse_codes())
    assert torch.equal(low, low_again) and not torch.allclose(fine, fine_again)


@torch.no_grad()
def test_a_fine_token_sees_only_what_is_near() -> None:
    """In one layer. In the next, the coarse tokens, which see the whole coarse picture, have passed everything on."""
    torch.manual_seed(0)
    coglm = tiny_config().coglm
    one_layer = dataclasses.replace(coglm, transformer=dataclasses.replace(coglm.transformer, n_layers=1))
    model, changed = DirectSR(dataclasses.replace(tiny_config(), coglm=one_layer)).eval(), coarse_codes()
    changed[:, 0] = (changed[:, 0] + 1) % CODES
    before, after = (model([[], []], codes) for codes in (coarse_codes(), changed))
    low, fine = ((a - b).abs().amax((0, 2)) for a, b in zip(before, after, strict=True))
    near = torch.zeros(12, 12, dtype=torch.bool)
    near[:6, :6] = True  # within one coarse cell of the corner
    assert torch.equal(fine.reshape(12, 12) > 1e-6, near)
    assert low[4:].min() > 0  # the coarse level is not local


@torch.no_grad()
def test_texts_of_several_lengths_share_a_batch(model: DirectSR) -> None:
    _, together = model(TEXTS, coarse_codes())
    _, alone = model(TEXTS[1:], coarse_codes()[1:])
    assert torch.allclose(together[1:], alone, atol=1e-5)


def test_sampling_in_chunks_changes_nothing_and_seeds_repeat(model: DirectSR) -> None:
    hidden = torch.randn(2, 144, 32, generator=torch.Generator().manual_seed(2))
    cells = torch.arange(144)

    def draw(chunk: int, seeds: list[int]) -> torch.Tensor:
        return choose_codes(model.base, hidden, cells, CODES, Sampler(seeds, n_steps=144), chunk)

    assert torch.equal(draw(1024, [3, 4]), draw(10, [3, 4]))
    assert not torch.equal(draw(1024, [3, 4]), draw(1024, [5, 6]))
    codes = model.upsample(TEXTS, coarse_codes(), Sampler([3, 4], n_steps=144))
    assert codes.shape == (2, 144) and 0 <= codes.min() and codes.max() < CODES


def test_only_what_is_new_needs_training(model: DirectSR) -> None:
    model.base.requires_grad_(False)
    _, fine = model(TEXTS, coarse_codes())
    model.base.logits(fine, CODES).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (not name.startswith("base.")), name


@pytest.mark.parametrize(
    "codes", [torch.zeros(2, 9, dtype=torch.long), torch.full((2, 16), CODES), torch.full((2, 16), -1)]
)
def test_wrong_codes_are_refused(model: DirectSR, codes: torch.Tensor) -> None:
    with pytest.raises(MiniCogViewError, match=r"coarse codes .* expected \(pictures, 16\) with values 0..31"):
        model(TEXTS, codes)


def test_released_sizes() -> None:
    preset = get_preset("cogview2")
    with torch.device("meta"):
        small = TransformerConfig(2, 3072, 48, preset.coglm.transformer.vocab_size)
        coglm = CogLMConfig(small, preset.coglm.layout, preset.coglm.ids, preset.vqvae.codebook_size)
        model = DirectSR(SuperResolutionConfig(coglm, preset.direct.n_text, preset.direct.factor))
    assert model.fine_position.weight.shape == (3600, 3072)
    assert preset.direct.fine_grid == (60, 60) and preset.direct.window == (9, 5) and preset.iterative.n_text == 16
