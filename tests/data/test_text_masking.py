"""Text masks: which tokens of a caption remain, and their positions.

FLIP's masks keep the pooled token and a share of the context's slots, and return positions.
CLIPA's shorten long captions between the special tokens. Batches contain the positions next to the
ids, and the text tower computes with them as it does on those tokens of a complete caption.

    bash run/test.sh tests/data/test_text_masking.py
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from glimpse.data.loader import DataConfig, SampleReader
from glimpse.data.shards import Sample
from glimpse.data.text_masking import (
    STRATEGIES,
    BlockTextMask,
    CaptionFormat,
    FirstTextMask,
    PrioritizedTextMask,
    RandomTextMask,
    ShuffledTextMask,
    parse_text_mask,
)
from glimpse.data.tokenizer import pack, train_sentencepiece
from glimpse.data.transforms import View
from glimpse.model.init import WeightInit
from glimpse.model.text import TextConfig, TextTower
from glimpse.tests.helpers.tiny import NAMES, picture

CONTEXT, PAD = 16, 0


def make_caption(length, padded=False):
    """Ids 100, 101, ..., which show their positions; padded: up to the context."""
    ids = list(range(100, 100 + length))
    if padded:
        ids += [PAD] * (CONTEXT - length)
    return ids


parse_cached = cache(parse_text_mask)


def apply_mask(spec, length, *, padded=False, pooled=-1, start=1, end=1, seed=0):
    """Return the (ids, positions) that remain; seed: of a generator, or the generator."""
    ids = make_caption(length, padded)
    caption_format = CaptionFormat(CONTEXT, start, end, pooled)

    result = parse_cached(spec)(ids, length, caption_format, np.random.default_rng(seed))

    assert ids == make_caption(length, padded), "the caption is not modified"
    return result


# ---- FLIP's


@pytest.mark.parametrize("pooled, padded", [(0, False), (-1, False), (0, True)])
@pytest.mark.parametrize("ratio, slots", [(0, 16), (0.5, 8), (0.7, 4), (0.99, 1)])
@pytest.mark.parametrize("name", ["random", "prioritised"])
def test_what_stays_of_a_caption(name, ratio, slots, pooled, padded):
    for length in range(1, CONTEXT + 1):
        original = make_caption(length, padded)
        pooled_position = 0 if pooled == 0 else len(original) - 1
        for seed in range(10):
            ids, positions = apply_mask(
                f"{name}({ratio})", length, padded=padded, pooled=pooled, seed=seed
            )

            assert all(a < b for a, b in pairwise(positions))
            assert ids == [original[position] for position in positions]
            assert pooled_position in positions, "the pooled token"
            if name == "prioritised" or padded:
                assert len(ids) == min(len(original), slots)
            else:
                assert len(ids) <= slots
            if name == "prioritised":
                tokens = sum(position < length for position in positions)
                assert tokens == min(length, slots), "padding is hidden first"


@pytest.mark.parametrize(
    "context, ratio, slots",
    [(32, 0.5, 16), (32, 0.75, 8), (77, 0.5, 38), (20, 0.9, 2), (4, 0.9, 1)],
)
def test_number_of_slots(context, ratio, slots):
    ids = list(range(context))
    caption_format = CaptionFormat(context, 1, 1, -1)
    for mask in (RandomTextMask(ratio), PrioritizedTextMask(ratio)):
        remaining, _ = mask(ids, context, caption_format, np.random.default_rng(0))

        assert len(remaining) == slots


@pytest.mark.parametrize(
    "name, length, padded, pooled, rates",
    [
        # 8 of 16 slots stay, one of them with the pooled token.
        ("random", 16, False, -1, [7 / 15] * 15 + [1]),
        ("random", 16, False, 0, [1] + [7 / 15] * 15),
        # A short caption loses the same share.
        ("random", 6, False, -1, [7 / 15] * 5 + [1]),
        ("random", 6, True, 0, [1] + [7 / 15] * 15),
        ("prioritised", 16, False, -1, [7 / 15] * 15 + [1]),
        ("prioritised", 12, False, 0, [1] + [7 / 11] * 11),
        ("prioritised", 12, True, 0, [1] + [7 / 11] * 11 + [0] * 4),
        ("prioritised", 6, True, 0, [1] * 6 + [2 / 10] * 10),
    ],
)
def test_keep_rates(name, length, padded, pooled, rates):
    rng = np.random.default_rng(0)
    draws = 3000
    counts = np.zeros(CONTEXT if padded else length)
    for _ in range(draws):
        _, positions = apply_mask(f"{name}(0.5)", length, padded=padded, pooled=pooled, seed=rng)
        counts[positions] += 1

    np.testing.assert_allclose(counts / draws, rates, atol=0.03)


# ---- CLIPA's


@pytest.mark.parametrize("start, end", [(1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["first", "block", "shuffled"])
def test_only_a_long_caption_is_cut(name, padded, start, end):
    for length in range(1, CONTEXT + 1):
        original = make_caption(length, padded)
        for seed in range(5):
            ids, positions = apply_mask(
                f"{name}(8)", length, padded=padded, start=start, end=end, seed=seed
            )

            assert positions is None
            assert len(ids) == min(len(original), 8)
            if length <= 8:
                assert ids == original[:8], "a short one loses only padding"
                continue
            assert ids[:start] == original[:start], "special tokens stay at the beginning"
            assert ids[8 - end :] == original[length - end : length], (
                "special tokens stay at the end"
            )
            words = ids[start : 8 - end]
            assert len(set(words)) == len(words)
            assert set(words) <= set(original[start : length - end])


def remaining_words(spec, length, draws):
    """Return the old positions of the remaining words, (draws, 6), in their new order.

    length: of the caption.
    """
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(draws):
        ids, _ = apply_mask(spec, length, seed=rng)
        rows.append(ids[1:-1])
    return np.array(rows) - 100


def test_first_keeps_the_first_words():
    assert (remaining_words("first(8)", 14, 20) == [1, 2, 3, 4, 5, 6]).all()


def test_block_keeps_words_in_a_row_from_any_place():
    positions = remaining_words("block(8)", 14, 4000)

    assert (np.diff(positions, axis=1) == 1).all()
    # 12 words, 7 blocks of 6
    first = np.bincount(positions[:, 0]) / 4000
    np.testing.assert_allclose(first, [0] + [1 / 7] * 7, atol=0.02)


def test_shuffled_keeps_any_words_in_any_order():
    positions = remaining_words("shuffled(8)", 14, 4000)

    rates = np.bincount(positions.flatten()) / 4000
    np.testing.assert_allclose(rates, [0] + [6 / 12] * 12, atol=0.03)
    for column in range(6):
        rates = np.bincount(positions[:, column]) / 4000
        np.testing.assert_allclose(rates, [0] + [1 / 12] * 12, atol=0.02)
    ascending = (np.diff(positions, axis=1) > 0).mean(0)
    np.testing.assert_allclose(ascending, [0.5] * 5, atol=0.03)


# ---- all strategies

SPECS = {
    "random": "random(0.5)",
    "prioritised": "prioritised(0.5)",
    "first": "first(8)",
    "block": "block(8)",
    "shuffled": "shuffled(8)",
}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_the_generator_decides(name):
    results = [apply_mask(SPECS[name], CONTEXT, seed=seed) for seed in range(20)]
    again = [apply_mask(SPECS[name], CONTEXT, seed=seed) for seed in range(20)]

    assert results == again
    distinct = len({tuple(ids) for ids, _ in results})
    if name == "first":
        assert distinct == 1
    else:
        assert distinct > 5


def test_parse_reads_what_a_config_writes():
    assert parse_text_mask("none") is None
    assert parse_text_mask("random(0.5)") == RandomTextMask(0.5)
    assert parse_text_mask("random(ratio=0.5)") == RandomTextMask(0.5)
    assert parse_text_mask("random(0.5)") != RandomTextMask(0.25)
    assert parse_text_mask("prioritised(0.25)") == PrioritizedTextMask(0.25)
    assert parse_text_mask("first(16)") == FirstTextMask(16)
    assert parse_text_mask("block(16)") == BlockTextMask(16)
    assert parse_text_mask("shuffled(16)") == ShuffledTextMask(tokens=16)


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "random(1.0)",
            r"ratio is 1.0; it must be in \[0, 1\): the share of the context's slots to hide;"
            r" random takes \(ratio: float\)",
        ),
        ("prioritised(-0.5)", r"ratio is -0.5; it must be in \[0, 1\)"),
        ("random(True)", "ratio is True; it must be in"),
        ("random('a')", "ratio is 'a'; it must be in"),
        ("prioritised", "missing a required argument: 'ratio'; prioritised takes"),
        (
            "first(2)",
            r"tokens is 2; it must be an integer of at least 3: the number of tokens to keep,"
            r" special tokens included; first takes \(tokens: int\)",
        ),
        ("block(8.0)", "tokens is 8.0; it must be an integer of at least 3"),
        ("shuffled(True)", "tokens is True; it must be an integer of at least 3"),
        ("first(8, 9)", "too many positional"),
        (
            "prioritized(0.5)",
            "strategy 'prioritized'; known: block, first, none, prioritised, random, shuffled;"
            " did you mean 'prioritised'",
        ),
        ("none(0.5)", "none takes no arguments"),
        ("first(8", r"cannot be read; write it as none, prioritised\(0.5\) or first\(16\)"),
    ],
)
def test_parse_refuses(spec, message):
    def in_config(text_mask):
        return DataConfig(train=("x",), tokenizer="clip_bpe", context=32, text_mask=text_mask)

    for parse in (parse_text_mask, in_config):
        with pytest.raises(ValueError, match=message) as error:
            parse(spec)

        assert str(error.value).startswith(f"data.text_mask {spec!r}")


# ---- through the reader


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    train_sentencepiece([f"a {name}" for name in NAMES], path, 300)
    return f"sentencepiece({path})"


def read_text(tokenizer, text_mask, *, pool="first", epoch=0, pad_text=False):
    """Return the text of a batch of captions, and the tokens of each caption without a mask."""
    cfg = DataConfig(
        train=("x",), tokenizer=tokenizer, context=CONTEXT, text_mask=text_mask, pad_text=pad_text
    )
    reader = SampleReader(cfg, {"image": View()}, image_size=8, patch=8, seed=0, pool=pool)
    image = picture("red circle", np.random.default_rng(0))
    captions = [" ".join(NAMES[:n]) for n in (1, 2, 9)] + ["", "a purple square"]
    samples = []
    for i, text in enumerate(captions):
        sample = Sample("s", str(i), {"png": image, "txt": text.encode()})
        samples.append(reader.prepare(sample, epoch, i))
    return reader.collate(samples, [])["text"], [reader.tokenizer(text) for text in captions]


@pytest.mark.parametrize("pool", ["first", "eot"])
@pytest.mark.parametrize("text_mask", ["random(0.5)", "prioritised(0.75)"])
def test_batches_contain_positions(tokenizer, text_mask, pool):
    text, original = read_text(tokenizer, text_mask, pool=pool)

    assert text["positions"].dtype == text["ids"].dtype == torch.int32
    assert text["longest"] == text["lengths"].max() <= 8
    lengths = text["lengths"].tolist()
    assert any(length < len(ids) for length, ids in zip(lengths, original))
    rows = text["ids"].split(lengths)
    all_positions = text["positions"].split(lengths)
    for ids, positions, original_ids in zip(rows, all_positions, original, strict=True):
        assert ids.tolist() == [original_ids[position] for position in positions]
        if pool == "first":
            assert positions[0] == 0
        else:
            assert positions[-1] == len(original_ids) - 1

    again, _ = read_text(tokenizer, text_mask, pool=pool, epoch=0)
    other, _ = read_text(tokenizer, text_mask, pool=pool, epoch=1)
    assert torch.equal(again["positions"], text["positions"])
    assert other["positions"].tolist() != text["positions"].tolist()


def test_a_cut_that_cuts_nothing_is_refused():
    with pytest.raises(
        ValueError,
        match=r"data.text_mask: first\(32\) cuts nothing from captions of at most data.context 32"
        r" tokens; use a number below 32",
    ):
        DataConfig(train=("x",), tokenizer="clip_bpe", context=32, text_mask="first(32)")


@pytest.mark.parametrize("text_mask", ["none", "first(5)", "block(5)", "shuffled(5)"])
def test_no_positions_if_tokens_are_renumbered(tokenizer, text_mask):
    text, original = read_text(tokenizer, text_mask)

    assert sorted(text) == ["ids", "lengths", "longest"]
    if text_mask == "none":
        assert text["lengths"].tolist() == [len(ids) for ids in original]
        assert text["ids"].tolist() == sum(original, [])
    else:
        assert text["lengths"].tolist() == [min(len(ids), 5) for ids in original]


def test_a_padded_caption_loses_padding_first(tokenizer):
    text, original = read_text(tokenizer, "prioritised(0.5)", pad_text=True)

    assert text["lengths"].tolist() == [8] * 5
    for positions, ids in zip(text["positions"].view(5, 8).tolist(), original):
        assert sum(position < len(ids) for position in positions) == min(8, len(ids))


# ---- through the tower


def make_tower(pool):
    torch.manual_seed(0)
    init = WeightInit(token=1.0, positions=1.0)  # large, so that a wrong position has an effect
    return TextTower(
        TextConfig(pool=pool), vocab=120, context=CONTEXT, width=32, depth=3, heads=4, init=init
    )


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("pool", ["first", "eot"])
@torch.no_grad()
def test_the_tower_uses_the_positions(pool, ratio):
    text = make_tower(pool)
    pooled = 0 if pool == "first" else -1
    caption_lengths = (3, 16, 1, 9)
    rows = [
        apply_mask(f"random({ratio})", length, pooled=pooled, seed=length)
        for length in caption_lengths
    ]
    packed, lengths = pack([ids for ids, _ in rows])
    positions, _ = pack([positions for _, positions in rows])

    outputs = text(packed, lengths, int(lengths.max()), positions)

    for output, (ids, row_positions) in zip(outputs, rows):
        x = text.token(torch.tensor(ids)) + text.positions[row_positions]
        expected = text.norm(text.blocks(x[None]))[0, pooled]
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)

    without_positions = text(packed, lengths, int(lengths.max()))
    if ratio == 0:
        assert torch.equal(outputs, without_positions)
        original = text(*pack([make_caption(length) for length in caption_lengths]))
        torch.testing.assert_close(outputs, original)
    else:
        assert not torch.equal(outputs, without_positions), (
            "without positions, tokens are numbered from 0"
        )
