"""Write our tokenizers as the files that Hugging Face's libraries read, and read theirs as ours.

    write(tokenizer, folder)      AutoTokenizer.from_pretrained(folder) then gives the tokenizer's
                                  ids: call it with truncation=True
    read(folder) -> "clip_bpe"    the spec from which `build` makes the folder's tokenizer;
                                  ValueError: it is none of ours

| kind          | becomes                 | in the files                                        |
| clip_bpe      | CLIPTokenizer           | vocab.json, merges.txt, tokenizer.json              |
| wordpiece     | PreTrainedTokenizerFast | vocab.txt, tokenizer.json, without [CLS] and [SEP]  |
| sentencepiece | PreTrainedTokenizerFast | tokenizer.model, tokenizer.json                     |

All come with tokenizer_config.json. It also makes them split special tokens that a caption spells
out, as ours do. Captions are padded as ours are; CLIP's with the end token.

The ids still differ in these cases (tests/data/builders/test_tokenizer_files.py checks them):
- clip_bpe: CLIPTokenizer repairs nothing. Ours, like OpenAI's, first repairs what ftfy recognizes
  (curly quotes, ligatures, full-width letters, mojibake, control characters) and HTML entities.
  CLIPTokenizer lower-cases letter by letter, so it does not know a final sigma; it does not take a
  long s for the s of a contraction; it takes U+0345 for a mark.
- wordpiece: of the letters that case folding changes or expands, the files handle only sharp s and
  final sigma; an empty caption gives no ids, ours gives [PAD].
- all: half a character (a lone surrogate) is a TypeError there.
"""

import json
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from glimpse.data.tokenizer import ClipBpe, SentencePiece, Tokenizer, WordPiece, build_tokenizer

# The classes of this module, which protoc wrote, are made when it is imported: a type checker
# cannot see them. `ModelProto` and the classes above it describe the fields that are used here.
sentencepiece_model_pb2 = import_module("sentencepiece.sentencepiece_model_pb2")

START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's special tokens in vocab.json
SPACES = normalizers.Replace(Regex(r"\s+"), " ")
# Captions on which two tokenizers must agree to count as the same: no cleaning changes them.
PROBES = (
    "a photo of a cat",
    "A  2nd-hand BICYCLE, don't miss it!!! $12.50",
    "caf\xe9 na\xefve \xc5ngstr\xf6m",
    "x" * 120,
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f",
    "http://x.org/a_b?c=d#e (f) [g] {h} ~ ^",
)


class Converted(NamedTuple):
    """A tokenizer as Hugging Face's libraries read it."""

    backend: tokenizers.Tokenizer  # content of tokenizer.json
    config: dict  # content of tokenizer_config.json
    files: dict[str, bytes]  # name -> content of the other files


class Piece(Protocol):
    """A piece of a SentencePiece model."""

    piece: str
    score: float
    type: int
    NORMAL: int  # a type
    USER_DEFINED: int  # a type


class TrainerSpec(Protocol):
    """Settings of a SentencePiece model's training."""

    model_type: int
    UNIGRAM: int  # a model_type
    byte_fallback: bool


class NormalizerSpec(Protocol):
    """Settings of a SentencePiece model's normalizer."""

    precompiled_charsmap: bytes
    remove_extra_whitespaces: bool
    add_dummy_prefix: bool


