"""A tokenizer's files give its ids in transformers' hands, but for the differences named here; what
is read is what was written.

And the whole folder that a conversion writes: transformers' processor and model on pictures and
captions, ours on the same.
"""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import glimpse.data.tokenizer
from glimpse.data.builders.tokenizer_files import read, write
from glimpse.data.tokenizer import ClipBpe, build, installed, train_sentencepiece
from glimpse.data.transforms import center_view
from glimpse.model.convert import hf
from glimpse.model.vision import normalise
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
REPAIRED = [  # caption, and that which ours reads instead; theirs reads the first as it is
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
    """{kind: (tokenizer, folder)}; CLIP's own where open_clip brings it."""
    top = tmp_path_factory.mktemp("vocabularies")
    (top / "merges.txt").write_text("a title\nc a\nca t</w>\na t</w>\n")
    (top / "vocab.txt").write_text(
        "\n".join([*WORDPIECES, "strasse", "\u03b1\u03c3", "\u03b1", "\u03b1\u03b9"]) + "\n",
        encoding="utf-8",
    )
    train_sentencepiece(TEXTS, top / "words.model", 340)
    specs = {
        "small clip_bpe": f"clip_bpe({top}/merges.txt)",
        "wordpiece": f"wordpiece({top}/vocab.txt)",
        "sentencepiece": f"sentencepiece({top}/words.model)",
    }
    try:
        installed("clip_bpe")
        specs["clip_bpe"] = "clip_bpe"
    except ValueError:
        pass
    made = {}
    for kind, spec in specs.items():
        folder = top / kind.replace(" ", "_")
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "clip"}')
        made[kind] = build(spec, 77 if kind == "clip_bpe" else 32), folder
        write(*made[kind])
    return made


@pytest.fixture(scope="module")
def hf_tokenizers(folders):
    """{kind: transformers' tokenizer}"""
    transformers = pytest.importorskip("transformers")
    return {
        kind: transformers.AutoTokenizer.from_pretrained(folder)
        for kind, (_, folder) in folders.items()
    }


