"""CogLM on tiny random weights: the loop that generates tokens, and the tasks that are built on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from minicogview import masking
from minicogview.attention import attention_bias
from minicogview.coglm import Batch, CogLM, collate
from minicogview.config import CogLMConfig, LayoutConfig, SamplingConfig, SpecialIds, TransformerConfig, get_preset
from minicogview.errors import MiniCogViewError
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps

LAYOUT = LayoutConfig(max_text=8, grid=4, n_patches=2, patch_size=2)
IDS = SpecialIds(pad=33, boi=60, boe=61, boc=62)
TEXT = [35, 40, 36]
GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> CogLM:
    torch.manual_seed(0)
    sizes = TransformerConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=63, max_positions=25)
    model = CogLM(CogLMConfig(sizes, LAYOUT, IDS, n_codes=30)).eval()
    for parameter in model.parameters():  # large enough that choices differ from token to token
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    return model


def greedy(rows: int) -> Sampler:
    return Sampler(range(rows), GREEDY, n_steps=16)


def test_drawing_equals_the_uncached_argmax(model: CogLM) -> None:
    """Every token must be the likeliest one by a plain forward pass over all the tokens before it."""
    codes = model.generate([TEXT], greedy(1)).tokens[0]
    tokens = torch.tensor([[*TEXT, IDS.boi, *codes.tolist()]])
    positions, mask = masking.inference(len(TEXT), tokens.shape[1], LAYOUT)
    logits = model.transformer.logits(model.transformer(tokens, positions[None], attention_bias(mask)), 30)
    assert torch.equal(logits[0, len(TEXT) : -1].argmax(-1), codes)


def test_scores_are_mean_log_probabilities(model: CogLM) -> None:
    filled = model.generate([TEXT], greedy(1))
    tokens = torch.tensor([[*TEXT, IDS.boi, *filled.tokens[0].tolist()]])
    positions, mask = masking.inference(len(TEXT), tokens.shape[1], LAYOUT)
    logits = model.transformer.logits(model.transformer(tokens, positions[None], attention_bias(mask)), 30)
    expected = -F.cross_entropy(logits[0, len(TEXT) : -1], filled.tokens[0])
    assert torch.allclose(filled.scores[0], expected, atol=1e-5)


def test_texts_of_several_lengths_do_not_disturb_each_other(model: CogLM) -> None:
    texts = [TEXT, [50], [], [41, 42, 43, 44, 45]]
    together = model.generate(texts, greedy(4)).tokens
    for row, text in enumerate(texts):
        assert torch.equal(together[row], model.generate([text], greedy(1)).tokens[0])


def test_rows_of_one_text_share_its_prompt(model: CogLM) -> None:
    config = SamplingConfig(temperature=1.0, top_k=30)
    many = model.generate([TEXT], Sampler([5, 6, 7], config, n_steps=16), n=3).tokens
    alone = model.generate([TEXT], Sampler([6], config, n_steps=16)).tokens
    assert torch.equal(many[1], alone[0])
    assert not torch.equal(many[0], many[1])


def test_guidance_of_one_text_with_itself_changes_nothing(model: CogLM) -> None:
    """Without a text the guided and the plain distribution coincide, whatever the scale."""
    plain = model.generate([[]], greedy(1)).tokens
    assert torch.equal(model.generate([[]], greedy(1), guidance=3.0).tokens, plain)
    guided = model.generate([TEXT], greedy(2), n=2, guidance=3.0)
    assert guided.tokens.shape == (2, 16)


def test_steps_taken_a_faster_way_draw_the_same(model: CogLM, monkeypatch: pytest.MonkeyPatch) -> None:
    region = torch.ones(4, 4)
    calls: list[int] = []

    @contextmanager
    def decoding(model: CogLM, rows: int) -> Iterator[None]:
        calls.append(rows)
        with fast_steps(model, rows):
            yield

    def draw() -> list[torch.Tensor]:
        sampler = Sampler([5, 6], SamplingConfig(top_k=30), n_steps=16)
        made = [
            model.generate([TEXT], greedy(1)),
            model.generate([TEXT], sampler, n=2, text_weight=1.4, guidance=2.0),
            model.complete(TEXT, torch.arange(16), region, sampler, n=2),
        ]
        return [filled.tokens for filled in made]

    plain = draw()
    monkeypatch.setattr(model, "decoding", decoding)
    assert all(torch.equal(fast, tokens) for fast, tokens in zip(draw(), plain, strict=True))
    assert calls == [1, 4, 2]  # guidance doubles the rows
    assert "code_logits" not in vars(model)  # the fast way ends with the call


def test_text_weight_changes_the_picture(model: CogLM) -> None:
    plain = model.generate([TEXT], greedy(1)).scores
    assert not torch.allclose(model.generate([TEXT], greedy(1), text_weight=3.0).scores, plain)


def test_completion_keeps_what_is_kept(model: CogLM) -> None:
    picture = torch.arange(16)
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[1:3, 2:] = True
    filled = model.complete(TEXT, picture, region, Sampler([0, 1], SamplingConfig(top_k=30), n_steps=16), n=2)
    assert filled.tokens.shape == (2, 16)
    assert torch.equal(filled.tokens[:, ~region.flatten()], picture[~region.flatten()].expand(2, -1))


def test_caption_scores_equal_a_plain_forward_pass(model: CogLM) -> None:
    picture, texts = torch.arange(16), [[35, 36], [40, 41, 42, 43]]
    scores = model.score_captions(picture[None], texts, IDS.boe)
    for text, score in zip(texts, scores, strict=True):
        sample = masking.caption_scoring(picture, torch.tensor(text), IDS.boe, LAYOUT)
        batch = collate([sample])
        assert torch.allclose(-model(batch), score, atol=1e-5)
    paired = model.score_captions(torch.stack([picture, picture]), texts, IDS.boe)
    assert torch.allclose(paired, scores, atol=1e-5)


def test_captions_are_text_and_end(model: CogLM) -> None:
    text = model.caption(torch.arange(16), IDS.boc, end=32, max_tokens=5)
    assert 0 < len(text) <= 5
    assert all(30 <= token < 60 and token != IDS.pad for token in text)


def test_spread_targets_reduce_to_the_plain_loss_over_codes(model: CogLM) -> None:
    raw = torch.tensor([*TEXT, IDS.pad, *range(16)])
    batch = collate([masking.text_to_image(raw, IDS, LAYOUT)])
    exact = model(batch, torch.eye(30))
    hidden = model.transformer(batch.tokens, batch.positions, attention_bias(batch.mask))
    logits = model.transformer.logits(hidden[batch.loss_mask], 30)
    assert torch.allclose(exact, F.cross_entropy(logits, batch.labels[batch.loss_mask]), atol=1e-5)


def test_errors_name_the_limit(model: CogLM) -> None:
    with pytest.raises(MiniCogViewError, match="9 tokens, at most 8"):
        model.generate([[35] * 9], greedy(1))
    with pytest.raises(MiniCogViewError, match="n=2"):
        model.generate([TEXT, TEXT], greedy(2), n=2)


def test_rms_norm_learns_and_draws(model: CogLM) -> None:
    torch.manual_seed(0)
    transformer = dataclasses.replace(model.config.transformer, norm_kind="rms")
    other = CogLM(dataclasses.replace(model.config, transformer=transformer))
    batch = collate([masking.text_to_image(torch.tensor([*TEXT, IDS.pad, *range(16)]), IDS, LAYOUT)])
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = other(batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # it knows its only picture by heart
    assert other.eval().generate([TEXT], greedy(1)).tokens[0].tolist() == list(range(16))


def test_the_small_preset_takes_a_training_step() -> None:
    preset = get_preset("small")
    model = CogLM(preset.coglm)
    ids, n = preset.coglm.ids, preset.coglm.layout.n_image
    raw = torch.cat([torch.arange(20) + preset.vqvae.codebook_size + 100, torch.full((4,), ids.pad), torch.arange(n)])
    batch: Batch = collate([masking.text_to_image(raw, ids, preset.coglm.layout)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = model(batch)
    first.backward()
    optimizer.step()
    with torch.no_grad():
        assert model(batch) < first
