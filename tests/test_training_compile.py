"""Compiled training: something is compiled, the losses stay the same, and mixed lengths do not compile without end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_coglm import make, make_data
from test_training_super_resolution import direct_objective, iterative_objective, make_pairs
from tiny import TINY
from torch import Tensor, nn
from torch._dynamo.utils import counters

from minicogview.errors import MiniCogViewError
from minicogview.sampling import Sampler
from minicogview.scale.fast_steps import fast_steps
from minicogview.training import RunOptions, Settings, fit
from minicogview.training.vqvae import TokenizerObjective
from minicogview.vqvae import VQVAE


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Every graph that is compiled from here on; it runs as it is, because real kernels would take a minute."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append(graph)
        return graph.forward

    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend=backend))
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def coglm() -> Any:
    return make(make_data())


def direct() -> Any:
    return direct_objective(make_pairs())


def iterative() -> Any:
    pairs = make_pairs()
    return iterative_objective(pairs, (pairs.fine + 1) % 8)


def losses(objective: Any, folder: Path, steps: int, compile: bool) -> list[float]:
    """The loss of every step of a training."""
    settings = Settings(steps=steps, lr=1e-3, warmup=5, precision="fp32")
    fit(objective, folder, settings, RunOptions(device="cpu", compile=compile, log_every=1, progress=False))
    return [json.loads(line)["train/loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize(("make_objective", "limit"), [(coglm, 20), (direct, 1), (iterative, 1)])
def test_compiled_training_has_the_same_losses(
    make_objective: Callable[[], Any], limit: int, tmp_path: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    """CogLM needs more graphs: its lengths differ between batches, and a graph ends where the loss picks rows."""
    plain = losses(make_objective(), tmp_path / "plain", 12, compile=False)
    assert not graphs
    objective, n_graphs = make_objective(), []
    objective.after_step = lambda step: n_graphs.append(len(graphs))
    assert losses(objective, tmp_path / "compiled", 12, compile=True) == pytest.approx(plain, rel=1e-5)
    assert 0 < n_graphs[0] and n_graphs[-1] == n_graphs[-6] <= limit


def test_a_compiled_model_draws_the_same_tokens(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    objective = coglm()
    losses(objective, tmp_path, 2, compile=True)
    compiled, plain = objective.model, coglm().model.eval()
    plain.load_state_dict(compiled.state_dict())
    compiled.transformer.compile()  # the part that drawing calls
    compiled.decoding = fast_steps
    n_graphs, settings = len(graphs), TINY.sampling
    texts = [[20, 21, 22], [23]]
    one, other = (model.generate(texts, Sampler([3, 4], settings)).tokens for model in (plain, compiled))
    assert n_graphs > 0 and len(graphs) == n_graphs
    assert torch.equal(one, other)


class Plane(nn.Module):
    """A linear layer in a class of our own, because torch does not compile its own layers by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Sum:
    """The smallest objective: a sum of four numbers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Plane()

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean(), {}


class Parts(Sum):
    """The same, from a model that cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList([self.model])

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.model[0](torch.ones(1, 4)).square().mean(), {}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_real_kernels_have_the_same_losses(tmp_path: Path) -> None:
    plain = losses(Sum(), tmp_path / "plain", 4, compile=False)
    before = counters["frames"]["ok"]
    assert losses(Sum(), tmp_path / "compiled", 4, compile=True) == pytest.approx(plain, rel=1e-5)
    assert counters["frames"]["ok"] == before + 1


def test_validation_is_not_compiled(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    objective: Any = Sum()
    sizes = iter(range(1, 9))
    objective.validate = lambda: {"mean": float(objective.model(torch.ones(next(sizes), 4)).mean())}
    settings = Settings(steps=8, lr=1e-3, warmup=0, precision="fp32")
    summary = fit(objective, tmp_path, settings, RunOptions(compile=True, validate_every=1, progress=False))
    assert len(graphs) == 1 and "mean" in summary["validation"]


def test_what_cannot_be_compiled_is_refused(tmp_path: Path) -> None:
    tokenizer = TokenizerObjective(VQVAE(TINY.vqvae), {16: torch.zeros(4, 3, 16, 16, dtype=torch.uint8)})
    bare = Sum()
    bare.model = bare.model.layer
    parts = "its loss calls parts of the model"
    for objective, reason in ((tokenizer, parts), (Parts(), parts), (bare, "torch does not compile its own Linear")):
        losses(objective, tmp_path / reason, 1, compile=False)
        with pytest.raises(MiniCogViewError, match=f"cannot be compiled .{reason}.*train it without compile") as caught:
            losses(objective, tmp_path / reason, 1, compile=True)
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / reason)
