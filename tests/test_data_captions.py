"""Captions: every variation keeps the skin tone, almost every one the name, and the plain name leads."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from minicogview.data.captions import (
    LANGUAGES,
    TEMPLATES,
    TONE_PHRASES,
    article,
    head,
    in_template,
    name,
    tags,
    vary,
)
from minicogview.data.emoji import Emoji, load_emoji
from minicogview.errors import MiniCogViewError

EMOJI = {one.en: one for one in load_emoji()}
COOK = EMOJI["man cook: medium skin tone"]


def has_head(emoji: Emoji, lang: str, text: str) -> bool:
    """All words (English) or characters (Chinese) of the name are in the caption."""
    known, text = head(emoji, lang).casefold(), text.casefold()
    if lang == "zh":
        return set(known) - {"的"} <= set(text)
    words = re.findall(r"[\w’“”!#*-]+", known)
    return all(word in text for word in words if word not in ("with", "and"))


def test_plain_names() -> None:
    assert name(COOK, "en") == "man cook: medium skin tone"
    assert name(COOK, "zh") == "男厨师: 中等肤色"
    with pytest.raises(MiniCogViewError, match=r"'fr'.*en, zh"):
        name(COOK, "fr")


@pytest.mark.parametrize(
    ("en", "head_en", "head_zh"),
    [
        ("red apple", "red apple", "红苹果"),
        ("man cook: medium skin tone", "man cook", "男厨师"),
        ("man: medium skin tone, bald", "bald man", "秃顶的男人"),
        ("woman: red hair", "woman with red hair", "红发的女人"),
        ("person running: dark skin tone, facing right", "person running facing right", "面向右边的跑步者"),
        ("keycap: 5", "keycap 5", "按键5"),
    ],
)
def test_heads(en: str, head_en: str, head_zh: str) -> None:
    assert (head(EMOJI[en], "en"), head(EMOJI[en], "zh")) == (head_en, head_zh)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_heads_lead_to_one_character(lang: str) -> None:
    heads = Counter((head(one, lang).casefold(), one.tone) for one in load_emoji())
    assert [key for key, n in heads.items() if n > 1] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_tone_phrases_are_the_same_everywhere(lang: str) -> None:
    for one in load_emoji():
        inside = [tone for tone, phrase in TONE_PHRASES[lang].items() if f": {phrase}" in name(one, lang)]
        assert inside == ([one.tone] if one.tone else [])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_variation_keeps_tone_and_almost_every_one_the_name(lang: str) -> None:
    rng = random.Random(0)
    lost = plain = total = 0
    for one in load_emoji():
        for _ in range(4):
            text = vary(one, lang, rng)
            total += 1
            plain += text == name(one, lang)
            lost += not has_head(one, lang, text)
            assert text == text.strip() and text
            assert len(text.split()) <= 25 and len(text) <= 100
            if one.tone:
                assert TONE_PHRASES[lang][one.tone] in text.casefold()
                others = [phrase for tone, phrase in TONE_PHRASES[lang].items() if tone != one.tone]
                assert not re.search(rf"(?<![\w-])({'|'.join(others)})", text.casefold()) or lang == "zh"
    assert lost / total <= 0.06
    assert 0.33 <= plain / total <= 0.45


@pytest.mark.parametrize("lang", LANGUAGES)
def test_the_plain_name_is_the_most_frequent_form(lang: str) -> None:
    rng = random.Random(1)
    for one in (COOK, EMOJI["red apple"]):
        counts = Counter(vary(one, lang, rng) for _ in range(600))
        assert counts.most_common(1)[0][0] == name(one, lang)
        assert len(counts) > 20


def test_the_forms_that_people_write_all_occur() -> None:
    rng = random.Random(2)
    apple = {vary(EMOJI["red apple"], "en", rng) for _ in range(800)}
    assert {
        "red apple",
        "a red apple",
        "the red apple",
        "a picture of a red apple",
        "red apple, fruit",
    } <= apple
    cook = {vary(COOK, "en", rng) for _ in range(1500)}
    assert {
        "medium skin tone man cook",
        "man cook with medium skin tone",
        "a man cook: medium skin tone",
    } <= cook
    chinese = {vary(COOK, "zh", rng) for _ in range(1500)}
    assert {"中等肤色的男厨师", "男厨师，中等肤色", "男厨师: 中等肤色"} <= chinese


def test_the_same_seed_gives_the_same_captions() -> None:
    first, second = random.Random(3), random.Random(3)
    some = load_emoji()[::50]
    assert [vary(one, "zh", first) for one in some] == [vary(one, "zh", second) for one in some]


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("red apple", "a"),
        ("orange heart", "an"),
        ("unicorn", "a"),
        ("one-piece swimsuit", "a"),
        ("hourglass not done", "an"),
        ("x-ray", "an"),
        ("SOS button", "an"),
        ("NEW button", "a"),
        ("medium skin tone man cook", "a"),
        ("person lifting weights", "a"),
        ("people hugging", ""),
        ("crossed fingers: dark skin tone", ""),
        ("octopus", "an"),
        ("glass of milk", "a"),
        ("Santa Claus", ""),
        ("five o’clock", ""),
        ("cooked rice", ""),
    ],
)
def test_articles(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


def test_templates() -> None:
    apple = EMOJI["red apple"]
    assert in_template("a picture of {}", apple, "en") == "a picture of a red apple"
    assert in_template("{} emoji", apple, "en") == "red apple emoji"
    assert in_template("a picture of {}", COOK, "en") == "a picture of a man cook: medium skin tone"
    assert in_template("一张{}的图片", apple, "zh") == "一张红苹果的图片"
    for lang in LANGUAGES:
        assert len(set(TEMPLATES[lang])) >= 8
        assert all(template.count("{}") == 1 for template in TEMPLATES[lang])


def test_tags_never_name_another_gender_or_repeat_the_name() -> None:
    worker = EMOJI["construction worker"]
    assert "man" in worker.tags_en and "man" not in tags(worker, "en")
    assert "red" not in tags(EMOJI["red apple"], "en")
    assert not any("男" in tag or "女" in tag for one in load_emoji() for tag in tags(one, "zh"))
