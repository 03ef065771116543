"""transformers reads a tokenizer's files and gives its ids, except for the differences listed here;
the files that were written can be read.

The complete folder that a conversion writes: transformers' processor and model give the same as
ours on pictures and captions.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import glimpse.data.tokenizer
from glimpse.data.builders.tokenizer_files import read, write
from glimpse.data.tokenizer import (
    ClipBpe,
    build_tokenizer,
    installed_vocabulary,
    train_sentencepiece,
)
from glimpse.data.transforms import center_view
from glimpse.model.convert import hf
from glimpse.model.vision import normalize_pixels
from glimpse.tests.data.test_tokenizer import TEXTS, WORDPIECES
from glimpse.tests.model.convert.test_convert_hf import CLIP, made
from glimpse.tests.model.test_towers import patches_of

KINDS = ("clip_bpe", "small clip_bpe", "wordpiece", "sentencepiece")
HARD = [
    "a photo of a cat",
    "A  Photo,\tof CATS!\n",
    "caf\xe9 na\xefve \xc5ngstr\xf6m e\u0301",
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \u2764\ufe0f",
    "1234 5.6 \xbd \xb2 \u2122 \u2026",
    "don't isn't we're it's",
    "a\xa0b\u3000c\u2028d \u200be",
    "&",
    "!?" * 60,
    "cat " * 200,
    "x" * 300,
    "_a_ <b> [c] {d} a|b",
    "\u0130stanbul \u1e9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
]
# caption, and the text that our tokenizer repairs it to; transformers does not repair it
REPAIRED = [
    ("\u201ccurly\u201d don\u2019t", '"curly" don\'t'),
    ("tom &amp; jerry &#39;90s &lt;3", "tom & jerry '90s <3"),
    ("&amp;amp;", "&"),
    ("\ufb01ne", "fine"),
    ("\uff26\uff35\uff2c\uff2c", "FULL"),
    ("don\xe2\u20ac\u2122t caf\xc3\xa9", "don't caf\xe9"),
    ("nul\x00bell\x07", "nulbell"),
    ("\x1b[31mred", "red"),
    ("\ufeffbom", "bom"),
    ("\u0391\u03a3", "\u03b1\u03c2"),
    ("a\u0345b", "a b"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {kind: (tokenizer, folder)}; with CLIP's own if open_clip is installed."""
    # Small vocabularies.
    top = tmp_path_factory.mktemp("vocabularies")
    pieces = [*WORDPIECES, "strasse", "\u03b1\u03c3", "\u03b1", "\u03b1\u03b9"]
    (top / "merges.txt").write_text("a title\nc a\nca t</w>\na t</w>\n")
    (top / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    train_sentencepiece(TEXTS, top / "words.model", 340)
    specs = {
        "small clip_bpe": f"clip_bpe({top}/merges.txt)",
        "wordpiece": f"wordpiece({top}/vocab.txt)",
        "sentencepiece": f"sentencepiece({top}/words.model)",
    }
    try:
        installed_vocabulary("clip_bpe")
        specs["clip_bpe"] = "clip_bpe"
    except ValueError:
        pass

    tokenizers = {}
    for kind, spec in specs.items():
        tokenizer = build_tokenizer(spec, 77 if kind == "clip_bpe" else 32)
        folder = top / kind.replace(" ", "_")
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "clip"}')
        write(tokenizer, folder)
        tokenizers[kind] = tokenizer, folder
    return tokenizers


@pytest.fixture(scope="module")
def hf_tokenizers(folders):
    """Return {kind: transformers' tokenizer}."""
    transformers = pytest.importorskip("transformers")
    tokenizers = {}
    for kind, (_, folder) in folders.items():
        tokenizers[kind] = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizers


