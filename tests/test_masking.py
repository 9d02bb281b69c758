"""Masks: every task on small layouts, what each row predicts, and that no row ever sees its own target."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minicogview import masking
from minicogview.attention import attention_bias
from minicogview.coglm import collate
from minicogview.config import LayoutConfig, SpecialIds, TransformerConfig, get_preset
from minicogview.masking import Sample
from minicogview.transformer import Transformer

TOY = get_preset("toy")
SMALL = LayoutConfig(max_text=10, grid=4, n_patches=2, patch_size=2)
IDS = SpecialIds(pad=50, boi=60, boe=61, boc=62)  # picture codes 0..49, text 51..59
V = 63


def make_raw(layout: LayoutConfig, texts: list[list[int]], room: int, seed: int = 0) -> Tensor:
    """Texts with a pad after each, pads up to ``room`` tokens, then a random picture."""
    tokens = [token for text in texts for token in [*text, IDS.pad]]
    assert len(tokens) <= room
    codes = torch.randint(0, 50, (layout.n_image,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor(tokens + [IDS.pad] * (room - len(tokens))), codes])


def training_samples(layout: LayoutConfig, seed: int = 0) -> dict[str, Sample]:
    """One sample of every task that is trained."""
    generator = torch.Generator().manual_seed(seed)
    texts = [[51, 52, 53, 54], [55, 56, 57]]
    two, one = make_raw(layout, texts, 12, seed), make_raw(layout, texts[:1], 8, seed)
    corners = masking.draw_patches(generator, layout)
    region = torch.rand(layout.grid, layout.grid, generator=generator) < 0.4
    words, picture = torch.tensor(texts[0]), one[-layout.n_image :]
    prose = torch.randint(51, 60, (40,), generator=generator)
    return {
        "draw, first of two texts": masking.text_to_image(two, IDS, layout),
        "draw, second of two texts": masking.text_to_image(two, IDS, layout, second_text=True),
        "draw, one text": masking.text_to_image(one, IDS, layout),
        "caption, two texts": masking.image_to_text(two, IDS, layout, [IDS.boe, IDS.boc], corners),
        "caption, whole picture": masking.image_to_text(one, IDS, layout, [IDS.boe], []),
        "text spans": masking.text_spans(prose, masking.draw_spans(generator, len(prose))),
        "completion": masking.completion_training(words, picture, region, IDS, layout),
        "caption scoring": masking.caption_scoring(picture, words, IDS.boe, layout),
    }


TASKS = list(training_samples(SMALL))
LAYOUTS = {"small": SMALL, "toy": TOY.coglm.layout}


def loss_rows(sample: Sample) -> list[int]:
    assert sample.loss_mask is not None
    return sample.loss_mask.nonzero().flatten().tolist()


# --- no row sees its target


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_nothing_is_seen_by_a_detour(task: str, layout: LayoutConfig) -> None:
    """If i sees j and j sees k, then i sees k: more layers show a row nothing that its mask does not."""
    sees = training_samples(layout)[task].mask.float()
    assert ((sees @ sees > 0) <= (sees > 0)).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_predict_the_next_token_and_do_not_see_it(task: str, layout: LayoutConfig) -> None:
    for seed in range(10):
        sample = training_samples(layout, seed)[task]
        rows = loss_rows(sample)
        assert rows
        for row in rows:
            assert sample.labels is not None
            assert sample.labels[row] == sample.tokens[row + 1]
            assert sample.mask[row, row] and not sample.mask[row, row + 1]
            assert sample.labels[row] < IDS.boi and sample.labels[row] != IDS.pad


def random_transformer(layout: LayoutConfig) -> Transformer:
    torch.manual_seed(0)
    n_positions = max(layout.max_text + 1 + layout.n_image, 40)
    model = Transformer(TransformerConfig(2, 16, 2, V, n_positions)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # large enough that no influence is lost to rounding
    return model


def influence(sample: Sample, layout: LayoutConfig) -> Tensor:
    """(S, S): largest change of row i's logits (row) when token j becomes another one (column)."""
    model, size = random_transformer(layout), len(sample.tokens)
    changed = sample.tokens.expand(size, size).clone()
    changed[range(size), range(size)] = (sample.tokens + 1) % V
    with torch.no_grad():
        bias = attention_bias(sample.mask)
        before = model.logits(model(sample.tokens[None], sample.positions[None], bias))
        after = model.logits(model(changed, sample.positions[None], bias))  # (S variants, S rows, V)
    return (after - before).abs().amax(-1).T


