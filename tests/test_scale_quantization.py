"""8-bit and 4-bit weights: codes and errors, products on a CPU, and the Triton kernel, also compiled for a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minicogview.config import TransformerConfig
from minicogview.errors import MiniCogViewError
from minicogview.scale import quantization
from minicogview.scale.quantization import (
    Int4ProductLinear,
    Quantized,
    QuantizedLinear,
    dequantize,
    fused_product,
    has_int4_product,
    quantize,
    quantize_layers,
    relative_error,
    split_bytes,
)
from minicogview.transformer import Transformer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = pytest.mark.parametrize("bits", [4, 8])
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux")
needs_int4_product = pytest.mark.skipif(not has_int4_product(torch.device("cpu")), reason="PyTorch has no such product")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- codes


def test_four_bits_lie_as_the_docstring_says() -> None:
    """Whole numbers from -8 to 7 are their own codes: scale 1, offset 0."""
    row = torch.arange(64) % 16 - 8.0
    q = quantize(row[None], bits=4)
    assert q.bits == 4 and q.codes.dtype == torch.uint8
    assert (q.scale, q.offset) == (torch.ones(1, 1), torch.zeros(1, 1))
    assert q.codes[0, :3].tolist() == [0x10, 0x32, 0x54]  # columns 0 and 1, then 2 and 3, ...: code = number + 8
    assert split_bytes(q.codes)[0, :6].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(dequantize(q), row[None])


def test_eight_bits_are_a_byte_a_number() -> None:
    row = torch.cat([torch.tensor([-128.0, 127.0]), torch.arange(62.0)])
    q = quantize(row[None], bits=8)
    assert q.bits == 8 and q.codes.dtype == torch.uint8
    assert q.codes[0, :4].tolist() == [0, 255, 128, 129]
    assert torch.equal(dequantize(q), row[None])


def test_every_group_has_its_own_scale() -> None:
    weight = torch.cat([normal(3, 64), 1000 * normal(3, 64)], dim=1)
    q = quantize(weight, bits=4)
    assert q.scale.shape == q.offset.shape == (3, 2)
    assert (q.scale[:, 1] > 100 * q.scale[:, 0]).all()
    assert relative_error(weight[:, :64], quantize(weight[:, :64], bits=4)) < 0.15


def bound(weight: Tensor, q: Quantized) -> Tensor:
    """The most that a number may be off: half a step, and what rounding scale and offset to bfloat16 adds."""
    groups = weight.float().unflatten(1, (-1, 64))
    far = groups.amax(-1) - groups.amin(-1) + groups.abs().amax(-1)
    return (q.scale.float() / 2 + 2.0**-8 * far)[..., None].expand_as(groups).flatten(1)


ROWS = {
    "normal": normal(5, 192),
    "zeros": torch.zeros(2, 128),
    "one number": torch.full((2, 64), -0.37),
    "huge outlier": normal(2, 128).index_fill(1, torch.tensor([70]), 3e4),
    "one negative": torch.zeros(2, 128).index_fill(1, torch.tensor([5]), -1.0),
    "far from zero": 100 + 0.01 * normal(2, 64),
    "tiny": 1e-6 * normal(2, 64),
    "more rows than are done at once": normal(300, 64),
}


@BITS
@pytest.mark.parametrize("weight", ROWS.values(), ids=ROWS.keys())
def test_errors_stay_within_half_a_step(weight: Tensor, bits: int) -> None:
    q = quantize(weight, bits)
    error = (dequantize(q) - weight).abs()
    assert (error <= bound(weight, q)).all()
    assert error.isfinite().all()


@BITS
@given(seed=st.integers(0, 2**16), size=st.floats(1e-4, 1e4), shift=st.floats(-10, 10))
def test_errors_of_any_size(bits: int, seed: int, size: float, shift: float) -> None:
    weight = size * (normal(2, 128, seed=seed) + shift)
    q = quantize(weight, bits)
    assert ((dequantize(q) - weight).abs() <= bound(weight, q)).all()


def test_relative_errors_are_as_the_docstring_says() -> None:
    weight = normal(64, 512)
    assert 0.07 < relative_error(weight, quantize(weight, bits=4)) < 0.13
    assert 0.004 < relative_error(weight, quantize(weight, bits=8)) < 0.008


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_changed_in_place(bits: int, dtype: torch.dtype) -> None:
    """``float()`` of a float32 tensor is the tensor itself: once, the weights were overwritten by their codes."""
    weight, x = normal(8, 64).to(dtype), normal(2, 64).to(dtype)
    weight_before, x_before = weight.clone(), x.clone()
    q = quantize(weight, bits)
    before = [t.clone() for t in q]
    for _ in range(2):
        relative_error(weight, q)
        first = dequantize(q, dtype)
        QuantizedLinear(q, torch.zeros(8, dtype=dtype))(x)
    assert torch.equal(first, dequantize(q, dtype))
    assert torch.equal(weight, weight_before) and torch.equal(x, x_before)
    assert all(torch.equal(a, b) for a, b in zip(q, before))


@BITS
def test_views_and_parameters_are_quantized_as_well(bits: int) -> None:
    weight = nn.Parameter(normal(64, 8))
    q, wanted = quantize(weight.T, bits), quantize(weight.T.detach().contiguous(), bits)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(q, wanted))


def test_what_cannot_be_quantized_is_said() -> None:
    for bits in (2, 16):
        with pytest.raises(MiniCogViewError, match=rf"^{bits} bits: weights are kept in 4 or 8 bits$"):
            quantize(torch.zeros(2, 64), bits)


@BITS
@pytest.mark.parametrize("width", [1, 56, 100])
def test_a_last_group_need_not_be_full(bits: int, width: int) -> None:
    weight, bias, x = normal(32, width), normal(32), normal(5, width)
    q = quantize(weight, bits)
    whole = dequantize(q)
    assert whole.shape == (32, -(-width // 64) * 64)
    assert relative_error(weight, q) < (0.12 if bits == 4 else 0.008)
    expected = F.linear(x, whole[:, :width], bias)
    torch.testing.assert_close(QuantizedLinear(q, bias)(x), expected)
    if has_int4_product(torch.device("cpu")):
        y = Int4ProductLinear(q, bias.bfloat16())(x.bfloat16())
        torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)


def test_nothing_has_no_error() -> None:
    assert relative_error(torch.zeros(2, 64), quantize(torch.zeros(2, 64), 4)) == 0


# --- products on a CPU


@BITS
def test_a_quantized_layer_is_the_dequantized_product(bits: int) -> None:
    q, bias, x = quantize(normal(40, 128), bits), normal(40), normal(2, 3, 128)
    y = QuantizedLinear(q, bias)(x)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y, F.linear(x, dequantize(q), bias))
    torch.testing.assert_close(QuantizedLinear(q, bias)(x[0, 0]), y[0, 0])  # a single row without a batch


@needs_int4_product
@BITS
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (1, 40)])
def test_pytorchs_product_with_four_bits(bits: int, shape: tuple[int, int]) -> None:
    """Eight bits as two halves, too: against the dequantized product in float64."""
    weight, bias = normal(48, 256).bfloat16(), normal(48).bfloat16()
    q, x = quantize(weight, bits), normal(*shape, 256, seed=1).bfloat16()
    exact = F.linear(x.double(), dequantize(q, torch.float64), bias.double())
    wanted, y = QuantizedLinear(q, bias)(x), Int4ProductLinear(q, bias)(x)
    assert y.shape == wanted.shape == (*shape, 48) and y.dtype == torch.bfloat16
    for result in (wanted, y):
        assert ((result - exact).norm() / exact.norm()) < 0.006


# --- all layers of a model


def small(dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(n_layers=2, d_model=64, n_heads=2, vocab_size=50)).to(dtype).eval()


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_linear_layers_are_replaced_and_reported(bits: int, dtype: torch.dtype) -> None:
    model, errors = small(dtype), {}
    tokens, positions = torch.arange(10)[None], torch.arange(10)[None]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    table, wanted = model.token_embedding.weight.clone(), model(tokens, positions)
    quantize_layers(model, bits, lambda name, weight, q: errors.update({name: float(relative_error(weight, q))}))
    assert [*errors] == names and len(names) == 8
    assert all(0 < error < (0.15 if bits == 4 else 0.01) for error in errors.values())
    kind = Int4ProductLinear if dtype == torch.bfloat16 and has_int4_product(torch.device("cpu")) else QuantizedLinear
    assert all(type(model.get_submodule(name)) is kind for name in names)
    assert torch.equal(model.token_embedding.weight, table)
    out = model(tokens, positions)
    assert out.dtype == dtype
    # Norms after every branch of a random model let errors through undiminished.
    assert (out - wanted).norm() / wanted.norm() < (0.4 if bits == 4 else 0.04)


def test_layers_that_pytorchs_product_refuses_are_dequantized() -> None:
    model = nn.Sequential(nn.Linear(64, 24)).bfloat16()  # it takes outputs by 16
    quantize_layers(model, 4)
    assert type(model[0]) is QuantizedLinear and model(torch.ones(1, 64).bfloat16()).shape == (1, 24)


# --- the Triton kernel


def case(bits: int, n_rows: int, n_outputs: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Quantized, Tensor]:
    q = quantize(normal(n_outputs, d).to(DEVICE), bits)
    return normal(n_rows, d, seed=1).to(DEVICE, dtype), q, normal(n_outputs, seed=2).to(DEVICE, dtype)


@needs_triton
@BITS
@pytest.mark.parametrize("n_rows", [1, 3, 16])
@pytest.mark.parametrize(
    "size", [(8, 64), (37, 1088)], ids=str
)  # less than a tile; more than one, both ways, and a rest
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_the_kernel_equals_the_plain_product(bits: int, n_rows: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    from minicogview.kernels.quantized import quantized_product

    x, q, bias = case(bits, n_rows, *size, dtype)
    y = quantized_product(x, *q, bias)
    assert y.shape == (n_rows, size[0]) and y.dtype == dtype
    wanted = F.linear(x.double(), dequantize(q, torch.float64), bias.double())
    error = float((y - wanted).norm() / wanted.norm())
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert torch.equal(y, quantized_product(x, *q, bias))  # to the bit


@needs_triton
@BITS
def test_wide_matrices_with_wider_tiles(bits: int) -> None:
    from minicogview.kernels.quantized import quantized_product, settings

    assert settings(2, 8200, 64, bits, torch.float16)["OUTPUTS"] == 32
    x, q, bias = case(bits, 2, 8200, 64, torch.float16)
    wanted = F.linear(x.float(), dequantize(q), bias.float())
    torch.testing.assert_close(quantized_product(x, *q, bias).float(), wanted, atol=2e-2, rtol=2e-3)


@needs_triton
def test_the_layer_takes_the_kernel_for_few_rows_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, q, bias = case(4, 16, 40, 128, torch.float32)
    assert fused_product(x) == (DEVICE == "cuda")
    assert not fused_product(x.repeat(2, 1)) and not fused_product(x[:0])
    assert not fused_product(x.double()) and not fused_product(x.clone().requires_grad_())
    layer, batch = QuantizedLinear(q, bias), x.unflatten(0, (2, 8))
    wanted = layer(batch)
    monkeypatch.setattr(quantization, "fused_product", lambda rows: True)
    monkeypatch.setattr(quantization, "dequantize", None)  # from here on, calling it is an error
    torch.testing.assert_close(layer(batch), wanted, atol=1e-4, rtol=1e-5)
    strided = x.repeat(1, 2)[:, ::2].contiguous().T.contiguous().T  # columns lie first
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()))


@needs_triton
def test_pytorch_knows_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from minicogview.kernels.quantized import quantized_product

    x, q, bias = case(4, 2, 16, 64, torch.float32)
    torch.library.opcheck(quantized_product, (x, *q, bias))
    monkeypatch.setattr(quantization, "fused_product", lambda rows: True)
    layer = QuantizedLinear(q, bias)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


COMPILE = """
import json
from inspect import signature

