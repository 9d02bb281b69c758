"""Matrices kept in half precision give what float32 gives, and MLPs in pieces what whole ones give."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicogview.config import TransformerConfig
from minicogview.pipeline import CogView2
from minicogview.scale import mixed_precision
from minicogview.scale.mixed_precision import FEW_ROWS, in_pieces, keep_half, product
from minicogview.scale.plan import Plan
from minicogview.transformer import MLP, Transformer

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("kept", HALF)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 70])
def test_a_product_is_that_of_the_same_numbers_in_float32(
    rows: int, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "PIECE", 33 * 10)  # ten outputs at a time, the last piece is smaller
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 33), torch.randn(57, 33).to(kept), torch.randn(57)
    expected = F.linear(x, weight.float(), bias)
    # A few rows are rounded to the matrix's format themselves, and so is their result.
    coarse = 5e-2 if kept == torch.bfloat16 else 5e-3
    atol = coarse * expected.abs().max().item() if rows <= FEW_ROWS else 1e-4
    found = product(x, weight, bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    assert product(x[None, None], weight).shape == (1, 1, rows, 57)


def test_matrices_of_the_same_format_are_multiplied_as_ever() -> None:
    x, layer = torch.randn(3, 20, 8), nn.Linear(8, 5)
    assert torch.equal(product(x, layer.weight, layer.bias), layer(x))


@torch.inference_mode()
def test_a_model_computes_in_float32_with_matrices_in_bfloat16() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_layers=2, d_model=32, n_heads=2, vocab_size=50)).eval()
    tokens, positions = torch.randint(50, (2, 30)), torch.arange(30)[None]
    kept = copy.deepcopy(model)
    for parameter in kept.parameters():
        parameter.data = parameter.data if parameter.ndim == 1 else parameter.data.bfloat16()
    for parameter, rounded in zip(model.parameters(), kept.parameters(), strict=True):
        parameter.data = rounded.data.float()  # the same numbers
    keep_half(kept, torch.float32)
    hidden = kept(tokens, positions)
    assert hidden.dtype == torch.float32 and kept.new_cache(1, 3).k.dtype == torch.float32
    torch.testing.assert_close(hidden, model(tokens, positions), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(kept.logits(hidden, 20), model.logits(hidden, 20), atol=1e-5, rtol=1e-4)
    assert all(p.dtype == torch.bfloat16 for p in kept.parameters() if p.ndim == 2)


@pytest.mark.parametrize("ways", [("memory",) * 3, ("disk",) * 3, ("int8", "disk", "disk"), ("int4", "int8", "memory")])
def test_the_toy_draws_an_apple_with_matrices_in_bfloat16(ways: tuple[str, str, str]) -> None:
    whole = CogView2.from_pretrained("toy").generate("a red apple", n=1, seed=0, temperature=0)
    plan = dataclasses.replace(Plan(*ways), kept=torch.bfloat16)  # type: ignore[arg-type]
    model = CogView2.from_pretrained("toy", memory=plan)
    drawn = model.generate("a red apple", n=1, seed=0, temperature=0)
    assert (drawn.tokens == whole.tokens).float().mean() > (0.5 if "int4" in ways else 0.9)
    table = model.coglm.transformer.token_embedding.weight
    assert table.dtype == torch.bfloat16 and model.coglm.transformer.final_norm.weight.dtype == torch.float32


def test_an_mlp_in_pieces_is_the_same_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mlp, x = MLP(TransformerConfig(n_layers=1, d_model=8, n_heads=1, vocab_size=5)), torch.randn(2, 25, 8)
    expected, calls = mlp(x), []
    monkeypatch.setattr(mixed_precision, "MLP_TOKENS", 10)
    in_pieces(mlp)
    mlp.up.register_forward_hook(lambda module, args, out: calls.append(args[0].shape[1]))
    torch.testing.assert_close(mlp(x), expected)
    assert calls == [10, 10, 5]
    mlp(x.requires_grad_()).sum().backward()  # in one piece, where gradients are asked for
    assert calls[3:] == [25] and mlp.up.weight.grad is not None
