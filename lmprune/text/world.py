"""The demo world: a seeded generator of small, checkable English. Knows nothing about models.

The embedded model was trained on text drawn from here, and the calibration source ``demo`` and the demo tasks
draw from the same world with other seeds. Four kinds of document:

- *biographies*: statements about people, in several paraphrases;
- *questions*: question-answer pairs about the same people. For one pair in five (`held_out`) no question is ever
  written into training text, so that answering it needs the fact and not the string;
- *arithmetic*: a week of gains and losses, worked out day by day;
- *stories*: people who carry things from room to room, where the end depends on what came before.

Everything is a pure function of its seed: the same seed gives the same text on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

WORLD_SEED = 2403_17887
"""Seed of the facts themselves. Other seeds choose only which text is written about them."""

PEOPLE = 160

_FIRST_SHE = (
    "Ada Bella Clara Dora Edith Flora Greta Hanna Irma Julia Klara Lena Mira Nora Olga Paula Rosa Selma Thea Vera"
)
_FIRST_HE = "Adam Boris Carl David Emil Felix Georg Hugo Ivan Jonas Karl Leo Max Niels Otto Peter Ralf Simon Tom Victor"
_LAST = (
    "Abbot Bergman Castle Dahl Ember Fisher Garland Hollow Ingram Jansen Keller Lindgren Marsh Norden Oakley Palmer "
    "Quill Rivers Stone Thorn Underhill Vance Winter Yarrow Ziegler Ashdown Birch Cooper Draper Elwood"
)
_CITIES = (
    "Riverton Northgate Elmdale Saltmarsh Highbridge Westhaven Oldport Greenfield Stonewell Larkhill Fairview "
    "Brookside Millford Eastwick Redcliff Sandbank Whitefall Kingsley Longmoor Ashford"
)
_JOBS = (
    "baker miller teacher doctor tailor painter sailor gardener lawyer potter weaver carpenter driver farmer "
    "librarian nurse printer shepherd singer watchmaker"
)
_ANIMALS = "cat dog horse parrot rabbit goat hen turtle pony duck canary hamster goose lizard donkey pigeon"
_COLOURS = "blue red green yellow purple white black brown grey pink silver gold"
_INSTRUMENTS = "piano violin flute drum guitar trumpet harp cello banjo whistle tuba lute"


@dataclass(frozen=True)
class Attribute:
    """One kind of fact: its values, how statements and questions about it are written."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "city",
        tuple(_CITIES.split()),
        (
            "{name} lives in {value}.",
            "The home of {name} is in {value}.",
            "{name} has a small house in {value}.",
            "If you want to visit {name}, go to {value}.",
            "{name} moved to {value} long ago and stayed.",
        ),
        ("Where does {name} live?", "In which town does {name} live?"),
    ),
    Attribute(
        "job",
        tuple(_JOBS.split()),
        (
            "{name} works as a {value}.",
            "{name} is a {value} by trade.",
            "By trade, {name} is a {value}.",
            "{name} earns a living as a {value}.",
            "Everybody knows {name} as a good {value}.",
        ),
        ("What is the trade of {name}?", "What does {name} work as?"),
    ),
    Attribute(
        "animal",
        tuple(_ANIMALS.split()),
        (
            "{name} keeps a {value}.",
            "{name} has a {value} at home.",
            "The animal of {name} is a {value}.",
            "Every morning {name} feeds a {value}.",
            "{name} never travels without a {value}.",
        ),
        ("Which animal does {name} keep?", "What animal has {name} got?"),
    ),
    Attribute(
        "colour",
        tuple(_COLOURS.split()),
        (
            "{name} likes the colour {value}.",
            "The door of {name} is painted {value}.",
            "{name} always wears {value}.",
            "Of all colours, {name} likes {value} best.",
            "{name} bought a {value} coat.",
        ),
        ("Which colour does {name} like?", "What is the favourite colour of {name}?"),
    ),
    Attribute(
        "instrument",
        tuple(_INSTRUMENTS.split()),
        (
            "{name} plays the {value}.",
            "In the evening {name} plays the {value}.",
            "{name} learned to play the {value} as a child.",
            "You can hear {name} at the {value} on Sundays.",
            "{name} owns an old {value}.",
        ),
        ("Which instrument does {name} play?", "What does {name} play in the evening?"),
    ),
)


