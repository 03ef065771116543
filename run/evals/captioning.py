"""Captioning: a small decoder, newly drawn, is trained on the captions of a set's train split over frozen patch tokens (FLIP table 7).

Cross-entropy alone, greedy decoding.  Scores by pycocoevalcap, the code of COCO's leaderboard, beside those of saying the most frequent
caption of the train split each time.  What is said goes to RUN/captioning/TAG-SET.jsonl.
"""
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional as F

from data.benchmarks import Images
from model.decoders import PAD, Captioner
from run.evals.embed import Embedder
from run.evals.language import START, Pieces, Reading, fitted, found, keep, padded, tokens
from run.lib.ranks import to_device, told

SHOWN = 3  # captions that are printed
READS = "captions"


@dataclass(frozen=True)
class Options(Reading):
    pass


def check(images: Images, options: Options) -> None:
    images.captions(0), images.other("train").captions(0)
    if not find_spec("pycocoevalcap"):
        raise ValueError("evals: captioning: its metrics are pycocoevalcap's; pip install --no-deps pycocoevalcap==1.2 pycocotools==2.0.11")
    if not shutil.which("java"):
        raise ValueError("evals: captioning: COCO's tokenizer and METEOR run in Java, and there is no `java` on the PATH (8 or newer)")


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """cider, bleu1 to bleu4, rouge_l, meteor, spice where its files are; of each group of images, too; frequent_...: of a constant."""
    train, truth = images.other("train"), [images.captions(i) for i in range(len(images))]
    pairs = [(i, caption) for i in range(len(train)) for caption in train.captions(i)]
    context = model.cfg.data.context
    pieces = Pieces(model.tokenizer, (caption for _, caption in pairs), context)
    rows = [pieces.ids(caption) for _, caption in pairs]
    shown, asked = tokens(model, train), tokens(model, images)

    def losses_of(captioner, samples):
        """(tokens of these captions,)"""
        ids = [rows[s] for s in samples.tolist()]
        said = padded(ids)
        wanted = padded([torch.cat([row[1:], torch.tensor([PAD])]) for row in ids])  # the end is learned, the pads after it are not
        logits = captioner(said, to_device(shown.rows([pairs[s][0] for s in samples.tolist()])))
        return F.cross_entropy(logits[said != PAD], wanted[said != PAD], reduction="none")
    captioner, losses = fitted(lambda: Captioner(len(pieces), context, **options.shape(shown)), options, len(pairs), losses_of,
                               lambda samples: sum(len(rows[s]) for s in samples.tolist()))
    model.say(f"captioning {images.name}: {len(pairs):,} captions of {len(pieces):,} pieces, loss {losses[0]:.2f} to {losses[-1]:.2f}")
    ids = found(len(images), context, lambda samples: captioner.greedy(to_device(asked.rows(samples)), START))
    said = [pieces.text(row) for row in ids.tolist()]
    for i in range(min(SHOWN, len(images))):
        model.say(f"  {images.key(i)}: {said[i]!r}; truth: {truth[i][0]!r}")
    frequent = Counter(caption for _, caption in pairs).most_common(1)[0][0]

    keep(model, "captioning", images, (dict(key=images.key(i), said=said[i], truth=truth[i]) for i in range(len(images))))
    groups = [images.group(i) for i in range(len(images))]
    return json.loads(told(lambda: json.dumps(
        {**scores(said, truth, groups), **{f"frequent_{name}": value for name, value in score([frequent] * len(truth), truth).items()}})))


def scores(said: list[str], truth: list[list[str]], groups: list[str]) -> dict[str, float]:
    """COCO's metrics over all images, and over each group alone (CIDEr's weights of words, too), NAME_GROUP."""
    values = score(said, truth)
    for group in sorted(set(groups) - {""}):
        its = [i for i, other in enumerate(groups) if other == group]
        found = score([said[i] for i in its], [truth[i] for i in its])
        values |= {f"{name}_{group.replace('-', '_')}": value for name, value in found.items()}
    return values


def score(said: list[str], truth: list[list[str]]) -> dict[str, float]:
    """A caption for each image, and what people wrote -> COCO's metrics; CIDEr's scale ends at 10, the others' at 1."""
    from pycocoevalcap import spice
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def cut(captions: list[list[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({i: [dict(caption=" ".join(text.split())) for text in texts] for i, texts in enumerate(captions)})
    texts = cut(truth), cut([[text] for text in said])
    values = dict(cider=Cider().compute_score(*texts)[0])
    values |= {f"bleu{n}": value for n, value in enumerate(Bleu(4).compute_score(*texts, verbose=0)[0], 1)}
    values |= dict(rouge_l=Rouge().compute_score(*texts)[0], meteor=Meteor().compute_score(*texts)[0])
    if (Path(spice.__file__).parent / "lib" / "stanford-corenlp-3.6.0.jar").exists():  # pycocoevalcap would download it: never unasked
        values["spice"] = spice.spice.Spice().compute_score(*texts)[0]
    return {name: float(value) for name, value in values.items()}
