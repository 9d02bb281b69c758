"""Attention: the bias, softmax written out, PB-relax, and ``attend``, which must not depend on how it is computed."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minicogview.attention import (
    MASKED,
    attend,
    attention_bias,
    attention_weights,
    text_attention_weights,
    weighted_values,
)

T = 10
BIASES = {
    "none": None,
    "float": attention_bias(torch.ones(T, T).tril(), torch.linspace(0, 1.4, T)),
    "bool": torch.ones(T, T, dtype=torch.bool).tril(),
}
every_way = pytest.mark.parametrize(("bias", "relax", "scale"), [*product(BIASES, [None, 32.0], [None, 0.1])])


def causal(n: int = T) -> Tensor:
    return torch.ones(n, n).tril()


def inputs(size: float, n_queries: int = T, heads: int = 2, head_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q (1, N, n_queries, H), k and v (1, N, T, H); scores are about ``size ** 2`` large."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 1, heads, T, head_size, generator=generator) * size
    return q[:, :, -n_queries:], k, v


# --- the bias


def test_bias_of_masks_and_weights():
    row = torch.tensor([1.4, 0.0, 0.0])
    bias = attention_bias(causal(3), row)
    assert bias.shape == (1, 1, 3, 3)
    assert bias[0, 0, 0].tolist() == pytest.approx([1.4, MASKED, MASKED])  # a weight never lifts a mask
    assert bias[0, 0, 2].tolist() == pytest.approx([1.4, 0, 0])
    assert attention_bias(causal(3).expand(5, 3, 3).bool()).shape == (5, 1, 3, 3)


def test_a_text_weight_multiplies_the_texts_share_of_attention():
    assert text_attention_weights(2, 5, 1.4).tolist() == pytest.approx([1.4, 1.4, 0, 0, 0])
    q, k, _ = inputs(1.0)
    plain, weighted = (
        attention_weights(q, k, attention_bias(torch.ones(T, T), text_attention_weights(3, T, weight)))
        for weight in (0.0, 1.4)
    )
    odds = [w[..., :3].sum(-1) / w[..., 3:].sum(-1) for w in (plain, weighted)]
    torch.testing.assert_close(odds[1], odds[0] * torch.tensor(1.4).exp())


# --- written out


def test_attention_is_softmax_of_scaled_scores():
    q, k, v = inputs(1.0)
    weights = attention_weights(q, k, attention_bias(causal()))
    scores = q[0, 1] @ k[0, 1].T / 4  # head 1; the square root of a head size of 16
    expected = torch.where(causal().bool(), scores, -torch.inf).softmax(-1)
    torch.testing.assert_close(weights[0, 1], expected)
    torch.testing.assert_close(weighted_values(weights, v)[0, 1], expected @ v[0, 1])


def test_pb_relax_changes_nothing_in_exact_arithmetic():
    q, k, _ = (part.double() for part in inputs(5.0))
    bias = attention_bias(causal(), torch.linspace(0, 1.4, T)).double()
    plain, relaxed = attention_weights(q, k, bias), attention_weights(q, k, bias, 32.0)
    torch.testing.assert_close(relaxed, plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(relaxed.sum(-1), torch.ones(1, 2, T).double())


def test_pb_relax_survives_scores_that_overflow_fp16():
    q, k, _ = inputs(300.0)
    exact = attention_weights(q, k, None)
    assert (q @ k.transpose(-1, -2) / 4).abs().max() > 65504
    assert attention_weights(q.half(), k.half(), None).isnan().any()
    relaxed = attention_weights(q.half(), k.half(), None, 32.0)
    torch.testing.assert_close(relaxed.float(), exact, atol=0.02, rtol=0)


# --- attend: written out or fused


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types in which PyTorch's fused operator was called."""
    calls, fused = [], F.scaled_dot_product_attention

    def counted(q: Tensor, *args: object, **settings: object) -> Tensor:
        calls.append(q.dtype)
        return fused(q, *args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


@every_way
def test_attend_agrees_with_the_written_out_form(bias, relax, scale, fused_calls):
    q, k, v = inputs(1.5)
    expected = weighted_values(attention_weights(q, k, BIASES[bias], relax, scale), v)
    torch.testing.assert_close(attend(q, k, v, BIASES[bias], relax, scale), expected, atol=1e-5, rtol=1e-5)
    assert len(fused_calls) == (relax is None)  # the fused operator knows no PB-relax


@every_way
def test_gradients_of_attend_are_those_of_the_fused_operator(bias, relax, scale, fused_calls):
    results = []
    for compute in (
        lambda q, k, v: attend(q, k, v, BIASES[bias], relax, scale),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=BIASES[bias], scale=scale),
    ):
        leaves = [part.clone().requires_grad_() for part in inputs(1.5)]
        y = compute(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, fused in zip(*results, strict=True):
        torch.testing.assert_close(ours, fused, atol=1e-4, rtol=1e-4)
    assert len(fused_calls) == 1  # on a CPU gradients go through the written-out form


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("n_queries", [1, 3])
def test_attend_in_bfloat16(bias, n_queries, fused_calls):
    q, k, v = (part.bfloat16() for part in inputs(1.5, n_queries))
    added = None if BIASES[bias] is None else BIASES[bias][..., -n_queries:, :]
    exact = weighted_values(attention_weights(q.float(), k.float(), added), v.float())
    y = attend(q, k, v, added)
    assert y.dtype == torch.bfloat16 and len(fused_calls) == (n_queries > 1)
    if n_queries == 1:  # computed in float32, and only the result is rounded
        assert torch.equal(y, exact.bfloat16())
    torch.testing.assert_close(y.float(), exact, atol=0.05, rtol=0.02)
