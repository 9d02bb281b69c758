"""Local attention: the windows, two forms against each other and against plain loops, gradients, and bad input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicogview import tiles
from minicogview.errors import MiniCogViewError
from minicogview.local_attention import choose_impl, local_attention
from minicogview.tiles import make_tiling
from minicogview.windows import Coarse, Global, Size, collect_keys, window_cells, window_mask


@dataclass(frozen=True)
class Case:
    """The sizes of one call; None leaves a kind of keys out."""

    grid: Size
    window: Size | None = (9, 5)
    coarse: Size | None = None
    coarse_window: Size = (5, 5)
    n_text: int = 0
    batch: int = 2  # rows of q
    rows: int = 2  # rows of keys of every kind
    causal: bool = False
    heads: Size = (2, 8)  # heads, head size
    bias: str = "none"  # or "number", "tensor"
    padding: bool = False  # some text keys are masked


CASES = {
    "same": Case((12, 18)),
    "odd sizes": Case((17, 19), (9, 5)),
    "causal": Case((17, 19), causal=True),
    "even window": Case((20, 17), (4, 2)),
    "window larger than the grid": Case((18, 16), (41, 39)),
    "larger, causal": Case((18, 16), (41, 39), causal=True),
    "one cell each": Case((17, 17), (1, 1)),
    "one pixel": Case((1, 1), coarse=(1, 1), n_text=2),
    "one row": Case((1, 300), (3, 7)),
    "one column": Case((300, 1), (3, 7)),
    "small grid": Case((6, 9), coarse=(2, 3), n_text=3, bias="tensor", padding=True),
    "coarse": Case((24, 24), coarse=(8, 8)),
    "coarse, causal": Case((24, 21), coarse=(8, 7), causal=True),
    "ratios 2 and 3": Case((18, 27), (3, 3), coarse=(9, 9), coarse_window=(3, 7)),
    "coarse alone": Case((18, 27), None, coarse=(9, 9), bias="tensor"),
    "coarse of one cell": Case((20, 20), coarse=(1, 1)),
    "text": Case((19, 18), n_text=5, bias="tensor", padding=True),
    "text, causal": Case((19, 18), n_text=5, causal=True, bias="number"),
    "text alone": Case((19, 18), None, n_text=5, padding=True),
    "all kinds": Case((18, 21), (5, 3), coarse=(6, 7), n_text=4, bias="number", padding=True),
    "shared keys": Case((18, 21), coarse=(6, 7), n_text=4, batch=6, rows=2, bias="tensor", padding=True),
    "one row of keys": Case((18, 18), n_text=4, batch=3, rows=1, padding=True),
    "empty batch": Case((18, 18), coarse=(6, 6), n_text=3, batch=0, rows=0, bias="tensor", padding=True),
    "heads of 32": Case((17, 17), heads=(1, 32)),
    "heads of 128": Case((17, 17), heads=(3, 128), coarse=(17, 17)),
}
BY_NAME = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor | None]:
    """Random leaves: joint projections as in the model, (rows, tokens, q k v, heads, head size), and biases."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    n = case.grid[0] * case.grid[1]
    leaves: dict[str, Tensor | None] = {"q": normal(case.batch, n, *case.heads)}
    if case.window:
        leaves["own"] = normal(case.rows, n, 3, *case.heads)
    if case.coarse:
        leaves["coarse"] = normal(case.rows, case.coarse[0] * case.coarse[1], 2, *case.heads)
        leaves["coarse_bias"] = normal(case.rows, case.coarse[0] * case.coarse[1]) if case.bias == "tensor" else None
    if case.n_text:
        leaves["text"] = normal(case.rows, case.n_text, 2, *case.heads)
        leaves["text_bias"] = normal(case.n_text) if case.bias == "tensor" else None
    return leaves


def call(case: Case, leaves: dict[str, Tensor | None], impl: str, **changes) -> Tensor:
    """Call ``local_attention`` on views of the leaves, none of which is contiguous."""
    own, number = leaves.get("own"), 1.5 if case.bias == "number" else 0.0
    k, v = (None, None) if own is None else own.unbind(2)[1:]
    coarse = text = None
    if case.coarse:
        bias = leaves["coarse_bias"]
        k_and_v = leaves["coarse"].unbind(2)
        coarse = Coarse(*k_and_v, case.coarse, case.coarse_window, number if bias is None else bias)
    if case.n_text:
        mask, bias = None, leaves["text_bias"]
        if case.padding:
            mask = torch.arange(case.n_text) >= torch.arange(1, case.rows + 1)[:, None] % case.n_text
        text = Global(*leaves["text"].unbind(2), mask, number if bias is None else bias)
    arguments = {"window": case.window or (9, 5), "coarse": coarse, "everywhere": text, "causal": case.causal}
    return local_attention(leaves["q"], k, v, case.grid, impl=impl, **{**arguments, **changes})


