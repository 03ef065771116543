"""Which tokens of a caption stay: FLIP's masks keep the pooled token and so many slots, and tell
the places; CLIPA's cut what is too long, between the special tokens. The places travel with the
ids, and the text tower computes as it would on those tokens of a whole caption.

    bash run/test.sh tests/data/test_text_masking.py
"""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from glimpse.data.loader import DataConfig, Reader
from glimpse.data.shards import Sample
from glimpse.data.text_masking import (
    STRATEGIES,
    Block,
    Caption,
    First,
    Prioritised,
    Random,
    Shuffled,
    parse,
)
from glimpse.data.tokenizer import pack, train_sentencepiece
from glimpse.data.transforms import View
from glimpse.model.init import Init
from glimpse.model.text import TextConfig, TextTower
from glimpse.tests.helpers.tiny import NAMES, picture

CONTEXT, PAD = 16, 0


def caption(real, padded=False):
    """Ids that tell their places: 100, 101, ...; pads up to the context where asked."""
    return list(range(100, 100 + real)) + [PAD] * ((CONTEXT - real) * padded)


once = cache(parse)


def masked(spec, real, *, padded=False, pooled=-1, start=1, end=1, seed=0):
    """(ids, places) that stay; seed: of a generator, or the generator."""
    ids = caption(real, padded)
    made = once(spec)(ids, real, Caption(CONTEXT, start, end, pooled), np.random.default_rng(seed))
    assert ids == caption(real, padded), "the caption is left as it was"
    return made


# ---- FLIP's


@pytest.mark.parametrize("pooled, padded", [(0, False), (-1, False), (0, True)])
@pytest.mark.parametrize("ratio, slots", [(0, 16), (0.5, 8), (0.7, 4), (0.99, 1)])
@pytest.mark.parametrize("name", ["random", "prioritised"])
def test_what_stays_of_a_caption(name, ratio, slots, pooled, padded):
    for real in range(1, CONTEXT + 1):
        whole = caption(real, padded)
        for seed in range(10):
            ids, places = masked(f"{name}({ratio})", real, padded=padded, pooled=pooled, seed=seed)
            assert all(a < b for a, b in pairwise(places)) and ids == [
                whole[place] for place in places
            ]
            assert (0 if pooled == 0 else len(whole) - 1) in places, "the pooled token"
            if name == "prioritised" or padded:
                assert len(ids) == min(len(whole), slots)
            else:
                assert len(ids) <= slots
            if name == "prioritised":
                assert sum(place < real for place in places) == min(real, slots), (
                    "a token is lost only for want of slots"
                )


@pytest.mark.parametrize(
    "context, ratio, slots",
    [(32, 0.5, 16), (32, 0.75, 8), (77, 0.5, 38), (20, 0.9, 2), (4, 0.9, 1)],
)
def test_so_many_slots(context, ratio, slots):
    for mask in (Random(ratio), Prioritised(ratio)):
        assert (
            len(
                mask(
                    list(range(context)),
                    context,
                    Caption(context, 1, 1, -1),
                    np.random.default_rng(0),
                )[0]
            )
            == slots
        )


@pytest.mark.parametrize(
    "name, real, padded, pooled, rates",
    [
        (
            "random",
            16,
            False,
            -1,
            [7 / 15] * 15 + [1],
        ),  # 8 slots of 16, one of them the pooled token's
        ("random", 16, False, 0, [1] + [7 / 15] * 15),
        ("random", 6, False, -1, [7 / 15] * 5 + [1]),  # a short caption loses as large a share
        ("random", 6, True, 0, [1] + [7 / 15] * 15),
        ("prioritised", 16, False, -1, [7 / 15] * 15 + [1]),
        ("prioritised", 12, False, 0, [1] + [7 / 11] * 11),
        ("prioritised", 12, True, 0, [1] + [7 / 11] * 11 + [0] * 4),
        ("prioritised", 6, True, 0, [1] * 6 + [2 / 10] * 10),
    ],
)
def test_keep_rates(name, real, padded, pooled, rates):
    rng, draws, found = np.random.default_rng(0), 3000, np.zeros(CONTEXT if padded else real)
    for _ in range(draws):
        found[masked(f"{name}(0.5)", real, padded=padded, pooled=pooled, seed=rng)[1]] += 1
    np.testing.assert_allclose(found / draws, rates, atol=0.03)


# ---- CLIPA's


