"""What composites (data/builders/composites/scenes.py) show and say: the names of the things,
captions, and
questions with their answers.

Every sentence is true of the scene, and every question has one answer: a thing is asked for by name
only where it is the only one of
that name, a side only where it is beyond doubt. Answers are ten equal ones, as VQAv2 has ten;
numbers are digits, as there.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_SAME = """
airplane ambulance ant avocado backpack balloon banana bat bear bed bicycle bird bus butterfly
cactus camel camera candle carrot castle cat church cloud cookie cow crab crocodile croissant
crown cucumber deer dog dolphin door doughnut drum duck eagle eggplant elephant fox goat guitar
hamburger hammer helicopter horse house key laptop lemon lion lizard microscope motorcycle mouse
octopus owl panda peach pear pencil penguin pig pineapple pizza potato rabbit ring robot rocket
rooster rose sailboat scorpion shark ship skull snail snake snowman spider star strawberry
sunflower telephone tent tiger toilet tomato tractor train trumpet tulip turtle umbrella violin
watch whale
""".split()
_OTHER = {
    "apple": "green apple",
    "bee": "honeybee",
    "book": "closed book",
    "cake": "birthday cake",
    "car": "automobile",
    "fish": "tropical fish",
    "hot dog": "hot dog",
    "ladybug": "lady beetle",
    "light bulb": "light bulb",
    "moon": "crescent moon",
    "palm tree": "palm tree",
    "tree": "deciduous tree",
    "truck": "delivery truck",
}
# name in a sentence -> caption of its glyphs; a class a row
CONCEPTS = dict(sorted(({name: name for name in _SAME} | _OTHER).items()))
TEMPLATES = ("{c}", "a {c}", "a picture of a {c}", "there is a {c}")
PLURALS = {
    "mouse": "mice",
    "snowman": "snowmen",
    "deer": "deer",
    "fish": "fish",
    "tomato": "tomatoes",
    "potato": "potatoes",
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
BESIDE = {"left": "to the left of", "right": "to the right of", "top": "above", "bottom": "below"}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
ANSWERS = 10
NEAR = 0.1  # of the canvas: centres closer than this are on no side of each other


@dataclass(frozen=True)
class Thing:
    name: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels, the ends outside

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def plural(name: str) -> str:
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def one(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def some(name: str, count: int) -> str:
    return one(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def listed(phrases: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'"""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def side(dx: float, dy: float, near: float) -> str:
    """Where an offset points: left, right, top, bottom; '' where it is short, or slanting."""
    if max(abs(dx), abs(dy)) <= near or 0.5 < abs(dx) / (abs(dy) or 1e-9) < 2:
        return ""
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")


def place(thing: Thing, canvas: int) -> str:
    """Where on the canvas: 'middle', a side, or a corner such as 'top left'; '' between a corner
    and a side, where one could quarrel.
    """
    (x, y), near = thing.centre, NEAR * canvas
    dx, dy = x - canvas / 2, y - canvas / 2
    if max(abs(dx), abs(dy)) <= near / 2:
        return "middle"
    if min(abs(dx), abs(dy)) > near:
        return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
    return side(dx, dy, near)


def relations(things: Sequence[Thing], canvas: int) -> list[tuple[str, str, str]]:
    """(a, side, b) for every two things whose names are theirs alone: a is on that side of b."""
    counts = Counter(t.name for t in things)
    alone = [t for t in things if counts[t.name] == 1]
    pairs = [
        (a, b, side(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1], NEAR * canvas))
        for a in alone
        for b in alone
        if a != b
    ]
    return [(a.name, where, b.name) for a, b, where in pairs if where]