@pytest.mark.parametrize("task", TASKS)
def test_logits_depend_on_what_may_be_seen_and_on_nothing_else(task: str) -> None:
    sample = training_samples(SMALL)[task]
    change = influence(sample, SMALL)
    seeing = sample.mask.any(1)  # rows that see nothing average over everything, and nobody reads them
    own = torch.eye(len(change), dtype=torch.bool)  # a row always knows its own token, from the residual stream
    hidden = ~sample.mask & ~own & seeing[:, None]
    assert change[hidden].max() < 1e-4
    assert change[sample.mask].min() > 5e-4


def test_nothing_leaks_in_inference_and_completion() -> None:
    positions, mask = masking.inference(3, 3 + 1 + SMALL.n_image, SMALL)
    tokens = torch.cat([torch.tensor([51, 52, 53, IDS.boi]), torch.arange(SMALL.n_image)])
    change = influence(Sample(tokens, positions, mask), SMALL)
    assert torch.equal(change > 1e-3, mask) and change[~mask].max() < 1e-4


def test_a_leak_would_be_noticed() -> None:
    """This tests the test: a picture that sees its caption passes it on to the caption's rows."""
    sample = training_samples(SMALL)["caption, whole picture"]
    sample.mask[-SMALL.n_image :, :5] = True
    row = loss_rows(sample)[0]
    assert influence(sample, SMALL)[row, row + 1] > 1e-3


# --- text to image


def test_text_to_image_by_hand() -> None:
    raw = make_raw(SMALL, [[51, 52, 53], [54, 55]], 8)  # 51 52 53 pad 54 55 pad pad, picture from 8
    sample = masking.text_to_image(raw, IDS, SMALL, second_text=True)
    assert sample.tokens.tolist() == [51, 52, 53, 50, 54, 55, 50, IDS.boi, *raw[8:].tolist()]
    assert sample.positions.tolist() == [0, 0, 0, 0, 0, 1, 0, *range(10, 27)]
    assert sample.labels is not None and sample.labels.tolist() == [*raw[1:].tolist(), int(raw[-1])]
    assert loss_rows(sample) == list(range(7, 23))  # the start token's row up to the last but one
    columns = sample.mask.nonzero()[:, 1]
    assert set(range(24)) - set(columns.tolist()) == {0, 1, 2, 3, 6}  # other text and pads: seen by nobody
    assert sample.mask[9].nonzero().flatten().tolist() == [4, 5, 7, 8, 9]


@pytest.mark.parametrize("second", [False, True])
def test_what_is_trained_is_what_is_used_for_drawing(second: bool) -> None:
    layout = TOY.coglm.layout
    sample = masking.text_to_image(make_raw(layout, [[51, 52, 53], [54, 55]], 9), IDS, layout, second)
    text = [4, 5] if second else [0, 1, 2]
    kept = torch.tensor([*text, *range(8, len(sample.tokens))])  # the chosen text, start token, picture
    positions, mask = masking.inference(len(text), len(kept), layout)
    assert torch.equal(sample.mask[kept][:, kept], mask)
    assert torch.equal(sample.positions[kept], positions)


def test_without_a_text_the_picture_stands_alone() -> None:
    sample = masking.text_to_image(make_raw(SMALL, [], 2), IDS, SMALL)
    assert not sample.mask[:, 0].any() and sample.mask[1:, 1:].sum() == 17 * 18 // 2


# --- image to text, patches


