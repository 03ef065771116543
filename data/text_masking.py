"""Masks of captions: the tokens that the text tower sees.

Two families of strategies: FLIP's ablation (arXiv 2212.00794, section 3 and table 1c) and CLIPA's
(arXiv 2305.07017).

    mask = parse_text_mask("prioritised(0.5)")         as written in a config, data.text_mask
    ids, positions = mask(ids, length, caption, rng)

FLIP drops tokens after they have got their position embeddings, so its masks also return the
positions of the remaining tokens. CLIPA shortens the caption first and numbers the remaining
tokens 0, 1, ...; its masks return None for the positions.

A mask is a function of the caption and of a random generator only. The loader seeds the generator
with (seed, epoch, sample), so masks do not depend on ranks, workers or resuming.

To add a strategy, write a class here and decorate it with @strategy("name").
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from glimpse.data.spec import build_strategy

STRATEGIES: dict[str, type["TextMask"]] = {}


@dataclass(frozen=True)
class CaptionFormat:
    """Properties that all captions of a run share.

    FLIP's masks always keep the token that the text tower pools. CLIPA's keep the special tokens;
    the pooled token is one of them, unless the vocabulary has none.
    """

    context: int  # maximum number of tokens
    start: int  # number of special tokens before the words
    end: int  # number of special tokens after the words
    pooled: int  # index of the pooled token: 0 (the first) or -1 (the last)


def strategy(name: str) -> Callable[[type["TextMask"]], type["TextMask"]]:
    """Register a mask under the name that configs use, and make it a frozen dataclass."""

    def register(cls: type["TextMask"]) -> type["TextMask"]:
        STRATEGIES[name] = dataclass(frozen=True)(cls)
        return STRATEGIES[name]

    return register


class TextMask(ABC):
    """Base class of the strategies; the fields are the arguments in a config."""

    @abstractmethod
    def __call__(
        self, ids: list[int], length: int, caption: CaptionFormat, rng: np.random.Generator
    ) -> tuple[list[int], list[int] | None]:
        """Return the ids of the remaining tokens, in order, and their positions.

        length: number of ids before the padding. Positions None stand for 0, 1, ...
        """


@dataclass(frozen=True)
class RatioMask(TextMask):
    """Hide a share of the context's slots (FLIP).

    A slot is a position from 0 to context - 1; slots behind the end of the caption are empty.
    """

    ratio: float

    def __post_init__(self):
        is_number = isinstance(self.ratio, int | float) and not isinstance(self.ratio, bool)
        if not is_number or not 0 <= self.ratio < 1:
            raise ValueError(
                f"ratio is {self.ratio!r}; it must be in [0, 1): the share of the context's slots"
                " to hide"
            )

    @abstractmethod
    def score(self, noise: np.ndarray, length: int) -> np.ndarray:
        """Return a score for each slot (context,); the slots with the lowest scores stay."""

    def __call__(self, ids, length, caption, rng):
        # One random number for each slot, even an empty one: captions of any length use the
        # generator equally.
        scores = self.score(rng.random(caption.context), length)
        pooled = 0 if caption.pooled == 0 else len(ids) - 1
        scores[pooled] = -1  # below all others: the pooled token always stays

        # The number of slots is that of the context. Slots that turn out empty hold no token, so
        # fewer tokens may remain. round() first, since 10 * (1 - 0.9) is 0.9999999999999998.
        count = max(1, int(round(caption.context * (1 - self.ratio), 6)))
        slots = np.sort(np.argsort(scores, kind="stable")[:count])
        positions = [int(slot) for slot in slots if slot < len(ids)]
        return [ids[position] for position in positions], positions


@strategy("random")
class RandomTextMask(RatioMask):
    """Keep every slot, also an empty one, with equal probability."""

    def score(self, noise, length):
        return noise


@strategy("prioritised")
class PrioritizedTextMask(RatioMask):
    """Hide empty and padding slots first.

    Tokens are lost only if there are more of them than remaining slots.
    """

    def score(self, noise, length):
        is_empty = np.arange(len(noise)) >= length
        return noise + is_empty


@dataclass(frozen=True)
class LengthMask(TextMask):
    """Shorten captions of more than `tokens` tokens; the special tokens stay (CLIPA)."""

    tokens: int

    def __post_init__(self):
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 3:
            raise ValueError(
                f"tokens is {self.tokens!r}; it must be an integer of at least 3: the number of"
                " tokens to keep, special tokens included"
            )

    @abstractmethod
    def choose(self, words: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Return the indices (count,) of the words to keep, of `words` words."""

    def __call__(self, ids, length, caption, rng):
        count = self.tokens - caption.start - caption.end
        words = ids[caption.start : length - caption.end]
        if len(words) <= count:
            # Short enough. Of the padding, only what fits into `tokens` remains.
            return ids[: max(length, self.tokens)], None
        remaining = [words[i] for i in self.choose(len(words), count, rng)]
        return ids[: caption.start] + remaining + ids[length - caption.end : length], None


@strategy("first")
class FirstTextMask(LengthMask):
    """Keep the first words."""

    def choose(self, words, count, rng):
        return np.arange(count)


@strategy("block")
class BlockTextMask(LengthMask):
    """Keep consecutive words, starting at a random one."""

    def choose(self, words, count, rng):
        return int(rng.integers(words - count + 1)) + np.arange(count)


@strategy("shuffled")
class ShuffledTextMask(LengthMask):
    """Keep random words, in random order."""

    def choose(self, words, count, rng):
        return rng.permutation(words)[:count]


def parse_text_mask(spec: str) -> TextMask | None:
    """Parse a text mask as written in a config, 'prioritised(0.5)'; 'none' -> None.

    Raise ValueError if the text is not a text mask.
    """
    if spec == "none":
        return None
    form = "prioritised(0.5) or first(16)"
    return build_strategy(spec, STRATEGIES, "data.text_mask", form)
