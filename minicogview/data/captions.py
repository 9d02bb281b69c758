"""Captions for the emoji: the plain name, and the many ways in which people write the same thing.

A model that has only seen "red apple" does not understand "a picture of a red apple". Training therefore calls
`vary` for a new caption each time: most often the plain name (35 %), otherwise the name with an article, in a
template, with the skin tone in another place, or with tags. The skin tone is never dropped. The name is dropped only
in the rare captions (5 %) of tags alone, or of the skin tone alone, which teach the tone apart from any character.

The forms, in English and in Chinese:
    name       man cook: medium skin tone              男厨师: 中等肤色
    order      medium skin tone man cook               中等肤色的男厨师
    article    a man cook with medium skin tone        一个男厨师，中等肤色
    template   a picture of a man cook: medium ...     一张中等肤色的男厨师的图片
    tags       man cook: medium skin tone, chef        男厨师: 中等肤色，大厨

Simplified: a few rules and short lists of exceptions choose the article, not a dictionary.
"""

from __future__ import annotations

import random

from minicogview.data.emoji import TONES, Emoji
from minicogview.errors import MiniCogViewError

LANGUAGES = ("en", "zh")

# The same fixed lists in training and evaluation. `in_template` adds the article of {}.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "en": (
        "a picture of {}",
        "an image of {}",
        "a drawing of {}",
        "an icon of {}",
        "an emoji of {}",
        "{} emoji",
        "draw {}",
        "this is {}",
    ),
    "zh": ("一张{}的图片", "一幅{}的画", "{}的图像", "{}的图标", "{}的表情符号", "{}表情", "画{}", "这是{}"),
}
NEEDS_ARTICLE = ("of {}", "draw {}", "is {}")

TONE_PHRASES: dict[str, dict[str, str]] = {
    "en": {tone: f"{tone} skin tone" for tone in TONES},
    "zh": {
        "light": "较浅肤色",
        "medium-light": "中等-浅肤色",
        "medium": "中等肤色",
        "medium-dark": "中等-深肤色",
        "dark": "较深肤色",
    },
}
TONE_ORDERS: dict[str, tuple[str, ...]] = {
    "en": ("{tone} {head}", "{head} with {tone}", "{head}, {tone}", "{head}: {tone}"),
    "zh": ("{tone}的{head}", "{tone}{head}", "{head}，{tone}", "{head}: {tone}"),
}

# Tags that would turn a caption into that of another picture: some emoji of a person have the tag "man".
GENDER_TAGS = frozenset(
    {"man", "men", "woman", "women", "male", "female", "boy", "girl", "person", "people", "lady", "guy"}
)
AMBIGUOUS_ZH = ("男", "女", "人", "金发", "肤")

PLURALS = frozenset({"people", "men", "women", "teeth", "feet", "mice"})
PEOPLE = frozenset({"person", "man", "woman", "people", "men", "women"})
SINGULARS_IN_S = frozenset({"rhinoceros", "lens", "gas", "christmas", "t-rex", "customs"})
MASS_NOUNS = frozenset({
    "bacon", "bread", "broccoli", "butter", "cheese", "chocolate", "custard", "fire", "fog", "garlic",
    "ginger", "honey", "ice", "juice", "lacrosse", "luggage", "meat", "milk", "money", "music", "oden",
    "popcorn", "rice", "sake", "salad", "salt", "soap", "sushi", "tea", "water", "weather", "wood",
    "yarn",
})  # fmt: skip
LETTER_BY_LETTER = frozenset({"A", "AB", "ATM", "B", "CL", "DNA", "ID", "NG", "O", "OK", "P", "SOS", "VS"})
CONSONANT_SOUND = ("uni", "use", "euro", "ewe", "one")


def name(emoji: Emoji, lang: str) -> str:
    """The plain name in one language ("en" or "zh"), skin tone included, as CLDR writes it.

    Raises:
        MiniCogViewError: for another language.
    """
    if lang not in LANGUAGES:
        raise MiniCogViewError(f"no captions in language {lang!r}: choose one of {', '.join(LANGUAGES)}")
    return emoji.en if lang == "en" else emoji.zh


def tags(emoji: Emoji, lang: str) -> list[str]:
    """Tags that add something to the name and cannot be mistaken for another picture's gender or hair."""
    known = name(emoji, lang).casefold()
    if lang == "en":
        words = set(known.replace(":", " ").replace(",", " ").split())
        return [tag for tag in emoji.tags_en if tag.casefold() not in words | GENDER_TAGS]
    return [tag for tag in emoji.tags_zh if tag not in known and not any(c in tag for c in AMBIGUOUS_ZH)]


