"""Packed linear layers: the same answers as plain ones, never stale, and gone when they should be."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicogview.scale.packing import MOST_ROWS, Packed, can_pack, pack, packed

HERE = can_pack(torch.ones(1, 1), rows=1)  # elsewhere the context does nothing, which is tested too


def make_layer(d_in: int = 56, d_out: int = 168, half: bool = False) -> nn.Linear:
    """A layer with weights like a transformer's; ``half`` rounds them as a half-precision file does."""
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out)
    with torch.no_grad():
        layer.weight.normal_(std=0.02)
        layer.bias.normal_(std=0.02)
        if half:
            layer.weight.copy_(layer.weight.half())
    return layer


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("shape", [(1, 56), (8, 1, 56), (2, 5, 56)])
def test_packed_layer_equals_plain_layer(shape: tuple[int, ...], half: bool) -> None:
    layer, x = make_layer(half=half), torch.randn(*shape)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.inference_mode(), packed(layer, shape[0]):
        fast = layer(x)
        assert ("forward" in vars(layer)) == HERE
    assert fast.shape == (*shape[:-1], 168) and fast.dtype == torch.float32
    assert (fast - exact).abs().max() < 1e-6  # as exact as float32; rounding to half alone would err by 1e-4
    assert "forward" not in vars(layer)


@pytest.mark.skipif(not HERE, reason="this machine has no packed kernels")
def test_half_precision_weights_need_one_part_and_others_two() -> None:
    for half in (True, False):
        layer = make_layer(half=half)
        made = Packed(layer.weight.detach(), None)
        assert (made.rest is None) == half
        x = torch.randn(3, 56)
        assert torch.allclose(made(x), x @ layer.weight.detach().T, atol=1e-6)


def test_rows_that_are_copies_of_one_another() -> None:
    layer, x = make_layer(), torch.randn(1, 56).expand(4, -1)
    with torch.inference_mode(), packed(layer, 4):
        fast = layer(x)
    assert torch.allclose(fast, layer(x), atol=1e-6)


@pytest.mark.skipif(not HERE, reason="this machine has no packed kernels")
def test_a_copy_is_kept_until_the_weights_change() -> None:
    layer = make_layer()
    first = pack(layer, layer.weight, layer.bias, 1)
    assert pack(layer, layer.weight, layer.bias, 1) is first
    layer.weight.data[3, 4] += 1e-3  # behind autograd's back
    second = pack(layer, layer.weight, layer.bias, 1)
    assert second is not first
    with torch.no_grad():
        layer.bias[5] += 1e-3
    third = pack(layer, layer.weight, layer.bias, 1)
    assert third is not second
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))  # the same numbers in other places
    with torch.inference_mode(), packed(layer, 1):
        assert layer.forward is not third
        x = torch.ones(1, 56)
        assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5)


def test_nothing_is_packed_where_it_cannot_be_or_does_not_pay() -> None:
    weight = torch.ones(2, 3)
    assert not can_pack(weight, rows=MOST_ROWS + 1)
    assert not can_pack(weight.double(), rows=1)
    assert not can_pack(weight.bfloat16(), rows=1)
    assert not can_pack(weight.to("meta"), rows=1)
    assert not can_pack(weight * 1e5, rows=1)  # beyond half precision
    huge = make_layer()
    huge.weight.data.mul_(1e8)
    with torch.inference_mode(), packed(huge, 1):
        assert torch.equal(huge(torch.ones(1, 56)), F.linear(torch.ones(1, 56), huge.weight, huge.bias))


def test_the_plain_layer_is_back_after_an_error() -> None:
    layer = make_layer()
    with pytest.raises(KeyboardInterrupt), packed(layer, 1):
        raise KeyboardInterrupt
    assert "forward" not in vars(layer)
    layer(torch.randn(2, 56)).sum().backward()  # and has its gradient
    assert layer.weight.grad is not None


def test_layers_that_were_packed_can_be_copied_and_saved() -> None:
    layer, x = make_layer(), torch.randn(1, 56)
    with torch.inference_mode(), packed(layer, 1):
        fast = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        with torch.inference_mode(), packed(twin, 1):
            assert torch.equal(twin(x), fast)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_packing_is_silent() -> None:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        layer = make_layer(16, 16)
        with packed(layer, 1):
            layer(torch.randn(1, 16))
