"""Pack the emoji pictures, their names and the held-out split into `minicogview/data/`.

Its inputs are two unpacked npm packages: `@iconify-json/fluent-emoji-flat` (SVG drawings) and `emojibase-data`
(names and tags of Unicode CLDR). To run it again, start in an empty folder, and call this script by its path:

    npm pack @iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0
    mkdir icons names
    tar xzf iconify-json-fluent-emoji-flat-1.2.6.tgz -C icons
    tar xzf emojibase-data-17.0.0.tgz -C names
    python scripts/make_emoji.py icons/package names/package

The same input gives the same bytes. The script needs only Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # emojibase counts them 1..5
DATA = Path(__file__).resolve().parent.parent / "minicogview" / "data"
N_TOKENIZER_TONED, N_TOKENIZER_PLAIN = 20, 40


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def normal_key(key: str) -> str:
    """'1F3F3-FE0F-...' -> '1f3f3-...', because the packages disagree on where the variation selector FE0F belongs."""
    return "-".join(part for part in key.lower().split("-") if part != "fe0f")


def read_names(path: Path) -> dict[str, dict[str, Any]]:
    """Label, tags, order, tone (1..5, a pair of tones, or None) and toneless key of every emoji, by its key."""
    names = {}
    for entry in read_json(path):
        base = normal_key(entry["hexcode"])
        for item in [entry, *entry.get("skins", [])]:
            names[normal_key(item["hexcode"])] = {
                "label": item["label"], "tags": entry.get("tags", []), "order": item.get("order", 0),
                "tone": item.get("tone"), "base": base,
            }  # fmt: skip
    return names


def svg_document(icons: dict[str, Any], icon: str) -> str:
    """A drawing as a complete, square SVG document; an alias is a copy of its parent, sometimes mirrored."""
    alias = icons["aliases"].get(icon, {})
    drawing = icons["icons"][alias.get("parent", icon)]
    width, height = icons["width"], drawing.get("height", icons["height"])
    body = drawing["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)  # two drawings are a little taller than wide
    corner = f"{(width - side) / 2:g} {(height - side) / 2:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{corner} {side} {side}">{body}</svg>'


def collect(icons_folder: Path, names_folder: Path) -> list[dict[str, Any]]:
    """One row for each picture that has a name in both languages, in the order of Unicode's emoji list."""
    icons = read_json(icons_folder / "icons.json")
    english = read_names(names_folder / "en" / "data.json")
    chinese = read_names(names_folder / "zh" / "data.json")
    rows = []
    for raw_key, icon in read_json(icons_folder / "chars.json").items():
        key = normal_key(raw_key)
        if key not in english or key not in chinese:
            continue
        en, zh = english[key], chinese[key]
        if isinstance(en["tone"], list):
            raise SystemExit(f"{icon}: this picture has two skin tones, and the split handles only one")
        rows.append({
            "key": key, "en": en["label"], "zh": zh["label"], "tags_en": en["tags"], "tags_zh": zh["tags"],
            "character": english[en["base"]]["label"], "tone": TONES[en["tone"] - 1] if en["tone"] else None,
            "svg": svg_document(icons, icon), "order": en["order"],
        })  # fmt: skip
    rows.sort(key=lambda row: (row.pop("order"), row["key"]))
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    """Check that each name belongs to one picture, and that a character has no tones, or a plain form and all five."""
    for column in ("key", "en", "zh"):
        values = [row[column].casefold() for row in rows]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise SystemExit(f"column {column!r}: two pictures have the same value: {twice}")
    tones: dict[str, set[str | None]] = {}
    for row in rows:
        tones.setdefault(row["character"], set()).add(row["tone"])
    odd = [name for name, found in tones.items() if found not in ({None}, {None, *TONES})]
    if odd:
        raise SystemExit(f"these characters have only some of the tones: {odd}")


def evenly(items: list[str], n: int) -> list[str]:
    """`n` of the items, spread evenly over the list."""
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def split(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The held-out sets. Every second character with tones gives up one of them, and the five tones take turns."""
    toned = sorted({row["character"] for row in rows if row["tone"]})
    plain = sorted({row["character"] for row in rows} - set(toned))
    combinations = [[character, TONES[i % len(TONES)]] for i, character in enumerate(toned[::2])]
    characters = evenly(toned, N_TOKENIZER_TONED) + evenly(plain, N_TOKENIZER_PLAIN)
    return {"combinations": combinations, "tokenizer_characters": characters}


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack emoji drawings, names and the held-out split.")
    parser.add_argument("icons", type=Path, help="folder of the unpacked @iconify-json/fluent-emoji-flat")
    parser.add_argument("names", type=Path, help="folder of the unpacked emojibase-data")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to")
    args = parser.parse_args()
    rows = collect(args.icons, args.names)
    check(rows)
    sources = [read_json(folder / "package.json") for folder in (args.icons, args.names)]
    packed = {"sources": {s["name"]: s["version"] for s in sources}, "emoji": rows}
    text = json.dumps(packed, ensure_ascii=False, separators=(",", ":"))
    data = lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)
    (args.out / "emoji.json.xz").write_bytes(data)
    held_out = json.dumps(split(rows), ensure_ascii=False, indent=1)
    (args.out / "heldout.json").write_text(held_out + "\n", encoding="utf-8")
    print(f"{len(rows)} pictures, {sum(row['tone'] is None for row in rows)} without skin tones, "
          f"{len(data) / 1e6:.2f} MB -> {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
