"""The kernels of local attention against the reference, in the interpreter or on a GPU; and compiled ahead of time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_local_attention import CASES, Case, call, gradients, inputs
from torch import Tensor

from minicogview.errors import MiniCogViewError
from minicogview.local_attention import choose_impl, local_attention
from minicogview.windows import Coarse, Global

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# In the interpreter a program takes tens of milliseconds, so these grids are small; all kinds of keys occur.
SMALL = {
    "wide window": Case((5, 9), (41, 39), batch=1, rows=1),
    "wide and causal": Case((9, 5), (41, 39), batch=1, rows=1, causal=True),
    "one row": Case((1, 30), (3, 7)),
    "one column": Case((30, 1), (3, 7)),
    "coarse, causal": Case((9, 6), coarse=(3, 2), causal=True),
    "heads of 20": Case((7, 9), coarse=(7, 3), heads=(2, 20)),
    "heads of 128": Case((5, 5), heads=(1, 128), coarse=(5, 5)),
    "no text": Case((4, 6), n_text=0),
    "ratios 2 and 3": Case((6, 9), (3, 3), coarse=(3, 3), coarse_window=(3, 7)),
    "all kinds": Case((9, 12), (5, 3), coarse=(3, 4), n_text=4, bias="number", padding=True),
    "shared keys": Case((9, 6), coarse=(3, 2), n_text=4, batch=4, rows=2, bias="tensor", padding=True),
    "one row of keys": Case((9, 9), n_text=4, batch=3, rows=1, padding=True),
}
LARGE = ["odd sizes", "causal", "even window", "one pixel", "small grid", "coarse alone", "text alone", "empty batch"]
# On a GPU every case is run.
EVERY = {n: CASES[n] for n in (CASES if DEVICE == "cuda" else LARGE)} | {f"{n}, small": c for n, c in SMALL.items()}


def on_device(leaves: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: None if x is None else x.detach().to(DEVICE).requires_grad_() for n, x in leaves.items()}


def without_bias_gradients(leaves: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {n: x.detach() if x is not None and n.endswith("bias") else x for n, x in leaves.items()}


def assert_same(case: Case, leaves: dict[str, Tensor | None], atol: float) -> None:
    """Compare results and gradients of both forms, except the gradient of a bias."""
    leaves = without_bias_gradients(on_device(leaves))
    learned = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
    out, expected = call(case, leaves, "triton"), call(case, leaves, "reference")
    assert out.shape == expected.shape and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, atol=atol, rtol=0)
    for (name, grad), wanted in zip(gradients(out, learned).items(), gradients(expected, learned).values()):
        torch.testing.assert_close(grad, wanted, atol=3 * atol, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY.keys())
def test_the_kernels_equal_the_reference(case: Case) -> None:
    assert_same(case, inputs(case), atol=1e-5)


@settings(max_examples=12 if DEVICE == "cpu" else 60)
@given(
    key_grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ratio=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    coarse_window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    n_text=st.integers(0, 3),
    causal=st.booleans(),
)
def test_any_shape(key_grid, ratio, window, coarse_window, n_text, causal) -> None:
    if causal:
        window, coarse_window = ((a | 1, b | 1) for a, b in (window, coarse_window))
    grid = key_grid[0] * ratio[0], key_grid[1] * ratio[1]
    case = Case(grid, window, key_grid, coarse_window, n_text, batch=1, rows=1, causal=causal, heads=(1, 3))
    assert_same(case, inputs(case), atol=1e-5)


@pytest.mark.parametrize("name", ["all kinds, small", "shared keys, small"])
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
def test_half_precision_is_as_exact_as_the_blocked_form(name: str, dtype: torch.dtype) -> None:
    case = EVERY[name]
    leaves = without_bias_gradients(on_device(inputs(case, dtype)))
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in leaves.items()}
    wanted = call(case, exact, "reference")
    wanted_grads, errors = gradients(wanted, exact), {}
    for impl in ("triton", "blocked"):
        out = call(case, leaves, impl)
        assert out.dtype == dtype
        grads = gradients(out, {n: x for n, x in leaves.items() if x is not None and x.requires_grad})
        pairs = [(out.detach(), wanted.detach()), *((grad, wanted_grads[n]) for n, grad in grads.items())]
        errors[impl] = [float((a.double() - b).abs().max()) for a, b in pairs]
    assert all(ours <= 2 * theirs + 1e-6 for ours, theirs in zip(errors["triton"], errors["blocked"])), errors


def test_results_repeat_to_the_bit() -> None:
    case = EVERY["all kinds, small"]
    leaves = without_bias_gradients(on_device(inputs(case)))
    learned = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
    one, other = (gradients(call(case, leaves, "triton"), learned) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_text_that_is_all_padding_gives_zeros_and_no_gradient() -> None:
    q = torch.randn(1, 9, 1, 16, device=DEVICE, requires_grad=True)
    kv = torch.randn(2, 1, 4, 1, 16, device=DEVICE, requires_grad=True)
    everywhere = Global(*kv, torch.zeros(4, device=DEVICE))
    out = local_attention(q, None, None, (3, 3), everywhere=everywhere, impl="triton")
    assert (out == 0).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), [q, kv]))


def test_no_keys_at_all_give_zeros() -> None:
    q = torch.randn(1, 9, 1, 16, device=DEVICE, requires_grad=True)
    empty = torch.zeros(1, 0, 1, 16, device=DEVICE)
    for impl in ("reference", "triton"):
        out = local_attention(q, None, None, (3, 3), everywhere=Global(empty, empty), impl=impl)
        assert (out == 0).all() and (torch.autograd.grad(out.sum(), q)[0] == 0).all()


def test_pytorch_knows_the_operators() -> None:
    """Shapes without numbers, gradients and aliasing, as torch.compile needs them."""
    from minicogview.kernels.launch import attend

    q, k, v = torch.randn(3, 1, 6, 1, 16, device=DEVICE, requires_grad=True)
    geometry = [2, 3, 1, 1, 1, 1, 1, 1, 0, 0, 1]
    torch.library.opcheck(attend, (q, [k, v], [], geometry, [2, 3], 0.25))


def test_under_torch_compile_and_autocast() -> None:
    """It compiles as one graph with its gradients; under autocast it computes in the type of the projections."""
    q, k, v = torch.randn(3, 1, 12, 2, 16, device=DEVICE, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * local_attention(q, k, v, (3, 4), (3, 3), impl="triton")

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    one, other = (torch.autograd.grad(f(q, k, v).square().sum(), [q, k, v]) for f in (attend, compiled))
    for mine, wanted in zip(other, one, strict=True):
        torch.testing.assert_close(mine, wanted)
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter refuses bfloat16
    with torch.autocast(DEVICE, dtype=half):
        project = torch.nn.Linear(16, 16, device=DEVICE)
        projected = [project(x) for x in (q, k, v)]
        out = attend(*projected)
        assert out.dtype == half
        wanted = 2 * local_attention(*projected, (3, 4), (3, 3), impl="reference")
    torch.testing.assert_close(out, wanted, atol=1e-2, rtol=0)


# --- what "auto" chooses, and what the kernels refuse


def test_auto_chooses_the_kernels_on_a_gpu_only() -> None:
    q = torch.zeros(1, 4, 1, 16, device=DEVICE)
    assert choose_impl("auto", q) == ("triton" if DEVICE == "cuda" else "blocked")
    assert choose_impl("auto", q.double()) == "blocked"


def test_errors_say_what_the_kernels_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 4, 1, 16, device=DEVICE)
    with pytest.raises(MiniCogViewError, match=r"cannot run: q is torch.float64: use one of torch.float32"):
        local_attention(q.double(), q.double(), q.double(), (2, 2), impl="triton")
    if DEVICE == "cpu":  # the interpreter would return nonsense
        bf16 = q.bfloat16()
        with pytest.raises(MiniCogViewError, match=r"use one of torch.float32, torch.float16 in Triton.s interp"):
            local_attention(bf16, bf16, bf16, (2, 2), impl="triton")
    large = torch.zeros(1, 4, 1, 256, device=DEVICE)
    with pytest.raises(MiniCogViewError, match=r"heads of size 256: use at most 128"):
        local_attention(large, large, large, (2, 2), impl="triton")
    bias = torch.zeros(1, 1, device=DEVICE, requires_grad=True)
    coarse = Coarse(q[:, :1], q[:, :1], (1, 1), (1, 1), bias)
    with pytest.raises(MiniCogViewError, match="no gradient of bias: detach it"):
        local_attention(q, q, q, (2, 2), coarse=coarse, impl="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MiniCogViewError, match=r"cannot run: Triton is not installed: pip install triton"):
        local_attention(q, q, q, (2, 2), impl="triton")
    assert choose_impl("auto", q) == "blocked"


# --- compiled ahead of time


def tool(name: str) -> str | None:
    import triton

    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_compiled_kernels_use_tensor_cores_and_fit_into_the_registers() -> None:
    """At the sizes of the released models, 60 x 60 tokens and 48 heads of 64, and with the toy's text."""
    if tool("cuobjdump") is None:
        pytest.skip("no cuobjdump beside Triton")
    script = Path(__file__).parents[1] / "benchmarks" / "kernel_resources.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, str(script), "--json", "-", "--quick"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "gfx942"}
    assert {row["kernel"] for row in rows} == {"forward", "backward_queries", "backward_keys"}
    for row in rows:
        assert row["matrix_instructions"] > 0, row
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 64 * 1024, row
