"""The iterative stage: its schedule, as data and by rule, and what a round may change."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_super_resolution import CODES, TEXTS, tiny_config

from minicogview.errors import MiniCogViewError
from minicogview.lopar import OFFICIAL, IterativeSR, Schedule, spread_order, spread_schedule
from minicogview.sampling import Sampler
from minicogview.super_resolution import DirectSR

GRID = (12, 12)


@pytest.fixture
def model() -> IterativeSR:
    torch.manual_seed(0)
    return IterativeSR(tiny_config(n_text=2)).eval()


def fine_codes() -> torch.Tensor:
    return torch.randint(CODES, (2, 144), generator=torch.Generator().manual_seed(1))


def samplers(schedule: Schedule, seeds: tuple[int, int] = (0, 1)) -> list[Sampler]:
    return [Sampler([seed + 100 * r for seed in seeds], n_steps=144) for r in range(schedule.n_rounds)]


def test_official_schedule_masks_as_many_as_the_original() -> None:
    counts = [int(OFFICIAL.masked(r, (60, 60)).sum()) for r in range(1, 7)]
    assert counts == [2300, 1900, 1500, 1000, 600, 200]
    assert int((~OFFICIAL.masked(1, (60, 60))).sum()) == 1300  # never resampled


def test_every_later_round_masks_a_part_of_the_one_before() -> None:
    for schedule in (OFFICIAL, spread_schedule(4, side=5)):
        masks = [schedule.masked(r, (25, 31)) for r in range(1, schedule.n_rounds + 1)]
        assert masks[0].shape == (25, 31)
        for earlier, later in pairwise(masks):
            assert not (later & ~earlier).any()


def test_spread_order_keeps_first_cells_apart() -> None:
    (first, second, *_), side = spread_order(6), 6
    steps = [min(abs(a - b), side - abs(a - b)) for a, b in zip(first, second, strict=True)]
    assert steps == [3, 3]  # opposite corners of the repeated tile
    assert sorted(spread_order(4)) == [(r, c) for r in range(4) for c in range(4)]


@given(st.integers(1, 12), st.integers(1, 7), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(max_examples=30, deadline=None)
def test_schedules_by_rule(n_rounds: int, side: int, a: float, b: float) -> None:
    schedule = spread_schedule(n_rounds, side, first=max(a, b), last=min(a, b))
    counts = [int(schedule.masked(r, (side, side)).sum()) for r in range(1, n_rounds + 1)]
    assert schedule.n_rounds == n_rounds
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 1
    assert abs(counts[0] - max(1.0, max(a, b) * side * side)) <= 0.5


@pytest.mark.parametrize(
    "wrong", [{"n_rounds": 0}, {"n_rounds": 2, "first": 0.1, "last": 0.5}, {"n_rounds": 2, "side": 0}]
)
def test_impossible_schedules_are_refused(wrong: dict) -> None:
    with pytest.raises(MiniCogViewError, match="no schedule of"):
        spread_schedule(**wrong)


def test_a_round_changes_masked_cells_alone(model: IterativeSR) -> None:
    before = fine_codes()
    for r, after in enumerate(model.resample(TEXTS, before, samplers(OFFICIAL)), 1):
        kept = ~OFFICIAL.masked(r, GRID).flatten()
        assert torch.equal(after[:, kept], before[:, kept])
        assert (after != before).any() and after.max() < CODES
        before = after


def test_cells_outside_of_the_region_stay(model: IterativeSR) -> None:
    region = torch.zeros(GRID, dtype=torch.bool)
    region[3:8, 2:6] = True
    *_, last = model.resample(TEXTS, fine_codes(), samplers(OFFICIAL), region=region)
    changed = (last != fine_codes()).any(0).reshape(GRID)
    assert changed.any() and not changed[~region].any()


def test_an_empty_region_changes_nothing(model: IterativeSR) -> None:
    rounds = model.resample(TEXTS, fine_codes(), samplers(OFFICIAL), region=torch.zeros(GRID))
    assert len(rounds) == 6 and torch.equal(rounds[-1], fine_codes())


def test_a_seed_gives_the_same_codes_whatever_stands_beside_it(model: IterativeSR) -> None:
    *_, both = model.resample(TEXTS, fine_codes(), samplers(OFFICIAL))
    alone = [Sampler([1 + 100 * r], n_steps=144) for r in range(6)]
    *_, second = model.resample(TEXTS[1:], fine_codes()[1:], alone)
    assert torch.equal(both[1:], second)


@torch.no_grad()
def test_masked_cells_do_not_leak_their_code(model: IterativeSR) -> None:
    boi, codes, other = model.config.coglm.ids.boi, fine_codes(), fine_codes()
    other[:, 50] = (other[:, 50] + 1) % CODES
    masked = [c.index_fill(1, torch.tensor([50]), boi) for c in (codes, other)]
    assert torch.equal(model(TEXTS, masked[0])[1], model(TEXTS, masked[1])[1])


@torch.no_grad()
def test_only_the_first_words_are_read(model: IterativeSR) -> None:
    long, cut = [[40, 41, 42, 43], [44, 45, 46]], [[40, 41], [44, 45]]
    assert torch.equal(model(long, fine_codes())[1], model(cut, fine_codes())[1])


def test_wrong_input_is_refused(model: IterativeSR) -> None:
    with pytest.raises(MiniCogViewError, match="fine codes of shape"):
        model.resample(TEXTS, fine_codes()[:, :100], samplers(OFFICIAL))
    with pytest.raises(MiniCogViewError, match="2 samplers for 6 rounds"):
        model.resample(TEXTS, fine_codes(), samplers(OFFICIAL)[:2])
    with pytest.raises(MiniCogViewError, match=r"region of shape \(4, 4\): expected \(12, 12\)"):
        model.resample(TEXTS, fine_codes(), samplers(OFFICIAL), region=torch.ones(4, 4))


def test_the_direct_stages_attention_can_be_taken_over(model: IterativeSR) -> None:
    torch.manual_seed(1)
    direct = DirectSR(tiny_config())
    mlp = model.base.layers[0].mlp.state_dict()
    model.start_from_direct(direct)
    assert torch.equal(model.fine_position.weight, direct.fine_position.weight)
    for layer, own in zip(model.base.layers, direct.fine_attention, strict=True):
        assert torch.equal(layer.attention.qkv.weight, own.qkv.weight)
        assert layer.attention.qkv.weight is not own.qkv.weight
    assert all(torch.equal(value, mlp[name]) for name, value in model.base.layers[0].mlp.state_dict().items())


def test_a_direct_stage_with_layers_of_its_own_hands_over_all_of_them(model: IterativeSR) -> None:
    torch.manual_seed(1)
    direct = DirectSR(dataclasses.replace(tiny_config(), own_layers=True))
    model.start_from_direct(direct)
    taken = model.base.layers.state_dict()
    assert all(torch.equal(value, taken[name]) for name, value in direct.fine_layers.state_dict().items())