def of(kind, table):
    if kind not in table:
        pytest.skip("open-clip-torch is not installed")
    return table[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids(folders, hf_tokenizers, kind):
    ours, hf_tokenizer = of(kind, folders)[0], of(kind, hf_tokenizers)

    assert type(hf_tokenizer).__name__ == (
        "CLIPTokenizer" if isinstance(ours, ClipBpe) else "TokenizersBackend"
    )
    assert hf_tokenizer.model_max_length == ours.context
    for text in HARD:
        assert hf_tokenizer(text, truncation=True)["input_ids"] == ours(text), text

    batch = hf_tokenizer(HARD, truncation=True, padding="max_length", return_tensors="pt")

    assert batch["input_ids"].shape == (len(HARD), ours.context)
    assert batch["attention_mask"].sum(1).tolist() == [len(ours(text)) for text in HARD]

    if ours.end:
        full = ours("cat " * 200)
        assert len(full) == ours.context
        assert full[-1] == ours.end[0] == hf_tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_captions_are_spelled(folders, hf_tokenizers, kind):
    ours, hf_tokenizer = of(kind, folders)[0], of(kind, hf_tokenizers)
    for text in ("a <|endoftext|>", "<s>a</s> <pad> <0x41>", "[PAD] [MASK]"):
        assert hf_tokenizer(text)["input_ids"] == ours(text)
        assert len(set(hf_tokenizer(text)["input_ids"]) & set(ours.end)) == bool(ours.end)


@pytest.mark.parametrize("kind", ["clip_bpe", "small clip_bpe"])
def test_what_clips_tokenizer_mends_and_theirs_does_not(folders, hf_tokenizers, kind):
    ours, hf_tokenizer = of(kind, folders)[0], of(kind, hf_tokenizers)

    for text, repaired in REPAIRED:
        assert (
            ours(text)
            == hf_tokenizer(repaired, truncation=True)["input_ids"]
            != hf_tokenizer(text, truncation=True)["input_ids"]
        ), text
    with pytest.raises(TypeError):
        hf_tokenizer("\ud83d")


def test_where_wordpiece_differs(folders, hf_tokenizers):
    ours, hf_tokenizer = folders["wordpiece"][0], hf_tokenizers["wordpiece"]

    for text in ("Stra\xdfe", "STRASSE", "STRA\u1e9eE"):
        assert ours(text) == hf_tokenizer(text)["input_ids"] == [len(WORDPIECES)]
    assert (
        ours("\u0391\u03a3") == hf_tokenizer("\u0391\u03a3")["input_ids"] == [len(WORDPIECES) + 1]
    )
    assert (ours(" "), hf_tokenizer(" ")["input_ids"]) == ([0], [])
    # alpha with a iota below
    assert (ours("\u1f80"), hf_tokenizer("\u1f80")["input_ids"]) == (
        [len(WORDPIECES) + 3],
        [len(WORDPIECES) + 2],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_read_again(folders, kind):
    ours, folder = of(kind, folders)
    spec = read(folder)

    assert build(spec, ours.context).fingerprint == ours.fingerprint
    # no copy is needed of what a package brings
    assert (spec == "clip_bpe") == (kind == "clip_bpe")


def test_read_what_transformers_saves(folders, hf_tokenizers, tmp_path):
    """tokenizer.json alone, if it is CLIP's own."""
    of("clip_bpe", hf_tokenizers).save_pretrained(tmp_path / "clip")

    assert not (tmp_path / "clip" / "merges.txt").exists()
    assert read(tmp_path / "clip") == "clip_bpe"

    hf_tokenizers["small clip_bpe"].save_pretrained(tmp_path / "small")

    with pytest.raises(
        ValueError,
        match=(
            "small/tokenizer.json: not the ids of data.tokenizer clip_bpe: 'a photo of a cat' gives"
        ),
    ):
        read(tmp_path / "small")


def copied(folder, to):
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_what_is_none_of_ours(folders, tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            "no tokenizer that we have; needed is one of merges.txt, vocab.txt, tokenizer.model, or"
            " CLIP's tokenizer.json; --tokenizer SPEC names one, as data.tokenizer: clip_bpe, or"
            " sent"
        ),
    ):
        read(tmp_path)

    bert = copied(folders["wordpiece"][1], tmp_path / "bert")
    tree = json.loads((bert / "tokenizer.json").read_text())
    tree["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    (bert / "tokenizer.json").write_text(json.dumps(tree))

    with pytest.raises(
        ValueError,
        match=(
            r"tokenizer.json: not the ids of .*'a photo of a cat' gives \[2, 5, .* 3\] there, \[5, "
        ),
    ):
        read(bert)
    for change, complaint in (
        (lambda v: v | {"cat</w>": 7}, "'cat</w>' is 7, by CLIP's own numbers 513"),
        (
            lambda v: v | {"<new>": len(v)},
            "'<new>': CLIP's vocabulary ends with its two special tokens",
        ),
    ):
        small = copied(folders["small clip_bpe"][1], tmp_path / complaint[1:5].strip("/<>"))
        vocab = json.loads((small / "vocab.json").read_text())
        (small / "vocab.json").write_text(json.dumps(change(vocab)))
        with pytest.raises(ValueError, match=complaint):
            read(small)


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
    folder = copied(folders[kind][1], tmp_path / "odd") if kind else tmp_path
    (folder / name).write_text(content)

    with pytest.raises(
        ValueError,
        match=(
            f"^{folder}: its tokenizer files are damaged, or newer than tokenizers .*; --tokenizer"
            " SPEC "
        ),
    ):
        read(folder)


@pytest.mark.parametrize("how", [dict(model_type="bpe"), dict(user_defined_symbols=["green"])])
def test_sentencepiece_models_that_cannot_be_told(tmp_path, how):
    glimpse.data.tokenizer.sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "m"),
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **how,
    )

    with pytest.raises(ValueError, match="has those of type unigram without pieces of the user's"):
        write(build(f"sentencepiece({tmp_path}/m.model)", 32), tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def png(height, width):
    """A smooth picture with edges and noise, as bytes."""
    rng = np.random.default_rng(height)
    y, x = np.mgrid[:height, :width] / 50
    image = (
        128
        + 60 * np.sin(x * 3)[..., None] * [1, 0.5, -1]
        + 40 * (np.cos(y * 5) > 0)[..., None]
        + rng.normal(0, 8, (height, width, 3))
    )
    out = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_whole_folder(folders, tmp_path, interpolation):
    """Captions and pictures of any size through transformers' processor and model: what ours makes
    of them.
    """
    transformers = pytest.importorskip("transformers")
    tokenizer = folders["sentencepiece"][0]
    model = made(
        CLIP,
        tokenizer.vocab_size,
        tokenizer.context,
        eot=tokenizer.end[0],
        interpolation=interpolation,
    )
    hf.save(model, tmp_path / "hf")
    write(tokenizer, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")

    assert isinstance(processor, transformers.CLIPProcessor)

    pictures = [png(96, 96), png(200, 300), png(375, 500), png(60, 40)]
    texts = ["a green cat", "an old drawing of one", "", "harbour " * 40]
    hf_tokenizers = processor(
        images=[Image.open(io.BytesIO(p)) for p in pictures],
        text=texts,
        return_tensors="pt",
        padding=True,
        truncation=True,
    )
    views = torch.stack(
        [torch.from_numpy(center_view(p, 96, "resize_crop", interpolation)) for p in pictures]
    ).permute(0, 3, 1, 2)
    patches = normalise(
        patches_of(views.float(), 32).to(torch.uint8),
        CLIP.vision.mean,
        CLIP.vision.std,
        torch.float32,
    )

    # the same kernel: not a level of 255 apart
    assert (patches_of(hf_tokenizers["pixel_values"], 32) - patches).abs().max() < 1e-6

    ids = [torch.tensor(tokenizer(text)) for text in texts]
    towers = model.towers()
    with torch.no_grad():
        out = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()(**hf_tokenizers)
        images = towers.encode_image(patches, torch.arange(9).expand(4, -1))
        captions = towers.encode_text(torch.cat(ids), torch.tensor([len(i) for i in ids]))

    assert (out.image_embeds - images).abs().max() < 1e-5
    assert (out.text_embeds - captions).abs().max() < 1e-5


def test_a_central_square_becomes_resize_and_crop(tmp_path):
    """HF's processor has no other: of a picture that is not square the border differs, and the grid
    of samples by part of a pixel.
    """
    transformers = pytest.importorskip("transformers")
    hf.save(made(CLIP, crop="square"), tmp_path / "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf", do_normalize=False)

    for height, width, levels in ((96, 96, 0), (300, 300, 0), (200, 300, 0.1), (375, 500, 1.5)):
        picture = png(height, width)
        hf_tokenizers = (
            255
            * processor(Image.open(io.BytesIO(picture)), return_tensors="pt")["pixel_values"][0]
            .permute(1, 2, 0)
            .numpy()
        )
        apart = np.abs(hf_tokenizers - center_view(picture, 96, "square"))
        assert apart.mean() <= levels + 1e-4
