"""Fixed steps draw what growing ones draw."""

from __future__ import annotations

import pytest
import torch

from minicogview.attention import attention_bias
from minicogview.pipeline import CogView2
from minicogview.scale import graphs
from minicogview.scale.graphs import FixedStep, fixed_steps


@pytest.fixture(scope="module")
def toy() -> CogView2:
    return CogView2.from_pretrained("toy")


@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0, "text_weight": 1.4}, {"temperature": 0.0}])
def test_the_same_tokens(toy: CogView2, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]) -> None:
    made = []

    def fixed(*args: object) -> FixedStep:
        made.append(FixedStep(*args))  # type: ignore[arg-type]
        return made[-1]

    texts = ["a red apple", "红苹果"]
    expected = [toy.generate(text, n=3, seed=5, stages=1, **settings) for text in texts]
    region = torch.zeros(8, 8)
    region[2:5, 3:7] = 1
    hole = toy.complete("a dog", expected[0].tokens[0], region, n=2)
    monkeypatch.setattr(graphs, "FixedStep", fixed)
    monkeypatch.setattr(toy.coglm, "decoding", lambda model, rows: fixed_steps(model))
    for text, pictures in zip(texts, expected, strict=True):
        again = toy.generate(text, n=3, seed=5, stages=1, **settings)
        assert torch.equal(again.tokens, pictures.tokens)
        torch.testing.assert_close(again.scores, pictures.scores, atol=1e-3, rtol=0)
    assert torch.equal(toy.complete("a dog", expected[0].tokens[0], region, n=2).tokens, hole.tokens)
    assert len(made) == 3


@torch.no_grad()
def test_a_step_changes_no_shape_and_no_address(toy: CogView2) -> None:
    model = toy.coglm.transformer
    tokens, positions = torch.randint(1024, (2, 9)), torch.arange(50, 59)[None]
    bias = attention_bias(torch.ones(9, 9).tril())
    whole = model(tokens, positions, bias)
    cache = model.new_cache(2, 8)
    cache.k.fill_(torch.nan)  # memory that was never written to may hold anything
    cache.v.fill_(torch.nan)
    model(tokens[:, :3], positions[:, :3], bias[:, :, :3, :3], cache)
    step, places = FixedStep(model, cache), set()
    for i in range(3, 8):
        hidden = step(tokens[:, i : i + 1], positions[:, i : i + 1], bias[:, :, i : i + 1, : i + 1])
        torch.testing.assert_close(hidden, whole[:, i], atol=1e-4, rtol=1e-4)
        buffers = (step.tokens, step.positions, step.bias, cache.k, cache.v)
        places.add(tuple((b.data_ptr(), tuple(b.shape)) for b in buffers))
    assert len(places) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_them(toy: CogView2) -> None:
    gpu = CogView2.from_pretrained("toy", device="cuda")
    one, other = (model.generate("a red apple", n=4, seed=0, stages=1).tokens for model in (toy, gpu))
    assert (one == other).float().mean() > 0.9