def captions(things: Sequence[Thing], canvas: int, rng: np.random.Generator) -> list[str]:
    """Two to five different sentences about the scene; each names every thing."""
    counts = Counter(t.name for t in things)
    found = [
        form.format(listed(shuffled(things, rng)))
        for form in ("{}", "{}", "a picture of {}", "{} in a picture", "we see {}")
    ]
    found.append(
        f"there {'is' if counts[things[0].name] == 1 else 'are'} {listed(phrases(counts))}"
    )
    for a, where, b in relations(things, canvas):
        rest = (
            listed(phrases(Counter({n: c for n, c in counts.items() if n not in (a, b)})))
            if len(counts) > 2
            else ""
        )
        pair = f"{one(a)} {BESIDE[where]} {one(b)}"
        found += (
            [f"{rest}, and {pair}", f"{pair}, and {rest}"]
            if rest
            else [pair, pair, f"a picture of {pair}"]
        )
    if len(things) == 1 and (where := place(things[0], canvas)):
        at = "in the middle" if where == "middle" else f"at the {where}"
        found += [f"{one(things[0].name)} {at}", f"{at} is {one(things[0].name)}"]
    found = list(dict.fromkeys(found))
    return [found[i] for i in rng.permutation(len(found))[: rng.integers(2, 6)]]


def phrases(counts: Counter) -> list[str]:
    return [some(name, count) for name, count in counts.items()]


def shuffled(things: Sequence[Thing], rng: np.random.Generator) -> list[str]:
    return phrases(Counter(things[i].name for i in rng.permutation(len(things))))


def questions(
    things: Sequence[Thing], canvas: int, names: Sequence[str], rng: np.random.Generator
) -> list[dict]:
    """[{question, answers, kind}]: one of each kind (what, where, how many, is there) that the
    scene allows; names: of all classes.
    """
    kinds = {
        "what": what(things, canvas),
        "where": where(things, canvas),
        "how many": how_many(things, names, rng),
        "is there": is_there(things, names, rng),
    }
    rows = []
    for kind, asked in kinds.items():
        if asked := list(asked):
            question, answer = asked[rng.integers(len(asked))]
            rows.append(dict(question=question, answers=[answer] * ANSWERS, kind=kind))
    return rows


def what(things: Sequence[Thing], canvas: int) -> Iterator[tuple[str, str]]:
    names = list(dict.fromkeys(t.name for t in things))
    if len(things) == 1:
        yield "what is in the picture?", names[0]
    elif len(names) == 1:
        yield "what are these?", plural(names[0])
    if len(things) == len(names) == 2:
        yield from ((f"what is there besides the {a}?", b) for a, b in (names, names[::-1]))
    centres = {t.name: t.centre for t in things}
    for a, where, b in relations(things, canvas):
        axis, sign = int(where in ("top", "bottom")), 1 if where in ("right", "bottom") else -1
        beyond = [
            t for t in things if t.name != b and sign * (t.centre[axis] - centres[b][axis]) > 0
        ]
        if len(beyond) == 1:  # a is the only thing on that side, however slightly
            yield f"what is {BESIDE[where]} the {b}?", a


def where(things: Sequence[Thing], canvas: int) -> Iterator[tuple[str, str]]:
    counts = Counter(t.name for t in things)
    yield from (
        (f"where is the {t.name}?", place(t, canvas))
        for t in things
        if counts[t.name] == 1 and place(t, canvas)
    )
    yield from (
        (f"on which side of the {b} is the {a}?", where)
        for a, where, b in relations(things, canvas)
    )


def how_many(
    things: Sequence[Thing], names: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    counts = Counter(t.name for t in things)
    yield "how many things are there?", str(len(things))
    yield from (
        (f"how many {plural(name)} are there?", str(count)) for name, count in counts.items()
    )
    # they are rarer
    yield from [
        (f"how many {plural(name)} are there?", str(count))
        for name, count in counts.items()
        if count > 1
    ] * 2
    if rng.random() < 0.2:
        yield f"how many {plural(absent(counts, names, rng))} are there?", "0"


def is_there(
    things: Sequence[Thing], names: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """As many 'yes' as 'no'."""
    counts = Counter(t.name for t in things)
    yield f"is there {one(things[rng.integers(len(things))].name)}?", "yes"
    yield f"is there {one(absent(counts, names, rng))}?", "no"


def absent(counts: Counter, names: Sequence[str], rng: np.random.Generator) -> str:
    missing = [name for name in names if name not in counts]
    return missing[rng.integers(len(missing))]
