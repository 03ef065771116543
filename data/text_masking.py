"""Text masks: which tokens of a caption the text tower sees; FLIP's ablation (arXiv 2212.00794,
section 3 and table 1c) and CLIPA's (2305.07017).

    mask = parse("prioritised(0.5)")                  as a config writes it, under data.text_mask
    ids, places = mask(ids, real, caption, rng)

FLIP drops tokens that have their positions already, so the places of those that stay travel with
them. CLIPA cuts captions that are too long, and numbers their tokens anew (places None). A mask is
a function of the caption and of a random generator alone.

To add one: a class here, decorated with @strategy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glimpse.data.spec import build_strategy

STRATEGIES: dict[str, type["TextMask"]] = {}


@dataclass(frozen=True)
class CaptionFormat:
    """The properties that all captions of a run share.

    FLIP's masks always keep the pooled token; CLIPA's keep the special tokens, of which it is one
    unless a vocabulary has none.
    """

    context: int
    start: int  # special tokens before the words
    end: int  # special tokens after the words
    pooled: int  # the index of the pooled token: 0, the first, or -1, the last


def strategy(name: str) -> Callable[[type["TextMask"]], type["TextMask"]]:
    def register(cls: type["TextMask"]) -> type["TextMask"]:
        STRATEGIES[name] = dataclass(frozen=True)(cls)
        return STRATEGIES[name]

    return register


class TextMask(ABC):
    @abstractmethod
    def __call__(
        self, ids: list[int], real: int, caption: CaptionFormat, rng: np.random.Generator
    ) -> tuple[list[int], list[int] | None]:
        """ids of a caption, of which the first `real` are no padding -> those that stay, in order,
        and their places (None: 0, 1, ...).
        """


@dataclass(frozen=True)
class RatioMask(TextMask):
    """Hide a share of the context's slots (FLIP)."""

    ratio: float

    def __post_init__(self):
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio is {self.ratio!r}; it must be in [0, 1): the share of the context's slots"
                " to hide"
            )

    @abstractmethod
    def rank(self, noise: np.ndarray, real: int) -> np.ndarray:
        """Scores (context,) of the slots; the smallest stay."""

    def __call__(self, ids, real, caption, rng):
        score = self.rank(rng.random(caption.context), real)
        pooled = 0 if caption.pooled == 0 else len(ids) - 1
        score[pooled] = -1  # always stays
        count = max(1, int(round(caption.context * (1 - self.ratio), 6)))
        slots = np.sort(np.argsort(score, kind="stable")[:count])
        places = [int(slot) for slot in slots if slot < len(ids)]
        return [ids[place] for place in places], places


@strategy("random")
class RandomTextMask(RatioMask):
    """Every slot, empty ones too, is as likely to stay as any other."""

    def rank(self, noise, real):
        return noise


@strategy("prioritised")
class PrioritizedTextMask(RatioMask):
    """Padding goes first: tokens are lost only where there are more than slots."""

    def rank(self, noise, real):
        return noise + (np.arange(len(noise)) >= real)


@dataclass(frozen=True)
class LengthMask(TextMask):
    """Cut a caption of more than `tokens` tokens, between its special ones (CLIPA)."""

    tokens: int

    def __post_init__(self):
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 3:
            raise ValueError(
                f"tokens is {self.tokens!r}; it must be 3 or more: how many stay, special ones"
                " included"
            )

    @abstractmethod
    def choose(self, words: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices (count,) of the words that stay."""

    def __call__(self, ids, real, caption, rng):
        count = self.tokens - caption.start - caption.end
        words = ids[caption.start : real - caption.end]
        if len(words) <= count:
            return ids[: max(real, self.tokens)], None
        chosen = [words[i] for i in self.choose(len(words), count, rng)]
        return ids[: caption.start] + chosen + ids[real - caption.end : real], None


@strategy("first")
class FirstTextMask(LengthMask):
    """The first words stay."""

    def choose(self, words, count, rng):
        return np.arange(count)


@strategy("block")
class BlockTextMask(LengthMask):
    """Words in a row stay, from a random one on."""

    def choose(self, words, count, rng):
        return int(rng.integers(words - count + 1)) + np.arange(count)


@strategy("shuffled")
class ShuffledTextMask(LengthMask):
    """Words drawn at random stay, in random order."""

    def choose(self, words, count, rng):
        return rng.permutation(words)[:count]


def parse_text_mask(spec: str) -> TextMask | None:
    """'prioritised(0.5)' -> Prioritised(0.5); 'none' -> None."""
    if spec == "none":
        return None
    form = "prioritised(0.5) or first(16)"
    return build_strategy(spec, STRATEGIES, "data.text_mask", form)
