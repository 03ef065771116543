"""Texts of the composites (data/builders/composites/scenes.py): the names of the things, captions,
and questions with their answers.

Every sentence is true of the scene, and every question has one answer: it names a thing only if no
other thing has that name, and a side only if the side is beyond doubt. The ten answers are equal;
VQAv2 has ten, too, and writes numbers as digits.
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
# name in a sentence -> caption of its glyphs; each is a class
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
NEAR = 0.1  # of the canvas: centers closer than this are on no side of each other


@dataclass(frozen=True)
class Thing:
    name: str
    box: tuple[
        int, int, int, int
    ]  # left, top, right, bottom in pixels; right and bottom are exclusive

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def plural(name: str) -> str:
    """Return the plural of a name: 'mice', 'foxes', 'cherries', 'cars'."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def one(name: str) -> str:
    """Return the name with its article: 'an ant', 'a bee'."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def some(name: str, count: int) -> str:
    """Return the name with its number: 'an ant', 'two bees'."""
    if count == 1:
        return one(name)
    return f"{NUMBERS[count]} {plural(name)}"


def listed(phrases: Sequence[str]) -> str:
    """Join phrases: 'a', 'a and b', 'a, b and c'."""
    *first, last = phrases
    if not first:
        return last
    return f"{', '.join(first)} and {last}"


def side(dx: float, dy: float, near: float) -> str:
    """Return the direction of an offset: left, right, top or bottom.

    '' if the offset is at most `near` long, or its slant is between 1:2 and 2:1.
    """
    if max(abs(dx), abs(dy)) <= near:
        return ""
    slant = abs(dx) / (abs(dy) or 1e-9)
    if 0.5 < slant < 2:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def place(thing: Thing, canvas: int) -> str:
    """Return where on the canvas a thing is: 'middle', a side, or a corner such as 'top left'.

    '' between a corner and a side, where the answer would be disputable.
    """
    x, y = thing.centre
    near = NEAR * canvas
    dx = x - canvas / 2
    dy = y - canvas / 2
    if max(abs(dx), abs(dy)) <= near / 2:
        return "middle"
    if min(abs(dx), abs(dy)) > near:
        vertical = "top" if dy < 0 else "bottom"
        horizontal = "left" if dx < 0 else "right"
        return f"{vertical} {horizontal}"
    return side(dx, dy, near)


def relations(things: Sequence[Thing], canvas: int) -> list[tuple[str, str, str]]:
    """Return (a, side, b), a on that side of b, for every two things of unique names."""
    counts = Counter(t.name for t in things)
    unique = [t for t in things if counts[t.name] == 1]
    triples = []
    for a in unique:
        for b in unique:
            if a == b:
                continue
            dx = a.centre[0] - b.centre[0]
            dy = a.centre[1] - b.centre[1]
            direction = side(dx, dy, NEAR * canvas)
            if direction:
                triples.append((a.name, direction, b.name))
    return triples


def captions(things: Sequence[Thing], canvas: int, rng: np.random.Generator) -> list[str]:
    """Return two to five different sentences about the scene; each names every thing."""
    counts = Counter(t.name for t in things)

    # Lists of all things, in random order.
    sentences = []
    for form in ("{}", "{}", "a picture of {}", "{} in a picture", "we see {}"):
        sentences.append(form.format(listed(shuffled(things, rng))))
    verb = "is" if counts[things[0].name] == 1 else "are"
    sentences.append(f"there {verb} {listed(phrases(counts))}")

    # How two things lie to each other; the other things are listed beside.
    for a, direction, b in relations(things, canvas):
        pair = f"{one(a)} {BESIDE[direction]} {one(b)}"
        others = Counter({name: n for name, n in counts.items() if name not in (a, b)})
        if others:
            rest = listed(phrases(others))
            sentences += [f"{rest}, and {pair}", f"{pair}, and {rest}"]
        else:
            sentences += [pair, pair, f"a picture of {pair}"]

    # Where on the canvas the only thing is.
    where_it_is = place(things[0], canvas)
    if len(things) == 1 and where_it_is:
        at = "in the middle" if where_it_is == "middle" else f"at the {where_it_is}"
        thing = one(things[0].name)
        sentences += [f"{thing} {at}", f"{at} is {thing}"]

    sentences = list(dict.fromkeys(sentences))
    order = rng.permutation(len(sentences))
    count = rng.integers(2, 6)
    return [sentences[i] for i in order[:count]]


def phrases(counts: Counter) -> list[str]:
    """Return a phrase such as 'two bees' for each name."""
    return [some(name, count) for name, count in counts.items()]


def shuffled(things: Sequence[Thing], rng: np.random.Generator) -> list[str]:
    """Return the phrases in random order."""
    names = [things[i].name for i in rng.permutation(len(things))]
    return phrases(Counter(names))


def questions(
    things: Sequence[Thing], canvas: int, names: Sequence[str], rng: np.random.Generator
) -> list[dict]:
    """Return [{question, answers, kind}], one question of each kind that the scene allows.

    kinds: what, where, how many, is there; names: of all classes.
    """
    # Generators: each draws from rng only when its turn comes.
    kinds = {
        "what": what(things, canvas),
        "where": where(things, canvas),
        "how many": how_many(things, names, rng),
        "is there": is_there(things, names, rng),
    }
    rows = []
    for kind, generator in kinds.items():
        candidates = list(generator)
        if candidates:
            question, answer = candidates[rng.integers(len(candidates))]
            rows.append(dict(question=question, answers=[answer] * ANSWERS, kind=kind))
    return rows


def what(things: Sequence[Thing], canvas: int) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) about the names of things."""
    names = list(dict.fromkeys(t.name for t in things))
    if len(things) == 1:
        yield "what is in the picture?", names[0]
    elif len(names) == 1:
        yield "what are these?", plural(names[0])
    if len(things) == len(names) == 2:
        for known, asked in (names, names[::-1]):
            yield f"what is there besides the {known}?", asked

    # A thing on one side of another, if no other thing is on that side, however slightly.
    centers = {t.name: t.centre for t in things}
    for a, direction, b in relations(things, canvas):
        axis = 1 if direction in ("top", "bottom") else 0
        sign = 1 if direction in ("right", "bottom") else -1
        line = centers[b][axis]
        others = [t for t in things if t.name != b]
        beyond = [t for t in others if sign * (t.centre[axis] - line) > 0]
        if len(beyond) == 1:
            yield f"what is {BESIDE[direction]} the {b}?", a


