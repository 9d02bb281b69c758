"""The emoji: what is packed and what is held out; drawing is cached and repeatable, and its errors are clear."""

from __future__ import annotations

import builtins
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minicogview.data import emoji as module
from minicogview.data.emoji import TONES, cache_file, draw, heldout, indices, load_emoji, render
from minicogview.errors import MiniCogViewError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only the first five drawings, and a cache folder for this test alone."""
    rows = module._rows()[:5]
    monkeypatch.setattr(module, "_rows", lambda: rows)
    monkeypatch.setenv("MINICOGVIEW_CACHE", str(tmp_path))
    return tmp_path


def test_counts() -> None:
    everything = load_emoji()
    assert len(everything) == 3139
    assert len(load_emoji("names")) == 1594
    tones = Counter(one.tone for one in everything)
    assert [tones[tone] for tone in (None, *TONES)] == [1594] + 5 * [309]


@pytest.mark.parametrize("field", ["key", "en", "zh"])
def test_a_name_leads_to_one_picture(field: str) -> None:
    names = [getattr(one, field).casefold() for one in load_emoji()]
    assert len(names) == len(set(names))


def test_tone_and_character_agree_with_the_name() -> None:
    for one in load_emoji():
        if one.tone is None:
            assert "skin tone" not in one.en and "肤色" not in one.zh and one.character == one.en
        else:
            phrase = one.en.split(": ")[1].split(", ")[0]
            assert phrase == f"{one.tone} skin tone"
            assert one.en.startswith(one.character.split(":")[0])


def test_heldout_combinations_are_fair_and_absent_from_training() -> None:
    pairs, _ = heldout()
    assert len(pairs) >= 155
    assert max(Counter(character for character, _ in pairs).values()) == 1  # at most one tone of each character
    assert len(set(Counter(tone for _, tone in pairs).values())) == 1  # all tones equally often
    train = {(one.character, one.tone) for one in load_emoji("train")}
    held = [(one.character, one.tone) for one in load_emoji("heldout")]
    assert set(held) == pairs and len(held) == len(pairs)
    assert not train & pairs
    assert len(train) + len(pairs) == 3139
    assert {character for character, _ in pairs} <= {character for character, _ in train}


def test_tokenizer_characters_are_held_out_in_every_colour() -> None:
    _, characters = heldout()
    chosen = load_emoji("tokenizer_heldout")
    assert len(characters) == 60
    assert {one.character for one in chosen} == characters
    rest = {one.key for one in load_emoji()} - {one.key for one in chosen}
    assert not [one for one in load_emoji() if one.key in rest and one.character in characters]
    assert len({one.character for one in chosen if one.tone}) == 20


def test_unknown_split_names_the_choices() -> None:
    with pytest.raises(MiniCogViewError, match=r"unknown split 'test'.*tokenizer_heldout"):
        load_emoji("test")


def test_indices_point_at_the_rows_of_render() -> None:
    everything = load_emoji()
    some = load_emoji("heldout")[:7]
    assert [everything[i] for i in indices(some)] == some


def test_render_draws_once_and_then_reads(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = render(32, progress=False)
    assert first.shape == (5, 32, 32, 3) and first.dtype == np.uint8
    assert (first[:, 0, 0] == 255).all()  # white background
    assert first.std() > 20
    assert [path.name for path in few.iterdir()] == [cache_file(32).name]  # no half-written file is left
    monkeypatch.setattr(module, "draw", None)
    np.testing.assert_array_equal(render(32, progress=False), first)


def test_a_damaged_cache_is_drawn_again(few: Path) -> None:
    first = render(16, progress=False)
    cache_file(16).write_bytes(cache_file(16).read_bytes()[:500])
    np.testing.assert_array_equal(render(16, progress=False), first)


def test_small_pictures_are_box_averages_of_large_ones(few: Path) -> None:
    small, large = render(32, progress=False), render(96, progress=False)
    mean = large.reshape(5, 32, 3, 32, 3, 3).mean(axis=(2, 4))
    assert np.abs(mean - small).max() <= 1  # rounded twice


def test_every_drawing_fills_its_square() -> None:
    taller = [svg for one, svg in module._rows() if one.en in ("swan", "keycap: 5")]
    assert [draw(svg, 24).shape for svg in taller] == [(24, 24, 3)] * 2


def test_without_resvg_the_message_says_what_to_install(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_resvg(name: str, *args: object, **kwargs: object) -> object:
        if name == "resvg_py":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)  # type: ignore[arg-type]

    render(16, progress=False)
    monkeypatch.delitem(sys.modules, "resvg_py", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_resvg)
    assert len(render(16, progress=False)) == 5  # the cache is enough
    with pytest.raises(MiniCogViewError, match="pip install resvg-py"):
        render(24, progress=False)


def test_a_cache_that_cannot_be_written_is_only_a_warning(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (few / "file").write_text("not a folder")
    monkeypatch.setenv("MINICOGVIEW_CACHE", str(few / "file" / "below"))
    with pytest.warns(UserWarning, match="MINICOGVIEW_CACHE"):
        assert len(render(16, progress=False)) == 5


def test_size_must_be_positive() -> None:
    with pytest.raises(MiniCogViewError, match="at least 1"):
        render(0)


def test_licences_ship_with_the_data() -> None:
    folder = Path(module.__file__).parent / "licenses"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    assert "Microsoft Corporation" in texts["fluent-emoji"]
    assert "Miles Johnson" in texts["emojibase"]
    assert "UNICODE LICENSE V3" in texts["unicode"]
