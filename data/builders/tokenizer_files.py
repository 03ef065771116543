"""Our tokenizers as the files that Hugging Face's libraries read, and theirs as ours.

    write(tokenizer, folder)      AutoTokenizer.from_pretrained(folder) then gives the tokenizer's
                                  ids: call it with truncation=True
    read(folder) -> "clip_bpe"    what `build` makes the folder's tokenizer of; ValueError: it is
                                  none of ours

| kind
    | becomes                 | in the files
    |
| clip_bpe
    | CLIPTokenizer           | vocab.json, merges.txt, tokenizer.json
    |
| wordpiece
    | PreTrainedTokenizerFast | vocab.txt, tokenizer.json, without [CLS] and [SEP]
    |
| sentencepiece | PreTrainedTokenizerFast | tokenizer.model, tokenizer.json
    |

All with tokenizer_config.json, which also has them spell out special tokens that a caption
contains, as ours do. Captions are padded as ours are; CLIP's with the end token. Where the ids
still differ (tests/data/builders/test_tokenizer_files.py holds it):
- clip_bpe: CLIPTokenizer mends nothing. Ours, as OpenAI's own, first straightens what ftfy knows
  (curly quotes, ligatures, full-width
  letters, mojibake, control characters) and HTML entities. It lower-cases letter by letter, so not
  a final sigma, and takes a long s for no contraction's, U+0345 for a mark.
- wordpiece: of letters that folding makes several or others, it knows sharp s and final sigma; an
  empty caption is empty, ours [PAD].
- all: half a character (a lone surrogate) is a TypeError there.
"""

import json
import re
from pathlib import Path

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from glimpse.data.tokenizer import ClipBpe, SentencePiece, Tokenizer, WordPiece, build

