"""Files as an enemy, a broken disk or a newer version of a host would leave them: a seed's bytes, changed at random."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 9, 10_001, 1 << 31, 1 << 63, 1 << 70, -(1 << 40), 10**400, 0.5, -0.0, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "x",
        "0",
        "../../x",
        "/etc/passwd",
        "/dev/zero",
        "~",
        "a\nb",
        "\x00",
        "\x1b[2J",
    ),
    *("\ud800", "é" * 99, "x" * 70_000, "{{ 1/0 }}", "{% for a in range(10**9) %}{% endfor %}", "(a+)+$", "2001-99-99"),
    *(
        [],
        {},
        [[]],
        [None],
        [0] * 300,
        [1, "a", None],
        {"a": {}},
        {"": 0},
        {"x": [1]},
        [{}],
        "demo",
        "org/model",
        "bfloat16",
    ),
)
"""What stands in the place of a value."""
BYTES = (
    b"\x00",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
    b"\\u",
    b"\\",
    b"9" * 5000,
    b"[" * 5000,
    b"&a ",
    b"*a ",
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in plain data, its own among them."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def changed_data(data: Any, rng: random.Random) -> Any:
    """Plain data with a value replaced, removed, doubled or moved; up to three times."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = places(data)
        # Few of a long list's values, or its numbers would be most of what is tried.
        path = min((rng.choice(every) for _ in range(3)), key=len) if rng.random() < 0.6 else rng.choice(every)
        if not path:
            if rng.random() < 0.05:
                return rng.choice(NASTY)
            continue
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        act = rng.random()
        if act < 0.65:
            parent[path[-1]] = copy.deepcopy(rng.choice(NASTY))
        elif act < 0.8:
            del parent[path[-1]]
        elif act < 0.9 and isinstance(parent, dict):
            parent[rng.choice(("x", "", "\ud800", "a" * 999, "../x", *map(str, parent)))] = parent[path[-1]]
        elif isinstance(parent, list):
            parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(parent[path[-1]]))
        else:
            place: Any = data
            for key in rng.choice(every)[:-1]:
                place = place[key] if isinstance(place, (dict, list)) and _has(place, key) else place
            parent[path[-1]] = copy.deepcopy(place)
    return data


def _has(place: Any, key: Any) -> bool:
    return key in place if isinstance(place, dict) else isinstance(key, int) and key < len(place)


def changed_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, left out, doubled or put in; up to three times."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        size = rng.choice((1, 1, 2, 8, 64, 1000))
        act = rng.randrange(5)
        if act == 0 and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        elif act == 1:
            content = content[:at]
        elif act == 2:
            content = content[:at] + content[at + size :]
        elif act == 3:
            content = content[:at] + content[at : at + size] * rng.choice((2, 3, 50)) + content[at + size :]
        else:
            content = content[:at] + rng.choice(BYTES) + content[at:]
    return content


def mutated(content: bytes, rng: random.Random, load: Callable[[str], Any] | None, dump: Callable[[Any], str]) -> bytes:
    """``content`` changed as data where ``load`` reads it, by a coin's word; else as bytes."""
    if load is None or rng.random() < 0.3:
        return changed_bytes(content, rng)
    return dump(changed_data(load(content.decode()), rng)).encode("utf-8", "surrogatepass")


def as_json(data: Any) -> str:
    """JSON with whatever Python would write."""
    return json.dumps(data, ensure_ascii=False)