def gradients(out: Tensor, leaves: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The gradient of every leaf, for a fixed random gradient of the output."""
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    given = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(out, list(given.values()), direction, allow_unused=True)
    return {name: torch.zeros_like(given[name]) if grad is None else grad for name, grad in zip(given, grads)}


# --- the windows


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_by_plain_loops(causal: bool) -> None:
    query_grid, key_grid, window = (6, 9), (3, 3), (3, 5)
    mask = window_mask(query_grid, key_grid, window, causal)
    for y in range(6):
        for x in range(9):
            for row in range(3):
                for column in range(3):
                    dy, dx = row - y // 2, column - x // 3
                    seen = abs(dy) <= 1 and abs(dx) <= 2
                    if causal:
                        seen = seen and (dy, dx) <= (0, 0)
                    assert mask[9 * y + x, 3 * row + column] == seen


def test_the_original_window_is_nine_rows_and_five_columns() -> None:
    middle = window_mask((21, 21), (21, 21), (9, 5))[21 * 10 + 10].view(21, 21)
    rows, columns = middle.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 14, 8, 12)
    assert middle.sum() == 45


def test_an_even_window_reaches_further_up_and_left() -> None:
    middle = window_mask((9, 9), (9, 9), (4, 2))[9 * 4 + 4].view(9, 9)
    rows, columns = middle.nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 5, 3, 4)


def test_a_causal_window_sees_nothing_after_itself_and_keeps_its_own_cell() -> None:
    mask = window_mask((7, 8), (7, 8), (5, 3), causal=True)
    assert torch.equal(mask, mask.tril()) and mask.diagonal().all()


def test_cells_outside_are_marked_and_point_inside() -> None:
    index, inside = window_cells((4, 6), (2, 2), (5, 5))
    assert index.shape == inside.shape == (24, 25)
    assert index.min() == 0 and index.max() == 3
    assert (inside.sum(1) == 4).all()  # the window covers the whole coarse grid


# --- the reference and the blocked form


def test_the_reference_by_plain_loops() -> None:
    """One softmax over three kinds of keys, summed key by key in plain Python."""
    case = Case(
        (6, 4), (3, 3), coarse=(3, 2), coarse_window=(1, 3), n_text=3, bias="number", padding=True, batch=1, rows=1
    )
    leaves = inputs(case, torch.float64)
    out = call(case, leaves, "reference")
    q, own, coarse, text = (leaves[name].detach()[0] for name in ("q", "own", "coarse", "text"))
    for t in range(24):
        y, x = divmod(t, 4)
        for head in range(2):
            seen = []  # (score without bias, bias, value)
            for row in range(y - 1, y + 2):
                for column in range(x - 1, x + 2):
                    if 0 <= row < 6 and 0 <= column < 4:
                        seen.append((own[4 * row + column, 1:, head], 0.0))
            for column in range(x // 2 - 1, x // 2 + 2):
                if 0 <= column < 2:
                    seen.append((coarse[2 * (y // 2) + column, :, head], 1.5))
            seen += [(text[i, :, head], 1.5) for i in (1, 2)]  # the first one is padding
            weights = [math.exp(float(q[t, head] @ k) / math.sqrt(8) + bias) for (k, _), bias in seen]
            expected = sum(weight * v for weight, ((_, v), _) in zip(weights, seen)) / sum(weights)
            torch.testing.assert_close(out[0, t, head].detach(), expected)


@BY_NAME
def test_blocked_equals_reference(case: Case) -> None:
    leaves = inputs(case)
    expected, out = call(case, leaves, "reference"), call(case, leaves, "blocked")
    assert out.shape == leaves["q"].shape
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    for (name, grad), wanted in zip(gradients(out, leaves).items(), gradients(expected, leaves).values()):
        torch.testing.assert_close(grad, wanted, atol=3e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():  # without gradients: a few tiles at a time
        torch.testing.assert_close(call(case, leaves, "blocked"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [1, 2**19, 2**21])
def test_pictures_and_heads_in_groups_give_the_same_gradients(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["shared keys"], batch=4, heads=(5, 8))  # 69 kB a head
    leaves = inputs(case)
    expected = gradients(call(case, leaves, "reference"), leaves)
    monkeypatch.setattr(tiles, "TRAINING_BYTES", limit)
    for (name, grad), wanted in zip(gradients(call(case, leaves, "blocked"), leaves).items(), expected.values()):
        torch.testing.assert_close(grad, wanted, atol=3e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    key_grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ratio=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    coarse_window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    n_text=st.integers(0, 3),
    causal=st.booleans(),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_any_shape(key_grid, ratio, window, coarse_window, n_text, causal, tile) -> None:
    if causal:
        window, coarse_window = ((a | 1, b | 1) for a, b in (window, coarse_window))
    grid = key_grid[0] * ratio[0], key_grid[1] * ratio[1]
    case = Case(grid, window, key_grid, coarse_window, n_text, batch=1, rows=1, causal=causal, heads=(1, 3))
    leaves = inputs(case, torch.float64)
    with torch.no_grad():
        expected = call(case, leaves, "reference")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "TILE", tile)
            patch.setattr(tiles, "ONE_TILE_UP_TO", 0)
            out = call(case, leaves, "blocked")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_tables_made_during_inference_can_be_used_in_training() -> None:
    make_tiling.cache_clear()
    case = CASES["coarse"]
    leaves = inputs(case)
    with torch.inference_mode():
        call(case, leaves, "blocked")
    call(case, leaves, "blocked").sum().backward()
    assert make_tiling.cache_info().hits == 1


def test_a_text_that_is_all_padding_gives_nothing_instead_of_nan() -> None:
    q, kv = torch.randn(1, 289, 2, 8), torch.randn(2, 1, 4, 2, 8)
    for impl in ("reference", "blocked"):
        out = local_attention(q, None, None, (17, 17), everywhere=Global(*kv, torch.zeros(4)), impl=impl)
        assert (out == 0).all()


def test_sizes_may_be_lists_as_json_gives_them() -> None:
    case = CASES["coarse"]
    leaves = inputs(case)
    k, v = leaves["own"].unbind(2)[1:]
    coarse = Coarse(*leaves["coarse"].unbind(2), list(case.coarse), list(case.coarse_window))
    for impl in ("reference", "blocked"):
        out = local_attention(leaves["q"], k, v, list(case.grid), list(case.window), coarse=coarse, impl=impl)
        assert torch.equal(out, call(case, leaves, impl))


def test_scale_is_a_factor_of_the_scores() -> None:
    case = CASES["all kinds"]
    leaves = inputs(case)
    half = {**leaves, "q": leaves["q"] / 2}
    for impl in ("reference", "blocked"):
        wanted = call(case, half, impl)
        torch.testing.assert_close(call(case, leaves, impl, scale=0.5 * 8**-0.5), wanted)


# --- gradients and types


@pytest.mark.parametrize("name", ["all kinds", "shared keys", "coarse, causal"])
def test_gradcheck_of_the_reference(name: str) -> None:
    sizes = {"grid": (4, 6), "coarse": (2, 3), "window": (3, 3), "coarse_window": (1, 3), "heads": (1, 2)}
    case = replace(CASES[name], **sizes)
    leaves = inputs(case, torch.float64)
    names = [name for name, leaf in leaves.items() if leaf is not None]

    def run(*values: Tensor) -> Tensor:
        return call(case, {**leaves, **dict(zip(names, values))}, "reference")

    assert torch.autograd.gradcheck(run, [leaves[name] for name in names])


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("name", ["all kinds", "coarse"])
def test_half_precision(name: str, impl: str, dtype: torch.dtype, rounding: float) -> None:
    case = CASES[name]
    leaves = inputs(case, dtype)
    exact = {name: None if leaf is None else leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    out, expected = call(case, leaves, impl), call(case, exact, "reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=6 * rounding, rtol=0)
    for (name, grad), wanted in zip(gradients(out, leaves).items(), gradients(expected, exact).values()):
        assert grad.dtype == dtype
        error = (grad.double() - wanted).abs().max() / wanted.abs().max()
        assert error < 6 * rounding, name


def test_blocked_is_as_exact_as_dense_attention_in_half_precision() -> None:
    case = Case((24, 24), coarse=(8, 8), heads=(4, 64))
    for dtype in (torch.float16, torch.bfloat16):
        leaves = inputs(case, dtype)
        keys = collect_keys(
            [
                Coarse(leaves["own"][:, :, 1], leaves["own"][:, :, 2], case.grid, case.window),
                Coarse(leaves["coarse"][:, :, 0], leaves["coarse"][:, :, 1], case.coarse, case.coarse_window),
            ],
            case.batch,
        )
        mask = torch.cat([window_mask(case.grid, *one) for one in keys.windows], dim=1)
        with torch.no_grad():
            q, k, v = (x.transpose(1, 2) for x in (leaves["q"], keys.k, keys.v))
            dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
            exact = call(case, {n: leaf if leaf is None else leaf.double() for n, leaf in leaves.items()}, "reference")
            for impl in ("reference", "blocked"):
                error = (call(case, leaves, impl).double() - exact).abs().max()
                assert error <= 2 * (dense.double() - exact).abs().max()


def test_autocast() -> None:
    case = CASES["all kinds"]
    leaves = inputs(case)
    expected = call(case, leaves, "reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for impl in ("reference", "blocked"):
            torch.testing.assert_close(call(case, leaves, impl).float(), expected, atol=0.05, rtol=0)


# --- choices and bad input


def test_choose_impl_says_what_auto_chooses() -> None:
    assert choose_impl() == "blocked"
    assert [choose_impl(impl) for impl in ("reference", "blocked")] == ["reference", "blocked"]
    case = CASES["coarse"]
    leaves = inputs(case)
    assert torch.equal(call(case, leaves, "auto"), call(case, leaves, choose_impl()))


Q = torch.zeros(2, 24, 2, 8)
BAD: dict[str, tuple[dict, str]] = {
    "unknown form": ({"impl": "flash"}, r"unknown impl 'flash': choose one of auto, reference, blocked, triton"),
    "grid": ({"grid": (5, 5)}, r"q has shape \(2, 24, 2, 8\).* grid \(5, 5\)"),
    "grid of nothing": ({"grid": (0, 24)}, r"grid \(0, 24\)"),
    "no heads axis": ({"q": Q.flatten(2)}, r"q has shape \(2, 24, 16\)"),
    "k alone": ({"v": None}, r"give both k and v"),
    "no keys": ({"k": None, "v": None}, r"give both k and v, or leave both out and give coarse or everywhere"),
    "k of another grid": ({"k": Q[:, :20]}, r"k has shape \(2, 20, 2, 8\): expected \(2, 24, 2, 8\)"),
    "v of another head size": ({"v": Q[..., :4]}, r"v has shape"),
    "v of another batch": ({"v": Q[:1]}, r"v has shape \(1, 24, 2, 8\): expected \(2, "),
    "batch not divisible": ({"k": Q[[0, 0, 0]], "v": Q[[0, 0, 0]]}, r"k has 3 rows, which does not divide the 2 of q"),
    "no rows of keys": ({"k": Q[:0], "v": Q[:0]}, r"k has 0 rows"),
    "types": ({"k": Q.half()}, r"k is torch.float16, but q is torch.float32"),
    "devices": ({"v": Q.to("meta")}, r"v is on meta, but q is on cpu"),
    "even causal window": ({"window": (4, 3), "causal": True}, r"window \(4, 3\) must be odd for causal=True"),
    "empty window": ({"window": (0, 3)}, r"window is \(0, 3\)"),
    "ratio not whole": (
        {"coarse": Coarse(Q[:, :9], Q[:, :9], (3, 3))},
        r"coarse.grid \(3, 3\) does not divide .*\(4, 6\)",
    ),
    "finer than fine": ({"coarse": Coarse(Q, Q, (8, 12))}, r"coarse.grid \(8, 12\) does not divide"),
    "coarse grid of nothing": ({"coarse": Coarse(Q[:, :0], Q[:, :0], (0, 3))}, r"coarse.grid is \(0, 3\)"),
    "coarse keys": ({"coarse": Coarse(Q, Q, (2, 3))}, r"coarse.k has shape \(2, 24, 2, 8\): expected \(2, 6, 2, 8\)"),
    "coarse window": (
        {"coarse": Coarse(Q[:, :6], Q[:, :6], (2, 3), (2, 2)), "causal": True, "window": (3, 3)},
        r"coarse.window \(2, 2\) must be odd",
    ),
    "text values": ({"everywhere": Global(Q[:, :5], Q[:, :4])}, r"everywhere.v has shape \(2, 4, 2, 8\)"),
    "text without heads": ({"everywhere": Global(Q[0, 0], Q[0, 0])}, r"everywhere.k has shape \(2, 8\)"),
    "text mask": (
        {"everywhere": Global(Q[:, :5], Q[:, :5], torch.ones(4))},
        r"everywhere.mask has shape \(4,\): expected \(2, 5\) or \(5,\)",
    ),
    "text bias": (
        {"everywhere": Global(Q[:, :5], Q[:, :5], bias=torch.ones(3, 5))},
        r"everywhere.bias has shape \(3, 5\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q, "grid": (4, 6), **change}
    with pytest.raises(MiniCogViewError, match=message) as error:
        local_attention(**arguments)
    assert "\n" not in str(error.value)
