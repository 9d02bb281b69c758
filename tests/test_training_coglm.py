"""The CogLM objective: batches follow from (seed, step), every task is in them, and they can be learned."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from minicogview.coglm import CogLM
from minicogview.config import CogLMConfig, LayoutConfig, TransformerConfig
from minicogview.data import shapes
from minicogview.errors import MiniCogViewError
from minicogview.tokenizer import Tokenizer
from minicogview.training import RunOptions, Settings, fit
from minicogview.training.coglm import (
    CogLMData,
    CogLMObjective,
    CogLMRecipe,
    draw_region,
    embed_codebook,
    lookalikes,
    spread_targets,
)
from minicogview.training.recipes import TOY_WEIGHTS
from minicogview.training.super_resolution import SuperResolutionRecipe

CODES = 16


def make_data() -> CogLMData:
    """Twelve pictures of random codes, with captions of scenes."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = Tokenizer(TOY_WEIGHTS / "text.model", CODES)
    scenes = [shapes.random_scene(random.Random(i)) for i in range(12)]
    codes = torch.randint(CODES, (12, 16), generator=generator)
    return CogLMData(
        codes,
        lambda i, language, rng: shapes.caption(scenes[i], language),
        lambda i, language: shapes.caption(scenes[i], language),
        tokenizer,
    )


@pytest.fixture(scope="module")
def data() -> CogLMData:
    return make_data()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("batch_size", value) for value in (0, -1, 2.5, "8")), ("seed", -1), ("no_caption", 1.1), ("max_noise", -0.1),
        *(("shares", value) for value in ((0.5, 0.5), (0, 0, 0, 0), (1, 1, 1, -1), (1, 1, 1, float("nan")))),
        ("n_lookalikes", 0), ("n_neighbours", 0), ("text_weight", -1), ("softness", float("nan")),
    ],
)  # fmt: skip
def test_recipes_refuse_numbers_outside_of_their_range(name: str, wrong: object) -> None:
    for recipe in (CogLMRecipe, SuperResolutionRecipe):
        if name in recipe.__dataclass_fields__:
            with pytest.raises(MiniCogViewError, match=f"^{name} is .*: give "):
                recipe(**{name: wrong})
    assert CogLMRecipe(shares=[1, 1, 1, 1]).shares == (1, 1, 1, 1)


def make(data: CogLMData, **recipe: object) -> CogLMObjective:
    torch.manual_seed(0)
    tokenizer = data.tokenizer
    layout = LayoutConfig(max_text=32, grid=4, n_patches=2, patch_size=2)
    sizes = TransformerConfig(n_layers=2, d_model=64, n_heads=2, vocab_size=tokenizer.vocab_size, max_positions=49)
    model = CogLM(CogLMConfig(sizes, layout, tokenizer.special_ids, CODES))
    codebook = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(1))
    return CogLMObjective(model, data, codebook, CogLMRecipe(**({"batch_size": 16, "n_neighbours": 3} | recipe)))


def test_batches_depend_on_seed_and_step_alone(data: CogLMData) -> None:
    one, two = make(data), make(data)
    two.batch(3)  # has made another batch before
    for name, value in vars(one.batch(9)).items():
        assert torch.equal(value, getattr(two.batch(9), name)), name
    assert not torch.equal(one.batch(9).tokens, make(data, seed=1).batch(9).tokens)


@pytest.mark.parametrize("task", range(4))
def test_every_task_predicts_what_it_should(data: CogLMData, task: int) -> None:
    shares = tuple(float(i == task) for i in range(4))
    objective = make(data, shares=shares, max_noise=0.0, no_caption=0.0)
    batch = objective.batch(0)
    labels = batch.labels[batch.loss_mask]
    pictures = labels < CODES
    if task == 0:
        assert pictures.all() and len(labels) == 16 * 16
    elif task == 2:
        assert pictures.all() and 0 < len(labels) < 16 * 16
    elif task == 3:
        assert not pictures.any() and len(labels) > 0
    else:
        assert pictures.any() and (labels == data.tokenizer.eos).sum() == 32  # a caption in each language