@pytest.mark.parametrize("start, end", [(1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["first", "block", "shuffled"])
def test_only_a_long_caption_is_cut(name, padded, start, end):
    for real in range(1, CONTEXT + 1):
        whole = caption(real, padded)
        for seed in range(5):
            ids, places = masked(f"{name}(8)", real, padded=padded, start=start, end=end, seed=seed)
            assert places is None and len(ids) == min(len(whole), 8)
            if real <= 8:
                assert ids == whole[:8], "a short one is as it was, and loses padding only"
            else:
                assert (
                    ids[:start] == whole[:start] and ids[8 - end :] == whole[real - end : real]
                ), "special tokens stay where they stood"
                words = ids[start : 8 - end]
                assert len(set(words)) == len(words) and set(words) <= set(
                    whole[start : real - end]
                )


def words(spec, real, draws):
    """(draws, 6): the places of the words that stay of `real` tokens, in the order in which they
    stay.
    """
    rng = np.random.default_rng(0)
    return np.array([masked(spec, real, seed=rng)[0][1:-1] for _ in range(draws)]) - 100


def test_first_keeps_the_first_words():
    assert (words("first(8)", 14, 20) == [1, 2, 3, 4, 5, 6]).all()


def test_block_keeps_words_in_a_row_from_any_place():
    found = words("block(8)", 14, 4000)
    assert (np.diff(found, axis=1) == 1).all()
    # 12 words, 7 blocks of 6
    np.testing.assert_allclose(np.bincount(found[:, 0]) / 4000, [0] + [1 / 7] * 7, atol=0.02)


def test_shuffled_keeps_any_words_in_any_order():
    found = words("shuffled(8)", 14, 4000)
    np.testing.assert_allclose(np.bincount(found.flatten()) / 4000, [0] + [6 / 12] * 12, atol=0.03)
    for place in range(6):
        np.testing.assert_allclose(
            np.bincount(found[:, place]) / 4000, [0] + [1 / 12] * 12, atol=0.02
        )
    np.testing.assert_allclose((np.diff(found, axis=1) > 0).mean(0), [0.5] * 5, atol=0.03)


# ---- all

SPECS = {
    "random": "random(0.5)",
    "prioritised": "prioritised(0.5)",
    "first": "first(8)",
    "block": "block(8)",
    "shuffled": "shuffled(8)",
}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_the_generator_decides(name):
    one, same = ([masked(SPECS[name], CONTEXT, seed=seed) for seed in range(20)] for _ in range(2))
    assert one == same
    assert (
        len({tuple(ids) for ids, _ in one}) == 1
        if name == "first"
        else len({tuple(ids) for ids, _ in one}) > 5
    )


def test_parse_reads_what_a_config_writes():
    assert parse("none") is None
    assert parse("random(0.5)") == Random(0.5) == parse("random(ratio=0.5)") != Random(0.25)
    assert parse("prioritised(0.25)") == Prioritised(0.25)
    assert [parse(f"{name}(16)") for name in ("first", "block", "shuffled")] == [
        First(16),
        Block(16),
        Shuffled(tokens=16),
    ]


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "random(1.0)",
            (
                r"ratio is 1.0; it must be in \[0, 1\): the share of the context's slots to hide;"
                r" random takes \(ratio: float\)"
            ),
        ),
        ("prioritised(-0.5)", r"ratio is -0.5; it must be in \[0, 1\)"),
        ("random(True)", "ratio is True; it must be in"),
        ("random('a')", "ratio is 'a'; it must be in"),
        ("prioritised", "missing a required argument: 'ratio'; prioritised takes"),
        (
            "first(2)",
            (
                r"tokens is 2; it must be 3 or more: how many stay, special ones included; first"
                r" takes \(tokens: int\)"
            ),
        ),
        ("block(8.0)", "tokens is 8.0; it must be 3 or more"),
        ("shuffled(True)", "tokens is True; it must be 3 or more"),
        ("first(8, 9)", "too many positional"),
        (
            "prioritized(0.5)",
            (
                "strategy 'prioritized'; known: block, first, none, prioritised, random, shuffled;"
                " did you mean 'prioritised'"
            ),
        ),
        ("none(0.5)", "none takes no arguments"),
        ("first(8", r"cannot be read; write it as none, prioritised\(0.5\) or first\(16\)"),
    ],
)
def test_parse_refuses(spec, message):
    for read in (
        parse,
        lambda text: DataConfig(train=("x",), tokenizer="clip_bpe", context=32, text_mask=text),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(spec)
        assert str(caught.value).startswith(f"data.text_mask {spec!r}")


# ---- through the reader


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    train_sentencepiece([f"a {name}" for name in NAMES], path, 300)
    return f"sentencepiece({path})"


def read(tokenizer, text_mask, *, pool="first", epoch=0, pad_text=False):
    """The text of a batch of captions of three to sixteen tokens, and each caption whole."""
    cfg = DataConfig(
        train=("x",), tokenizer=tokenizer, context=CONTEXT, text_mask=text_mask, pad_text=pad_text
    )
    reader = Reader(cfg, {"image": View()}, image_size=8, patch=8, seed=0, pool=pool)
    image = picture("red circle", np.random.default_rng(0))
    captions = [" ".join(NAMES[:n]) for n in (1, 2, 9)] + ["", "a purple square"]
    rows = [
        reader.row(Sample("s", str(i), {"png": image, "txt": text.encode()}), epoch, i)
        for i, text in enumerate(captions)
    ]
    return reader.part(rows, [])["text"], [reader.tokenizer(text) for text in captions]


@pytest.mark.parametrize("pool", ["first", "eot"])
@pytest.mark.parametrize("text_mask", ["random(0.5)", "prioritised(0.75)"])
def test_places_travel_with_the_ids(tokenizer, text_mask, pool):
    text, whole = read(tokenizer, text_mask, pool=pool)
    assert (
        text["positions"].dtype == text["ids"].dtype == torch.int32
        and text["longest"] == text["lengths"].max() <= 8
    )
    lengths = text["lengths"].tolist()
    assert any(length < len(ids) for length, ids in zip(lengths, whole))
    for ids, places, all_ids in zip(
        text["ids"].split(lengths), text["positions"].split(lengths), whole, strict=True
    ):
        assert ids.tolist() == [all_ids[place] for place in places]
        assert places[0] == 0 if pool == "first" else places[-1] == len(all_ids) - 1
    again, other = (
        read(tokenizer, text_mask, pool=pool, epoch=epoch)[0]["positions"] for epoch in (0, 1)
    )
    assert torch.equal(again, text["positions"]) and other.tolist() != again.tolist()


def test_a_cut_that_cuts_nothing_is_refused():
    with pytest.raises(
        ValueError,
        match=(
            r"data.text_mask: first\(32\) cuts nothing from captions of at most data.context 32"
            r" tokens"
        ),
    ):
        DataConfig(train=("x",), tokenizer="clip_bpe", context=32, text_mask="first(32)")


@pytest.mark.parametrize("text_mask", ["none", "first(5)", "block(5)", "shuffled(5)"])
def test_no_places_where_tokens_are_numbered_anew(tokenizer, text_mask):
    text, whole = read(tokenizer, text_mask)
    assert sorted(text) == ["ids", "lengths", "longest"]
    assert text["lengths"].tolist() == [
        len(ids) if text_mask == "none" else min(len(ids), 5) for ids in whole
    ]
    if text_mask == "none":
        assert text["ids"].tolist() == sum(whole, [])


def test_a_filled_caption_loses_padding_first(tokenizer):
    text, whole = read(tokenizer, "prioritised(0.5)", pad_text=True)
    assert text["lengths"].tolist() == [8] * 5
    for places, ids in zip(text["positions"].view(5, 8).tolist(), whole):
        assert sum(place < len(ids) for place in places) == min(8, len(ids))


# ---- through the tower


def tower(pool):
    torch.manual_seed(0)
    init = Init(token=1.0, positions=1.0)  # large, so that a wrong place shows
    return TextTower(
        TextConfig(pool=pool), vocab=120, context=CONTEXT, width=32, depth=3, heads=4, init=init
    )


@pytest.mark.parametrize("ratio", [0, 0.5])
@pytest.mark.parametrize("pool", ["first", "eot"])
@torch.no_grad()
def test_the_tower_sees_the_tokens_that_stay_at_their_places(pool, ratio):
    text, reals = tower(pool), (3, 16, 1, 9)
    rows = [
        masked(f"random({ratio})", real, pooled=0 if pool == "first" else -1, seed=real)
        for real in reals
    ]
    packed, lengths = pack([ids for ids, _ in rows])
    places, _ = pack([places for _, places in rows])
    made = text(packed, lengths, int(lengths.max()), places)
    for row, (ids, kept) in zip(made, rows):
        x = text.token(torch.tensor(ids)) + text.positions[kept]
        expected = text.norm(text.blocks(x[None]))[0, 0 if pool == "first" else -1]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
    numbered = text(packed, lengths, int(lengths.max()))
    assert torch.equal(made, numbered) == (ratio == 0), "without places, tokens are numbered anew"
    if ratio == 0:
        torch.testing.assert_close(made, text(*pack([caption(real) for real in reals])))