class ModelProto(Protocol):
    """Content of a SentencePiece model's file."""

    pieces: Sequence[Piece]
    trainer_spec: TrainerSpec
    normalizer_spec: NormalizerSpec


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files into an existing folder.

    ValueError: Hugging Face's files cannot express a tokenizer with the same ids.
    """
    backend, config, files = convert(tokenizer)

    # Start and end tokens around the caption ($A).
    if tokenizer.start or tokenizer.end:
        start = [(backend.id_to_token(i), i) for i in tokenizer.start]
        end = [(backend.id_to_token(i), i) for i in tokenizer.end]
        around = [*(name for name, _ in start), "$A", *(name for name, _ in end)]
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=start + end
        )
    name = type(tokenizer).__name__
    agree(tokenizer, backend, f"data.tokenizer: tokenizer.json cannot express this {name}")

    for file, content in files.items():
        (folder / file).write_bytes(content)
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config |= dict(model_max_length=tokenizer.context, split_special_tokens=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def convert(tokenizer: Tokenizer) -> Converted:
    """Convert a tokenizer of any of our kinds."""
    if isinstance(tokenizer, ClipBpe):
        return clip_bpe(tokenizer)
    if isinstance(tokenizer, WordPiece):
        return wordpiece(tokenizer)
    if isinstance(tokenizer, SentencePiece):
        return sentencepiece(tokenizer)
    raise TypeError(f"{type(tokenizer).__name__}: no conversion to Hugging Face's files")


def agree(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, otherwise: str) -> None:
    """Raise ValueError, with `otherwise` first, if the ids of a probe differ."""
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for text in PROBES:
        ids = [*tokenizer.start, *tokenizer.encode(text), *tokenizer.end]
        backend_ids = backend.encode(text).ids
        if ids != backend_ids:
            raise ValueError(
                f"{otherwise}: {text!r} gives {backend_ids[:12]} there, {ids[:12]} here"
            )


def clip_bpe(tokenizer: ClipBpe) -> Converted:
    """Convert CLIP's byte pairs."""
    # Our BPE, with the special tokens in its vocabulary.
    state = json.loads(tokenizer.bpe.to_str())
    vocab = state["model"]["vocab"] | {START: tokenizer.start[0], END: tokenizer.end[0]}
    state["model"] |= dict(vocab=vocab, unk_token=END)
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), SPACES, normalizers.Lowercase()])
    backend.add_special_tokens([START, END])

    config = dict(
        tokenizer_class="CLIPTokenizer",
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )
    merges = "".join(" ".join(merge) + "\n" for merge in state["model"]["merges"])
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": b"#version: 0.2\n" + merges.encode(),
    }
    return Converted(backend, config, files)