def test_noise_changes_inputs_and_never_labels(data: CogLMData) -> None:
    clean = make(data, max_noise=0.0, shares=(1.0, 0.0, 0.0, 0.0)).batch(0)
    noisy = make(data, max_noise=0.9, shares=(1.0, 0.0, 0.0, 0.0)).batch(0)
    assert torch.equal(clean.labels, noisy.labels)
    changed = clean.tokens != noisy.tokens
    assert changed.any() and (clean.tokens[changed] < CODES).all() and (noisy.tokens[changed] < CODES).all()


def test_lookalikes_share_most_codes(data: CogLMData) -> None:
    near = lookalikes(data.codes, 2)
    for i, others in enumerate(near.tolist()):
        shared = (data.codes == data.codes[i]).sum(1)
        shared[i] = -1
        assert i not in others and shared[others].min() >= shared.sort().values[-2]


def test_inputs_of_a_lookalike_leave_the_labels_alone(data: CogLMData) -> None:
    settings = {"max_noise": 0.0, "shares": (1.0, 0.0, 0.0, 0.0), "n_lookalikes": 3}
    plain, mixed = make(data, lookalike=0.0, **settings).batch(0), make(data, lookalike=1.0, **settings).batch(0)
    assert torch.equal(plain.labels, mixed.labels)
    changed = plain.tokens != mixed.tokens
    assert changed[:, -16:].float().mean() > 0.2 and not changed[:, :-16].any()


def test_text_tokens_have_a_larger_weight(data: CogLMData) -> None:
    objective = make(data, shares=(0.0, 1.0, 0.0, 0.0))
    batch = objective.batch(0)
    wanted = batch.labels[batch.loss_mask]
    n_words, n_codes = int((wanted >= CODES).sum()), int((wanted < CODES).sum())
    with torch.no_grad():
        one, many = (float(objective.model(batch, objective.targets, weight)) for weight in (1.0, 1e6))
        words = batch.loss_mask & (batch.labels >= CODES)
        batch.loss_mask = words
        alone = float(objective.model(batch, objective.targets))
    assert many == pytest.approx(alone, rel=1e-3)
    assert one != pytest.approx(alone, rel=1e-3) and n_words > 0 and n_codes > 0


def test_targets_are_distributions_and_favour_the_true_code() -> None:
    targets = spread_targets(torch.randn(CODES, 4, generator=torch.Generator().manual_seed(0)), 0.1, 3)
    assert torch.allclose(targets.sum(1), torch.ones(CODES))
    assert torch.equal(targets.argmax(1), torch.arange(CODES))
    assert torch.allclose(targets.diagonal(), torch.full((CODES,), 0.9))


def test_embeddings_keep_the_codebook_neighbourhoods(data: CogLMData) -> None:
    objective = make(data)
    codebook = torch.randn(CODES, 4, generator=torch.Generator().manual_seed(2))
    embed_codebook(objective.model, codebook, torch.Generator().manual_seed(3))
    table = objective.model.transformer.token_embedding.weight[:CODES]
    upper = torch.triu_indices(CODES, CODES, 1)
    before = torch.cdist(codebook, codebook)[upper[0], upper[1]]
    after = torch.cdist(table, table)[upper[0], upper[1]]
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] > 0.8


def test_regions_are_holes_of_the_right_size() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        region = draw_region(8, rng)
        assert region.shape == (8, 8) and region.dtype == torch.bool and region.any()


def test_all_tasks_are_learned_together(data: CogLMData, tmp_path) -> None:
    objective = make(data, max_noise=0.05, spread=0.0, lookalike=0.0)
    with torch.no_grad():
        before = sum(float(objective.loss(step)[0]) for step in range(1000, 1004)) / 4
    fit(objective, tmp_path, Settings(steps=150, lr=3e-3, warmup=10, ema_decay=0.9), RunOptions(progress=False))
    with torch.no_grad():
        after = sum(float(objective.loss(step)[0]) for step in range(1000, 1004)) / 4
    assert after < 0.6 * before
