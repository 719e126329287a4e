"""Write the data of the world tasks, for small models of real text: ``python scripts/make_world_tasks.py``.

Facts that everyone knows, sums of small numbers, and words to be said again: what a base model of some hundred million
parameters can do without training. The files are committed; a test checks that they are what this script writes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "tasks" / "world" / "data"
SEED = "world"

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "England": "London", "Ireland": "Dublin",
    "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Hungary": "Budapest", "Sweden": "Stockholm",
    "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Egypt": "Cairo", "Turkey": "Ankara",
    "Iraq": "Baghdad", "Iran": "Tehran", "Thailand": "Bangkok", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Canada": "Ottawa", "Kenya": "Nairobi", "Lebanon": "Beirut", "Ukraine": "Kyiv",
}  # fmt: skip
LANGUAGES = {
    "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Australia": "English", "Argentina": "Spanish",
    "Japan": "Japanese", "Russia": "Russian", "Poland": "Polish", "Greece": "Greek", "Sweden": "Swedish",
    "Turkey": "Turkish", "France": "French", "Italy": "Italian", "Finland": "Finnish", "Hungary": "Hungarian",
}  # fmt: skip
AUTHORS = {
    "Hamlet": "William Shakespeare", "Pride and Prejudice": "Jane Austen", "Oliver Twist": "Charles Dickens",
    "War and Peace": "Leo Tolstoy", "The Odyssey": "Homer", "Don Quixote": "Miguel de Cervantes",
    "The Lord of the Rings": "J. R. R. Tolkien", "Nineteen Eighty-Four": "George Orwell", "Faust": "Goethe",
    "The Old Man and the Sea": "Ernest Hemingway", "The Divine Comedy": "Dante", "Frankenstein": "Mary Shelley",
}  # fmt: skip
ELEMENTS = {
    "hydrogen": "H", "oxygen": "O", "carbon": "C", "nitrogen": "N", "gold": "Au", "silver": "Ag", "iron": "Fe",
    "sodium": "Na", "helium": "He", "copper": "Cu", "lead": "Pb", "calcium": "Ca",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "horse": "foal", "bear": "cub", "duck": "duckling",
    "goat": "kid", "frog": "tadpole", "hen": "chick",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "old": "young", "rich": "poor",
    "fast": "slow", "open": "closed", "early": "late", "hard": "soft", "wet": "dry", "light": "dark", "full": "empty",
    "strong": "weak", "high": "low",
}  # fmt: skip
HOMES = {
    "Eiffel Tower": "Paris", "Colosseum": "Rome", "Big Ben": "London", "Brandenburg Gate": "Berlin",
    "Acropolis": "Athens", "Kremlin": "Moscow", "Statue of Liberty": "New York", "Golden Gate Bridge": "San Francisco",
    "Forbidden City": "Beijing", "Sagrada Familia": "Barcelona",
}  # fmt: skip
KINDS = (
    ("The capital of {} is", CAPITALS),
    ("The language that most people in {} speak is", LANGUAGES),
    ("The author of {} is", AUTHORS),
    ("The chemical symbol of {} is", ELEMENTS),
    ("A young {} is called a", YOUNG),
    ("The opposite of {} is", OPPOSITES),
    ("The {} stands in the city of", HOMES),
)
"""Beginning of a sentence, and what ends it."""

WORDS = (
    "river stone green apple seven window garden paper silver mountain yellow horse letter winter bridge table cloud "
    "music eleven street ocean candle purple forest basket"
).split()
COPIES = 100


def facts() -> list[dict[str, Any]]:
    """Sentences of which one of four ends is true; the wrong ones are true of others of their kind."""
    rows = []
    for beginning, known in KINDS:
        for name, right in known.items():
            draw = random.Random(f"{SEED} {beginning} {name}")
            wrong = draw.sample(sorted({other for other in known.values() if other != right}), 3)
            choices = draw.sample([right, *wrong], 4)
            rows.append({"sentence": beginning.format(name), "choices": choices, "label": choices.index(right)})
    return rows


def sums() -> list[dict[str, Any]]:
    """All sums of two numbers from 1 to 9, behind three that are worked out."""
    shown = "2 + 1 = 3\n4 + 4 = 8\n7 + 5 = 12\n"
    return [{"text": f"{shown}{a} + {b} =", "answer": str(a + b)} for a in range(1, 10) for b in range(1, 10)]


def copies() -> list[dict[str, Any]]:
    """Five words to be said again, behind two examples."""
    draw, rows = random.Random(f"{SEED} copies"), []
    for _ in range(COPIES):
        lines = [" ".join(draw.sample(WORDS, 5)) for _ in range(3)]
        shown = "".join(f"Words: {line}\nAgain: {line}\n" for line in lines[:2])
        rows.append({"text": f"{shown}Words: {lines[2]}\nAgain:", "answer": lines[2]})
    return rows


def files() -> dict[str, str]:
    """File name -> its text."""
    made = {"facts": facts(), "sums": sums(), "copies": copies()}
    return {
        f"{name}.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        for name, rows in made.items()
    }


def main() -> None:
    """Write all files."""
    DATA.mkdir(parents=True, exist_ok=True)
    for name, text in files().items():
        (DATA / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