def wordpiece(tokenizer: WordPiece) -> Converted:
    """Convert FLIP's WordPiece."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.pieces.to_str())
    # Case folding, as far as it can be expressed: sharp s and final sigma.
    folded = [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Replace("\xdf", "ss"),
        normalizers.Replace("\u03c2", "\u03c3"),
    ]
    backend.normalizer = normalizers.Sequence([*folded, tokenizer.pieces.normalizer])
    backend.add_special_tokens(["[PAD]", "[UNK]"])
    ids = tokenizer.pieces.get_vocab()
    vocab = sorted(ids, key=lambda piece: ids[piece])
    config = dict(tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]", pad_token="[PAD]")
    files = {"vocab.txt": "".join(piece + "\n" for piece in vocab).encode()}
    return Converted(backend, config, files)


def sentencepiece(tokenizer: SentencePiece) -> Converted:
    """Convert a SentencePiece model.

    ValueError: the model is not of type unigram, or has user-defined pieces.
    """
    data = tokenizer.model.serialized_model_proto()
    proto: ModelProto = sentencepiece_model_pb2.ModelProto.FromString(data)
    trainer = proto.trainer_spec
    user_defined = any(piece.type == piece.USER_DEFINED for piece in proto.pieces)
    if trainer.model_type != trainer.UNIGRAM or user_defined:
        raise ValueError(
            "data.tokenizer: of SentencePiece models, tokenizer.json has those of type unigram"
            " without pieces of the user's"
        )

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown_id = tokenizer.model.unk_id()
    model = models.Unigram(pieces, unknown_id, byte_fallback=trainer.byte_fallback)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer(proto)
    backend.normalizer = normalizer(proto)

    # Special tokens by their usual names.
    ids = dict(pad_token=tokenizer.pad_id, unk_token=unknown_id, eos_token=tokenizer.end[0])
    if tokenizer.start:
        ids["bos_token"] = tokenizer.start[0]
    names = {key: tokenizer.model.id_to_piece(i) for key, i in ids.items()}
    backend.add_special_tokens(list(dict.fromkeys(names.values())))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **names)
    return Converted(backend, config, {"tokenizer.model": data})


def normalizer(proto: ModelProto) -> normalizers.Sequence:
    """Return the normalizer of a SentencePiece model."""
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    steps.append(normalizers.Replace(" ", "\u2581"))
    if spec.add_dummy_prefix:
        # Doubled, because Metaspace would take a caption's first one for the dummy prefix.
        steps.append(normalizers.Replace(Regex(r"\A\u2581"), "\u2581\u2581"))
    return normalizers.Sequence(steps)


def pre_tokenizer(proto: ModelProto) -> pre_tokenizers.Sequence:
    """Return the pre-tokenizer of a SentencePiece model."""
    # A caption may spell a piece that is no text, <s> or <0x41>. It is split after the first
    # letter, so that the piece is not matched.
    patterns = []
    for piece in proto.pieces:
        if piece.type != piece.NORMAL:
            first, rest = piece.piece[0], piece.piece[1:]
            patterns.append(f"{re.escape(first)}(?={re.escape(rest)})")
    steps: list[pre_tokenizers.PreTokenizer] = []
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(pre_tokenizers.Metaspace("\u2581", "always", split=False))
    steps.append(pre_tokenizers.Split(Regex("|".join(patterns)), "isolated"))
    return pre_tokenizers.Sequence(steps)


def read(folder: Path) -> str:
    """Return the spec of the tokenizer in the folder.

    Its vocabulary is the file in the folder, unless it is that of an installed package.
    ValueError: it is none of ours, or its files are damaged.
    """
    cause: Exception
    try:
        return found_in(folder)
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):
            raise
        cause = error
    # Errors of the library tokenizers have no class of their own; other files raise other errors.
    except Exception as error:
        cause = error
    reason = f"{type(cause).__name__}: {str(cause)[:120]}"
    raise ValueError(
        f"{folder}: its tokenizer files are damaged, or newer than tokenizers"
        f" {tokenizers.__version__} ({reason}); --tokenizer SPEC names one"
    ) from cause


def found_in(folder: Path) -> str:
    """Return the spec of the tokenizer in the folder; damaged files raise errors of any kind."""
    # The kind, by the files that are there.
    known = {"merges.txt": "clip_bpe", "vocab.txt": "wordpiece", "tokenizer.model": "sentencepiece"}
    spec = None
    for name, kind in known.items():
        if (folder / name).exists():
            spec = f"{kind}({folder / name})"
            break
    state = folder / "tokenizer.json"
    if not spec and state.exists():
        model = json.loads(state.read_text())["model"]
        if model.get("end_of_word_suffix") == "</w>":
            spec = "clip_bpe"  # its merges are only in tokenizer.json
    if not spec:
        raise ValueError(
            f"{folder}: no tokenizer that we have; needed is one of {', '.join(known)}, or CLIP's"
            " tokenizer.json; --tokenizer SPEC names one, as data.tokenizer: clip_bpe, or"
            " sentencepiece(PATH)"
        )

    # The tokenizer built from them must give the ids of the folder's own files.
    tokenizer = build_tokenizer(spec, 77)
    if isinstance(tokenizer, ClipBpe):
        check_numbers(tokenizer, folder)
    if state.exists():
        backend = tokenizers.Tokenizer.from_file(str(state))
        agree(tokenizer, backend, f"{state}: not the ids of data.tokenizer {spec}")
    if isinstance(tokenizer, ClipBpe) and is_installed(tokenizer):
        return "clip_bpe"
    return spec


def check_numbers(tokenizer: ClipBpe, folder: Path) -> None:
    """Raise ValueError if vocab.json numbers the pieces differently than CLIP does.

    The special tokens may have any names.
    """
    file = folder / "vocab.json"
    if not file.exists():
        return
    numbers = json.loads(file.read_text())
    expected = tokenizer.bpe.get_vocab()
    for piece, i in expected.items():
        if numbers.get(piece) != i:
            raise ValueError(
                f"{file}: {piece!r} is {numbers.get(piece)}, by CLIP's own numbers {i}; another"
                " tokenizer than CLIP's"
            )
    added = sorted(numbers.keys() - expected.keys(), key=numbers.get)
    extra = added[2:]  # after the two special tokens
    if extra:
        raise ValueError(
            f"{file}: {extra[0]!r}: CLIP's vocabulary ends with its two special tokens; this one"
            " was extended"
        )


def is_installed(tokenizer: ClipBpe) -> bool:
    """Return True if it is the tokenizer that an installed package has."""
    try:
        return build_tokenizer("clip_bpe", 77).fingerprint == tokenizer.fingerprint
    except ValueError:
        return False