import torch
import triton
from kernel_resources import TARGETS, resources
from triton.compiler import ASTSource

from minicogview.kernels.quantized import product, settings

rows, target = [], TARGETS["sm_90"]
for dtype, short in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32")):
    for bits in (4, 8):
        for n_rows, n_outputs in ((1, 3072), (16, 3072), (16, 12288)):
            known = settings(n_rows, n_outputs, 3072, bits, dtype)
            types = {name: short if name.endswith("_at") else "i32" for name in signature(product.fn).parameters}
            types |= {"words_at": "*i32", "scale_at": "*bf16", "offset_at": "*bf16"}
            types |= dict.fromkeys(known, "constexpr")
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind[0] == "*"}
            source = ASTSource(product, types, known, aligned)
            compiled = triton.compile(source, target=target, options={"num_warps": 4})
            wide = compiled.asm["ptx"].count("cp.async.cg.shared.global")  # such a copy is of 16 bytes, always
            bytes_at_once = known["OUTPUTS"] * known["CHUNKS"] * known["CHUNK"] * bits // 8 // 128  # by each thread
            rows.append({"rows": n_rows, "outputs": n_outputs, "bits": bits, "type": short, "wide_copies": wide,
                         "wanted_copies": known["STAGES"] * bytes_at_once // 16, **resources(compiled, target)})
print(json.dumps(rows))
"""


@needs_triton
def test_the_compiled_kernel_reads_16_bytes_at_once_and_fits_into_the_registers() -> None:
    """The sizes of the 6B model, for an H100 that need not be there."""
    from test_kernels_local_attention import tool

    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump beside Triton")
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(benchmarks)}
    ended = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert len(rows) == 12
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["registers"] <= 168, row  # three programs of 128 threads find room on a multiprocessor
        assert row["shared_bytes"] <= 64 * 1024, row
        assert row["wide_copies"] >= row["wanted_copies"], row
        assert (row["matrix_instructions"] > 0) == (row["rows"] > 1), row