@dataclass(frozen=True)
class Person:
    """A person of the world; ``facts[i]`` is the value of ``ATTRIBUTES[i]``."""

    name: str
    pronoun: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about one fact, with its answer and three wrong values of the same kind."""

    text: str
    answer: str
    wrong: tuple[str, str, str]
    attribute: str


@dataclass(frozen=True)
class Problem:
    """An arithmetic problem: the question, the worked solution and its final number."""

    question: str
    solution: str
    answer: int


@cache
def people() -> tuple[Person, ...]:
    """The 160 people of the world, always the same."""
    rng = random.Random(WORLD_SEED)
    she, he, last = _FIRST_SHE.split(), _FIRST_HE.split(), _LAST.split()
    names = [(first, surname) for first in she + he for surname in last]
    chosen = rng.sample(names, PEOPLE)
    return tuple(
        Person(
            f"{first} {surname}",
            "She" if first in she else "He",
            tuple(rng.choice(attribute.values) for attribute in ATTRIBUTES),
        )
        for first, surname in chosen
    )


@cache
def held_out() -> frozenset[tuple[int, int]]:
    """The (person, attribute) pairs whose questions never occur in training text: one in five."""
    rng = random.Random(WORLD_SEED + 1)
    pairs = [(person, attribute) for person in range(PEOPLE) for attribute in range(len(ATTRIBUTES))]
    return frozenset(rng.sample(pairs, len(pairs) // 5))


def _statement(rng: random.Random, person: Person, attribute: int, name: str) -> str:
    template = rng.choice(ATTRIBUTES[attribute].statements)
    return template.format(name=name, value=person.facts[attribute])


def biography(rng: random.Random) -> str:
    """Two to five statements about one person; always by full name, so that each carries its fact."""
    person = rng.choice(people())
    attributes = rng.sample(range(len(ATTRIBUTES)), rng.randint(2, len(ATTRIBUTES)))
    return " ".join(_statement(rng, person, attribute, person.name) for attribute in attributes)


def interview(rng: random.Random) -> str:
    """One to three question-answer pairs, none of them held out."""
    lines: list[str] = []
    for _ in range(rng.randint(1, 3)):
        while True:
            who, what = rng.randrange(PEOPLE), rng.randrange(len(ATTRIBUTES))
            if (who, what) not in held_out():
                break
        person, attribute = people()[who], ATTRIBUTES[what]
        lines.append(
            question_prompt(rng.choice(attribute.questions).format(name=person.name)) + f" {person.facts[what]}"
        )
    return "\n".join(lines)


def question_prompt(text: str) -> str:
    """The form in which the model was taught to be asked."""
    return f"Question: {text}\nAnswer:"


_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_THINGS = "apples coins books stamps shells candles buttons marbles eggs nuts".split()
_GAINS = ("finds", "buys", "gets", "wins")
_LOSSES = ("loses", "sells", "gives away", "breaks")
LARGEST_NUMBER = 99


def problem(rng: random.Random, steps: int) -> Problem:
    """A problem of ``steps`` additions and subtractions whose totals stay within 0..99.

    >>> print(problem(random.Random(1), 1).solution.split(" Answer:")[0].count("="))
    1
    """
    first = rng.choice((_FIRST_SHE + " " + _FIRST_HE).split())
    thing = rng.choice(_THINGS)
    total = rng.randint(1, 60)
    start = rng.randrange(len(_DAYS) - steps + 1)
    question, solution = [f"{first} has {total} {thing}."], []
    for day in _DAYS[start : start + steps]:
        number = rng.randint(1, 20)
        gain = rng.random() < 0.5
        if total + number > LARGEST_NUMBER:
            gain = False
        if total - number < 0:
            gain = True
        after = total + number if gain else total - number
        question.append(f"On {day} {first} {rng.choice(_GAINS if gain else _LOSSES)} {number}.")
        solution.append(f"{day}: {total} {'+' if gain else '-'} {number} = {after}.")
        total = after
    question.append(f"How many {thing} are left?")
    return Problem(" ".join(question), " ".join([*solution, f"Answer: {total}."]), total)


def problem_prompt(item: Problem) -> str:
    """The question as the model was taught to read it; the solution follows on the next line."""
    return f"{item.question}\n"


def arithmetic(rng: random.Random) -> str:
    """A worked problem of one to four steps, most of them four."""
    item = problem(rng, rng.choice((1, 2, 3, 3, 4, 4, 4)))
    return problem_prompt(item) + item.solution


_ROOMS = "kitchen garden cellar attic hall stable library workshop".split()
_OBJECTS = "lamp key letter basket mirror hammer kettle blanket ladder clock bell map".split()
_WEATHER = "rain snow wind fog sunshine frost".split()
_ADJECTIVES = "old new small heavy bright broken dusty wooden strange clean".split()
_FEELINGS = "tired happy hungry curious angry calm cold proud".split()
_SOUNDS = "a bell a dog the wind a cart the rain a song the river footsteps".replace("a ", "a_").replace("the ", "the_")


def story(rng: random.Random) -> str:
    """A short story about two people and a thing that changes rooms; its last sentence says where the thing is."""
    first, second = rng.sample((_FIRST_SHE + " " + _FIRST_HE).split(), 2)
    thing, adjective = rng.choice(_OBJECTS), rng.choice(_ADJECTIVES)
    room = rng.choice(_ROOMS)
    lines = [
        rng.choice(
            (
                f"It was a day of {rng.choice(_WEATHER)} in {rng.choice(_CITIES.split())}.",
                f"{first} woke up early and felt {rng.choice(_FEELINGS)}.",
                f"One {rng.choice(_DAYS)} {first} and {second} were at home.",
            )
        ),
        f"There was {'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {thing} in the {room}.",
    ]
    holder = first
    for _ in range(rng.randint(1, 4)):
        choice = rng.random()
        if choice < 0.45:
            target = rng.choice([name for name in _ROOMS if name != room])
            lines.append(f"{holder} carried the {thing} from the {room} to the {target}.")
            room = target
        elif choice < 0.65:
            other = second if holder == first else first
            lines.append(f"{holder} gave the {thing} to {other}.")
            holder = other
        elif choice < 0.85:
            lines.append(f"From the {room} they heard {rng.choice(_SOUNDS.split()).replace('_', ' ')}.")
        else:
            lines.append(f"{rng.choice((first, second))} was {rng.choice(_FEELINGS)}.")
    lines.append(f"In the end {holder} had the {thing}, and the {thing} was in the {room}.")
    return " ".join(lines)


def counting(rng: random.Random) -> str:
    """A run of numbers, up or down."""
    low = rng.randint(0, LARGEST_NUMBER - 12)
    numbers = [str(low + i) for i in range(rng.randint(5, 12))]
    if rng.random() < 0.5:
        numbers.reverse()
    return f"Count from {numbers[0]} to {numbers[-1]}: {' '.join(numbers)}."


KINDS: tuple[tuple[float, Callable[[random.Random], str]], ...] = (
    (0.24, biography),
    (0.16, interview),
    (0.38, arithmetic),
    (0.19, story),
    (0.03, counting),
)
"""Share of documents of each kind. Arithmetic documents are the longest: about half of the tokens are theirs."""


def documents(seed: int | str) -> Iterator[str]:
    """An endless stream of documents, the same for the same seed."""
    rng = random.Random(f"lmprune-world-{seed}")
    weights = [weight for weight, _ in KINDS]
    writers = [writer for _, writer in KINDS]
    while True:
        yield rng.choices(writers, weights)[0](rng)


def questions(seed: int | str) -> Iterator[Question]:
    """One question for each held-out fact, in seeded order."""
    rng = random.Random(f"lmprune-questions-{seed}")
    pairs = sorted(held_out())
    rng.shuffle(pairs)
    for who, what in pairs:
        person, attribute = people()[who], ATTRIBUTES[what]
        answer = person.facts[what]
        first, second, third = rng.sample([value for value in attribute.values if value != answer], 3)
        yield Question(
            rng.choice(attribute.questions).format(name=person.name), answer, (first, second, third), attribute.name
        )


def problems(seed: int | str, steps: int = 4) -> Iterator[Problem]:
    """An endless stream of problems of ``steps`` steps, by a seed that training never uses."""
    rng = random.Random(f"lmprune-problems-{seed}")
    while True:
        yield problem(rng, steps)
