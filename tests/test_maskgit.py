"""MaskGIT's decoding: how many cells each round masks, and that the model is least sure of just these."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_lopar import GRID, fine_codes
from test_super_resolution import CODES, TEXTS, tiny_config

from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.maskgit import cosine_counts, guess, least_sure, resample_by_confidence
from minicogview.sampling import Sampler

ROUNDS = 5


def make(**changes: object) -> IterativeSR:
    torch.manual_seed(0)
    model = IterativeSR(dataclasses.replace(tiny_config(n_text=2), **changes)).eval()
    with torch.no_grad():
        model.base.token_embedding.weight.mul_(5)  # so that the model is surer of some cells than of others
    return model


@pytest.fixture
def model() -> IterativeSR:
    return make()


def samplers(seeds: tuple[int, ...] = (0, 1)) -> list[Sampler]:
    return [Sampler([seed + 100 * r for seed in seeds], n_steps=144) for r in range(ROUNDS)]


@given(st.integers(0, 4000), st.integers(1, 20))
def test_counts_fall_along_the_cosine(n_cells: int, n_rounds: int) -> None:
    counts = cosine_counts(n_cells, n_rounds)
    assert len(counts) == n_rounds and counts[0] == n_cells
    assert counts == sorted(counts, reverse=True)
    for round, count in enumerate(counts):
        share = torch.tensor(torch.pi / 2 * round / n_rounds, dtype=torch.float64).cos()
        assert abs(count - n_cells * float(share)) <= 1
    assert cosine_counts(144, 3)[2] == 72  # cos(60 degrees) is one half, and no cell more


def test_every_round_masks_as_many_as_the_cosine_says(model: IterativeSR) -> None:
    masks: list[torch.Tensor] = []
    rounds = resample_by_confidence(model, TEXTS, fine_codes(), samplers(), masks=masks)
    assert len(rounds) == len(masks) == ROUNDS
    for mask, count in zip(masks, cosine_counts(144, ROUNDS), strict=True):
        assert mask.sum(1).tolist() == [count, count]
    assert all(codes.min() >= 0 and codes.max() < CODES for codes in rounds)  # no <start_of_image> is left
    before = fine_codes()
    for mask, after in zip(masks, rounds, strict=True):
        assert torch.equal(before[~mask], after[~mask])
        before = after
    for earlier, later in pairwise(masks):
        assert not (later & ~earlier).any()  # a cell that was kept once stays
    assert (masks[-1][0] != masks[-1][1]).any()  # each picture has its own cells


def test_the_direct_stages_codes_are_all_replaced(model: IterativeSR) -> None:
    *_, one = resample_by_confidence(model, TEXTS, fine_codes(), samplers())
    *_, other = resample_by_confidence(model, TEXTS, (fine_codes() + 1) % CODES, samplers())
    assert torch.equal(one, other)
    told = make(fine_start="enlarged")  # its fine tokens start from the picture that is replaced
    *_, one = resample_by_confidence(told, TEXTS, fine_codes(), samplers())
    *_, other = resample_by_confidence(told, TEXTS, (fine_codes() + 1) % CODES, samplers())
    assert not torch.equal(one, other)


@torch.no_grad()
def test_the_least_likely_guesses_are_made_again(model: IterativeSR) -> None:
    masks: list[torch.Tensor] = []
    first, *_ = resample_by_confidence(model, TEXTS, fine_codes(), samplers(), masks=masks)
    _, hidden = model(TEXTS, torch.full((2, 144), model.config.coglm.ids.boi))
    probability = model.base.logits(hidden, CODES).softmax(-1).gather(2, first[:, :, None])[:, :, 0]
    for row in range(2):
        again = masks[1][row]
        assert probability[row, again].max() <= probability[row, ~again].min()
        assert probability[row, again].mean() < probability[row, ~again].mean()


@torch.no_grad()
def test_guessing_in_chunks_changes_nothing(model: IterativeSR) -> None:
    _, hidden = model(TEXTS, fine_codes())
    masked = torch.rand(2, 144, generator=torch.Generator().manual_seed(3)) < 0.3
    whole, parts = (guess(model, hidden, masked, samplers()[0], chunk) for chunk in (144, 7))
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])
    assert whole[1].max() <= 0


def test_least_sure_cells_are_masked_ones() -> None:
    confidence = torch.tensor([[-5.0, -1.0, -3.0, -2.0], [-1.0, -2.0, -2.0, -9.0]])
    masked = torch.tensor([[False, True, True, True], [True, True, True, False]])
    assert least_sure(confidence, masked, 2).int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]
    assert not least_sure(confidence, masked, 0).any()


def test_cells_outside_of_the_region_stay(model: IterativeSR) -> None:
    region, masks = torch.zeros(GRID, dtype=torch.bool), []
    region[3:8, 2:6] = True
    *_, last = resample_by_confidence(
        model, TEXTS, fine_codes(), samplers(), region=region, choice_temperature=4.5, masks=masks
    )
    changed = (last != fine_codes()).any(0).reshape(GRID)
    assert changed.any() and not changed[~region].any()
    assert [int(mask[0].sum()) for mask in masks] == cosine_counts(20, ROUNDS)
    rounds = resample_by_confidence(model, TEXTS, fine_codes(), samplers(), region=torch.zeros(GRID))
    assert len(rounds) == ROUNDS and torch.equal(rounds[-1], fine_codes())


def test_seeds_repeat_whatever_stands_beside_them(model: IterativeSR) -> None:
    def run(rows: slice, seeds: list[int], temperature: float = 4.5) -> torch.Tensor:
        own = samplers((0, 1)[rows])
        return resample_by_confidence(
            model, TEXTS[rows], fine_codes()[rows], own, choice_temperature=temperature, seeds=seeds
        )[-1]

    both = run(slice(None), [7, 8])
    assert torch.equal(both, run(slice(None), [7, 8]))
    assert torch.equal(both[1:], run(slice(1, 2), [8]))
    assert not torch.equal(both, run(slice(None), [8, 9]))  # the noise alone
    assert torch.equal(run(slice(None), [7, 8], 0.0), run(slice(None), [8, 9], 0.0))


def test_wrong_input_is_refused(model: IterativeSR) -> None:
    with pytest.raises(MiniCogViewError, match="fine codes of shape"):
        resample_by_confidence(model, TEXTS, fine_codes()[:, :100], samplers())
    with pytest.raises(MiniCogViewError, match="0 samplers"):
        resample_by_confidence(model, TEXTS, fine_codes(), [])
    with pytest.raises(MiniCogViewError, match="temperature"):
        resample_by_confidence(model, TEXTS, fine_codes(), samplers(), choice_temperature=-1.0)
    with pytest.raises(MiniCogViewError, match="3 seeds for 2 pictures"):
        resample_by_confidence(model, TEXTS, fine_codes(), samplers(), seeds=[1, 2, 3])
    with pytest.raises(MiniCogViewError, match=r"region of shape \(4, 4\): expected \(12, 12\)"):
        resample_by_confidence(model, TEXTS, fine_codes(), samplers(), region=torch.ones(4, 4))
