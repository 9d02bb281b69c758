"""Transformer: the three orders and two kinds of norms, who sees whom, the KV cache, and what Record keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicogview.attention import attention_bias
from minicogview.config import TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.transformer import Block, KVCache, Record, Transformer

L, D, N, V, T = 3, 24, 3, 40, 10
ORDERS = ["sandwich", "pre", "post"]


def build(seed: int = 0, **changes) -> Transformer:
    """A small model whose every number is random, biases and norms too: zeros and ones would hide mistakes."""
    settings = {"n_layers": L, "d_model": D, "n_heads": N, "vocab_size": V, "max_positions": T, **changes}
    model = Transformer(TransformerConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(middle + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (rows, T) and positions (1, T)."""
    tokens = torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.arange(T)[None]


def causal(n: int = T) -> torch.Tensor:
    return torch.ones(n, n).tril()


# --- the block


def by_hand(block: Block, x: torch.Tensor, order: str) -> torch.Tensor:
    """The block's formula, written with its parts; nothing may look at anything later."""
    bias = attention_bias(causal(x.shape[1]))

    def attend(y):
        return block.attention(y, bias, 0, None, None)

    if order == "post":
        x = block.attention_norm(x + attend(x))
        return block.mlp_norm(x + block.mlp(x))
    if order == "pre":
        x = x + attend(block.attention_norm(x))
        return x + block.mlp(block.mlp_norm(x))
    x = x + block.attention_out_norm(attend(block.attention_norm(x)))
    return x + block.mlp_out_norm(block.mlp(block.mlp_norm(x)))


@pytest.mark.parametrize("order", ORDERS)
def test_a_block_is_its_formula(order):
    block = build(norm=order).layers[0]
    x = torch.randn(2, T, D, generator=torch.Generator().manual_seed(3))
    expected = by_hand(block, x, order)
    torch.testing.assert_close(block(x, attention_bias(causal()), 0, None, None), expected)
    n_norms = sum(isinstance(part, nn.LayerNorm) for part in block.modules())
    assert n_norms == (4 if order == "sandwich" else 2)


@torch.no_grad()
def test_the_sandwich_bounds_what_a_branch_can_add():
    tokens, positions = batch()
    largest = {}
    for order in ("pre", "sandwich"):
        model = build(norm=order)
        for layer in model.layers:
            layer.attention.out.weight.mul_(1e5)
            layer.mlp.down.weight.mul_(1e5)
        record = Record()
        model(tokens, positions, record=record)
        largest[order] = max(float(hidden.abs().max()) for hidden in record.hidden)
    bound = float(model.token_embedding.weight.abs().max() + model.position_embedding.weight.abs().max())
    for layer in model.layers:  # |LN(x)| <= |weight| sqrt(D - 1) + |bias|, whatever x
        for norm in (layer.attention_out_norm, layer.mlp_out_norm):
            bound += float((norm.weight.abs() * math.sqrt(D - 1) + norm.bias.abs()).max())
    assert largest["sandwich"] <= bound < 100
    assert largest["pre"] > 65504


def test_an_unknown_norm_is_refused():
    with pytest.raises(MiniCogViewError, match=r"unknown norm 'middle'.*sandwich"):
        build(norm="middle")


@pytest.mark.parametrize("order", ORDERS)
def test_rms_norm_is_its_formula(order):
    """x / sqrt(mean(x ** 2)) * weight: no mean is subtracted, and there is no bias."""
    model = build(norm=order, norm_kind="rms")
    norms = [(name, part) for name, part in model.named_modules() if name.endswith("norm")]
    assert len(norms) == L * (4 if order == "sandwich" else 2) + 1
    assert not any("norm.bias" in name for name, _ in model.named_parameters())
    x = 3 + torch.randn(2, T, D, generator=torch.Generator().manual_seed(3))
    for _, norm in norms:
        torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)
    block = model.layers[0]
    torch.testing.assert_close(block(x, attention_bias(causal()), 0, None, None), by_hand(block, x, order))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_training_step_lowers_the_loss(kind):
    torch.manual_seed(0)
    model, (tokens, positions) = Transformer(build(norm_kind=kind).config), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss() -> torch.Tensor:
        logits = model.logits(model(tokens, positions, attention_bias(causal())))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimizer.step()
    assert loss() < before


def test_an_unknown_kind_of_norm_is_refused():
    with pytest.raises(MiniCogViewError, match=r"unknown norm_kind 'batch': choose one of layer, rms"):
        build(norm_kind="batch")


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(MiniCogViewError, match="d_model 24 is not a multiple of n_heads 5"):
        build(n_heads=5)


# --- who sees whom


def test_a_row_that_may_see_nothing_stays_finite():
    mask = causal()
    mask[4] = 0
    tokens, positions = batch()
    assert build()(tokens, positions, attention_bias(mask)).isfinite().all()