def of(kind, table):
    if kind not in table:
        pytest.skip("open-clip-torch is not installed")
    return table[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids(folders, hf_tokenizers, kind):
    tokenizer, _folder = of(kind, folders)
    hf_tokenizer = of(kind, hf_tokenizers)

    class_name = "CLIPTokenizer" if isinstance(tokenizer, ClipBpe) else "TokenizersBackend"
    assert type(hf_tokenizer).__name__ == class_name
    assert hf_tokenizer.model_max_length == tokenizer.context
    for text in HARD:
        assert hf_tokenizer(text, truncation=True)["input_ids"] == tokenizer(text), text

    batch = hf_tokenizer(HARD, truncation=True, padding="max_length", return_tensors="pt")

    lengths = [len(tokenizer(text)) for text in HARD]
    assert batch["input_ids"].shape == (len(HARD), tokenizer.context)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    if tokenizer.end:
        full = tokenizer("cat " * 200)
        assert len(full) == tokenizer.context
        assert full[-1] == tokenizer.end[0] == hf_tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_captions_are_spelled(folders, hf_tokenizers, kind):
    tokenizer, _folder = of(kind, folders)
    hf_tokenizer = of(kind, hf_tokenizers)

    for text in ("a <|endoftext|>", "<s>a</s> <pad> <0x41>", "[PAD] [MASK]"):
        ids = hf_tokenizer(text)["input_ids"]
        assert ids == tokenizer(text)
        assert len(set(ids) & set(tokenizer.end)) == bool(tokenizer.end)


@pytest.mark.parametrize("kind", ["clip_bpe", "small clip_bpe"])
def test_what_clips_tokenizer_mends_and_theirs_does_not(folders, hf_tokenizers, kind):
    tokenizer, _folder = of(kind, folders)
    hf_tokenizer = of(kind, hf_tokenizers)

    for text, repaired in REPAIRED:
        ids = tokenizer(text)
        assert ids == hf_tokenizer(repaired, truncation=True)["input_ids"], text
        assert ids != hf_tokenizer(text, truncation=True)["input_ids"], text
    with pytest.raises(TypeError):
        hf_tokenizer("\ud83d")


def test_where_wordpiece_differs(folders, hf_tokenizers):
    tokenizer, _folder = folders["wordpiece"]
    hf_tokenizer = hf_tokenizers["wordpiece"]
    size = len(WORDPIECES)

    for text in ("Stra\xdfe", "STRASSE", "STRA\u1e9eE"):
        assert tokenizer(text) == hf_tokenizer(text)["input_ids"] == [size]
    assert tokenizer("\u0391\u03a3") == hf_tokenizer("\u0391\u03a3")["input_ids"] == [size + 1]
    assert tokenizer(" ") == [0]
    assert hf_tokenizer(" ")["input_ids"] == []
    # alpha with a iota below
    assert tokenizer("\u1f80") == [size + 3]
    assert hf_tokenizer("\u1f80")["input_ids"] == [size + 2]


@pytest.mark.parametrize("kind", KINDS)
def test_read_again(folders, kind):
    tokenizer, folder = of(kind, folders)

    spec = read(folder)

    assert build_tokenizer(spec, tokenizer.context).fingerprint == tokenizer.fingerprint
    # a package's vocabulary needs no copy
    assert (spec == "clip_bpe") == (kind == "clip_bpe")


def test_read_what_transformers_saves(folders, hf_tokenizers, tmp_path):
    """tokenizer.json alone is enough for CLIP's tokenizer."""
    of("clip_bpe", hf_tokenizers).save_pretrained(tmp_path / "clip")

    assert not (tmp_path / "clip" / "merges.txt").exists()
    assert read(tmp_path / "clip") == "clip_bpe"

    hf_tokenizers["small clip_bpe"].save_pretrained(tmp_path / "small")

    message = (
        "small/tokenizer.json: not the ids of data.tokenizer clip_bpe: 'a photo of a cat' gives"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "small")


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_none_of_ours(folders, tmp_path):
    # no files of a tokenizer
    message = (
        "no tokenizer that we have; needed is one of merges.txt, vocab.txt, tokenizer.model, or"
        " CLIP's tokenizer.json; --tokenizer SPEC names one, as data.tokenizer: clip_bpe, or"
        " sent"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path)

    # BERT's, with special tokens around a caption
    _tokenizer, folder = folders["wordpiece"]
    bert = copied(folder, tmp_path / "bert")
    tree = json.loads((bert / "tokenizer.json").read_text())
    tree["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    (bert / "tokenizer.json").write_text(json.dumps(tree))

    message = (
        r"tokenizer.json: not the ids of .*'a photo of a cat' gives \[2, 5, .* 3\] there, \[5, "
    )
    with pytest.raises(ValueError, match=message):
        read(bert)

    # CLIP's with another number of a piece, and with one more piece
    _tokenizer, folder = folders["small clip_bpe"]
    vocab = json.loads((folder / "vocab.json").read_text())
    renumbered = copied(folder, tmp_path / "renumbered")
    extended = copied(folder, tmp_path / "extended")
    (renumbered / "vocab.json").write_text(json.dumps(vocab | {"cat</w>": 7}))
    (extended / "vocab.json").write_text(json.dumps(vocab | {"<new>": len(vocab)}))

    with pytest.raises(ValueError, match="'cat</w>' is 7, by CLIP's own numbers 513"):
        read(renumbered)
    message = "'<new>': CLIP's vocabulary ends with its two special tokens"
    with pytest.raises(ValueError, match=message):
        read(extended)


@pytest.mark.parametrize(
    "kind, name, content",
    [
        ("clip_bpe", "tokenizer.json", '{"version": "1.0", "trunc'),
        ("clip_bpe", "tokenizer.json", '{"model": {"type": "New", "vocab": {}}}'),
        ("clip_bpe", "tokenizer.json", "{}"),
        ("clip_bpe", "vocab.json", "[]"),
        (None, "tokenizer.json", '{"a": 1}'),
        (None, "tokenizer.json", "[]"),
    ],
)
def test_damaged_files_are_told_in_a_line(folders, tmp_path, kind, name, content):
    folder = tmp_path
    if kind:
        _tokenizer, source = folders[kind]
        folder = copied(source, tmp_path / "odd")
    (folder / name).write_text(content)

    message = (
        f"^{folder}: its tokenizer files are damaged, or newer than tokenizers .*; --tokenizer"
        " SPEC "
    )
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize("options", [dict(model_type="bpe"), dict(user_defined_symbols=["green"])])
def test_sentencepiece_models_that_cannot_be_told(tmp_path, options):
    glimpse.data.tokenizer.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    tokenizer = build_tokenizer(f"sentencepiece({tmp_path}/m.model)", 32)

    with pytest.raises(ValueError, match="has those of type unigram without pieces of the user's"):
        write(tokenizer, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def png(height, width):
    """Return a smooth picture with edges and noise, as bytes."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width] / 50
    waves = 60 * np.sin(x * 3)[..., None] * [1, 0.5, -1]
    edges = 40 * (np.cos(y * 5) > 0)[..., None]
    noise = rng.normal(0, 8, (height, width, 3))
    image = 128 + waves + edges + noise

    out = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_whole_folder(folders, tmp_path, interpolation):
    """transformers' processor and model give the same as ours, on pictures of any size."""
    transformers = pytest.importorskip("transformers")
    tokenizer, _folder = folders["sentencepiece"]
    folder = tmp_path / "hf"
    model = made(
        CLIP,
        tokenizer.vocab_size,
        tokenizer.context,
        eot=tokenizer.end[0],
        interpolation=interpolation,
    )
    hf.save(model, folder)
    write(tokenizer, folder)
    pictures = [png(96, 96), png(200, 300), png(375, 500), png(60, 40)]
    texts = ["a green cat", "an old drawing of one", "", "harbour " * 40]

    # transformers' inputs.
    processor = transformers.AutoProcessor.from_pretrained(folder)
    hf_images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    hf_inputs = processor(
        images=hf_images,
        text=texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
    )

    # Our inputs.
    views = [center_view(picture, 96, "resize_crop", interpolation) for picture in pictures]
    images = torch.stack([torch.from_numpy(view) for view in views]).permute(0, 3, 1, 2)
    patches = patches_of(images.float(), 32).to(torch.uint8)
    patches = normalize_pixels(patches, CLIP.vision.mean, CLIP.vision.std, torch.float32)
    ids = [torch.tensor(tokenizer(text)) for text in texts]
    lengths = torch.tensor([len(i) for i in ids])

    assert isinstance(processor, transformers.CLIPProcessor)
    # the same kernel: not a level of 255 apart
    assert (patches_of(hf_inputs["pixel_values"], 32) - patches).abs().max() < 1e-6

    hf_model = transformers.CLIPModel.from_pretrained(folder).eval()
    towers = model.towers()
    with torch.no_grad():
        hf_outputs = hf_model(**hf_inputs)
        image_features = towers.encode_image(patches, torch.arange(9).expand(4, -1))
        text_features = towers.encode_text(torch.cat(ids), lengths)

    assert (hf_outputs.image_embeds - image_features).abs().max() < 1e-5
    assert (hf_outputs.text_embeds - text_features).abs().max() < 1e-5


def test_a_central_square_becomes_resize_and_crop(tmp_path):
    """HF's processor cannot crop a square first, so pictures that are not square differ slightly.

    They differ at the border, and the grid of samples by part of a pixel.
    """
    transformers = pytest.importorskip("transformers")
    hf.save(made(CLIP, crop="square"), tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", do_normalize=False)

    for height, width, levels in ((96, 96, 0), (300, 300, 0), (200, 300, 0.1), (375, 500, 1.5)):
        picture = png(height, width)
        hf_inputs = processor(Image.open(io.BytesIO(picture)), return_tensors="pt")
        hf_view = 255 * hf_inputs["pixel_values"][0].permute(1, 2, 0).numpy()
        difference = np.abs(hf_view - center_view(picture, 96, "square"))
        assert difference.mean() <= levels + 1e-4
