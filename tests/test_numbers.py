"""Numbers of users: which types and values are taken, and what the refusals say."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from minicogview.errors import MiniCogViewError
from minicogview.numbers import RANGES, check_all, checked, integer, number, seeds_of


@pytest.mark.parametrize("value", [2, 2.0, np.int64(2), np.uint8(2), np.float32(2), torch.tensor(2), Fraction(2)])
def test_integers_of_all_types_are_taken(value: Any) -> None:
    for found in (checked("n", value), checked("--n", value), integer(value, "n", 0, 3)):
        assert found == 2 and type(found) is int


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), torch.tensor([0.5]), Decimal("0.5"), Fraction(1, 2)])
def test_numbers_of_all_types_are_taken(value: Any) -> None:
    for found in (checked("temperature", value), number(value, "share", 0, 1, above=True)):
        assert found == 0.5 and type(found) is float


@pytest.mark.parametrize(
    "value",
    [None, "2", b"2", True, np.bool_(True), [2], np.array([2, 3]), torch.ones(2), 2j, object(), 2.5, float("nan"),
     float("inf"), -float("inf"), 0, -3, 10**9, 10**5000, Decimal("nan")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_everything_else_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(MiniCogViewError, match=r"^--n is .*: give an integer from 1 to 10000$") as caught:
        checked("--n", value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


def test_the_edges_of_ranges() -> None:
    for name, allowed in RANGES.items():
        assert checked(name, allowed.high) == allowed.high
        if not allowed.above:
            assert checked(name, allowed.low) == allowed.low
        for wrong in (allowed.low - 1, 2 * allowed.high + 2):
            with pytest.raises(MiniCogViewError, match=f"^{name} is "):
                checked(name, wrong)
    with pytest.raises(MiniCogViewError, match=r"share is 0: give a number above 0 and at most 1 \(of the pic"):
        number(0, "share", 0, 1, above=True, hint="of the picture")
    check_all("--", top_k=3, guidance=None)
    with pytest.raises(MiniCogViewError, match=r"^--top-k is 0"):
        check_all("--", top_k=0)


def test_seeds() -> None:
    assert seeds_of(np.int64(5), 3.0) == [5, 6, 7]
    first, second = seeds_of(None, 2), seeds_of(None, 2)
    assert first != second and first[1] == first[0] + 1 and 0 <= first[0] < 2**31
    with pytest.raises(MiniCogViewError, match="seed is -1: give an integer from 0 to"):
        seeds_of(-1, 2)
