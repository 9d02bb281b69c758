"""The judge is fair, and the shipped weights do what the model card says, on a small sample."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import keep_emoji

from minicogview.data.emoji import indices, load_emoji
from minicogview.evaluation.judge import Judge, sharpness
from minicogview.pipeline import CogView2


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(CogView2.from_pretrained("toy"), progress=False)


def test_true_pictures_are_found_and_wrong_ones_are_not(judge: Judge) -> None:
    targets = torch.arange(0, len(judge.emoji), 29)
    ranks, nearest = judge.ranks(judge.codes[targets], targets)
    assert (ranks == 0).all()
    same = (judge.codes[nearest] == judge.codes[targets]).all(1)
    assert same.float().mean() > 0.95  # the rest: other codes that decode to the same picture
    ranks, _ = judge.ranks(judge.codes[targets.roll(1)], targets)
    assert (ranks > 0).float().mean() > 0.95


def test_identical_drawings_both_count(judge: Judge) -> None:
    names = [emoji.en for emoji in judge.emoji]
    cat, face = names.index("grinning cat"), names.index("cat face")
    if not torch.equal(judge.codes[cat], judge.codes[face]):
        pytest.fail("these two emoji are the same drawing: choose another pair if the data changed")
    ranks, _ = judge.ranks(judge.codes[[cat, face]], torch.tensor([face, cat]))
    assert ranks.tolist() == [0, 0]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_shipped_weights_draw_what_the_text_says(judge: Judge, lang: str) -> None:
    """Far below the model card's numbers, far above chance (1 in 3,139)."""
    assert judge.retrieval("names", lang, limit=48)["top1"] > 0.8
    heldout = judge.retrieval("heldout", lang, limit=48)
    assert heldout["same_tone"] > 0.8 and heldout["top1"] > 0.6


def test_upsampled_pictures_still_show_what_the_text_says(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compared with coarse pictures: encoding all 3,139 at 96 pixels takes minutes; the model card's command does that.
    monkeypatch.setitem(judge.__dict__, "fine_gallery", judge.gallery)
    for stages in range(2, judge.model.n_stages + 1):
        assert judge.retrieval("names", "en", limit=12, stages=stages)["top1"] > 0.7


@pytest.mark.parametrize("split", ["train", "tokenizer_heldout"])
def test_super_resolution_beats_bicubic_enlargement(
    judge: Judge, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means of four pictures: 7 dB and 2 dB better."""
    unseen = {one.key for one in load_emoji("tokenizer_heldout")}
    known = [one for one in load_emoji("train") if one.key not in unseen]
    some = (known if split == "train" else load_emoji(split))[::40]
    keep_emoji(some[:4], tmp_path, monkeypatch)
    numbers = sharpness(judge.upsampler, judge.tokenizer, split, "en", limit=16)
    assert numbers["n"] == 4 and numbers["psnr_direct"] > numbers["psnr_bicubic"]
    assert numbers["psnr_iterative"] > numbers["psnr_bicubic"]


def test_the_same_seed_draws_the_same(judge: Judge) -> None:
    texts = ["red apple", "红心"]
    assert torch.equal(judge.draw(texts, seed=3), judge.draw(texts, seed=3))


def test_post_selection_is_between_chance_and_the_best_of_all(judge: Judge) -> None:
    result = judge.selection("heldout", "en", n=4, limit=24)
    assert result["n"] == 24 and 0 < result["random"] <= result["any"] <= 1
    assert result["random"] - 0.1 <= result["kept"] <= result["any"]


def test_captions_and_holes(judge: Judge) -> None:
    assert judge.captioning("en", n_pictures=30, n_names=30)["top1"] > 0.8  # chance is 1 in 30
    filled = judge.infilling("en", n_pictures=8)
    assert filled["psnr_tokenizer"] + 1 > filled["psnr"] > 15  # other codes may happen to decode better


def test_heldout_pairs_are_not_in_training() -> None:
    train, heldout = load_emoji("train"), load_emoji("heldout")
    assert len(heldout) >= 150
    assert not set(indices(train)) & set(indices(heldout))
    assert {e.character for e in heldout} <= {e.character for e in train}
    assert {e.tone for e in heldout} <= {e.tone for e in train}
