"""Which tokens of a caption the text tower sees: FLIP's ablation (arXiv 2212.00794, section 3 and
table 1c) and CLIPA's (2305.07017).

    mask = parse("prioritised(0.5)")                  # as a config writes it, under data.text_mask
    ids, places = mask(ids, real, caption, rng)

FLIP drops tokens that have their positions already, so the places of those that stay travel with
them. CLIPA cuts the ids of captions
that are too long, and numbers them anew (places None). A mask is a function of the caption and of a
random generator alone.
To add one: a class here, decorated with @strategy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glimpse.data.masking import named

STRATEGIES: dict[str, type["TextMask"]] = {}


@dataclass(frozen=True)
class Caption:
    """What a mask must know of all captions: the context, how many special tokens stand around one,
    the index of the pooled token.

    FLIP's masks keep that one always; CLIPA's keep the special tokens, which it is unless a
    vocabulary has none.
    """

    context: int
    start: int
    end: int
    pooled: int  # 0, the first, or -1, the last


def strategy(name: str) -> Callable[[type["TextMask"]], type["TextMask"]]:
    def register(cls: type["TextMask"]) -> type["TextMask"]:
        STRATEGIES[name] = dataclass(frozen=True)(cls)
        return STRATEGIES[name]

    return register


class TextMask(ABC):
    @abstractmethod
    def __call__(
        self, ids: list[int], real: int, caption: Caption, rng: np.random.Generator
    ) -> tuple[list[int], list[int] | None]:
        """ids of a caption, of which the first `real` are no padding -> those that stay, in order,
        and their places (None: 0, 1, ...).
        """


@dataclass(frozen=True)
class Dropped(TextMask):
    """FLIP's: of the slots of the context a share is hidden."""

    ratio: float

    def __post_init__(self):
        if (
            isinstance(self.ratio, bool)
            or not isinstance(self.ratio, int | float)
            or not 0 <= self.ratio < 1
        ):
            raise ValueError(
                f"ratio is {self.ratio!r}; it must be in [0, 1): the share of the context's slots"
                " to hide"
            )

    @abstractmethod
    def rank(self, noise: np.ndarray, real: int) -> np.ndarray:
        """(context,), the smallest stay."""

    def __call__(self, ids, real, caption, rng):
        score = self.rank(rng.random(caption.context), real)
        score[0 if caption.pooled == 0 else len(ids) - 1] = -1
        count = max(1, int(round(caption.context * (1 - self.ratio), 6)))
        places = [int(i) for i in np.sort(np.argsort(score, kind="stable")[:count]) if i < len(ids)]
        return [ids[i] for i in places], places


@strategy("random")
class Random(Dropped):
    """Every slot, empty ones too, is as likely to stay as any other."""

    def rank(self, noise, real):
        return noise


@strategy("prioritised")
class Prioritised(Dropped):
    """Padding goes first: tokens are lost only where there are more than slots."""

    def rank(self, noise, real):
        return noise + (np.arange(len(noise)) >= real)


@dataclass(frozen=True)
class Cut(TextMask):
    """CLIPA's: a caption of more than so many tokens loses some between its special ones."""

    tokens: int

    def __post_init__(self):
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 3:
            raise ValueError(
                f"tokens is {self.tokens!r}; it must be 3 or more: how many stay, special ones"
                " included"
            )

    @abstractmethod
    def choose(self, words: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """(count,) indices into so many words."""

    def __call__(self, ids, real, caption, rng):
        count = self.tokens - caption.start - caption.end
        words = ids[caption.start : real - caption.end]
        if len(words) <= count:
            return ids[: max(real, self.tokens)], None
        return [
            *ids[: caption.start],
            *(words[i] for i in self.choose(len(words), count, rng)),
            *ids[real - caption.end : real],
        ], None


@strategy("first")
class First(Cut):
    """The first words stay."""

    def choose(self, words, count, rng):
        return np.arange(count)


@strategy("block")
class Block(Cut):
    """Words in a row stay, from a random one on."""

    def choose(self, words, count, rng):
        return int(rng.integers(words - count + 1)) + np.arange(count)


@strategy("shuffled")
class Shuffled(Cut):
    """Words drawn at random stay, in random order."""

    def choose(self, words, count, rng):
        return rng.permutation(words)[:count]


def parse(spec: str) -> TextMask | None:
    """'prioritised(0.5)' -> Prioritised(0.5); 'none' -> None."""
    return (
        None
        if spec == "none"
        else named(spec, STRATEGIES, "data.text_mask", "prioritised(0.5) or first(16)")
    )
