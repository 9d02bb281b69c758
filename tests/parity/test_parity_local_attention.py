"""Local attention equals the original's kernels, gradients included (the golden files' README, sections 4 and 5)."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from golden_data import cases_of, close, golden, in_every_form, leaves
from torch import Tensor

from minicogview.attention import MASKED
from minicogview.local_attention import Impl, dot_products, local_attention
from minicogview.windows import Coarse, Global, shared_by_group, window_cells

CASES = cases_of("local_attention/local_attention.json")


@pytest.fixture
def cut_small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles on the golden files' small grids too, where the blocked form would take one."""
    monkeypatch.setattr("minicogview.tiles.ONE_TILE_UP_TO", 0)


class LocalCase:
    """One recorded call in our layout: pictures become token lists with a single head."""

    def __init__(self, name: str) -> None:
        case = golden("local_attention/local_attention.json")[name]
        tensors = golden("local_attention/local_attention.safetensors")
        self.golden = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        self.grid, self.key_grid = tuple(case["HW"]), tuple(case["hw"])
        self.window, self.causal, self.out_of_range = (case["kH"], case["kW"]), case["causal"], case["out_of_range"]
        self.q, self.k, self.v = (self.tokens(name).requires_grad_() for name in ("q", "k", "v"))
        sizes = [case["batch_q"], case["batch_kv"], self.grid, self.key_grid, case["channels"]]
        assert [len(self.q), len(self.k), self.grid, self.key_grid, self.q.shape[-1]] == sizes

    def tokens(self, name: str) -> Tensor:
        """A recorded (B, c, y, x) tensor as (B, T, 1, c)."""
        return rearrange(self.golden[name], "b c y x -> b (y x) 1 c").contiguous()

    def check_gradients(self, output: Tensor, direction: Tensor, names: dict[str, str]) -> None:
        grads = torch.autograd.grad(output, [getattr(self, name) for name in names], direction)
        for grad, expected in zip(grads, names.values(), strict=True):
            close(grad, self.tokens(expected))


@pytest.mark.parametrize("name", CASES)
def test_local_attention_scores(name: str) -> None:
    case = LocalCase(name)
    index, inside = window_cells(case.grid, case.key_grid, case.window, case.causal)
    k = shared_by_group(case.k, len(case.q))
    scores = dot_products(case.q, k, scale=1.0)[:, 0]  # (B, T, S)
    listed = scores.gather(-1, index.expand(len(scores), -1, -1)).masked_fill(~inside, MASKED)
    listed = listed.unflatten(1, case.grid)
    close(listed, case.golden["scores"])
    assert int((~inside).sum()) * len(scores) == case.out_of_range
    names = {"q": "grad_q_from_scores", "k": "grad_k_from_scores"}
    case.check_gradients(listed, case.golden["grad_scores"], names)


@in_every_form
@pytest.mark.parametrize("name", CASES)
def test_local_attention(name: str, impl: Impl, cut_small_grids: None) -> None:
    case = LocalCase(name)
    k, v, coarse = case.k, case.v, None
    if case.key_grid != case.grid:
        k, v, coarse = None, None, Coarse(case.k, case.v, case.key_grid, case.window)
    out = local_attention(
        case.q, k, v, case.grid, case.window, coarse=coarse, causal=case.causal, scale=1.0, impl=impl
    )
    close(out, case.tokens("out"))
    case.check_gradients(out, case.tokens("grad_out"), {"q": "grad_q", "k": "grad_k", "v": "grad_v"})


@in_every_form
def test_local_attention_of_the_direct_model(impl: Impl, cut_small_grids: None) -> None:
    g = golden("sr/attention_dsr_small.safetensors")
    _, n_heads, _, n_text, coarse_edge, edge, kernel, kernel2 = g["meta"].tolist()
    _, (_, k0, v0) = leaves(g, 0, n_heads)
    stored, (q, k, v) = leaves(g, 1, n_heads)
    for bias, name in (1.5, "out1_add_scalar_1p5"), (0.0, "out1"):
        coarse = Coarse(k0[:, n_text:], v0[:, n_text:], (coarse_edge, coarse_edge), (kernel2, kernel2), bias)
        out = local_attention(q, k, v, (edge, edge), (2 * kernel - 1, kernel), coarse=coarse, impl=impl).flatten(2)
        close(out, g[name])
    for name, grad in zip(stored, torch.autograd.grad(out, list(stored.values()), g["grad_out1"])):
        close(grad, g[f"grad_{name}"])


@in_every_form
def test_local_attention_of_the_iterative_model(impl: Impl, cut_small_grids: None) -> None:
    g = golden("sr/attention_itersr_small.safetensors")
    _, n_heads, _, n_text, edge, kernel = g["meta"].tolist()
    stored0, (q0, k0, v0) = leaves(g, 0, n_heads)
    stored1, (q, k, v) = leaves(g, 1, n_heads)
    text, weighted = Global(k0, v0, g["mask"]), Global(k0, v0, g["mask"], g["log_attention_weights"])
    level0 = local_attention(q0, None, None, (1, n_text), everywhere=text, impl=impl)
    level1 = local_attention(q, k, v, (edge, edge), (2 * kernel - 1, kernel), everywhere=weighted, impl=impl)
    out, stored = torch.cat([level0, level1], 1).flatten(2), stored0 | stored1
    close(out, g["out"])
    for name, grad in zip(stored, torch.autograd.grad(out, list(stored.values()), g["grad_out"]), strict=True):
        close(grad, g[f"grad_{name}"])