def test_later_tokens_do_not_change_earlier_rows():
    model, (tokens, positions) = build(), batch()
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % V
    before, after = (model(t, positions, attention_bias(causal())) for t in (tokens, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 0.01


@pytest.mark.parametrize("order", ORDERS)
def test_a_model_gives_the_same_with_and_without_gradients(order):
    model, (tokens, positions) = build(norm=order), batch()
    bias = attention_bias(causal())
    plain = model(tokens, positions, bias)  # with gradients a CPU takes the written-out path
    with torch.no_grad():
        fused = model(tokens, positions, bias)
    assert plain.requires_grad and not fused.requires_grad
    torch.testing.assert_close(plain.detach(), fused, atol=1e-5, rtol=1e-5)


def test_a_model_with_pb_relax_equals_one_without():
    tokens, positions = batch()
    bias = attention_bias(causal())
    hidden = [build(pb_relax=relax)(tokens, positions, bias) for relax in (None, 16.0)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


# --- the cache


@torch.no_grad()
def run_in_pieces(model: Transformer, tokens, positions, sizes, max_len: int = T) -> torch.Tensor:
    cache = KVCache(model.config, tokens.shape[0], max_len)
    parts, start = [], 0
    for size in sizes:
        end = start + size
        bias = attention_bias(causal(end)[start:])
        parts.append(model(tokens[:, start:end], positions[:, start:end], bias, cache))
        start = end
    assert cache.length == start
    return torch.cat(parts, 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sizes", [[T], [1] * T, [4, 1, 1, 1, 3], [9, 1]])
def test_cached_equals_uncached(order, sizes):
    model, (tokens, positions) = build(norm=order), batch()
    whole = model(tokens, positions, attention_bias(causal())).detach()
    pieces = run_in_pieces(model, tokens, positions, sizes)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_cached_equals_uncached_with_pb_relax():
    model, (tokens, positions) = build(pb_relax=8.0), batch()
    whole = model(tokens, positions, attention_bias(causal())).detach()
    torch.testing.assert_close(run_in_pieces(model, tokens, positions, [3, 7]), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_prompt_serves_all_rows():
    model, (tokens, positions) = build(), batch(rows=4)
    tokens[:, :6] = tokens[0, :6]
    whole = model(tokens, positions, attention_bias(causal()))
    cache = KVCache(model.config, 4, T)
    prompt = model(tokens[:1, :6], positions[:, :6], attention_bias(causal(6)), cache)
    assert prompt.shape[0] == 1
    rest = model(tokens[:, 6:], positions[:, 6:], attention_bias(causal()[6:]), cache)
    torch.testing.assert_close(rest, whole[:, 6:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_full_cache_says_how_much_it_holds():
    model, (tokens, positions) = build(), batch()
    cache = KVCache(model.config, 2, 6)
    model(tokens[:, :5], positions[:, :5], attention_bias(causal(5)), cache)
    with pytest.raises(MiniCogViewError, match=r"holds 6 tokens, 7 were given.*longer"):
        model(tokens[:, 5:7], positions[:, 5:7], attention_bias(causal(7)[5:]), cache)


def test_the_cache_has_the_announced_size():
    cache = KVCache(build().config, 2, 7, dtype=torch.float16)
    assert cache.k.shape == cache.v.shape == (L, 2, N, 7, D // N)
    assert cache.k.dtype == torch.float16 and cache.length == 0


# --- what happened inside, and the whole model


def test_record_keeps_hidden_states_and_maps():
    model, (tokens, positions) = build(), batch()
    record = Record()
    bias = attention_bias(causal())
    with torch.no_grad():
        recorded = model(tokens, positions, bias, record=record)
        torch.testing.assert_close(recorded, model(tokens, positions, bias), atol=1e-5, rtol=1e-5)
    assert [hidden.shape for hidden in record.hidden] == [(2, T, D)] * L
    assert [weights.shape for weights in record.maps] == [(2, N, T, T)] * L
    torch.testing.assert_close(recorded, model.final_norm(record.hidden[-1]).detach())
    for weights in record.maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, N, T))
        assert (weights[..., ~causal().bool()] == 0).all()


def test_record_works_beside_the_cache():
    model, (tokens, positions) = build(), batch()
    cache, record = KVCache(model.config, 2, T), Record()
    with torch.no_grad():
        model(tokens[:, :9], positions[:, :9], attention_bias(causal(9)), cache)
        model(tokens[:, 9:], positions[:, 9:], None, cache, record)
    assert record.maps[0].shape == (2, N, 1, T)


def test_logits_come_from_the_token_table():
    model, (tokens, positions) = build(), batch()
    hidden = model(tokens, positions)
    logits = model.logits(hidden)
    torch.testing.assert_close(logits, hidden @ model.token_embedding.weight.T)
    torch.testing.assert_close(model.logits(hidden, 12), logits[..., :12])


def test_fresh_weights_shrink_the_last_matrix_of_each_branch():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_layers=8, d_model=64, n_heads=4, vocab_size=500))
    layer = model.layers[3]
    assert float(layer.mlp.up.weight.std().detach()) == pytest.approx(0.02, rel=0.05)
    for last in (layer.mlp.down, layer.attention.out):
        assert float(last.weight.std().detach()) == pytest.approx(0.02 / 4, rel=0.05)  # sqrt(2 * 8) = 4
        assert (last.bias == 0).all()


def test_every_parameter_gets_a_gradient():
    model, (tokens, positions) = build(), batch()
    hidden = model(tokens, positions, attention_bias(causal()))
    F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
