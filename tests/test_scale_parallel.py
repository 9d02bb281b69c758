"""Tensor parallelism: two processes that torchrun starts draw what one draws, each with half of every layer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minicogview.config import CogLMConfig, LayoutConfig, SpecialIds, SuperResolutionConfig, TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.lopar import IterativeSR
from minicogview.pipeline import CogView2
from minicogview.scale.parallel import by_rank, is_split, process_group, shard, shard_pipeline
from minicogview.scale.quantization import quantize_layers
from minicogview.super_resolution import DirectSR
from minicogview.transformer import KVCache, Transformer

TEXT = "a red apple"
TIMEOUT = 120  # seconds; it takes about 15, and twice as long on one core


def random_stages(own_layers: bool) -> nn.ModuleList:
    """Both super-resolution models on one random base; without own layers, as in the released weights."""
    torch.manual_seed(0)
    sizes = TransformerConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=64, max_positions=32)
    ids = SpecialIds(pad=60, boi=61, boe=62, boc=63)
    base = CogLMConfig(sizes, LayoutConfig(max_text=8, grid=4), ids, n_codes=32)
    config = SuperResolutionConfig(base, 4, window=(5, 3), coarse_window=(3, 3), own_layers=own_layers)
    direct = DirectSR(config)
    stages = nn.ModuleList([direct, IterativeSR(config, direct.base)]).eval()
    for tensor in stages.parameters():
        nn.init.normal_(tensor, std=0.2)  # biases too: one that were added by each rank would show
    return stages


@torch.no_grad()
def hidden_states(stages: nn.ModuleList) -> list[Tensor]:
    """What both models make of a picture: the low level or the text, and the fine level."""
    direct, iterative = stages
    coarse, fine = torch.arange(32).reshape(2, 16), torch.arange(288).reshape(2, 144) % 32
    return [*direct([[40, 41], [42]], coarse), *iterative([[40, 41], [42]], fine)]


@torch.no_grad()
def logits(model: CogView2, change: int = 0) -> Tensor:
    """Scores after 20 tokens in one pass and one more with the cache; ``change`` is added to the tokens."""
    transformer = model.coglm.transformer
    tokens, cache = torch.arange(100, 121)[None] + change, transformer.new_cache(1, 21)
    first = transformer(tokens[:, :20], torch.arange(20)[None], None, cache)
    last = transformer(tokens[:, 20:], torch.tensor([[20]]), None, cache)
    return transformer.logits(torch.cat([first, last], 1))


def n_parameters(module: nn.Module) -> int:
    """Numbers that this process holds for a module, in memory of their own."""
    local = [getattr(tensor, "to_local", lambda t=tensor: t)() for tensor in module.parameters()]
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in local)


def work(folder: Path) -> None:
    """What each of the processes does."""
    with process_group("cpu") as mesh:
        model, rank = CogView2.from_pretrained("toy"), mesh.get_rank()
        shard_pipeline(model, mesh)
        shard_pipeline(model, mesh)  # changes nothing
        print(f"this is rank {rank}")
        pictures = model.generate(TEXT, n=2)
        facts: dict[str, Any] = {name: getattr(pictures, name) for name in ("tokens", "fine_tokens", "scores")}
        facts["caption_scores"] = model.score(pictures.tokens[0], [TEXT, "a blue car"])
        facts["logits"] = logits(model, change=rank)  # other tokens on rank 1: those of rank 0 count
        transformer = model.coglm.transformer
        facts["n_layers"], facts["n_all"] = n_parameters(transformer.layers), n_parameters(transformer)
        facts["cache"] = tuple(transformer.new_cache(1, 3).k.shape)
        for own_layers in (False, True):
            stages = random_stages(own_layers)
            for stage in stages:  # one after the other, on the same base
                shard(stage, mesh)
            facts[f"hidden {own_layers}"] = hidden_states(stages)
        torch.save(facts, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def single() -> CogView2:
    return CogView2.from_pretrained("toy")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return [{**facts, "stdout": done.stdout, "stderr": done.stderr} for facts in found]


def test_rows_of_the_joint_projection_in_the_order_of_ranks() -> None:
    n_heads, size = 4, 3
    x, weight = torch.randn(5, 12), torch.randn(36, 12)
    whole = (x @ weight.T).unflatten(-1, (3, n_heads, size))  # (T, three, N, H)
    for rank, rows in enumerate(by_rank(weight, 2).chunk(2)):
        assert torch.equal((x @ rows.T).unflatten(-1, (3, 2, size)), whole[:, :, 2 * rank : 2 * rank + 2])
    bias = torch.arange(36)
    assert torch.equal(by_rank(bias, 2)[:18].unflatten(0, (3, 2, size)), bias.unflatten(0, (3, 4, size))[:, :2])
    assert torch.equal(by_rank(weight, 1), weight)


def test_two_processes_draw_what_one_draws(ranks: list[dict[str, Any]], single: CogView2) -> None:
    pictures = single.generate(TEXT, n=2)
    for facts in ranks:
        assert torch.equal(facts["tokens"], pictures.tokens)
        assert torch.equal(facts["fine_tokens"], pictures.fine_tokens)
        assert torch.allclose(facts["scores"], pictures.scores, atol=1e-5)
        scores = single.score(pictures.tokens[0], [TEXT, "a blue car"])
        assert torch.allclose(facts["caption_scores"], scores, atol=1e-4)


def test_logits_are_those_of_one_process_and_the_same_bits_on_all_ranks(
    ranks: list[dict[str, Any]], single: CogView2
) -> None:
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])
    assert torch.allclose(ranks[0]["logits"], logits(single), atol=1e-4)
    assert not torch.allclose(logits(single, change=1), logits(single), atol=0.1)  # what rank 1 was given


@pytest.mark.parametrize("own_layers", [False, True])
def test_super_resolution_with_shared_and_with_own_layers(ranks: list[dict[str, Any]], own_layers: bool) -> None:
    whole = hidden_states(random_stages(own_layers))
    for one, other, expected in zip(*(facts[f"hidden {own_layers}"] for facts in ranks), whole, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, expected, atol=1e-4)


def test_each_rank_holds_half_of_the_layers(ranks: list[dict[str, Any]], single: CogView2) -> None:
    whole = single.coglm.transformer
    sizes = whole.config
    for facts in ranks:
        assert 0.5 < facts["n_layers"] / n_parameters(whole.layers) < 0.505  # norms and two biases are whole
        tables = n_parameters(whole) - n_parameters(whole.layers)
        assert facts["n_all"] == facts["n_layers"] + tables
        assert facts["cache"] == (sizes.n_layers, 1, sizes.n_heads // 2, 3, sizes.d_model // sizes.n_heads)


def test_only_rank_0_prints_and_nobody_complains(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["stdout"].split("\n") == ["this is rank 0", ""]
    assert ranks[0]["stderr"] == ""


def test_a_cache_for_some_of_the_heads() -> None:
    config = TransformerConfig(n_layers=2, d_model=32, n_heads=4, vocab_size=64)
    assert KVCache(config, 1, 5, n_heads=1).k.shape == (2, 1, 1, 5, 8)
    assert Transformer(config).new_cache(1, 5).k.shape == (2, 1, 4, 5, 8)


def test_models_that_cannot_be_split_stay_whole() -> None:
    three: Any = SimpleNamespace(size=lambda: 3)
    model = random_stages(own_layers=False)
    with pytest.raises(MiniCogViewError, match="4 attention heads cannot be split over 3 processes: use a divisor"):
        shard(model, three)
    assert not any(is_split(module) for module in model.modules())
    assert model[0].base.layers[0].attention.n_heads == 4
    two: Any = SimpleNamespace(size=lambda: 2)
    with torch.device("meta"), pytest.raises(MiniCogViewError, match="layers without weights cannot be split"):
        shard(Transformer(TransformerConfig(n_layers=1, d_model=32, n_heads=4, vocab_size=64)), two)
    quantized = Transformer(TransformerConfig(n_layers=1, d_model=64, n_heads=4, vocab_size=64))
    quantize_layers(quantized, bits=4)
    with pytest.raises(MiniCogViewError, match="quantized layers cannot be split"):
        shard(quantized, two)


def test_stages_that_come_from_the_disk_are_refused() -> None:
    two: Any = SimpleNamespace(size=lambda: 2)
    with pytest.raises(MiniCogViewError, match="all stages stay in memory"):
        shard_pipeline(CogView2.from_pretrained("toy", offload=True), two)


def test_without_torchrun_or_enough_gpus_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(MiniCogViewError, match="not started by torchrun"), process_group("cpu"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(MiniCogViewError, match="process 1 has no GPU, there are 1"), process_group("cuda"):
        pass


if __name__ == "__main__":
    work(Path(sys.argv[1]))