def where(things: Sequence[Thing], canvas: int) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) about where on the canvas, and beside each other, things are."""
    counts = Counter(t.name for t in things)
    for t in things:
        position = place(t, canvas)
        if counts[t.name] == 1 and position:
            yield f"where is the {t.name}?", position
    for a, direction, b in relations(things, canvas):
        yield f"on which side of the {b} is the {a}?", direction


def how_many(
    things: Sequence[Thing], names: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) about numbers of things."""
    counts = Counter(t.name for t in things)
    yield "how many things are there?", str(len(things))
    for name, count in counts.items():
        yield f"how many {plural(name)} are there?", str(count)
    # Numbers above 1 are rarer: twice more, so that they are asked for more often.
    several = [(name, count) for name, count in counts.items() if count > 1]
    for name, count in several * 2:
        yield f"how many {plural(name)} are there?", str(count)
    if rng.random() < 0.2:
        yield f"how many {plural(absent(counts, names, rng))} are there?", "0"


def is_there(
    things: Sequence[Thing], names: Sequence[str], rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """Yield (question, answer): as many 'yes' as 'no'."""
    counts = Counter(t.name for t in things)
    present = things[int(rng.integers(len(things)))].name
    yield f"is there {one(present)}?", "yes"
    yield f"is there {one(absent(counts, names, rng))}?", "no"


def absent(counts: Counter, names: Sequence[str], rng: np.random.Generator) -> str:
    """Return a random name that is not in the scene."""
    missing = [name for name in names if name not in counts]
    return missing[rng.integers(len(missing))]
