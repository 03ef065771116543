"""Visual question answering: a fusion transformer, newly drawn, reads the question beside frozen
patch tokens; a classifier answers.

Its classes are the most frequent answers of the train split, trained by binary cross-entropy
towards the soft accuracy of each (Bottom-Up and Top-Down, arXiv 1707.07998 section 3.3; METER,
which FLIP table 7 follows). Accuracy is VQAv2's, over all questions and for each kind. Beside it
stand three that see no image: the most frequent answer of train, that of the question's kind, that
of the very same question. What is answered goes to RUN/vqa/TAG-SET.jsonl.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

from glimpse.data.evals.clip_benchmark import Images, Question
from glimpse.model.downstream.decoders import Answerer
from glimpse.run.evals.embed import Embedder
from glimpse.run.evals.language import (
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
from glimpse.run.lib.distributed import to_device

SHOWN = 5  # answers that are printed
# What VQAv2's evaluation takes for the same answer (vqaEval.py of github.com/GT-Vision-Lab/VQA).
NUMBERS = {
    word: str(n)
    for n, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
ARTICLES = {"a", "an", "the"}
MARKS = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
    """.split()
# one apostrophe is missing
CONTRACTIONS = {
    word[: m.start()] + word[m.end() :]: word for word in CONTRACTED for m in re.finditer("'", word)
}
READS = "questions"
__all__ = ["READS", "Options", "check", "evaluate", "fits", "trains_tower"]


@dataclass(frozen=True)
class Options(Reading):
    # classes at most: VQAv2's answers that occur nine times (Bottom-Up and Top-Down)
    answers: int = 3129


def check(images: Images, options: Options) -> None:
    images.questions(0), images.other("train").questions(0)
    if options.answers < 1:
        raise ValueError(f"evals: answers={options.answers}: it must be at least 1")


def evaluate(model: Embedder, images: Images, options: Options) -> dict[str, float]:
    """accuracy and, of answers without an image, frequent, frequent_of_kind, frequent_of_question;
    accuracy_KIND beside frequent_KIND.
    """
    train = images.other("train")
    learned, asked = questions(train), questions(images)
    usual = [(q, Counter(q.answers).most_common(1)[0][0]) for _, q in learned]
    classes = [
        answer for answer, _ in ranked(Counter(answer for _, answer in usual))[: options.answers]
    ]
    numbers = {answer: n for n, answer in enumerate(classes)}
    context = model.cfg.data.context
    pieces = Pieces(model.tokenizer, (q.text for _, q in learned), context)
    model.say(
        f"vqa {images.name}: {len(classes):,} answers, questions of {len(pieces):,} different"
        " pieces"
    )

    def ids_of(some):
        return padded([pieces.ids(q.text) for _, q in some])

    def losses_of(read, samples, image):
        """(questions,)"""
        some = [learned[s] for s in samples.tolist()]
        wanted = torch.zeros(len(some), len(classes))
        for row, (_, q) in zip(wanted, some):
            for answer in set(q.answers) & numbers.keys():
                row[numbers[answer]] = soft_accuracy(answer, q.answers)
        return F.binary_cross_entropy_with_logits(
            read(ids_of(some), image), to_device(wanted), reduction="none"
        ).sum(1)

    answerer, shown = fitted(
        model,
        train,
        options,
        partial(Answerer, len(pieces), context, answers=len(classes)),
        [i for i, _ in learned],
        losses_of,
    )
    seen = tokens(shown, images)

    def answered(samples):
        some = [asked[s] for s in samples.tolist()]
        return answerer(ids_of(some), to_device(seen.rows([i for i, _ in some]))).argmax(
            1, keepdim=True
        )

    best = found(len(asked), 1, answered)
    given = [classes[n] for n in best[:, 0].tolist()]
    for (i, q), answer in list(zip(asked, given))[:SHOWN]:
        model.say(
            f"  {images.key(i)}: {q.text} {answer}; truth: {', '.join(dict.fromkeys(q.answers))}"
        )
    keep(
        model,
        "vqa",
        images,
        (
            dict(key=images.key(i), question=q.text, answer=answer, truth=q.answers)
            for (i, q), answer in zip(asked, given)
        ),
    )
    return results(asked, given, usual)


def questions(images: Images) -> list[tuple[int, Question]]:
    """(image, question) of a whole split, the answers normalised."""
    found = [
        (i, Question(q.text, tuple(map(normal, q.answers)), q.kind))
        for i in range(len(images))
        for q in images.questions(i)
        if q.answers
    ]
    if not found:
        raise ValueError(f"evals: {images.folder}: no questions with answers in {images.split}")
    return found


def ranked(counts: Counter) -> list[tuple[str, int]]:
    """From the most frequent; equals by name, so that no order of reading decides."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def results(
    asked: Sequence[tuple[int, Question]],
    given: Sequence[str],
    usual: Sequence[tuple[Question, str]],
) -> dict[str, float]:
    """Accuracies of answers, and of blind ones; usual: training questions and the answer most
    people gave.
    """
    blind = {
        "": most(usual, lambda q: ""),
        "_of_kind": most(usual, lambda q: q.kind),
        "_of_question": most(usual, lambda q: q.text),
    }
    right = [soft_accuracy(answer, q.answers) for (_, q), answer in zip(asked, given)]
    guessed = {
        name: [soft_accuracy(guess(q), q.answers) for _, q in asked]
        for name, guess in blind.items()
    }
    values = dict(accuracy=mean(right)) | {
        f"frequent{name}": mean(each) for name, each in guessed.items()
    }
    for kind in sorted({q.kind for _, q in asked} - {""}):
        its, name = (
            [n for n, (_, q) in enumerate(asked) if q.kind == kind],
            re.sub(r"\W+", "_", kind),
        )
        values |= {
            f"accuracy_{name}": mean([right[n] for n in its]),
            f"frequent_{name}": mean([guessed["_of_kind"][n] for n in its]),
        }
    return values


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def most(
    usual: Sequence[tuple[Question, str]], group: Callable[[Question], str]
) -> Callable[[Question], str]:
    """The most frequent answer among the questions of the same group; of all, where a group is
    new.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for q, answer in usual:
        counts[group(q)][answer] += 1
    best = {key: ranked(found)[0][0] for key, found in counts.items()}
    overall = ranked(Counter(answer for _, answer in usual))[0][0]
    return lambda q: best.get(group(q), overall)


def soft_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQAv2's: min(n / 3, 1), n of the others having given this answer, averaged over leaving each
    person out in turn.

    Of ten people who agree four times, 1. Where fewer than four were asked, all but one stand for
    the three; an only answer is the truth.
    """
    if len(answers) == 1:
        return float(answer == answers[0])
    enough, same = min(3, len(answers) - 1), sum(a == answer for a in answers)
    return sum(min((same - (a == answer)) / enough, 1.0) for a in answers) / len(answers)


def normal(answer: str) -> str:
    """An answer as VQAv2 compares it: without punctuation and articles, numbers as digits,
    contractions with their apostrophes.

    Where the original leaves answers alone on which all agree, this normalises both sides always.
    """
    text = kept = " ".join(answer.split())
    grouped = re.search(r"\d,\d", text)  # 1,000
    for mark in MARKS:
        kept = kept.replace(
            mark, "" if grouped or f"{mark} " in text or f" {mark}" in text else " "
        )
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", kept).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