def test_image_to_text_by_hand() -> None:
    raw = make_raw(SMALL, [[51, 52, 53], [54, 55]], 8)
    sample = masking.image_to_text(raw, IDS, SMALL, [IDS.boe, IDS.boc], [(1, 1)])
    assert sample.tokens[:8].tolist() == [IDS.boe, 51, 52, 53, IDS.boc, 54, 55, 50]
    assert torch.equal(sample.tokens[8:], raw[8:])
    assert sample.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, *range(11, 27)]  # texts restart at 0
    inside = [8 + 4 * row + column for row in (1, 2) for column in (1, 2)]
    assert loss_rows(sample) == [0, 1, 2, 4, 5, inside[0], inside[2]]  # last column of a patch predicts nothing
    picture = list(range(8, 24))
    outside = [i for i in picture if i not in inside]
    assert sample.mask[2].nonzero().flatten().tolist() == [0, 1, 2, *picture]
    assert sample.mask[5].nonzero().flatten().tolist() == [4, 5, *picture]
    assert sample.mask[outside[-1]].nonzero().flatten().tolist() == outside
    assert sample.mask[inside[1]].nonzero().flatten().tolist() == sorted([*outside, *inside[:2]])


def test_caption_scoring_is_captioning_in_another_order() -> None:
    layout, text = TOY.coglm.layout, [51, 52, 53, 54]
    trained = masking.image_to_text(make_raw(layout, [text], 5), IDS, layout, [IDS.boe], [])
    order = torch.tensor([*range(5, 5 + layout.n_image), *range(5)])  # picture first
    scored = masking.caption_scoring(trained.tokens[5:], torch.tensor(text), IDS.boe, layout)
    assert torch.equal(trained.tokens[order], scored.tokens)
    assert torch.equal(trained.positions[order], scored.positions)
    assert torch.equal(trained.mask[order][:, order], scored.mask)
    assert scored.loss_mask is not None and trained.loss_mask is not None
    assert torch.equal(trained.loss_mask[order], scored.loss_mask)


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), get_preset("cogview2").coglm.layout])
@pytest.mark.parametrize("whole_grid", [False, True])
def test_patches_are_distinct_and_cover_what_they_may(layout: LayoutConfig, whole_grid: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    covered = torch.zeros(layout.n_image, dtype=torch.bool)
    for _ in range(200):
        corners = masking.draw_patches(generator, layout, whole_grid)
        assert len(set(corners)) == layout.n_patches
        inside, predicts = masking.patch_cells(corners, layout)
        assert (predicts <= inside).all() and inside[torch.roll(predicts, 1)].all()  # the right neighbour is inside
        covered |= inside
    last = layout.grid if whole_grid else layout.grid - 1
    expected = torch.zeros(layout.grid, layout.grid, dtype=torch.bool)
    expected[:last, :last] = True
    assert torch.equal(covered.view(layout.grid, -1), expected)


# --- splitting


@given(st.lists(st.lists(st.integers(51, 59), min_size=1, max_size=6), min_size=1, max_size=2), st.integers(0, 4))
def test_texts_are_found(texts: list[list[int]], extra: int) -> None:
    raw = make_raw(SMALL, texts, sum(map(len, texts)) + len(texts) + extra)
    spans = masking.split_texts(raw, SMALL.n_image, IDS.pad)
    assert [raw[start:end].tolist() for start, end in spans] == texts


@given(st.lists(st.integers(51, 59), max_size=6))
def test_a_text_without_a_pad_behind_it_is_found(text: list[int]) -> None:
    raw = torch.tensor(text + [1] * SMALL.n_image)
    assert masking.split_texts(raw, SMALL.n_image, IDS.pad) == [(0, len(text))]


# --- spans


@given(st.integers(1, 120), st.lists(st.integers(0, 9), max_size=60), st.floats(0.05, 0.45), st.randoms())
def test_spans_fit_and_never_touch(length: int, draws: list[int], share: float, rng) -> None:
    lengths = masking.span_lengths(draws, length, share)
    assert lengths == [max(draw, 1) for draw in draws[: len(lengths)]]
    assert sum(lengths) <= share * length
    if len(lengths) < len(draws):  # the one that did not fit
        assert sum(lengths) + max(draws[len(lengths)], 1) > share * length
    gaps = rng.sample(range(length - sum(lengths)), len(lengths))  # a share below one half leaves enough
    starts = masking.span_starts(gaps, lengths)
    spans = list(zip(starts, lengths, strict=True))
    for (start, size), (following, _) in pairwise(spans):
        assert start + size < following
    assert all(start >= 0 and start + size < length for start, size in spans)
    sample = masking.text_spans(torch.arange(length), spans)
    assert loss_rows(sample) == [row for start, size in spans for row in range(start, start + size)]


@given(st.integers(1, 200), st.integers(0, 2**31))
def test_drawn_spans_take_at_most_their_share(length: int, seed: int) -> None:
    spans = masking.draw_spans(torch.Generator().manual_seed(seed), length)
    assert sum(size for _, size in spans) <= 0.15 * length
    assert spans == sorted(spans)


def test_text_spans_by_hand() -> None:
    sample = masking.text_spans(torch.arange(10), [(2, 2), (6, 1)])  # predicts 3, 4 and 7
    assert loss_rows(sample) == [2, 3, 6]
    context = [0, 1, 5]  # token 4 is the last one predicted, so context goes on after it
    assert sample.mask[0].nonzero().flatten().tolist() == context
    assert sample.mask[3].nonzero().flatten().tolist() == [0, 1, 2, 3, 5]
    assert sample.mask[9].all()  # the tail is causal
    assert not sample.mask[8, 9]


# --- completion

regions = st.integers(2, 7).flatmap(
    lambda g: st.lists(st.booleans(), min_size=g * g, max_size=g * g).map(lambda cells: torch.tensor(cells).view(g, g))
)


@given(regions)
def test_completion_order(region: Tensor) -> None:
    first, second = (part.tolist() for part in masking.completion_order(region))
    grid, hole = len(region), set(region.flatten().nonzero().flatten().tolist())
    assert sorted(first + second) == list(range(grid * grid))
    assert first == sorted(first) and second == sorted(second)
    assert hole <= set(second)
    for cell in set(second) - hole:  # kept cells come along only as left neighbours
        assert cell % grid < grid - 1 and cell + 1 in hole
    for cell in hole:
        if cell % grid > 0:
            assert second[second.index(cell) - 1] == cell - 1


@given(regions, st.lists(st.integers(51, 59), max_size=5))
def test_completion_training_predicts_exactly_the_hole(region: Tensor, words: list[int]) -> None:
    layout = LayoutConfig(max_text=8, grid=len(region))
    picture, text = torch.arange(layout.n_image), torch.tensor(words, dtype=torch.long)  # a cell's code is its number
    sample = masking.completion_training(text, picture, region, IDS, layout)
    assert sample.labels is not None and sample.loss_mask is not None
    hole = region.flatten().nonzero().flatten()
    assert torch.equal(sample.labels[sample.loss_mask], hole)
    assert torch.equal(sample.tokens[len(words) + 1 :].sort().values, picture)

    used, n_context = masking.completion(text, picture, region, IDS, layout)
    assert torch.equal(sample.mask, used.mask) and torch.equal(sample.positions, used.positions)
    assert (used.tokens[:n_context] >= 0).all()
    wanted = (used.tokens == -1).nonzero().flatten()
    assert torch.equal(wanted - 1, sample.loss_mask.nonzero().flatten())
    assert torch.equal(sample.tokens[wanted], hole)


# --- batches


def test_pads_on_the_right_change_nothing() -> None:
    samples = training_samples(SMALL)
    longest = max(len(sample.tokens) for sample in samples.values()) + 3
    model = random_transformer(SMALL)
    batch = collate([masking.pad_right(sample, longest, IDS.pad) for sample in samples.values()])
    with torch.no_grad():
        together = model(batch.tokens, batch.positions, attention_bias(batch.mask))
        for row, sample in enumerate(samples.values()):
            size = len(sample.tokens)
            alone = model(sample.tokens[None], sample.positions[None], attention_bias(sample.mask))[0]
            real = sample.mask.any(1)  # a row that sees nothing averages over whatever is there
            torch.testing.assert_close(together[row, :size][real], alone[real], atol=1e-4, rtol=1e-4)
            assert not batch.loss_mask[row, size:].any()
            assert (batch.tokens[row, size:] == IDS.pad).all() and (batch.labels[row, size:] == IDS.pad).all()
            assert torch.equal(batch.mask[row, size:], torch.eye(longest, dtype=torch.bool)[size:])
            assert not batch.mask[row, :size, size:].any()