START, END = "<|startoftext|>", "<|endoftext|>"  # how CLIP's are spelled in vocab.json
SPACES = normalizers.Replace(Regex(r"\s+"), " ")
# Captions on which a tokenizer must agree to be called the same: no cleaning touches them.
PROBES = (
    "a photo of a cat",
    "A  2nd-hand BICYCLE, don't miss it!!! $12.50",
    "caf\xe9 na\xefve \xc5ngstr\xf6m",
    "x" * 120,
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600\U0001f44d\U0001f3fd \u2764\ufe0f",
    "http://x.org/a_b?c=d#e (f) [g] {h} ~ ^",
)


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Into a folder that is there.

    ValueError where Hugging Face's libraries cannot be told to give the same ids.
    """
    kind = {ClipBpe: clip_bpe, WordPiece: wordpiece, SentencePiece: sentencepiece}[type(tokenizer)]
    backend, config, files = kind(tokenizer)
    if tokenizer.start or tokenizer.end:
        start, end = (
            [(backend.id_to_token(i), i) for i in ids] for ids in (tokenizer.start, tokenizer.end)
        )
        around = [*(name for name, _ in start), "$A", *(name for name, _ in end)]
        backend.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=start + end
        )
    agree(
        tokenizer,
        backend,
        f"data.tokenizer: tokenizer.json cannot express this {type(tokenizer).__name__}",
    )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config |= dict(model_max_length=tokenizer.context, split_special_tokens=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def agree(tokenizer: Tokenizer, backend: tokenizers.Tokenizer, otherwise: str) -> None:
    """ValueError, which begins with `otherwise`, at the first probe whose ids differ."""
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for text in PROBES:
        ours, theirs = (
            [*tokenizer.start, *tokenizer.encode(text), *tokenizer.end],
            backend.encode(text).ids,
        )
        if ours != theirs:
            raise ValueError(f"{otherwise}: {text!r} gives {theirs[:12]} there, {ours[:12]} here")


def clip_bpe(tokenizer: ClipBpe) -> tuple[tokenizers.Tokenizer, dict, dict[str, bytes]]:
    """(backend, tokenizer_config.json, other files)"""
    state = json.loads(tokenizer.bpe.to_str())
    vocab = state["model"]["vocab"] | {START: tokenizer.start[0], END: tokenizer.end[0]}
    state["model"] |= dict(vocab=vocab, unk_token=END)
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), SPACES, normalizers.Lowercase()])
    backend.add_special_tokens([START, END])
    merges = "".join(" ".join(merge) + "\n" for merge in state["model"]["merges"])
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
        "merges.txt": b"#version: 0.2\n" + merges.encode(),
    }
    return (
        backend,
        dict(
            tokenizer_class="CLIPTokenizer",
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=END,
        ),
        files,
    )


def wordpiece(tokenizer: WordPiece) -> tuple[tokenizers.Tokenizer, dict, dict[str, bytes]]:
    """The same"""
    backend = tokenizers.Tokenizer.from_str(tokenizer.pieces.to_str())
    folded = [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.Replace("\xdf", "ss"),
        normalizers.Replace("\u03c2", "\u03c3"),
    ]
    backend.normalizer = normalizers.Sequence([*folded, tokenizer.pieces.normalizer])
    backend.add_special_tokens(["[PAD]", "[UNK]"])
    vocab = sorted(tokenizer.pieces.get_vocab(), key=tokenizer.pieces.token_to_id)
    config = dict(tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]", pad_token="[PAD]")
    return backend, config, {"vocab.txt": "".join(piece + "\n" for piece in vocab).encode()}


def sentencepiece(tokenizer: SentencePiece) -> tuple[tokenizers.Tokenizer, dict, dict[str, bytes]]:
    """The same"""
    data = tokenizer.model.serialized_model_proto()
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    cleans = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM or any(
        piece.type == piece.USER_DEFINED for piece in proto.pieces
    ):
        raise ValueError(
            "data.tokenizer: of SentencePiece models, tokenizer.json has those of type unigram"
            " without pieces of the user's"
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = tokenizers.Tokenizer(
        models.Unigram(
            pieces, tokenizer.model.unk_id(), byte_fallback=proto.trainer_spec.byte_fallback
        )
    )
    steps = (
        [normalizers.Precompiled(cleans.precompiled_charsmap)]
        if cleans.precompiled_charsmap
        else []
    )
    if cleans.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    steps.append(normalizers.Replace(" ", "\u2581"))
    if cleans.add_dummy_prefix:
        # for Metaspace would take it for its own
        steps.append(normalizers.Replace(Regex(r"\A\u2581"), "\u2581\u2581"))
    # Pieces that are no text, <s> or <0x41>: where a caption spells one, it is cut after its first
    # letter, which keeps it from being found.
    names = [piece.piece for piece in proto.pieces if piece.type != piece.NORMAL]
    spelled = pre_tokenizers.Split(
        Regex("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)),
        "isolated",
    )
    begin = (
        [pre_tokenizers.Metaspace("\u2581", "always", split=False)]
        if cleans.add_dummy_prefix
        else []
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([*begin, spelled])
    backend.normalizer = normalizers.Sequence(steps)
    ids = dict(
        pad_token=tokenizer.pad_id, unk_token=tokenizer.model.unk_id(), eos_token=tokenizer.end[0]
    )
    if tokenizer.start:
        ids["bos_token"] = tokenizer.start[0]
    names = {key: tokenizer.model.id_to_piece(i) for key, i in ids.items()}
    backend.add_special_tokens(list(dict.fromkeys(names.values())))
    return (
        backend,
        dict(tokenizer_class="PreTrainedTokenizerFast", **names),
        {"tokenizer.model": data},
    )


def read(folder: Path) -> str:
    """The spec of the tokenizer in the folder, whose vocabulary lies there unless it is the one of
    an installed package.

    ValueError: it is none of ours, or its files are damaged.
    """
    try:
        return found_in(folder)
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):
            raise
        why = error
    # of tokenizers, whose errors are of no kind of their own; of files that hold something else
    except Exception as error:
        why = error
    raise ValueError(
        f"{folder}: its tokenizer files are damaged, or newer than tokenizers"
        f" {tokenizers.__version__} ({type(why).__name__}: {str(why)[:120]}); --tokenizer SPEC"
        " names one"
    ) from why


def found_in(folder: Path) -> str:
    """The same, with errors of any kind."""
    known = {"merges.txt": "clip_bpe", "vocab.txt": "wordpiece", "tokenizer.model": "sentencepiece"}
    found = next(
        (f"{kind}({folder / name})" for name, kind in known.items() if (folder / name).exists()),
        None,
    )
    state = folder / "tokenizer.json"
    if (
        not found
        and state.exists()
        and json.loads(state.read_text())["model"].get("end_of_word_suffix") == "</w>"
    ):
        found = "clip_bpe"  # its merges are in there alone
    if not found:
        raise ValueError(
            f"{folder}: no tokenizer that we have; needed is one of {', '.join(known)}, or CLIP's"
            " tokenizer.json; --tokenizer SPEC names one, as data.tokenizer: clip_bpe, or"
            " sentencepiece(PATH)"
        )
    tokenizer = build(found, 77)
    if isinstance(tokenizer, ClipBpe):
        check_numbers(tokenizer, folder)
    if state.exists():
        agree(
            tokenizer,
            tokenizers.Tokenizer.from_file(str(state)),
            f"{state}: not the ids of data.tokenizer {found}",
        )
    return "clip_bpe" if isinstance(tokenizer, ClipBpe) and is_installed(tokenizer) else found


def check_numbers(tokenizer: ClipBpe, folder: Path) -> None:
    """ValueError where vocab.json numbers the pieces otherwise than CLIP does.

    The special tokens may be called anything.
    """
    file = folder / "vocab.json"
    if not file.exists():
        return
    theirs, ours = json.loads(file.read_text()), tokenizer.bpe.get_vocab()
    for piece, i in ours.items():
        if theirs.get(piece) != i:
            raise ValueError(
                f"{file}: {piece!r} is {theirs.get(piece)}, by CLIP's own numbers {i}; another"
                " tokenizer than CLIP's"
            )
    if extra := sorted(theirs.keys() - ours.keys(), key=theirs.get)[2:]:
        raise ValueError(
            f"{file}: {extra[0]!r}: CLIP's vocabulary ends with its two special tokens; this one"
            " was extended"
        )


def is_installed(tokenizer: ClipBpe) -> bool:
    """Is it the tokenizer of the package that brings one?"""
    try:
        return build("clip_bpe", 77).fingerprint == tokenizer.fingerprint
    except ValueError:
        return False