def head(emoji: Emoji, lang: str) -> str:
    """The name without its skin tone, as people say it: "man: bald" is "bald man", "按键: 5" is "按键5"."""
    first, colon, rest = name(emoji, lang).partition(": ")
    if emoji.tone:
        rest = rest.removeprefix(TONE_PHRASES[lang][emoji.tone]).removeprefix(", ")
    if not colon or not rest:
        return first
    if lang == "zh":
        return f"{first}{rest}" if rest.isascii() else f"{rest}的{first}"
    if rest == "bald":
        return f"bald {first}"
    return f"{first} with {rest}" if rest.endswith(("hair", "beard")) else f"{first} {rest}"


def article(phrase: str) -> str:
    """The indefinite article of an English noun phrase, "" if it takes none.

    Example:
        >>> article("red apple"), article("orange"), article("unicorn"), article("sunglasses")
        ('a', 'an', 'a', '')
    """
    core = phrase.split(":")[0].split(",")[0]
    for preposition in (" with ", " of ", " in ", " showing ", " on "):
        core = core.split(preposition)[0]
    words = core.split()
    people = [word for word in words if word in PEOPLE]  # in "person lifting weights" the noun comes first
    noun = (people or words[-1:])[0].casefold()
    if noun in PLURALS | MASS_NOUNS or noun == "o’clock":
        return ""
    if noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and noun not in SINGULARS_IN_S:
        return ""
    if all(word[0].isupper() and not word.isupper() for word in words):  # Santa Claus, Aries
        return ""
    return "an" if _starts_with_vowel_sound(words[0]) else "a"


def _starts_with_vowel_sound(word: str) -> bool:
    if word in LETTER_BY_LETTER:
        return word[0] in "AEFHILMNORSX"
    word = word.casefold()
    if word.startswith(("8", "18", "x-ray", "hour")):
        return True
    return word[0] in "aeiou" and not word.startswith(CONSONANT_SOUND)


def with_article(phrase: str, lang: str, definite: bool = False) -> str:
    """ "red apple" -> "a red apple" or "the red apple"; "红苹果" -> "一个红苹果" or "这个红苹果"."""
    if lang == "zh":
        return ("这个" if definite else "一个") + phrase
    word = "the" if definite else article(phrase)
    return f"{word} {phrase}" if word else phrase


def in_template(template: str, emoji: Emoji, lang: str, phrase: str | None = None) -> str:
    """Put the name, or another phrase for the same picture, into a template of TEMPLATES[lang].

    Example: "a picture of {}" and the emoji "red apple" give "a picture of a red apple".
    """
    words = name(emoji, lang) if phrase is None else phrase
    if lang == "en" and template.endswith(NEEDS_ARTICLE):
        words = with_article(words, lang)
    return template.format(words)


def reordered(emoji: Emoji, lang: str, rng: random.Random) -> str:
    """The name with its skin tone in one of several places; for an emoji without a tone, its `head`."""
    if emoji.tone is None:
        return head(emoji, lang)
    form = rng.choice(TONE_ORDERS[lang])
    return form.format(head=head(emoji, lang), tone=TONE_PHRASES[lang][emoji.tone])


def vary(emoji: Emoji, lang: str, rng: random.Random) -> str:
    """One random caption for training; the same state of `rng` gives the same caption."""
    plain = name(emoji, lang)
    draw = rng.random()
    if draw < 0.35:
        return plain
    phrase = plain if rng.random() < 0.4 else reordered(emoji, lang, rng)
    if draw < 0.40:
        caption = _tags_alone(emoji, lang, rng)
    elif draw < 0.50:
        caption = _with_tags(phrase, emoji, lang, rng)
    elif draw < 0.68:
        caption = with_article(phrase, lang, definite=rng.random() < 0.25)
    elif draw < 0.90 or emoji.tone is None:
        caption = in_template(rng.choice(TEMPLATES[lang]), emoji, lang, phrase)
    else:
        caption = reordered(emoji, lang, rng)
    return _vary_case(caption, rng)


def _with_tags(phrase: str, emoji: Emoji, lang: str, rng: random.Random) -> str:
    usable = tags(emoji, lang)
    chosen = rng.sample(usable, k=min(len(usable), rng.choice((1, 1, 2))))
    return (", " if lang == "en" else "，").join([phrase, *chosen])


def _tags_alone(emoji: Emoji, lang: str, rng: random.Random) -> str:
    """Two to four tags and the skin tone, or the tone alone; the plain name if there are too few tags."""
    if emoji.tone and rng.random() < 0.5:
        return TONE_PHRASES[lang][emoji.tone]
    usable = tags(emoji, lang)
    if len(usable) < 2:
        return name(emoji, lang)
    chosen = rng.sample(usable, k=min(len(usable), rng.choice((2, 3, 4))))
    if emoji.tone:
        chosen.append(TONE_PHRASES[lang][emoji.tone])
    return (", " if lang == "en" else "，").join(chosen)


def _vary_case(caption: str, rng: random.Random) -> str:
    """One caption in ten begins with a capital letter, and one in ten has no capitals at all."""
    draw = rng.random()
    if draw < 0.10:
        return caption[:1].upper() + caption[1:]
    return caption.lower() if draw < 0.20 else caption
